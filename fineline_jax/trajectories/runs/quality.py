"""Which metric to watch in which phase: signal and noise within a run, and whether runs are told apart early."""

import functools
import math

import numpy as np
import pandas as pd
from scipy import stats

from fineline_jax.facts.metrics import metric_of
from fineline_jax.trajectories.ablation.transfer import decision_interval
from fineline_jax.trajectories.curves.smooth import checkpoint_noise
from fineline_jax.trajectories.curves.split import CURVE, Points, split
from fineline_jax.trajectories.statistics.columns import Chart, Column, Statistic, shots_of

PHASES = 4
"""Parts of a run, equal in log tokens from its first trained checkpoint (at most a thousandth of its end) on."""
SPAN = 1000.0
FEWEST = 5
FRACTIONS = (0.05, 0.1, 0.25, 0.5, 0.75)
FEWEST_RUNS = 4
WATCH_SNR = 3.0
"""From this signal-to-noise ratio of a phase on a metric is recommended for it, the lower end of its interval at 1."""


def phase_quality(table: pd.DataFrame) -> pd.DataFrame:
    """Signal and noise of each (series, metric, task, phase). See `PHASE_QUALITY`."""
    rows = []
    for key, curve in split(table[table["tokens"] > 0], CURVE):
        tokens, values = curve.tokens, curve.value
        meant = metric_of(str(key[1]))
        if meant.log and (values > 0).all():
            values = np.log(values)
        if len(tokens) < FEWEST:
            continue
        edges = np.geomspace(max(tokens[0], tokens[-1] / SPAN), tokens[-1], PHASES + 1)
        for phase in range(PHASES):
            inside = (tokens >= edges[phase] * (1 - 1e-9)) & (tokens <= edges[phase + 1] * (1 + 1e-9))
            row = dict(zip(CURVE, key, strict=True)) | {"phase": str(phase + 1)}
            row |= {"from_tokens": edges[phase], "to_tokens": edges[phase + 1], "checkpoints": int(inside.sum())}
            if inside.sum() < FEWEST:
                rows.append(row | {"reason": f"fewer than {FEWEST} checkpoints in the phase"})
                continue
            rows.append(row | _signal_and_noise(meant.better * values[inside], tokens[inside]))
    return PHASE_QUALITY.frame(rows)


def _signal_and_noise(values: np.ndarray, tokens: np.ndarray) -> dict:
    noise = checkpoint_noise(values, tokens)
    third = max(1, len(values) // 3)
    signal = float(values[-third:].mean() - values[:third].mean())
    if not noise > 0:
        return {"signal": signal, "reason": "the curve does not scatter: it has no noise to compare with"}
    ratio, inner = signal / noise, max(3, (len(values) - 2) // 2)
    # noise^2 has about 2/3 as many degrees of freedom as pseudo-residuals, which overlap
    spread = _noise_factors(2 * inner / 3)
    error = 1.96 * math.sqrt(2 / third)
    low, high = min((ratio - error) * spread), max((ratio + error) * spread)
    row = {"signal": signal, "noise": noise, "snr": ratio, "low": float(low), "high": float(high), "reason": ""}
    return row | {"verdict": "watch" if ratio >= WATCH_SNR and low >= 1 else "too noisy" if ratio < 1 else "unclear"}


@functools.cache
def _noise_factors(freedom: float) -> np.ndarray:
    """95 % limits of the root of a mean square over its expectation."""
    return np.sqrt(np.asarray(stats.chi2.ppf([0.025, 0.975], freedom)) / freedom)


def early_decisions(table: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """Of each (metric, task): how often the better of two runs at the end is the better one before.

    See `EARLY_DECISIONS`. Runs are compared at fractions of the tokens that all have.
    """
    rows = []
    groups: dict[tuple[str, str, str], list[Points]] = {}
    for (metric, task, series), curve in split(table, ("metric", "task", "series")):
        groups.setdefault((metric, task, shots_of(series)), []).append(curve)
    for (metric, task, shots), curves in groups.items():
        row = {"metric": metric, "task": task, "shots": shots, "runs": len(curves)}
        if len(curves) < FEWEST_RUNS:
            rows.append(row | {"reason": f"fewer than {FEWEST_RUNS} runs"})
            continue
        horizon = min(curve.tokens[-1] for curve in curves)
        starts = max(curve.tokens[0] for curve in curves)
        at = np.array([horizon * fraction for fraction in (*FRACTIONS, 1.0)], float)
        values = np.array([np.interp(at, curve.tokens, curve.value) for curve in curves])
        for index, fraction in enumerate(FRACTIONS):
            now = row | {"fraction": str(fraction), "tokens": at[index]}
            if at[index] < starts:
                rows.append(now | {"reason": "before the first checkpoint of a run"})
                continue
            early, end = values[:, index], values[:, -1]
            now["accuracy"], now["low"], now["high"] = decision_interval(early, end, seed)
            rows.append(now | {"reason": ""})
    return EARLY_DECISIONS.frame(rows)


PHASE_QUALITY = Statistic(
    "phase_quality",
    "Which metric to watch in which phase?",
    phase_quality,
    (
        *Column.texts(series="the series", metric="the metric", task="the task"),
        Column("phase", "", "1 to 4: quarters of the training in log tokens"),
        Column("from_tokens", "tokens", "where the phase begins"),
        Column("to_tokens", "tokens", "where it ends"),
        Column("checkpoints", "1", "checkpoints in it"),
        Column("signal", "score", "its last third's mean minus its first's, above 0 for the better", "with few"),
        Column("noise", "score", "scatter from checkpoint to checkpoint without the trend", "with few"),
        *Column.estimate("snr", "1", "their quotient", "without noise"),
        Column("verdict", "", "watch: snr at least 3, low at least 1; too noisy: below 1; unclear", "without snr"),
        Column("reason", "", "why there is no value", "where there is one"),
    ),
    "Signal and Noise, arXiv 2508.13144; scatter: Gasser, Sroka and Jennen-Steinmetz 1986",
    definition="Change over a phase divided by the scatter from checkpoint to checkpoint in it.",
    caveat="A metric may move clearly and yet not tell a good run from a bad one; early decisions say that.",
    chart=Chart("snr", panel="metric"),
    count="checkpoints",
)

EARLY_DECISIONS = Statistic(
    "early_decisions",
    "How early does a metric tell which of two runs will be better?",
    early_decisions,
    (
        *Column.texts(metric="the metric", task="the task"),
        Column("shots", "", "shots that the names of the runs state", "where they state none"),
        Column("fraction", "", "of the tokens that all runs have"),
        Column("runs", "1", "runs, of which each pair is a decision"),
        Column("tokens", "tokens", "where runs are compared", "with few runs"),
        *Column.estimate(
            "accuracy", "1", "share of pairs in the order of the end", "with few runs", "bootstrap of runs"
        ),
        Column("reason", "", "why there is no value", "where there is one"),
    ),
    "DataDecide, arXiv 2504.11393",
    definition="Decision accuracy: share of pairs of runs in the same order at a fraction of training and at the "
    "end; between checkpoints values are interpolated.",
    caveat="Runs of very different size are told apart at once and make every metric look good.",
    chart=Chart("accuracy", panel="metric", reference=0.5),
    count="runs",
)
