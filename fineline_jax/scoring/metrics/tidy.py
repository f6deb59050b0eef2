"""Metrics of tasks and groups from stored log-likelihoods, without a model.

What a document contributes is defined in `documents`; tasks with their own `process_results`, and f1 and mcc,
are aggregated by lm-eval's code (`process_results`).

Standard errors are lm-eval's: sample standard deviation / sqrt(n) for means; the bootstrap, draw for draw, for
perplexity, f1 and mcc. Where it gives none: for the rolling metrics the delta method for a ratio of sums over
documents, for a task's own kind of f1 the jackknife.
"""

import dataclasses
import json
import logging
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fineline_jax.errors import UserError
from fineline_jax.facts.metrics import has_chance, metric_of
from fineline_jax.facts.score_table import COLUMNS
from fineline_jax.scoring import score_files
from fineline_jax.scoring.estimates import Metrics, Value, exponential, mean_and_stderr, ratio_and_stderr
from fineline_jax.scoring.metrics import bootstrap, documents
from fineline_jax.scoring.metrics.documents import Table
from fineline_jax.scoring.requests import pack as packs
from fineline_jax.scoring.requests.pack import Pack

log = logging.getLogger(__name__)


def tidy(folder: Path) -> pd.DataFrame:
    """One row per (series, checkpoint, task or group, metric) of a scores folder, with the columns COLUMNS.

    A checkpoint with log-likelihoods that are not finite is left out, with a warning.
    Raises UserError if there are no scores, or scores of another pack than the one beside them.
    """
    files = usable(folder)
    pack = packs.load(folder / "pack")
    return of_scores(folder, pack, (score_files.read_for(path, pack) for path in files))


def usable(folder: Path) -> list[Path]:
    """The score files of a folder whose log-likelihoods are finite; a warning names the others."""
    files, broken = score_files.usable_files(folder)
    if broken:
        log.warning("%s: left out, log-likelihoods are NaN or infinite: %s", folder, ", ".join(broken))
    return files


def of_scores(folder: Path, pack: Pack, scores: Iterable[score_files.Scores]) -> pd.DataFrame:
    """`tidy` of scores of `folder` that have been read, in the order of `pack`.

    Checkpoints of a series are ordered by tokens, tasks as in the suite. step and tokens are nullable integers; stderr
    and chance are NaN where there is none; a metric without a value (no document has a right choice) has no row.
    """
    tables = documents.tables(pack)
    headers, values, resampled = [], [], []
    fewer = []
    for result in scores:
        headers.append(result.header)
        if result.header.key.pack_hash != pack.hash:
            fewer.append(f"{result.header.series}/{result.header.checkpoint}")
        values.append(_values(pack, tables, result.loglikelihood, result.is_greedy))
        resampled.append(_resampled(tables, result.loglikelihood))
    if fewer:
        log.warning("%s: asked fewer questions than the others; score them again: %s", folder, ", ".join(fewer))
    _bootstrap(values, resampled)
    rows = [row for header, one in zip(headers, values, strict=True) for row in _rows(pack, header, one)]
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    frame = frame.astype(
        {"step": "Int64", "tokens": "Int64", "value": float, "stderr": float, "n": int, "chance": float}
    )
    return frame.sort_values(["series", "tokens", "step"], kind="stable", ignore_index=True)


def of_tasks(
    pack: Pack, loglikelihood: np.ndarray, is_greedy: np.ndarray, *, resample: bool = True
) -> dict[str, Metrics]:
    """Task or group -> metric -> value; tasks first, in the order of the pack.

    loglikelihood: float64 [requests], is_greedy: bool [requests], in the order of the pack. resample: whether standard
    errors that need a bootstrap, which takes seconds, are wanted; NaN without.
    """
    tables = documents.tables(pack)
    values = _values(pack, tables, loglikelihood, is_greedy)
    if resample:
        _bootstrap([values], [_resampled(tables, loglikelihood)])
    return values


