"""What every domain of the world hands over: a writer of training text and held-out questions."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from random import Random

QUESTIONS = 240
"""Questions of a task; the standard error of an accuracy is then at most 0.032."""


@dataclasses.dataclass(frozen=True)
class Question:
    """One multiple-choice question; a model is to find `choices[answer]` the likeliest continuation."""

    question: str
    """The text before the choices, without a trailing space; empty where whole sentences are compared."""
    choices: tuple[str, ...]
    answer: int


@dataclasses.dataclass(frozen=True)
class Subject:
    """A domain: it writes documents of training text and holds questions back from them."""

    write: Callable[[Random], str]
    """One training document: a few sentences on one line."""
    questions: dict[str, tuple[Question, ...]]
    """Task name to its questions."""


def word_list(text: str) -> tuple[str, ...]:
    """A list of words, written as one text."""
    return tuple(text.split())


@functools.cache
def held_out(share: float, *words: str | int) -> bool:
    """Whether a combination of words is kept for the questions and must not be written.

    The decision is a hash of the words, so no pattern in them gives it away, and training text and questions
    agree on it without sharing a list.
    """
    digest = hashlib.blake2b(" ".join(map(str, words)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def ask(rng: Random, question: str, right: str, wrong: Sequence[str]) -> Question:
    """A question with its choices in random order."""
    choices = [right, *wrong]
    rng.shuffle(choices)
    return Question(question, tuple(choices), choices.index(right))


def collect(rng: Random, draw: Callable[[Random], Question | None], count: int = QUESTIONS) -> tuple[Question, ...]:
    """The first `count` different questions that `draw` gives; it may answer None for 'draw again'.

    Raises RuntimeError where `draw` has fewer different questions to give.
    """
    drawn: dict[tuple[str, str], Question] = {}
    for _ in range(200 * count):
        question = draw(rng)
        if question is not None:
            drawn.setdefault((question.question, question.choices[question.answer]), question)
        if len(drawn) == count:
            return tuple(drawn.values())
    raise RuntimeError(f"only {len(drawn)} of {count} different questions found")
