"""Everything that only an accelerator can say, in under 8 minutes of one H100: kernels, training, resume, scoring.

Each part is a process of its own with a time limit, so that one that fails or hangs stops no other. The result is one
JSON file (--out) and, on the standard output, a table for BENCHMARKS.md. Weights and tokens are random: nothing is
read but this checkout. Needs jax for the device; torch and transformers for the peer of training, lm-eval for that of
scoring, vllm where it is installed; what is missing is said in its row.

    python benchmarks/accelerator.py [--parts train,score] [--out accelerator.json] [--tiny]

--tiny: sizes for a CPU, to see that the program runs; its figures mean nothing. A train step does 6 x weights + 6 x
layers x width x length operations per token (`ModelConfig.train_flops_per_token`), a scored token 2 x parameters. The
ceiling is the fastest bfloat16 product of the same run.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if "resume" in sys.argv:  # what makes a resumed run bitwise the same on CUDA
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_deterministic_ops=true"
TINY = "--tiny" in sys.argv
BLOCKS = ((128, 64), (128, 32), (64, 64), (64, 32), (32, 32))
"""(queries, keys) of a program of the tree kernel."""
TRAIN = (("full", True), ("context", True), ("qkv_context", True), ("context", False))
"""(compute.remat, compute.scan_layers), tried in this order."""
SUBJECTS, QUESTIONS, SHOTS, QUESTION, CHOICES = (2, 3, 24, 8, 4) if TINY else (10, 100, 500, 80, 4)
"""Of the scored requests, shaped as MMLU with five shots: subjects, documents of each, tokens of the shots and of a
question, choices of one token."""


def train_recipe(**compute: Any) -> Any:
    from fineline_jax.models.config import ModelConfig
    from fineline_jax.recipe import Batch, Compute, Data, Optimizer, Recipe, Schedule, Source

    model = ModelConfig(  # configs/llama_1b.py
        vocab_size=32_000, width=2_048, layers=22, heads=32, kv_heads=4, mlp_width=5_632, context=2_048
    )
    if TINY:
        model = dataclasses.replace(model, vocab_size=256, width=64, layers=2, heads=4, kv_heads=2, mlp_width=96)
    length, sequences = (64, 8) if TINY else (2_048, 16)
    return Recipe(
        name="accelerator", model=model, data=Data((Source("random"),), sequence_length=length),
        batch=Batch(sequences), optimizer=Optimizer(Schedule(kind="constant")), tokens=sequences * length * 1000,
        compute=Compute(dtype="bfloat16", **compute),
    )  # fmt: skip


def hugging_face(model: Any) -> Any:
    import transformers

    return transformers.LlamaConfig(
        vocab_size=model.vocab_size, hidden_size=model.width, intermediate_size=model.mlp_width,
        num_hidden_layers=model.layers, num_attention_heads=model.heads, num_key_value_heads=model.kv_heads,
        max_position_embeddings=model.context, architectures=["LlamaForCausalLM"],
    )  # fmt: skip


def seconds(run: Callable[[], Any], repeats: int) -> float:
    """Mean of `repeats` runs that are given to the device one after another, after one more."""
    import jax

    jax.block_until_ready(run())
    start = time.perf_counter()
    for _ in range(repeats):
        result = run()
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / repeats


def ceilings() -> dict:
    import jax
    import jax.numpy as jnp

    size, numbers = (256, 1 << 16) if TINY else (8_192, 1 << 30)
    found: dict[str, Any] = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    multiply, copy = jax.jit(jnp.matmul), jax.jit(lambda x: x + 1)
    for dtype in ("bfloat16", "float32"):
        a, b = (jax.random.normal(jax.random.key(i), (size, size), dtype) for i in range(2))
        found[f"{dtype}_tflops"] = 2 * size**3 / seconds(lambda a=a, b=b: multiply(a, b), 20) / 1e12
    x = jnp.ones(numbers, jnp.bfloat16)
    return found | {"copy_gb_per_s": 4 * numbers / seconds(lambda: copy(x), 20) / 1e9}


def tree_kernel() -> dict:
    """The kernel against `reference`, and its speed for the pairs that are seen, against causal attention over rows."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from fineline_jax.mesh import make_mesh
    from fineline_jax.models import attention
    from fineline_jax.models.sharding import HEADS, TOKENS
    from fineline_jax.models.tree_attention import dispatch, gpu
    from fineline_jax.models.tree_attention.blockwise import reference

    platform = jax.default_backend()
    length, heads, head_dim, stem = (128, 2, 16, 64) if TINY else (8_192, 32, 128, 2_048)
    branch = (length - stem) // 48
    ends = {"causal": np.full(length, length), "tree": np.full(length, length)}
    begins = np.arange(stem, length) - (np.arange(length - stem) % branch)
    ends["tree"][stem:] = np.minimum(begins + branch, length)
    found: dict[str, Any] = {"shape": [length, heads, head_dim]}
    mesh = make_mesh(devices=jax.devices()[:1])

    def placed(array: Any, spec: Any) -> Any:
        return jax.device_put(array, jax.NamedSharding(mesh, spec))

    def inputs(dtype: str, length: int) -> list:
        return [jax.random.normal(jax.random.key(i), (1, length, heads, head_dim), dtype) for i in range(3)]

    for dtype in ("bfloat16", "float32"):
        short = min(length, 1_024)
        end = np.minimum(ends["tree"][-short:] - (length - short), short).astype(np.int32)[None]
        with jax.default_matmul_precision("highest"):
            exact = jax.jit(reference)(*(x.astype(jnp.float32) for x in inputs(dtype, short)), end)
        with jax.set_mesh(mesh):
            attend = dispatch.over_rows(dispatch.pick(platform), placed(end, TOKENS))
            ours = jax.jit(attend)(*(placed(x, HEADS) for x in inputs(dtype, short)))
        found[f"{dtype}_largest_error"] = float(np.abs(np.asarray(ours, np.float32) - np.asarray(exact)).max())
        arrays = [placed(x, HEADS) for x in inputs(dtype, length)]
        for name, row_end in ends.items():
            operations = 4 * heads * head_dim * int((row_end - np.arange(length)).sum())
            end = placed(row_end.astype(np.int32)[None], TOKENS)
            runs = {"": dispatch.over_rows(dispatch.pick(platform), end)}
            if platform == "gpu":
                runs |= {f"_{q}x{k}": attention.on_each_device(lambda *x, q=q, k=k, e=row_end: gpu.kernel(
                    *x, jnp.asarray(e, jnp.int32)[None], query_block=q, key_block=k)) for q, k in BLOCKS}  # fmt: skip
            if name == "causal":
                which = attention.pick("auto", jnp.dtype(dtype), platform)
                runs[f"_by_{which}"] = attention.causal(which)
            for how, run in runs.items():
                step = jax.jit(run)
                try:
                    with jax.set_mesh(mesh):
                        of_run = operations / seconds(lambda step=step, arrays=arrays: step(*arrays), 10) / 1e12
                except Exception as error:  # a block size that the device has no room for
                    of_run = f"failed: {str(error).splitlines()[0][:100]}"
                found[f"{dtype}_{name}{how}_tflops"] = of_run
        speeds = {one: rate for one, rate in found.items() if f"{dtype}_causal" in one and isinstance(rate, float)}
        others = [speeds.pop(one) for one in list(speeds) if "_by_" in one]
        found[f"{dtype}_speed"] = max(speeds.values()) / max(others) if speeds and others else None
    return found


