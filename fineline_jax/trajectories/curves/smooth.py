"""Levels and noise of a curve: running medians and means, and the scatter from checkpoint to checkpoint."""

import numpy as np


def median_of_three(values: np.ndarray) -> np.ndarray:
    """Running median of 3 with Tukey's end-point rule, so that one odd checkpoint makes or breaks no onset."""
    if len(values) < 5:
        return values
    left, middle, right = values[:-2], values[1:-1], values[2:]
    inner = np.maximum(np.minimum(left, right), np.minimum(np.maximum(left, right), middle))
    first = sorted((values[0], inner[0], 3 * inner[0] - 2 * inner[1]))[1]
    last = sorted((values[-1], inner[-1], 3 * inner[-1] - 2 * inner[-2]))[1]
    return np.concatenate([[first], inner, [last]])


def mean_of_three(values: np.ndarray) -> np.ndarray:
    """Mean of every three consecutive checkpoints, [..., C] -> [..., C - 2]."""
    return (values[..., :-2] + values[..., 1:-1] + values[..., 2:]) / 3


def end_level(values: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Mean over the last half doubling of tokens, [..., C] -> [...]: steadier than the last value alone."""
    return values[..., np.searchsorted(tokens, tokens[-1] / np.sqrt(2)) :].mean(axis=-1)


FEWEST = 5
"""Checkpoints, untrained ones apart, from which a scatter is measured."""


def pseudo_residuals(values: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """[C - 2] of the C trained checkpoints: each inner one minus the line through its two neighbours in log tokens.

    Scaled to the variance of the checkpoints' errors, where these are independent, whatever smooth curve they are
    around (Gasser, Sroka, Jennen-Steinmetz 1986, Biometrika 73:625).
    """
    keep = tokens > 0
    y, x = values[keep], np.log(tokens[keep])
    gap = x[2:] - x[:-2]
    right = np.divide(x[1:-1] - x[:-2], gap, out=np.full(len(gap), 0.5), where=gap > 0)
    return (y[1:-1] - (1 - right) * y[:-2] - right * y[2:]) / np.sqrt(1 + right**2 + (1 - right) ** 2)


def checkpoint_noise(values: np.ndarray, tokens: np.ndarray) -> float:
    """Checkpoint-to-checkpoint standard deviation of the second half of a curve, its trend removed.

    By `pseudo_residuals`. NaN with fewer than 3 of them, 0 where all that is left is rounding.
    """
    rest = pseudo_residuals(values, tokens)
    if len(rest) + 2 < FEWEST:
        return float("nan")
    noise = float(np.sqrt((rest[-max(3, len(rest) // 2) :] ** 2).mean()))
    return noise if noise > 1e-12 * float(np.abs(values[tokens > 0]).max()) else 0.0