def of_documents(pack: Pack, loglikelihood: np.ndarray, is_greedy: np.ndarray) -> pd.DataFrame:
    """Columns task, doc, metric, value: each document's own contribution, where it has one.

    Tasks that compute their own metrics have those of their metrics that are numbers. Arguments as of `of_tasks`.
    """
    frames = []
    for table in documents.tables(pack):
        columns = (
            _own_columns(table, loglikelihood, is_greedy)
            if table.task["own_metrics"]
            else documents.columns(table, loglikelihood, is_greedy)
        )
        for metric, values in columns.items():
            kept = np.flatnonzero(np.isfinite(values))
            frames.append(
                pd.DataFrame({"task": table.task["task"], "doc": kept, "metric": metric, "value": values[kept]})
            )
    return pd.concat(frames, ignore_index=True)


def _rows(pack: Pack, header: score_files.Header, values: dict[str, Metrics]) -> list[tuple]:
    start = (header.series, header.checkpoint, header.step, header.tokens)
    entries = {row["task"]: row for row in pack.tasks} | {row["group"]: row for row in pack.manifest["groups"]}
    rows = []
    for name, metrics in values.items():
        entry = entries[name]
        chance = math.nan if entry["chance"] is None else entry["chance"]
        for metric, result in metrics.items():
            if not math.isnan(result.value):
                level = chance if has_chance(metric) or metric == entry["metric"] else math.nan
                rows.append((*start, entry["domain"], name, metric, result.value, result.stderr, result.n, level))
    return rows


def _values(pack: Pack, tables: list[Table], loglikelihood: np.ndarray, is_greedy: np.ndarray) -> dict[str, Metrics]:
    if len(loglikelihood) != pack.requests.num_rows:
        raise UserError(f"{len(loglikelihood)} scores for a pack of {pack.requests.num_rows} requests; score again")
    values: dict[str, Metrics] = {}
    for table in tables:
        if np.isnan(loglikelihood[table.requests]).any():
            continue  # asked by a later pack than that of these scores
        values[table.task["task"]] = _of_task(table, loglikelihood, is_greedy)
    listed = {task["task"]: task["lm_eval_metrics"] for task in pack.tasks}
    for group in pack.manifest["groups"]:
        if all(task in values for task in group["tasks"]):
            values[group["group"]] = _group(group, values, listed)
    return values


def _resampled(tables: list[Table], loglikelihood: np.ndarray) -> dict[tuple[str, str], np.ndarray]:
    """(task, metric) -> [documents, ...], what the metrics whose standard error is bootstrapped are made of."""
    samples: dict[tuple[str, str], np.ndarray] = {}
    for table in tables:
        task = table.task["task"]
        if len(table.first) < 2 or table.task["own_metrics"]:
            continue
        if table.task["output_type"] == "loglikelihood":
            samples[task, "perplexity"] = loglikelihood[table.first]
        for metric in _pooled(table):
            from fineline_jax.scoring.metrics.process_results import bootstrapped

            if bootstrapped(table.task, metric):
                samples[task, metric] = np.array(documents.predictions(table, loglikelihood))
    return samples


def _bootstrap(values: list[dict[str, Metrics]], resampled: list[dict[tuple[str, str], np.ndarray]]) -> None:
    """Put the bootstrapped standard errors into the values of all checkpoints: the draws are the same for all."""
    kinds = {"perplexity": bootstrap.of_perplexity, "f1": bootstrap.of_f1, "mcc": bootstrap.of_mcc}
    for task, metric in resampled[0] if resampled else ():
        errors = kinds[metric](np.stack([one[task, metric] for one in resampled]))
        for one, stderr in zip(values, errors, strict=True):
            one[task][metric] = dataclasses.replace(one[task][metric], stderr=float(stderr))


def _pooled(table: Table) -> list[str]:
    """Metrics of predictions taken together."""
    if table.task["output_type"] != "multiple_choice":
        return []
    return sorted({"f1", "mcc"} & set(table.mode.listed_metrics) & set(table.task["lm_eval_metrics"]))


