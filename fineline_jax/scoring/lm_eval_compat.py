"""All that is used of lm-eval beyond its documented interface, and all that is replaced in it, in one place.

Written for lm-eval 0.4.13. The pre-release 0.5.0.dev1 is answered too, for building requests, computing metrics and the
backend; its evaluator takes results in another form, so that no files are exported with it. Each name and replacement
has a test that fails when lm-eval changes: tests/scoring/lm_eval/test_compat.py.
"""

import ast
import contextlib
import dataclasses
import functools
import importlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import lm_eval.api.metrics
import lm_eval.utils
from lm_eval.api.metrics import mean, perplexity
from lm_eval.api.registry import aggregation_registry, get_aggregation, metric_registry
from lm_eval.config.task import TaskConfig
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.evaluator_utils import _process_results
from lm_eval.loggers import EvaluationTracker
from lm_eval.loggers.utils import add_env_info
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Entry, Kind, TaskIndex
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.utils import handle_non_serializable, hash_string

__all__ = [
    "DEFAULT_OTHER_SEED", "DEFAULT_RANDOM_SEED", "Entry", "EvaluationTracker", "Kind", "TaskIndex", "TaskManager",
    "add_env_info", "get_aggregation", "handle_non_serializable", "hash_string", "load_yaml", "mean",
]  # fmt: skip

LATER = not hasattr(lm_eval.api.metrics, "acc_all")
"""Whether lm-eval is 0.5 or its pre-release."""
BOOTSTRAP_MODULE = importlib.import_module("lm_eval.api.metrics.stderr") if LATER else lm_eval.api.metrics
"""Where `stderr_for_metric` looks up `bootstrap_stderr`."""

METRICS, AGGREGATIONS = tuple(metric_registry), tuple(aggregation_registry)
"""Names that a definition may use."""
DEFINITION_KEYS = (*(field.name for field in dataclasses.fields(TaskConfig)), "tag", "group", "task_list", "class")
"""Of a task."""

# --- task definitions -------------------------------------------------------------------------------------------------

if not LATER:
    # 0.4 compiles the same few templates again for every document and every shot: 15 times the time of using them.
    vars(lm_eval.utils.env)["from_string"] = functools.lru_cache(maxsize=1024)(lm_eval.utils.env.from_string)


def tasks_folder() -> Path:
    """lm-eval's own task definitions."""
    return Path(str(lm_eval.__file__)).parent / "tasks"


def task_index(manager: TaskManager) -> dict[str, Entry]:
    """Name -> definition of all that `manager` can load; what is put in can be loaded as well."""
    return manager._index


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """lm-eval warns about every default of every task definition."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def load(
    manager: TaskManager,
    name: str,
    load_dataset: Callable[..., Any] | None = None,
    check_config: Callable[[dict[str, Any]], None] = lambda config: None,
    check_task: Callable[[Any], None] = lambda task: None,
) -> dict[str, Any]:
    """{"tasks": name -> task object, "groups": name -> group object}, documents included.

    load_dataset: instead of `datasets.load_dataset`. check_config is called with each definition before lm-eval reads
    it, check_task with the task once its columns are known, also where lm-eval then fails on its first document; the
    columns are a note of that error.
    """
    from lm_eval.api.task import ConfigurableTask

    original = ConfigurableTask.__init__

    def init(task: Any, *arguments: Any, config: Any = None, **options: Any) -> None:
        check_config(config or {})
        try:
            original(task, *arguments, config=config, **options)
        except Exception as error:
            if known := getattr(task, "features", None):
                check_task(task)
                error.add_note(f"its columns are {', '.join(known)}")
            raise
        check_task(task)

    patch = mock.patch.object(datasets, "load_dataset", _by_split(load_dataset)) if load_dataset else None
    with patch or contextlib.nullcontext(), mock.patch.object(ConfigurableTask, "__init__", init):
        loaded = manager.load([name])
        if LATER:  # which reads documents when they are asked for
            for task in loaded["tasks"].values():
                _ = task.dataset
    # 0.5 calls a task that only its group defines by both names
    return {**loaded, "tasks": {task.task_name: task for task in loaded["tasks"].values()}}


def _by_split(load_dataset: Callable[..., Any]) -> Callable[..., Any]:
    """0.5 asks for a list of splits, each with an empty slice behind its name."""

    def load(path: str, name: str | None = None, split: Any = None, **options: Any) -> Any:
        if not isinstance(split, list):
            return load_dataset(path, name, split=split, **options)
        return [load_dataset(path, name, split=one.removesuffix("[:]"), **options) for one in split]

    return load


def columns(task: Any) -> list[str]:
    """Of a task's documents."""
    return list(getattr(task, "features", None) or task.eval_docs.features)


