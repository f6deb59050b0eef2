"""Two runs at equal tokens or FLOPs: which is better, by how much, and does it exceed what a rerun would differ by?

For each task the difference of the two runs is averaged over a window of checkpoints. The mean over tasks has two
errors: over tasks, sd / sqrt(tasks), with tasks as the replicates, and between runs of one recipe (`rerun_error`).
Their squares add (Satterthwaite 1946). Errors of one task's checkpoints share its questions and its run, so they are
never counted as replicates. Where scores are ours, the error over documents is said beside them, from a bootstrap that
draws the same documents of both runs.
"""

import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pandas as pd

from fineline_jax.facts.metrics import metric_of
from fineline_jax.trajectories.statistics.columns import Chart, Column, Statistic, flops_per_token, shots_of
from fineline_jax.trajectories.statistics.inference import LEVEL, holm, student
from fineline_jax.trajectories.statistics.rerun_error import WINDOWS, RunError, between_reruns, run_error

ALL_TASKS = "all tasks"
BETTER, WORSE, UNRESOLVED, DECLINED = "better", "worse", "no difference resolved", "declined"
TOKENS, FLOPS = "tokens", "FLOPs"
SAME_SIZE = 1.02
"""Runs whose FLOPs per token differ by no more than this factor are compared at equal tokens alone."""


def compare(table: pd.DataFrame, run: str, reference: str, *, tasks: Sequence[str] | None = None) -> pd.DataFrame:
    """`run` minus `reference` at equal tokens, and at equal FLOPs where their sizes differ. See `COMPARISON`.

    tasks: those to count; None: all that both have. Of a metric where lower is better the sign is turned, so that a
    positive difference is always in favour of `run`. Runs of one arm, also others, say what reruns differ by.
    """
    kept = table if tasks is None else table[table["task"].isin(tasks)]
    return COMPARISON.frame(_rows(kept, [(run, reference)]))


def against_first(table: pd.DataFrame) -> pd.DataFrame:
    """Each series against the first of the table that has as many shots, by `compare`."""
    return COMPARISON.frame(_rows(table, pairs_with_first(map(str, table["series"].unique()))))


def pairs_with_first(series: Iterable[str]) -> list[tuple[str, str]]:
    """(series, the first one with as many shots) of all but those first ones."""
    first: dict[str, str] = {}
    pairs = [(name, first.setdefault(shots_of(name), name)) for name in series]
    return [pair for pair in pairs if pair[0] != pair[1]]