def training(recipe: Any, steps: int) -> tuple[Any, Any, list[tuple]]:
    """The train step, not yet jitted, the first state, and the other arguments of so many steps."""
    import jax
    import numpy as np

    from fineline_jax.mesh import make_mesh
    from fineline_jax.training.schedule import rates
    from fineline_jax.training.step import BATCH_SPEC, initial_state, make_train_step

    mesh, random = make_mesh(), np.random.default_rng(0)
    jax.set_mesh(mesh)
    shape = steps, recipe.batch.sequences, recipe.data.sequence_length + 1
    windows = random.integers(0, recipe.model.vocab_size, shape, np.int32)
    sharding = jax.NamedSharding(mesh, BATCH_SPEC)
    given = [(jax.device_put(one, sharding), *rates(recipe, recipe.tokens // 2)) for one in windows]
    return make_train_step(recipe, mesh), jax.jit(lambda: initial_state(recipe))(), given


def train() -> dict:
    """Tokens per second of a step of a 1.1 B Llama by choice of remat and scan."""
    import jax

    found: dict[str, dict] = {}
    for remat, scan in TRAIN:
        recipe, name = train_recipe(remat=remat, scan_layers=scan), f"{remat}_{'scan' if scan else 'unrolled'}"
        try:
            one_step, state, [given] = training(recipe, 1)
            start = time.perf_counter()
            step = jax.jit(one_step, donate_argnums=0).lower(state, *given).compile()
            compile_s = time.perf_counter() - start

            def run() -> Any:
                nonlocal state
                state, metrics = step(state, *given)  # noqa: B023  (run in this turn of the loop only)
                return metrics["loss"]

            rate = recipe.tokens_per_step / seconds(run, 2 if TINY else 5)
            memory = step.memory_analysis()
            used = memory.argument_size_in_bytes + memory.temp_size_in_bytes
            flops = rate * recipe.model.train_flops_per_token(recipe.data.sequence_length)
            found[name] = {"tokens_per_s": rate, "tflops": flops / 1e12, "gib": used / 2**30, "compile_s": compile_s}
        except Exception as error:  # out of memory
            found[name] = {"failed": str(error).splitlines()[0][:200]}
        state = None
        print(json.dumps(found), flush=True)  # what is there if the time runs out
    return found


def train_peer() -> dict:
    """The same with Hugging Face's Llama, torch.compile and fused AdamW, masters in float32, products in bfloat16."""
    import torch
    import transformers

    recipe, device = train_recipe(), "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    length, found = recipe.data.sequence_length, {"torch": torch.__version__}
    for sequences in (recipe.batch.sequences, recipe.batch.sequences // 2, recipe.batch.sequences // 4):
        try:
            network = transformers.LlamaForCausalLM(hugging_face(recipe.model)).to(device).train()
            optimizer = torch.optim.AdamW(
                network.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
            )
            compiled = torch.compile(network, backend="eager" if TINY else "inductor")
            tokens = torch.randint(0, recipe.model.vocab_size, (sequences, length), device=device)

            def run() -> float:
                with torch.autocast(device, torch.bfloat16):
                    loss = compiled(input_ids=tokens, labels=tokens).loss  # noqa: B023  (run in this turn only)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)  # noqa: B023
                optimizer.step()  # noqa: B023
                optimizer.zero_grad(set_to_none=True)  # noqa: B023
                return loss.item()

            run(), run()
            start, repeats = time.perf_counter(), 2 if TINY else 5
            for _ in range(repeats):
                run()
            rate = sequences * length * repeats / (time.perf_counter() - start)
            return found | {"tokens_per_s": rate, "sequences": sequences}
        except torch.OutOfMemoryError:
            network = optimizer = compiled = None
            torch.cuda.empty_cache()
    return found | {"failed": "out of memory with 4 sequences"}


def resume() -> dict:
    """Are four steps bitwise two, a state through host memory and a program compiled again, and two?"""
    import jax
    import numpy as np

    recipe = train_recipe(remat="context")
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, layers=2))
    one_step, start, given = training(recipe, 4)

    def after(state: Any, arguments: list[tuple]) -> Any:
        step = jax.jit(one_step)
        for one in arguments:
            state, _ = step(state, *one)
        return state

    whole, half = after(start, given), after(start, given[:2])
    placed = jax.tree.map(lambda x: x.sharding, half)
    saved = jax.device_get(half)
    jax.clear_caches()
    resumed = after(jax.device_put(saved, placed), given[2:])
    pairs = zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True)
    return {"bitwise": all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs)}


