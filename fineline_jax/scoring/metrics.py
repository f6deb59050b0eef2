"""Metrics from stored log-likelihoods, without a model: lm-eval's own and some that are smooth in the model.

Per document (definitions of lm-eval 0.4.13 `ConfigurableTask.process_results`; l = log-likelihood of a choice):

    acc             arg-max of l is right
    acc_norm        arg-max of l / characters of the choice (without the delimiter) is right
    acc_bytes       arg-max of l / bytes
    exact_match     the right choice is what greedy decoding gives (`acc` for tasks of type loglikelihood)
    acc_mutual_info arg-max of l - l of the choice without its question; only for tasks that ask for it
    brier_score     squared distance of softmax(l) from the truth

and not of lm-eval:

    choice_prob     softmax(l) at the right choice; `_per_token` and `_per_char`: softmax of l / length
    margin          l of the right choice less the best wrong one, in nats
    bits_per_byte   -l of the right choice / (bytes ln 2)

Standard errors: sample standard deviation / sqrt(n), as lm-eval; perplexity: by the delta method, where lm-eval
bootstraps (perplexity * standard error of the mean log-likelihood); the rolling ones: by the delta method for a
ratio of sums over documents, where lm-eval gives none.
"""

import dataclasses
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fineline_jax.errors import UserError
from fineline_jax.scoring import pack as packs
from fineline_jax.scoring import scores
from fineline_jax.scoring.pack import Pack

COLUMNS = (
    "series", "checkpoint", "step", "tokens", "domain", "task", "metric", "value", "stderr", "n", "chance",
)  # fmt: skip
GUESSABLE = (
    "acc",
    "acc_norm",
    "acc_bytes",
    "acc_mutual_info",
    "choice_prob",
    "choice_prob_per_token",
    "choice_prob_per_char",
)
"""Metrics for which the task's chance level is that of guessing."""


@dataclasses.dataclass(frozen=True)
class Value:
    """A metric of a task."""

    value: float
    stderr: float
    """NaN if there is none."""
    n: int
    """Documents."""


Metrics = dict[str, Value]


def tidy(folder: Path) -> pd.DataFrame:
    """One row per (series, checkpoint, task or group, metric) of a scores folder, with the columns COLUMNS.

    Checkpoints of a series are ordered by tokens, tasks as in the suite. step and tokens are nullable integers; stderr
    and chance are NaN where there is none; a metric without a value (no document has a right choice) has no row.
    Raises UserError if there are no scores, or scores of another pack than the one beside them.
    """
    files = scores.score_files(folder)
    pack = packs.load(folder / "pack")
    tables = _tables(pack)
    rows = [row for path in files for row in _rows(pack, tables, path)]
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    frame = frame.astype(
        {"step": "Int64", "tokens": "Int64", "value": float, "stderr": float, "n": int, "chance": float}
    )
    return frame.sort_values(["series", "tokens", "step"], kind="stable", ignore_index=True)


def first_metrics(folder: Path) -> dict[str, str]:
    """Task or group -> the metric its suite reports first."""
    manifest = packs.load(folder / "pack").manifest
    tasks = {row["task"]: row["metric"] for row in manifest["tasks"]}
    return tasks | {row["group"]: row["metric"] for row in manifest["groups"]}


def of_tasks(pack: Pack, loglikelihood: np.ndarray, is_greedy: np.ndarray) -> dict[str, Metrics]:
    """Task or group -> metric -> value; tasks first, in the order of the pack.

    loglikelihood: float64 [requests], is_greedy: bool [requests], in the order of the pack.
    """
    return _values(pack, _tables(pack), loglikelihood, is_greedy)


def mean_and_stderr(items: Iterable[float]) -> Value:
    """As lm-eval's `mean` and `mean_stderr`, summed in the same order and as the same types so that the last digit
    agrees (from Python 3.12 on, `sum` compensates the rounding of floats, but not of numpy's)."""
    numbers = list(items)
    n = len(numbers)
    if n == 0:
        return Value(math.nan, math.nan, 0)
    mean = sum(numbers) / n
    if n == 1:
        return Value(float(mean), math.nan, 1)
    deviation = math.sqrt(sum([(x - mean) ** 2 for x in numbers]) / (n - 1))
    return Value(float(mean), deviation / math.sqrt(n), n)


