"""Comparing runs: against scipy, against published runs and their reruns."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from fineline_jax.trajectories.statistics.comparison import (
    COMPARISON,
    UNRESOLVED,
    against_first,
    compare,
    curves_of,
    one_sample,
)
from fineline_jax.trajectories.statistics.rerun_error import RERUNS, RunError, between_reruns, run_error
from fineline_jax.trajectories.statistics.similarity import SIMILARITY, similarity
from fineline_jax.trajectories.table import read_table

SUBJECTS = ("stem", "humanities", "social_sciences", "other")
TASKS = [f"task {k}" for k in range(6)]


def table_of(runs: dict[str, np.ndarray], tokens, metric: str = "acc") -> pd.DataFrame:
    """runs: values [T, tasks] by name."""
    rows = [
        {"series": name, "metric": metric, "task": task, "tokens": t, "value": values[i, k], "stderr": 0.01}
        for name, values in runs.items()
        for k, task in enumerate(TASKS[: values.shape[1]])
        for i, t in enumerate(tokens)
    ]
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def two() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    base = rng.uniform(0.2, 0.6, (9, 6)).cumsum(axis=0) / 9
    return {"a": base + rng.normal(0.02, 0.01, (9, 6)), "b": base}


def test_a_difference_is_tested_over_the_means_of_tasks(two):
    found = compare(table_of(two, range(1, 10)), "a", "b").set_index("window")
    for window, rows in (("first", slice(0, 3)), ("all", slice(None)), ("last", slice(-5, None))):
        of_tasks = (two["a"] - two["b"])[rows].mean(axis=0)
        row = found.loc[window]
        assert row.difference == pytest.approx(of_tasks.mean())
        assert row.stderr_tasks == pytest.approx(stats.sem(of_tasks))
        assert row.stderr == pytest.approx(np.hypot(row.stderr_tasks, row.stderr_runs))
        assert row.t == pytest.approx(row.difference / row.stderr)
        assert row.high - row.low == pytest.approx(2 * stats.t.ppf(0.975, 5) * row.stderr)
        assert (row.verdict, row.tasks, row.checkpoints) == ("better", 6, len(range(9)[rows]))


def test_the_other_way_round_it_is_worse_and_a_loss_counts_downwards(two):
    table = table_of(two, range(1, 10))
    assert set(compare(table, "b", "a").verdict) == {"worse"}
    losses = table_of(two, range(1, 10), metric="bits_per_byte")
    assert set(compare(losses, "a", "b").verdict) == {"worse"}
    assert (compare(losses, "a", "b").difference < 0).all()


def test_only_tokens_and_tasks_that_both_have_count(two):
    table = table_of(two, range(1, 10))
    holes = table[~((table.series == "b") & (table.tokens == 4)) & ~((table.series == "a") & (table.task == "task 2"))]
    row = compare(holes, "a", "b").set_index("window").loc["all"]
    kept = np.delete(np.delete(two["a"] - two["b"], 3, axis=0), 2, axis=1).mean(axis=0)
    assert (row.checkpoints, row.tasks, row.difference) == (8, 5, pytest.approx(kept.mean()))
    assert compare(table, "a", "b", tasks=TASKS[:3]).tasks.tolist() == [3, 3, 3]


def test_checkpoints_are_paired_by_tokens_and_not_by_position(two):
    table = pd.concat([table_of({"a": two["a"]}, range(1, 10)), table_of({"b": two["b"]}, range(3, 12))])
    row = compare(table, "a", "b").set_index("window").loc["all"]
    assert row.checkpoints == 7
    assert row.difference == pytest.approx((two["a"][2:] - two["b"][:7]).mean())


def test_of_two_checkpoints_at_one_token_count_the_last_one_counts(two):
    table = table_of(two, range(1, 10))
    again = pd.concat([table.assign(value=table.value**2), table])
    assert compare(again, "a", "b").equals(compare(table, "a", "b"))
    assert similarity(again, ["a", "b"]).equals(similarity(table, ["a", "b"]))


def test_what_cannot_be_tested_is_declined(two):
    table = table_of(two, range(1, 10))
    one = compare(table, "a", "b", tasks=TASKS[:1])
    assert set(one.verdict) == {"declined"} and set(one.reason) == {
        "fewer than two tasks that both runs were scored on"
    }
    same = compare(table_of({"a": two["a"], "b": two["a"]}, range(9)), "a", "b")
    assert set(same.reason) == {"the runs are equal on every task"}
    apart = compare(table_of({"a": np.full((9, 6), 0.53125), "b": np.full((9, 6), 0.5)}, range(9)), "a", "b")
    assert set(apart.reason) == {"every task differs by the same"} and set(apart.difference) == {0.03125}
    assert compare(table, "a", "nowhere").empty


def test_without_an_error_between_runs_it_is_the_t_test_of_scipy(two):
    of_tasks = (two["a"] - two["b"]).mean(axis=0)
    oracle, row = stats.ttest_1samp(of_tasks, 0.0), one_sample(of_tasks)
    assert (row["t"], row["p"]) == (pytest.approx(oracle.statistic), pytest.approx(oracle.pvalue))
    interval = oracle.confidence_interval(0.95)
    assert (row["low"], row["high"]) == (pytest.approx(interval.low), pytest.approx(interval.high))


def test_equal_runs_are_told_apart_at_the_nominal_rate():
    rng = np.random.default_rng(7)
    called = [one_sample(rng.normal(0, 0.02, 7) - rng.normal(0, 0.02, 7))["p"] <= 0.05 for _ in range(2000)]
    assert np.mean(called) == pytest.approx(0.05, abs=0.015)


def test_a_rank_correlation_is_the_mean_over_pairs_of_scipys():
    rng = np.random.default_rng(3)
    runs = {name: np.round(rng.standard_normal((12, 2)).cumsum(axis=0), 1) for name in "abc"}
    found = similarity(table_of(runs, range(12)), list(runs)).set_index("task")
    for k in range(2):
        values = np.column_stack([run[:, k] for run in runs.values()])
        for column, of in (("levels", values), ("differences", np.diff(values, axis=0))):
            pairs = [stats.spearmanr(of[:, i], of[:, j]).statistic for i, j in ((0, 1), (0, 2), (1, 2))]
            assert found.loc[TASKS[k], column] == pytest.approx(np.mean(pairs))
    assert similarity(table_of(runs, range(12)), ["a", "c"]).series.tolist() == [2, 2]


def test_a_curve_that_does_not_change_is_left_out_and_too_little_is_not_compared():
    rng = np.random.default_rng(3)
    runs = {name: rng.standard_normal((6, 1)).cumsum(axis=0) for name in "ab"}
    with_flat = similarity(table_of(runs | {"c": np.full((6, 1), 0.5)}, range(6)), ["a", "b", "c"]).iloc[0]
    assert with_flat.levels == pytest.approx(similarity(table_of(runs, range(6)), ["a", "b"]).iloc[0].levels)
    assert with_flat.reason == "1 curves do not change and are left out"
    short = similarity(table_of({name: run[:4] for name, run in runs.items()}, range(4)), ["a", "b"]).iloc[0]
    assert np.isnan(short.levels) and short.reason.startswith("fewer than two series")


def test_sizes_are_compared_where_there_are_two_of_them():
    """Two seeds of one size, by name or by the column of a sweep, are no question of sizes; nor is one series."""
    rng = np.random.default_rng(3)
    runs = {name: rng.standard_normal((6, 1)).cumsum(axis=0) for name in ("m-1b-seed1", "m-1b-seed2", "m-70m")}
    table = table_of(runs, range(6))
    assert similarity(table).series.tolist() == [3]
    one = table[table.series.str.contains("1b")]
    assert similarity(one).empty and similarity(one[one.series.str.endswith("1")]).empty
    assert similarity(table.assign(parameters=2e6)).empty
    stated = one.assign(parameters=one.series.map({"m-1b-seed1": 1e6, "m-1b-seed2": 2e6}))
    assert similarity(stated).series.tolist() == [2]


def test_columns_are_those_that_are_described(two):
    table = table_of(two, range(9))
    assert list(compare(table, "a", "b").columns) == [column.name for column in COMPARISON.columns]
    assert list(similarity(table).columns) == [column.name for column in SIMILARITY.columns]


@pytest.fixture(scope="module")
def pythia(shared_data) -> pd.DataFrame:
    return pd.read_csv(shared_data / "trajectories/pythia/pythia_v1_tidy.csv.gz").rename(columns={"model": "series"})


def test_the_smaller_batch_of_pythia_is_ahead_early_and_only_early(pythia):
    table = pythia[(pythia.shots == 5) & (pythia.metric == "acc")]
    tasks = ["arc_challenge", "arc_easy", "lambada_openai", "piqa", "sciq", "winogrande", "logiqa"]
    found = compare(table, "pythia-1.4b-1MtokBS", "pythia-1.4b", tasks=tasks)
    points = [(f"{100 * row.difference:.2f}", f"{100 * row.stderr_tasks:.2f}") for row in found.itertuples()]
    assert points == [("1.51", "0.22"), ("0.54", "0.24"), ("0.30", "0.30")]
    assert (found.stderr > found.stderr_tasks).all() and set(found.runs_from) == {"checkpoints"}
    assert found.verdict.tolist() == ["better", "no difference resolved", "no difference resolved"]


def test_reruns_of_the_ladder_are_called_as_often_as_the_level_says(shared_data):
    """What `analyze` computes of each pair: all tasks, metrics and windows. Tasks alone would call 12 of 75."""
    ladder, parts = shared_data / "trajectories/olmo-ladder", []
    for size in ("190M", "370M", "760M", "1B", "3B"):
        table = read_table([ladder / f"{size}-1xC.csv", ladder / f"{size}-1xC-rerun.csv"])
        parts.append(against_first(table))
    found = pd.concat(parts)
    tested = found[found.verdict != "declined"]
    called = tested.verdict != UNRESOLVED
    assert len(tested) == 75 and called.sum() == 3
    by_tasks = 2 * stats.t.sf((tested.difference / tested.stderr_tasks).abs(), tested.tasks - 1) <= 0.05
    assert by_tasks.sum() == 12
    accuracy = tested.metric == "acc_norm"
    assert [int(called[accuracy & (tested.window == window)].sum()) for window in ("first", "all", "last")] == [0, 0, 1]
    # LASTING is what makes the mean square of the accuracies' t over all checkpoints one
    assert (tested.t[accuracy & (tested.window == "all")] ** 2).mean() == pytest.approx(1.0, abs=0.05)


def test_two_seeds_with_an_error_of_their_own_are_called_at_the_level():
    """Runs differ in all tasks alike (sd 1) and in each task apart (sd 1): by tasks alone two in five are called."""
    rng, called, by_tasks, count = np.random.default_rng(0), 0, 0, 1000
    for _ in range(count):
        runs = rng.normal(0, 1, (2, 2, 1)) + rng.normal(0, 1, (2, 2, 8))
        means = runs.mean(axis=2)
        variance = means.var(axis=1, ddof=1).mean()
        difference = runs[0, 0] - runs[1, 0]
        called += one_sample(difference, RunError(RERUNS, ((2 * variance, 2.0),)))["p"] <= 0.05
        by_tasks += one_sample(difference)["p"] <= 0.05
    assert called / count <= 0.07 and by_tasks / count > 0.3


def test_runs_of_one_arm_say_what_reruns_differ_by(two):
    """By hand: run means 1, 3 and 2, 2, 5 have sums of squares 2 and 6 with 3 degrees of freedom; twice 8 / 3."""
    levels = {"a0": 1.0, "a1": 3.0, "b0": 2.0, "b1": 2.0, "b2": 5.0, "c": 9.0}
    apart = {"a0": np.linspace(-1, 1, 6)}
    runs = {name: level + two["b"] + apart.get(name, 0) for name, level in levels.items()}
    table = table_of(runs, range(1, 10))
    table = table.assign(arm=table.series.str[0], seed=table.series.str[1:])
    found = compare(table, "a0", "b0")
    assert set(found.runs_from) == {"reruns"}
    assert found.stderr_runs.to_numpy() == pytest.approx(np.full(3, np.sqrt(16 / 3)))
    arms = {"a0": "a", "a1": "a", "b0": "b", "b1": "b", "b2": "b", "c": "c"}
    assert between_reruns(curves_of(table), arms)["acc", "all"].parts == ((pytest.approx(16 / 3), 3.0),)
    # a window's runs are those of that window: one run that is off at its first three checkpoints alone
    off = table.assign(value=table.value + np.where((table.series == "a1") & (table.tokens <= 3), 5.0, 0.0))
    apart = between_reruns(curves_of(off), arms)
    assert apart["acc", "last"].parts == ((pytest.approx(16 / 3), 3.0),)
    assert apart["acc", "first"].parts == ((pytest.approx(2 * (24.5 + 6) / 3), 3.0),)


def test_the_scatter_of_checkpoints_is_measured_whatever_the_trend():
    """Errors of sd .01 per checkpoint around a smooth curve: s² (1 / n + .75²), by the law of large numbers."""
    rng, tokens = np.random.default_rng(5), np.geomspace(1, 1000, 2000)
    trend = 0.3 / (1 + np.exp(-(np.log(tokens) - 3)))
    values = (trend + rng.normal(0, 0.01, 2000))[:, None] + np.array([0.1, -0.1])
    error = run_error(pd.DataFrame(values, index=tokens), "all")
    (apart, freedom), (lasting, calibrated) = error.parts
    assert (error.source, freedom, calibrated) == ("checkpoints", 999, 5)
    assert apart == pytest.approx(0.01**2 / 2000, rel=0.15) and lasting == pytest.approx((0.75 * 0.01) ** 2, rel=0.15)
    # the last five checkpoints count their own neighbourhood: it scatters ten times as much
    values[-10:] = trend[-10:, None] + rng.normal(0, 0.1, (10, 1))
    assert run_error(pd.DataFrame(values, index=tokens), "last").parts[1][0] > 10 * lasting


def test_of_few_checkpoints_the_error_of_tasks_counts_twice(two):
    row = compare(table_of(two, range(1, 10)), "a", "b").iloc[0]
    few = compare(table_of({name: run[:4] for name, run in two.items()}, range(1, 5)), "a", "b").iloc[0]
    assert row.runs_from == "checkpoints" and few.runs_from == "tasks"
    assert few.stderr == pytest.approx(np.sqrt(2) * few.stderr_tasks) and few.stderr_tasks == row.stderr_tasks


def test_runs_of_two_sizes_are_compared_at_equal_flops_too():
    """Values linear in log FLOPs: the run of twice the size is .1 ahead at equal FLOPs and 1.1 at equal tokens."""
    rng, grid = np.random.default_rng(2), 2.0 ** np.arange(0, 9)
    offsets = rng.normal(0, 0.01, 6)
    runs = {"big": np.log2(2 * grid)[:, None] + 0.1 + offsets, "small": np.log2(grid)[:, None] + np.zeros(6)}
    table = pd.concat([table_of({"small": runs["small"]}, grid), table_of({"big": runs["big"]}, grid)])
    table["parameters"] = table.series.map({"big": 2e9, "small": 1e9})
    found = against_first(table).set_index(["equal", "window"])
    at_tokens, at_flops = found.loc[("tokens", "all")], found.loc[("FLOPs", "all")]
    assert at_tokens.difference == pytest.approx(1.1 + offsets.mean()) and at_tokens.checkpoints == 9
    # of the nine checkpoints of the big run the last has more FLOPs than the small run ever
    assert at_flops.difference == pytest.approx(0.1 + offsets.mean()) and at_flops.checkpoints == 8
    stated = table.assign(flops_per_token=table.series.map({"big": 7.0, "small": 7.0}))
    assert set(against_first(stated).equal) == {"tokens"}
    named = table.drop(columns="parameters").assign(series=table.series.map({"big": "m-2b", "small": "m-1b"}))
    assert against_first(named).set_index(["equal", "window"]).loc[("FLOPs", "all")].difference == pytest.approx(
        at_flops.difference
    )


def test_errors_over_documents_are_paired(two):
    """Both runs miss the same documents: draws that are alike cancel, others add; with one task they are the error."""
    rng = np.random.default_rng(4)
    table = table_of(two, range(1, 10)).assign(seed_of=0)
    shared = {task: rng.normal(0, 0.02, 200) for task in TASKS}
    own = {name: rng.normal(0, 0.01, 200) for name in "ab"}
    draws = [shared[row.task] + own[row.series] for row in table.itertuples()]
    with_draws = table.drop(columns="seed_of").assign(resampled=draws)
    found = compare(with_draws, "a", "b")
    assert found.stderr_documents.to_numpy() == pytest.approx(np.full(3, (own["a"] - own["b"]).std(ddof=1)))
    assert compare(table, "a", "b").stderr_documents.isna().all()
    one = compare(with_draws, "a", "b", tasks=TASKS[:1]).set_index("window").loc["all"]
    assert one.tasks == 1 and np.isnan(one.stderr_tasks) and one.verdict != "declined"
    assert one.stderr == pytest.approx(np.hypot(one.stderr_documents, one.stderr_runs))


def test_the_dynamics_of_pythias_sizes_are_as_similar_as_was_computed_before(pythia):
    sizes = [f"pythia-{size}" for size in ("160m", "410m", "1b-bf16", "1.4b", "2.8b", "6.9b", "12b")]
    late = pythia[(pythia.shots == 0) & (pythia.step >= 512)]
    found = similarity(late, sizes).set_index(["task", "metric"]).levels
    published = {"lambada_openai": 0.82, "piqa": 0.78, "arc_easy": 0.76, "sciq": 0.64, "winogrande": 0.64}
    for task, value in (published | {"logiqa": 0.20, "wsc": 0.18}).items():
        assert found[task, "acc"] == pytest.approx(value, abs=0.005), task
    assert found["arc_challenge", "acc_norm"] == pytest.approx(0.76, abs=0.005)