def mmlu_like(vocabulary: int) -> list[tuple[list[int], int]]:
    """(context, answer) of each request, by subject, question and choice; all random."""
    import numpy as np

    random = np.random.default_rng(0)
    draw = lambda count: random.integers(3, vocabulary, count).tolist()
    choices, requests = draw(CHOICES), []
    for _ in range(SUBJECTS):
        shots = draw(SHOTS)
        for _ in range(QUESTIONS):
            context = shots + draw(QUESTION)
            requests += [(context, choice) for choice in choices]
    return requests


def score_config() -> Any:
    from fineline_jax.models.config import ModelConfig

    if TINY:
        return dataclasses.replace(train_recipe().model, context=64)
    return ModelConfig(vocab_size=32_000, width=4_096, layers=32, heads=32, mlp_width=11_008, context=2_048)


def score() -> dict:
    """A 7B model in bfloat16 on requests shaped as MMLU with five shots."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from fineline_jax.mesh import make_mesh
    from fineline_jax.models import decoder
    from fineline_jax.scoring.engine import prefix_tree, scorer
    from fineline_jax.scoring.requests.pack import Ragged, RequestTokens

    config, mesh = score_config(), make_mesh()
    asked = mmlu_like(config.vocab_size)
    contexts = [context for context, _ in asked[::CHOICES]]
    ragged = lambda rows: Ragged(np.concatenate(rows).astype(np.int32), np.cumsum([0, *map(len, rows)]))
    requests = RequestTokens(
        ragged([*contexts, [1]]), ragged([[answer] for _, answer in asked]),
        np.arange(len(asked)) // CHOICES, np.arange(len(asked)) // (CHOICES * QUESTIONS),
    )  # fmt: skip
    unique = prefix_tree.plan(requests, config.context).unique_tokens
    jax.set_mesh(mesh)
    as_bfloat16 = lambda: jax.tree.map(lambda x: x.astype(jnp.bfloat16), decoder.init_params(config, jax.random.key(0)))
    params = jax.jit(as_bfloat16)()
    score_all = scorer.make_scorer(requests, config, mesh, "bfloat16")
    laps = []
    for _ in range(3):
        start = time.perf_counter()
        score_all(params)
        laps.append(time.perf_counter() - start)
    rate = unique / min(laps[1:])
    of_model = {"parameters": config.parameters, "documents": len(contexts), "unique_tokens": unique}
    measured = {"first_s": laps[0], "unique_tokens_per_s": rate, "documents_per_s": len(contexts) / min(laps[1:])}
    return of_model | measured | {"tflops": 2 * config.parameters * rate / 1e12}


def score_peer() -> dict:
    """lm-eval's Hugging Face backend on the same requests, batch size "auto", its logits cache on."""
    import torch
    import transformers
    from lm_eval.models.huggingface import HFLM
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    config, device = hugging_face(score_config()), "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    words = Tokenizer(WordLevel({str(i): i for i in range(config.vocab_size)}, unk_token="0"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="1", pad_token="2")
    peer = HFLM(model, tokenizer=tokenizer, batch_size="auto", max_length=config.max_position_embeddings, device=device)
    asked = [((str(context[-8:]), str(i)), context, [answer]) for i, (context, answer) in
             enumerate(mmlu_like(config.vocab_size))]  # fmt: skip
    peer._loglikelihood_tokens(asked[: 4 * CHOICES], disable_tqdm=True)
    start = time.perf_counter()
    peer._loglikelihood_tokens(asked, disable_tqdm=True)
    return {"documents_per_s": len(asked) / CHOICES / (time.perf_counter() - start), "batch": peer.batch_sizes}


