"""Scores that measure nothing: the published ones of Pythia are found, and nothing else is."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fineline_jax.trajectories.statistics.defects import defects, duplicates, without_defects
from fineline_jax.trajectories.statistics.domains import domain_curves
from fineline_jax.trajectories.table import normalise, read_table


def made(series: int = 2, tasks: int = 4, checkpoints: int = 6, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    rows = [
        {"series": f"s{s}", "tokens": t * 1e9, "task": f"t{k}", "metric": "acc", "value": rng.uniform(), "chance": 0.25,
         "domain": "d", "stderr": 0.01}
        for s in range(series) for k in range(tasks) for t in range(checkpoints)
    ]  # fmt: skip
    return normalise(pd.DataFrame(rows))


def with_values_of(table: pd.DataFrame, series: str, other: str, tokens: list[float]) -> pd.DataFrame:
    """`other` has the results of `series` at these tokens."""
    values = table[table["series"] == series].set_index(["task", "tokens"])["value"]
    rows = (table["series"] == other) & table["tokens"].isin(tokens)
    table.loc[rows, "value"] = [values[task, at] for task, at in table.loc[rows, ["task", "tokens"]].to_numpy()]
    return table


def test_pythias_28b_was_evaluated_twice_at_fourteen_steps_and_wsc_and_moral_scenarios_are_stuck() -> None:
    """shared/notes/analysis.md 2.2: byte-identical results; what all sizes share at steps 0 and 1 is as it must be."""
    root = os.environ.get("FINELINE_SHARED_DATA")
    if not root:
        pytest.skip("FINELINE_SHARED_DATA is not set")
    table = read_table(Path(root, "trajectories/pythia/pythia_v1_tidy.csv.gz"))
    rows = defects(table)
    same = rows[rows["kind"] == "same results"]
    assert set(same["series"]) == {f"pythia-2.8b{d} ({n}-shot)" for d in ("", "-deduped") for n in (0, 5)}
    steps = same[same["series"].str.startswith("pythia-2.8b (")].groupby("series")["where"].agg(set).to_dict()
    early = {f"step_{step}" for step in (2, 4, 8, 16, 32, 64, 128, 256, 512, 1000)}
    late = {f"step_{step}" for step in (13000, 23000, 33000, 43000)}
    assert steps == {"pythia-2.8b (0-shot)": early, "pythia-2.8b (5-shot)": late}
    constant = rows[rows["kind"] == "constant answer"]["where"].value_counts()
    assert list(constant.index[:2]) == ["wsc", "hendrycksTest-moral_scenarios"] and constant.iloc[0] >= 30
    kept = without_defects(table)
    assert "wsc" not in set(kept["task"]) and "hendrycksTest-moral_scenarios" in set(kept["task"])


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.sampled_from([[1e9], [2e9, 5e9]]))
def test_a_copy_is_found_and_named_in_both_series_whatever_the_order_of_rows(seed: int, tokens: list[float]) -> None:
    table = with_values_of(made(3, seed=seed), "s0", "s2", tokens).sample(frac=1, random_state=seed)
    found = duplicates(table)
    assert {(row.series, row.others, row.tokens) for row in found.itertuples()} == {
        (one, other, at) for at in tokens for one, other in (("s0", "s2"), ("s2", "s0"))
    }
    assert set(found["scores"]) == {4}


def test_one_score_that_differs_is_no_copy_nor_are_untrained_checkpoints() -> None:
    table = with_values_of(made(), "s0", "s1", [1e9])
    table.loc[(table["series"] == "s1") & (table["tokens"] == 1e9) & (table["task"] == "t2"), "value"] += 1e-6
    assert duplicates(table).empty
    assert duplicates(with_values_of(made(), "s0", "s1", [0.0])).empty
    # a step with learning rate 0 is the initialisation still
    table = with_values_of(made(), "s0", "s1", [0.0, 1e9])
    still = table["tokens"] == 1e9
    first = table[table["tokens"] == 0].set_index(["series", "task"])["value"]
    table.loc[still, "value"] = [first[s, t] for s, t in table.loc[still, ["series", "task"]].to_numpy()]
    assert duplicates(table).empty
    assert duplicates(with_values_of(made(tasks=2), "s0", "s1", [1e9])).empty  # two scores may agree by chance


def test_neither_is_in_the_mean_of_a_domain() -> None:
    table = with_values_of(made(), "s0", "s1", [2e9])
    table.loc[table["task"] == "t3", "value"] = 0.365
    means = domain_curves(table)
    assert 2e9 not in set(means["tokens"]) and set(means["tasks"]) == {3}
    tasks = table[(table["series"] == "s1") & (table["tokens"] == 1e9) & (table["task"] != "t3")]
    expected = ((tasks["value"] - 0.25) / 0.75).mean()
    mean = means[(means["series"] == "s1") & (means["tokens"] == 1e9)]["value"].iloc[0]
    assert mean == pytest.approx(expected)
    # stuck in one of three series, it stays: means over other tasks could not be compared
    table = made(3)
    table.loc[(table["task"] == "t3") & (table["series"] == "s0"), "value"] = 0.365
    assert set(domain_curves(table)["tasks"]) == {4}
    assert list(defects(table)["where"]) == ["t3"]
