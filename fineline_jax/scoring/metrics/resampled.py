"""What each document contributes to a metric, and a bootstrap over documents, the same at all checkpoints of all runs.

A draw takes each document a random number of times, so that errors which checkpoints share, because they were asked the
same questions, stay shared. Draws depend on the task's name and number of documents alone.
"""

import dataclasses
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from fineline_jax.scoring.estimates import Metrics
from fineline_jax.scoring.metrics import documents
from fineline_jax.scoring.metrics.documents import Table
from fineline_jax.scoring.requests.pack import Pack
from fineline_jax.scoring.score_files import Scores

DRAWS = 200
_Key = tuple[int, str, str]
"""(position of the checkpoint, task or group, metric)"""


def deviations(pack: Pack, scores: Sequence[Scores], draws: int = DRAWS) -> pd.DataFrame:
    """Columns series, checkpoint, task, metric, resampled: float32 [draws], a metric of drawn documents less its value.

    Of metrics that are means over documents, or functions of such means; tasks with code of their own have none.
    """
    found: dict[_Key, np.ndarray] = {}
    for table in documents.tables(pack):
        if table.task["own_metrics"] or not len(table.first):
            continue
        weights = drawn_documents(table.task["task"], len(table.first), draws)
        for metric, (values, sizes) in _columns(table, scores).items():
            found |= {
                (i, table.task["task"], metric): one
                for i, one in enumerate(_deviations(metric, values, sizes, weights)) if np.isfinite(one).all()
            }  # fmt: skip
    for group in pack.manifest["groups"]:
        found |= _of_group(group, found, pack, len(scores))
    rows = [
        (scores[i].header.series, scores[i].header.checkpoint, task, metric, one.astype(np.float32))
        for (i, task, metric), one in found.items()
    ]
    return pd.DataFrame(rows, columns=["series", "checkpoint", "task", "metric", "resampled"])


def with_deviations(pack: Pack, scores: Scores, values: dict[str, Metrics]) -> dict[str, Metrics]:
    """`values` of `tidy.of_tasks` of these scores, with the deviations of the documents where `deviations` has draws.

    Those of a group are its tasks' one after another, weighted as the group weighs them.
    """
    found: dict[tuple[str, str], np.ndarray] = {}
    for table in documents.tables(pack):
        if table.task["own_metrics"] or len(table.first) < 2:
            continue
        for metric, (above, below) in _columns(table, [scores]).items():
            if total := below.sum():
                rate = above.sum() / total
                slope = np.exp(rate) if metric.endswith("perplexity") else 1.0
                found[table.task["task"], metric] = slope * (above - rate * below)[:, 0] * len(above) / total
    for group in pack.manifest["groups"]:
        for metric in {metric for task, metric in found if task in group["tasks"]}:
            parts = [found.get((task, metric)) for task in group["tasks"]]
            if all(part is not None for part in parts):
                weights = _weights(group, metric, pack)
                count = sum(map(len, parts))  # pyright: ignore
                scaled = [w * count / len(part) * part for w, part in zip(weights, parts, strict=True)]  # pyright: ignore
                found[group["group"], metric] = np.concatenate(scaled)
    return {
        task: {
            metric: dataclasses.replace(value, deviations=found.get((task, metric)))
            for metric, value in metrics.items()
        }
        for task, metrics in values.items()
    }


def drawn_documents(task: str, count: int, draws: int) -> np.ndarray:
    """[draws, documents]: how often each document is in each draw."""
    rng = np.random.default_rng(zlib.crc32(f"{task} {count}".encode()))
    return rng.multinomial(count, np.full(count, 1 / count), size=draws).astype(float)


def _columns(table: Table, scores: Sequence[Scores]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Metric -> (values [documents, checkpoints], sizes [documents, checkpoints]) whose sums' quotient is the metric,
    or the logarithm of a perplexity."""
    kind = table.task["output_type"]
    columns: dict[str, list[np.ndarray]] = {}
    scored = np.stack([one.loglikelihood[table.first] for one in scores], axis=1)
    if kind == "loglikelihood_rolling":
        sizes = {"word_perplexity": table.words, "byte_perplexity": table.bytes}
        sizes["bits_per_byte"] = table.bytes * np.log(2)
        full = {name: np.broadcast_to(size[:, None], scored.shape).astype(float) for name, size in sizes.items()}
        return {name: (-scored, size) for name, size in full.items() if size.any()}
    for one in scores:
        for name, values in documents.columns(table, one.loglikelihood, one.is_greedy).items():
            columns.setdefault(name, []).append(values.astype(float))
    found = {}
    for name, parts in columns.items():
        if len(parts) == len(scores):
            values = np.stack(parts, axis=1)
            known = np.isfinite(values)
            found[name] = (np.where(known, values, 0.0), known.astype(float))
    if kind == "loglikelihood":
        found["perplexity"] = (-scored, np.ones(scored.shape))
    return found


def _deviations(metric: str, values: np.ndarray, sizes: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[checkpoints, draws]"""
    shape = (lambda rate: np.exp(rate)) if metric.endswith("perplexity") else (lambda rate: rate)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        whole = shape(values.sum(axis=0) / sizes.sum(axis=0))
        return (shape((weights @ values) / (weights @ sizes)) - whole).T


def _of_group(group: dict[str, Any], found: dict[_Key, np.ndarray], pack: Pack, checkpoints: int) -> dict[_Key, Any]:
    """Weighted as the group weighs its tasks; nothing of a metric that not all tasks have draws of."""
    made = {}
    for metric in {key[2] for key in found if key[1] in group["tasks"]}:
        weights = _weights(group, metric, pack)
        for i in range(checkpoints):
            parts = [found.get((i, task, metric)) for task in group["tasks"]]
            if all(part is not None for part in parts):
                made[i, group["group"], metric] = weights @ np.stack(parts)  # pyright: ignore
    return made


def _weights(group: dict[str, Any], metric: str, pack: Pack) -> np.ndarray:
    """[tasks of the group], their sum is 1."""
    by_size = group["weight_by_size"].get(metric, group["weight_others_by_size"])
    size = {task["task"]: task["documents"] for task in pack.tasks}
    weights = np.array([size[task] if by_size else 1.0 for task in group["tasks"]])
    return weights / weights.sum()
