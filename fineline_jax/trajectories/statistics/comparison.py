"""Two runs at equal tokens: which is better, by how much, and does the difference exceed what a rerun would give?

The tasks are the replicates. For each task the difference of the two runs is averaged over a window of checkpoints;
the mean over tasks has the standard error sd / sqrt(tasks), and t with tasks - 1 degrees of freedom says whether it is
told from zero. Errors of one task's checkpoints share its questions and its run, so they are never counted as
replicates; what two seeds of one run differ by is seen through the tasks alone (the caveat of `COMPARISON`).
"""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from fineline_jax.facts.metrics import metric_of
from fineline_jax.trajectories.statistics.columns import Chart, Column, Statistic, groups, shots_of
from fineline_jax.trajectories.statistics.inference import LEVEL, holm, student

EDGE = 3
"""Checkpoints of the window "first"; "last" has five, as published work averages them."""
LATE = 5

ALL_TASKS = "all tasks"
BETTER, WORSE, UNRESOLVED, DECLINED = "better", "worse", "no difference resolved", "declined"


def compare(table: pd.DataFrame, run: str, reference: str, *, tasks: Sequence[str] | None = None) -> pd.DataFrame:
    """`run` minus `reference` at the tokens where both were scored, per metric and window. See `COMPARISON`.

    tasks: those to count; None: all that both have. Of a metric where lower is better the sign is turned, so that a
    positive difference is always in favour of `run`.
    """
    rows = []
    for metric, pairs in groups(paired(table, run, reference), "metric"):
        if tasks is not None:
            pairs = pairs[pairs["task"].isin(tasks)]
        grid = np.sort(pairs["tokens"].unique())
        windows = {"first": grid[:EDGE], "all": grid, "last": grid[-LATE:]}
        for window, at in windows.items():
            inside = pairs[pairs["tokens"].isin(at)]
            row = {"run": run, "reference": reference, "window": window, "checkpoints": len(at)} | metric
            rows.append(row | one_sample(inside.groupby("task", observed=True)["difference"].mean().to_numpy()))
    return COMPARISON.frame(rows)


def against_first(table: pd.DataFrame) -> pd.DataFrame:
    """Each series against the first of the table that has as many shots, by `compare`."""
    first: dict[str, str] = {}
    frames = []
    for run in map(str, table["series"].unique()):
        reference = first.setdefault(shots_of(run), run)
        if run != reference:
            frames.append(compare(table[table["series"].isin([run, reference])], run, reference))
    return pd.concat(frames, ignore_index=True) if frames else COMPARISON.frame([])


def paired(table: pd.DataFrame, run: str, reference: str) -> pd.DataFrame:
    """Columns metric, task, tokens, difference (in favour of `run`), stderr: where both runs were scored.

    stderr adds both runs' errors as if their questions were not the same, which is wide where they are.
    """
    key = ["metric", "task", "tokens"]
    one, other = (
        table[table["series"] == name].drop_duplicates(key, keep="last")[[*key, "value", "stderr"]]
        for name in (run, reference)
    )
    both = one.merge(other, on=key, suffixes=("", "_reference"))
    better = both["metric"].map({name: metric_of(str(name)).better for name in both["metric"].unique()}).to_numpy(float)
    difference = better * (both["value"] - both["value_reference"])
    stderr = np.hypot(both["stderr"], both["stderr_reference"])
    return both[key].assign(difference=difference, stderr=stderr)


def one_sample(of_tasks: np.ndarray) -> dict:
    """Columns `tasks` to `reason` of COMPARISON for one difference per task, [tasks]."""
    count = len(of_tasks)
    row: dict = {"tasks": count}
    if count < 2:
        return row | {"verdict": DECLINED, "reason": "fewer than two tasks that both runs were scored on"}
    mean, stderr = float(of_tasks.mean()), float(of_tasks.std(ddof=1) / np.sqrt(count))
    row |= {"difference": mean, "stderr": stderr}
    if stderr == 0:
        same = "the runs are equal on every task" if mean == 0 else "every task differs by the same"
        return row | {"verdict": DECLINED, "reason": same}
    row |= {"t": mean / stderr} | student(mean, stderr, count - 1)
    verdict = UNRESOLVED if row["p"] > LEVEL else BETTER if mean > 0 else WORSE
    return row | {"verdict": verdict, "reason": ""}


def over_tasks(family: list[dict], value: str, words: tuple[str, str] = (BETTER, WORSE)) -> list[dict]:
    """The rows of a metric's tasks with p_holm and verdict, and a row of all tasks, their mean `value` by `one_sample`.

    words: what a value above 0 is called, and one below.
    """
    rows = []
    for row, p in zip(family, holm(np.array([row.get("p", math.nan) for row in family], float)), strict=True):
        called = UNRESOLVED if "p" in row and p > LEVEL else words[0] if row.get(value, 0) > 0 else words[1]
        rows.append(row | {"p_holm": p, "verdict": called if "p" in row else DECLINED})
    whole = one_sample(np.array([row[value] for row in family if value in row], float))
    said = {name: whole[name] for name in ("stderr", "low", "high", "p", "reason") if name in whole}
    verdict = dict(zip((BETTER, WORSE), words, strict=True)).get(whole["verdict"], whole["verdict"])
    return [*rows, {"task": ALL_TASKS, value: whole.get("difference", math.nan), "verdict": verdict} | said]


COMPARISON = Statistic(
    "comparison",
    "Is one run better than another at equal tokens?",
    against_first,
    (
        *Column.texts(run="the run", reference="what it is compared with", metric="the metric"),
        Column("window", "", "first: the first three shared checkpoints; all; last: the last five"),
        Column("checkpoints", "1", "shared checkpoints in the window"),
        Column("tasks", "1", "tasks that both were scored on: the replicates"),
        Column("difference", "score", "mean over tasks, above 0 for the run", "with one task", ("low", "high")),
        Column("stderr", "score", "its standard error over tasks", "as difference"),
        Column("t", "1", "difference / stderr", "where the tasks do not vary"),
        Column("p", "1", "two-sided, Student's t with tasks - 1 degrees of freedom", "as t"),
        *Column.ends("score", "as t"),
        *Column.texts(verdict="better, worse, no difference resolved, declined"),
        Column("reason", "", "why it is declined", "where it is not"),
    ),
    "Student 1908; tasks as replicates: Miller 2024, arXiv 2411.00640",
    definition="Difference of a run from the first one with as many shots, averaged over a window of checkpoints that "
    "both have, then over tasks; its standard error is over tasks.",
    caveat="The error is that of tasks; what two seeds of one recipe differ by is not in it: of five reruns of OLMo's "
    "ladder two are called over all tasks and their accuracy, none over 13 chosen tasks. Compare with a rerun.",
    chart=Chart("difference", panel="metric", reference=0.0),
    count="tasks",
)
