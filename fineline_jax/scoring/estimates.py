"""A metric of a task as a value with its standard error: means as lm-eval has them, ratios of sums."""

import dataclasses
import math
from collections.abc import Iterable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Value:
    """A metric of a task."""

    value: float
    stderr: float
    """NaN if there is none."""
    n: int
    """Documents."""
    deviations: np.ndarray | None = dataclasses.field(default=None, compare=False, repr=False)
    """float [documents]: what each contributes to `value` beyond it, whose mean is 0, of a ratio of sums by
    linearisation; None: not asked for, or not known."""


Metrics = dict[str, Value]


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


def change(before: Value, after: Value) -> Value:
    """after - before, with the standard error of the documents' differences where both have the same documents: what
    makes a question easy or hard is the same at both. Else as of independent values."""
    a, b = before.deviations, after.deviations
    if a is None or b is None or len(a) != len(b) or len(a) < 2:
        return Value(after.value - before.value, math.hypot(before.stderr, after.stderr), min(before.n, after.n))
    return Value(after.value - before.value, float((b - a).std(ddof=1)) / math.sqrt(len(a)), after.n)


def ratio_and_stderr(values: np.ndarray, weights: np.ndarray) -> Value:
    """sum(values) / sum(weights) over documents; Taylor linearisation of a ratio estimator for the standard error."""
    n = len(values)
    ratio = sum(values.tolist()) / int(weights.sum())
    residuals = values - ratio * weights
    stderr = math.sqrt(n / (n - 1) * float((residuals**2).sum())) / int(weights.sum()) if n > 1 else math.nan
    return Value(ratio, stderr, n)


def exponential(x: float) -> float:
    """exp(x), infinite beyond the largest number."""
    return math.exp(x) if x < 709 else math.inf
