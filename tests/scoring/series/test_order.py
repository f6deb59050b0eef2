"""The order of a series: coarse to fine, and only where its curve changes."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fineline_jax.checkpoints.series import Checkpoint
from fineline_jax.scoring.estimates import Value
from fineline_jax.scoring.series.order import START, Refinement, axis, change, coarse_to_fine, largest_gap, replay

POSITIONS = st.lists(st.integers(0, 10**6), min_size=1, max_size=60).map(lambda values: np.array(sorted(values), float))


def checkpoints(steps: list[int | None], tokens: list[int | None]) -> list[Checkpoint]:
    return [Checkpoint("s", str(n), step, seen, Path("x"), "hf") for n, (step, seen) in enumerate(zip(steps, tokens))]


def test_the_axis_is_logarithmic_behind_a_sixty_fourth_of_the_tokens_and_falls_back_to_steps_and_positions():
    by_tokens = axis(checkpoints([1, 2, 3], [0, 64, 128]))
    assert by_tokens == pytest.approx(np.log([2, 66, 130]), rel=1e-15)
    assert axis(checkpoints([0, 64, 128], [0, None, 128])) == pytest.approx(np.log([2, 66, 130]), rel=1e-15)
    assert axis(checkpoints([None, 1, 2], [None, None, 1])).tolist() == [0, 1, 2]
    assert axis(checkpoints([0], [0])).tolist() == [0]


def test_the_ends_come_first_and_then_the_middles_of_the_widest_gaps():
    assert coarse_to_fine(np.arange(9.0)) == [0, 8, 4, 2, 6, 1, 3, 5, 7]
    assert coarse_to_fine(np.array([0.0, 1, 2, 3, 100])) == [0, 4, 3, 1, 2], "by the axis, not by the number"
    assert coarse_to_fine(np.array([0.0, 10, 11, 12, 20, 30, 80]))[:5] == [0, 6, 5, 3, 4], "the widest, not the fullest"
    assert coarse_to_fine(np.arange(9.0), done=[0, 1, 8]) == [4, 6, 2, 3, 5, 7]
    assert coarse_to_fine(np.arange(1.0)) == [0] and coarse_to_fine(np.arange(0.0)) == []


@given(POSITIONS, st.data())
def test_each_comes_once_and_what_is_done_not_again(positions, data):
    done = data.draw(st.lists(st.integers(0, len(positions) - 1), unique=True))
    assert sorted([*coarse_to_fine(positions, done), *done]) == list(range(len(positions)))


@given(st.integers(2, 200), st.integers(2, 200))
def test_every_beginning_of_the_order_covers_an_even_series_evenly(count, first):
    """Halving leaves no gap more than twice as long as an even spacing of as many points, and one for rounding."""
    have = coarse_to_fine(np.arange(float(count)))[:first]
    assert largest_gap(count, have) <= 2 * count / max(1, len(have) - 1) + 1
    assert len(have) < 2 or {0, count - 1} <= set(have)


def test_a_change_is_the_mean_square_of_the_differences_in_standard_errors():
    before = of({"a": (0.5, 0.03), "b": (0.2, 0.01), "only": (1.0, 0.1), "unknown": (0.1, math.nan)})
    after = of({"a": (0.6, 0.04), "b": (0.2, 0.01), "unknown": (0.9, math.nan)})
    assert change(before, after) == pytest.approx((0.1**2 / 0.05**2 + 0) / 2)
    assert change(of({"a": (0.5, 0.0)}), of({"a": (0.5, 0.0)})) == math.inf == change({}, {}), (
        "without errors nothing is decided"
    )


def test_errors_of_a_change_are_those_of_the_documents_differences():
    easy = np.array([-0.5, 0.5, 0.5, -0.5])
    before = {"a": Value(0.5, 0.25, 4, easy)}
    after = {"a": Value(0.75, 0.25, 4, easy + np.array([0.25, -0.25, -0.25, 0.25]))}
    differences = np.array([0.5, 0.0, 0.0, 0.5])  # document by document; 0.25 is their mean
    assert change(before, after) == pytest.approx((0.25 / (differences.std(ddof=1) / 2)) ** 2)
    assert change(before, before) == 0.0, "every document answered alike is no change"
    assert change(before | of({"b": (0.5, 0.1)}), before | of({"b": (0.5, 0.1)})) == 0.0


def of(pairs: dict[str, tuple[float, float]]) -> dict[str, Value]:
    return {task: Value(value, error, 9) for task, (value, error) in pairs.items()}


def curve(count: int, step_at: int) -> list[dict[str, Value]]:
    return [of({"t": (0.2 if index < step_at else 0.8, 0.01)}) for index in range(count)]


def test_a_flat_curve_is_scored_at_five_and_a_step_is_found_to_the_checkpoint():
    assert replay(np.arange(65.0), curve(65, 1000).__getitem__) == [0, 16, 32, 48, 64] and START == 5
    scored = replay(np.arange(65.0), curve(65, 23).__getitem__)
    assert {22, 23} <= set(scored) and len(scored) == 5 + 4, "five, and log2(16) to halve the gap of the step"


def test_nothing_is_chosen_in_a_gap_before_what_was_asked_for_there_is_known():
    known = curve(65, 23)
    choose = Refinement(np.arange(65.0), {index: known[index] for index in (0, 16, 32, 48, 64)})
    assert choose.next() == 24 and choose.next() is None
    choose.add(24, known[24])
    assert choose.next() == 20


def test_the_gap_that_changes_most_comes_first():
    heights = (0.2, 0.3, 0.7, 0.75, 0.75)
    values = {16 * n: of({"t": (height, 0.01)}) for n, height in enumerate(heights)}
    choose = Refinement(np.arange(65.0), values)
    assert [choose.next() for _ in range(4)] == [24, 8, 40, None], "the last gap is flat"


def test_what_cannot_be_scored_is_passed_by():
    known = curve(65, 23)
    choose = Refinement(np.arange(65.0), {index: known[index] for index in (0, 16, 32, 48, 64)})
    assert choose.next() == 24
    choose.add(24, None)
    assert choose.next() == 23, "the next one nearest to the middle"
    nothing = Refinement(np.arange(3.0))
    assert [nothing.next() for _ in range(4)] == [0, 2, 1, None]
    for index in range(3):
        nothing.add(index, None)
    assert nothing.next() is None and not nothing.values


def test_where_there_is_no_error_everything_is_scored():
    assert replay(np.arange(20.0), lambda index: of({"t": (0.5, math.nan)})) == list(range(20))
