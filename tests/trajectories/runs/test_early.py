"""Early slopes and tokens to a fixed score of two runs, on curves whose slopes and crossings are known."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from fineline_jax.trajectories.ablation.tokens_to import to_fixed_score
from fineline_jax.trajectories.runs.early_slopes import early_slopes
from fineline_jax.trajectories.statistics.dynamics import summarise
from fineline_jax.trajectories.table import normalise

TOKENS = 2.0 ** np.arange(12)
SLOPES = {"a": (0.08, 0.06, 0.05, 0.07), "b": (0.06, 0.05, 0.02, 0.055)}
"""Gain per doubling of four tasks from their onset on."""


def table_of(onsets: dict[str, int], tasks: int = 4, chance: float = 0.25) -> pd.DataFrame:
    """Curves at chance before the checkpoint of their onset, linear in log tokens after it."""
    rows = [
        {"series": name, "tokens": tokens, "task": f"t{k}", "metric": "acc", "stderr": 0.001, "chance": chance,
         "value": 0.25 + SLOPES[name[0]][k] * max(0, i - onset + 1)}
        for name, onset in onsets.items() for k in range(tasks) for i, tokens in enumerate(TOKENS)
    ]  # fmt: skip
    return normalise(pd.DataFrame(rows))


def test_slopes_are_those_after_the_onset():
    """The slopes that the curves were made of; their difference over tasks by scipy, with the error between runs."""
    row = early_slopes(table_of({"b": 4, "a": 4})).iloc[0]
    one, other = (np.array(SLOPES[name]) for name in "ab")
    assert (row.run, row.reference, row.tasks) == ("a", "b", 4)
    assert (row.slope, row.reference_slope) == (pytest.approx(one.mean()), pytest.approx(other.mean()))
    t = stats.ttest_1samp(one - other, 0).statistic / np.sqrt(2)
    assert row.difference == pytest.approx((one - other).mean()) and row.t == pytest.approx(t)
    assert row.p == pytest.approx(2 * stats.t.sf(t, 3)) and row.runs_from == "tasks"


def test_both_runs_are_read_from_the_earlier_onset_on():
    """a rises from the fifth checkpoint, b two later: over the first five b gains 0, 0, s, 2s, 3s, which is .8 s."""
    row = early_slopes(table_of({"b": 6, "a": 4})).iloc[0]
    assert row.slope == pytest.approx(np.mean(SLOPES["a"]))
    assert row.reference_slope == pytest.approx(0.8 * np.mean(SLOPES["b"]))


def test_tasks_that_never_rise_have_no_slope():
    flat = table_of({"b": 12, "a": 12})
    row = early_slopes(flat).iloc[0]
    assert (row.tasks, row.verdict, row.reason) == (0, "declined", "fewer than two tasks with an onset")
    assert np.isnan(row.slope)
    # two series without a common checkpoint have nothing to compare, and say nothing
    apart = flat.assign(tokens=flat["tokens"] + 0.5 * (flat["series"] == "a"))
    assert early_slopes(apart).empty


def test_series_that_are_no_arms_are_compared_by_tokens_to_a_fixed_score():
    """Halfway to perfect is .625: task t0 of a is there after .375 / .08 doublings from the third checkpoint."""
    table = table_of({"b": 4, "a": 4, "a slow": 5}, tasks=2)
    summary = summarise(table)
    found = to_fixed_score(summary).set_index(["arm", "task"])
    at = 3 + 0.375 / 0.08
    assert np.log2(found.tokens["a", "t0"]) == pytest.approx(at, abs=1e-6)
    assert found.log2_ratio["a", "t0"] == pytest.approx(at - (3 + 0.375 / 0.06), abs=1e-6)
    assert found.log2_ratio["a slow", "t0"] - found.log2_ratio["a", "t0"] == pytest.approx(1, abs=1e-6)
    assert found.target.tolist() == [0.625] * len(found) and set(found.reference) == {"b"}
    assert np.isnan(found.log2_ratio["b", "t0"]) and found.reason["b", "t0"] == ""
    low, high = found.ratio_low["a", "t0"], found.ratio_high["a", "t0"]
    assert low < found.log2_ratio["a", "t0"] < high
    ends = summary.set_index(["series", "task"])[["to_score_low", "to_score_high"]]
    halves = [np.diff(np.log2(ends.loc[(name, "t0")].to_numpy(float)))[0] / 2 for name in "ab"]
    assert (high - low) / 2 == pytest.approx(np.hypot(*halves))


def test_a_score_that_a_run_does_not_reach_has_no_tokens_and_one_that_none_reaches_no_row():
    found = to_fixed_score(summarise(table_of({"b": 4, "a": 4}, tasks=3))).set_index(["arm", "task"])
    # t2 of b gains .02 per doubling: .16 in all; of a .05: .4
    assert np.isnan(found.tokens["b", "t2"]) and found.reason["b", "t2"] == "not reached"
    assert found.reached["b", "t2"] == 0 and found.tokens["a", "t2"] > 0 and np.isnan(found.log2_ratio["a", "t2"])
    late = to_fixed_score(summarise(table_of({"b": 8, "a": 8}, tasks=3)))
    assert late.empty
