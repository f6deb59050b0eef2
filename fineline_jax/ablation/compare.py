"""The comparison of a sweep's arms: its losses and scores through the statistics of `trajectories.ablation`."""

from pathlib import Path

import numpy as np
import pandas as pd

from fineline_jax.ablation.sweep import Sweep
from fineline_jax.facts.score_table import COLUMNS
from fineline_jax.recipe import Recipe
from fineline_jax.text_table import text_table
from fineline_jax.training.metrics import read_metrics
from fineline_jax.trajectories.ablation.arms import end_values, late_checkpoints, with_runs
from fineline_jax.trajectories.ablation.critical_batch import CRITICAL_BATCH
from fineline_jax.trajectories.ablation.differences import ALL_TASKS, DIFFERENCES
from fineline_jax.trajectories.ablation.final_map import FACET_COST, FINAL_MAP, arm_statistics
from fineline_jax.trajectories.ablation.instability import INSTABILITY
from fineline_jax.trajectories.ablation.noise_scale import NOISE_SCALE
from fineline_jax.trajectories.ablation.tokens_to import TOKENS_TO
from fineline_jax.trajectories.ablation.transfer import TRANSFER
from fineline_jax.trajectories.csv_cells import write_frame

HELD = "validation_loss/"
STATISTICS = {
    one.name: one
    for one in (DIFFERENCES, FINAL_MAP, FACET_COST, TOKENS_TO, CRITICAL_BATCH, TRANSFER, NOISE_SCALE, INSTABILITY)
}
"""In the order of the page."""


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
    changed = dict.fromkeys(field for arm in sweep.arms for field in arm.changes if field not in COLUMNS)  # not tokens
    facets = [field for field in changed if runs[field].nunique() > 1]
    last = [field.rpartition(".")[2] for field in facets]
    names = {field: one for field, one in zip(facets, last, strict=True) if last.count(one) == 1 and one not in COLUMNS}
    who = runs[["series", "arm", "seed", *facets]].rename(columns=names)
    facets = [names.get(field, field) for field in facets]
    losses, documents = loss_table(logs), None
    fine = set(runs["series"][runs["diverged"] == ""])
    table = losses[losses["series"].isin(fine)]
    if (out / "scores").is_dir():
        scored = first_metrics(out / "scores")
        scored = scored[scored["series"].isin(fine)]
        table, documents = pd.concat([table, scored]), document_scores(out / "scores", scored)
    table = with_runs(table, who)
    found = {}
    trials = {trial.name: trial for trial in sweep.trials()}
    log = pd.concat([one.assign(series=series) for series, one in logs.items()])
    found[INSTABILITY.name] = INSTABILITY.compute(with_runs(log, who))
    if "micro_gradient_norm" in log:
        steps = log[log["micro_gradient_norm"].notna()].groupby("series", sort=False)
        batches = [with_batches(of_run, trials[str(series)].recipe) for series, of_run in steps]
        found[NOISE_SCALE.name] = NOISE_SCALE.compute(with_runs(pd.concat(batches), who))
    choices = {arm.name: arm.choice for arm in sweep.arms}
    sizes = table["series"].map({name: trial.recipe.model.parameters for name, trial in trials.items()})
    if table["arm"].nunique() > 1:
        of_sizes = [part for _, part in table.groupby(sizes, sort=False)] if all(choices.values()) else [table]
        of_arms = arm_statistics(table, facets, parts=of_sizes, documents=documents)
        found |= {one.name: frame for one, frame in of_arms.items()}
        if len(of_sizes) > 1:
            found[TRANSFER.name] = TRANSFER.compute(table.assign(size=sizes, arm=table["arm"].map(choices)))
    if sweep.branches is not None and facets == ["sequences"]:
        begun = {name: trial.parent_tokens for name, trial in trials.items()}
        of_branches = table.assign(branch=table["series"].map(begun), batch=table["sequences"])
        found[CRITICAL_BATCH.name] = CRITICAL_BATCH.compute(of_branches)
    return found


def document_scores(scores: Path, table: pd.DataFrame) -> pd.DataFrame:
    """Columns series, metric, task, document, value: the score of each document at the end of each run.

    table: of `first_metrics`. Its mean over documents is the run's end in `end_values`; a metric that is no mean over
    documents (a ratio of sums, F1) is left out.
    """
    from fineline_jax.scoring import score_files
    from fineline_jax.scoring.metrics import tidy
    from fineline_jax.scoring.requests.pack import load

    pack, key = load(scores / "pack"), ["series", "metric", "task"]
    late = pd.concat([late_checkpoints(part) for _, part in table.groupby(key[1:], sort=False)])
    rows = []
    for (series, checkpoint), wanted in late.groupby(["series", "checkpoint"], sort=False):
        score = score_files.read_for(score_files.path_of(scores, str(series), str(checkpoint)), pack)
        each = tidy.of_documents(pack, score.loglikelihood, score.is_greedy)
        rows.append(each.merge(wanted[key], on=["metric", "task"]))
    ends = pd.concat(rows).rename(columns={"doc": "document"}).groupby([*key, "document"])["value"].mean().reset_index()
    means = ends.groupby(key)["value"].mean().rename("mean").reset_index().merge(end_values(table), on=key)
    other = means[(means["mean"] - means["value"]).abs() > 1e-9]
    return ends[~ends["task"].isin(other["task"])]


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
