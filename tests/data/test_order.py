"""The order of the windows: complete, seeded, shuffled well, in the stated shares."""

import math

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fineline_jax.data.order import Chunks, Mixed, in_stored_order

ONE = (1.0,)


def mixed(lengths: tuple[int, ...], weights: tuple[float, ...], seed: int, start: tuple[int, ...] = ()) -> Mixed:
    count = len(lengths)
    return Mixed(lengths, weights, tuple(range(count)), (((0, seed),),) * count, start or (0,) * count)


def chunked(lengths: tuple[int, ...], seed: int, start: int = 0) -> Chunks:
    return Chunks(lengths, 0, ((0, seed),), start)


def stream(order: Mixed | Chunks, sequences: int, steps: range) -> list[tuple[int, int]]:
    return [
        (position.split, position.record)
        for step in steps
        for position in order.positions(step, sequences, range(sequences))
    ]


@settings(max_examples=20, deadline=None)
@given(length=st.integers(1, 400), sequences=st.integers(1, 40), seed=st.integers(0, 2**40))
def test_one_epoch_holds_each_window_once(length: int, sequences: int, seed: int) -> None:
    order = mixed((length,), ONE, seed)
    batches = math.ceil(2 * length / sequences)
    records = [record for _, record in stream(order, sequences, range(batches))]
    assert sorted(records[:length]) == list(range(length))
    assert sorted(records[length : 2 * length]) == list(range(length))
    assert order.passed(batches, sequences) == (batches * sequences,)


def test_epochs_seeds_and_parts_have_orders_of_their_own() -> None:
    def epoch(seed: int, number: int) -> list[tuple[int, int]]:
        return stream(mixed((1000,), ONE, seed), 1000, range(number, number + 1))

    orders = [epoch(seed, number) for seed in range(3) for number in range(3)]
    assert len({tuple(order) for order in orders}) == 9
    both = stream(mixed((500, 500), (1.0, 1.0), 0), 1000, range(1))
    first, second = ([record for part, record in both if part == p] for p in (0, 1))
    assert sorted(first) == sorted(second) == list(range(500))
    assert first != second


@settings(max_examples=15, deadline=None)
@given(
    weights=st.lists(st.floats(0.02, 1.0), min_size=2, max_size=5),
    steps=st.integers(1, 20),
)
def test_a_mixture_keeps_its_shares_at_every_length(weights: list[float], steps: int) -> None:
    order = mixed((100_000,) * len(weights), tuple(weights), 1)
    parts = np.array([part for part, _ in stream(order, 64, range(steps))])
    assert order.passed(steps, 64) == tuple(np.bincount(parts, minlength=len(weights)))
    for part, weight in enumerate(weights):
        share = weight / sum(weights)
        # At most half a window off in each of the nested divisions, each of which passes a part of it on.
        assert abs((parts == part).sum() - share * len(parts)) <= 0.5 * len(weights)


def test_a_small_source_starts_over_while_a_large_one_goes_on() -> None:
    places = stream(mixed((10, 100), (1.0, 1.0), 0), 20, range(10))
    small = [record for part, record in places if part == 0]
    large = [record for part, record in places if part == 1]
    assert all(sorted(small[epoch * 10 : epoch * 10 + 10]) == list(range(10)) for epoch in range(10))
    assert sorted(large) == list(range(100))


def test_the_order_of_a_seed_is_what_it_was() -> None:
    """A run that was begun with an earlier version, of this package or of grain, goes on in the same order."""
    order = mixed((103,), ONE, 7)
    records = {step: [record for _, record in stream(order, 8, range(step, step + 1))] for step in (0, 1, 13)}
    assert records == {
        0: [99, 72, 20, 13, 75, 83, 4, 27],
        1: [30, 98, 6, 38, 100, 18, 53, 36],
        13: [57, 14, 58, 8, 50, 23, 0, 73],  # the second epoch began in step 12
    }
    assert stream(mixed((5, 40, 9), (1.0, 2.0, 1.0), 7), 8, range(3)) == [
        (1, 29), (0, 3), (2, 8), (1, 21), (1, 14), (0, 1), (2, 3), (1, 18),
        (1, 22), (0, 4), (2, 0), (1, 2), (1, 12), (0, 2), (2, 7), (1, 30),
        (1, 20), (0, 0), (2, 6), (1, 38), (1, 13), (0, 0), (2, 4), (1, 34),
    ]  # fmt: skip
    chunks = chunked((11, 3, 9), 7)
    assert [[tuple(position) for position in chunks.positions(step, 4, range(4))] for step in range(8)] == [
        [(0, 9), (0, 5), (0, 8), (0, 2)], [(0, 6), (0, 4), (0, 3), (0, 10)],
        [(2, 8), (2, 3), (2, 0), (2, 7)], [(2, 6), (2, 4), (2, 5), (2, 1)],
        [(0, 1), (0, 4), (0, 5), (0, 7)], [(0, 6), (0, 9), (0, 0), (0, 8)],
        [(2, 8), (2, 2), (2, 1), (2, 4)], [(2, 6), (2, 3), (2, 7), (2, 5)],
    ]  # fmt: skip


