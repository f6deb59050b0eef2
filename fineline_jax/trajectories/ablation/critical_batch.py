"""The critical batch size from branches: how large a batch may be before its loss at equal tokens suffers.

From a checkpoint branches train on for the same tokens with different batch sizes. The excess of a batch is its final
loss minus that of the base batch; its isotonic fit over log batch crosses the tolerance at the critical batch size
(the largest batch within the tolerance: Merrill et al. 2025, arXiv 2505.23971). The interval holds the batches at which
a t-test of the excess against the tolerance would not reject: where the 95 % limits of the excess cross it.
"""

import math

import numpy as np
import pandas as pd
from scipy import stats

from fineline_jax.errors import UserError
from fineline_jax.facts.metrics import metric_of
from fineline_jax.trajectories.ablation.arms import arms_of, end_values, run_variance
from fineline_jax.trajectories.curves.isotonic import crossing
from fineline_jax.trajectories.statistics.columns import Chart, Column, Statistic
from fineline_jax.trajectories.statistics.inference import LEVEL

TOLERANCE = 0.01


def critical_batch(table: pd.DataFrame, *, tolerance: float = TOLERANCE, base: float | None = None) -> pd.DataFrame:
    """Of each branch point, metric and task. See `CRITICAL_BATCH`.

    table: of branches, with the columns branch (tokens where they begin) and batch (sequences or tokens of a step).
    tolerance: in units of the metric. base: the batch that others are held against; None: the smallest.
    Raises UserError where a column or the base is missing.
    """
    for name in ("branch", "batch"):
        if name not in table:
            raise UserError(f"column {name!r}: the table of branches lacks it; group the runs by it")
    rows = []
    for branch, of_branch in arms_of(table).groupby("branch", observed=True):
        of_branch = of_branch.assign(tokens=of_branch["tokens"] - of_branch["branch"])  # the end is that of the branch
        of_branch = of_branch[of_branch["tokens"] > 0]
        batches = of_branch[["series", "batch"]].drop_duplicates("series")
        ends = end_values(of_branch).drop(columns="batch", errors="ignore").merge(batches, on="series")
        for (metric, task), part in ends.groupby(["metric", "task"], sort=False, observed=True):
            row = {"branch": branch, "metric": metric, "task": task, "tolerance": tolerance}
            loss = -metric_of(str(metric)).better * part["value"].to_numpy(float)
            batch, given = part["batch"].to_numpy(float), part["stderr"].to_numpy(float)
            rows.append(row | crossing_of(batch, loss, part["seed"].to_numpy(), given, tolerance, base))
    return CRITICAL_BATCH.frame(rows)


def crossing_of(
    batch: np.ndarray,
    loss: np.ndarray,
    seeds: np.ndarray,
    given: np.ndarray,
    tolerance: float,
    base: float | None = None,
) -> dict:
    """Columns base to reason of CRITICAL_BATCH from one loss per run, [runs]; given: standard errors of the losses,
    which count where no batch has two seeds."""
    grid, index, counts = np.unique(batch, return_inverse=True, return_counts=True)
    base = float(grid[0]) if base is None else base
    if base not in grid:
        raise UserError(f"base batch {base:g}: no branch has it; it is one of {', '.join(f'{b:g}' for b in grid)}")
    row: dict = {"base": base, "batches": len(grid), "runs": len(batch), "largest": grid[-1]}
    if len(grid) < 2 or base == grid[-1]:
        return row | {"reason": "no batch is larger than the base"}
    means = np.bincount(index, loss) / counts
    variance, freedom, _ = run_variance(loss, index, seeds)
    variances, note = np.asarray(variance / counts), ""
    if not freedom:
        variances, freedom = np.bincount(index, given**2) / counts**2, math.inf
        note = "one seed per batch: the interval holds the error of the loss alone"
        if not np.isfinite(variances).all():
            note = "one seed per batch and no error of the loss: no interval"
    upward, of_base = grid >= base, int(np.searchsorted(grid, base))
    excess = (means - means[of_base])[upward]
    error = np.sqrt(variances + variances[of_base])[upward] * np.append(0.0, np.ones(len(excess) - 1))
    t = float(stats.t.ppf(1 - LEVEL / 2, freedom))
    fits = np.stack([excess, excess + t * error, excess - t * error])
    known = np.asarray(np.isfinite(fits).all(axis=1))
    at, low, high = np.where(known, _crossing(np.where(known[:, None], fits, 0.0), grid[upward], tolerance), -np.inf)
    row |= {"excess_of_largest": float(excess[-1])}
    if not known[1]:
        low = high = math.nan
    elif np.isnan(high):
        high = math.inf
    row |= {"low": float(low), "high": float(high)}
    if np.isnan(at):
        return row | {"reason": "the largest batch is still within the tolerance"}
    return row | {"critical": float(at), "reason": note}


def _crossing(excess: np.ndarray, grid: np.ndarray, tolerance: float) -> np.ndarray:
    """Batch at which the isotonic fit of each row of excess [..., batches] reaches the tolerance; NaN: none."""
    return crossing(excess, np.ones(len(grid)), grid, np.full((*excess.shape[:-1], 1), tolerance))[..., 0]


CRITICAL_BATCH = Statistic(
    "critical_batch",
    "How large may a batch be?",
    critical_batch,
    (
        Column("branch", "tokens", "where the branches begin"),
        *Column.texts(metric="the metric", task="the task or validation set"),
        Column("tolerance", "score", "excess that is still allowed"),
        Column("base", "batch", "the batch that others are held against, in the unit of the table"),
        Column("batches", "1", "different batch sizes"),
        Column("runs", "1", "branches"),
        Column("largest", "batch", "the largest batch tried"),
        Column("excess_of_largest", "score", "its loss minus that of the base"),
        Column(
            "critical", "batch", "the largest batch within the tolerance", "where all are within it", ("low", "high")
        ),
        Column("low", "batch", "lower end of the 95 % interval", "without errors"),
        Column("high", "batch", "upper end; infinite: beyond the largest batch tried", "without errors"),
        Column("reason", "", "what is missing, or what the interval lacks", "where nothing is"),
    ),
    "Merrill et al. 2025, arXiv 2505.23971; isotonic regression: Barlow et al. 1972",
    definition="Batch at which the isotonic fit of the excess loss over log batch crosses the tolerance; the interval "
    "is where the limits of the excess, from the variance between seeds, cross it.",
    caveat="It holds for the rule by which the learning rate follows the batch, and for the tokens branches trained.",
    chart=Chart("critical", panel="task"),
    count="runs",
)