def _rows(pack: Pack, tables: list["_Table"], path: Path) -> list[tuple]:
    result = scores.read(path)
    header = result.header
    if header.key.pack != pack.hash:
        raise UserError(f"{path}: made with another request pack than the one beside it; score this checkpoint again")
    start = (header.series, header.checkpoint, header.step, header.tokens)
    entries = {row["task"]: row for row in pack.tasks} | {row["group"]: row for row in pack.manifest["groups"]}
    rows = []
    for name, metrics in _values(pack, tables, result.loglikelihood, result.is_greedy).items():
        entry = entries[name]
        chance = math.nan if entry["chance"] is None else entry["chance"]
        for metric, found in metrics.items():
            if not math.isnan(found.value):
                level = chance if metric in GUESSABLE or metric == entry["metric"] else math.nan
                rows.append((*start, entry["domain"], name, metric, found.value, found.stderr, found.n, level))
    return rows


@dataclasses.dataclass(frozen=True)
class _Block:
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
class _Table:
    """What the metrics of one task need, read from the pack once."""

    task: dict[str, Any]
    first: np.ndarray
    """int [documents]: the first request of each"""
    counts: np.ndarray
    blocks: list[_Block]
    words: np.ndarray
    bytes: np.ndarray
    content: list[str]


def _tables(pack: Pack) -> list[_Table]:
    tables = []
    start = 0
    for task in pack.tasks:
        part = pack.documents.slice(start, task["documents"])
        start += task["documents"]
        content = part["content"].to_pylist() if task["own_metrics"] else []
        first, counts = part["first_request"].to_numpy(), part["requests"].to_numpy()
        words, size = part["words"].to_numpy(), part["bytes"].to_numpy()
        tables.append(_Table(task, first, counts, _blocks(part, first), words, size, content))
    return tables


def _blocks(documents: Any, first: np.ndarray) -> list[_Block]:
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
        blocks.append(_Block(rows, first[rows, None] + np.arange(k), right, chars, size, tokens))
    return blocks


def _values(pack: Pack, tables: list[_Table], loglikelihood: np.ndarray, is_greedy: np.ndarray) -> dict[str, Metrics]:
    if len(loglikelihood) != pack.requests.num_rows:
        raise UserError(f"{len(loglikelihood)} scores for a pack of {pack.requests.num_rows} requests; score again")
    kinds = {"multiple_choice": _multiple_choice, "loglikelihood": _single, "loglikelihood_rolling": _rolling}
    values: dict[str, Metrics] = {}
    for table in tables:
        compute = _own if table.task["own_metrics"] else kinds[table.task["output_type"]]
        values[table.task["task"]] = compute(table, loglikelihood, is_greedy)
    for group in pack.manifest["groups"]:
        values[group["group"]] = _group(group, values)
    return values


def _multiple_choice(table: _Table, loglikelihood: np.ndarray, is_greedy: np.ndarray) -> Metrics:
    columns: dict[str, np.ndarray] = {}

    def put(name: str, rows: np.ndarray, values: np.ndarray) -> None:
        columns.setdefault(name, np.full(len(table.first), np.nan))[rows] = values

    for block in table.blocks:
        rows, right = block.rows, block.right
        scored = loglikelihood[block.requests]
        each = np.arange(len(rows))
        put("acc", rows, right[each, scored.argmax(axis=1)])
        put("acc_norm", rows, right[each, _per(scored, block.chars).argmax(axis=1)])
        put("acc_bytes", rows, right[each, _per(scored, block.bytes).argmax(axis=1)])
        put("exact_match", rows, np.any(is_greedy[block.requests] & right, axis=1))
        if table.task["unconditional"]:
            alone = loglikelihood[block.requests + right.shape[1]]
            put("acc_mutual_info", rows, right[each, (scored - alone).argmax(axis=1)])
        known = right.any(axis=1)  # without a right choice there is no probability of it
        rows, right, scored = rows[known], right[known], scored[known]
        mass = _softmax(scored)
        put("brier_score", rows, ((mass - right) ** 2).sum(axis=1))
        put("choice_prob", rows, (mass * right).sum(axis=1))
        put("choice_prob_per_token", rows, (_softmax(_per(scored, block.tokens[known])) * right).sum(axis=1))
        put("choice_prob_per_char", rows, (_softmax(_per(scored, block.chars[known])) * right).sum(axis=1))
        best = np.where(right, scored, -np.inf).max(axis=1)
        put("margin", rows, best - np.where(right, -np.inf, scored).max(axis=1))
        at = np.where(right, scored, -np.inf).argmax(axis=1)
        put("bits_per_byte", rows, -_per(best, block.bytes[known][np.arange(len(at)), at]) / math.log(2))
    return {name: mean_and_stderr(column[np.isfinite(column)].tolist()) for name, column in columns.items()}


