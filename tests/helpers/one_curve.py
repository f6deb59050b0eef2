"""The dynamics of one curve from arrays: `summarise` without a table, without a family of tasks to adjust for and
without the look for constant answers."""

import functools
import math
from typing import Any

import numpy as np

from fineline_jax.trajectories.curves.curve import CHANCE, Curve, examine
from fineline_jax.trajectories.statistics.dynamics import HALFWAY, _as_given, _row


def summarise_curve(
    tokens: np.ndarray,
    values: np.ndarray,
    stderr: np.ndarray,
    *,
    chance: float = math.nan,
    n: float = math.nan,
    better: int = +1,
    target: float = math.nan,
    deviations: np.ndarray | None = None,
    draws: int = 200,
    seed: int = 0,
) -> dict[str, Any]:
    """The columns of `DYNAMICS` but its key and rank.

    All arrays [C], tokens non-decreasing; `better` is -1 for losses and perplexities; target: of `to_score`, by default
    half of the way from chance to 1; deviations: [draws, C] of a bootstrap over documents.
    """
    turned = None if deviations is None else better * deviations
    curve = Curve(tokens, better * values, stderr, better * chance, CHANCE, n, turned)
    tests = examine(curve)
    target = better * ((1 + chance) * HALFWAY if np.isnan(target) else target)
    normals = functools.cache(lambda count: np.random.default_rng(seed).standard_normal((draws, count)))
    row = _row(curve, tests, tests.rise_p, tests.fall_p, False, target, normals)
    return _as_given(row, better, False)
