"""Requests that share prefixes, drawn and made by hand."""

import dataclasses
import functools

import numpy as np
from hypothesis import strategies as st

from fineline_jax.scoring.engine.prefix_tree import Plan, plan
from fineline_jax.scoring.engine.rows import windows
from fineline_jax.scoring.requests.pack import Ragged, RequestTokens

VOCABULARY = 4


@dataclasses.dataclass(frozen=True)
class Requests:
    contexts: list[list[int]]
    continuations: list[list[int]]
    context_of: list[int]
    tree_of: list[int]

    def plan(self, context: int, **rows: int) -> Plan:
        return plan(self.tokens, context, **rows)

    @property
    def tokens(self) -> RequestTokens:
        of, trees = np.array(self.context_of, int), np.array(self.tree_of, int)
        return RequestTokens(ragged(self.contexts), ragged(self.continuations), of, trees)

    def windows(self, context: int) -> list[tuple[int, np.ndarray, int]]:
        """(request, tokens, how many of the last ones are scored), as the plain scorer feeds them."""
        result = []
        for request, row in enumerate(self.context_of):
            stream = np.array(self.contexts[row] + self.continuations[request])
            result += [(request, *window) for window in windows(stream, len(self.contexts[row]), context)]
        return result


def ragged(rows: list[list[int]]) -> Ragged:
    values = np.array([token for row in rows for token in row], np.int32)
    return Ragged(values, np.cumsum([0, *map(len, rows)], dtype=np.int64))


tokens = st.integers(0, VOCABULARY - 1)


@st.composite
def requests(draw: st.DrawFn) -> Requests:
    stem = draw(st.lists(tokens, max_size=8))  # a shared beginning, as few-shot prompts have
    contexts = draw(st.lists(st.lists(tokens, min_size=1, max_size=6), min_size=1, max_size=5))
    contexts = [stem + rest if draw(st.booleans()) else rest for rest in contexts]
    count = draw(st.integers(0, 12))
    return Requests(
        contexts,
        [draw(st.lists(tokens, max_size=5)) for _ in range(count)],
        [draw(st.integers(0, len(contexts) - 1)) for _ in range(count)],
        [draw(st.integers(0, 1)) for _ in range(count)],
    )


rows = st.fixed_dictionaries(
    {"row_length": st.integers(1, 60), "multiple": st.integers(1, 4), "group": st.integers(1, 3)}
)


contexts = st.integers(2, 16)


def few_shot(prefix: int, questions: int, seed: int = 0) -> Requests:
    """Multiple choice with a shared prompt, and four one-token choices per question."""
    rng = np.random.default_rng(seed)
    stem = rng.integers(0, 1000, prefix).tolist()
    contexts = [[*stem, number, *rng.integers(0, 1000, rng.integers(10, 40)).tolist()] for number in range(questions)]
    count = 4 * questions
    choices = [[request % 4] for request in range(count)]
    return Requests(contexts, choices, [request // 4 for request in range(count)], [0] * count)


@functools.cache
def few_and_many_parents(count: int) -> Requests:
    """One tree with one scored token for nine read ones, and one with nine for one."""
    few = [list(range(i, i + 9)) for i in range(count)]
    return Requests(few + [[1]] * count, [[1]] * count + few, list(range(2 * count)), [0] * count + [1] * count)
