"""The progress of a run: rate and time left are those of its steps."""

import types

import pytest

from fineline_jax import progress
from fineline_jax.models.config import ModelConfig
from fineline_jax.recipe import Batch, Clock, Data, Optimizer, Recipe, Schedule, Source
from fineline_jax.training.observers import ProgressBar


def test_compilation_and_what_is_done_at_checkpoints_are_not_in_the_time_left(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    recipe = Recipe(
        name="mine",
        model=ModelConfig(vocab_size=8, width=8, layers=1, heads=1, mlp_width=8, context=100),
        data=Data((Source("-"),), sequence_length=100),
        batch=Batch(10),
        optimizer=Optimizer(Schedule()),
        tokens=1_000_000,
    )
    work = progress.Stopwatch()
    bar = ProgressBar(Clock(recipe), 0, 1000, types.SimpleNamespace(note=""), work)  # pyright: ignore[reportArgumentType]
    for step in range(60):
        bar.before_step(step)
        now[0] += 300.0 if step == 0 else 1.0  # compilation; then a step takes a second
        bar.after_step(step + 1, {}, 0.0)
        if step % 20 == 19:
            bar.before_save(step + 1, {}, True)
            now[0] += 7200.0  # validation, scoring
    bar.close()
    assert work() == 59.0
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "mine: 1k of 1M tokens, 0/s"  # nothing is known yet
    assert len(lines) > 3
    for line in lines[1:]:
        done = int(line.split("mine: ")[1].split("k of")[0])
        assert line == f"mine: {done}k of 1M tokens, 1k/s, {progress.duration(1000 - done)} left"


@pytest.mark.parametrize("terminal", [False, True])
def test_a_run_of_one_step_has_a_bar(monkeypatch, capsys, terminal):
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    work = progress.Stopwatch()
    with progress.bar("mine", 10, "tokens", clock=work) as advance:
        advance(10, "loss 3")
    assert "10 of 10 tokens" in capsys.readouterr().err
