"""Intervals and p values that several statistics share; a level of 5 % throughout."""

import math

import numpy as np
from scipy import stats

LEVEL = 0.05


def interval(mean: float, stderr: float, freedom: float) -> tuple[float, float]:
    """95 % interval with Student's t; NaN without degrees of freedom."""
    half = float(stats.t.ppf(1 - LEVEL / 2, freedom)) * stderr if freedom > 0 else math.nan
    return mean - half, mean + half


def student(difference: float, stderr: float, freedom: float) -> dict[str, float]:
    """Columns p (two-sided, against 0), low and high of a difference with Student's t; stderr and freedom above 0."""
    low, high = interval(difference, stderr, freedom)
    return {"p": float(2 * stats.t.sf(abs(difference / stderr), freedom)), "low": low, "high": high}


def fisher_z(correlation: float, stderr: float) -> tuple[float, float]:
    """95 % interval of a correlation whose inverse hyperbolic tangent has this standard error (Fisher 1921)."""
    with np.errstate(divide="ignore"):
        low, high = np.tanh(np.arctanh(correlation) + 1.96 * stderr * np.array([-1.0, 1.0]))
    return float(low), float(high)


def kendall_interval(tau: float, count: int) -> tuple[float, float]:
    """95 % interval of Kendall's tau of `count` pairs of values: Fisher's z with variance .437 / (n - 4)."""
    return fisher_z(tau, math.sqrt(0.437 / (count - 4)) if count > 4 else math.inf)


def holm(p: np.ndarray) -> np.ndarray:
    """p values adjusted for all of them by Holm 1979: at most the level of false verdicts among them; NaN stays."""
    known = np.flatnonzero(np.isfinite(p))
    order = known[np.argsort(p[known], kind="stable")]
    adjusted = np.full(len(p), np.nan)
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(factors * p[order]), 1.0)
    return adjusted


def false_discovery(p: np.ndarray, family: np.ndarray | None = None) -> np.ndarray:
    """p values adjusted by Benjamini and Hochberg 1995: the share of false ones among those called; NaN stays.

    family: codes of the families within which they are adjusted; None: all are one.
    """
    adjusted = np.full(len(p), np.nan)
    known = np.flatnonzero(np.isfinite(p))
    codes = np.zeros(len(p), int) if family is None else family
    order = known[np.argsort(codes[known], kind="stable")]
    for members in np.split(order, np.flatnonzero(np.diff(codes[order])) + 1):
        if len(members):
            adjusted[members] = stats.false_discovery_control(p[members])
    return adjusted
