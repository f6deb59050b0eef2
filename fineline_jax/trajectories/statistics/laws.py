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
from dataclasses import astuple, dataclass, replace

import numpy as np
from scipy import optimize

DELTA = 1e-3
SCALE = 1e4
"""Of the objective: L-BFGS-B stops on its size, so one of the order of 1 makes its tolerances mean something."""
STARTS = 4
"""Points of a grid, those with the smallest loss, from which a fit begins."""
IRLS_STEPS = 500
REFIT_STEPS = 50
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


def fit_power_law(x: np.ndarray, y: np.ndarray, start: PowerLaw | None = None) -> PowerLaw:
    """The power law nearest to positive y [n] at positive x [n, terms]; all parameters of it at least 0 but log scales.

    Of several starts the best end counts, or only `start`, a fit of like data. Raises ValueError with fewer points
    than parameters.
    """
    terms = x.shape[1]
    if len(y) < 2 * terms + 1:
        raise ValueError(f"{len(y)} points for {2 * terms + 1} parameters")
    middle = np.exp(np.log(x).mean(axis=0))  # in units of the middle, scales and exponents hardly depend on each other
    log_x, log_y = np.log(x / middle), np.log(y)

    def objective(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        scales, exponents, floor = parameters[:terms], parameters[terms : 2 * terms], parameters[2 * terms]
        parts = np.exp(np.clip(scales - exponents * log_x, -300.0, 300.0))  # [n, terms]; a line search looks far away
        value = parts.sum(axis=1) + floor
        residual = np.log(value) - log_y
        slope = np.clip(residual, -DELTA, DELTA) / value
        gradient = [*(slope @ parts), *(slope @ (-log_x * parts)), slope.sum()]
        return SCALE * float(_huber(residual).mean()), SCALE * np.asarray(gradient) / len(y)

    bounds = [(None, None)] * terms + [(0.0, 5.0)] * terms + [(0.0, float(y.min()))]
    if start is None:
        shares, slopes = np.log(y.mean()) + np.log([0.02, 0.1, 0.3, 0.9]), (0.05, 0.15, 0.3, 0.6)
        near = itertools.product(shares, slopes, (0.0, 0.3, 0.6, 0.9))
        grid = [np.array([a] * terms + [b] * terms + [c * y.min()]) for a, b, c in near]
        starts = sorted(grid, key=lambda at: objective(at)[0])[:STARTS]
    else:
        exponent = np.array(start.exponent)
        starts = [np.array([*(np.array(start.log_scale) - exponent * np.log(middle)), *exponent, start.floor])]
    to_end = functools.partial(
        optimize.minimize, objective, jac=True, method="L-BFGS-B", bounds=bounds,
        options={"maxiter": 1000, "ftol": 1e-12},
    )  # fmt: skip
    best = min(map(to_end, starts), key=lambda end: end.fun)
    scales, exponents = best.x[:terms], best.x[terms : 2 * terms]
    in_units = scales + exponents * np.log(middle)
    return PowerLaw(tuple(in_units.tolist()), tuple(exponents.tolist()), float(best.x[2 * terms]), best.fun / SCALE)


def fit_line_of_logarithms(x: np.ndarray, y: np.ndarray) -> PowerLaw:
    """The power law without a floor nearest to positive y [n] at positive x [n]."""
    offset, slope, loss = (float(of[0]) for of in lines_of_logarithms(np.log(x), np.log(y)[None]))
    return PowerLaw((offset,), (-slope,), 0.0, loss)


def lines_of_logarithms(log_x: np.ndarray, log_y: np.ndarray, steps: int = IRLS_STEPS) -> np.ndarray:
    """[3, draws]: offsets, slopes (at most 0) and losses of lines through log_y [draws, n] at log_x [n].

    Huber's regression, a convex problem, by reweighted least squares (Huber 1981, 7.8).
    """
    slope, weights = np.zeros(len(log_y)), np.ones(log_y.shape)
    for _ in range(steps):
        share = weights / weights.sum(axis=1, keepdims=True)
        centre_x, centre_y = share @ log_x, (share * log_y).sum(axis=1)
        moved = log_x - centre_x[:, None]
        spread = (share * moved**2).sum(axis=1)
        before, slope = slope, (share * moved * (log_y - centre_y[:, None])).sum(axis=1)
        slope = np.minimum(0.0, slope / np.where(spread > 0, spread, 1.0))
        residual = centre_y[:, None] + slope[:, None] * moved - log_y
        weights = np.minimum(1.0, DELTA / np.maximum(np.abs(residual), 1e-12))
        if (np.abs(slope - before) <= 1e-12 * np.abs(slope)).all():
            break
    return np.array([centre_y - slope * centre_x, slope, _huber(residual).mean(axis=1)])


def _huber(residual: np.ndarray) -> np.ndarray:
    return np.where(np.abs(residual) <= DELTA, 0.5 * residual**2, DELTA * (np.abs(residual) - 0.5 * DELTA))


def fit_sigmoid(loss: np.ndarray, score: np.ndarray, begin: Sigmoid | None = None) -> Sigmoid:
    """The sigmoid nearest to score [n] at loss [n] by least squares; a perfect score at loss 0 is one more point.

    begin: a fit of like data, from which alone it is sought. Raises ValueError where none can be fitted.
    """
    x, y = np.append(loss, 0.0), np.append(score, max(score.max(), 1.0))
    found, near = [], itertools.product((np.median(loss), loss.min()), (1.0, 3.0, 10.0))
    starts = [[score.min() - 1.0, slope, middle, 1.0] for middle, slope in near]
    for start in starts if begin is None else [astuple(begin)]:
        try:
            of, _ = optimize.curve_fit(
                lambda x, *of: Sigmoid(*of)(x),
                x,
                y,
                start,
                bounds=([-1.0, 0.0, -np.inf, 0.0], [0.0, np.inf, np.inf, 1.0]),
                maxfev=20_000 if begin is None else 500,
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


@dataclass(frozen=True)
class Law:
    """One of FORMS, fitted."""

    form: str
    first: PowerLaw
    """Of the loss; of the direct form, of -log score."""
    second: Sigmoid | None
    """Score of a loss; None of the direct form."""

    def __call__(self, ends: np.ndarray, first_error: float = 0.0, second_error: float = 0.0) -> np.ndarray:
        """Scores [n] of runs with ends [n, 3 or more], columns as of `Run.end`; errors: of log first, of the score."""
        first = self.first(ends[:, COLUMNS[self.form]]) * np.exp(first_error)
        return np.exp(-first) if self.second is None else self.second(first) + second_error


def fit(form: str, runs: Sequence[Run], start: Law | None = None) -> Law:
    """The law of that form nearest to `runs`; start: that of like runs. Raises ValueError where it cannot be fitted."""
    ends = np.array([run.end for run in runs])
    if form == "direct":
        return Law(form, fit_line_of_logarithms(ends[:, 2], -np.log(ends[:, 4])), None)
    first = fit_power_law(ends[:, COLUMNS[form]], ends[:, 3], start and start.first)
    behind = [run.tokens > SKIPPED_SHARE * run.tokens[-1] for run in runs]
    loss = np.concatenate([run.loss[at] for run, at in zip(runs, behind)])
    score = np.concatenate([run.score[at] for run, at in zip(runs, behind)])
    return Law(form, first, fit_sigmoid(loss, score, start and start.second))


def resampled(law: Law, runs: Sequence[Run], held: Sequence[Run], draws: int, rng: np.random.Generator) -> np.ndarray:
    """[draws] mean scores of `held`, runs of another size: a parametric bootstrap of `law`, fitted on `runs`.

    Runs of one size miss a law together, so that each size, and the one asked for, gets an error of its own. Its
    variance is that of the sizes' mean residuals, with two degrees of freedom less than sizes, for the level and the
    slope over them (at least 1), divided by chi-square in each draw: where the law is a line this is Student's interval
    of a prediction. Then the law is fitted again, from where it was.
    """
    ends, asked = np.array([run.end for run in runs]), np.array([run.end for run in held])
    of_run = np.unique(ends[:, 0], return_inverse=True)[1]
    count = int(of_run.max()) + 1
    first = np.log((-np.log(ends[:, 4]) if law.second is None else ends[:, 3]) / law.first(ends[:, COLUMNS[law.form]]))
    moves, errors = [], []  # of log first and, in two steps, of the score: of each run [draws, runs] and of `held`
    for residual in (first,) if law.second is None else (first, ends[:, 4] - law.second(ends[:, 3])):
        of_size = np.bincount(of_run, residual) / np.bincount(of_run)
        scale = np.sqrt((of_size**2).sum() / rng.chisquare(max(1, count - 2), draws))
        drawn = scale[:, None] * rng.standard_normal((draws, count + 1))
        moves.append((drawn[:, :-1] - of_size)[:, of_run])
        errors.append(drawn[:, -1])
    if law.second is None:
        offset, slope, _ = lines_of_logarithms(np.log(ends[:, 2]), np.log(-np.log(ends[:, 4])) + moves[0], REFIT_STEPS)
        there = (offset + errors[0])[:, None] + slope[:, None] * np.log(asked[:, 2])
        return np.exp(-np.exp(np.minimum(there, 300.0))).mean(axis=1)
    found = []
    for by, up, *error in zip(*moves, *errors):
        losses = [run.loss * np.exp(one) for run, one in zip(runs, by)]
        scores = [run.score + one + law.second(loss) - law.second(run.loss) for run, one, loss in zip(runs, up, losses)]
        moved = [replace(run, loss=loss, score=score) for run, loss, score in zip(runs, losses, scores)]
        try:
            found.append(float(fit(law.form, moved, law)(asked, *error).mean()))
        except ValueError:  # no sigmoid fits this draw, which thus says nothing: ends of the range in turn
            found.append(len(found) % 2)
    return np.array(found)


PARAMETERS = {"flops": 3, "size_tokens": 5, "direct": 2}
"""Of the law of each form; one with more of them than sizes to fit is not tried."""
COLUMNS = {"flops": [2], "size_tokens": [0, 1], "direct": [2]}
"""Of `Run.end`: what the law of each form is of."""
FORMS = tuple(PARAMETERS)
