"""How long a checkpoint save makes training wait, for the 58 M model with Adam moments (0.7 GB) on this machine.

Trains a few steps, saving at every other one, and compares the time that `maybe_save` blocks with the time of a
step; also the time until the save is complete, and the growth of the resident set over the saves.

    python benchmarks/checkpoint_save.py [--saves 4] [--sequences 8] [--length 512]
"""

import argparse
import dataclasses
import json
import resource
import statistics
import tempfile
import time
from pathlib import Path

from fineline_jax.cpu_backend import prepare_cpu

prepare_cpu()

import jax
import numpy as np

from fineline_jax.catalogue import load_recipe
from fineline_jax.checkpoints.runs.store import CheckpointStore
from fineline_jax.mesh import make_mesh
from fineline_jax.recipe import Batch, Compute
from fineline_jax.training.schedule import rates
from fineline_jax.training.step import BATCH_SPEC, initial_state, make_train_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saves", type=int, default=4)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    arguments = parser.parse_args()
    recipe = load_recipe("llama_60m")
    recipe = dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, sequence_length=arguments.length),
        batch=Batch(arguments.sequences),
        compute=Compute(dtype="float32", remat="none"),
    )
    mesh = make_mesh()
    jax.set_mesh(mesh)
    state = jax.jit(lambda: initial_state(recipe))()
    step = jax.jit(make_train_step(recipe, mesh), donate_argnums=0)
    shape = (arguments.sequences, arguments.length + 1)
    windows = np.random.default_rng(0).integers(0, recipe.model.vocab_size, shape, dtype=np.int32)
    windows = jax.device_put(windows, jax.NamedSharding(mesh, BATCH_SPEC))
    state, _ = jax.block_until_ready(step(state, windows, *rates(recipe, 0)))

    steps, blocked, completed, resident = [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        store = CheckpointStore(Path(folder), range(100))
        with store:
            for index in range(1, arguments.saves + 1):
                start = time.perf_counter()
                state, _ = jax.block_until_ready(step(state, windows, *rates(recipe, index * recipe.tokens_per_step)))
                steps.append(time.perf_counter() - start)
                start = time.perf_counter()
                assert store.maybe_save(index, state)
                blocked.append(time.perf_counter() - start)
                store.wait()
                completed.append(time.perf_counter() - start)
                resident.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    result = {
        "state_gb": round(size / 1e9, 3),
        "tokens_per_step": recipe.tokens_per_step,
        "step_s": round(statistics.median(steps), 3),
        "save_blocks_s": round(statistics.median(blocked), 3),
        "save_complete_s": round(statistics.median(completed), 3),
        "blocked_share_of_a_step": round(statistics.median(blocked) / statistics.median(steps), 4),
        "peak_resident_gb_after_each_save": [round(value, 2) for value in resident],
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
