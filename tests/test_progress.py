"""Progress in a log: what is done, the rate, the time left."""

import re
import types

import pytest

from fineline_jax import progress
from fineline_jax.text_table import counted


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """A clock to be set by hand."""
    now = [0.0]
    monkeypatch.setattr(progress, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_a_log_gets_a_line_now_and_then_with_amount_rate_and_time_left(clock, capsys):
    with progress.bar("mine", 4_000_000, "tokens") as advance:
        for second in range(1, 41):
            clock[0] = float(second)
            advance(100_000, f"loss {second}")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "mine: 1.5M of 4M tokens, 100k/s, 25s left, loss 15",
        "mine: 3M of 4M tokens, 100k/s, 10s left, loss 30",
        "mine: 4M of 4M tokens, 100k/s, loss 40",
    ]


def test_what_an_earlier_run_had_done_counts_as_done_and_not_in_the_rate(clock, capsys):
    with progress.bar("mine", 1000, "tokens", done=800) as advance:
        clock[0] = 20.0
        advance(100)
    assert capsys.readouterr().err == "mine: 900 of 1k tokens, 5/s, 20s left\n"


def test_a_terminal_gets_a_bar_with_amount_rate_and_time_left(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "160")
    with progress.bar("mine", 2000, "tokens") as advance:
        advance(500, "loss 2.5")
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    assert "mine" in shown and "500 of 2k tokens" in shown and "loss 2.5" in shown
    assert re.search(r"-:--:--|\d:\d\d:\d\d", shown)


def test_a_line_comes_after_15_seconds_or_at_the_end_once_and_keeps_the_last_note(clock, capsys):
    with progress.bar("mine", 100, "files") as advance:
        clock[0] = 14.9
        advance(10, "first")
        clock[0] = 15.0
        advance(20)
        clock[0] = 16.0
        advance(69, "third")
        clock[0] = 17.0
        advance(1)
        clock[0] = 18.0
        advance(1)  # more than there was
    assert capsys.readouterr().err.splitlines() == [
        "mine: 30 of 100 files, 2/s, 35s left, first",
        "mine: 100 of 100 files, 35/s, third",
    ]


def test_a_clock_of_work_leaves_out_what_is_done_while_it_stands_still(clock, capsys):
    work = progress.Stopwatch()
    with progress.bar("mine", 1000, "tokens", clock=work) as advance:
        clock[0] = 100.0  # compilation
        advance(100)
        work.start()
        for second in (101, 102, 103, 104):
            clock[0] = float(second)
            advance(10)
        work.stop()
        clock[0] = 1000.0  # scoring
        work.start()
        clock[0] = 1001.0
        advance(10)
        work.start()  # goes on
        clock[0] = 1016.0
        advance(30)
    assert work() == 20.0
    assert capsys.readouterr().err.splitlines() == [
        "mine: 100 of 1k tokens, 0/s",
        "mine: 150 of 1k tokens, 10/s, 1m25s left",
        "mine: 180 of 1k tokens, 2/s, 6m50s left",
    ]


def test_where_nothing_was_done_no_time_left_is_guessed(clock, capsys):
    with progress.bar("mine", 100, "files") as advance:
        clock[0] = 20.0
        advance(0)
    assert capsys.readouterr().err == "mine: 0 of 100 files, 0/s\n"


def test_a_terminal_is_told_what_an_earlier_run_had_done(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "160")
    with progress.bar("mine", 2000, "tokens", done=1500) as advance:
        advance(250, "loss 2.5")
        advance(100)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    assert "1.85k of 2k tokens" in shown and shown.rstrip().splitlines()[-1].endswith("loss 2.5")


def test_the_amount_of_a_bar_has_its_rate_where_it_is_known():
    column = progress._Amount("tokens")
    task = types.SimpleNamespace(speed=None, completed=1500.0, total=None)
    assert column.render(task).plain == "1.5k of 0 tokens"  # pyright: ignore
    task = types.SimpleNamespace(speed=250.0, completed=1500.0, total=2e6)
    assert column.render(task).plain == "1.5k of 2M tokens, 250/s"  # pyright: ignore


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (7.25, "7.25"),
        (999, "999"),
        (1000, "1k"),
        (1234, "1.23k"),
        (999_499, "999k"),
        (999_999, "1M"),
        (999.7, "1k"),
        (1_000_000, "1M"),
        (1_234_567, "1.23M"),
        (2e9, "2B"),
        (1.26e12, "1.26T"),
        (-5000, "-5k"),
    ],
)
def test_numbers_for_people(number, text):
    assert progress.short(number) == text


def test_nouns_are_counted():
    assert [counted(n, "checkpoint") for n in (0, 1, 2)] == ["0 checkpoints", "1 checkpoint", "2 checkpoints"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (59.9, "59s"),
        (60, "1m00s"),
        (61, "1m01s"),
        (3599, "59m59s"),
        (3600, "1h00m"),
        (3661, "1h01m"),
        (86_399, "23h59m"),
        (86_400, "1d00h"),
        (90_000, "1d01h"),
    ],
)
def test_durations_for_people(seconds, text):
    assert progress.duration(seconds) == text
