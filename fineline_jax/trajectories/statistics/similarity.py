"""Do runs of different sizes show the same dynamics of a task? Rank correlation at matched tokens.

Levels again rise together whatever the sizes do, so the mean over pairs is given beside that of first differences.
"""

import numpy as np
import pandas as pd
from scipy import stats

from fineline_jax.trajectories.statistics.columns import Chart, Column, Statistic, groups, parameters_of, shots_of, wide

FEWEST = 5


def similarity(table: pd.DataFrame, series: list[str] | None = None) -> pd.DataFrame:
    """Of each (metric, task): mean Spearman correlation over pairs of series. See `SIMILARITY`.

    series: those to compare; None: all, if their sizes are known and there are two or more. Series of other shots are
    compared apart. Only tokens at which every one of them was scored count.
    """
    if series is None and len({size for size in parameters_of(table).values() if np.isfinite(size)}) < 2:
        return SIMILARITY.frame([])
    chosen = table if series is None else table[table["series"].isin(series)]
    shots = {name: shots_of(str(name)) for name in chosen["series"].unique()}
    chosen = chosen.assign(shots=chosen["series"].map(shots))
    rows = []
    for row, part in groups(chosen, "metric", "task", "shots"):
        curves = wide(part, by="series")
        row |= {"series": curves.shape[1], "checkpoints": len(curves)}
        if len(set(shots.values())) == 1:
            row["shots"] = ""
        if curves.shape[1] < 2 or len(curves) < FEWEST:
            rows.append(row | {"reason": f"fewer than two series, or than {FEWEST} checkpoints that all have"})
            continue
        values = curves.to_numpy(float)
        for name, compared in (("levels", values), ("differences", np.diff(values, axis=0))):
            pairs = pair_correlations(compared)
            row[name] = float(np.nanmean(pairs)) if np.isfinite(pairs).any() else np.nan
        constant = int((np.ptp(values, axis=0) == 0).sum())
        rows.append(row | {"reason": f"{constant} curves do not change and are left out" if constant else ""})
    return SIMILARITY.frame(rows)


def pair_correlations(values: np.ndarray) -> np.ndarray:
    """Spearman correlation of each pair of columns of values [T, n] -> [n (n - 1) / 2]; NaN where one is constant."""
    ranks = stats.rankdata(values, axis=0)
    ranks = ranks - ranks.mean(axis=0)
    length = np.sqrt((ranks**2).sum(axis=0))
    scaled = ranks / np.where(length > 0, length, np.nan)
    return (scaled.T @ scaled)[np.triu_indices(values.shape[1], 1)]


SIMILARITY = Statistic(
    "similarity",
    "Are a task's dynamics the same at every size?",
    similarity,
    (
        *Column.texts(metric="the metric", task="the task"),
        Column("shots", "", "of the series compared", "where all series have as many"),
        Column("series", "1", "series compared"),
        Column("checkpoints", "1", "tokens at which every series was scored"),
        Column("levels", "1", "mean Spearman correlation of the curves over pairs", "where it cannot be compared"),
        Column("differences", "1", "the same of first differences", "as levels"),
        Column("reason", "", "what was left out, or why there is no value", "where all counts"),
    ),
    "Spearman 1904; arXiv 2404.01204, dynamics across sizes; definition: shared tokens, mean over pairs",
    definition="Rank correlation of the same task in two series at the tokens where all were scored, as often shot; "
    "mean over pairs of series.",
    caveat="Levels rise together in any two runs that learn; the correlation of differences says whether they also "
    "move together from checkpoint to checkpoint.",
    chart=Chart("levels", panel="metric"),
    count="checkpoints",
)