def score_vllm() -> dict:
    """vLLM with prefix caching: one prompt per document, the probabilities of its next token."""
    import tempfile

    import vllm

    config = hugging_face(score_config())
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        model = vllm.LLM(
            folder, load_format="dummy", dtype="bfloat16", skip_tokenizer_init=True, enable_prefix_caching=True,
            max_model_len=config.max_position_embeddings,
        )  # fmt: skip
        prompts = [{"prompt_token_ids": context} for context, _ in mmlu_like(config.vocab_size)[::CHOICES]]
        wanted = vllm.SamplingParams(max_tokens=1, logprobs=20, detokenize=False)
        model.generate(prompts[:4], wanted)
        model.reset_prefix_cache()
        start = time.perf_counter()
        model.generate(prompts, wanted)
    return {"documents_per_s": len(prompts) / (time.perf_counter() - start), "vllm": vllm.__version__}


PARTS: dict[str, tuple[Callable[[], dict], int, str]] = {
    "ceilings": (ceilings, 40, "jax"),
    "tree_kernel": (tree_kernel, 80, "jax"),
    "train": (train, 130, "jax"),
    "train_peer": (train_peer, 70, "torch"),
    "resume": (resume, 40, "jax"),
    "score": (score, 60, "jax"),
    "score_peer": (score_peer, 50, "lm_eval"),
    "score_vllm": (score_vllm, 120, "vllm"),
}
"""Part -> (function, seconds at most, package it needs); without vllm 470 seconds together."""


