"""The order of the windows: complete, seeded, shuffled well, in the stated shares."""

import math

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fineline_jax.data.order import Chunks, Mixed

ONE = (1.0,)


def stream(order: Mixed | Chunks, steps: range) -> list[tuple[int, int]]:
    return [
        (position.split, position.record)
        for step in steps
        for position in order.positions(step, range(order.sequences))
    ]


@settings(max_examples=20, deadline=None)
@given(length=st.integers(1, 400), sequences=st.integers(1, 40), seed=st.integers(0, 2**40))
def test_one_epoch_holds_each_window_once(length: int, sequences: int, seed: int) -> None:
    order = Mixed((length,), ONE, sequences, seed)
    batches = math.ceil(2 * length / sequences)
    records = [record for _, record in stream(order, range(batches))]
    assert sorted(records[:length]) == list(range(length))
    assert sorted(records[length : 2 * length]) == list(range(length))
    assert order.steps == length // sequences


def test_epochs_seeds_and_parts_have_orders_of_their_own() -> None:
    def epoch(seed: int, number: int) -> list[tuple[int, int]]:
        return stream(Mixed((1000,), ONE, 1000, seed), range(number, number + 1))

    orders = [epoch(seed, number) for seed in range(3) for number in range(3)]
    assert len({tuple(order) for order in orders}) == 9
    mixed = stream(Mixed((500, 500), (1.0, 1.0), 1000, 0), range(1))
    first, second = ([record for part, record in mixed if part == p] for p in (0, 1))
    assert sorted(first) == sorted(second) == list(range(500))
    assert first != second


@settings(max_examples=15, deadline=None)
@given(
    weights=st.lists(st.floats(0.02, 1.0), min_size=2, max_size=5),
    steps=st.integers(1, 20),
)
def test_a_mixture_keeps_its_shares_at_every_length(weights: list[float], steps: int) -> None:
    order = Mixed((100_000,) * len(weights), tuple(weights), 64, 1)
    parts = np.array([part for part, _ in stream(order, range(steps))])
    for part, weight in enumerate(weights):
        share = weight / sum(weights)
        # Less than one window off in each of the nested divisions, and the weights' 1 %.
        assert abs((parts == part).sum() - share * len(parts)) <= len(weights) + 0.01 * len(parts)


def test_a_small_source_starts_over_while_a_large_one_goes_on() -> None:
    places = stream(Mixed((10, 100), (1.0, 1.0), 20, 0), range(10))
    small = [record for part, record in places if part == 0]
    large = [record for part, record in places if part == 1]
    assert all(sorted(small[epoch * 10 : epoch * 10 + 10]) == list(range(10)) for epoch in range(10))
    assert sorted(large) == list(range(100))
    assert Mixed((10, 100), (1.0, 1.0), 20, 0).steps == 1


def test_the_order_of_a_seed_is_what_it_was() -> None:
    """A run that was begun with an earlier version, of this package or of grain, goes on in the same order."""
    order = Mixed((103,), ONE, 8, 7)
    records = {step: [record for _, record in stream(order, range(step, step + 1))] for step in (0, 1, 13)}
    assert records == {
        0: [99, 72, 20, 13, 75, 83, 4, 27],
        1: [30, 98, 6, 38, 100, 18, 53, 36],
        13: [57, 14, 58, 8, 50, 23, 0, 73],  # the second epoch began in step 12
    }
    assert stream(Mixed((5, 40, 9), (1.0, 2.0, 1.0), 8, 7), range(3)) == [
        (0, 3), (1, 29), (1, 21), (2, 8), (0, 1), (1, 14), (1, 18), (2, 3),
        (0, 4), (1, 22), (1, 2), (2, 0), (0, 2), (1, 12), (1, 30), (2, 7),
        (0, 0), (1, 20), (1, 38), (2, 6), (0, 0), (1, 13), (1, 34), (2, 4),
    ]  # fmt: skip
    chunks = Chunks((11, 3, 9), 4, 7)
    assert chunks.steps == 4
    assert [[tuple(position) for position in chunks.positions(step, range(4))] for step in range(8)] == [
        [(0, 9), (0, 5), (0, 8), (0, 2)], [(0, 6), (0, 4), (0, 3), (0, 10)],
        [(2, 8), (2, 3), (2, 0), (2, 7)], [(2, 6), (2, 4), (2, 5), (2, 1)],
        [(0, 1), (0, 4), (0, 5), (0, 7)], [(0, 6), (0, 9), (0, 0), (0, 8)],
        [(2, 8), (2, 2), (2, 1), (2, 4)], [(2, 6), (2, 3), (2, 7), (2, 5)],
    ]  # fmt: skip


def test_a_step_is_the_same_however_many_rows_of_it_are_asked_for_and_in_which_order() -> None:
    for order in (Mixed((503, 700), (1.0, 2.0), 12, 3), Chunks((500, 7, 700), 12, 3)):
        whole = {step: order.positions(step, range(12)) for step in (0, 45, 97, 98, 200)}
        for step in (200, 45, 98, 0, 97):
            assert [order.positions(step, range(row, row + 1))[0] for row in range(12)] == whole[step]
            assert order.positions(step, range(2, 12, 3)) == whole[step][2:12:3]


def test_an_epoch_of_a_mixture_ends_before_any_window_comes_again() -> None:
    for lengths, weights, sequences in (((5, 40, 9), (0.2, 0.5, 0.3), 8), ((103,), ONE, 8), ((30, 10), (1.0, 1.0), 4)):
        order, seen, steps = Mixed(lengths, weights, sequences, None), set(), 0
        while not seen & (batch := set(stream(order, range(steps, steps + 1)))) and len(batch) == sequences:
            seen |= batch
            steps += 1
        assert order.steps == steps


def test_without_a_seed_the_stored_order_is_kept() -> None:
    assert stream(Mixed((6,), ONE, 3, None), range(2)) == [(0, i) for i in range(6)]


@settings(max_examples=7, deadline=None)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=6), sequences=st.integers(1, 20))
def test_chunks_follow_each_other_and_drop_their_incomplete_batch(lengths: list[int], sequences: int) -> None:
    order = Chunks(tuple(lengths), sequences, 5)
    whole = [length // sequences for length in lengths]
    assert order.steps == sum(whole)
    if not order.steps:
        return
    step = 0
    for part, (length, batches) in enumerate(zip(lengths, whole, strict=True)):
        places = stream(order, range(step, step + batches))
        assert {p for p, _ in places} <= {part}
        records = [record for _, record in places]
        assert len(set(records)) == len(records) == batches * sequences
        assert set(records) <= set(range(length))
        step += batches


def test_the_second_pass_over_the_chunks_is_shuffled_anew() -> None:
    order = Chunks((100, 100), 50, 0)
    first, second = stream(order, range(4)), stream(order, range(4, 8))
    assert first != second
    assert [part for part, _ in first] == [part for part, _ in second] == [0] * 100 + [1] * 100
    assert sorted(first) == sorted(second)


def test_amber_has_762_steps_per_chunk() -> None:
    """LLM360: 360 chunks of 1,706,976 windows, 2,240 per step; 96 windows of each chunk are dropped."""
    order = Chunks((1_706_976,) * 360, 2240, 0)
    assert order.steps == 274_320
    assert {order.positions(step, range(1))[0].split for step in (0, 761)} == {0}
    assert order.positions(762, range(1))[0].split == 1
    assert order.positions(274_319, range(1))[0].split == 359


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
        records = [record for _, record in stream(Mixed((length,), ONE, count, seed), range(1))]
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
