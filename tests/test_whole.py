"""Files and folders that appear whole or not at all."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fineline_jax.whole import whole_file, whole_folder, write_whole


def test_a_file_takes_its_place_and_nothing_is_left_beside_it(tmp_path):
    write_whole(tmp_path / "x.json", "one")
    write_whole(tmp_path / "x.json", "zwölf\n", alone=True)
    assert (tmp_path / "x.json").read_bytes() == "zwölf\n".encode()
    assert os.listdir(tmp_path) == ["x.json"]


@pytest.mark.parametrize("alone", [False, True])
def test_a_file_stays_as_it_was_where_writing_fails(alone, tmp_path):
    write_whole(tmp_path / "x.json", "before")
    with pytest.raises(ZeroDivisionError), whole_file(tmp_path / "x.json", alone=alone) as partial:
        partial.write_text("half")
        raise ZeroDivisionError
    assert (tmp_path / "x.json").read_text() == "before"
    assert os.listdir(tmp_path) == ["x.json"]


def test_a_folder_takes_the_place_of_none_or_of_an_empty_one(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty", "above/below"):
        with whole_folder(tmp_path / name) as partial:
            (partial / "a").write_text(name)
        assert (tmp_path / name / "a").read_text() == name
    assert sorted(os.listdir(tmp_path)) == ["above", "empty", "new"] and os.listdir(tmp_path / "above") == ["below"]


def test_of_two_processes_that_make_a_folder_the_first_one_wins(tmp_path):
    with pytest.raises(OSError) as raised, whole_folder(tmp_path / "x") as late:
        (late / "a").write_text("late")
        with whole_folder(tmp_path / "x") as early:
            (early / "a").write_text("early")
    assert raised.value.errno in (errno.ENOTEMPTY, errno.EEXIST)
    assert (tmp_path / "x" / "a").read_text() == "early" and os.listdir(tmp_path) == ["x"]


def test_an_error_of_a_write_names_the_file(tmp_path):
    with pytest.raises(OSError) as raised, whole_file(tmp_path / "x.json"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert raised.value.filename == str(tmp_path / "x.json")
    with pytest.raises(FileNotFoundError) as raised:
        write_whole(tmp_path / "no" / "x.json", "")
    assert raised.value.filename == str(tmp_path / "no" / "x.json")


KILLED = """
import os, signal, sys
from pathlib import Path
from fineline_jax.whole import whole_file, whole_folder
make = {"file": whole_file, "folder": whole_folder}[sys.argv[1]]
with make(Path(sys.argv[2])) as partial:
    (partial if sys.argv[1] == "file" else partial / "a").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_kill_leaves_is_not_under_the_name_and_is_removed_by_the_only_writer(kind, tmp_path):
    path = tmp_path / "x [1]"
    done = subprocess.run([sys.executable, "-c", KILLED, kind, str(path)])
    assert done.returncode == -signal.SIGKILL
    assert len(os.listdir(tmp_path)) == 1 and not path.exists()
    if kind == "file":
        write_whole(path, "whole", alone=True)
    else:
        with whole_folder(path, alone=True):
            pass
    assert os.listdir(tmp_path) == [path.name]


def test_the_only_writer_leaves_other_names_alone(tmp_path):
    other = Path(tmp_path / ".xy.abc.partial")
    other.write_text("of xy")
    write_whole(tmp_path / "x", "one", alone=True)
    assert other.exists()
