"""Runs, arms and seeds: what every comparison of an ablation starts from.

Tables of an ablation are tidy tables with two more columns: `arm`, what was changed, and `seed`, the replicate. A table
without them holds arms of one run each, named as their series.
"""

import functools
import math

import numpy as np
import pandas as pd
from scipy import stats

from fineline_jax.errors import UserError
from fineline_jax.trajectories.statistics.inference import LEVEL

POWER = 0.8
LATE_SHARE = 0.25
"""The end of a run: its checkpoints in this last share of the tokens that all runs have …"""
LATE_MOST = 5
"""… at most so many, whose mean is the final value."""
SLACK = 1.02
"""Tokens of one moment differ by whole steps between batch sizes; up to this factor they count as equal."""
SHORTEST = 0.9
"""A run that ends before this share of the longest one's tokens stopped early and has no final value."""
FEWEST_BLOCKED = 12
"""Degrees of freedom from which seeds count as blocks; with fewer, runs count as independent of each other."""


def with_runs(table: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """The table with the columns of `runs` (series, arm, seed, and others) at every row of the series.

    Raises UserError where a series of the table is none of the runs.
    """
    unknown = set(table["series"].unique()) - set(runs["series"])
    if unknown:
        raise UserError(f"series {min(unknown)!r}: is none of the runs; give its run folder, or name the same series")
    kept = [name for name in table if name == "series" or name not in runs]
    return table[kept].merge(runs, on="series", how="left", validate="many_to_one")


def arms_of(table: pd.DataFrame) -> pd.DataFrame:
    """The table with the columns arm and seed, made where they are not there."""
    if "arm" not in table:
        table = table.assign(arm=table["series"])
    return table if "seed" in table else table.assign(seed=0)


def end_values(table: pd.DataFrame) -> pd.DataFrame:
    """Columns series, arm, seed, metric, task, value, stderr, tokens, averaged: the end of every run, at equal tokens.

    value: mean over the last checkpoints (LATE_SHARE, LATE_MOST; equally many for all runs). stderr: that of the last
    checkpoint. Runs that stopped early are not in it (`stopped_early`).
    """
    rows = []
    for (metric, task), part in arms_of(table).groupby(["metric", "task"], sort=False, observed=True):
        for series, curve in late_checkpoints(part).groupby("series", sort=False, observed=True):
            last = curve.iloc[-1]
            row = {name: last[name] for name in ("arm", "seed", "stderr", "tokens") if name in last}
            row |= {"series": series, "metric": metric, "task": task}
            rows.append(row | {"value": curve["value"].mean(), "averaged": len(curve)})
    names = ["series", "arm", "seed", "metric", "task", "value", "stderr", "tokens", "averaged"]
    return pd.DataFrame(rows, columns=names)


def late_checkpoints(part: pd.DataFrame) -> pd.DataFrame:
    """Of the rows of one metric and task those that are the end of each run, ascending in tokens."""
    ends = part.groupby("series", observed=True)["tokens"].max()
    ends = ends[ends >= SHORTEST * ends.max()]
    horizon = ends.min()
    late = part[part["series"].isin(ends.index)]
    late = late[late["tokens"].between((1 - LATE_SHARE) * horizon, SLACK * horizon)]
    late = late.drop_duplicates(["series", "tokens"], keep="last").sort_values("tokens")
    curves = late.groupby("series", sort=False, observed=True)
    return curves.tail(min(LATE_MOST, int(curves.size().min()))) if len(late) else late


def stopped_early(table: pd.DataFrame) -> list[str]:
    """Series that end before SHORTEST of the tokens of the longest one: stopped, diverged or still training."""
    ends = table.groupby("series", observed=True)["tokens"].max()
    return sorted(str(name) for name in ends.index[ends < SHORTEST * ends.max()])


def run_variance(values: np.ndarray, arms: np.ndarray, seeds: np.ndarray) -> tuple[float, float, str]:
    """(variance between runs of one arm, its degrees of freedom, "blocks" or "runs"), pooled over all arms.

    values, arms, seeds [runs]. Where every arm has the same seeds, and that leaves FEWEST_BLOCKED degrees of freedom,
    seeds are blocks: what one seed adds to all arms alike is no variance of a difference. Else runs are taken as
    independent, which is right or, where runs of one seed move together, wide. The design decides, never the values.
    NaN and 0 where no arm has two runs.
    """
    table = pd.DataFrame({"value": values, "arm": arms, "seed": seeds})
    grid = table.pivot_table(index="seed", columns="arm", values="value")
    size = (len(grid) - 1) * (grid.shape[1] - 1)
    if size >= FEWEST_BLOCKED and grid.notna().all(axis=None) and grid.size == len(values):
        cells = grid.to_numpy(float)
        residual = cells - cells.mean(axis=0) - cells.mean(axis=1, keepdims=True) + cells.mean()
        return float((residual**2).sum() / size), float(size), "blocks"
    inside = table.groupby("arm")["value"]
    freedom = float((inside.size() - 1).sum())
    if freedom == 0:
        return math.nan, 0.0, "runs"
    return float(((table["value"] - inside.transform("mean")) ** 2).sum() / freedom), freedom, "runs"


def seeds_to_resolve(difference: float, variance: float, fixed: float = 0.0) -> float:
    """Seeds per arm with which a two-sided test of two arms at 5 % finds `difference` in 80 %; inf: no number does.

    variance: between runs of one arm; fixed: variance of the difference that more seeds do not lessen (documents).
    """
    seeds, quantiles = _seeds_and_quantiles()
    enough = quantiles * np.sqrt(2 * variance / seeds + fixed) <= difference
    return float(seeds[enough.argmax()]) if enough.any() else math.inf


@functools.cache
def _seeds_and_quantiles() -> tuple[np.ndarray, np.ndarray]:
    """Numbers of seeds per arm, each below 1000, and the sum of the quantiles of level and power at each."""
    seeds = np.concatenate([np.arange(2, 1000), np.arange(1000, 10_001, 100)])
    freedom = 2 * seeds - 2
    return seeds, np.asarray(stats.t.ppf(1 - LEVEL / 2, freedom) + stats.t.ppf(POWER, freedom))
