"""What a run says about itself: metrics.jsonl without a seam over restarts, TensorBoard, Weights & Biases, MFU."""

import json
import math
import os
from pathlib import Path
from typing import Any

import jax

from fineline_jax.errors import UserError
from fineline_jax.recipe import Recipe

PEAK_TFLOPS = {
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5e": 197.0,
    "TPU v5": 459.0,
    "TPU v5p": 459.0,
    "TPU v6 lite": 918.0,
    "TPU v6e": 918.0,
    "NVIDIA A100": 312.0,
    "NVIDIA H100": 989.0,
    "NVIDIA H200": 989.0,
}
"""Dense bfloat16 peak of one device in TFLOP/s, from the vendors' data sheets, by the start of `device_kind`."""

TIMINGS = ("tokens_per_second", "mfu", "step_seconds", "data_wait_seconds")
"""Fields of a line that differ between two equal runs."""


def peak_flops(recipe: Recipe, device_kind: str) -> float | None:
    """Peak FLOP/s of one device (`jax.Device.device_kind`); None where it is not known, then no MFU is reported."""
    if recipe.logging.peak_tflops:
        return recipe.logging.peak_tflops * 1e12
    named = [kind for kind in PEAK_TFLOPS if device_kind.startswith(kind)]
    return PEAK_TFLOPS[max(named, key=len)] * 1e12 if named else None


class MetricsLog:
    """Appends to RUN/metrics.jsonl and its mirrors; written by process 0 alone.

    Lines that a killed run wrote behind the checkpoint it resumes from (`step`; None: it starts anew) are cut off,
    so that the file is that of a run never interrupted. A line is with the operating system when `write` returns.
    """

    def __init__(self, run: Path, recipe: Recipe, step: int | None):
        self.active = jax.process_index() == 0
        self.board: Any = None
        self.wandb: Any = None
        if not self.active:
            return
        path = run / "metrics.jsonl"
        cut_behind(path, -1 if step is None else step)
        self.file = path.open("a", buffering=1)
        if recipe.logging.tensorboard:
            import tensorboardX

            self.board = tensorboardX.SummaryWriter(str(run / "tensorboard"), purge_step=(step or 0) + 1)
        if recipe.logging.wandb_project:
            self.wandb = _start_wandb(run, recipe)

    def write(self, record: dict[str, Any]) -> None:
        """record: "step" and numbers; a number that is not finite becomes null."""
        if not self.active:
            return
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self.file.write(json.dumps(finite) + "\n")
        numbers = {k: v for k, v in record.items() if isinstance(v, int | float) and k != "step"}
        if self.board:
            for name, value in numbers.items():
                self.board.add_scalar(name, value, record["step"])
        if self.wandb:
            self.wandb.log(numbers, step=record["step"])

    def close(self) -> None:
        if self.active:
            self.file.close()
            if self.board:
                self.board.close()
            if self.wandb:
                self.wandb.finish()


def cut_behind(path: Path, step: int) -> None:
    """Drop the lines of a metrics file whose step is greater than `step`, and a last line cut short by a kill."""
    if not path.exists():
        return
    lines = path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    if len(kept) < len(lines):
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text("".join(kept))
        os.replace(temporary, path)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of RUN/metrics.jsonl."""
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _start_wandb(run: Path, recipe: Recipe):
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            f"logging.wandb_project={recipe.logging.wandb_project!r} needs the wandb extra: pip install"
            " 'fineline_jax[wandb]'"
        ) from error
    import dataclasses

    config = dataclasses.asdict(recipe)
    return wandb.init(
        project=recipe.logging.wandb_project, name=recipe.name, id=run.resolve().name, resume="allow", config=config
    )
