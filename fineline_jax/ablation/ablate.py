"""A sweep from its value to its table and page."""

import dataclasses
import os
from pathlib import Path

import pandas as pd

from fineline_jax.ablation.compare import comparisons, read_logs, write_comparisons
from fineline_jax.ablation.run import run_trials
from fineline_jax.ablation.summary import write_summary
from fineline_jax.ablation.sweep import Sweep
from fineline_jax.analysis import analyze_scores
from fineline_jax.atomic_files import atomic_file
from fineline_jax.folder_lock import writing
from fineline_jax.scoring.job_shard import job_shard
from fineline_jax.scoring.requests.suite import Suite
from fineline_jax.trajectories.ablation.compare import loss_table
from fineline_jax.trajectories.csv_cells import write_csv
from fineline_jax.trajectories.statistics.columns import Statistic


@dataclasses.dataclass(frozen=True)
class SweepOutcome:
    """What a sweep has come to."""

    out: Path
    table: pd.DataFrame
    """A row for each run that has ended (`summary.runs_table`), also in OUT/summary.csv."""
    comparisons: dict[str, pd.DataFrame]
    """The statistics of `trajectories.ablation` by name (`compare.comparisons`), also in OUT/comparison."""
    left: int
    """Runs of the sweep that have not ended: those of other parts, or behind a stop."""
    report: Path | None
    """The page; None: runs are left, or there are neither scores nor validation losses."""
    stopped_by: str | None
    """Name of the signal that stopped it, if one did."""


def run_sweep(
    sweep: Sweep,
    out: Path,
    *,
    part: str | None,
    score: str | Suite | None,
    benchmarks: Path | None,
    together: int = 1,
) -> SweepOutcome:
    """Train and score the runs of a part of `sweep` that have not ended, and write what all that have give together.

    The summary is written by every part; the page by the one that finds no run left.
    """
    trials = sweep.trials()
    mine = job_shard(part, os.environ).of(trials)
    stopped = run_trials(sweep, mine, out, score=score, benchmarks=benchmarks, together=together)
    with writing(out / "summary", "--out", wait=60):
        table = write_summary(sweep, out)
        left = len(trials) - len(table)
        found, report = {}, None
        if len(table):
            logs = read_logs(table, out)
            found = comparisons(sweep, table, logs, out)
            report = None if left else _write_page(sweep, table, loss_table(logs), found, out)
        write_comparisons(found, out / "comparison")
    by_name = {one.name: frame for one, frame in found.items()}
    return SweepOutcome(out, table, by_name, left, report, None if stopped is None else stopped.stopped_by)


def _write_page(
    sweep: Sweep, table: pd.DataFrame, losses: pd.DataFrame, found: dict[Statistic, pd.DataFrame], out: Path
) -> Path | None:
    """The page of `fineline analyze` of all runs, their validation losses as a table and their scores, with what the
    comparisons found before the rest."""
    inputs = []
    if len(losses):
        inputs.append(out / "losses.csv")
        with atomic_file(out / "losses.csv", exclusive=True) as partial:
            write_csv(losses, partial)
    if (out / "scores").is_dir():
        inputs.append(out / "scores")
    if not inputs:
        return None
    runs, arms = [out / "runs" / series for series in table["series"]], table[["series", "arm", "seed"]]
    title = f"Sweep {sweep.name}"
    return analyze_scores(inputs, out / "report", runs=runs, title=title, compared=list(found.items()), arms=arms)
