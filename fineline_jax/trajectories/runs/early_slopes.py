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
        difference = paired(curves[run], curves[reference])
        for metric in difference.columns.unique(0):
            found = []
            for name in (column for column in difference.columns if column[0] == metric):
                begins = np.fmin(onset.get((run, *name), np.nan), onset.get((reference, *name), np.nan))
                known = difference[name].dropna().index
                at = known[(known >= begins) & (known > 0)][:EARLY]
                if len(at) >= FEWEST:
                    doublings = np.log2(at.to_numpy(float))
                    found.append([_slope(doublings, one.loc[at, name]) for one in (curves[run], curves[reference])])
            row = {"run": run, "reference": reference, "metric": metric}
            slopes = np.array(found).reshape(-1, 2)
            if len(slopes):
                row |= {"slope": slopes[:, 0].mean(), "reference_slope": slopes[:, 1].mean()}
            difference_of = slopes[:, 0] - slopes[:, 1]
            rows.append(row | one_sample(difference_of, over_tasks_again(difference_of)))
    return EARLY_SLOPES.frame(rows)


def _slope(x: np.ndarray, y: pd.Series) -> float:
    centred = x - x.mean()
    return float(centred @ y.to_numpy(float) / (centred @ centred))


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
