"""What a task's definition may hold: keys and metrics that lm-eval knows, and columns that its documents have.

lm-eval takes a text that names no column as the text itself, drops a metric that it does not compute for the type of
task, and at most logs it. A slip of the pen would be scored as 0, or not at all.
"""

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fineline_jax.errors import UserError, near
from fineline_jax.facts.metrics import METRICS, metric_of
from fineline_jax.scoring import lm_eval_compat

_LOG = logging.getLogger(__name__)


def check_config(config: dict[str, Any], own: Path | None, asked: Path | None) -> None:
    """Raise UserError for an unknown key and, in a file of one's own, for a metric that would not be what it says.

    config: as lm-eval reads it from YAML, before it looks for metrics on the hub. own: the file of one's own that
    defines the task; asked: that of the group that lists it.
    """
    task, keys = f"task {config.get('task')!r}", lm_eval_compat.DEFINITION_KEYS
    for key in sorted(config.keys() - set(keys)):
        file = next((one for one in (own, asked) if one and key in one.read_text()), own or asked)
        raise UserError(f"{file or 'lm-eval'}: {task} has the unknown key {key!r}{near(key, keys)}; correct it")
    if asked and "::" in config.get("task", "") and not config.keys() - {"task", "metadata"}:
        raise UserError(
            f"{asked}: it lists task {config['task'].partition('::')[2]!r}, which no file defines; correct it"
        )
    if own and not config.keys() & {"class", "use_prompt", "custom_dataset"}:
        needed = ["dataset_path", "doc_to_text", "doc_to_target", "doc_to_choice"]
        for key in needed if config.get("output_type") == "multiple_choice" else needed[:3]:
            if config.get(key) is None:
                raise UserError(f"{own}: {task} has no key {key!r}; add it, for an empty text as {key}: ''")
    metrics, aggregations = lm_eval_compat.METRICS, lm_eval_compat.AGGREGATIONS
    entries = config.get("metric_list") or () if own else ()
    if not isinstance(entries, list | tuple) or not all(isinstance(one, dict) and "metric" in one for one in entries):
        raise UserError(f"{own}: {task}: metric_list must be a list of entries such as {{metric: acc}}; correct it")
    for entry in entries:
        metric, aggregation = entry["metric"], entry.get("aggregation")
        where = f"{own}: {task}, metric {metric!r}"
        if isinstance(aggregation, str) and aggregation not in aggregations:
            raise UserError(
                f"{where}: lm-eval has no aggregation {aggregation!r}{near(aggregation, aggregations)}; correct it"
            )
        if callable(config.get("process_results")) or not isinstance(metric, str) or entry.get("hf_evaluate"):
            continue
        if metric not in metrics:
            raise UserError(f"{where}: lm-eval has no such metric{near(metric, metrics)}; correct it")
        if metric not in METRICS:
            continue
        higher = metric_of(metric).better > 0
        if entry.get("higher_is_better", higher) is not higher:
            raise UserError(f"{where}: higher_is_better is {str(higher).lower()}; correct it, or leave it out")
        function = lm_eval_compat.get_aggregation(aggregation) if isinstance(aggregation, str) else aggregation
        if function not in (None, lm_eval_compat.default_aggregation(metric)) and metric not in ("f1", "mcc"):
            raise UserError(f"{where} is not computed by aggregation {aggregation!r}; leave the aggregation out")


def check_columns(definition: Any, file: Path | None) -> None:
    """Raise UserError if a task's `doc_to_*` is a single word and no column of its documents, so that lm-eval would
    take the word itself; a right answer may be the text of a choice."""
    config, columns = definition.config, lm_eval_compat.columns(definition)
    for key in () if config.use_prompt else ("doc_to_text", "doc_to_choice", "doc_to_target"):
        word = getattr(config, key)
        if not isinstance(word, str) or word in columns or not re.fullmatch(r"[^\W\d]\w*", word):
            continue
        if key == "doc_to_target" and config.process_results:
            continue
        if key == "doc_to_target" and config.doc_to_choice is not None:
            try:
                if word in lm_eval_compat.choices(definition, definition.eval_docs[0]):
                    continue
            except Exception:  # a fault of the choices, which lm-eval names
                continue
        raise UserError(
            f"{file or 'lm-eval'}: task {config.task!r}, {key}: {word!r} is no column of its documents"
            f"{near(word, columns)}; they have {', '.join(columns)}"
        )


def check_group(name: str, file: Path, metrics: Sequence[str], tasks: Sequence[Any]) -> None:
    """Raise UserError if a group of one's own aggregates a metric that none of its tasks has."""
    known = {*METRICS, *(metric for task in tasks for metric in task.aggregation())}
    for metric in set(metrics) - known:
        raise UserError(
            f"{file}: group {name!r}: no task of it has the metric {metric!r}{near(metric, known)}; correct it"
        )


def check_right_choices(task: str, file: Path | None, gold: Sequence[Sequence[int]], choices: Sequence[int]) -> None:
    """Raise UserError if no document has a right choice: all metrics would be 0. Where some have none, say so, since
    they count as wrong. gold: of each document; choices: how many it has."""
    found = [any(0 <= i < count for i in right) for right, count in zip(gold, choices, strict=True)]
    if not any(found):
        why = "it must be the number of a choice, from 0, or its text"
        raise UserError(f"{file or 'lm-eval'}: task {task!r}: doc_to_target gives no choice of any document; {why}")
    if wrong := found.count(False):
        why = f"the right answer of {wrong} of {len(found)} documents is none of their choices"
        _LOG.warning("task %s: %s, and counts as wrong", task, why)
