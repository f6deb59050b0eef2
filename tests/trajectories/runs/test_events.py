"""Changes at events of the schedule against the drift before, with the normal equations of the line as the oracle."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from fineline_jax.trajectories.runs.events import _change, event_changes
from fineline_jax.trajectories.statistics.comparison import ALL_TASKS

TOKENS = np.arange(1, 13) * 1e9


def curve(task: str, values: np.ndarray, metric: str = "acc") -> pd.DataFrame:
    rows = {"tokens": TOKENS, "value": values, "stderr": 0.01, "chance": 0.25}
    return pd.DataFrame(rows | {"series": "s", "metric": metric, "task": task, "domain": "d"})


def noisy(seed: int, jump: float) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return 0.3 + 0.05 * np.log2(TOKENS / 1e9) + rng.normal(0, 0.004, 12) + jump * (TOKENS > 6.5e9)


def test_the_change_is_the_distance_from_the_predicted_line_with_its_variance():
    table = pd.concat([curve("a", noisy(0, 0.05)), curve("b", noisy(1, 0.06))])
    found = event_changes(table, pd.DataFrame([{"series": "s", "event": "decay", "tokens": 6.5e9}])).set_index("task")
    before, after = np.log(TOKENS[:6]), np.log(TOKENS[6:9])
    design = np.stack([np.ones(6), before], axis=1)
    coefficients, squares, _, _ = np.linalg.lstsq(design, noisy(0, 0.05)[:6])
    at = np.array([1.0, after.mean()])
    gap = noisy(0, 0.05)[6:9].mean() - at @ coefficients
    # Draper, Smith 1998: variance of the mean of three new values at x = s2 (1/3 + x' (X'X)^-1 x)
    error = np.sqrt(squares[0] / 4 * (1 / 3 + at @ np.linalg.inv(design.T @ design) @ at))
    row = found.loc["a"]
    assert (row["before"], row["after"]) == (6, 3)
    assert row["change"] == pytest.approx(gap) and row["stderr"] == pytest.approx(error)
    assert row["drift"] == pytest.approx(coefficients[1] * np.log(2))
    assert row["p"] == pytest.approx(2 * stats.t.sf(gap / error, 4))
    assert (row["low"], row["high"]) == pytest.approx(gap + np.array([-1, 1]) * stats.t.ppf(0.975, 4) * error)
    assert set(found["verdict"][["a", "b"]]) == {"better"}
    whole = stats.ttest_1samp(found["change"][["a", "b"]], 0)
    assert found["p"][ALL_TASKS] == pytest.approx(whole.pvalue)
    assert found["change"][ALL_TASKS] == pytest.approx(found["change"][["a", "b"]].mean())


def test_of_lines_without_an_event_five_percent_are_called():
    """The errors are normal and independent, so p is exact: 2,000 lines give .05 +- 2 x .0049."""
    rng = np.random.default_rng(3)
    p = [_change(TOKENS, 0.3 + 0.1 * np.log(TOKENS) + rng.normal(0, 0.01, 12), 6.5e9, np.inf)["p"] for _ in range(2000)]
    assert 0.04 < np.mean(np.array(p) <= 0.05) < 0.06


def test_a_loss_that_falls_faster_is_better_and_the_next_event_ends_what_is_seen():
    table = curve("held_out", 3 - noisy(0, 0.1), "loss")
    events = pd.DataFrame([
        {"series": "", "event": "decay", "tokens": 6.5e9}, {"series": "", "event": "end", "tokens": 7.5e9},
        {"series": "other", "event": "batch", "tokens": 6.5e9}, {"series": "s", "event": "early", "tokens": 2e9},
    ])  # fmt: skip
    found = event_changes(table, events)
    assert list(found["event"].unique()) == ["decay", "end", "early"]
    rows = found[found["task"] == "held_out"].set_index("event")
    assert rows["verdict"]["decay"] == "better" and rows["after"]["decay"] == 1
    assert rows["verdict"]["early"] == "declined" and "fewer than 4 checkpoints" in rows["reason"]["early"]
    assert set(found[found["task"] == ALL_TASKS]["verdict"]) == {"declined"}  # one task is no sample of tasks
