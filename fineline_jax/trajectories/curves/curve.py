"""Does one curve rise above guessing, from when on, and does it fall again: tests with their p-values.

Everything is turned so that higher is better.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import special

from fineline_jax.trajectories.curves.smooth import checkpoint_noise, end_level, mean_of_three, median_of_three

Z = 2.326
"""One-sided 1 %: what each checkpoint after an onset must exceed."""
FEW_DOCUMENTS = 50
UNTRAINED, FIRST, CHANCE = "untrained checkpoint", "first checkpoint", "chance level"


@dataclass(frozen=True)
class Curve:
    """One task, metric and series over C checkpoints, higher is better."""

    tokens: np.ndarray
    """[C], non-decreasing."""
    values: np.ndarray
    stderr: np.ndarray
    """[C], NaN where not known."""
    chance: float
    """What guessing gives; NaN where it has no meaning or is not known."""
    chance_from: str
    n: float
    """Documents."""
    deviations: np.ndarray | None = None
    """[draws, C]: values of the bootstrap over documents minus `values`; None where documents are not at hand."""

    @property
    def untrained(self) -> bool:
        return bool(self.tokens[0] == 0) and len(self.tokens) > 1

    @property
    def baseline(self) -> tuple[float, str]:
        """What a gain counts from, and where it is from."""
        if self.untrained or np.isnan(self.chance):
            return float(self.values[0]), UNTRAINED if self.untrained else FIRST
        return self.chance, self.chance_from


def stuck(values: np.ndarray, n: float) -> bool:
    """Whether most of at least five checkpoints have the value of a constant answer: one and the same, neither 0 nor 1,
    or one minus it (of two choices the other one). Not of so few documents n that equal values are no surprise."""
    if len(values) < 5 or n < FEW_DOCUMENTS:
        return False
    found, counts = np.unique(np.round(values, 9), return_counts=True)
    at = np.minimum(np.searchsorted(found, 1 - found - 1e-9), len(found) - 1)
    other = (np.abs(found[at] + found - 1) < 1e-8) & (at != np.arange(len(found)))
    most = np.where((found != 0) & (found != 1), counts + other * counts[at], 0).max()
    return 2 * int(most) > len(values)


class Findings(NamedTuple):
    """What the tests of a curve say."""

    noise: float
    level: float
    onset: int | None
    """First checkpoint from which all are above guessing and above the baseline; None: there is none."""
    below: bool
    """Whether it ends significantly below guessing."""
    rise_p: float
    """One-sided, of level - baseline; NaN where nothing can be tested."""
    peak: int
    """Checkpoint in the middle of the best three."""
    fall: float
    """The mean of the best three checkpoints minus that of the last three; NaN with fewer than five checkpoints."""
    fall_stderr: float
    fall_p: float
    """One-sided, times the number of checkpoints (Bonferroni), as the best of all was chosen."""


def examine(curve: Curve) -> Findings:
    """The tests of one curve."""
    noise = checkpoint_noise(curve.values, curve.tokens)
    level = float(end_level(curve.values, curve.tokens))
    known = np.isfinite(curve.stderr)
    stderr = np.where(known, curve.stderr, curve.stderr[known].max() if known.any() else np.nan)
    onset, below, rise_p = None, False, float("nan")
    if known.any() and (curve.untrained or np.isfinite(curve.chance)):
        smooth = median_of_three(curve.values)
        margins = _margins(curve, smooth, stderr)
        onset = _lasting(margins > 0)
        if np.isfinite(curve.chance):
            error = np.fmax(stderr, guessing_error(curve.chance, curve.n))
            below = _lasting(curve.chance - smooth > Z * error) is not None
        rise_p = _rise_p(curve, level, stderr)
    return Findings(noise, level, onset, below, rise_p, *_fall(curve, stderr, noise))


def guessing_error(chance: float, n: float) -> float:
    """Standard error of guessing, sqrt(chance (1 - chance) / n), 0 where n is not known: a model that always picks the
    same choice has a misleadingly small measured one."""
    return float(np.sqrt(chance * (1 - chance) / n)) if n > 0 and 0 <= chance <= 1 else 0.0


def _margins(curve: Curve, smooth: np.ndarray, stderr: np.ndarray) -> np.ndarray:
    """[C]: by how much each value exceeds what is not told from guessing or from the baseline."""
    margins = np.full(len(smooth), np.inf)
    if np.isfinite(curve.chance):
        margins = smooth - curve.chance - Z * np.fmax(stderr, guessing_error(curve.chance, curve.n))
    if curve.untrained:
        margins = np.minimum(margins, smooth - curve.values[0] - Z * _error_since(curve, stderr))
    return margins


def _error_since(curve: Curve, stderr: np.ndarray) -> np.ndarray:
    """[C]: standard error of each value minus the first."""
    if curve.deviations is not None:
        return (curve.deviations - curve.deviations[:, :1]).std(axis=0)
    return np.hypot(stderr, stderr[0])


def _lasting(above: np.ndarray) -> int | None:
    """First index from which all are true."""
    if not above[-1]:
        return None
    return int(np.flatnonzero(~above)[-1] + 1) if not above.all() else 0


def _rise_p(curve: Curve, level: float, stderr: np.ndarray) -> float:
    """Of the level against the baseline and against guessing, whichever is nearer. Checkpoints share their questions,
    so a mean over some of them has no smaller error than one."""
    scores = []
    if np.isfinite(curve.chance):
        error = max(float(end_level(stderr, curve.tokens)), guessing_error(curve.chance, curve.n))
        scores.append(_z(level - curve.chance, error))
    if curve.untrained:
        error = float(end_level(_error_since(curve, stderr), curve.tokens))
        scores.append(_z(level - curve.values[0], error))
    return float(special.ndtr(-min(scores)))


def _fall(curve: Curve, stderr: np.ndarray, noise: float) -> tuple[int, float, float, float]:
    """Its error is that of the questions or, where larger, that of checkpoints: noise x sqrt(2 / 3)."""
    nothing = float("nan")
    if len(curve.values) < 5:
        return int(curve.values.argmax()), nothing, nothing, nothing
    means = mean_of_three(curve.values)
    best = int(means.argmax())
    fall = float(means[best] - means[-1])
    if curve.deviations is not None:
        of_three = mean_of_three(curve.deviations)
        asked = float((of_three[:, best] - of_three[:, -1]).std())
    else:
        of_three = mean_of_three(stderr)
        asked = float(np.hypot(of_three[best], of_three[-1]))
    error = float(np.fmax(asked, noise * np.sqrt(2 / 3)))
    if np.isnan(error):
        return best + 1, fall, nothing, nothing
    p = min(1.0, len(curve.values) * float(special.ndtr(-_z(fall, error))))
    if np.isfinite(curve.chance) and np.isfinite(stderr).any():
        at_peak = float(mean_of_three(np.fmax(stderr, guessing_error(curve.chance, curve.n)))[best])
        p = 1.0 if means[best] - curve.chance <= Z * at_peak else p  # there was nothing to lose
    return best + 1, fall, error, p


def _z(difference: float, error: float) -> float:
    return difference / error if error > 0 else np.inf if difference > 0 else 0.0 if difference == 0 else -np.inf
