"""What guessing gets on a pack's documents, against counts by hand."""

import pytest
from metric_examples import Doc, packed, task

from fineline_jax.scoring.metrics.guessing import Guess, guesses


def choices(*texts: str, gold: int) -> Doc:
    return Doc(texts, (gold,), tuple(1 for _ in texts))


SHORT_RIGHT = [choices("a", "ice cream", "東京", "x" * 11, gold=0) for _ in range(20)]
"""The right one is the shortest."""
MIXED = [choices("aa", "bb", "cc", "dd", gold=i % 4) for i in range(20)]
"""All of one length, each right in a quarter."""


def test_the_shortest_choice_counts_where_it_is_right_more_often_than_one_at_random() -> None:
    documents = SHORT_RIGHT[:8] + [choices("a", "bb", "cc", "dd", gold=1 + i % 3) for i in range(12)]
    found = guesses(packed([(task("t"), documents)]))
    assert found == {}  # right in 0.4 against 0.25, but the gain is -.25 in 12 of 20 documents: 1.8 standard errors
    assert guesses(packed([(task("t"), SHORT_RIGHT + MIXED)])) == {
        # of equally short ones each is taken alike: all of the first 20, a quarter of the others
        "t": Guess(pytest.approx((20 + 20 / 4) / 40), "always the shortest choice")
    }


def test_the_longest_choice_and_the_same_answer() -> None:
    longest = [choices("a", "b", "c", "x" * 11, gold=3) for _ in range(20)]
    assert guesses(packed([(task("t"), longest)]))["t"] == Guess(1.0, "always the longest choice")
    yes = [choices("yes", "no!", gold=int(i % 5 == 0)) for i in range(200)]
    assert guesses(packed([(task("t", chance=0.5), yes)]))["t"] == Guess(0.8, "always the same answer")


def test_nothing_is_said_where_no_chooser_beats_the_chance_level() -> None:
    assert guesses(packed([(task("t"), MIXED)])) == {}
    assert guesses(packed([(task("t", chance=None), MIXED)])) == {"t": Guess(0.25, "one choice at random")}


def test_without_choices_it_is_the_best_constant_answer() -> None:
    words = [Doc((text,), (0,), (1,)) for text in ("Rome", "Oslo", "Rome", "Bern", "Rome", "Oslo", " Rome", "Paris")]
    found = guesses(packed([(task("cloze", "loglikelihood", chance=0.0), words)]))
    assert found == {"cloze": Guess(4 / 8, "always the same answer")}


def test_a_group_is_the_mean_over_its_documents() -> None:
    group = {"group": "g", "tasks": ["a", "b"]}
    pack = packed([(task("a"), SHORT_RIGHT), (task("b"), MIXED + MIXED)], groups=(group,))
    assert guesses(pack)["g"].level == pytest.approx((20 * 1.0 + 40 * 0.25) / 60)
