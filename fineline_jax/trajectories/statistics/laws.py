"""Scaling laws of losses and scores: fitted on small runs, asked of a larger one, refused where they failed before.

Forms (y a score in [0, 1], L the task's loss in bits per byte, N parameters, D tokens, C floating-point operations):

    flops       L = A C^-alpha + E,                  y = a / (1 + exp(-k (L - L0))) + b
    size_tokens L = A N^-alpha + B D^-beta + E,      the same second step
    direct      -log y = A C^-alpha

Losses are fitted by Huber's loss (delta 1e-3) of the residual of logarithms, from a grid of starts, with the analytic
gradient; the second step by least squares over the checkpoints of all runs behind their first tenth.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize

DELTA = 1e-3
SCALE = 1e4
"""Of the objective: L-BFGS-B stops on its size, so one of the order of 1 makes its tolerances mean something."""
STARTS = 4
"""Points of a grid, those with the smallest loss, from which a fit begins."""
IRLS_STEPS = 500
SKIPPED_SHARE = 0.1
"""First part of each run that the second step leaves out: the learning rate is still rising there."""


@dataclass(frozen=True)
class PowerLaw:
    """exp(log_scale[0]) x_0^-exponent[0] + … + floor, of x [n, terms] in the units of the data."""

    log_scale: tuple[float, ...]
    exponent: tuple[float, ...]
    floor: float
    objective: float
    """Mean Huber loss of the log residuals at the fit."""

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """x [n, terms] -> [n]."""
        terms = [np.exp(a - alpha * np.log(x[:, i])) for i, (a, alpha) in enumerate(zip(self.log_scale, self.exponent))]
        return np.sum(terms, axis=0) + self.floor


@dataclass(frozen=True)
class Sigmoid:
    """y = height / (1 + exp(-slope (loss - middle))) + base; height <= 0: a score falls with its loss."""

    height: float
    slope: float
    middle: float
    base: float

    def __call__(self, loss: np.ndarray) -> np.ndarray:
        return self.height / (1 + np.exp(-np.clip(self.slope * (loss - self.middle), -500, 500))) + self.base


def fit_power_law(x: np.ndarray, y: np.ndarray, *, with_floor: bool = True) -> PowerLaw:
    """The power law nearest to positive y [n] at positive x [n, terms]; all parameters of it at least 0 but log scales.

    Of several starts the best end counts. Raises ValueError with fewer points than parameters.
    """
    terms = x.shape[1]
    if len(y) < 2 * terms + with_floor:
        raise ValueError(f"{len(y)} points for {2 * terms + with_floor} parameters")
    if terms == 1 and not with_floor:
        return _line_of_logarithms(np.log(x[:, 0]), np.log(y))
    middle = np.exp(np.log(x).mean(axis=0))  # in units of the middle, scales and exponents hardly depend on each other
    log_x, log_y = np.log(x / middle), np.log(y)

    def objective(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        scales, exponents, floor = parameters[:terms], parameters[terms : 2 * terms], parameters[2 * terms]
        parts = np.exp(np.clip(scales - exponents * log_x, -300.0, 300.0))  # [n, terms]; a line search looks far away
        value = parts.sum(axis=1) + floor
        residual = np.log(value) - log_y
        slope = np.clip(residual, -DELTA, DELTA) / value
        gradient = [*(slope @ parts), *(slope @ (-log_x * parts)), slope.sum() if with_floor else 0.0]
        return SCALE * float(_huber(residual).mean()), SCALE * np.asarray(gradient) / len(y)

    bounds = [(None, None)] * terms + [(0.0, 5.0)] * terms + [(0.0, float(y.min()) if with_floor else 0.0)]
    shares, slopes = np.log(y.mean()) + np.log([0.02, 0.1, 0.3, 0.9]), (0.05, 0.15, 0.3, 0.6)
    floors = (0.0, 0.3, 0.6, 0.9) if with_floor else (0.0,)
    grid = [
        np.array([a] * terms + [b] * terms + [c * y.min()]) for a, b, c in itertools.product(shares, slopes, floors)
    ]
    to_end = functools.partial(
        optimize.minimize, objective, jac=True, method="L-BFGS-B", bounds=bounds,
        options={"maxiter": 1000, "ftol": 1e-12},
    )  # fmt: skip
    starts = sorted(grid, key=lambda start: objective(start)[0])[:STARTS]
    best = min(map(to_end, starts), key=lambda end: end.fun)
    scales, exponents = best.x[:terms], best.x[terms : 2 * terms]
    in_units = scales + exponents * np.log(middle)
    return PowerLaw(tuple(in_units.tolist()), tuple(exponents.tolist()), float(best.x[2 * terms]), best.fun / SCALE)


def _line_of_logarithms(log_x: np.ndarray, log_y: np.ndarray) -> PowerLaw:
    """One term without a floor: Huber's regression, a convex problem, by reweighted least squares (Huber 1981, 7.8)."""
    slope, weights = 0.0, np.ones(len(log_x))
    for _ in range(IRLS_STEPS):
        centre_x, centre_y = np.average(log_x, weights=weights), np.average(log_y, weights=weights)
        spread = (weights * (log_x - centre_x) ** 2).sum()
        before, slope = slope, min(0.0, (weights * (log_x - centre_x) * (log_y - centre_y)).sum() / (spread or 1.0))
        residual = centre_y + slope * (log_x - centre_x) - log_y
        weights = np.minimum(1.0, DELTA / np.maximum(np.abs(residual), 1e-12))
        if abs(slope - before) <= 1e-12 * abs(slope):
            break
    return PowerLaw((centre_y - slope * centre_x,), (-slope,), 0.0, float(_huber(residual).mean()))


