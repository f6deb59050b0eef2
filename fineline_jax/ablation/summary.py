"""The end of a sweep: a row per run with its final losses and scores, and a row per arm over its seeds."""

import dataclasses
from pathlib import Path

import pandas as pd

from fineline_jax.ablation.compare import first_metrics
from fineline_jax.ablation.run import ending
from fineline_jax.ablation.sweep import Sweep
from fineline_jax.errors import UserError
from fineline_jax.progress import duration
from fineline_jax.recipe import fields
from fineline_jax.text_table import counted, text_table
from fineline_jax.training.metrics import read_metrics
from fineline_jax.trajectories.csv_cells import write_frame

_LOSSES = ("train_loss", "validation_loss/")
LATE_SHARE = 0.1
"""The train loss of a run is the mean of its logged losses over this last share of its tokens."""


def runs_table(sweep: Sweep, out: Path) -> pd.DataFrame:
    """A row for each run that has ended: series, arm, seed, the fields that differ between arms, steps, tokens,
    seconds, step_seconds, diverged, train_loss and every validation_loss/NAME at its end, in nats; of OUT/scores the
    first metric of every task at its last checkpoint, as score/TASK.

    A diverged run has the losses of its last finite line and checkpoint.
    """
    rows = []
    named = list(dict.fromkeys(field for arm in sweep.arms for field in arm.changes))
    changes = {arm.name: arm.changes for arm in sweep.arms}
    for trial in sweep.trials():
        run = out / "runs" / trial.name
        ended = ending(run, trial)
        if ended is not None:
            row = {"series": trial.name, "arm": trial.arm, "seed": trial.seed}
            flat = fields(trial.recipe)
            row |= {field: flat[field] if field in flat else str(changes[trial.arm].get(field)) for field in named}
            row |= {"steps": ended.step, **dataclasses.asdict(ended)}
            del row["step"]
            rows.append(row | _losses(run))
    table = pd.DataFrame(rows)
    if rows and (out / "scores").is_dir():
        table = table.merge(_scores(out / "scores"), on="series", how="left")
    return table


def write_summary(sweep: Sweep, out: Path) -> pd.DataFrame:
    """Write `runs_table` to OUT/summary.csv and OUT/summary.parquet."""
    table = runs_table(sweep, out)
    write_frame(table, out / "summary")
    return table


def arms_text(table: pd.DataFrame) -> str:
    """A line per arm: mean and standard deviation over its runs of every loss, and of the mean over all scores."""
    scores = [name for name in table if str(name).startswith("score/")]
    values = {str(name).rpartition("/")[2]: table[name] for name in table if str(name).startswith(_LOSSES)}
    if scores:
        values[f"mean of {counted(len(scores), 'score')}"] = table[scores].mean(axis=1)
    rows = [["arm", "runs", "diverged", *values]]
    for arm, part in table.groupby("arm", sort=False):
        fine = part[part["diverged"] == ""]
        cells = [_mean_and_deviation(of_runs[fine.index]) for of_runs in values.values()]
        rows.append([str(arm), str(len(part)), str(len(part) - len(fine)), *cells])
    return text_table(rows, right=range(1, len(rows[0])))


def time_text(table: pd.DataFrame) -> str:
    """How long the runs took together, and how much of it their optimizer steps."""
    seconds, share = table["seconds"].sum(), table["step_seconds"].sum() / table["seconds"].sum()
    return (
        f"{counted(len(table), 'run')} in {duration(seconds)}: {share:.0%} optimizer steps, {1 - share:.0%} start,"
        " compilation, validation, scoring and saving"
    )


def _mean_and_deviation(values: pd.Series) -> str:
    mean = f"{values.mean():.4f}" if len(values) else ""
    return f"{mean} ± {values.std():.4f}" if len(values) > 1 else mean


def _losses(run: Path) -> dict[str, float]:
    lines = pd.DataFrame(read_metrics(run))
    if "loss" not in lines:
        raise UserError(f"{run / 'metrics.jsonl'}: holds no loss; delete {run} and run the sweep again")
    trained = lines.dropna(subset=["loss"])
    late = trained[trained["step"] > (1 - LATE_SHARE) * trained["step"].max()]
    held = [str(name) for name in lines if str(name).startswith("validation_loss/")]
    return {"train_loss": late["loss"].mean(), **{name: lines[name].dropna().iloc[-1] for name in held}}


def _scores(folder: Path) -> pd.DataFrame:
    """Columns series and score/TASK: the first metric of every task at the last scored checkpoint of each series."""
    last = first_metrics(folder).groupby(["series", "task"], sort=False, as_index=False).last()
    wide = last.pivot(index="series", columns="task", values="value")
    return wide.rename(columns=lambda task: f"score/{task}").reset_index()
