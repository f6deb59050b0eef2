"""Documents with k choices as arrays, and the metrics of their log-likelihoods l that several modes share.

choice_prob     softmax(l) at the right choice; `_per_token` and `_per_char`: softmax of l / length
margin          l of the right choice less the best wrong one, in nats
bits_per_byte   -l of the right choice / (bytes ln 2)
"""

import dataclasses
import math

import numpy as np

Columns = dict[str, np.ndarray]
"""Metric -> float [documents], NaN where a document has no value."""
SMOOTH_METRICS = ("choice_prob", "choice_prob_per_token", "choice_prob_per_char", "margin", "bits_per_byte")


@dataclasses.dataclass(frozen=True)
class Choices:
    """The documents of a task that have the same number of choices k."""

    rows: np.ndarray
    """int [documents]: their positions within the task"""
    requests: np.ndarray
    """int [documents, k]"""
    right: np.ndarray
    """bool [documents, k]; no choice is right where lm-eval's gold is -100"""
    chars: np.ndarray
    """float [documents, k]: lengths of the choices, as are the next two"""
    bytes: np.ndarray
    tokens: np.ndarray


def chosen_is_right(choices: Choices, values: np.ndarray) -> np.ndarray:
    """bool [documents]: whether the choice with the largest of `values` [documents, k] is right."""
    return choices.right[np.arange(len(values)), values.argmax(axis=1)]


def smooth_metrics(choices: Choices, loglikelihood: np.ndarray) -> Columns:
    """SMOOTH_METRICS, functions of the log-likelihoods [documents, k] without steps; NaN where no choice is right."""
    right, known = choices.right, choices.right.any(axis=1)
    best = np.where(right, loglikelihood, -np.inf).max(axis=1)
    at = np.where(right, loglikelihood, -np.inf).argmax(axis=1)
    values = {
        "choice_prob": (softmax(loglikelihood) * right).sum(axis=1),
        "choice_prob_per_token": (softmax(per_length(loglikelihood, choices.tokens)) * right).sum(axis=1),
        "choice_prob_per_char": (softmax(per_length(loglikelihood, choices.chars)) * right).sum(axis=1),
        "margin": best - np.where(right, -np.inf, loglikelihood).max(axis=1),
        "bits_per_byte": bits_per_byte(best, choices.bytes[np.arange(len(at)), at]),
    }
    return {name: np.where(known, value, np.nan) for name, value in values.items()}


def bits_per_byte(loglikelihood: np.ndarray, size: np.ndarray) -> np.ndarray:
    return -per_length(loglikelihood, size) / math.log(2)


def per_length(values: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """An empty choice gives -inf or NaN as in lm-eval, without the warning."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return values / lengths


def softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x - x.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)
