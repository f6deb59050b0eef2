"""Differences of arms: against scipy, against a mixed model's expectations, and by simulation at the nominal rates."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from fineline_jax.errors import UserError
from fineline_jax.trajectories.ablation.differences import (
    ALL_TASKS,
    DIFFERENCES,
    arm_difference,
    differences,
    document_variance,
)

TOKENS = np.linspace(0.1, 1.0, 10)


def curves(
    levels: dict[str, float], seeds: int, rng, spread: float = 0.02, noise: float = 0.0, metric="loss", task="t"
):
    """Losses that fall to a level per arm and run; spread: SD between runs, noise: SD of single checkpoints."""
    rows = []
    for arm, level in levels.items():
        for seed in range(seeds):
            values = level + rng.normal(0, spread) + 0.3 * TOKENS**-0.5 + rng.normal(0, noise, len(TOKENS))
            frame = pd.DataFrame({"series": f"{arm}-{seed}", "arm": arm, "seed": seed, "tokens": TOKENS})
            rows.append(frame.assign(value=values, metric=metric, task=task, stderr=np.nan))
    return pd.concat(rows, ignore_index=True)


def test_without_documents_it_is_the_t_test_of_the_ends():
    table = curves({"a": 1.0, "b": 0.98}, 4, np.random.default_rng(0))
    late = table[table.tokens >= 0.75].groupby(["arm", "seed"])["value"].mean()
    oracle = stats.ttest_ind(late["a"], late["b"])  # a loss: positive where b is lower
    row = differences(table).iloc[0]
    assert (row.arm, row.reference, row.runs, row.design) == ("b", "a", 4, "runs")
    assert (row.difference, row.p) == (pytest.approx(late["a"].mean() - late["b"].mean()), pytest.approx(oracle.pvalue))
    assert row.difference / row.stderr == pytest.approx(oracle.statistic)
    bounds = oracle.confidence_interval(0.95)
    assert (row.low, row.high) == (pytest.approx(bounds.low), pytest.approx(bounds.high))
    back = differences(table, reference="b").iloc[0]
    assert (back.difference, back.p) == (pytest.approx(-row.difference), pytest.approx(row.p))


def test_arms_that_spread_differently_are_compared_by_welch():
    rng = np.random.default_rng(3)
    calm, wild = rng.normal(0, 0.01, 12), rng.normal(0.5, 1.0, 12)
    row = arm_difference(np.r_[wild, calm], np.repeat(["w", "c"], 12), np.tile(np.arange(12), 2), "w", "c")
    oracle = stats.ttest_ind(wild, calm, equal_var=False)
    assert row["design"] == "two arms"
    assert (row["p"], row["freedom"]) == (pytest.approx(oracle.pvalue), pytest.approx(oracle.df))


def test_several_comparisons_are_controlled_and_what_it_takes_is_said():
    table = curves({"a": 1.0, "b": 0.9, "c": 1.0, "d": 1.0}, 4, np.random.default_rng(6))
    found = differences(table).set_index("arm")
    assert found.verdict.to_dict() == {"b": "better", "c": "no difference resolved", "d": "no difference resolved"}
    assert (found.p_holm >= found.p).all() and (found.q >= found.p).all()
    assert found.reason["c"].startswith("to resolve 0.01 needs about ")
    assert found.seeds_needed["c"] == pytest.approx(2 * 7.85 * found.stderr["c"] ** 2 * 2 / 0.01**2, rel=0.2)
    assert list(differences(table).columns) == [column.name for column in DIFFERENCES.columns]


def test_one_seed_says_nothing_and_a_stranger_is_no_reference():
    table = curves({"a": 1.0, "b": 0.5}, 1, np.random.default_rng(0))
    row = differences(table).iloc[0]
    assert row.verdict == "declined" and "two seeds" in row.reason and row.difference == pytest.approx(0.5, abs=0.1)
    with pytest.raises(UserError, match="it is one of a, b"):
        differences(table, reference="z")


def test_the_mean_over_tasks_is_a_comparison_too():
    rng = np.random.default_rng(1)
    table = pd.concat([curves({"a": 1, "b": 1}, 3, rng, task=task) for task in ("s", "t")])
    found = differences(table).set_index("task")
    assert found.difference[ALL_TASKS] == pytest.approx((found.difference["s"] + found.difference["t"]) / 2)


def scores(rng, arms: int, seeds: int, count: int, *, of_run=0.02, of_pair=0.2, residual=0.4, gap=0.0) -> np.ndarray:
    """y[a, s, d] = document + arm x document + run + residual, [arms * seeds, documents]."""
    pair = rng.normal(0, of_pair, (arms, 1, count)) + gap * np.arange(arms)[:, None, None]
    y = rng.normal(0, 0.5, count) + pair + rng.normal(0, of_run, (arms, seeds, 1))
    return (y + rng.normal(0, residual, (arms, seeds, count))).reshape(arms * seeds, count)


def test_the_parts_of_the_variance_are_those_of_the_model():
    """Expectations: of a run mean of_run^2 + residual^2 / N; of the documents 2 of_pair^2 / N; both without bias."""
    rng = np.random.default_rng(7)
    arms, seeds = np.repeat(["a", "b"], 3), np.tile(np.arange(3), 2)
    runs, documents = [], []
    for _ in range(100):
        matrix = scores(rng, 2, 3, 60)
        asked = document_variance(matrix, arms, "a", "b")
        documents.append(asked[0])
        runs.append(arm_difference(matrix.mean(axis=1), arms, seeds, "a", "b", asked)["stderr_runs"] ** 2)
        assert asked[1] == 59
    assert np.mean(documents) == pytest.approx(2 * 0.2**2 / 60, rel=0.15)
    assert np.mean(runs) == pytest.approx((0.02**2 + 0.4**2 / 60) * 2 / 3, rel=0.2)


def test_documents_widen_the_interval_and_replace_the_tables_values():
    matrix = scores(np.random.default_rng(2), 2, 3, 50, of_pair=1.0)
    table = curves({"a": 1.0, "b": 0.9}, 3, np.random.default_rng(0), metric="acc")
    series = list(dict.fromkeys(table.series))
    long = pd.DataFrame(matrix, index=series).rename_axis("series").reset_index().melt("series", var_name="document")
    found = differences(table, documents=long.assign(metric="acc", task="t")).iloc[0]
    assert found.difference == pytest.approx(matrix[3:].mean() - matrix[:3].mean())
    assert found.stderr == pytest.approx(np.hypot(found.stderr_runs, found.stderr_documents))
    assert found.stderr_documents > 3 * found.stderr_runs and found.freedom > 30
    assert found.reason == "to resolve 0.01 takes more documents, not more seeds"


def rate(repetitions: int, make) -> float:
    return float(np.mean([make(np.random.default_rng(seed)) for seed in range(repetitions)]))


@pytest.mark.parametrize("repetitions", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_two_identical_arms_are_called_different_at_the_nominal_rate(repetitions):
    """At most 7 % at 5 % over 200 (issue 17); of 20 more than four called ones have probability .003."""
    called = lambda rng: (
        differences(curves({"a": 1, "b": 1}, 5, rng, noise=0.01)).verdict[0] != "no difference resolved"
    )
    assert rate(repetitions, called) <= (0.07 if repetitions == 200 else 0.2)


@pytest.mark.parametrize("repetitions", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_two_identical_arms_with_documents_are_called_different_at_the_nominal_rate(repetitions):
    arms, seeds = np.repeat(["a", "b"], 5), np.tile(np.arange(5), 2)

    def called(rng) -> bool:
        matrix = scores(rng, 2, 5, 80)
        asked = document_variance(matrix, arms, "a", "b")
        return arm_difference(matrix.mean(axis=1), arms, seeds, "a", "b", asked)["p"] <= 0.05

    assert rate(repetitions, called) <= (0.07 if repetitions == 200 else 0.2)


@pytest.mark.parametrize("repetitions", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_a_difference_of_two_seed_sds_is_found_with_five_seeds(repetitions):
    """In at least 80 % (issue 17). The seed SD is that of single final losses: runs .02, checkpoints .01."""
    gap = 2 * np.hypot(0.02, 0.01)
    found = lambda rng: differences(curves({"a": 1, "b": 1 - gap}, 5, rng, noise=0.01)).verdict[0] == "better"
    assert rate(repetitions, found) >= 0.8


def test_the_power_that_the_guide_states_is_that_of_the_noncentral_t():
    """Of a difference of two SDs between seeds, whose runs of one seed correlate by rho, at 5 % over `tests` tests."""

    def power(seeds: int, freedom: int, rho: float = 0.0, tests: int = 1) -> str:
        away = 2 / np.sqrt(2 * (1 - rho) / seeds)
        least = stats.t.ppf(1 - 0.05 / tests / 2, freedom)
        return f"{stats.nct.sf(least, freedom, away) + stats.nct.cdf(-least, freedom, away):.0%}".replace("%", " %")

    text = " ".join((Path(__file__).parents[3] / "docs" / "ablate.md").read_text().split())
    said = re.findall(r"\d+ %", text[text.index("## How many seeds") :])
    four_arms = power(5, 4 * 3, 0.5, tests=3), power(5, 4 * 4, tests=3)
    assert said == [power(5, 8), power(6, 10), *four_arms, power(5, 4), power(5, 4, 0.3), power(5, 4, 0.5)]
