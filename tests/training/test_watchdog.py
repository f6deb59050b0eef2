"""`--stuck-after`: a process in which nothing happens ends, and the run goes on from what is saved."""

import re
from pathlib import Path

import pytest
from commands import MINI_RECIPE, assert_same_run, in_a_process
from data_examples import amber

from fineline_jax.catalogue import load_recipe
from fineline_jax.cli import main
from fineline_jax.data.corpora import prepare_amber
from fineline_jax.errors import UserError
from fineline_jax.training.observers import Watchdog

ALONE = """
import threading, time
from fineline_jax.training.observers import Watchdog

ended = Watchdog(0.3)
ended.close()
time.sleep(0.5)
watchdog = Watchdog(1.5)
for happens in (
    lambda: watchdog.before_step(1), lambda: watchdog.after_step(1, {}, 0.0),
    lambda: watchdog.before_save(1, {}, True), lambda: watchdog.after_save(1, {}, True, lambda: None),
):
    time.sleep(0.8)
    happens()
print("alive after 3.2 s", flush=True)

def a_collective_that_never_ends():
    threading.Event().wait()

a_collective_that_never_ends()
"""
STUCK = """
import sys, threading
from fineline_jax.cli import main
from fineline_jax.training import loop

real = loop.global_batch

def global_batch(batches, step, *where):
    if step == 5:
        threading.Event().wait()
    return real(batches, step, *where)

loop.global_batch = global_batch
sys.exit(main(["pretrain", "mini.py", "--run", "run", "--stuck-after", "6"]))
"""


def test_a_step_a_save_and_an_end_keep_it_quiet_and_a_wait_without_end_ends_the_process() -> None:
    """Of the 3.2 s no 1.5 s are without a sign; a closed one, whose time is long over, says nothing."""
    done = in_a_process(ALONE)
    assert (done.returncode, done.stdout) == (143, "alive after 3.2 s\n"), done.stderr
    *stacks, line = done.stderr.splitlines()
    assert line == "fineline: nothing has happened for 1.5 s (--stuck-after); start all again"
    assert re.search(r"Timeout \(0:00:01\.5", stacks[0]) and stacks[0] not in stacks[1:]
    assert any("in a_collective_that_never_ends" in stack for stack in stacks), "where it stood"


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), float("inf"), 1e300])
def test_what_is_no_time_is_refused(seconds: float) -> None:
    with pytest.raises(UserError, match=r"--stuck-after \S+: must be a number of seconds above 0"):
        Watchdog(seconds)


@pytest.mark.slow
def test_a_run_that_got_stuck_goes_on_to_the_end_of_one_that_did_not(tmp_path: Path, monkeypatch) -> None:
    """The batch of step 5 never comes. The state after step 4 is saved: 4 x 32 tokens are a multiple of 64."""
    monkeypatch.chdir(tmp_path)
    lines = amber(tmp_path / "lines.jsonl", [[(7 * i + j) % 400 for j in range(9)] for i in range(70)])
    prepare_amber([lines], tmp_path / "data", vocab_size=512, sequence_length=8)
    (tmp_path / "mini.py").write_text(MINI_RECIPE)
    assert main(["pretrain", "mini.py", "--run", "whole"]) == 0
    done = in_a_process(STUCK)
    assert done.returncode == 143 and "for 6 s (--stuck-after)" in done.stderr.splitlines()[-1], done.stderr
    assert "in global_batch" in done.stderr and (tmp_path / "run/checkpoints/4/complete.json").is_file()
    assert main(["pretrain", "mini.py", "--run", "run"]) == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole", load_recipe("mini.py"))
