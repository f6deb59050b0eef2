"""Scoring time against lm-eval's Hugging Face backend: same random Llama, same text, float32, from text to metrics.

A Llama of about 30 M parameters with a vocabulary of 32,000 is made with random weights. For each case, lm-eval and
fineline_jax run in processes of their own, one after the other; each is timed from the benchmark's text to its
metrics, imports not counted: for lm-eval building the requests, tokenizing, scoring and aggregating; for ours
preparing the pack, planning, compiling, scoring and aggregating. lm-eval gets the batch size that is fastest of
--batch-sizes on a sample, and its logits cache. Log-likelihoods are compared request by request.

`first` counts everything; `each` is what a checkpoint of a series costs after the first: ours scores with the pack,
the plan and the compiled step at hand, lm-eval builds its requests again for every model.

    python benchmarks/score_against_lm_eval.py --tokenizer TOKENIZER_FOLDER [--benchmarks DIR] [--cases mmlu,piqa]
        [--limit 100] [--out results.json]

Needs torch and accelerate. --benchmarks: data sets in Hugging Face layout; without it the hub is read. The case
`core` scores six of the nine tasks of configs/suites/core.yaml. `series` scores ten checkpoints on them with one
`fineline score`, held against ten processes of lm-eval, one for each checkpoint, with the batch size that was best for
`core`, which has to be among the cases before it. Here both are timed from the start of the process to its end; one
process of lm-eval is run and counted ten times.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CASES = {
    "mmlu": "mmlu_abstract_algebra@5,mmlu_anatomy@5,mmlu_astronomy@5",
    "mmlu_continuation": ",".join(
        f"mmlu_{subject}_continuation@5" for subject in ("abstract_algebra", "anatomy", "astronomy")
    ),
    "arc_challenge": "arc_challenge@25",
    "piqa": "piqa@0",
    "core": "piqa@0,winogrande@0,arc_easy@0,arc_challenge@0,openbookqa@0,lambada_openai@0",
}
CONTEXT = 2048
CHECKPOINTS = 10


def make_model(folder: Path, tokenizer: Path, seed: int) -> None:
    import torch
    import transformers

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=32_000,
        hidden_size=384,
        intermediate_size=1_024,
        num_hidden_layers=4,
        num_attention_heads=6,
        max_position_embeddings=CONTEXT,
        initializer_range=0.05,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)


def peer(arguments: argparse.Namespace) -> dict:
    import accelerate  # noqa: F401  (of lm-eval's torch backend)
    import lm_eval
    import lm_eval.utils
    import numpy as np
    import torch
    from lm_eval.models.huggingface import HFLM

    from fineline_jax.scoring.requests import suite, tasks

    vars(lm_eval.utils.env).pop(
        "from_string", None
    )  # fineline_jax speeds up lm-eval's templates; here it runs as it is
    source = tasks.local_folder(arguments.benchmarks) if arguments.benchmarks else None

    def run(batch_size: int, limit: int | None) -> tuple[float, dict, dict]:
        start = time.perf_counter()
        model = HFLM(
            pretrained=str(arguments.model),
            dtype="float32",
            device="cpu",
            batch_size=batch_size,
            max_length=CONTEXT,
            logits_cache=True,
        )
        loaded, _ = tasks.load_tasks(suite.open_suite(CASES[arguments.case]), source)
        definitions = {task.name: task.definition for task in loaded}
        result = lm_eval.evaluate(
            model, {"tasks": definitions}, limit=limit, bootstrap_iters=0, log_samples=True, verbosity="ERROR"
        )
        assert result is not None
        return time.perf_counter() - start, result, definitions

    best, *others = arguments.batch_sizes
    if others:
        run(8, 4)  # threads, allocator
        sample = 16
        tuned = {size: run(size, sample)[0] for size in arguments.batch_sizes}
        best = min(tuned, key=lambda size: tuned[size])
    seconds, result, definitions = run(best, arguments.limit)
    loglikelihood = [
        float(response[0][0])
        for name in definitions
        for sample in result["samples"][name]
        for response in sample["resps"]
    ]
    np.save(arguments.out, np.array(loglikelihood))
    accuracy = {name: result["results"][name]["acc,none"] for name in definitions}
    return {
        "seconds": seconds,
        "batch_size": best,
        "accuracy": accuracy,
        "peak_gib": peak_gib(),
        "threads": torch.get_num_threads(),
        "versions": {"lm_eval": lm_eval.__version__, "torch": torch.__version__},
    }


def ours(arguments: argparse.Namespace) -> dict:
    from fineline_jax.cpu_backend import prepare_cpu

    prepare_cpu()
    import jax
    import numpy as np

    from fineline_jax import prepare_pack
    from fineline_jax.checkpoints import load
    from fineline_jax.checkpoints.open import open_series
    from fineline_jax.recipe import MeshShape
    from fineline_jax.scoring.engine import scorer
    from fineline_jax.scoring.metrics import tidy
    from fineline_jax.scoring.requests import pack
    from fineline_jax.scoring.series import auto_mesh

    made = Path(tempfile.mkdtemp())
    mesh = auto_mesh.scoring_mesh(MeshShape(), [open_series(str(arguments.model))])
    jax.block_until_ready(jax.numpy.zeros(1))

    def prepare(out: Path, limit: int | None) -> pack.Pack:
        benchmarks = arguments.benchmarks
        return prepare_pack(
            CASES[arguments.case], arguments.model, out, benchmarks=benchmarks, max_context=CONTEXT, limit=limit
        )

    prepare(made / "imports", 1)  # lm-eval, the tokenizer's library; the peer has them by its first small run
    start = time.perf_counter()
    prepared = prepare(made / "pack", arguments.limit)
    prepare_s = time.perf_counter() - start
    times = []
    for _ in range(3):
        start = time.perf_counter()
        config, params = load.load(open_series(str(arguments.model)).checkpoints[0], mesh)
        if not times:
            score = scorer.make_scorer(prepared.request_tokens, config, mesh, context=CONTEXT)
        loglikelihood, greedy = score(params)
        found = tidy.of_tasks(prepared, loglikelihood, greedy, resample=False)  # nor does the peer
        times.append(time.perf_counter() - start)
    np.save(arguments.out, loglikelihood)
    names = [name.partition("@")[0] for name in CASES[arguments.case].split(",")]
    return {
        "prepare_s": prepare_s,
        "first_s": prepare_s + times[0],
        "each_s": min(times[1:]),
        "accuracy": {name: found[name]["acc"].value for name in names},
        "peak_gib": peak_gib(),
        "devices": jax.device_count(),
        "versions": {"jax": jax.__version__},
    }


def peak_gib() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


def series_of_ten(arguments: argparse.Namespace, folder: Path, batch_size: int) -> dict:
    """`fineline score` over ten checkpoints, from the command to the last score file: imports, preparing, compiling and
    all, and the share of the time between its first and last checkpoint that is not spent in the model; and a process
    of lm-eval for one of them."""
    root, out = folder / "series", folder / "scores"
    for index in range(CHECKPOINTS):
        make_model(root / f"step{index}", arguments.tokenizer, index)
    command = [sys.executable, "-m", "fineline_jax", "score", str(root), "--out", str(out)]
    command += ["--suite", CASES["core"], "--max-context", str(CONTEXT)]
    command += ["--benchmarks", str(arguments.benchmarks)] if arguments.benchmarks else []
    command += ["--limit", str(arguments.limit)] if arguments.limit else []
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"fineline score failed:\n{done.stderr[-3000:]}")
    laps = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    model, other = (sum(lap[name] for lap in laps[1:]) for name in ("model_seconds", "other_seconds"))
    start = time.perf_counter()
    in_a_process("peer", "core", argparse.Namespace(**vars(arguments) | {"batch_sizes": [batch_size]}), folder)
    theirs = time.perf_counter() - start
    return {
        "seconds": seconds,
        "checkpoints": len(laps),
        "outside_model": other / (model + other),
        "peer_seconds_of_one": theirs,
        "ratio": round(len(laps) * theirs / seconds, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of a tokenizer of at most 32,000 ids")
    parser.add_argument("--benchmarks", type=Path, default=None)
    parser.add_argument("--cases", default="mmlu,mmlu_continuation,arc_challenge,piqa,core")
    parser.add_argument("--limit", type=int, default=None, help="documents of each task, for a shorter run")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--worker", choices=("ours", "peer"), help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps({"peer": peer, "ours": ours}[arguments.worker](arguments)))
        return
    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_model(folder / "model", arguments.tokenizer, 0)
        for case in arguments.cases.split(","):
            if case == "series":
                results[case] = series_of_ten(arguments, folder, results["core"]["peer"]["batch_size"])
                print(json.dumps({case: results[case]}, indent=2), flush=True)
                continue
            found = {name: in_a_process(name, case, arguments, folder) for name in ("ours", "peer")}
            results[case] = compared(found, folder, case)
            print(json.dumps({case: results[case]}, indent=2), flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=2) + "\n")


def in_a_process(name: str, case: str, arguments: argparse.Namespace, folder: Path) -> dict:
    command = [sys.executable, __file__, "--worker", name, "--case", case, "--model", str(folder / "model")]
    command += ["--tokenizer", str(arguments.tokenizer), "--out", str(folder / f"{case}-{name}.npy")]
    command += ["--benchmarks", str(arguments.benchmarks)] if arguments.benchmarks else []
    command += ["--limit", str(arguments.limit)] if arguments.limit else []
    command += ["--batch-sizes", *map(str, arguments.batch_sizes)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} failed on {case}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compared(found: dict[str, dict], folder: Path, case: str) -> dict:
    import numpy as np

    mine, theirs = (np.load(folder / f"{case}-{name}.npy") for name in ("ours", "peer"))
    return {
        "requests": len(mine),
        "ratio_first": round(found["peer"]["seconds"] / found["ours"]["first_s"], 2),
        "ratio_each": round(found["peer"]["seconds"] / found["ours"]["each_s"], 2),
        "largest_difference": float(np.max(np.abs(mine - theirs))),
        "same_accuracy": found["ours"]["accuracy"] == found["peer"]["accuracy"],
        **found,
    }


if __name__ == "__main__":
    main()
