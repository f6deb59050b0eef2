"""Comparing runs: against scipy, against published runs and their reruns."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from fineline_jax.trajectories.statistics.comparison import COMPARISON, compare, one_sample, paired
from fineline_jax.trajectories.statistics.similarity import SIMILARITY, similarity

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
        oracle = stats.ttest_1samp(of_tasks, 0.0)
        row = found.loc[window]
        assert row.difference == pytest.approx(of_tasks.mean())
        assert row.stderr == pytest.approx(stats.sem(of_tasks))
        assert (row.t, row.p) == (pytest.approx(oracle.statistic), pytest.approx(oracle.pvalue))
        interval = oracle.confidence_interval(0.95)
        assert (row.low, row.high) == (pytest.approx(interval.low), pytest.approx(interval.high))
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
    assert similarity(again).equals(similarity(table))


def test_errors_of_the_two_runs_add_in_squares(two):
    table = table_of(two, range(1, 10))
    table["stderr"] = np.where(table.series == "a", 0.03, 0.04)
    pairs = paired(table, "a", "b")
    assert list(pairs.columns) == ["metric", "task", "tokens", "difference", "stderr"] and len(pairs) == 54
    assert pairs.stderr.to_numpy() == pytest.approx(np.full(54, 0.05))
    at = pairs.set_index(["task", "tokens"]).difference
    assert at["task 2", 4] == pytest.approx(two["a"][3, 2] - two["b"][3, 2])


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


def test_equal_runs_are_told_apart_at_the_nominal_rate():
    rng = np.random.default_rng(7)
    called = [one_sample(rng.normal(0, 0.02, 7) - rng.normal(0, 0.02, 7))["p"] <= 0.05 for _ in range(2000)]
    assert np.mean(called) == pytest.approx(0.05, abs=0.015)


def test_a_rank_correlation_is_the_mean_over_pairs_of_scipys():
    rng = np.random.default_rng(3)
    runs = {name: np.round(rng.standard_normal((12, 2)).cumsum(axis=0), 1) for name in "abc"}
    found = similarity(table_of(runs, range(12))).set_index("task")
    for k in range(2):
        values = np.column_stack([run[:, k] for run in runs.values()])
        for column, of in (("levels", values), ("differences", np.diff(values, axis=0))):
            pairs = [stats.spearmanr(of[:, i], of[:, j]).statistic for i, j in ((0, 1), (0, 2), (1, 2))]
            assert found.loc[TASKS[k], column] == pytest.approx(np.mean(pairs))
    assert similarity(table_of(runs, range(12)), ["a", "c"]).series.tolist() == [2, 2]


def test_a_curve_that_does_not_change_is_left_out_and_too_little_is_not_compared():
    rng = np.random.default_rng(3)
    runs = {name: rng.standard_normal((6, 1)).cumsum(axis=0) for name in "ab"}
    with_flat = similarity(table_of(runs | {"c": np.full((6, 1), 0.5)}, range(6))).iloc[0]
    assert with_flat.levels == pytest.approx(similarity(table_of(runs, range(6))).iloc[0].levels)
    assert with_flat.reason == "1 curves do not change and are left out"
    short = similarity(table_of({name: run[:4] for name, run in runs.items()}, range(4))).iloc[0]
    assert np.isnan(short.levels) and short.reason.startswith("fewer than two series")


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
    points = [(f"{100 * row.difference:.2f}", f"{100 * row.stderr:.2f}") for row in found.itertuples()]
    assert points == [("1.51", "0.22"), ("0.54", "0.24"), ("0.30", "0.30")]
    assert found.verdict.tolist() == ["better", "no difference resolved", "no difference resolved"]


def test_no_rerun_of_the_ladder_is_called_different(shared_data):
    names = (
        "hellaswag_val arc_easy_test arc_challenge_test csqa_val openbookqa_test piqa_val socialiqa_val winogrande_val"
    )
    subjects = " ".join(f"mmlu_{s}_test" for s in ("stem", "humanities", "social_sciences", "other"))
    columns = [f"{name}_rc_5shot_len_norm" for name in f"{names} {subjects}".split()] + ["boolq_val_rc_5shot_acc"]
    called, t = 0, []
    for size in ("190M", "370M", "760M", "1B", "3B"):
        parts = []
        for run in (f"{size}-1xC", f"{size}-1xC-rerun"):
            frame = pd.read_csv(shared_data / "trajectories/olmo-ladder" / f"{run}.csv")
            long = frame.melt("_step", [f"eval/downstream/{c}" for c in columns], "task").rename(
                columns={"_step": "tokens"}
            )
            parts.append(long.assign(series=run, metric="acc", stderr=np.nan))
        found = compare(pd.concat(parts), f"{size}-1xC-rerun", f"{size}-1xC").set_index("window").loc["all"]
        called, t = called + (found.verdict != "no difference resolved"), [*t, abs(found.t)]
    assert called == 0
    assert max(t) == pytest.approx(2.0, abs=0.05)


def test_the_dynamics_of_pythias_sizes_are_as_similar_as_was_computed_before(pythia):
    sizes = [f"pythia-{size}" for size in ("160m", "410m", "1b-bf16", "1.4b", "2.8b", "6.9b", "12b")]
    late = pythia[(pythia.shots == 0) & (pythia.step >= 512)]
    found = similarity(late, sizes).set_index(["task", "metric"]).levels
    published = {"lambada_openai": 0.82, "piqa": 0.78, "arc_easy": 0.76, "sciq": 0.64, "winogrande": 0.64}
    for task, value in (published | {"logiqa": 0.20, "wsc": 0.18}).items():
        assert found[task, "acc"] == pytest.approx(value, abs=0.005), task
    assert found["arc_challenge", "acc_norm"] == pytest.approx(0.76, abs=0.005)
