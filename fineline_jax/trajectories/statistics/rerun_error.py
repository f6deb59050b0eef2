"""What two runs of one recipe differ by: the error of a difference of two runs that no number of tasks lessens.

Of differences averaged over tasks, d(t) at each shared checkpoint, by the first of these that there is:

- reruns: runs alike in all but the seed are in the table (columns `arm`, `seed`): twice the variance of their means.
- checkpoints: s² (1 / n + LASTING²). s: scatter of d from checkpoint to checkpoint in the window or its NEIGHBOURS
  nearest, whatever smooth trend d has (Gasser, Sroka, Jennen-Steinmetz 1986); n: checkpoints averaged.
- tasks: the error over tasks once more, of fewer than FEWEST checkpoints.

The scatter does not see what differs between two seeds from checkpoint to checkpoint alike; LASTING stands for it. It
and the last rule are calibrated on the five reruns of OLMo's ladder, 190M to 3B (docs/analyze.md).
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd

from fineline_jax.trajectories.curves.smooth import FEWEST, pseudo_residuals

NEIGHBOURS = 10
LASTING = 0.75
"""The lasting difference of two seeds over s: with it the accuracies of the ladder's reruns differ over all checkpoints
by the error that is said, in mean squares; other metrics by less."""
CALIBRATED = 5
"""Degrees of freedom of LASTING: reruns."""
RERUNS, CHECKPOINTS, TASKS = "reruns", "checkpoints", "tasks"
WINDOWS = {
    "first": (slice(None, 3), slice(None, NEIGHBOURS)),
    "all": (slice(None), slice(None)),
    "last": (slice(-5, None), slice(-NEIGHBOURS, None)),
}
"""Name -> (checkpoints averaged, as published work averages them; those whose scatter counts)."""


class RunError(NamedTuple):
    """The part of a difference's error that comes from the runs."""

    source: str
    """RERUNS, CHECKPOINTS or TASKS."""
    parts: tuple[tuple[float, float], ...]
    """(variance, degrees of freedom)"""


def run_error(differences: pd.DataFrame, window: str) -> RunError:
    """Of the mean over tasks in a window, by the scatter of checkpoints, else by tasks. NaN where there is neither.

    differences: tokens x tasks, ascending, NaN where a task was not scored.
    """
    averaged, near = WINDOWS[window]
    whole = differences.dropna().iloc[near].mean(axis=1)
    rest = pseudo_residuals(whole.to_numpy(float), whole.index.to_numpy(float))
    if len(rest) + 2 >= FEWEST:
        square = float((rest**2).mean())
        # squares of neighbouring pseudo-residuals correlate by 4/9 and 1/36: half as many are independent
        apart = square / len(differences.iloc[averaged]), len(rest) / 2
        return RunError(CHECKPOINTS, (apart, (LASTING**2 * square, CALIBRATED)))
    return over_tasks_again(differences.iloc[averaged].mean(axis=0).to_numpy())


def over_tasks_again(of_tasks: np.ndarray) -> RunError:
    """As large as the error over tasks of one difference per task, [tasks]."""
    variance = float(of_tasks.var(ddof=1)) / len(of_tasks) if len(of_tasks) > 1 else math.nan
    return RunError(TASKS, ((variance, len(of_tasks) - 1.0),))


def between_reruns(curves: Mapping[str, pd.DataFrame], arms: Mapping[str, str]) -> dict[tuple[str, str], RunError]:
    """(metric, window) -> error of a difference of two runs, from runs of one arm. Empty without such runs.

    curves: series -> tokens x (metric, task); arms: series -> its arm.
    """
    members: dict[str, list[pd.DataFrame]] = {}
    for series, arm in arms.items():
        members.setdefault(arm, []).append(curves[series])
    squares: dict[tuple[str, str], np.ndarray] = {}
    for runs in (runs for runs in members.values() if len(runs) > 1):
        for metric in set.intersection(*(set(run.columns.get_level_values(0)) for run in runs)):
            shared = pd.concat([run[metric] for run in runs], axis=1, join="inner", keys=range(len(runs)))
            shared = shared.dropna(axis=1, how="all").dropna()
            for window, (averaged, _) in WINDOWS.items() if len(shared) else ():
                means = shared.iloc[averaged].mean().groupby(level=0).mean()
                part = np.array([float(((means - means.mean()) ** 2).sum()), len(means) - 1.0])
                squares[metric, window] = squares.get((metric, window), 0) + part
    return {key: RunError(RERUNS, ((2 * square / freedom, freedom),)) for key, (square, freedom) in squares.items()}