def _single(table: _Table, loglikelihood: np.ndarray, is_greedy: np.ndarray) -> Metrics:
    scored = loglikelihood[table.first]
    size = np.concatenate([block.bytes[:, 0] for block in table.blocks])
    size = size[np.argsort(np.concatenate([block.rows for block in table.blocks]))]
    mean = mean_and_stderr(scored.tolist())
    perplexity = _exp(-mean.value)
    return {
        "acc": mean_and_stderr(is_greedy[table.first].astype(float).tolist()),
        "perplexity": Value(perplexity, perplexity * mean.stderr, mean.n),
        "bits_per_byte": mean_and_stderr((-_per(scored, size) / math.log(2)).tolist()),
    }


def _rolling(table: _Table, loglikelihood: np.ndarray, is_greedy: np.ndarray) -> Metrics:
    scored = loglikelihood[table.first]
    metrics: Metrics = {}
    for name, weights in (("word_perplexity", table.words), ("byte_perplexity", table.bytes)):
        if weights.sum() == 0:
            continue
        rate = _ratio(scored, weights)
        perplexity = _exp(-rate.value)
        metrics[name] = Value(perplexity, perplexity * rate.stderr, rate.n)
        if name == "byte_perplexity":
            metrics["bits_per_byte"] = Value(-rate.value / math.log(2), rate.stderr / math.log(2), rate.n)
    return metrics


def _own(table: _Table, loglikelihood: np.ndarray, is_greedy: np.ndarray) -> Metrics:
    """The task's own code. lm-eval is imported here, since only such tasks need it."""
    from fineline_jax.scoring.own_metrics import aggregated

    results = [
        [(float(loglikelihood[i]), bool(is_greedy[i])) for i in range(first, first + count)]
        for first, count in zip(table.first, table.counts, strict=True)
    ]
    return aggregated(table.task["task"], [json.loads(text) for text in table.content], results)


def _group(group: dict[str, Any], values: dict[str, Metrics]) -> Metrics:
    """lm-eval's `Group.aggregate`: weighted by documents with pooled standard error, or the plain mean over tasks."""
    leaves = [values[name] for name in group["tasks"]]
    metrics: Metrics = {}
    for metric in leaves[0]:
        if metric.endswith("perplexity") or not all(metric in leaf for leaf in leaves):
            continue
        parts = [leaf[metric] for leaf in leaves]
        sizes, errors = [part.n for part in parts], [part.stderr for part in parts]
        total = sum(sizes)
        if total == 0:
            continue
        if group["weight_by_size"].get(metric, True):
            value = sum([part.value * part.n for part in parts if part.n]) / total
            pooled = sum([(n - 1) * se**2 * n for n, se in zip(sizes, errors, strict=True)])
            stderr = math.sqrt(pooled / (total - len(sizes)) / total) if total > len(sizes) else math.nan
        else:
            value = sum([part.value for part in parts]) / len(parts)
            stderr = math.sqrt(sum(se**2 for se in errors)) / len(errors)
        metrics[metric] = Value(value, stderr, total)
    return metrics


def _ratio(values: np.ndarray, weights: np.ndarray) -> Value:
    """sum(values) / sum(weights) over documents; Taylor linearisation of a ratio estimator for the standard error."""
    n = len(values)
    ratio = sum(values.tolist()) / int(weights.sum())
    residuals = values - ratio * weights
    stderr = math.sqrt(n / (n - 1) * float((residuals**2).sum())) / int(weights.sum()) if n > 1 else math.nan
    return Value(ratio, stderr, n)


def _per(values: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """An empty choice gives -inf or nan as in lm-eval, without the warning."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return values / lengths


def _softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x - x.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def _exp(x: float) -> float:
    return math.exp(x) if x < 709 else math.inf
