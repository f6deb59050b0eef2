"""Forecasts of the largest size: planted laws are found, broken ones are refused, little data is declined."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from fineline_jax.trajectories.statistics.laws import Run, predict
from fineline_jax.trajectories.statistics.scaling import SCALING, forecast, scaling

SIZES = (7e7, 1.6e8, 4.1e8, 1e9, 3e9)


def score(size: float, tokens: np.ndarray) -> np.ndarray:
    return np.exp(-40 * (6 * size * tokens) ** -0.09)


def family(sizes=SIZES, shots: str = "") -> pd.DataFrame:
    """Runs of 20 tokens per parameter, eight checkpoints; the score follows the direct form."""
    parts = []
    for size in sizes:
        tokens = np.linspace(0, 20 * size, 9)[1:]
        part = pd.DataFrame({"series": f"m-{size / 1e6:g}m{shots}", "tokens": tokens, "value": score(size, tokens)})
        parts.append(part.assign(task="t", metric="acc", stderr=0.005, chance=0.05, domain="d", n=1000.0))
    return pd.concat(parts, ignore_index=True)


def test_a_planted_law_predicts_the_largest_size():
    [row] = scaling(family()).to_dict("records")
    tokens = np.linspace(0, 20 * 3e9, 9)[1:]
    truth = score(3e9, tokens)[-2:].mean()  # a quarter of eight checkpoints is the end of a run
    assert (row["verdict"], row["form"], row["sizes"], row["held_out"]) == ("kept", "direct", 4, 3e9)
    assert row["measured"] == pytest.approx(truth)
    assert row["predicted"] == pytest.approx(truth, abs=0.003) and row["low"] <= row["predicted"] <= row["high"]
    assert row["best_small"] == pytest.approx(score(1e9, np.linspace(0, 2e10, 9)[-2:]).mean())
    assert row["error"] < 0.2 * row["error_of_best_small"]
    assert list(scaling(family()).columns) == [column.name for column in SCALING.columns]


def test_the_interval_is_a_jackknife_over_sizes():
    rng = np.random.default_rng(0)
    runs = []
    for size in SIZES:
        tokens = np.array([10 * size, 20 * size])
        values = score(size, tokens) + rng.normal(0, 0.004)
        runs.append(Run("", size, 6 * size, tokens, np.full(2, np.nan), values, 1))
    row = forecast(runs[:4], runs[4:], ("direct",))
    out = [predict("direct", [r for r in runs[:4] if r is not left], *runs[4].end[:3]) for left in runs[:4]]
    stderr = np.sqrt(3 / 4 * ((np.array(out) - np.mean(out)) ** 2).sum())
    assert row["high"] - row["predicted"] == pytest.approx(stats.t.ppf(0.975, 3) * stderr)


def test_what_missed_the_next_smaller_size_is_refused():
    table = family()
    table.loc[table.series == "m-1000m", "value"] += 0.1
    row = scaling(table).iloc[0]
    assert row.verdict == "refused" and row.backtest > 0.02 and np.isnan(row.low) and "back-test" in row.reason


def test_too_few_sizes_and_tasks_at_chance_are_declined():
    assert scaling(family(SIZES[:3])).empty
    mixed = pd.concat([family(), family(SIZES[:2], " (5-shot)"), family(SIZES[:2], " (0-shot)")])
    rows = scaling(mixed).set_index("shots")
    assert rows.verdict["5"] == rows.verdict["0"] == "declined" and "fewer than 4 sizes" in rows.reason["5"]
    flat = scaling(family().assign(value=0.05)).iloc[0]
    assert (flat.verdict, flat.reason) == ("declined", "the smaller runs are at chance")
    zero = scaling(family().assign(value=0.0)).iloc[0]
    assert zero.verdict == "declined"


def test_a_form_with_more_parameters_than_sizes_is_not_tried():
    runs = [Run("", s, 6 * s, np.array([20 * s]), np.array([1.0]), score(s, np.array([20 * s])), 1) for s in SIZES]
    tried = forecast(runs[:4], runs[4:], ("size_tokens", "direct"))
    assert tried["form"] == "direct"
    assert forecast(runs[:4], runs[4:], ("size_tokens",))["verdict"] == "declined"
