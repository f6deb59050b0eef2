"""When a task was learned: tokens to a share of its rise, with bootstrap draws of the curve's errors."""

from typing import NamedTuple

import numpy as np
import pandas as pd

from fineline_jax.facts.metrics import metric_of
from fineline_jax.trajectories.curves import isotonic
from fineline_jax.trajectories.curves.smooth import end_level
from fineline_jax.trajectories.curves.split import CURVE, split

DRAWS = 200
RISE_Z = 2.326
"""A task counts as learned where its end is above its baseline by so many standard errors (one-sided 1 %)."""


class Clock(NamedTuple):
    """One task of one series."""

    task: str
    domain: str
    log2: float
    """log2 of the tokens at which the share of the rise is reached."""
    drawn: np.ndarray
    """[draws] the same of curves drawn around the isotonic fit."""


def clocks(
    table: pd.DataFrame, *, share: float = 0.5, draws: int = DRAWS, seed: int = 0
) -> dict[tuple[str, str], list[Clock]]:
    """The clock of every task that rose, by (series, metric).

    The rise is from chance (where the metric has none, from the first checkpoint) to the level of the last half
    doubling of tokens. Errors are the table's, else the scatter of the curve. Tasks without a clear rise are left out.
    """
    found: dict[tuple[str, str], list[Clock]] = {}
    trained = table[table["tokens"] > 0]
    domains = trained["domain"].to_numpy()
    rng, normals = np.random.default_rng(seed), dict[int, np.ndarray]()
    for (series, metric, task), curve in split(trained, CURVE):
        clocks_here = found.setdefault((series, metric), [])
        if len(curve.tokens) < 3:
            continue
        better, tokens = metric_of(metric).better, curve.tokens
        values, error = better * curve.value, curve.errors()
        baseline = better * curve.chance if np.isfinite(curve.chance) else values[0]
        level = float(end_level(values, tokens))
        if not np.isfinite(error).all() or level - baseline <= RISE_Z * error[-1]:
            continue
        weights, count = np.ones(len(values)), len(values)
        drawn = values[None].astype(np.float32)
        if draws:
            if count not in normals:
                normals[count] = rng.standard_normal((draws, count), np.float32)
            # the same draws in another order for each curve: those of two curves have nothing to do with each other
            noise = normals[count][rng.permutation(draws)] * error.astype(np.float32)
            drawn = np.vstack([drawn, isotonic.fit(values, weights) + noise], dtype=np.float32, casting="same_kind")
        targets = baseline + share * (end_level(drawn, tokens) - baseline)
        at = np.log2(isotonic.crossing(drawn, weights, tokens, targets[:, None])[:, 0])
        at = np.where(np.isnan(at), np.log2(tokens[-1]), at)
        clocks_here.append(Clock(task, str(domains[curve.row]), float(at[0]), at[1:]))
    return found