def test_a_step_is_the_same_however_many_rows_of_it_are_asked_for_and_in_which_order() -> None:
    for order in (mixed((503, 700), (1.0, 2.0), 3), chunked((500, 7, 700), 3)):
        whole = {step: order.positions(step, 12, range(12)) for step in (0, 45, 97, 98, 200)}
        for step in (200, 45, 98, 0, 97):
            assert [order.positions(step, 12, range(row, row + 1))[0] for row in range(12)] == whole[step]
            assert order.positions(step, 12, range(2, 12, 3)) == whole[step][2:12:3]


def test_the_stored_order_is_kept_until_a_window_would_come_again() -> None:
    assert in_stored_order((6,), ONE, 9) == [(0, i) for i in range(6)]
    # Shares 1/2 each, the first rounded up: the two take turns.
    assert in_stored_order((3, 2), (1.0, 1.0), 9) == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2)]


@settings(max_examples=7, deadline=None)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=6), sequences=st.integers(1, 20))
def test_chunks_follow_each_other_and_drop_their_incomplete_batch(lengths: list[int], sequences: int) -> None:
    order = chunked(tuple(lengths), 5)
    whole = [length // sequences for length in lengths]
    if not sum(whole):
        return
    step = 0
    for part, (length, batches) in enumerate(zip(lengths, whole, strict=True)):
        places = stream(order, sequences, range(step, step + batches))
        assert {p for p, _ in places} <= {part}
        records = [record for _, record in places]
        assert len(set(records)) == len(records) == batches * sequences
        assert set(records) <= set(range(length))
        step += batches


def test_the_second_pass_over_the_chunks_is_shuffled_anew() -> None:
    order = chunked((100, 100), 0)
    first, second = stream(order, 50, range(4)), stream(order, 50, range(4, 8))
    assert first != second
    assert [part for part, _ in first] == [part for part, _ in second] == [0] * 100 + [1] * 100
    assert sorted(first) == sorted(second)


def test_amber_has_762_steps_per_chunk() -> None:
    """LLM360: 360 chunks of 1,706,976 windows, 2,240 per step; 96 windows of each chunk are dropped."""
    order = chunked((1_706_976,) * 360, 0)
    splits = {step: order.positions(step, 2240, range(1))[0].split for step in (0, 761, 762, 274_319, 274_320)}
    assert splits == {0: 0, 761: 0, 762: 1, 274_319: 359, 274_320: 0}
    assert order.passed(274_320, 2240) == (360 * 1_706_976 - 96,)


def deviations(records: np.ndarray, length: int) -> list[float]:
    """How far an order is from independent uniform draws, in standard deviations, by four measures."""
    count = len(records)
    uniform = records / length
    centred = uniform - uniform.mean()
    measures = []
    # Serial correlation: windows that stand near each other in a batch must not be related in the file.
    for lag in (1, 2, 8, 64, 1000):
        measures.append((centred[:-lag] * centred[lag:]).mean() / centred.var() * math.sqrt(count))
    # Trend: early batches must not come from one end.
    measures.append(np.corrcoef(uniform, np.arange(count))[0, 1] * math.sqrt(count))
    # Runs up and down: (2n - 1) / 3 expected, variance (16n - 29) / 90.
    rising = np.diff(uniform) > 0
    runs = 1 + (rising[1:] != rising[:-1]).sum()
    measures.append((runs - (2 * count - 1) / 3) / math.sqrt((16 * count - 29) / 90))
    # Followers: pairs fill 8 x 8 cells evenly (chi-squared, 63 degrees of freedom).
    cells = np.histogram2d(uniform[:-1], uniform[1:], bins=8, range=[[0, 1], [0, 1]])[0]
    chi_squared = ((cells - cells.mean()) ** 2 / cells.mean()).sum()
    measures.append((chi_squared - 63) / math.sqrt(2 * 63))
    return measures


@pytest.mark.parametrize("length", [20_011, 1_706_976, 614_511_360])
def test_the_shuffle_cannot_be_told_from_uniform_draws(length: int) -> None:
    """Sizes: a small corpus, one Amber chunk, all 360 of them.

    The mean square over 6 seeds x 8 measures is 1 for uniform draws, with a standard deviation of about 0.25.
    (A linear congruential permutation once showed as a phase shift in the loss: the marin 32B retrospective.)
    """
    count = 3000
    squares = []
    for seed in range(6):
        records = [record for _, record in stream(mixed((length,), ONE, seed), count, range(1))]
        squares += np.square(deviations(np.array(records), length)).tolist()
    assert np.mean(squares) < 2.25
    assert np.max(squares) < 4.5**2


def test_the_measures_of_the_shuffle_have_teeth() -> None:
    """A single grain shuffle, with its four rounds, fails them at Amber's size, and so does a congruence."""
    length, count = 614_511_360, 3000
    once = grain.MapDataset.range(length).shuffle(seed=1)
    assert np.abs(deviations(np.array([once[i] for i in range(count)]), length)).max() > 9
    congruence = (np.arange(count) * 271_828_183 + 7) % length
    assert np.abs(deviations(congruence, length)).max() > 9
