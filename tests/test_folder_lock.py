"""One writing process per folder: who is refused, who waits, and what a dead process leaves."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fineline_jax import folder_lock
from fineline_jax.errors import UserError
from fineline_jax.folder_lock import writing

HOLD = """
import sys
from pathlib import Path
from fineline_jax import folder_lock
folder_lock.HEARTBEAT_SECONDS, folder_lock.STALE_SECONDS, folder_lock.CONFIRM_SECONDS = 0.2, 1.5, 0.3
part = tuple(map(int, sys.argv[2:4])) or None
with folder_lock.writing(Path(sys.argv[1]), "--run", part=part):
    print("held", flush=True)
    sys.stdin.readline()
"""


def hold(folder: Path, *part: int) -> subprocess.Popen:
    """A process that has the lock until it reads a line or dies."""
    command = [sys.executable, "-c", HOLD, str(folder), *map(str, part)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def kill(process: subprocess.Popen) -> None:
    process.kill()
    process.communicate()


@pytest.fixture(autouse=True)
def short_grace(monkeypatch) -> None:
    monkeypatch.setattr(folder_lock, "GRACE_SECONDS", 0.3)
    monkeypatch.setattr(folder_lock, "POLL_SECONDS", 0.05)


@pytest.fixture
def lease(monkeypatch) -> Iterator[None]:
    """As on a file system without flock, in tenths of seconds."""
    monkeypatch.setenv("FINELINE_LOCK_LEASE", "1")
    for name, seconds in {"HEARTBEAT": 0.2, "STALE": 1.5, "CONFIRM": 0.3, "WAIT": 0.5}.items():
        monkeypatch.setattr(folder_lock, f"{name}_SECONDS", seconds)
    yield


def refusal(folder: Path, part: tuple[int, int] | None = None) -> str:
    with pytest.raises(UserError) as raised, writing(folder, "--run", part=part):
        pass
    return str(raised.value)


def test_a_second_process_is_refused_by_a_line_that_names_the_first(tmp_path):
    holder = hold(tmp_path / "a")
    said = refusal(tmp_path / "a")
    since = r"since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC"
    who = rf"{re.escape(str(tmp_path))}/a: being written by process {holder.pid} on host {socket.gethostname()}"
    assert re.fullmatch(rf"{who} {since}; wait for it to end, or choose another --run", said)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "a", target_is_directory=True)
    assert f"process {holder.pid}" in refusal(link)
    with writing(tmp_path / "b", "--run"):
        pass
    holder.communicate("end\n")
    with writing(tmp_path / "a", "--run"):
        pass
    assert os.listdir(tmp_path) == ["link"]


def test_a_kill_frees_the_lock_at_once(tmp_path):
    kill(hold(tmp_path / "a"))
    assert os.listdir(tmp_path) == [".a.lock"]
    start = time.monotonic()
    with writing(tmp_path / "a", "--run"):
        assert json.loads((tmp_path / ".a.lock").read_bytes())["process"] == os.getpid()
    assert time.monotonic() - start < 0.5
    assert os.listdir(tmp_path) == []


def test_a_stopped_process_still_holds_the_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_lock, "STALE_SECONDS", 0.1)
    holder = hold(tmp_path / "a")
    holder.send_signal(signal.SIGSTOP)
    time.sleep(0.5)
    start = time.monotonic()
    assert f"process {holder.pid}" in refusal(tmp_path / "a")
    assert time.monotonic() - start < 10
    kill(holder)


def test_a_lease_is_renewed_and_goes_stale_with_its_process(lease, tmp_path):
    holder = hold(tmp_path / "a")
    time.sleep(2.0)
    assert f"process {holder.pid}" in refusal(tmp_path / "a")
    kill(holder)
    assert f"process {holder.pid}" in refusal(tmp_path / "a")
    time.sleep(1.5)
    with writing(tmp_path / "a", "--run"):
        assert json.loads((tmp_path / ".a.lock").read_bytes())["process"] == os.getpid()


def test_who_stood_still_beyond_its_lease_writes_no_more(lease, tmp_path):
    holder = hold(tmp_path / "a")
    holder.send_signal(signal.SIGSTOP)
    time.sleep(2.0)
    with writing(tmp_path / "a", "--run"):
        holder.send_signal(signal.SIGCONT)
        assert holder.wait(10) == 2
        assert holder.stderr is not None
        assert f"a: taken over by process {os.getpid()} on host {socket.gethostname()}" in holder.stderr.read()


def test_of_two_that_write_a_lease_at_once_the_later_has_it(lease, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_lock, "HEARTBEAT_SECONDS", 60)
    found = []

    def ask() -> None:
        try:
            with writing(tmp_path / "a", "--run"):
                found.append("held")
                time.sleep(1.2)
        except UserError as error:
            found.append(str(error))

    # Both find no lease and write one before either reads it again.
    barrier = threading.Barrier(2)
    inspect = folder_lock._inspect
    both = [True, True]

    def together(descriptor: int, path: Path):
        result = inspect(descriptor, path)
        if both:
            both.pop()
            barrier.wait(5)
        return result

    monkeypatch.setattr(folder_lock, "_inspect", together)
    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2 and found.count("held") == 1
    assert os.listdir(tmp_path) == []


def other_machine(path: Path, age: float) -> None:
    """A lock that a process on another machine, whose flock is not seen here, renewed `age` seconds ago."""
    path.write_text(json.dumps({"process": 7, "host": "node7", "since": "2026-01-02 03:04:05 UTC", "token": "x"}))
    os.utime(path, (time.time() - age, time.time() - age))


def test_where_locks_are_not_shared_the_lease_of_another_machine_counts(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(folder_lock, "WAIT_SECONDS", 1.5)
    monkeypatch.setattr(folder_lock, "CONFIRM_SECONDS", 0.1)
    other_machine(tmp_path / ".a.lock", age=20)
    said = refusal(tmp_path / "a")
    assert "process 7 on host node7 since 2026-01-02 03:04:05 UTC" in said
    assert "process 7 on host node7" in caplog.text and "waiting up to 2 s" in caplog.text
    other_machine(tmp_path / ".a.lock", age=31)
    with writing(tmp_path / "a", "--run"):
        pass
    other_machine(tmp_path / ".a.lock", age=29.5)  # dies meanwhile
    with writing(tmp_path / "a", "--run"):
        pass


def test_who_is_told_to_wait_goes_on_when_the_other_ends(tmp_path, monkeypatch):
    monkeypatch.setenv("FINELINE_LOCK_WAIT", "20")
    holder = hold(tmp_path / "a")
    threading.Timer(2.0, kill, [holder]).start()
    start = time.monotonic()
    with writing(tmp_path / "a", "--run"):
        assert 1.5 < time.monotonic() - start < 10
    monkeypatch.setenv("FINELINE_LOCK_WAIT", "long")
    assert refusal(tmp_path / "a") == "FINELINE_LOCK_WAIT=long: must be a number of seconds"


def test_parts_of_one_count_go_together_and_nothing_else_does(tmp_path):
    holder = hold(tmp_path / "a", 0, 3)
    with writing(tmp_path / "a", "--out", part=(1, 3)):
        assert f"process {holder.pid}" in refusal(tmp_path / "a", part=(0, 3))
        assert "being written" in refusal(tmp_path / "a", part=(1, 2))
        assert "being written" in refusal(tmp_path / "a")
    kill(holder)
    with writing(tmp_path / "a", "--out"), writing(tmp_path / "a.b", "--out", part=(0, 2)):
        pass
    whole = hold(tmp_path / "a")
    assert f"process {whole.pid}" in refusal(tmp_path / "a", part=(0, 3))
    kill(whole)


def test_the_same_thread_may_ask_again_and_another_may_not(tmp_path):
    with writing(tmp_path / "a", "--run"), writing(tmp_path / "a", "--run"):
        said = []
        thread = threading.Thread(target=lambda: said.append(refusal(tmp_path / "a")))
        thread.start()
        thread.join()
        assert f"process {os.getpid()}" in said[0]
    assert os.listdir(tmp_path) == []


def test_folders_above_are_made_and_stay_only_with_something_in_them(tmp_path):
    with writing(tmp_path / "x" / "y" / "a", "--run"):
        assert os.listdir(tmp_path / "x" / "y") == [".a.lock"]
    assert os.listdir(tmp_path) == []
    with writing(tmp_path / "x" / "y" / "a", "--run"):
        (tmp_path / "x" / "b").touch()
    assert os.listdir(tmp_path / "x") == ["b"]


def test_the_lock_is_inside_where_nothing_can_be_put_beside(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "a")
    with writing(tmp_path / "a", "--run"):
        assert os.listdir(tmp_path) == ["a"] and os.listdir(tmp_path / "a") == [".fineline.lock"]
    assert os.listdir(tmp_path / "a") == []


def test_a_folder_that_cannot_be_locked_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError) as raised, writing(tmp_path / "file" / "a", "--run"):
        pass
    assert raised.value.filename == str(tmp_path / "file" / "a")


@pytest.mark.parametrize("name", ["a", "a/b"])
def test_a_folder_that_takes_no_file_is_refused(name):
    with (
        pytest.raises(UserError, match=f"^/proc/{name}: no file can be made in /proc.*; choose"),
        writing(Path("/proc", name), "--run"),
    ):
        pass
