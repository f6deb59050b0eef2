"""A small corpus, a small recipe on it, and the sweeps that the tests of ablation run."""

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import pytest
from data_examples import amber

from fineline_jax.ablation import Sweep, ablate
from fineline_jax.ablation.compare import comparisons, read_logs
from fineline_jax.data.corpora import prepare_amber
from fineline_jax.models.config import ModelConfig
from fineline_jax.recipe import (
    Batch,
    Checkpoints,
    Compute,
    Data,
    Logging,
    MeshShape,
    Optimizer,
    Recipe,
    Schedule,
    Source,
    Validation,
    to_json,
)
from fineline_jax.training import loop

LENGTH, VOCABULARY = 8, 32
TOKENS = 4 * 8 * LENGTH
"""Four steps of the larger batch that the tests use, eight of the base's."""


@contextlib.contextmanager
def one_device_and_no_page() -> Iterator[None]:
    """Runs use one of the devices of the tests. The page has tests of its own, and takes longer than a sweep here."""
    real, patch = loop.make_mesh, pytest.MonkeyPatch()
    patch.setattr(loop, "make_mesh", lambda mesh: real(mesh, jax.devices()[:1]))
    patch.setattr(ablate, "analyze_scores", lambda inputs, out, **_: out / "report.html")
    try:
        yield
    finally:
        patch.undo()


def write_corpus(folder: Path) -> Path:
    """120 random windows to train on and 4 of validation."""
    draw = functools.partial(np.random.default_rng(0).integers, 0, VOCABULARY)
    train = amber(folder / "train.jsonl", draw((120, LENGTH + 1)).tolist())
    held = amber(folder / "held.jsonl", draw((4, LENGTH + 1)).tolist())
    prepare_amber([train], folder / "data", vocab_size=VOCABULARY, sequence_length=LENGTH, validation_inputs=[held])
    return folder / "data"


def small_recipe(corpus: Path) -> Recipe:
    """Batches of 4 windows, 8 steps, checkpoints at 0, 128 and 256 tokens."""
    return Recipe(
        name="small",
        model=ModelConfig(vocab_size=VOCABULARY, width=8, layers=1, heads=2, mlp_width=16, context=LENGTH),
        data=Data((Source(str(corpus)),), sequence_length=LENGTH),
        batch=Batch(4),
        optimizer=Optimizer(Schedule(peak=1e-2, final=1e-3, warmup_tokens=TOKENS // 4)),
        tokens=TOKENS,
        checkpoints=Checkpoints(at_tokens=(TOKENS // 2,), latest_every_tokens=TOKENS // 4),
        mesh=MeshShape(fsdp=1, replica=1, tensor=1),
        compute=Compute(dtype="float32", remat="none", scan_layers=False),
        logging=Logging(tensorboard=False, validation=(Validation(windows=4),)),
    )


def played(sweep: Sweep, out: Path, losses: dict[str, float]) -> pd.DataFrame:
    """The table of a sweep whose runs were never trained: their metrics are written here."""
    rows = []
    for trial in sweep.trials():
        run, loss = out / "runs" / trial.name, losses[trial.name]
        run.mkdir(parents=True)
        lines = [f'{{"step": {s}, "tokens": {32 * s}, "loss": {loss + 8 - s}, "gradient_norm": 1.0}}' for s in (4, 8)]
        held = f'{{"step": 8, "tokens": 256, "validation_loss/held_out": {loss}}}'
        half = f'{{"step": 4, "tokens": 128, "validation_loss/held_out": {loss + 1}}}'
        (run / "recipe.json").write_text(to_json(trial.recipe))
        (run / "metrics.jsonl").write_text("\n".join([lines[0], half, lines[1], held]) + "\n")
        rows.append({"series": trial.name, "arm": trial.arm, "seed": trial.seed, "diverged": ""})
        rows[-1] |= {
            field: value for arm in sweep.arms if arm.name == trial.arm for field, value in arm.changes.items()
        }
    return pd.DataFrame(rows)


def compared(sweep: Sweep, table: pd.DataFrame, out: Path) -> dict[str, pd.DataFrame]:
    """The comparisons of runs that were `played`, by name."""
    return {one.name: frame for one, frame in comparisons(sweep, table, read_logs(table, out), out).items()}
