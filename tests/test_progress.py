"""Progress in a log: what is done, the rate, the time left."""

import re
import types

import pytest

from fineline_jax import progress


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


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (59.9, "59s"), (61, "1m01s"), (3661, "1h01m"), (90_000, "1d01h")]
)
def test_durations_for_people(seconds, text):
    assert progress.duration(seconds) == text
