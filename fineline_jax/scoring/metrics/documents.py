"""Metrics of single documents from stored log-likelihoods (l), and what the pack knows about each document.

Those of questions with choices are what the mode of the pack compares (`modes`); those of single continuations, whole
texts and gold solutions are the same in every mode.
"""

import dataclasses
import functools
from typing import Any

import numpy as np

from fineline_jax.scoring.modes.choices import Choices, Columns, bits_per_byte
from fineline_jax.scoring.modes.mode import Mode
from fineline_jax.scoring.modes.names import find_mode
from fineline_jax.scoring.requests.pack import Pack


@dataclasses.dataclass(frozen=True)
class Table:
    """What the metrics of one task need, read from the pack once."""

    task: dict[str, Any]
    mode: Mode
    requests: slice
    first: np.ndarray
    """int [documents]: the first request of each"""
    counts: np.ndarray
    blocks: list[Choices]
    words: np.ndarray
    bytes: np.ndarray
    content: list[str]


@functools.lru_cache(maxsize=2)
def tables(pack: Pack) -> list[Table]:
    """One per task, in the order of the pack; made once per pack."""
    made = []
    start, mode = 0, find_mode(pack.manifest["mode"])
    for task in pack.tasks:
        part = pack.documents.slice(start, task["documents"])
        start += task["documents"]
        content = part["content"].to_pylist() if task["own_metrics"] else []
        first, counts = part["first_request"].to_numpy(), part["requests"].to_numpy()
        words, size = part["words"].to_numpy(), part["bytes"].to_numpy()
        requests = slice(first[0], first[-1] + counts[-1]) if len(first) else slice(0)
        made.append(Table(task, mode, requests, first, counts, _blocks(part, first), words, size, content))
    return made


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
            values = table.mode.compare(block, scored, greedy, alone)
        elif kind == "loglikelihood":
            values = {"acc": greedy[:, 0], "bits_per_byte": bits_per_byte(scored, block.bytes)[:, 0]}
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


def _solutions(block: Choices, scored: np.ndarray, greedy: np.ndarray) -> Columns:
    """Of a task that generates: the first gold solution, the best, and whether greedy decoding starts with one."""
    bits, matched = bits_per_byte(scored, block.bytes), np.asarray(greedy.any(axis=1))
    return {"bits_per_byte": bits[:, 0], "bits_per_byte_best": bits.min(axis=1), "greedy_match": matched}


def _whole_text(table: Table, loglikelihood: np.ndarray) -> Columns:
    """Of one text; over documents they are ratios of sums (`metrics`)."""
    return {"bits_per_byte": bits_per_byte(loglikelihood[table.first], table.bytes)} if table.bytes.any() else {}


def _blocks(documents: Any, first: np.ndarray) -> list[Choices]:
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
        blocks.append(Choices(rows, first[rows, None] + np.arange(k), right, chars, size, tokens))
    return blocks
