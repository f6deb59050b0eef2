"""Which window is read when: a pure function of (seeds, windows passed before, position), without reading anything.

The permutations are grain's (`MapDataset.shuffle`: a keyed bijection on the indices, evaluated where it is
needed), so the order of 600 million windows takes no memory and step 274,319 is as near as step 0.

A position counts the windows that a source has passed since the run began, over its epochs: epoch e of a source of n
windows is the positions from e n to (e + 1) n, a permutation of its records. What changes between two segments of a
run (batch size, weights, sources, seed) changes which positions a batch takes, never what was passed.
"""

import bisect
import dataclasses
import functools
import itertools
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple, Protocol

import grain
import numpy as np

Seeds = tuple[tuple[int, int], ...]
"""(position, seed): the seed from that position on; ascending, the first from 0."""


class Position(NamedTuple):
    split: int
    """Number of the split: one per source, or per chunk."""
    record: int
    """Number of the window in that split."""


class Order(Protocol):
    """The batches of a run that all have `sequences` windows, numbered from 0 where the order begins."""

    def positions(self, batch: int, sequences: int, rows: range) -> list[Position]:
        """Where the given rows of that batch are stored."""
        ...

    def passed(self, batches: int, sequences: int) -> tuple[int, ...]:
        """Windows that each source has passed after so many batches."""
        ...


@dataclasses.dataclass(frozen=True)
class Mixed:
    """The splits interleaved by weight, each shuffled anew every epoch.

    Batches run on over the end of an epoch, and each split counts its own epochs.
    """

    lengths: tuple[int, ...]
    weights: tuple[float, ...]
    keys: tuple[int, ...]
    """What tells the permutations of two splits apart, wherever they stand in the mixture."""
    seeds: tuple[Seeds, ...]
    start: tuple[int, ...]
    """Windows that each split has passed before."""

    def positions(self, batch: int, sequences: int, rows: range) -> list[Position]:
        found = []
        for row in rows:
            split, index = interleaved(self._shares, batch * sequences + row)
            place = self.start[split] + index
            found.append(Position(split, record(self.lengths[split], self.keys[split], self.seeds[split], place)))
        return found

    def passed(self, batches: int, sequences: int) -> tuple[int, ...]:
        counts = counts_of(self._shares, batches * sequences)
        return tuple(start + count for start, count in zip(self.start, counts, strict=True))

    @functools.cached_property
    def _shares(self) -> tuple[Fraction, ...]:
        return shares(self.weights)


@dataclasses.dataclass(frozen=True)
class Chunks:
    """The splits one after another, each in a permutation of its own, its last incomplete batch dropped.

    Amber: 1,706,976 windows // 2,240 = 762 batches per chunk. After the last split the first follows with a new
    permutation. The splits are one source: what is dropped is passed with the batch behind it, so that smaller batches
    from there on read it.
    """

    lengths: tuple[int, ...]
    key: int
    seeds: Seeds
    start: int

    def positions(self, batch: int, sequences: int, rows: range) -> list[Position]:
        epoch, split, offset = self._place(self._begin(batch, sequences))
        length, first = self.lengths[split], self._ends[split] - self.lengths[split]
        # One permutation per (chunk, epoch): the positions of an epoch follow those of the one before.
        seeds = tuple(
            (position // self._ends[-1] * length + min(max(position % self._ends[-1] - first, 0), length), seed)
            for position, seed in self.seeds
        )
        start = epoch * length + offset
        return [Position(split, record(length, self.key + split, seeds, start + row)) for row in rows]

    def passed(self, batches: int, sequences: int) -> tuple[int, ...]:
        return (self._begin(batches - 1, sequences) + sequences if batches else self.start,)

    def _begin(self, batch: int, sequences: int) -> int:
        """The position of the first window of a batch."""
        epoch, split, offset = self._place(self.start)
        whole = [length // sequences for length in self.lengths]
        left = (self.lengths[split] - offset) // sequences
        if batch < left:
            return self.start + batch * sequences
        ends = list(itertools.accumulate(whole))
        later, number = divmod(ends[split] + batch - left, ends[-1])
        split = bisect.bisect_right(ends, number)
        into = number - (ends[split] - whole[split])
        return (epoch + later) * self._ends[-1] + self._ends[split] - self.lengths[split] + into * sequences

    def _place(self, position: int) -> tuple[int, int, int]:
        """(epoch, split, window in the split)."""
        epoch, within = divmod(position, self._ends[-1])
        split = bisect.bisect_right(self._ends, within)
        return epoch, split, within - (self._ends[split] - self.lengths[split])

    @functools.cached_property
    def _ends(self) -> list[int]:
        return list(itertools.accumulate(self.lengths))


def in_stored_order(lengths: Sequence[int], weights: Sequence[float], count: int) -> list[Position]:
    """The first `count` windows of the splits interleaved by weight, each in stored order; fewer, where one would come
    a second time."""
    mixture = shares(weights)
    places = (Position(*interleaved(mixture, number)) for number in range(count))
    return list(itertools.takewhile(lambda place: place.record < lengths[place.split], places))


def shares(weights: Sequence[float]) -> tuple[Fraction, ...]:
    """The share of each split among itself and those behind it, exactly."""
    left = list(itertools.accumulate(map(Fraction, reversed(weights))))[::-1]
    return tuple(Fraction(weight) / rest for weight, rest in zip(weights, left, strict=True))


def counts_of(shares: Sequence[Fraction], number: int) -> list[int]:
    """How many of the first `number` windows of a mixture are of each split: its share of what those before it left,
    rounded half up. Each count is within one window per split of the share of the whole."""
    counts = []
    for share in shares:
        counts.append((2 * number * share.numerator + share.denominator) // (2 * share.denominator))
        number -= counts[-1]
    return counts


def interleaved(shares: Sequence[Fraction], number: int) -> tuple[int, int]:
    """(split, index in the split) of window `number` of a mixture: the split whose count grows with it."""
    before, after = counts_of(shares, number), counts_of(shares, number + 1)
    return next((split, old) for split, (old, new) in enumerate(zip(before, after, strict=True)) if new > old)


def record(length: int, key: int, seeds: Seeds, position: int) -> int:
    """The record at a position of a split of `length` windows.

    A seed that begins within an epoch orders what that epoch has left: the windows read before do not come again.
    """
    begun = bisect.bisect_right(seeds, position, key=lambda one: one[0]) - 1
    first, seed = seeds[begun]
    if first % length and first // length == position // length:
        within = _shuffled(length - first % length, seed, key)[position - first]
        return record(length, key, seeds[:begun], first + within)
    return _shuffled(length, seed, key)[position]


@functools.lru_cache(maxsize=256)
def _shuffled(length: int, seed: int, key: int) -> Any:
    """The indices below `length`, a permutation per epoch, each a pure function of (seed, key, epoch).

    Shuffled twice. One grain shuffle has four rounds (`index_shuffle(..., rounds=4)`), too few: over 1.7
    million indices the correlation of neighbours is 6 times that of uniform draws, over 600 million 14 times.
    Two in a row with unrelated seeds cannot be distinguished from uniform draws (tests/data/test_order.py). The seeds
    are hashed because grain seeds epoch e with seed + e: epoch 1 of seed 0 would be epoch 0 of seed 1.
    """
    first, second = np.random.SeedSequence([seed, key]).generate_state(2)
    return grain.MapDataset.range(length).shuffle(seed=int(first)).shuffle(seed=int(second)).repeat()
