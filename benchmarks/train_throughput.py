"""Training throughput against Hugging Face LlamaForCausalLM + torch.optim.AdamW, float32, same model and batch.

Both run in this process in turn (A B A B ...), so a drifting machine hits both. Same sizes, same clipping, same
fresh random windows; medians of the step times are compared. Needs torch.

    python benchmarks/train_throughput.py [--steps 20] [--sequences 16] [--length 256]
"""

import argparse
import json
import statistics
import time

from fineline_jax.memory import keep_freed_memory

keep_freed_memory()

import jax
import numpy as np
import torch
import transformers

from fineline_jax.mesh import make_mesh
from fineline_jax.models.config import ModelConfig
from fineline_jax.recipe import Batch, Compute, Data, Loss, Optimizer, Recipe, Schedule, Source
from fineline_jax.training.step import BATCH_SPEC, initial_state, make_train_step

MODEL = ModelConfig(vocab_size=4096, width=256, layers=6, heads=8, mlp_width=688, context=1024)


def ours(recipe: Recipe):
    mesh = make_mesh()
    jax.set_mesh(mesh)
    state = jax.jit(lambda: initial_state(recipe))()
    step = jax.jit(make_train_step(recipe, mesh), donate_argnums=0)
    sharding = jax.NamedSharding(mesh, BATCH_SPEC)

    def run(index: int, windows: np.ndarray) -> float:
        nonlocal state
        state, metrics = step(state, jax.device_put(windows, sharding), index)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    arguments = parser.parse_args()
    tokens = arguments.sequences * arguments.length
    recipe = Recipe(
        name="throughput",
        model=MODEL,
        data=Data((Source("random"),), sequence_length=arguments.length),
        batch=Batch(arguments.sequences),
        optimizer=Optimizer(Schedule(kind="constant")),
        tokens=tokens * 1000,
        loss=Loss(chunk_tokens=512),
        compute=Compute(dtype="float32", remat="none", scan_layers=False),
    )
    runs, times = {"ours": ours(recipe), "peer": peer(recipe)}, {"ours": [], "peer": []}
    random = np.random.default_rng(0)
    shape = (arguments.sequences, arguments.length + 1)
    for index in range(arguments.steps + 3):
        windows = random.integers(0, MODEL.vocab_size, shape, dtype=np.int32)
        for name, run in runs.items():
            start = time.perf_counter()
            run(index, windows)
            if index >= 3:  # compilation and warm-up
                times[name].append(time.perf_counter() - start)
    median = {name: statistics.median(values) for name, values in times.items()}
    result = {
        "parameters": MODEL.parameters,
        "tokens_per_step": tokens,
        "ours_tokens_per_s": round(tokens / median["ours"]),
        "peer_tokens_per_s": round(tokens / median["peer"]),
        "ratio": round(median["peer"] / median["ours"], 3),
        "versions": {"jax": jax.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "torch_threads": torch.get_num_threads(),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