def _of_task(table: Table, loglikelihood: np.ndarray, is_greedy: np.ndarray) -> Metrics:
    """A value that is not finite (an empty choice) is left out of a mean. lm-eval is imported where a task needs it."""
    if table.task["own_metrics"]:
        from fineline_jax.scoring.metrics.process_results import aggregated

        return aggregated(table.task, *_own_arguments(table, loglikelihood, is_greedy))
    if table.task["output_type"] == "loglikelihood_rolling":
        return _rolling(table, loglikelihood)
    columns = documents.columns(table, loglikelihood, is_greedy)
    metrics = {name: mean_and_stderr(column[np.isfinite(column)].tolist()) for name, column in columns.items()}
    if table.task["output_type"] == "loglikelihood":
        mean = mean_and_stderr(loglikelihood[table.first].tolist())
        metrics["perplexity"] = Value(exponential(-mean.value), math.nan, mean.n)
    if pooled := _pooled(table):
        from fineline_jax.scoring.metrics.process_results import of_predictions

        pairs = documents.predictions(table, loglikelihood)
        metrics |= {metric: of_predictions(table.task, metric, pairs) for metric in pooled}
    return metrics


def _rolling(table: Table, loglikelihood: np.ndarray) -> Metrics:
    scored = loglikelihood[table.first]
    metrics: Metrics = {}
    for name, weights in (("word_perplexity", table.words), ("byte_perplexity", table.bytes)):
        if weights.sum() == 0:
            continue
        rate = ratio_and_stderr(scored, weights)
        perplexity = exponential(-rate.value)
        metrics[name] = Value(perplexity, perplexity * rate.stderr, rate.n)
        if name == "byte_perplexity":
            metrics["bits_per_byte"] = Value(-rate.value / math.log(2), rate.stderr / math.log(2), rate.n)
    return metrics


def _own_columns(table: Table, loglikelihood: np.ndarray, is_greedy: np.ndarray) -> documents.Columns:
    from fineline_jax.scoring.metrics.process_results import per_document

    values = per_document(table.task, *_own_arguments(table, loglikelihood, is_greedy))
    return {
        metric: np.array(items, float)
        for metric, items in values.items()
        if all(isinstance(item, int | float | np.number | np.bool_) for item in items)
    }


def _own_arguments(table: Table, loglikelihood: np.ndarray, is_greedy: np.ndarray) -> tuple[list, list]:
    results = [
        [(float(loglikelihood[i]), bool(is_greedy[i])) for i in range(first, first + count)]
        for first, count in zip(table.first, table.counts, strict=True)
    ]
    return [json.loads(text) for text in table.content], results


def _group(group: dict[str, Any], values: dict[str, Metrics], listed: dict[str, list[str]]) -> Metrics:
    """lm-eval's `Group.aggregate`: weighted by documents with pooled standard error, or the plain mean over tasks.

    A metric that the group asks for is that of the tasks that list it, if there are any (`listed`), as in lm-eval;
    other metrics are those of all tasks that have them.
    """
    leaves = [values[name] for name in group["tasks"]]
    metrics: Metrics = {}
    asked = group["weight_by_size"]
    names = (name for leaf in leaves for name in leaf if name in asked or not metric_of(name).log)
    for metric in dict.fromkeys(names):
        having = [name for name in group["tasks"] if metric in values[name]]
        asking = [name for name in having if metric in asked and metric in listed[name]]
        parts = [values[name][metric] for name in asking or having]
        sizes, errors = [part.n for part in parts], [part.stderr for part in parts]
        total = sum(sizes)
        if total == 0:
            continue
        if asked.get(metric, group["weight_others_by_size"]):
            value = sum([part.value * part.n for part in parts if part.n]) / total
            pooled = sum([(n - 1) * se**2 * n for n, se in zip(sizes, errors, strict=True)])
            stderr = math.sqrt(pooled / (total - len(sizes)) / total) if total > len(sizes) else math.nan
        else:
            value = sum([part.value for part in parts]) / len(parts)
            stderr = math.sqrt(sum(se**2 for se in errors)) / len(errors)
        metrics[metric] = Value(value, stderr, total)
    return metrics
