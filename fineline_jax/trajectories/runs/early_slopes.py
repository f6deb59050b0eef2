"""How fast two runs learn at first: the gain per doubling of tokens from the onset on, and their difference."""

import numpy as np
import pandas as pd

from fineline_jax.trajectories.statistics.columns import Chart, Column, Statistic
from fineline_jax.trajectories.statistics.comparison import COMPARISON, curves_of, one_sample, paired, pairs_with_first
from fineline_jax.trajectories.statistics.dynamics import ABOVE_CHANCE, DECLINED, SETTLED, STILL_RISING, summarise
from fineline_jax.trajectories.statistics.rerun_error import over_tasks_again

EARLY = 5
"""Checkpoints of the slope, from the onset on; of fewer than FEWEST there is none."""
FEWEST = 3


def early_slopes(table: pd.DataFrame, summary: pd.DataFrame | None = None) -> pd.DataFrame:
    """Each series against the first with as many shots, per metric. See `EARLY_SLOPES`.

    summary: a frame of `DYNAMICS` of the table; None: it is computed. Of a task the first shared checkpoints count from
    the earlier of the two onsets, the same for both; of one that rose, but whose onset cannot be tested, all count.
    """
    summary = summarise(table) if summary is None else summary
    risen = summary["verdict"].isin([SETTLED, STILL_RISING, ABOVE_CHANCE, DECLINED])
    begun = summary["onset"].where(summary["onset"].notna() | ~risen, 0.0)
    keys = zip(summary["series"], summary["metric"], summary["task"], strict=True)
    onset: dict[tuple, float] = dict(zip(keys, begun.astype(float), strict=True))
    curves, rows = curves_of(table), []
    for run, reference in pairs_with_first(curves):
        shared = paired(curves[run], curves[reference])
        tokens = shared.index.to_numpy(float)
        known = shared.notna().to_numpy(bool) & (tokens > 0)[:, None]
        both = [curves[one].reindex_like(shared).to_numpy(float) for one in (run, reference)]
        slopes: dict[str, list[list[float]]] = {metric: [] for metric in shared.columns.unique(0)}
        for k, name in enumerate(shared.columns):
            begins = np.fmin(onset.get((run, *name), np.nan), onset.get((reference, *name), np.nan))
            at = np.flatnonzero(known[:, k] & (tokens >= begins))[:EARLY]
            if len(at) >= FEWEST:
                doublings = np.log2(tokens[at]) - np.log2(tokens[at]).mean()
                slopes[name[0]].append([doublings @ values[at, k] / (doublings @ doublings) for values in both])
        for metric, of_tasks in slopes.items():
            of_runs = np.array(of_tasks).reshape(-1, 2).T
            row = {"run": run, "reference": reference, "metric": metric}
            if of_tasks:
                row |= dict(zip(("slope", "reference_slope"), of_runs.mean(axis=1), strict=True))
            difference = of_runs[0] - of_runs[1]
            row |= one_sample(difference, over_tasks_again(difference))
            rows.append(row | ({"reason": "fewer than two tasks with an onset"} if len(of_tasks) < 2 else {}))
    return EARLY_SLOPES.frame(rows)


_TESTED = {column.name: column for column in COMPARISON.columns}
EARLY_SLOPES = Statistic(
    "early_slopes",
    "Does one run learn faster than another at first?",
    early_slopes,
    (
        *Column.texts(run="the run", reference="what it is compared with", metric="the metric"),
        Column("tasks", "1", "tasks with an onset in either run and three shared checkpoints: the replicates"),
        Column("slope", "score", "gain per doubling of tokens, mean over tasks", "without such tasks"),
        Column("reference_slope", "score", "the same of the reference, at the same checkpoints", "as slope"),
        Column("difference", "score", "of the slopes, above 0 for the run", "with one task", ("low", "high")),
        *(_TESTED[name] for name in ("stderr", "stderr_tasks", "stderr_runs", "runs_from", "t", "p", "low", "high")),
        *(_TESTED[name] for name in ("verdict", "reason")),
    ),
    COMPARISON.source,
    definition="Least-squares slope over log2 tokens of the first five checkpoints from the onset on, averaged over "
    "tasks; the error between runs is taken to be as large as that over tasks.",
    caveat="A run whose task rises earlier is compared at the same tokens, where the other may not have risen yet.",
    chart=Chart("difference", panel="metric", reference=0.0),
    count="tasks",
)
