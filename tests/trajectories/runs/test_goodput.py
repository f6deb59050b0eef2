"""What the time of a run went into: every second is of one kind."""

import pytest

from fineline_jax.trajectories.runs.goodput import KINDS, goodput_line, goodput_table, seconds_by_kind

LINES = [
    # Started at 1000 s, the first step begun at 1010; 10 steps of 2 s after 8 s of compiling, 1 s waiting for data.
    {"step": 10, "unix_time": 1039.0, "interval_seconds": 29.0, "step_seconds": 2.9, "data_wait_seconds": 0.1,
     "start_seconds": 10.0, "compile_seconds": 8.0},
    {"step": 10, "tokens": 5, "validation_loss/held_out": 3.0},
    # A save of 3 s and validation of 2 s, then 10 steps in 20 s without waiting.
    {"step": 20, "unix_time": 1064.0, "interval_seconds": 25.0, "step_seconds": 2.5, "data_wait_seconds": 0.0,
     "checkpoint_seconds": 3.0, "evaluation_seconds": 2.0},
    # Killed somewhere, started again at 1100, the first step begun at 1107: 43 s since the line before.
    {"step": 30, "unix_time": 1129.0, "interval_seconds": 22.0, "step_seconds": 2.2, "data_wait_seconds": 0.0,
     "start_seconds": 7.0, "compile_seconds": 2.0},
]  # fmt: skip


def test_every_second_from_the_start_to_the_last_line_is_of_one_kind() -> None:
    spent = seconds_by_kind(LINES)
    assert spent == pytest.approx(
        {"step": 60.0, "data_wait": 1.0, "compile": 10.0, "checkpoint": 3.0, "evaluation": 2.0, "restart": 53.0}
    )
    assert sum(spent.values()) == pytest.approx(1129.0 - 1000.0)


def test_the_table_and_the_line_say_the_share_of_the_steps() -> None:
    table = goodput_table({"run": LINES, "old": [{"step": 1, "loss": 2.0}]})
    assert list(table.columns) == ["run", "goodput", *KINDS] and list(table["run"]) == ["run"]
    assert table["goodput"][0] == pytest.approx(60 / 129)
    assert goodput_line(LINES) == (
        "goodput 47%: step 1m00s, data wait 1s, compile 10s, checkpoint 3s, evaluation 2s, restart 53s"
    )
    assert goodput_line([]) == ""