def _huber(residual: np.ndarray) -> np.ndarray:
    return np.where(np.abs(residual) <= DELTA, 0.5 * residual**2, DELTA * (np.abs(residual) - 0.5 * DELTA))


def fit_sigmoid(loss: np.ndarray, score: np.ndarray) -> Sigmoid:
    """The sigmoid nearest to score [n] at loss [n] by least squares; a perfect score at loss 0 is one more point.

    Raises ValueError where none can be fitted.
    """
    x, y = np.append(loss, 0.0), np.append(score, max(score.max(), 1.0))
    found = []
    for middle, slope in itertools.product((np.median(loss), loss.min()), (1.0, 3.0, 10.0)):
        start = [score.min() - 1.0, slope, middle, 1.0]
        try:
            of, _ = optimize.curve_fit(
                lambda x, *of: Sigmoid(*of)(x),
                x,
                y,
                start,
                bounds=([-1.0, 0.0, -np.inf, 0.0], [0.0, np.inf, np.inf, 1.0]),
                maxfev=20_000,
            )
        except RuntimeError:
            continue
        found.append(Sigmoid(*(float(value) for value in of)))
    if not found:
        raise ValueError("no sigmoid fits the scores")
    return min(found, key=lambda sigmoid: float(((sigmoid(x) - y) ** 2).mean()))


@dataclass(frozen=True)
class Run:
    """One training run and one task of it."""

    size: str
    """Runs of one size are held out together."""
    parameters: float
    flops_per_token: float
    tokens: np.ndarray
    """[checkpoints], ascending."""
    loss: np.ndarray
    score: np.ndarray
    averaged: int = 5
    """Last checkpoints whose mean is the run's end."""

    @property
    def end(self) -> tuple[float, float, float, float, float]:
        """(parameters, tokens, flops, loss, score) at its end."""
        last = slice(-self.averaged, None)
        tokens = float(self.tokens[-1])
        ends = float(self.loss[last].mean()), float(self.score[last].mean())
        return self.parameters, tokens, tokens * self.flops_per_token, *ends


def predict(form: str, runs: Sequence[Run], parameters: float, tokens: float, flops: float) -> float:
    """The score that `form` fitted on `runs` gives a run of that size. Raises ValueError where it cannot be fitted."""
    ends = np.array([run.end for run in runs])
    if form == "direct":
        law = fit_power_law(ends[:, 2:3], -np.log(ends[:, 4]), with_floor=False)
        return float(np.exp(-law(np.array([[flops]], float)))[0])
    columns, target = {"flops": ([2], [[flops]]), "size_tokens": ([0, 1], [[parameters, tokens]])}[form]
    law = fit_power_law(ends[:, columns], ends[:, 3])
    behind = [run.tokens > SKIPPED_SHARE * run.tokens[-1] for run in runs]
    loss = np.concatenate([run.loss[at] for run, at in zip(runs, behind)])
    score = np.concatenate([run.score[at] for run, at in zip(runs, behind)])
    return float(fit_sigmoid(loss, score)(law(np.array(target, float)))[0])


FORMS = ("flops", "size_tokens", "direct")
