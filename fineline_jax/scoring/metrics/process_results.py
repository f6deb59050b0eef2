"""Metrics of tasks that bring their own `process_results`, and f1 and mcc: lm-eval's code on what is stored."""

import math
from collections import Counter
from typing import Any

import numpy as np

from fineline_jax.errors import UserError
from fineline_jax.scoring.estimates import Metrics, Value, mean_and_stderr
from fineline_jax.scoring.lm_eval_compat import acc_all_stderr, aggregation_kind, aggregation_of, load_yaml
from fineline_jax.scoring.metrics import bootstrap
from fineline_jax.scoring.requests.tasks import definition_file

Results = list[list[tuple[float, bool]]]
"""(log-likelihood, greedy) of each request of each document"""


def aggregated(task: dict[str, Any], documents: list[dict[str, Any]], results: Results) -> Metrics:
    """Metric -> value. task: its entry in the pack.

    Standard errors where lm-eval has them: of means, accuracy over all parts of a question, perplexity.
    Raises UserError if the installed lm-eval has no such task.
    """
    config = _config(task)
    items = per_document(task, documents, results)
    return {metric: _aggregate(aggregation_of(config, metric), values) for metric, values in items.items()}


def per_document(task: dict[str, Any], documents: list[dict[str, Any]], results: Results) -> dict[str, list[Any]]:
    """Metric -> what the task's `process_results` gives for each document that has it."""
    config = _config(task)
    items: dict[str, list[Any]] = {}
    for document, result in zip(documents, results, strict=True):
        for metric, value in config["process_results"](document, result).items():
            items.setdefault(metric, []).append(value)
    return items


def bootstrapped(task: dict[str, Any], metric: str) -> bool:
    """Whether lm-eval bootstraps the standard error of f1 or mcc of a task: not of a task's own kind of f1."""
    return aggregation_kind(aggregation_of(_config(task), metric)) in ("f1", "mcc")


def of_predictions(task: dict[str, Any], metric: str, pairs: list[tuple[int, int]]) -> Value:
    """f1 or mcc by the task's own aggregation of (right choice, chosen one).

    Where lm-eval has no standard error it is the jackknife's; documents with the same pair are left out in the same
    way, so that this takes as many evaluations as there are distinct pairs. NaN where lm-eval bootstraps.
    """
    aggregation = aggregation_of(_config(task), metric)
    jackknife = not bootstrapped(task, metric)
    n = len(pairs)
    try:
        value = float(aggregation(pairs))
        counts = Counter(pairs)
        without = {}
        for pair in counts if n > 2 and jackknife else ():
            rest = list(pairs)
            rest.remove(pair)
            without[pair] = float(aggregation(rest))
    except ValueError as error:  # scikit-learn's: f1 of two classes for more
        raise UserError(f"task {task['task']!r}: lm-eval's {metric} fails on its documents: {error}") from None
    if not without:
        return Value(value, math.nan, n)
    centre = sum(count * without[pair] for pair, count in counts.items()) / n
    spread = sum(count * (without[pair] - centre) ** 2 for pair, count in counts.items())
    return Value(value, math.sqrt((n - 1) / n * spread), n)


def _config(task: dict[str, Any]) -> dict[str, Any]:
    path = definition_file(task["task"], task["config_sha256"])
    if path is None or not path.is_file():
        raise UserError(
            f"task {task['task']!r} computes its own metrics, and this lm-eval has no such task; install the pack's"
            " version, or prepare the suite on this machine with the --include-path of the task's file"
        )
    return load_yaml(path)


def _aggregate(aggregation: Any, items: list[Any]) -> Value:
    kind = aggregation_kind(aggregation)
    if kind == "mean":
        return mean_and_stderr(items)
    value, several = float(aggregation(items)), len(items) > 1
    if kind == "perplexity" and several:
        return Value(value, float(bootstrap.of_perplexity(np.array([items]))[0]), len(items))
    if kind == "acc_all" and len({document["idx"]["question"] for _, document in items}) > 1:
        return Value(value, float(acc_all_stderr(items)), len(items))
    return Value(value, math.nan, len(items))
