"""Reading and checking tables of scores: every accepted layout gives the same table, every defect is named."""

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from trajectories_simulated import simulated_table

from fineline_jax.errors import UserError
from fineline_jax.facts.score_table import COLUMNS
from fineline_jax.trajectories.table import normalise, read_table, write_table


def test_tidy_files_survive_writing_and_reading(tmp_path: Path) -> None:
    table = normalise(simulated_table())
    write_table(table, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tidy.csv", "tidy.parquet"]
    for source in (tmp_path, tmp_path / "tidy.csv", tmp_path / "tidy.parquet"):
        pd.testing.assert_frame_equal(read_table(source), table)


def test_series_tasks_and_checkpoints_keep_a_readable_order() -> None:
    frame = simulated_table()
    table = normalise(frame.sample(frac=1, random_state=0))
    assert tuple(table.columns) == COLUMNS
    for _, curve in table.groupby(["series", "task", "metric"]):
        assert curve["tokens"].is_monotonic_increasing


def test_tables_with_fewer_columns_are_completed() -> None:
    frame = pd.DataFrame({"model": "m", "tokens": [1e9, 2e9], "task": "piqa", "metric": "acc", "value": [0.5, 0.6]})
    table = normalise(frame)
    assert list(table["checkpoint"]) == ["tokens_1000000000", "tokens_2000000000"]
    assert set(table["domain"]) == {"commonsense"} and set(table["chance"]) == {0.5}
    assert table[["stderr", "n", "step"]].isna().all(axis=None)


def test_unknown_tasks_have_no_chance_and_no_invented_domain() -> None:
    frame = pd.DataFrame({"series": "m", "tokens": [1e9], "task": "my_task", "metric": "acc", "value": [0.5]})
    table = normalise(frame)
    assert table["domain"].item() == "other" and np.isnan(table["chance"].item())


def _broken(**changes: object) -> pd.DataFrame:
    frame = simulated_table().astype({"value": object, "tokens": object})
    for column, value in changes.items():
        frame.loc[3, column] = value
    return frame


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (_broken(value="oops"), ["value", "'oops'", "line 5"]),
        (_broken(value=np.nan), ["value", "line 5"]),
        (_broken(tokens=-1), ["tokens", "line 5", "at least 0"]),
        (_broken(stderr=-0.1), ["stderr", "line 5"]),
        (_broken(chance=1.5), ["chance", "from 0 to 1"]),
        (_broken(task=None), ["task", "line 5"]),
        (_broken(tokens=77), ["step_8", "several values of 'tokens'"]),
        (_broken(domain="elsewhere"), ["adjective_order", "several domains"]),
        (simulated_table().drop(columns="metric"), ["'metric' is missing"]),
        (simulated_table().iloc[:0], ["no rows"]),
        (pd.concat([simulated_table(), simulated_table().iloc[:1]]), ["occurs twice", "adjective_order"]),
    ],
)
def test_every_defect_is_named(frame: pd.DataFrame, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        normalise(frame, source="scores.csv")
    message = str(error.value)
    assert message.startswith("scores.csv: ") and "\n" not in message
    for word in words:
        assert word in message


def test_files_that_disagree_are_both_named(tmp_path: Path) -> None:
    one = simulated_table()
    one.to_csv(tmp_path / "one.csv", index=False)
    two = one.copy()
    two.loc[0, "value"] = 0.123
    two.to_csv(tmp_path / "two.csv", index=False)
    assert len(read_table([tmp_path / "one.csv", tmp_path / "one.csv"])) == len(one)
    with pytest.raises(UserError, match=r"one\.csv and .*two\.csv.*adjective_order"):
        read_table([tmp_path / "one.csv", tmp_path / "two.csv"])


@pytest.mark.parametrize("name", ["absent.csv", "notes.txt", "empty.csv", "empty.parquet", "bad.json", "list.json"])
def test_files_that_are_no_table(tmp_path: Path, name: str) -> None:
    contents = {"notes.txt": "x", "empty.csv": "", "empty.parquet": "", "bad.json": "{", "list.json": '{"results": []}'}
    if name in contents:
        (tmp_path / name).write_text(contents[name])
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        read_table(tmp_path / name)


def _modern(path: Path, revision: str, acc: float, model: str = "org/model-1b") -> None:
    """A result file as lm-eval 0.4 writes it, with a group, its members and a filter."""
    content = {
        "results": {
            "mmlu": {"acc,none": 0.3, "acc_stderr,none": 0.01, "alias": "mmlu"},
            "mmlu_anatomy": {"alias": " - anatomy", "acc,none": 0.3, "acc_stderr,none": 0.04},
            "piqa": {
                "alias": "piqa",
                "acc,none": acc,
                "acc_stderr,none": 0.011,
                "acc_norm,none": acc,
                "acc_norm_stderr,none": "N/A",
            },
            "gsm8k": {"alias": "gsm8k", "exact_match,strict-match": 0.1, "exact_match_stderr,strict-match": 0.02},
        },
        "group_subtasks": {"mmlu": ["mmlu_anatomy"], "piqa": []},
        "n-shot": {"piqa": 0, "mmlu_anatomy": 0, "gsm8k": 0},
        "n-samples": {"piqa": {"original": 1838, "effective": 1838}},
        "config": {"model": "hf", "model_args": {"pretrained": model, "revision": revision}},
        "model_name": model,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def test_modern_lm_eval_trees(tmp_path: Path) -> None:
    _modern(tmp_path / "org__model-1b" / "results_2025-01-01T00-00-00.json", "step1000-tokens4B", 0.6)
    _modern(tmp_path / "org__model-1b" / "results_2025-01-02T00-00-00.json", "step2000-tokens8B", 0.7)
    table = read_table(tmp_path)
    assert set(table["series"]) == {"model-1b"}
    piqa = table[(table["task"] == "piqa") & (table["metric"] == "acc")]
    assert (
        list(piqa["value"]) == [0.6, 0.7] and list(piqa["tokens"]) == [4e9, 8e9] and list(piqa["step"]) == [1000, 2000]
    )
    assert set(piqa["n"]) == {1838} and set(piqa["stderr"]) == {0.011}
    assert np.isnan(table.loc[table["metric"] == "acc_norm", "stderr"]).all()
    assert set(table["task"]) == {"mmlu_anatomy", "piqa", "gsm8k"}  # the group is its members
    assert "exact_match (strict-match)" in set(table["metric"])


def test_steps_become_tokens_only_when_told(tmp_path: Path) -> None:
    _modern(tmp_path / "results_1.json", "step1000", 0.6)
    with pytest.raises(UserError, match="--tokens-per-step"):
        read_table(tmp_path)
    assert set(read_table(tmp_path, tokens_per_step=2_000_000)["tokens"]) == {2e9}


def test_one_folder_per_checkpoint(tmp_path: Path) -> None:
    for step in (100, 200):
        _modern(tmp_path / f"m{step}" / "results_1.json", "", 0.6, model=f"/data/runs/demo/step_{step}")
    table = read_table(tmp_path, tokens_per_step=1000)
    assert set(table["series"]) == {"demo"} and sorted(set(table["tokens"])) == [1e5, 2e5]


def test_the_old_layout_of_pythia_equals_its_tidy_table() -> None:
    root = os.environ.get("FINELINE_SHARED_DATA")
    if not root:
        pytest.skip("FINELINE_SHARED_DATA is not set")
    pythia = Path(root, "trajectories", "pythia")
    tree = read_table(pythia / "raw")
    tree["series"] = tree["series"].str.replace("pythia-v1.1-", "pythia-")
    flat = read_table(pythia / "pythia_v1_tidy.csv.gz")
    joined = tree.merge(flat, on=["series", "tokens", "task", "metric"], suffixes=("", "_flat"), how="left")
    assert len(joined) == len(tree) == 4644 + 1920 + 1920
    np.testing.assert_array_equal(joined["value"], joined["value_flat"])
    np.testing.assert_array_equal(joined["stderr"], joined["stderr_flat"])
    assert set(tree["step"] * 2_097_152 == tree["tokens"]) == {True, False}  # the 1M-token ablation has its own batch
