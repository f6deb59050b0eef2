"""Which window is read when: a pure function of (seed, position), without reading anything.

The permutations are grain's (`MapDataset.shuffle`: a keyed bijection on the indices, evaluated where it is
needed), so the order of 600 million windows takes no memory and step 274,319 is as near as step 0.
"""

import bisect
import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import grain
import numpy as np


class Position(NamedTuple):
    split: int
    """Number of the split: one per source, or per chunk."""
    record: int
    """Number of the window in that split."""


class Order(Protocol):
    @property
    def steps(self) -> int:
        """Whole batches before a window comes a second time."""
        ...

    def positions(self, step: int, rows: range) -> list[Position]:
        """Where the given rows of that step's batch are stored."""
        ...


@dataclasses.dataclass(frozen=True)
class Mixed:
    """The splits interleaved by weight, each shuffled anew every epoch.

    Batches run on over the end of an epoch, and each split counts its own epochs. Shares are those of the
    weights to within 1 % (grain rounds them to whole hundredths of the smallest).
    """

    lengths: tuple[int, ...]
    weights: tuple[float, ...]
    sequences: int
    seed: int

    @property
    def steps(self) -> int:
        epoch = _interleaved([grain.MapDataset.range(length) for length in self.lengths], self.weights)
        return len(epoch) // self.sequences

    def positions(self, step: int, rows: range) -> list[Position]:
        stream = self._stream
        return [stream[step * self.sequences + row] for row in rows]

    @functools.cached_property
    def _stream(self) -> Any:
        def located(split: int, length: int) -> Any:
            return shuffled(length, self.seed, split).map(lambda record: Position(split, record))

        return _interleaved([located(split, length) for split, length in enumerate(self.lengths)], self.weights)


@dataclasses.dataclass(frozen=True)
class Chunks:
    """The splits one after another, each in a permutation of its own, its last incomplete batch dropped.

    Amber: 1,706,976 windows // 2,240 = 762 batches per chunk. After the last split the first follows with a new
    permutation.
    """

    lengths: tuple[int, ...]
    sequences: int
    seed: int

    @property
    def steps(self) -> int:
        return self._ends()[-1]

    def positions(self, step: int, rows: range) -> list[Position]:
        ends = self._ends()
        epoch, step_in_epoch = divmod(step, ends[-1])
        split = bisect.bisect_right(ends, step_in_epoch)
        first_step = ends[split - 1] if split else 0
        # One permutation per (chunk, epoch); the positions of an epoch follow those of the one before.
        start = epoch * self.lengths[split] + (step_in_epoch - first_step) * self.sequences
        permutation = shuffled(self.lengths[split], self.seed, split)
        return [Position(split, permutation[start + row]) for row in rows]

    def _ends(self) -> list[int]:
        return list(itertools.accumulate(length // self.sequences for length in self.lengths))


def in_stored_order(lengths: Sequence[int], weights: Sequence[float], count: int) -> list[Position]:
    """The first `count` windows of the splits interleaved by weight, each in stored order; fewer, where one would come
    a second time."""

    def located(split: int, length: int) -> Any:
        return grain.MapDataset.range(length).map(lambda record: Position(split, record))

    stored = _interleaved([located(split, length) for split, length in enumerate(lengths)], weights)
    return [stored[index] for index in range(min(count, len(stored)))]


def shuffled(length: int, seed: int, split: int) -> Any:
    """The indices below `length`, a permutation per epoch, each a pure function of (seed, split, epoch).

    Shuffled twice. One grain shuffle has four rounds (`index_shuffle(..., rounds=4)`), too few: over 1.7
    million indices the correlation of neighbours is 6 times that of uniform draws, over 600 million 14 times.
    Two in a row with unrelated seeds cannot be distinguished from uniform draws (tests/data/test_order.py). The seeds
    are hashed because grain seeds epoch e with seed + e: epoch 1 of seed 0 would be epoch 0 of seed 1.
    """
    first, second = np.random.SeedSequence([seed, split]).generate_state(2)
    return grain.MapDataset.range(length).shuffle(seed=int(first)).shuffle(seed=int(second)).repeat()


def _interleaved(splits: Sequence[Any], weights: Sequence[float]) -> Any:
    return splits[0] if len(splits) == 1 else grain.MapDataset.mix(splits, weights)
