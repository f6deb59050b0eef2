"""What a scoring mode is, and which metrics a suite may name in it."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from fineline_jax.errors import UserError
from fineline_jax.scoring.modes.choices import Choices, Columns
from fineline_jax.scoring.modes.encode import Encoder, Tokens

SOLUTION_METRICS = ("bits_per_byte", "bits_per_byte_best", "greedy_match")
TEXT_METRICS = {
    "loglikelihood": ("acc", "perplexity", "bits_per_byte"),
    "loglikelihood_rolling": ("bits_per_byte", "word_perplexity", "byte_perplexity"),
    "generate_until": SOLUTION_METRICS,
}
"""Metrics of tasks without choices, the same in every mode; the first is reported first where a suite names none."""


@dataclasses.dataclass(frozen=True)
class Mode:
    """How requests are encoded and compared."""

    name: str
    encode: Callable[[Encoder, Sequence[tuple[str, str]]], list[tuple[Tokens, Tokens]]]
    """(context, continuation) of every request -> the tokens fed as context and the tokens scored. Raises UserError."""
    compare: Callable[[Choices, np.ndarray, np.ndarray, np.ndarray | None], Columns]
    """Metric -> value of each document, from (choices, log-likelihoods, greedy flags, log-likelihoods without the
    question), each [documents, k]; the last is None unless the task's definition lists acc_mutual_info."""
    choice_metrics: tuple[str, ...]
    """What `compare` gives for every multiple-choice task."""
    default_metric: str
    """Of `choice_metrics`, reported first where a suite names none."""
    counterparts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Metric that a suite names for another mode -> what it is read as."""
    listed_metrics: tuple[str, ...] = ()
    """Given besides for multiple-choice tasks whose definition lists them."""
    context_limit: int | None = None
    """Tokens of a request that are fed at most, and never more than the model's context; None: as asked, even beyond
    the model's context, as lm-eval's max_length."""
    delimiter_counts: bool = False
    """Whether the length of a choice includes the space before it."""
    groups_weighted_by_size: bool = True
    """Whether the tasks of a group count by their documents where the group does not say."""
    only_choices: bool = False
    """Whether tasks that are no questions with choices are refused."""


def first_metric(mode: Mode, output_type: str, wanted: str | None) -> str:
    """The metric reported first; a metric of another mode that a suite names is read as its counterpart."""
    if output_type == "multiple_choice":
        return mode.counterparts.get(wanted, wanted) if wanted else mode.default_metric
    if output_type == "generate_until" and wanted not in SOLUTION_METRICS:  # in a group with others
        return SOLUTION_METRICS[0]
    return wanted or TEXT_METRICS[output_type][0]


def check_metric(mode: Mode, task: str, output_type: str, wanted: str, listed: Collection[str], computes: bool) -> None:
    """Raise UserError for a metric that a suite names for a task, and nothing computes.

    listed: the metrics that the task's definition aggregates; computes: whether the task computes them itself.
    """
    known = set(listed) if computes else _computed(mode, output_type, listed)
    choices = output_type == "multiple_choice" and not computes
    if (first_metric(mode, output_type, wanted) if choices else wanted) not in known:
        raise UserError(f"task {task!r} has no metric {wanted!r}; name one of {', '.join(sorted(known))}")


def not_computed(mode: Mode, output_type: str, listed: Collection[str], computes: bool) -> list[str]:
    """Metrics that a task's definition lists and that are not computed; arguments as of `check_metric`."""
    known = _computed(mode, output_type, listed) | mode.counterparts.keys()
    return [] if computes else [one for one in listed if one not in known]


def _computed(mode: Mode, output_type: str, listed: Collection[str]) -> set[str]:
    if output_type != "multiple_choice":
        return {*TEXT_METRICS[output_type]}
    return {*mode.choice_metrics, *(set(mode.listed_metrics) & set(listed))}


def check_task(mode: Mode, task: str, output_type: str, computes: bool) -> None:
    """Raise UserError for a task that the mode does not define; `computes` as of `check_metric`."""
    if mode.only_choices and (output_type != "multiple_choice" or computes):
        raise UserError(f"task {task!r}: mode {mode.name} compares the choices of a question; drop this task")


def largest_context(mode: Mode, asked: int | None) -> int | None:
    """Tokens of a request that are fed at most, as a pack states it; None: as many as the model takes."""
    return asked if mode.context_limit is None else min(asked or mode.context_limit, mode.context_limit)


def context_of_model(mode: Mode, largest: int | None, model: int) -> int:
    """Tokens that a model of context `model` is fed at most; `largest` as `largest_context` gives it."""
    return largest or model if mode.context_limit is None else min(largest or model, model)
