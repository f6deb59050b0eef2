"""Metrics of single documents from stored log-likelihoods (l), and what the pack knows about each document.

Multiple choice, as lm-eval 0.4.13 `ConfigurableTask.process_results`:

    acc             arg-max of l is right
    acc_norm        arg-max of l / characters of the choice (without the delimiter) is right
    acc_bytes       arg-max of l / bytes
    exact_match     the right choice is what greedy decoding gives
    acc_mutual_info arg-max of l - l of the choice without its question; only for tasks that ask for it
    brier_score     squared distance of softmax(l) from the truth

and not of lm-eval:

    choice_prob     softmax(l) at the right choice; `_per_token` and `_per_char`: softmax of l / length
    margin          l of the right choice less the best wrong one, in nats
    bits_per_byte   -l of the right choice / (bytes ln 2)

The modes olmes and opencompass-ppl compare choices in their own way (`modes`); their metrics have their own names.
"""

import dataclasses
import math
from typing import Any

import numpy as np

from fineline_jax.scoring.pack import Pack

Columns = dict[str, np.ndarray]
"""Metric -> float [documents of the task], NaN where a document has no value."""


@dataclasses.dataclass(frozen=True)
class Block:
    """The documents of a task that have the same number of choices k."""

    rows: np.ndarray
    """int [documents]: their place within the task"""
    requests: np.ndarray
    """int [documents, k]"""
    right: np.ndarray
    """bool [documents, k]; no choice is right where lm-eval's gold is -100"""
    chars: np.ndarray
    bytes: np.ndarray
    tokens: np.ndarray


@dataclasses.dataclass(frozen=True)
class Table:
    """What the metrics of one task need, read from the pack once."""

    task: dict[str, Any]
    mode: str
    first: np.ndarray
    """int [documents]: the first request of each"""
    counts: np.ndarray
    blocks: list[Block]
    words: np.ndarray
    bytes: np.ndarray
    content: list[str]


def tables(pack: Pack) -> list[Table]:
    """One per task, in the order of the pack."""
    found = []
    start = 0
    for task in pack.tasks:
        part = pack.documents.slice(start, task["documents"])
        start += task["documents"]
        content = part["content"].to_pylist() if task["own_metrics"] else []
        first, counts = part["first_request"].to_numpy(), part["requests"].to_numpy()
        words, size = part["words"].to_numpy(), part["bytes"].to_numpy()
        found.append(Table(task, pack.manifest["mode"], first, counts, _blocks(part, first), words, size, content))
    return found


def columns(table: Table, loglikelihood: np.ndarray, is_greedy: np.ndarray) -> Columns:
    """The metrics of each document of a task that does not bring its own.

    loglikelihood: float64 [requests], is_greedy: bool [requests], in the order of the pack.
    """
    kind = table.task["output_type"]
    if kind == "loglikelihood_rolling":
        return _whole_text(table, loglikelihood)
    result: Columns = {}
    for block in table.blocks:
        scored, greedy = loglikelihood[block.requests], is_greedy[block.requests]
        if kind == "multiple_choice":
            alone = loglikelihood[block.requests + block.right.shape[1]] if table.task["unconditional"] else None
            values = _choices(table.mode, block, scored, greedy, alone)
        elif kind == "loglikelihood":
            values = {"acc": greedy[:, 0], "bits_per_byte": _bits(scored, block.bytes)[:, 0]}
        else:
            values = _solutions(block, scored, greedy)
        for name, value in values.items():
            result.setdefault(name, np.full(len(table.first), np.nan))[block.rows] = value
    return result


def predictions(table: Table, loglikelihood: np.ndarray) -> list[tuple[int, int]]:
    """(right choice, most likely choice) of each document, as lm-eval hands them to f1 and mcc."""
    pairs = np.zeros((len(table.first), 2), int)
    for block in table.blocks:
        gold = np.where(block.right.any(axis=1), block.right.argmax(axis=1), -100)
        pairs[block.rows] = np.stack([gold, loglikelihood[block.requests].argmax(axis=1)], axis=1)
    return [(int(gold), int(chosen)) for gold, chosen in pairs]


