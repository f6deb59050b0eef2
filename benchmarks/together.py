"""Runs trained as one program (`fineline ablate --together N`) against the same runs one after another.

    python benchmarks/together.py OUT [ARMS] [STEPS]

The demo's model and data, ARMS peaks of the learning rate (4), STEPS optimizer steps each (60). Each way is timed
twice, in alternating order, after one untimed sweep that fills the compilation cache for both. Printed: seconds of
each sweep from its start to its end, and their ratio per pair; above 1 runs together are faster. OUT must not exist.
"""

import sys
import time
from pathlib import Path

from fineline_jax import interface
from fineline_jax.ablation import Sweep, changed, grid
from fineline_jax.catalogue import load_recipe
from fineline_jax.demo import prepare_world


def main(out: Path, arms: int = 4, steps: int = 60) -> None:
    out.mkdir(parents=True)
    prepare_world(out / "data")
    demo = load_recipe("demo")
    tokens = steps * demo.batch.sequences * demo.data.sequence_length
    changes = {
        "data.sources.0.path": str(out / "data"),
        "tokens": tokens,
        "optimizer.schedule.warmup_tokens": tokens // 4,
        "checkpoints.at_tokens": (),
        "logging.tensorboard": False,
    }
    peaks = tuple(demo.optimizer.schedule.peak * 2 ** (-number / 2) for number in range(arms))
    sweep = Sweep("together", changed(demo, changes), grid({"optimizer.schedule.peak": peaks}))

    def seconds(name: str, together: int) -> float:
        start = time.perf_counter()
        interface.ablate(sweep, out / name, together=together)
        return time.perf_counter() - start

    for together in (1, arms):
        seconds(f"untimed-{together}", together)
    for number, order in enumerate(((1, arms), (arms, 1))):
        took = {together: seconds(f"{number}-{together}", together) for together in order}
        print(f"{arms} runs of {steps} steps: one after another {took[1]:.1f} s, together {took[arms]:.1f} s, "
              f"ratio {took[1] / took[arms]:.2f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
