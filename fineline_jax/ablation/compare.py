"""The comparison of a sweep's arms: its losses and scores through the statistics of `trajectories.ablation`."""

import math
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from fineline_jax.ablation.sweep import Sweep
from fineline_jax.analysis import document_scores, read_log
from fineline_jax.facts.score_table import COLUMNS
from fineline_jax.scoring import score_files
from fineline_jax.scoring.metrics import tidy
from fineline_jax.scoring.requests import pack as packs
from fineline_jax.text_table import text_table
from fineline_jax.trajectories.ablation.compare import compare_arms, loss_table
from fineline_jax.trajectories.ablation.differences import ALL_TASKS, DIFFERENCES
from fineline_jax.trajectories.ablation.sentences import OVER_ALL
from fineline_jax.trajectories.csv_cells import write_frame
from fineline_jax.trajectories.statistics.columns import Statistic
from fineline_jax.trajectories.statistics.comparison import DECLINED


def read_logs(runs: pd.DataFrame, out: Path) -> pd.DataFrame:
    """The training logs of the runs in `summary.runs_table`, with a column series."""
    logs = [read_log(out / "runs" / series).assign(series=series) for series in runs["series"]]
    return pd.concat(logs, ignore_index=True)


def comparisons(sweep: Sweep, runs: pd.DataFrame, logs: pd.DataFrame, out: Path) -> dict[Statistic, pd.DataFrame]:
    """Frame of each statistic that the sweep has the arms for (`compare_arms`), of the runs in `summary.runs_table`.

    Validation losses are rows of metric `loss` at kept checkpoints behind the first step; scores are each task's first
    metric. Runs that diverged count in the instability alone.
    """
    changed = dict.fromkeys(field for arm in sweep.arms for field in arm.changes if field not in COLUMNS)  # not tokens
    facets = [field for field in changed if runs[field].nunique() > 1]
    last = [field.rpartition(".")[2] for field in facets]
    names = {field: one for field, one in zip(facets, last, strict=True) if last.count(one) == 1 and one not in COLUMNS}
    trials = {trial.name: trial for trial in sweep.trials()}
    choices = {arm.name: arm.choice for arm in sweep.arms}
    who = runs[["series", "arm", "seed", *facets]].rename(columns=names)
    if all(choices.values()):
        sizes = who["series"].map({name: trial.recipe.model.parameters for name, trial in trials.items()})
        who = who.assign(choice=who["arm"].map(choices), size=sizes)
    if sweep.branches is not None:
        who["branch"] = who["series"].map({name: trial.parent_tokens for name, trial in trials.items()})
    table, documents = loss_table(logs), None
    if (out / "scores").is_dir():
        pack, scored = packs.load(out / "scores" / "pack"), first_metrics(out / "scores")
        read = (score_files.read_for(path, pack) for path in tidy.usable(out / "scores"))
        documents = document_scores(scored, [(None, pack, read)])
        table = pd.concat([table, scored])
    table = table[table["series"].isin(runs["series"][runs["diverged"] == ""])]
    batch = names.get("batch.sequences")
    return compare_arms(table, who, [names.get(f, f) for f in facets], logs=logs, documents=documents, batch=batch)


def write_comparisons(found: dict[Statistic, pd.DataFrame], folder: Path) -> None:
    """Each frame as CSV and Parquet in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for one, frame in found.items():
        write_frame(frame, folder / one.name, in_parquet=frame.astype(_plain(frame)))


def differences_text(found: Mapping[str, pd.DataFrame]) -> str:
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
        verdict = f"{row['verdict']}: {row['reason']}" if row["verdict"] == DECLINED else str(row["verdict"])
        cells += [shown["difference"].text(row["difference"]), f"{low} to {high}", verdict]
        needed = (
            "more documents" if math.isinf(row["seeds_needed"]) else shown["seeds_needed"].text(row["seeds_needed"])
        )
        rows.append([*cells, needed])
    head = f"Against {frame['reference'].iloc[0]}, means of the last checkpoints of each run:"
    return "\n".join([head, text_table(rows, right=(3, 6)), OVER_ALL])


def first_metrics(scores: Path) -> pd.DataFrame:
    """The tidy table of a folder of scores, of each task its first metric; a group stands for its members, as in
    `fineline analyze`."""
    table, pack = tidy.tidy(scores), packs.load(scores / "pack")
    groups = pack.manifest["groups"]
    first = {task["task"]: task["metric"] for task in pack.tasks} | {one["group"]: one["metric"] for one in groups}
    members = {task for group in groups for task in group["tasks"]}
    return table[(table["metric"] == table["task"].map(first)) & ~table["task"].isin(members)]


def _plain(frame: pd.DataFrame) -> dict:
    """Columns of mixed values as text, which Parquet can hold."""
    return {name: str for name in frame if frame[name].dtype == object}
