"""Metrics of tasks that bring their own `process_results`: lm-eval's code on the stored documents."""

import math
from typing import Any

from lm_eval.api.metrics import mean, perplexity
from lm_eval.api.registry import get_aggregation
from lm_eval.tasks._yaml_loader import load_yaml

from fineline_jax.errors import UserError
from fineline_jax.scoring.metrics import Metrics, Value, mean_and_stderr
from fineline_jax.scoring.tasks import definition_file


def aggregated(task: str, documents: list[dict[str, Any]], results: list[list[tuple[float, bool]]]) -> Metrics:
    """Metric -> value; results: (log-likelihood, greedy) of each request of each document.

    Standard errors for means and perplexity only. Raises UserError if the installed lm-eval has no such task.
    """
    path = definition_file(task)
    if path is None:
        raise UserError(
            f"task {task!r} computes its own metrics, and this lm-eval has no such task; install the pack's version"
        )
    config = load_yaml(path)
    items: dict[str, list[Any]] = {}
    for document, result in zip(documents, results, strict=True):
        for metric, value in config["process_results"](document, result).items():
            items.setdefault(metric, []).append(value)
    return {metric: _aggregate(_aggregation(config, metric), values) for metric, values in items.items()}


def _aggregation(config: dict[str, Any], metric: str) -> Any:
    for entry in config.get("metric_list") or ():
        if entry["metric"] == metric and "aggregation" in entry:
            chosen = entry["aggregation"]
            return get_aggregation(chosen) if isinstance(chosen, str) else chosen
    return mean


def _aggregate(aggregation: Any, items: list[Any]) -> Value:
    if aggregation is mean:
        return mean_and_stderr(items)
    if aggregation is perplexity:
        rate = mean_and_stderr(items)
        value = math.exp(-rate.value)
        return Value(value, value * rate.stderr, rate.n)
    return Value(float(aggregation(items)), math.nan, len(items))
