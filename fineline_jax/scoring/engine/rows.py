"""Rows for the plain scorer: one request per right-padded row, few distinct shapes."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from fineline_jax.scoring.requests.pack import RequestTokens

COMPILE = 16
"""Compiling a program costs about as much as this many batches."""


@dataclasses.dataclass(frozen=True)
class ScoredSequence:
    """What one forward row scores: the last `scored` tokens of `tokens`."""

    request: int
    tokens: np.ndarray
    """int32, at most context + 1: the last one is only a target."""
    scored: int


@dataclasses.dataclass(frozen=True)
class RowBatch:
    """Rows of one shape. Rows past `len(requests)` are padding."""

    requests: np.ndarray
    """int32 [used rows]"""
    tokens: np.ndarray
    """int32 [rows, length], padded with 0 on the right"""
    positions: np.ndarray
    """int32 [rows, targets]: where in the row each target is predicted"""
    targets: np.ndarray
    """int32 [rows, targets], -1 where there is none"""


def sequences(requests: RequestTokens, context: int) -> Iterator[ScoredSequence]:
    """The rows of all requests, in order, for a model that reads `context` tokens.

    A request that is too long keeps its last tokens, as in lm-eval. What has more targets than `context` gives several
    rows: texts scored as a whole (rolling) as in lm-eval, and continuations, on which lm-eval fails.
    """
    for request, row in enumerate(requests.context_row):
        given = requests.contexts[row]
        stream = np.concatenate([given, requests.continuations[request]])
        for tokens, scored in windows(stream, len(given), context):
            yield ScoredSequence(request, tokens, scored)


def windows(stream: np.ndarray, first: int, context: int) -> Iterator[tuple[np.ndarray, int]]:
    """(tokens, scored) such that each token of `stream` from `first` on is a target once.

    tokens holds at most context + 1 tokens, the last `scored` of them are targets, and each window has as much left
    context as fits. With first=1 these are lm-eval's `get_rolling_token_windows` with context_len=1, made disjoint.
    """
    for start in range(first, len(stream), context):
        stop = min(start + context, len(stream))
        yield stream[max(0, stop - 1 - context) : stop], stop - start


def truncated(requests: RequestTokens, context: int) -> int:
    """How many requests lose tokens on the left; a text scored as a whole loses none."""
    lengths = requests.continuations.lengths + requests.contexts.lengths[requests.context_row]
    return int(((lengths > context + 1) & ~requests.is_rolling).sum())


def batches(rows: list[ScoredSequence], batch_tokens: int, shards: int, least: int) -> list[RowBatch]:
    """All of `rows` in batches of about `batch_tokens` tokens and a multiple of `shards` rows.

    Rows of a batch have similar lengths (a multiple of `least` tokens) and similar numbers of targets (up to a power of
    four). A program is compiled for each shape, so one is only added where it saves COMPILE batches of padding.
    """
    classes: dict[int, list[ScoredSequence]] = {}
    for row in rows:
        classes.setdefault(((row.scored - 1).bit_length() + 1) // 2, []).append(row)
    for size in range(min(classes, default=0), max(classes, default=0)):
        if sum(len(row.tokens) for row in classes.get(size, [])) < COMPILE * batch_tokens:
            classes.setdefault(size + 1, []).extend(classes.pop(size, []))
    result = []
    for size, members in sorted(classes.items(), reverse=True):
        members.sort(key=lambda row: (-len(row.tokens), row.request))
        lengths = np.array([_ceil(max(1, len(row.tokens) - 1), least) for row in members])
        for length in _few_lengths(lengths, COMPILE * batch_tokens):
            here = [row for row, fits in zip(members, lengths <= length, strict=True) if fits]
            members = [row for row, fits in zip(members, lengths <= length, strict=True) if not fits]
            lengths = lengths[lengths > length]
            most = shards * max(1, batch_tokens // length // shards)
            count = _ceil(-(-len(here) // -(-len(here) // most)), shards)
            for start in range(0, len(here), count):
                result.append(_batch(here[start : start + count], count, int(length), min(4**size, int(length))))
    return result


def _batch(rows: list[ScoredSequence], count: int, length: int, width: int) -> RowBatch:
    tokens = np.zeros((count, length), np.int32)
    positions = np.zeros((count, width), np.int32)
    targets = np.full((count, width), -1, np.int32)
    for i, row in enumerate(rows):
        given = len(row.tokens) - 1
        tokens[i, :given] = row.tokens[:-1]
        positions[i, : row.scored] = np.arange(given - row.scored, given)
        targets[i, : row.scored] = row.tokens[len(row.tokens) - row.scored :]
    return RowBatch(np.array([row.request for row in rows], np.int32), tokens, positions, targets)


def _few_lengths(lengths: np.ndarray, price: int) -> list[int]:
    """Some of the distinct `lengths`, ascending, such that raising each to the next chosen one costs fewest tokens,
    when choosing one costs `price`."""
    distinct, counts = np.unique(lengths, return_counts=True)
    below = np.concatenate([[0], np.cumsum(counts)])
    # best[i]: cost of the i shortest distinct lengths and the lengths chosen for them
    best: list[tuple[float, list[int]]] = [(0.0, [])]
    for i in range(1, len(distinct) + 1):
        length = int(distinct[i - 1])
        best.append(
            min((best[j][0] + price + length * int(below[i] - below[j]), [*best[j][1], length]) for j in range(i))
        )
    return best[-1][1]


def _ceil(value: int, step: int) -> int:
    return -(-value // step) * step