def aggregated_metrics(group: Any) -> tuple[tuple[str, bool], ...]:
    """(metric, whether weighted by the number of documents) of a group object."""
    return tuple((one.metric, bool(one.weight_by_size)) for one in group.aggregate_metric_list or ())


# --- requests ---------------------------------------------------------------------------------------------------------


def generation_prefix(task: Any, doc: Mapping[str, Any]) -> str | None:
    """What the task puts before the answer."""
    return task._resolve_field(doc, task.config.gen_prefix) if LATER else task.doc_to_prefix(doc)


def request_arguments(
    task: Any, doc: Mapping[str, Any], doc_id: int, context: Any, *, chat: bool = False
) -> list[tuple[Any, ...]]:
    """(context, continuation), or (text,) of a whole text, of each request of a document; chat: the context ends with
    the head of a turn."""
    options = {"apply_chat_template": True} if chat else {}
    if not LATER:
        built = task.construct_requests(doc=doc, ctx=context, metadata=(task.config.task, doc_id, 1), **options)
    else:
        built = task.construct_requests(doc=doc, ctx=context, doc_id=doc_id, **options) or []
    instances = built if isinstance(built, list) else [built]
    if LATER and task.OUTPUT_TYPE == "loglikelihood_rolling":  # an empty context and the text
        return [one.args[1:] for one in instances]
    return [one.args for one in instances]


def right_answer(task: Any, doc: Mapping[str, Any]) -> Any:
    """What a question's label is: an index, a text, or a list of them. As in `ConfigurableTask.process_results`."""
    if LATER:
        answer = task.doc_to_target(doc)
        return -100 if answer is None else answer
    return task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)


def choices(task: Any, doc: Mapping[str, Any]) -> list[str]:
    """The texts that are compared; where each has its own context (winogrande), these."""
    several_contexts = LATER and task._multiple_inputs
    return task.doc_to_text(doc) if several_contexts else task.doc_to_choice(doc)


def has_several_targets(task: Any) -> bool:
    return bool(task._multiple_targets if LATER else task.multiple_target)


def fewshot_config(task: Any) -> Any:
    """How solved examples are worded."""
    return task.fewshot_cfg if hasattr(task, "fewshot_cfg") else task._fewshot_cfg


def target_as_shown(task: Any, doc: Mapping[str, Any]) -> Any:
    """The target of a document as a solved example would word it; a list of texts where there are several."""
    target = task.doc_to_target(doc, fewshot_config(task).doc_to_target)
    if LATER and isinstance(target, str) and target[:1] == "[" and target[-1:] == "]":  # 0.4 reads it as a list
        with contextlib.suppress(ValueError, SyntaxError):
            return ast.literal_eval(target)
    return target


def words_and_bytes(task: Any, doc: Mapping[str, Any]) -> tuple[int, int]:
    """Weights of the rolling metrics, asked of the task itself: wikitext counts those of the page before it was
    detokenised."""
    items = task.process_results(doc, (0.0,))
    if items is None:  # 0.5, where only such tasks answer
        text = task.doc_to_target(doc)
        return task.count_words(text), task.count_bytes(text)
    words = items.get("word_perplexity", (0.0, 0))[1]
    size = items.get("byte_perplexity", items.get("bits_per_byte", (0.0, 0)))[1]
    return int(words), int(size)


