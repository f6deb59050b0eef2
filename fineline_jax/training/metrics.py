"""What a run says about itself: metrics.jsonl without a seam over restarts, TensorBoard, Weights & Biases, MFU."""

import contextlib
import dataclasses
import json
import math
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from fineline_jax.atomic_files import atomic_file
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

SPENT = ("start_seconds", "compile_seconds", "checkpoint_seconds", "evaluation_seconds")
"""Seconds that no step took: from the start to the first step, and since the line before in the first call of a
compiled step, in saves, in validation and scoring."""
TIMINGS = ("unix_time", "interval_seconds", "tokens_per_second", "mfu", "step_seconds", "data_wait_seconds", *SPENT)
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
    Weights & Biases cannot take back what it has: the steps it knows are not sent again (they are the same numbers).
    """

    def __init__(self, run: Path, recipe: Recipe, step: int | None):
        self.active = jax.process_index() == 0
        self.board: Any = None
        self.wandb: Any = None
        if not self.active:
            return
        self.path = run / "metrics.jsonl"
        cut_behind(self.path, -1 if step is None else step)
        self.file = self.path.open("ab", buffering=0)  # what a full disk refuses must not be tried again at the end
        if recipe.logging.tensorboard:
            from fineline_jax.training.tensorboard import TensorBoard

            with _named(run / "tensorboard"):
                self.board = TensorBoard(run / "tensorboard", (step or 0) + 1)
        if recipe.logging.wandb_project:
            self.wandb = _start_wandb(run, recipe)

    def write(self, record: dict[str, Any]) -> None:
        """record: "step" and numbers; a number that is not finite becomes null. Raises UserError on a full disk."""
        if not self.active:
            return
        numbers = {k: v for k, v in record.items() if isinstance(v, int | float) and k != "step"}
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        with _named(self.path):
            line = f"{json.dumps(finite)}\n".encode()
            while line:
                line = line[self.file.write(line) :]
        if self.board:
            with _named(self.path.with_name("tensorboard")):
                self.board.write(record["step"], numbers)
        if self.wandb and record["step"] >= self.wandb.step:
            self.wandb.log(numbers, step=record["step"])

    def close(self) -> None:
        if self.active:
            self.file.close()
            if self.wandb:
                self.wandb.finish()
            if self.board:
                with _named(self.path.with_name("tensorboard")):
                    self.board.close()


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; fix that and run the same command again") from error


def cut_behind(path: Path, step: int) -> None:
    """Drop the lines of a metrics file whose step is greater than `step`, and what a kill or a crash left of a line."""
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith(b"\n") and _step_of(line) <= step]
    if len(kept) < len(lines):
        with atomic_file(path, exclusive=True) as partial:
            partial.write_bytes(b"".join(kept))


def _step_of(line: bytes) -> float:
    try:
        return _record(line)["step"]
    except ValueError:  # zeros, where the machine itself went down
        return math.inf


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of RUN/metrics.jsonl; one that is still being written is left out.

    Raises UserError naming file and line where a line is none of a run's.
    """
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        try:
            if line.endswith(b"\n"):
                records.append(_record(line))
        except ValueError as error:
            raise UserError(f"{path}:{number}: no line of metrics ({error}); remove it, or resume the run") from error
    return records


def _record(line: bytes) -> dict[str, Any]:
    record = json.loads(line)
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise ValueError("it has no step")
    return record


def _start_wandb(run: Path, recipe: Recipe) -> Any:
    """The Weights & Biases run of this folder, which keeps its id, so that a resumed run goes on with the same one."""
    project = recipe.logging.wandb_project
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            f"logging.wandb_project={project!r} needs the wandb extra: pip install 'fineline_jax[wandb]'"
        ) from error
    name = run / "wandb" / "id"
    name.parent.mkdir(exist_ok=True)
    if not name.exists():
        name.write_text(uuid.uuid4().hex)
    try:
        return wandb.init(
            project=project,
            name=recipe.name,
            id=name.read_text(),
            resume="allow",
            config=dataclasses.asdict(recipe),
            dir=run,
        )
    except wandb.Error as error:
        raise UserError(
            f"logging.wandb_project={project!r}: {str(error).splitlines()[0]} Without a network: WANDB_MODE=offline"
        ) from error
