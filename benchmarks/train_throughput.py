"""Training throughput against Hugging Face LlamaForCausalLM + torch.optim.AdamW, float32, same model and batch.

Each lives in a process of its own and takes a few steps in turn while the other one sleeps (A B A B ...), so that a
machine whose speed drifts hits both. Same sizes, clipping and fresh random windows. Compared are the medians of all
steps; `ratios` are the quartiles of the ratio over the turns. Ours runs with the settings that the command makes
for the CPU (`fineline_jax.cpu_backend`), torch as it comes, or with --peer-keeps-memory with
the same settings of the heap.
Needs torch.

    python benchmarks/train_throughput.py [--steps 3] [--turns 15] [--vocabulary 32k] [--sequences 16]
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

from fineline_jax.cpu_backend import keep_freed_memory, prepare_cpu

if "peer" not in sys.argv:
    prepare_cpu()
elif "--peer-keeps-memory" in sys.argv:
    keep_freed_memory()

import jax
import numpy as np
import torch
import transformers

from fineline_jax.mesh import make_mesh
from fineline_jax.models.config import ModelConfig
from fineline_jax.recipe import Batch, Compute, Data, Loss, Optimizer, Recipe, Schedule, Source
from fineline_jax.training.schedule import rates
from fineline_jax.training.step import BATCH_SPEC, initial_state, make_train_step

MODELS = {
    "4k": ModelConfig(vocab_size=4_096, width=256, layers=6, heads=8, mlp_width=688, context=1024),
    "32k": ModelConfig(vocab_size=32_000, width=96, layers=6, heads=6, mlp_width=256, context=1024),
}
"""Two models of 7 M parameters: a vocabulary fit for the size, and Llama's."""


def ours(recipe: Recipe):
    mesh = make_mesh()
    jax.set_mesh(mesh)
    state = jax.jit(lambda: initial_state(recipe))()
    step = jax.jit(make_train_step(recipe, mesh), donate_argnums=0)
    sharding = jax.NamedSharding(mesh, BATCH_SPEC)

    def run(index: int, windows: np.ndarray) -> float:
        nonlocal state
        state, metrics = step(state, jax.device_put(windows, sharding), *rates(recipe, index * recipe.tokens_per_step))
        return float(metrics["loss"])

    return run


def peer(recipe: Recipe):
    model = recipe.model
    config = transformers.LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.width,
        intermediate_size=model.mlp_width,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        max_position_embeddings=model.context,
        tie_word_embeddings=False,
        use_cache=False,
    )
    network = transformers.LlamaForCausalLM(config).float().train()
    parameters = sum(p.numel() for p in network.parameters())
    assert parameters == model.parameters, (parameters, model.parameters)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1)

    def run(index: int, windows: np.ndarray) -> float:
        tokens = torch.from_numpy(windows.astype(np.int64))
        logits = network(input_ids=tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return run


WARM_UP = 20
"""Steps before the clock: glibc's heap grows during the first ones, and new pages are dear, above all in a virtual
machine. Training for an hour, nobody sees them."""


def work(name: str, recipe: Recipe) -> None:
    """Compile and warm up; then take as many steps as each line of the standard input says, and answer with the seconds
    of each."""
    run = {"ours": ours, "peer": peer}[name](recipe)
    random = np.random.default_rng(0)
    shape = (recipe.batch.sequences, recipe.data.sequence_length + 1)
    index = 0

    def timed() -> float:
        nonlocal index
        windows = random.integers(0, recipe.model.vocab_size, shape, dtype=np.int32)
        start = time.perf_counter()
        run(index, windows)
        index += 1
        return time.perf_counter() - start

    for _ in range(WARM_UP):
        timed()
    print("[]", flush=True)
    for line in sys.stdin:
        print(json.dumps([timed() for _ in range(int(line))]), flush=True)


class Worker:
    """A process of this program that measures one of the two; made when it is warm."""

    def __init__(self, name: str):
        command = [sys.executable, __file__, *sys.argv[1:], "--worker", name]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.answer()

    def answer(self) -> list[float]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a worker ended: {self.process.args}")
        return json.loads(line)

    def steps(self, count: int) -> list[float]:
        assert self.process.stdin is not None
        print(count, file=self.process.stdin, flush=True)
        return self.answer()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--vocabulary", choices=tuple(MODELS), default="4k")
    parser.add_argument("--peer-keeps-memory", action="store_true")
    parser.add_argument("--worker", choices=("ours", "peer"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    tokens = arguments.sequences * arguments.length
    recipe = Recipe(
        name="throughput",
        model=MODELS[arguments.vocabulary],
        data=Data((Source("random"),), sequence_length=arguments.length),
        batch=Batch(arguments.sequences),
        optimizer=Optimizer(Schedule(kind="constant")),
        tokens=tokens * 1000,
        loss=Loss(chunk_tokens=512),
        compute=Compute(dtype="float32", remat="none", scan_layers=False),
    )
    if arguments.worker:
        work(arguments.worker, recipe)
        return
    workers = {name: Worker(name) for name in ("ours", "peer")}
    turns = [{name: worker.steps(arguments.steps) for name, worker in workers.items()} for _ in range(arguments.turns)]
    median = {name: statistics.median(s for turn in turns for s in turn[name]) for name in workers}
    ratios = [statistics.median(turn["peer"]) / statistics.median(turn["ours"]) for turn in turns]
    result = {
        "parameters": recipe.model.parameters,
        "tokens_per_step": tokens,
        "ours_tokens_per_s": round(tokens / median["ours"]),
        "peer_tokens_per_s": round(tokens / median["peer"]),
        "ratio": round(median["peer"] / median["ours"], 3),
        "ratios": [round(quartile, 3) for quartile in statistics.quantiles(ratios, n=4)],
        "versions": {"jax": jax.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "torch_threads": torch.get_num_threads(),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