def in_a_process(name: str) -> dict:
    """What the part found, or its last words under the key `failed`."""
    _, limit, package = PARTS[name]
    limit *= 6 if TINY else 1  # a CPU compiles the same programs
    if importlib.util.find_spec(package) is None:
        return {"failed": f"{package} is not installed"}
    command = [sys.executable, __file__, "--part", name, *(["--tiny"] if TINY else [])]
    checkout = str(Path(__file__).resolve().parent.parent)
    environment = os.environ | {
        "PYTHONPATH": checkout,
        "JAX_TRACEBACK_FILTERING": "off",
    }  # the last line says what it is
    start = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment)
        out, failed = done.stdout, (done.stderr.strip().splitlines() or ["no message"])[-1] if done.returncode else ""
    except subprocess.TimeoutExpired as error:
        out, failed = (error.stdout or b"").decode(), f"not finished after {limit} s"  # bytes, whatever `text` says
    lines = [line for line in out.splitlines() if line.startswith("{")]
    found = json.loads(lines[-1]) if lines else {}
    return found | ({"failed": failed} if failed else {}) | {"seconds": round(time.perf_counter() - start, 1)}


def table(parts: dict[str, dict]) -> str:
    """Rows for BENCHMARKS.md: figure, measured, bar; of one that is not there, the reason of the part."""
    get = lambda part, name: parts.get(part, {}).get(name)
    over = lambda value, other: f"{value / other:.2f}" if value and other else None
    best = max((one for one in parts.get("train", {}).values() if isinstance(one, dict) and "tflops" in one),
               key=lambda one: one["tokens_per_s"], default={})  # fmt: skip
    rows = [
        ("bfloat16 product, TFLOP/s", "ceilings", "", get("ceilings", "bfloat16_tflops")),
        ("tree kernel, largest error, bfloat16", "tree_kernel", "< .02", get("tree_kernel", "bfloat16_largest_error")),
        ("tree kernel over causal attention, equal work", "tree_kernel", "", get("tree_kernel", "bfloat16_speed")),
        ("train step, 1.1 B: MFU", "train", "≥ .45", over(best.get("tflops"), get("ceilings", "bfloat16_tflops"))),
        ("train step over torch.compile", "train_peer", "≥ 1.0",
         over(best.get("tokens_per_s"), get("train_peer", "tokens_per_s"))),
        ("resumed bitwise", "resume", "True", get("resume", "bitwise")),
        ("scoring, 7B, share of the ceiling", "score", "≥ .40",
         over(get("score", "tflops"), get("ceilings", "bfloat16_tflops"))),
    ]  # fmt: skip
    for part in ("score_peer", "score_vllm"):
        speed = over(get("score", "documents_per_s"), get(part, "documents_per_s"))
        rows.append((f"scoring over {PARTS[part][2]}, documents", part, "", speed))
    lines = ["| figure | measured | bar |", "|---|---|---|"]
    for name, part, bar, value in rows:
        missing = f"– ({get(part, 'failed') or 'not measured'})".replace("|", "/")
        shown = missing if value is None else f"{value:.3g}" if isinstance(value, float) else value
        lines.append(f"| {name} | {shown} | {bar} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--out", type=Path, default=Path("accelerator.json"))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--part", choices=tuple(PARTS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        print(json.dumps(PARTS[arguments.part][0]()), flush=True)
        return
    parts: dict[str, dict] = {}
    for name in arguments.parts.split(","):
        parts[name] = in_a_process(name)
        arguments.out.write_text(json.dumps(parts, indent=2) + "\n")
        print(name, parts[name], file=sys.stderr, flush=True)
    print(table(parts))


if __name__ == "__main__":
    main()
