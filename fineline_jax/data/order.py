"""Which window stands where: a pure function of (seed, position), without reading anything.

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


class Place(NamedTuple):
    part: int
    """Which of the parts (sources, or chunks)."""
    record: int
    """Position of the window in that part."""


class Order(Protocol):
    @property
    def steps(self) -> int:
        """Whole batches before a window comes a second time."""
        ...

    def places(self, step: int, rows: range) -> list[Place]:
        """Where the given rows of that step's batch are stored."""
        ...


@dataclasses.dataclass(frozen=True)
class Mixed:
    """The parts interleaved by weight; each shuffled anew every epoch, or, without a seed, in stored order.

    Batches run on over the end of an epoch, and each part counts its own epochs. Shares are those of the
    weights to within 1 % (grain rounds them to whole hundredths of the smallest).
    """

    lengths: tuple[int, ...]
    weights: tuple[float, ...]
    sequences: int
    seed: int | None

    @property
    def steps(self) -> int:
        epoch = _interleaved([grain.MapDataset.range(length) for length in self.lengths], self.weights)
        return len(epoch) // self.sequences

    def places(self, step: int, rows: range) -> list[Place]:
        stream = self._stream
        return [stream[step * self.sequences + row] for row in rows]

    @functools.cached_property
    def _stream(self) -> Any:
        def located(part: int, length: int) -> Any:
            stored = grain.MapDataset.range(length).repeat()
            indices = stored if self.seed is None else shuffled(length, self.seed, part)
            return indices.map(lambda record: Place(part, record))

        return _interleaved([located(part, length) for part, length in enumerate(self.lengths)], self.weights)


@dataclasses.dataclass(frozen=True)
class Chunks:
    """The parts one after another, each in a permutation of its own, its last incomplete batch dropped.

    Amber: 1,706,976 windows // 2,240 = 762 batches per chunk. After the last part the first follows with a new
    permutation.
    """

    lengths: tuple[int, ...]
    sequences: int
    seed: int

    @property
    def steps(self) -> int:
        return self._ends()[-1]

    def places(self, step: int, rows: range) -> list[Place]:
        ends = self._ends()
        epoch, step_in_epoch = divmod(step, ends[-1])
        part = bisect.bisect_right(ends, step_in_epoch)
        first_step = ends[part - 1] if part else 0
        # One permutation per (chunk, epoch); the positions of an epoch follow those of the one before.
        start = epoch * self.lengths[part] + (step_in_epoch - first_step) * self.sequences
        permutation = shuffled(self.lengths[part], self.seed, part)
        return [Place(part, permutation[start + row]) for row in rows]

    def _ends(self) -> list[int]:
        return list(itertools.accumulate(length // self.sequences for length in self.lengths))


def shuffled(length: int, seed: int, part: int) -> Any:
    """The indices below `length`, a permutation per epoch, each a pure function of (seed, part, epoch).

    Shuffled twice. One grain shuffle has four rounds (`index_shuffle(..., rounds=4)`), too few: over 1.7
    million indices the correlation of neighbours is 6 times that of uniform draws, over 600 million 14 times.
    Two in a row with unrelated seeds cannot be told from uniform draws (tests/test_data_order.py). The seeds
    are hashed because grain seeds epoch e with seed + e: epoch 1 of seed 0 would be epoch 0 of seed 1.
    """
    first, second = np.random.SeedSequence([seed, part]).generate_state(2)
    return grain.MapDataset.range(length).shuffle(seed=int(first)).shuffle(seed=int(second)).repeat()


def _interleaved(parts: Sequence[Any], weights: Sequence[float]) -> Any:
    return parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, weights)
