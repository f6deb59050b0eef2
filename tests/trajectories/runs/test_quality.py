"""Quality of metrics per phase, early decisions, the state of a live run: against known truth and scipy."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from fineline_jax.errors import UserError
from fineline_jax.trajectories.runs.live import live_state
from fineline_jax.trajectories.runs.quality import early_decisions, phase_quality


def curve(series: str, values, tokens, *, metric="acc", task="t", stderr=0.01) -> pd.DataFrame:
    frame = pd.DataFrame({"series": series, "metric": metric, "task": task, "tokens": tokens, "value": values})
    return frame.assign(stderr=stderr)


def test_signal_and_noise_of_a_phase_are_those_it_was_made_of():
    rng, tokens = np.random.default_rng(0), np.geomspace(1, 1e4, 2000)
    values = 0.1 * np.log(tokens) + rng.normal(0, 0.05, 2000)
    found = phase_quality(curve("s", values, tokens))
    assert found["phase"].tolist() == ["1", "2", "3", "4"] and found["to_tokens"].iloc[-1] == pytest.approx(1e4)
    # the last thousandfold in quarters: log 1000 / 4 = 1.73 nats each; from first third to last third 2/3 of it
    assert found["signal"].to_numpy() == pytest.approx(0.1 * np.log(1000) / 4 * 2 / 3, abs=0.03)
    assert found["noise"].to_numpy() == pytest.approx(0.05, rel=0.25)
    assert ((found["low"] < found["snr"]) & (found["snr"] < found["high"])).all()
    steep = phase_quality(curve("s", 10 * values, tokens))
    assert steep["snr"].to_numpy() == pytest.approx(found["snr"].to_numpy())  # no unit


def test_the_interval_of_signal_to_noise_covers_it():
    """Of 100 phases at 95 % at least 90 (fewer has probability .01). A third of 20 of 80 checkpoints is 6: from the
    mean of the first six to that of the last six it is 14 steps."""
    tokens = np.geomspace(1, 1e3, 80)
    step, hits = np.log(tokens[1]), 0
    for seed in range(25):
        values = 0.3 * np.log(tokens) + np.random.default_rng(seed).normal(0, 0.2, 80)
        found = phase_quality(curve("s", values, tokens))
        assert (found["checkpoints"] == 20).all()
        hits += int(((found["low"] <= 0.3 * step * 14 / 0.2) & (0.3 * step * 14 / 0.2 <= found["high"])).sum())
    assert hits >= 90


def test_a_metric_is_recommended_where_it_moves():
    rng, tokens = np.random.default_rng(1), np.geomspace(1, 1e3, 400)
    values = np.where(tokens < 180, 0.0, np.log(tokens / 180)) + rng.normal(0, 0.1, 400)
    found = phase_quality(curve("s", values, tokens)).set_index("phase")
    assert found.verdict["4"] == "watch" and found.verdict["1"] == found.verdict["2"] == "too noisy"
    falls = phase_quality(curve("s", -values, tokens, metric="loss")).set_index("phase")
    assert falls.verdict.to_dict() == found.verdict.to_dict()
    assert "fewer than 5" in phase_quality(curve("s", values[::60], tokens[::60])).reason[0]


def test_early_decisions_count_the_pairs_that_keep_their_order():
    """Runs that end at 0, 1, 2, 3 begin in the order 1, 0, 2, 3: one of six pairs turns, at three quarters of it."""
    ends, starts = [0.0, 1.0, 2.0, 3.0], [1.0, 0.0, 2.0, 3.0]
    tokens = np.array([0.0, 50.0, 100.0])
    table = pd.concat(
        curve(f"r{k}", [start, start, end], tokens) for k, (start, end) in enumerate(zip(starts, ends, strict=True))
    )
    found = early_decisions(table).set_index("fraction")
    assert found.accuracy["0.1"] == pytest.approx(5 / 6) and found.accuracy["0.5"] == pytest.approx(5 / 6)
    assert found.accuracy["0.75"] == pytest.approx(5.5 / 6)  # half-way the two are equal
    assert found.tokens["0.25"] == 25 and (found.low <= found.accuracy).all()
    assert "fewer than 4" in early_decisions(table[table.series < "r2"]).reason[0]
    late = early_decisions(table[table.tokens > 0]).set_index("fraction")
    assert "before the first" in late.reason["0.1"]


TOKENS = np.array([1.0, 2.0, 4.0, 8.0, 16.0])


def references(levels, **more) -> pd.DataFrame:
    """Scores of .1 per doubling plus a level, one series each."""
    return pd.concat(curve(f"ref{k}", 0.1 * np.log2(TOKENS) + level, TOKENS, **more) for k, level in enumerate(levels))


def test_a_run_is_held_against_the_spread_of_its_references():
    levels = [0.30, 0.31, 0.29, 0.305]
    live = curve("live", [0.3, 0.7], [1.0, 8.0])
    row = live_state(pd.concat([references(levels), live])).set_index("task").loc["t"]
    at = 0.3 + np.array(levels)
    assert (row.references, row.tokens, row.reference) == (4, 8, pytest.approx(at.mean()))
    assert row.difference == pytest.approx(0.7 - at.mean())
    error = at.std(ddof=1) * np.sqrt(1 + 1 / 4)
    assert row.p == pytest.approx(2 * stats.t.sf((0.7 - at.mean()) / error, 3)) and row.verdict == "ahead"
    # the references have .7 at 2^(.4 / .1) = 16 tokens where their level is .3, twice the run's
    assert row.doublings_ahead == pytest.approx(1, abs=0.1)


def test_one_reference_leaves_the_error_of_the_questions_and_that_is_said():
    table = pd.concat([references([0.3]), curve("live", [0.55], [8.0], stderr=0.02)])
    row = live_state(table, run="live").iloc[0]
    assert row.stderr == pytest.approx(np.hypot(0.01, 0.02)) and "one reference" in row.reason
    assert row.difference == pytest.approx(-0.05) and row.verdict == "behind"
    beyond = live_state(pd.concat([references([0.3]), curve("live", [0.9], [32.0])])).iloc[0]
    assert beyond.verdict == "declined" and "both sides" in beyond.reason


def test_a_loss_is_ahead_where_it_is_lower_and_all_tasks_are_replicates():
    parts, gaps = [], np.array([0.1, 0.12, 0.09, 0.11])
    for task, gap in enumerate(gaps):
        parts.append(curve("ref", 5 - np.log2(TOKENS), TOKENS, metric="loss", task=f"t{task}"))
        parts.append(curve("live", [5 - 2 - gap], [4.0], metric="loss", task=f"t{task}"))
    row = live_state(pd.concat(parts), run="live").set_index("task").loc["all tasks"]
    # of one reference the error between runs is as large as that over tasks
    p = 2 * stats.t.sf(stats.ttest_1samp(gaps, 0).statistic / np.sqrt(2), 3)
    assert (row.difference, row.p, row.verdict) == (pytest.approx(gaps.mean()), pytest.approx(p), "ahead")


def test_over_all_tasks_a_run_is_held_against_the_spread_of_its_references_too():
    """Two tasks: the references' means are .3, .31, .29 and .305, whatever the tasks add to them."""
    levels, gaps = np.array([0.30, 0.31, 0.29, 0.305]), np.array([0.08, 0.10])
    parts = [references(levels + sign * 0.05, task=task) for task, sign in (("t", 1), ("u", -1))]
    at = 0.3 + levels
    for task, sign, gap in (("t", 1, gaps[0]), ("u", -1, gaps[1])):
        parts.append(curve("live", [at.mean() + sign * 0.05 + gap], [8.0], task=task))
    row = live_state(pd.concat(parts), run="live").set_index("task").loc["all tasks"]
    between, tasks = levels.var(ddof=1) * (1 + 1 / 4), gaps.var(ddof=1) / 2
    assert row.difference == pytest.approx(0.09) and row.stderr == pytest.approx(np.sqrt(between + tasks))


def test_series_that_are_not_there_are_refused():
    with pytest.raises(UserError, match=r"live run or reference 'x': there is no series .* there are ref0, ref1"):
        live_state(references([0.3, 0.4]), run="x")
    with pytest.raises(UserError, match="no other series"):
        live_state(references([0.3]))
    shots = references([0.3, 0.4]).assign(series=lambda t: t.series.map({"ref0": "a (0-shot)", "ref1": "b (5-shot)"}))
    with pytest.raises(UserError, match="no other series"):
        live_state(shots)