def _choices(mode: str, block: Block, scored: np.ndarray, greedy: np.ndarray, alone: np.ndarray | None) -> Columns:
    each, right = np.arange(len(scored)), block.right

    def wins(values: np.ndarray) -> np.ndarray:
        return right[each, values.argmax(axis=1)]

    if mode == "opencompass-ppl":
        # the first token, which is not predicted, counts as well
        mean = scored / (block.tokens + 1)
        best = np.where(right, mean, -np.inf).max(axis=1)
        return {"acc_ppl": wins(mean), "cross_entropy": np.where(right.any(axis=1), -best, np.nan)}
    if mode == "olmes":
        values: Columns = {
            "acc_raw": wins(scored),
            "acc_per_token": wins(_per(scored, block.tokens)),
            "acc_per_char": wins(_per(scored, block.chars)),
        }
        if alone is not None:
            values["acc_uncond"] = wins(scored - alone)
        return values | _smooth(block, scored)
    values = {
        "acc": wins(scored),
        "acc_norm": wins(_per(scored, block.chars)),
        "acc_bytes": wins(_per(scored, block.bytes)),
        "exact_match": np.any(greedy & right, axis=1),
    }
    if alone is not None:
        values["acc_mutual_info"] = wins(scored - alone)
    brier = ((_softmax(scored) - right) ** 2).sum(axis=1)
    return values | {"brier_score": np.where(right.any(axis=1), brier, np.nan)} | _smooth(block, scored)


def _smooth(block: Block, scored: np.ndarray) -> Columns:
    """Functions of the log-likelihoods without steps; NaN where no choice is right."""
    right, known = block.right, block.right.any(axis=1)
    best = np.where(right, scored, -np.inf).max(axis=1)
    at = np.where(right, scored, -np.inf).argmax(axis=1)
    values = {
        "choice_prob": (_softmax(scored) * right).sum(axis=1),
        "choice_prob_per_token": (_softmax(_per(scored, block.tokens)) * right).sum(axis=1),
        "choice_prob_per_char": (_softmax(_per(scored, block.chars)) * right).sum(axis=1),
        "margin": best - np.where(right, -np.inf, scored).max(axis=1),
        "bits_per_byte": _bits(best, block.bytes[np.arange(len(at)), at]),
    }
    return {name: np.where(known, value, np.nan) for name, value in values.items()}


def _solutions(block: Block, scored: np.ndarray, greedy: np.ndarray) -> Columns:
    """Of a task that generates: the first gold solution, the best, and whether greedy decoding starts with one."""
    bits = _bits(scored, block.bytes)
    values: Columns = {
        "bits_per_byte": bits[:, 0],
        "bits_per_byte_best": bits.min(axis=1),
        "greedy_match": np.any(greedy, axis=1),
    }
    return values


def _whole_text(table: Table, loglikelihood: np.ndarray) -> Columns:
    """Of one text; over documents they are ratios of sums (`metrics`)."""
    return {"bits_per_byte": _bits(loglikelihood[table.first], table.bytes)} if table.bytes.any() else {}


def _blocks(documents: Any, first: np.ndarray) -> list[Block]:
    gold = documents["gold"].to_pylist()
    lengths = {name: documents[f"choice_{name}"].to_pylist() for name in ("chars", "bytes", "tokens")}
    sizes = np.array([len(row) for row in lengths["chars"]])
    blocks = []
    for k in np.unique(sizes):
        rows = np.flatnonzero(sizes == k)
        right = np.zeros((len(rows), k), bool)
        for i, row in enumerate(rows):
            right[i, [choice for choice in gold[row] if choice >= 0]] = True
        chars, size, tokens = (np.array([lengths[name][row] for row in rows], float) for name in lengths)
        blocks.append(Block(rows, first[rows, None] + np.arange(k), right, chars, size, tokens))
    return blocks


def _bits(loglikelihood: np.ndarray, size: np.ndarray) -> np.ndarray:
    return -_per(loglikelihood, size) / math.log(2)


def _per(values: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """An empty choice gives -inf or nan as in lm-eval, without the warning."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return values / lengths


def _softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x - x.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)
