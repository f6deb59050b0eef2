"""Two forms of one curve's growth with the logarithm of its tokens, fitted by Huber's loss; many fits at once.

With x = ln(tokens / first tokens) and X = ln 10:

    power_law  y = low + (high - low) (1 - exp(-rate x)) / (1 - exp(-rate X))       = top - a tokens^-rate
    sigmoid    y = base + (top - base) / (1 + exp(-rate (x - middle)))              base given: what is untrained

The power law is written by its values at the first tokens and at ten times these, which data tell much better than its
top: with a small rate it is a line in x, and has none.
"""

from typing import NamedTuple

import numpy as np

FORMS = ("power_law", "sigmoid")
PARAMETERS = 3
ROUNDS = 100
RATES = 1e-3, 5.0
DECADE = float(np.log(10.0))
HUBER = 1.345
"""Residuals above so many standard deviations count by their absolute value (95 % efficiency: Huber 1981, 4.5)."""


class Growth(NamedTuple):
    """Fits of one form to B curves."""

    form: str
    parameters: np.ndarray
    """[B, 3]: low, high, rate; top, middle, rate."""
    objective: np.ndarray
    """[B]: mean Huber loss."""
    first: float
    """Tokens."""
    base: float

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        """tokens [T] -> [B, T]."""
        return value(self.form, self.parameters, np.log(tokens / self.first), self.base)[0]


def value(form: str, parameters: np.ndarray, x: np.ndarray, base: float) -> tuple[np.ndarray, np.ndarray]:
    """(y [B, T], its gradient [B, T, 3] in the parameters [B, 3]) at x [T]."""
    first, second, rate = parameters[:, 0, None], parameters[:, 1, None], parameters[:, 2, None]
    if form == "power_law":
        rise, whole = -np.expm1(-rate * x), -np.expm1(-rate * DECADE)
        share = rise / whole
        of_rate = ((1 - rise) * x - share * (1 - whole) * DECADE) / whole
        return first + (second - first) * share, np.stack([1 - share, share, (second - first) * of_rate], axis=-1)
    z = rate * (x - second)
    share = 1 / (1 + np.exp(-z))
    slope = (first - base) * share * (1 - share)
    return base + (first - base) * share, np.stack([share, -rate * slope, slope * (x - second)], axis=-1)


def fit(
    form: str, tokens: np.ndarray, values: np.ndarray, scale: float, base: float, start: np.ndarray | None = None
) -> Growth:
    """The form nearest to values [B, C] at tokens [C] above 0, by Huber's loss with scale = the residuals' deviation.

    start: parameters [3] of a fit nearby; None: of a grid of starts the best end counts. Steps are those of
    Levenberg and Marquardt with Huber's weights. Raises ValueError with fewer points than parameters.
    """
    count, many = values.shape[1], len(values)
    if count < PARAMETERS:
        raise ValueError(f"{count} points for {PARAMETERS} parameters")
    x = np.log(tokens / tokens[0])
    starts = _starts(form, x, values) if start is None else np.broadcast_to(start, (1, many, PARAMETERS))
    tiled = np.broadcast_to(values, (len(starts), many, count)).reshape(-1, count)
    ends, loss = _descend(form, x, tiled, HUBER * max(scale, 1e-9), base, starts.reshape(-1, PARAMETERS))
    best = loss.reshape(-1, many).argmin(axis=0), np.arange(many)
    found = ends.reshape(-1, many, PARAMETERS)[best], loss.reshape(-1, many)[best]
    return Growth(form, *found, float(tokens[0]), base)


def _starts(form: str, x: np.ndarray, values: np.ndarray) -> np.ndarray:
    """[starts, B, 3]."""
    low, high, none = values.min(axis=1), values.max(axis=1), np.zeros(len(values))
    pairs = [(low, high)] if form == "power_law" else [(1.1 * high - 0.1 * low, none + x[-1] * at) for at in (0, 1)]
    return np.array([np.stack([*pair, none + rate], axis=1) for pair in pairs for rate in (0.1, 0.4, 1.2)])


def huber(residual: np.ndarray, delta: float) -> np.ndarray:
    """Squares / 2 up to delta, straight lines beyond."""
    size = np.abs(residual)
    return np.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta))


def _descend(
    form: str, x: np.ndarray, values: np.ndarray, delta: float, base: float, start: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(parameters [B, 3], loss [B]); those that do not get better any more are left alone."""
    middle = (-3.0, x[-1] + 3.0) if form == "sigmoid" else (-np.inf, np.inf)
    lowest, highest = np.array([(-np.inf, np.inf), middle, RATES]).T
    ends = np.clip(start, lowest, highest)
    at, gradient = value(form, ends, x, base)
    losses = huber(at - values, delta).mean(axis=1)
    live, now, loss, damping = np.arange(len(ends)), ends.copy(), losses.copy(), np.full(len(ends), 1e-2)
    for _ in range(ROUNDS):
        residual = at - values
        weighted = gradient * np.minimum(1.0, delta / np.maximum(np.abs(residual), 1e-300))[:, :, None]
        normal = weighted.swapaxes(1, 2) @ gradient
        diagonal = np.arange(PARAMETERS)
        normal[:, diagonal, diagonal] *= 1 + damping[:, None]
        downhill = -(weighted.swapaxes(1, 2) @ residual[..., None])[..., 0]
        free = ((now > lowest) | (downhill > 0)) & ((now < highest) | (downhill < 0))  # a bound holds what it stops
        normal *= free[:, :, None] & free[:, None, :]
        normal[:, diagonal, diagonal] += np.where(free, 1e-12, 1.0)
        step = np.linalg.solve(normal, np.where(free, downhill, 0.0)[..., None])[..., 0]
        ahead = np.clip(now + step, lowest, highest)
        at_ahead, gradient_ahead = value(form, ahead, x, base)
        loss_ahead = huber(at_ahead - values, delta).mean(axis=1)
        better = loss_ahead < loss
        done = (better & (loss - loss_ahead <= 1e-9 * loss)) | (damping > 1e6)
        now[better], at[better], gradient[better] = ahead[better], at_ahead[better], gradient_ahead[better]
        loss, damping = np.where(better, loss_ahead, loss), np.where(better, damping / 5, damping * 5)
        ends[live], losses[live] = now, loss
        if done.all():
            break
        live, values, now, at, gradient, loss, damping = (
            part[~done] for part in (live, values, now, at, gradient, loss, damping)
        )
    return ends, losses
