"""When a curve that may only rise reaches a value: the isotonic fit, and its crossings without computing the fit."""

from collections.abc import Sequence

import numpy as np
from scipy import optimize


def fit(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted least-squares non-decreasing fit of values [C], weights [C] > 0."""
    return optimize.isotonic_regression(values, weights=weights).x


def crossing(values: np.ndarray, weights: np.ndarray, tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Tokens at which the isotonic fit of each row first reaches each of its targets, NaN if never.

    values [..., C], weights [C], tokens [C] non-decreasing, targets [..., T] -> [..., T], computed in the precision of
    the values. Between checkpoints linear in log tokens (linear in tokens from a checkpoint at 0 tokens); tokens[0]
    where the first checkpoint is already there.

    The fit is the slope of the greatest convex minorant of the cumulative sum, so it first reaches the target where the
    cumulative sum of weight x (value - target) has its first minimum (the switch relation: Groeneboom, Jongbloed 2014,
    Nonparametric Estimation under Shape Constraints, 3.3). The slopes on both sides of that point are the fit there.
    """
    sums, mass, aims = _sums(values, weights, targets)
    if values.ndim == 1:
        return _crossing(sums, mass, tokens, aims[:, None])
    return np.stack([_crossing(sums, mass, tokens, aims[..., i, None]) for i in range(targets.shape[-1])], axis=-1)


def crossing_ranks(
    values: np.ndarray, weights: np.ndarray, tokens: np.ndarray, targets: np.ndarray, ranks: Sequence[int]
) -> np.ndarray:
    """[ranks, T]: each column of `crossing` sorted, of it the entries of these ranks (from 0); inf, last, if never.

    values [N, C], targets [N, T]. A row crosses between checkpoints k - 1 and k of its first minimum k, so only rows
    with the k of a wanted rank are followed further.
    """
    sums, mass, aims = _sums(values, weights, targets)
    firsts, buffer = np.empty(aims.T.shape, int), np.empty_like(sums)
    for i in range(len(firsts)):
        np.multiply(aims[:, i, None], mass, out=buffer)
        np.argmin(np.subtract(sums, buffer, out=buffer), axis=-1, out=firsts[i])
    in_order = np.sort(firsts, axis=1)
    wanted = (firsts[:, None] == in_order[:, ranks, None]).any(axis=1)
    at = np.full(firsts.shape, np.inf)
    column, row = np.nonzero(wanted)
    crossed = _crossing(sums[row], mass, tokens, aims[row, column, None])
    at[wanted] = np.where(np.isnan(crossed), np.inf, crossed)
    # rows that were not followed keep their place by k: before those of a wanted rank, or behind them
    below = np.sum(firsts[:, None] < in_order[:, ranks, None], axis=-1)  # [T, ranks]
    return np.array([
        [np.sort(at[i][firsts[i] == in_order[i, rank]])[rank - below[i, j]] for i in range(len(firsts))]
        for j, rank in enumerate(ranks)
    ])  # fmt: skip


def _sums(values: np.ndarray, weights: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(cumulative sums of weight x (value - mean) [..., C + 1], cumulative weights [C + 1], targets less the mean)."""
    weights = (weights / weights.mean()).astype(values.dtype)
    centre = values.mean(axis=-1, keepdims=True)
    zero = np.zeros((*values.shape[:-1], 1), values.dtype)
    sums = np.concatenate([zero, np.cumsum(weights * (values - centre), axis=-1)], axis=-1)
    mass = np.concatenate([zero[..., 0].ravel()[:1], np.cumsum(weights)])
    return sums, mass, (targets - 1e-12).astype(values.dtype) - centre


def _crossing(sums: np.ndarray, mass: np.ndarray, tokens: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Of cumulative sums [..., C + 1] and target [..., 1]."""
    count = len(tokens)
    tilted = sums - target * mass
    first = np.argmin(tilted, axis=-1)[..., None]
    tilted -= np.take_along_axis(tilted, first, -1)
    with np.errstate(divide="ignore", invalid="ignore"):
        run = np.subtract(mass, mass[first])
        run /= tilted  # 1 / slope: below 0 to the left, above 0 to the right
        np.put_along_axis(run, first, 0.0, -1)
        low, high = 1 / run.min(axis=-1).astype(float), 1 / run.max(axis=-1).astype(float)
    first = first[..., 0]
    inside = (first > 0) & (first < count)
    share = np.divide(-low, high - low, out=np.ones(first.shape), where=inside & (high > low))
    start = tokens[np.maximum(first - 1, 0)].astype(float)
    end = tokens[np.minimum(first, count - 1)].astype(float)
    from_zero = start <= 0
    ratio = np.where(from_zero, 1.0, end / np.where(from_zero, 1.0, start))
    share = np.clip(share, 0.0, 1.0)
    at = np.where(from_zero, start + share * (end - start), start * ratio**share)
    return np.where(first == 0, float(tokens[0]), np.where(first == count, np.nan, at))
