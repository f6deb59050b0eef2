"""Means of arms over their seeds, with numpy and Student's t as the oracle."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from fineline_jax.trajectories.runs.facets import arm_means

TOKENS = [0, 1_000_000, 2_000_000]


def runs() -> pd.DataFrame:
    """Arms a (three seeds) and b (two), whose tokens differ by a batch, and c of one run."""
    rng = np.random.default_rng(0)
    rows = []
    for arm, seeds in (("a", 3), ("b", 2), ("c", 1)):
        for seed in range(seeds):
            for step, tokens in enumerate(TOKENS):
                key = {"series": f"{arm}{seed}", "checkpoint": f"c{step}", "step": float(step), "task": "t"}
                key |= {"tokens": tokens * 1.005 if arm == "b" else float(tokens), "domain": "d", "metric": "acc"}
                value = 0.3 + 0.1 * step + rng.normal(0, 0.02)
                rows.append(
                    key | {"value": value, "stderr": 0.01, "n": 100.0, "chance": 0.25, "arm": arm, "seed": seed}
                )
    return pd.DataFrame(rows)


def test_means_and_intervals_between_seeds_pool_the_variance_over_arms_at_the_same_tokens():
    table = runs()
    found = arm_means(table)
    assert list(found["series"].unique()) == ["a (mean of 3 seeds)", "b (mean of 2 seeds)"]
    for i, tokens in enumerate(TOKENS):
        a, b = (table[(table["arm"] == arm) & (table["checkpoint"] == f"c{i}")]["value"].to_numpy() for arm in "ab")
        squares = ((a - a.mean()) ** 2).sum() + ((b - b.mean()) ** 2).sum()
        for arm, values in (("a", a), ("b", b)):
            [row] = found[(found["arm"] == arm) & (found["checkpoint"] == f"c{i}")].itertuples()
            half = stats.t.ppf(0.975, 3) * np.sqrt(squares / 3 / len(values))  # 2 + 1 degrees of freedom
            assert row.value == pytest.approx(values.mean()) and 1.96 * row.stderr == pytest.approx(half)
            assert (row.chance, row.n) == (0.25, 100) and row.tokens == pytest.approx(tokens, rel=0.01)
    assert "seed" not in found


def test_tokens_that_a_seed_lacks_are_left_out():
    table = runs()
    found = arm_means(table[(table["series"] != "a2") | (table["checkpoint"] != "c1")])
    assert list(found[found["arm"] == "a"]["checkpoint"]) == ["c0", "c2"]
    # without a the variance at that moment is that of b alone
    [row] = found[(found["arm"] == "b") & (found["checkpoint"] == "c1")].itertuples()
    values = table[(table["arm"] == "b") & (table["checkpoint"] == "c1")]["value"]
    assert 1.96 * row.stderr == pytest.approx(stats.t.ppf(0.975, 1) * values.std() / np.sqrt(2))


def test_arms_of_one_run_have_no_mean():
    assert arm_means(runs()[lambda table: table["series"].isin(["a0", "b0", "c0"])]).empty
