"""Is a run that still trains ahead of or behind reference runs at equal tokens, and which tasks say so?"""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from fineline_jax.errors import UserError
from fineline_jax.facts.metrics import metric_of
from fineline_jax.text_table import listed
from fineline_jax.trajectories.curves import isotonic
from fineline_jax.trajectories.curves.smooth import checkpoint_noise
from fineline_jax.trajectories.statistics.columns import Chart, Column, Statistic, shots_of
from fineline_jax.trajectories.statistics.comparison import over_tasks
from fineline_jax.trajectories.statistics.inference import student
from fineline_jax.trajectories.statistics.rerun_error import LASTING, RunError, over_tasks_again

AHEAD, BEHIND = "ahead", "behind"


def live_state(table: pd.DataFrame, *, run: str | None = None, references: Sequence[str] = ()) -> pd.DataFrame:
    """The newest checkpoint of `run` against the references at its tokens, per metric and task. See `LIVE_STATE`.

    run: None: the last series of the table; references: none given: all others with as many shots. Raises UserError for
    a series that is not in the table, or where there is no reference.
    """
    series = [str(name) for name in table["series"].unique()]
    run = series[-1] if run is None else run
    for name in (run, *references):
        if name not in series:
            raise UserError(
                f"live run or reference {name!r}: there is no series of that name; there are {listed(series)}"
            )
    references = [
        name for name in references or series if name != run and (references or shots_of(name) == shots_of(run))
    ]
    if not references:
        raise UserError(f"live run {run!r}: there is no other series to compare it with; add its references")
    rows = []
    for metric, part in table.groupby("metric", sort=False, observed=True):
        better, family, levels = metric_of(str(metric)).better, [], dict[str, pd.Series]()
        for task, of_task in part.groupby("task", sort=False, observed=True):
            curves = {str(name): c.sort_values("tokens") for name, c in of_task.groupby("series", observed=True)}
            if run in curves:
                others = {name: curves[name] for name in references if name in curves}
                row, levels[str(task)] = _against(curves[run], others, better)
                family.append({"task": task} | row)
        whole = over_tasks(family, "difference", (AHEAD, BEHIND), _between(levels, family))
        rows += [{"run": run, "metric": metric} | row for row in whole]
    return LIVE_STATE.frame(rows)


def _between(levels: dict[str, pd.Series], family: list[dict]) -> RunError:
    """The error between runs of the mean over tasks: of a new run of the references' kind, by their spread; of one
    reference as much as over tasks (`rerun_error`). levels: of the references by task."""
    means = pd.DataFrame({task: level for task, level in levels.items() if len(level)}).dropna().mean(axis=1)
    if len(means) > 1:
        return RunError("references", ((float(means.var(ddof=1)) * (1 + 1 / len(means)), len(means) - 1.0),))
    return over_tasks_again(np.array([row["difference"] for row in family if "difference" in row]))


def _against(live: pd.DataFrame, others: dict[str, pd.DataFrame], better: int) -> tuple[dict, pd.Series]:
    """Columns tokens to reason of LIVE_STATE for one task, and the references' values at the run's tokens."""
    tokens, value = float(live["tokens"].iloc[-1]), float(live["value"].iloc[-1])
    row: dict = {"tokens": tokens, "value": value}
    reaching = {name: c for name, c in others.items() if c["tokens"].iloc[0] <= tokens <= c["tokens"].iloc[-1]}
    row |= {"references": len(reaching)}
    levels, errors = (
        pd.Series(
            {
                name: np.interp(np.log1p(tokens), np.log1p(one["tokens"].to_numpy(float)), one[column])
                for name, one in reaching.items()
            },
            dtype=float,
        )
        for column in ("value", "stderr")
    )
    if not reaching:
        return row | {"reason": "no reference was scored on both sides of these tokens"}, levels
    difference = better * (value - float(levels.mean()))
    row |= {"reference": float(levels.mean()), "difference": difference}
    if len(levels) > 1:  # a new run of the references' kind has their spread, which holds the questions' error too
        error = float(levels.std(ddof=1)) * math.sqrt(1 + 1 / len(levels))
        freedom = len(levels) - 1.0
    else:
        one = next(iter(reaching.values()))
        scatter = checkpoint_noise(one["value"].to_numpy(float), one["tokens"].to_numpy(float))
        between = math.sqrt(2 * (1 + LASTING**2)) * np.nan_to_num(scatter)  # of two runs that scatter alike
        asked = np.nan_to_num([float(live["stderr"].iloc[-1]), float(errors.iloc[0])])
        error, freedom = math.hypot(between, *asked), math.inf
    ahead = [_doublings(live, one, better) for one in reaching.values()]
    row["doublings_ahead"] = float(np.nanmean(ahead)) if np.isfinite(ahead).any() else math.nan
    if not error > 0:
        return row | {"reason": "there is no error to compare the difference with"}, levels
    note = "one reference: the error is of the questions, and of its scatter between checkpoints"
    note = note if len(levels) == 1 else ""
    return row | {"stderr": error, "reason": note} | student(difference, error, freedom), levels


def _doublings(live: pd.DataFrame, reference: pd.DataFrame, better: int) -> float:
    """log2 of the tokens at which the reference has the run's score over the run's; NaN where it never has."""
    behind = reference[reference["tokens"] > 0]
    values, tokens = better * behind["value"].to_numpy(float), behind["tokens"].to_numpy(float)
    target = np.array([better * float(live["value"].iloc[-1])])
    at = float(isotonic.crossing(values, np.ones(len(values)), tokens, target)[0])
    return math.log2(at / float(live["tokens"].iloc[-1])) if at > 0 else math.nan


LIVE_STATE = Statistic(
    "live_state",
    "Is the run ahead of or behind its references?",
    live_state,
    (
        *Column.texts(run="the run", metric="the metric"),
        *Column.texts(task="the task; all tasks: the mean over them, its error over tasks and between runs"),
        Column("tokens", "tokens", "of its newest checkpoint", "of all tasks"),
        Column("value", "score", "its score there", "of all tasks"),
        Column("references", "1", "reference series that were scored on both sides of these tokens", "of all tasks"),
        Column("reference", "score", "their mean there, interpolated in log tokens", "without a reference"),
        Column("difference", "score", "of the run to it, above 0: ahead", "without a reference", ("low", "high")),
        Column(
            "stderr",
            "score",
            "of the spread of references; of one reference that of the questions and its scatter",
            "without",
        ),
        *Column.ends("score", "without an error"),
        Column("p", "1", "two-sided, Student's t", "without an error"),
        Column("p_holm", "1", "p controlled over the tasks of the metric (Holm)", "of all tasks"),
        Column("doublings_ahead", "doublings", "log2 of the references' tokens at the score over the run's", "never"),
        *Column.texts(verdict="ahead, behind, no difference resolved, declined"),
        Column("reason", "", "what is missing", "where nothing is"),
    ),
    "prediction interval: Student 1908; tasks as replicates: Miller 2024, arXiv 2411.00640",
    definition="Score of the newest checkpoint minus the mean of the references at the same tokens, against the spread "
    "of a new run of their kind.",
    caveat="References with another data mixture or schedule differ at equal tokens for that reason alone.",
    chart=Chart("difference", panel="metric", reference=0.0),
    count="references",
)
