"""Ends of runs, their variance, seeds needed, several comparisons: against scipy and worked examples."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fineline_jax.errors import UserError
from fineline_jax.trajectories.ablation.arms import (
    arms_of,
    end_values,
    run_variance,
    seeds_to_resolve,
    stopped_early,
    with_runs,
)
from fineline_jax.trajectories.statistics.inference import false_discovery, holm


def curve(series: str, tokens, values, **more) -> pd.DataFrame:
    frame = pd.DataFrame({"series": series, "metric": "acc", "task": "t", "tokens": tokens, "value": values})
    return frame.assign(stderr=0.01, **more)


def test_the_end_is_the_mean_of_the_last_quarter_at_equal_tokens():
    """Of 100 tokens the last quarter holds 75, 80, 90, 100 of run a; b, whose steps are longer, has 81, 91, 101."""
    a = curve("a", [50, 75, 80, 90, 100], [0, 1, 2, 3, 4])
    b = curve("b", [50, 81, 91, 101], [0, 5, 6, 7])
    ends = end_values(pd.concat([a, b])).set_index("series")
    assert ends.loc["a", "value"] == 3 and ends.loc["b", "value"] == 6
    assert ends["averaged"].tolist() == [3, 3] and ends["tokens"].tolist() == [100, 101]


def test_a_longer_run_is_read_where_the_shortest_ends_and_one_that_stopped_is_left_out():
    a, b = curve("a", [90, 95, 100], [1, 2, 3]), curve("b", [90, 95, 100, 105, 110], [1, 2, 3, 50, 50])
    c = curve("c", [90], [9])
    table = pd.concat([a, b, c])
    assert stopped_early(table) == ["c"]
    assert end_values(table).set_index("series")["value"].to_dict() == {"a": 2, "b": 2}


def test_at_most_five_checkpoints_count():
    assert end_values(curve("a", range(91, 101), np.arange(10.0)))["value"].item() == 7


def test_columns_of_runs_are_joined_by_series_and_a_stranger_is_refused():
    runs = pd.DataFrame({"series": ["a", "b"], "arm": ["x", "x"], "seed": [0, 1], "batch": [8, 8]})
    table = pd.concat([curve("a", [1, 2], [1, 2]), curve("b", [1], [1])])
    assert with_runs(table, runs)[["arm", "seed", "batch"]].to_numpy().tolist() == [["x", 0, 8]] * 2 + [["x", 1, 8]]
    assert with_runs(with_runs(table, runs), runs).equals(with_runs(table, runs))
    with pytest.raises(UserError, match="series 'c'"):
        with_runs(curve("c", [1], [1]), runs)
    assert arms_of(table)["arm"].tolist() == ["a", "a", "b"]


def test_the_variance_between_runs_is_pooled_inside_arms():
    values, arms = np.array([1.0, 3.0, 10.0, 11.0, 12.0, 7.0]), np.array(list("aabbbc"))
    variance, freedom, design = run_variance(values, arms, np.arange(6))
    assert (variance, freedom, design) == (pytest.approx((2 + 2) / 3), 3, "runs")
    assert np.isnan(run_variance(values[:1], arms[:1], np.arange(1))[0])


def test_with_many_arms_seeds_are_blocks():
    """Oracle: the residual of a two-way analysis of variance, by least squares."""
    rng = np.random.default_rng(0)
    arms, seeds = (one.ravel() for one in np.meshgrid(np.arange(5), np.arange(4), indexing="ij"))
    values = rng.normal(size=20) + 5.0 * seeds + arms
    design = np.column_stack([arms == a for a in range(5)] + [seeds == s for s in range(1, 4)]).astype(float)
    squares = np.linalg.lstsq(design, values, rcond=None)[1].item()
    assert run_variance(values, arms, seeds) == (pytest.approx(squares / 12), 12, "blocks")
    assert run_variance(values[:8], arms[:8], seeds[:8])[2] == "runs"
    assert run_variance(np.append(values, 3.0), np.append(arms, 0), np.append(seeds, 9))[2] == "runs"


def test_the_number_of_seeds_has_the_stated_power():
    """Oracle: the power of the two-sample t-test from the noncentral t distribution; the formula with two central
    quantiles is within a seed of it."""

    def power(seeds: int, difference: float, variance: float) -> float:
        freedom, shift = 2 * seeds - 2, difference / np.sqrt(2 * variance / seeds)
        return float(stats.nct.sf(stats.t.ppf(0.975, freedom), freedom, shift))

    for case in ((2.0, 1.0), (0.5, 1.0), (0.01, 0.0004), (3.0, 1.0)):
        found = int(seeds_to_resolve(*case))
        assert power(found + 1, *case) >= 0.8 and power(max(found - 2, 2), *case) < 0.8
    assert seeds_to_resolve(0.01, 1e-6, fixed=0.01**2) == np.inf


def test_holm_and_benjamini_hochberg_are_their_definitions():
    """The example of R's p.adjust for .01, .02, .03, .04: Holm .04, .06, .06, .06; BH .04 for all."""
    p = np.array([0.03, np.nan, 0.01, 0.04, 0.02])
    assert holm(p) == pytest.approx([0.06, np.nan, 0.04, 0.06, 0.06], nan_ok=True)
    assert false_discovery(p) == pytest.approx([0.04, np.nan, 0.04, 0.04, 0.04], nan_ok=True)
    assert np.isnan(false_discovery(np.array([np.nan]))).all()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_rejects_what_the_step_down_procedure_rejects(p):
    rejected, order = np.zeros(len(p), bool), np.argsort(p, kind="stable")
    for rank, index in enumerate(order):
        if p[index] * (len(p) - rank) > 0.05:
            break
        rejected[index] = True
    assert ((holm(np.array(p)) <= 0.05) == rejected).all()
