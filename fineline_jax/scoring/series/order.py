"""Which checkpoint of a series is scored next: the whole curve coarsely first, then finer, or only where it changes.

No JAX here.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from fineline_jax.checkpoints.series import Checkpoint
from fineline_jax.scoring import estimates
from fineline_jax.scoring.estimates import Value

START = 5
"""Checkpoints that are scored before any gap is judged."""
SHARE_OF_AXIS = 1 / 64
"""The axis is log(tokens + this share of the last tokens): logarithmic, and linear where training begins."""
MEAN_SQUARED_CHANGE = 2.0
"""A gap is divided as long as the tasks' differences between its ends, each divided by its standard error, have at
least this mean square; 1 is what errors alone give. Chosen on OLMo-2 7B and Pythia: benchmarks/coarse_to_fine.py."""

TaskValues = Mapping[str, Value]
"""Task -> the metric that it reports first, of one checkpoint."""


def axis(checkpoints: Sequence[Checkpoint]) -> np.ndarray:
    """float64 [checkpoints]: where each lies on the axis of the curve, by tokens; else by steps; else by position."""
    for values in ([one.tokens for one in checkpoints], [one.step for one in checkpoints]):
        known = [value for value in values if value is not None]
        if known and len(known) == len(values) and max(known) > 0:
            return np.log(np.array(known, float) + max(known) * SHARE_OF_AXIS)
    return np.arange(len(checkpoints), dtype=float)


def coarse_to_fine(positions: np.ndarray, done: Sequence[int] = ()) -> list[int]:
    """All indices but `done`: first, last, then again and again the one nearest to the middle of the widest gap.

    positions: ascending, float64 [n]. Every beginning of the list covers the axis about evenly.
    """
    have = sorted(done)
    order = []
    while len(have) < len(positions):
        order.append(_next(positions, have))
        have = sorted([*have, order[-1]])
    return order


def _next(positions: np.ndarray, have: Sequence[int]) -> int:
    """The end that is missing, or the middle of the widest gap with something in it, of equal ones the first."""
    for end in (0, len(positions) - 1):
        if end not in have:
            return end
    gaps = [(a, b) for a, b in itertools.pairwise(have) if b - a > 1]
    a, b = max(gaps, key=lambda gap: positions[gap[1]] - positions[gap[0]])
    return _middle(positions, a, b, range(a + 1, b))


def _middle(positions: np.ndarray, a: int, b: int, among: Sequence[int]) -> int:
    """Of the indices `among`, the one nearest to the middle between a and b."""
    middle = (positions[a] + positions[b]) / 2
    return min(among, key=lambda index: abs(positions[index] - middle))


def change(before: TaskValues, after: TaskValues) -> float:
    """Mean over tasks of (difference / its standard error)^2; infinite where no task has a standard error.

    The errors are those of the documents' differences where they are known (`estimates.change`).
    """
    squares = []
    for task in before.keys() & after.keys():
        changed = estimates.change(before[task], after[task])
        if math.isfinite(changed.value) and changed.stderr > 0:
            squares.append((changed.value / changed.stderr) ** 2)
        elif changed.value == 0 and after[task].deviations is not None:  # every document answered alike
            squares.append(0.0)
    return math.fsum(squares) / len(squares) if squares else math.inf


@dataclasses.dataclass
class Refinement:
    """Chooses the next checkpoint where the curve changes most, until it changes nowhere by more than errors allow.

    values: of the checkpoints that are scored, by index; `add` puts those that come later.
    """

    positions: np.ndarray
    values: dict[int, TaskValues] = dataclasses.field(default_factory=dict)
    asked: set[int] = dataclasses.field(default_factory=set)
    """Chosen, and not added yet."""
    left_out: set[int] = dataclasses.field(default_factory=set)
    """Those that could not be scored."""

    def next(self) -> int | None:
        """The next one; None: none now, and none at all if nothing that was asked for is still to be added."""
        have = sorted(self.values.keys() | self.asked | self.left_out)
        if len(have) == len(self.positions):
            return None
        chosen = _next(self.positions, have) if len(have) < START else self._where_it_changes()
        if chosen is not None:
            self.asked.add(chosen)
        return chosen

    def _where_it_changes(self) -> int | None:
        scored = sorted(self.values)
        best: tuple[float, int] | None = None
        for a, b in itertools.pairwise(scored):
            free = [i for i in range(a + 1, b) if i not in self.left_out]
            if free and not self.asked & set(free):
                changed = change(self.values[a], self.values[b])
                if changed >= MEAN_SQUARED_CHANGE and (best is None or changed > best[0]):
                    best = changed, _middle(self.positions, a, b, free)
        return None if best is None else best[1]

    def add(self, index: int, values: TaskValues | None) -> None:
        """`index` has been scored; None: it could not be."""
        self.asked.discard(index)
        if values is None:
            self.left_out.add(index)
        else:
            self.values[index] = values


def largest_gap(count: int, have: Collection[int]) -> int:
    """Most checkpoints between two neighbours of `have`, or before the first or behind the last, of `count`."""
    return max(b - a - 1 for a, b in zip([-1, *sorted(have)], [*sorted(have), count], strict=True))


def replay(positions: np.ndarray, values: Callable[[int], TaskValues], choose: Refinement | None = None) -> list[int]:
    """The indices that a refinement scores of a series all of whose values are known, ascending."""
    choose = choose or Refinement(positions)
    while (index := choose.next()) is not None:
        choose.add(index, values(index))
    return sorted(choose.values)
