"""Agreement of orders between runs, and dips: against scipy and simulated nulls."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from fineline_jax.trajectories.runs.agreement import dip, dips, fixed_score_times, order_agreement
from fineline_jax.trajectories.statistics.inference import kendall_interval

TOKENS = 2.0 ** np.arange(1, 21)


def run(series: str, arm: str, seed: int, at: dict[str, float], stderr: float = 0.002) -> pd.DataFrame:
    """Accuracies that rise from .25 to .75 with their half at 2^at tokens, without noise."""
    frames = [
        pd.DataFrame(
            {"series": series, "arm": arm, "seed": seed, "metric": "acc", "task": task, "tokens": TOKENS}
        ).assign(value=0.25 + 0.5 / (1 + 2.0 ** (-2 * (np.log2(TOKENS) - middle))), stderr=stderr, chance=0.25)
        for task, middle in at.items()
    ]
    return pd.concat(frames)


def test_orders_are_compared_by_tau_beside_that_of_two_seeds():
    names = list("abcdef")
    orders = {"x0": [5, 6, 7, 8, 9, 10], "x1": [5, 7, 6, 8, 9, 10], "y0": [10, 9, 8, 7, 6, 5]}
    table = pd.concat([run(s, s[0], int(s[1]), dict(zip(names, o, strict=True))) for s, o in orders.items()])
    row = order_agreement(table).iloc[0]
    tau = lambda a, b: stats.kendalltau(orders[a], orders[b]).statistic
    assert row.kendall == pytest.approx((tau("x0", "y0") + tau("x1", "y0")) / 2)
    assert (row.seed_kendall, row.seed_pairs, row.run_pairs, row.tasks) == (pytest.approx(tau("x0", "x1")), 1, 2, 6)
    times = fixed_score_times(table, +1)
    assert times["x1"].rank().tolist() == [1, 3, 2, 4, 5, 6]
    few = order_agreement(table[table.task < "d"])
    assert "fewer than 5 tasks" in few.reason[0]


def test_a_task_that_rose_in_one_run_only_does_not_count():
    table = pd.concat([run("x", "x", 0, {"a": 8, "b": 9}), run("y", "y", 0, {"a": 8, "b": 60})])
    assert fixed_score_times(table, +1).index.tolist() == ["a"]


def test_the_interval_of_tau_covers_it():
    """Normal pairs of correlation .5: tau = 2/pi asin(.5) = 1/3. At least 92 % of 400 at 95 %."""
    rng = np.random.default_rng(0)
    pairs = rng.multivariate_normal([0, 0], [[1, 0.5], [0.5, 1]], (400, 25))
    ends = [kendall_interval(stats.kendalltau(*pair.T).statistic, 25) for pair in pairs]
    assert np.mean([low <= 1 / 3 <= high for low, high in ends]) >= 0.92


def test_a_dip_lies_below_what_came_before_and_after():
    values = np.array([0.5, 0.5, 0.5, 0.2, 0.2, 0.2, 0.6, 0.6, 0.6])
    assert dip(values) == (pytest.approx(0.3), 4)
    assert dip(np.arange(9.0))[0] == 0 and dip(-np.arange(9.0))[0] == 0
    assert dip(np.stack([values, values[::-1]]))[1].tolist() == [4, 4]


def test_curves_that_fall_and_rise_are_named_and_monotone_ones_are_not():
    rng = np.random.default_rng(1)
    frames = []
    for number in range(30):
        values = 0.3 + 0.02 * np.arange(20) + rng.normal(0, 0.02, 20)
        frames.append(pd.DataFrame({"task": f"rises {number}", "tokens": TOKENS, "value": values}))
    u = 0.5 - 0.3 * np.sin(np.pi * np.arange(20) / 19) + rng.normal(0, 0.02, 20)
    frames.append(pd.DataFrame({"task": "u", "tokens": TOKENS, "value": u}))
    table = pd.concat(frames).assign(series="s", metric="acc", stderr=0.02)
    found = dips(table).set_index("task")
    called = found[found.verdict == "falls and rises again"]
    assert called.index.tolist() == ["u"]
    assert called.depth["u"] == pytest.approx(0.3, abs=0.06) and 2**8 <= called.tokens["u"] <= 2**13
    assert called.value["u"] == pytest.approx(0.2, abs=0.06)
    falls = dips(table.assign(metric="bits_per_byte", value=-table["value"])).set_index("task")
    assert falls.verdict.to_dict() == found.verdict.to_dict()
    without = dips(table.assign(stderr=np.nan))
    assert set(without.verdict) == {"declined"} and set(without.reason) == {"no standard errors"}