def curves_of(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Series -> tokens x (metric, task), turned so that higher is better; of two at one token count the last one."""
    key, found = ["metric", "task", "tokens"], {}
    for name, rows in table.groupby("series", sort=False, observed=True).indices.items():
        part = table[[*key, "value"]].iloc[np.sort(rows)].drop_duplicates(key, keep="last")
        curves = part.pivot(index="tokens", columns=["metric", "task"], values="value")
        better = {metric: metric_of(str(metric)).better for metric in curves.columns.unique(0)}
        found[str(name)] = curves * curves.columns.get_level_values(0).map(better).to_numpy(float)
    return found


def paired(curves: pd.DataFrame, reference: pd.DataFrame, dearer: float = 1.0) -> pd.DataFrame:
    """The difference of two of `curves_of`, tokens of the first x (metric, task), where both were scored.

    dearer: FLOPs per token of the reference over those of the run; unless 1, the reference is taken where it has as
    many FLOPs, linear in their logarithm between its checkpoints.
    """
    if dearer != 1:
        trained = curves.index[curves.index > 0]
        at, grid = np.log(trained.to_numpy(float)), reference.index.to_numpy(float) * dearer
        values = reference.to_numpy(float)[grid > 0]
        grid, known = np.log(grid[grid > 0]), np.isfinite(values)
        taken = np.full((len(at), values.shape[1]), np.nan)
        for k in np.flatnonzero(known.any(axis=0)):
            taken[:, k] = np.interp(at, grid[known[:, k]], values[known[:, k], k], left=np.nan, right=np.nan)
        reference = pd.DataFrame(taken, trained, reference.columns)
    one, other = curves.align(reference, join="inner")
    return (one - other).dropna(how="all").dropna(axis=1, how="all")


def _rows(table: pd.DataFrame, pairs: Sequence[tuple[str, str]]) -> Iterator[dict]:
    """Rows of COMPARISON."""
    curves, flops = curves_of(table), flops_per_token(table)
    who = table.drop_duplicates("series").set_index("series") if {"arm", "seed"} <= set(table) else table.iloc[:0]
    reruns = between_reruns(curves, {str(name): str(arm) for name, arm in who["arm"].items()} if len(who) else {})
    drawn = _draws(table) if "resampled" in table else {}
    for run, reference in pairs:
        if run not in curves or reference not in curves:
            continue
        dearer = flops[reference] / flops[run]
        grids = {TOKENS: 1.0} | ({FLOPS: dearer} if abs(np.log(dearer)) > np.log(SAME_SIZE) else {})
        for equal, factor in grids.items():
            differences = paired(curves[run], curves[reference], factor)
            for metric in differences.columns.unique(0):
                of_metric = pd.DataFrame(differences[metric]).dropna(how="all")
                for window, (averaged, _) in WINDOWS.items():
                    inside = of_metric.iloc[averaged]
                    row = {"run": run, "reference": reference, "metric": metric, "equal": equal, "window": window}
                    between = reruns.get((metric, window)) or run_error(of_metric, window)
                    inside = inside.dropna(axis=1, how="all")
                    over = math.nan
                    if equal == TOKENS and run in drawn and reference in drawn:
                        over = _over_documents(drawn[run], drawn[reference], metric, inside)
                    row |= {"checkpoints": len(inside), "stderr_documents": over}
                    yield row | one_sample(inside.mean(axis=0).to_numpy(), between, over)


def _draws(table: pd.DataFrame) -> dict[str, dict[tuple, np.ndarray]]:
    """Series -> (metric, task, tokens) -> draws of the bootstrap over documents."""
    found: dict[str, dict[tuple, np.ndarray]] = {}
    columns = (table[name] for name in ("series", "metric", "task", "tokens", "resampled"))
    for series, *key, drawn in zip(*columns, strict=True):
        if isinstance(drawn, np.ndarray):
            found.setdefault(str(series), {})[tuple(key)] = drawn
    return found


def _over_documents(one: dict, other: dict, metric: str, inside: pd.DataFrame) -> float:
    """Standard error over documents of the mean over tasks [tokens x tasks]; NaN unless all scores have draws."""
    of_tasks = []
    for task, values in inside.items():
        keys = [(metric, task, tokens) for tokens in values.index[values.notna()]]
        if any(key not in one or key not in other for key in keys):
            return math.nan
        of_tasks.append(np.mean([one[key] - other[key] for key in keys], axis=0))
    return float(np.mean(of_tasks, axis=0).std(ddof=1))


def one_sample(of_tasks: np.ndarray, between: RunError | None = None, documents: float = math.nan) -> dict:
    """Columns `tasks` to `reason` of COMPARISON for one difference per task, [tasks].

    between: the error between runs that is added; documents: the error over documents, which of one task stands for
    that over tasks.
    """
    count = len(of_tasks)
    row: dict = {"tasks": count}
    if count < 2 and not (count and between and documents > 0):
        return row | {"verdict": DECLINED, "reason": "fewer than two tasks that both runs were scored on"}
    mean = float(of_tasks.mean())
    error = float(of_tasks.std(ddof=1) / np.sqrt(count)) if count > 1 else documents
    row |= {"difference": mean} | ({"stderr_tasks": error} if count > 1 else {})
    if error == 0:
        same = "the runs are equal on every task" if mean == 0 else "every task differs by the same"
        return row | {"verdict": DECLINED, "reason": same}
    most = count - 1.0 if count > 1 else math.inf
    parts = [(error**2, most)]
    if between is not None:
        parts += between.parts
        row |= {"stderr_runs": math.sqrt(sum(part for part, _ in between.parts)), "runs_from": between.source}
    total = sum(part for part, _ in parts)
    # a further error never makes a difference surer, hence not more degrees of freedom than tasks give
    freedom = min(most, total**2 / sum(part**2 / of for part, of in parts))
    stderr = math.sqrt(total)
    row |= {"stderr": stderr, "t": mean / stderr} | student(mean, stderr, freedom)
    verdict = UNRESOLVED if row["p"] > LEVEL else BETTER if mean > 0 else WORSE
    return row | {"verdict": verdict, "reason": ""}


def over_tasks(
    family: list[dict], value: str, words: tuple[str, str] = (BETTER, WORSE), between: RunError | None = None
) -> list[dict]:
    """The rows of a metric's tasks with p_holm and verdict, and a row of all tasks, their mean `value` by `one_sample`.

    words: what a value above 0 is called, and one below. between: see `one_sample`.
    """
    rows = []
    for row, p in zip(family, holm(np.array([row.get("p", math.nan) for row in family], float)), strict=True):
        called = UNRESOLVED if "p" in row and p > LEVEL else words[0] if row.get(value, 0) > 0 else words[1]
        rows.append(row | {"p_holm": p, "verdict": called if "p" in row else DECLINED})
    whole = one_sample(np.array([row[value] for row in family if value in row], float), between)
    said = {name: whole[name] for name in ("stderr", "low", "high", "p", "reason") if name in whole}
    verdict = dict(zip((BETTER, WORSE), words, strict=True)).get(whole["verdict"], whole["verdict"])
    return [*rows, {"task": ALL_TASKS, value: whole.get("difference", math.nan), "verdict": verdict} | said]


COMPARISON = Statistic(
    "comparison",
    "Is one run better than another at equal tokens or FLOPs?",
    against_first,
    (
        *Column.texts(run="the run", reference="what it is compared with", metric="the metric"),
        Column("equal", "", "tokens, or FLOPs: the reference interpolated to as many, where sizes differ"),
        Column("window", "", "first: the first three shared checkpoints; all; last: the last five"),
        Column("checkpoints", "1", "shared checkpoints in the window"),
        Column("tasks", "1", "tasks that both were scored on: the replicates"),
        Column("difference", "score", "mean over tasks, above 0 for the run", "with one task", ("low", "high")),
        Column("stderr", "score", "its standard error: over tasks and between runs, in squares", "where declined"),
        Column("stderr_tasks", "score", "the part over tasks", "with one task"),
        Column("stderr_runs", "score", "the part between runs of one recipe", "where declined"),
        Column("runs_from", "", "whence that is: reruns, scatter of checkpoints, or as much as over tasks"),
        Column("stderr_documents", "score", "over documents, the same of both, these tasks given", "without draws"),
        Column("t", "1", "difference / stderr", "where declined"),
        Column("p", "1", "two-sided, Student's t with Satterthwaite's degrees of freedom, at most tasks - 1", "as t"),
        *Column.ends("score", "as t"),
        *Column.texts(verdict="better, worse, no difference resolved, declined"),
        Column("reason", "", "why it is declined", "where it is not"),
    ),
    "Student 1908; Satterthwaite 1946; tasks as replicates: Miller 2024, arXiv 2411.00640",
    definition="Difference of a run from the first one with as many shots, averaged over a window of checkpoints that "
    "both have, then over tasks. Its error has two parts: over tasks, and what two runs of one recipe differ by.",
    caveat="Without runs of one recipe (columns arm and seed) what reruns differ by is estimated from the scatter of "
    "checkpoints, as calibrated on five reruns of OLMo's ladder; of twenty equal pairs one is called.",
    chart=Chart("difference", panel="metric", reference=0.0),
    count="tasks",
)
