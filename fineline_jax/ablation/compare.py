"""The comparison of a sweep's arms: its losses and scores through the statistics of `trajectories.ablation`."""

from pathlib import Path

import numpy as np
import pandas as pd

from fineline_jax.ablation.sweep import Sweep
from fineline_jax.facts.score_table import COLUMNS
from fineline_jax.recipe import Recipe
from fineline_jax.text_table import text_table
from fineline_jax.training.metrics import read_metrics
from fineline_jax.trajectories.ablation.arms import with_runs
from fineline_jax.trajectories.ablation.critical_batch import CRITICAL_BATCH
from fineline_jax.trajectories.ablation.differences import ALL_TASKS, DIFFERENCES
from fineline_jax.trajectories.ablation.final_map import FACET_COST, FINAL_MAP
from fineline_jax.trajectories.ablation.instability import INSTABILITY
from fineline_jax.trajectories.ablation.noise_scale import NOISE_SCALE
from fineline_jax.trajectories.ablation.tokens_to import TOKENS_TO
from fineline_jax.trajectories.csv_cells import write_frame

HELD = "validation_loss/"


Logs = dict[str, pd.DataFrame]
"""The training log of each run, by series."""


def read_logs(runs: pd.DataFrame, out: Path) -> Logs:
    """The logs of the runs in `summary.runs_table`."""
    return {series: pd.DataFrame(read_metrics(out / "runs" / series)) for series in runs["series"]}


def comparisons(sweep: Sweep, runs: pd.DataFrame, logs: Logs, out: Path) -> dict[str, pd.DataFrame]:
    """Frame of each statistic that the sweep has the arms for, by its name, of the runs in `summary.runs_table`.

    Validation losses are rows of metric `loss` at kept checkpoints behind the first step; scores are each task's first
    metric. Runs that diverged count in the instability alone.
    """
    facets = [
        field for field in dict.fromkeys(f for arm in sweep.arms for f in arm.changes) if runs[field].nunique() > 1
    ]
    who = runs[["series", "arm", "seed", *facets]]
    table = loss_table(logs)
    if (out / "scores").is_dir():
        table = pd.concat([table, first_metrics(out / "scores")])
    table = with_runs(table[table["series"].isin(runs["series"][runs["diverged"] == ""])], who)
    found = {}
    log = pd.concat([one.assign(series=series) for series, one in logs.items()])
    found[INSTABILITY.name] = INSTABILITY.compute(with_runs(log, who))
    if "micro_gradient_norm" in log:
        recipes = {trial.name: trial.recipe for trial in sweep.trials()}
        steps = log[log["micro_gradient_norm"].notna()].groupby("series", sort=False)
        batches = [with_batches(of_run, recipes[str(series)]) for series, of_run in steps]
        found[NOISE_SCALE.name] = NOISE_SCALE.compute(with_runs(pd.concat(batches), who))
    if table["arm"].nunique() > 1:
        found[DIFFERENCES.name] = DIFFERENCES.compute(table)
        found[TOKENS_TO.name] = TOKENS_TO.compute(table)
        if len(facets) == 2:
            found[FINAL_MAP.name] = FINAL_MAP.compute(table, *facets)
            found[FACET_COST.name] = pd.concat([FACET_COST.compute(table, *pair) for pair in (facets, facets[::-1])])
    if sweep.branches is not None and facets == ["batch.sequences"]:
        begun = {trial.name: trial.parent_tokens for trial in sweep.trials()}
        of_branches = table.assign(branch=table["series"].map(begun), batch=table["batch.sequences"])
        found[CRITICAL_BATCH.name] = CRITICAL_BATCH.compute(of_branches)
    return found


def loss_table(logs: Logs) -> pd.DataFrame:
    """The validation losses of runs at kept checkpoints behind the first step, as a tidy table."""
    return pd.concat([_losses(series, log) for series, log in logs.items()])


def write_comparisons(found: dict[str, pd.DataFrame], folder: Path) -> None:
    """Each frame as CSV and Parquet in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, frame in found.items():
        write_frame(frame, folder / name, in_parquet=frame.astype(_plain(frame)))


def differences_text(found: dict[str, pd.DataFrame]) -> str:
    """Each arm against the first: difference with its interval and verdict, for every loss and all tasks together."""
    frame = found.get(DIFFERENCES.name, pd.DataFrame())
    if frame.empty:
        return ""
    frame = frame[(frame["metric"] == "loss") | (frame["task"] == ALL_TASKS)]
    shown = {column.name: column for column in DIFFERENCES.columns}
    rows = [["arm", "metric", "task", "better by", "95 % interval", "verdict", "seeds to resolve .01"]]
    for row in frame.to_dict("records"):
        low, high = (shown[name].text(row[name]) for name in ("low", "high"))
        cells = [str(row[name]) for name in ("arm", "metric", "task")]
        cells += [shown["difference"].text(row["difference"]), f"{low} to {high}", str(row["verdict"])]
        rows.append([*cells, shown["seeds_needed"].text(row["seeds_needed"])])
    return f"Against {frame['reference'].iloc[0]}:\n" + text_table(rows, right=(3, 6))


def first_metrics(scores: Path) -> pd.DataFrame:
    """The tidy table of a folder of scores, of each task its first metric."""
    from fineline_jax.scoring.metrics.tidy import tidy
    from fineline_jax.scoring.requests.pack import load

    table = tidy(scores)
    first = {task["task"]: task["metric"] for task in load(scores / "pack").manifest["tasks"]}
    return table[table["metric"] == table["task"].map(first)]


def _losses(series: str, log: pd.DataFrame) -> pd.DataFrame:
    """The validation losses of a run as rows of the tidy table."""
    held = [str(name) for name in log if str(name).startswith(HELD)]
    if not held:
        return pd.DataFrame(columns=list(COLUMNS))
    long = log[log["step"] > 0].melt(["step", "tokens"], held, "task").dropna(subset=["value"])
    long = long.assign(series=series, checkpoint=long["step"].astype(str), domain="loss", metric="loss")
    long["task"] = long["task"].str.removeprefix(HELD)
    return long.reindex(columns=list(COLUMNS))


def _plain(frame: pd.DataFrame) -> dict:
    """Columns of mixed values as text, which Parquet can hold."""
    return {name: str for name in frame if frame[name].dtype == object}


def with_batches(log: pd.DataFrame, recipe: Recipe) -> pd.DataFrame:
    """The log of a run with the columns sequences, micro_sequences and tokens_per_sequence of each step's batch."""
    length, sizes = recipe.data.sequence_length, recipe.batch.sizes
    before = [[tokens - size * length for size in sizes] for tokens in log["tokens"]]
    # the update that ended at these tokens began one batch before, and that batch is the one due there
    sequences = [
        next((n for n, start in zip(sizes, starts, strict=True) if recipe.batch.sequences_at(start) == n), sizes[-1])
        for starts in before
    ]
    micro = np.array(sequences) / recipe.batch.accumulation
    return log.assign(sequences=sequences, micro_sequences=micro, tokens_per_sequence=length)