def delimited(prefix: str, text: str) -> str:
    """`text` behind `prefix`, with a space between them where lm-eval puts one."""
    module = importlib.import_module("lm_eval.api._utils" if LATER else "lm_eval.api.utils")
    return module.maybe_delimit(prefix, text, " ")


# --- metrics ----------------------------------------------------------------------------------------------------------


def acc_all_stderr(items: list[Any]) -> float:
    return lm_eval.api.metrics.acc_all_stderr(items)  # pyright: ignore[reportAttributeAccessIssue]


def aggregation_of(config: Mapping[str, Any], metric: str) -> Callable[[Any], Any]:
    """As `ConfigurableTask.__init__`: the one named, else the metric's default; what is not listed is averaged."""
    for entry in config.get("metric_list") or ():
        if entry["metric"] == metric:
            chosen = entry.get("aggregation") or default_aggregation(metric) or mean
            aggregation = get_aggregation(chosen) if isinstance(chosen, str) else chosen
            if aggregation is None:
                raise LookupError(f"lm-eval has no aggregation {chosen!r}")
            return aggregation
    return mean


def default_aggregation(metric: str) -> Any:
    """The function that lm-eval aggregates a metric of its own by."""
    if not LATER:
        from lm_eval.api.registry import get_metric_aggregation

        return get_metric_aggregation(metric)
    return metric_registry.get(metric).aggregation if metric in metric_registry else None


def aggregation_kind(aggregation: Any) -> str | None:
    """mean, perplexity, f1, mcc or acc_all if it is lm-eval's own function of that name; None: a task's own."""
    metrics = lm_eval.api.metrics
    if LATER:
        owner = type(getattr(aggregation, "__self__", None))
        kinds = {metrics.Perplexity: "perplexity", metrics.F1: "f1", metrics.MCC: "mcc"}  # pyright: ignore[reportAttributeAccessIssue]
        known = {mean: "mean", perplexity: "perplexity"}.get(aggregation)
        return known or (kinds.get(owner) if getattr(aggregation, "__name__", "") == "aggregation" else None)
    named = {
        mean: "mean",
        perplexity: "perplexity",
        metrics.f1_score: "f1",
        metrics.matthews_corrcoef: "mcc",
        metrics.acc_all: "acc_all",
    }
    return named.get(aggregation)


@contextlib.contextmanager
def bootstrap_by(stderr: Callable[[str, Any, int], float | None]) -> Iterator[None]:
    """Inside, lm-eval's bootstrapped standard errors are `stderr(kind, values, resamples)`, kind as of
    `aggregation_kind`; where that is None, lm-eval's own, in this process: a pool would fork beside JAX's threads."""
    original = BOOTSTRAP_MODULE.bootstrap_stderr

    def bootstrap_stderr(f: Callable[[Any], Any], xs: Any, iters: int) -> float:
        kind = aggregation_kind(f)
        error = None if kind is None else stderr(kind, xs, iters)
        return original(f, xs, iters) if error is None else error

    serial = mock.patch.dict(os.environ, {"DISABLE_MULTIPROC": "1"})
    if LATER:
        serial = mock.patch.object(BOOTSTRAP_MODULE, "DISABLE_MULTIPROC", True)
    with serial, mock.patch.object(BOOTSTRAP_MODULE, "bootstrap_stderr", bootstrap_stderr):
        yield


# --- results ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def documents_replaced(documents: Callable[[Any], Any]) -> Iterator[None]:
    """Inside, tasks load no data set: the documents of a task object are `documents(task)`, processed already."""
    from lm_eval.api.task import ConfigurableTask

    replaced = {
        "download": lambda task, *arguments, **options: None,
        "fewshot_docs": lambda task: None,
        "eval_docs": property(documents),
    }
    with mock.patch.multiple(ConfigurableTask, **replaced):
        yield


def evaluation_results(accumulated: dict[str, Any], groups: dict[str, Any], resamples: int) -> dict[str, Any]:
    """What `lm_eval.evaluate` returns, from task name -> {task, raw_metrics, logged_samples}, samples included."""
    result = _process_results(accumulated, groups, resamples)
    return dict(result._to_eval_results(samples=result.samples))
