"""What a report writes is read again with the same verdicts; scores are counted to a stated ceiling."""

import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from trajectories_simulated import simulated_table

from fineline_jax.errors import UserError
from fineline_jax.trajectories.statistics.dynamics import summarise
from fineline_jax.trajectories.table import normalise, read_table, write_table


def ours() -> pd.DataFrame:
    """Accuracies with a stated origin of chance and a bootstrap whose errors all checkpoints of a task share; the last
    checkpoints of two tasks fall, by more than the shared errors and less than independent ones."""
    table = simulated_table(checkpoints=20)
    table = table[table["metric"] == "acc"].reset_index(drop=True)
    table["chance_from"] = np.where(table["task"] == "addition", "always the same answer", "")
    late = table["task"].isin(["adjective_order", "addition"]) & (table["tokens"] > 6e6)
    table.loc[late, "value"] -= 0.03
    rng = np.random.default_rng(5)
    shared = {task: rng.normal(0, 0.02, 200) for task in table["task"].unique()}
    drawn = [shared[task] + rng.normal(0, 0.002, 200) for task in table["task"]]
    table["resampled"] = [one.astype(np.float32) for one in drawn]
    return table


@pytest.mark.parametrize("name", ["", "tidy.csv", "tidy.parquet"])
def test_a_report_is_read_again_with_the_same_verdicts(name: str, tmp_path: Path) -> None:
    table = normalise(ours())
    write_table(table, tmp_path)
    again = read_table(tmp_path / name)
    assert list(again["chance_from"]) == list(table["chance_from"])
    pd.testing.assert_frame_equal(summarise(again), summarise(table))
    alone = summarise(table.drop(columns="resampled"))
    assert (alone["verdict"] != summarise(table)["verdict"]).any()  # the draws are what decides here


def test_a_report_without_draws_takes_away_those_of_the_one_before(tmp_path: Path) -> None:
    write_table(normalise(ours()), tmp_path)
    write_table(normalise(ours().drop(columns="resampled")), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"tidy.csv", "tidy.parquet"}
    assert "resampled" not in read_table(tmp_path)


def test_the_stated_score_counts_again_unless_another_is_stated(tmp_path: Path) -> None:
    write_table(read_table(written(tmp_path / "in.csv", chance=0.25), share=0.8), tmp_path)
    assert set(read_table(tmp_path)["score"]) == {0.25 + 0.8 * 0.75}
    assert set(read_table(tmp_path, share=0.5)["score"]) == {0.25 + 0.5 * 0.75}


# ---- the ceiling


def written(path: Path, chance: float, **more: float) -> Path:
    rows = {"series": "s", "tokens": [1e6, 1e7], "task": "t", "metric": "acc", "value": [0.3, 0.7], "chance": chance}
    pd.DataFrame(rows | more).to_csv(path, index=False)
    return path


def test_the_way_is_counted_to_the_ceiling_of_the_option_or_of_the_column(tmp_path: Path) -> None:
    plain, own = written(tmp_path / "a.csv", 0.25), written(tmp_path / "b.csv", 0.25, ceiling=0.65)
    assert "score" not in read_table(plain)  # the statistics take half of the way to 1
    assert set(read_table(plain, ceiling=0.85)["score"]) == {0.25 + 0.5 * 0.6}
    assert set(read_table(plain, ceiling=0.85, share=0.25)["score"]) == {0.25 + 0.25 * 0.6}
    assert list(read_table(own)["score"]) == pytest.approx([0.45, 0.45])
    assert list(read_table(own, ceiling=0.85)["score"]) == pytest.approx([0.45, 0.45])  # the table knows its task


def test_the_ceiling_of_a_task_may_be_in_the_table_of_tasks(tmp_path: Path) -> None:
    tasks = tmp_path / "tasks.csv"
    tasks.write_text("task,ceiling\nt,0.75\n")
    table = read_table(written(tmp_path / "a.csv", 0.25), tasks_table=tasks)
    assert set(table["score"]) == {0.5} and set(table["ceiling"]) == {0.75}
    assert summarise(table)["score"].tolist() == [0.5]


@pytest.mark.parametrize("ceiling", [0.25, 0.2, 1.5])
def test_a_ceiling_that_cannot_be_is_refused(ceiling: float, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"ceiling {ceiling:g} of t: must be above its chance level 0.25"):
        read_table(written(tmp_path / "a.csv", 0.25, ceiling=ceiling))


def test_curves_that_are_not_known_or_do_not_move_give_no_warning() -> None:
    flat = {"series": "s", "tokens": [0, 1e6, 1e7], "task": "t", "metric": "loss", "value": 0.0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        summarise(normalise(pd.DataFrame(flat)))
