"""Files and folders that appear whole or not at all."""

import errno
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fineline_jax import atomic_files
from fineline_jax.atomic_files import atomic_file, atomic_folder, copy_folder, write_atomic


def test_a_file_takes_its_place_and_nothing_is_left_beside_it(tmp_path):
    write_atomic(tmp_path / "x.json", "one")
    write_atomic(tmp_path / "x.json", "zwölf\n", exclusive=True)
    assert (tmp_path / "x.json").read_bytes() == "zwölf\n".encode()
    assert os.listdir(tmp_path) == ["x.json"]


@pytest.mark.parametrize("alone", [False, True])
def test_a_file_stays_as_it_was_where_writing_fails(alone, tmp_path):
    write_atomic(tmp_path / "x.json", "before")
    with pytest.raises(ZeroDivisionError), atomic_file(tmp_path / "x.json", exclusive=alone) as partial:
        partial.write_text("half")
        raise ZeroDivisionError
    assert (tmp_path / "x.json").read_text() == "before"
    assert os.listdir(tmp_path) == ["x.json"]


def test_a_folder_takes_the_place_of_none_or_of_an_empty_one(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty", "above/below"):
        with atomic_folder(tmp_path / name) as partial:
            (partial / "a").write_text(name)
        assert (tmp_path / name / "a").read_text() == name
    assert sorted(os.listdir(tmp_path)) == ["above", "empty", "new"] and os.listdir(tmp_path / "above") == ["below"]


def test_a_folder_is_replaced_and_stays_where_the_new_one_cannot_have_its_name(tmp_path, monkeypatch):
    for text in ("one", "two"):
        with atomic_folder(tmp_path / "x", replace=True) as partial:
            (partial / text).write_text(text)
    assert os.listdir(tmp_path) == ["x"] and os.listdir(tmp_path / "x") == ["two"]
    monkeypatch.setattr(atomic_files, "_exchange", lambda one, two: False)  # of a system that cannot
    with atomic_folder(tmp_path / "x", replace=True) as partial:
        (partial / "two").write_text("two again")
    assert os.listdir(tmp_path) == ["x"] and (tmp_path / "x" / "two").read_text() == "two again"
    rename, names = os.rename, []

    def failing(old, new):
        names.append(Path(new).name)
        if len(names) == 2:
            raise OSError(errno.EIO, "", str(old))
        rename(old, new)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError), atomic_folder(tmp_path / "x", replace=True) as partial:
        (partial / "three").write_text("three")
    assert names[1:] == ["x", "x"] and os.listdir(tmp_path) == ["x"] and os.listdir(tmp_path / "x") == ["two"]


def test_a_copied_folder_is_whole_or_not_there_and_the_error_has_its_number(tmp_path, monkeypatch):
    source = tmp_path / "source"
    (source / "inner").mkdir(parents=True)
    (source / "inner" / "a").write_text("a")
    (source / "b").write_text("b")
    copy_folder(source, tmp_path / "copy")
    names = lambda folder: sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    assert names(tmp_path / "copy") == ["b", "inner", "inner/a"] and (tmp_path / "copy/inner/a").read_text() == "a"

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(atomic_files.shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space left") as raised:
        copy_folder(source, tmp_path / "other")
    assert raised.value.errno == errno.ENOSPC and not (tmp_path / "other").exists()


def test_of_two_processes_that_make_a_folder_the_first_one_wins(tmp_path):
    with pytest.raises(OSError) as raised, atomic_folder(tmp_path / "x") as late:
        (late / "a").write_text("late")
        with atomic_folder(tmp_path / "x") as early:
            (early / "a").write_text("early")
    assert raised.value.errno in (errno.ENOTEMPTY, errno.EEXIST)
    assert (tmp_path / "x" / "a").read_text() == "early" and os.listdir(tmp_path) == ["x"]


def test_an_error_of_a_write_names_the_file(tmp_path):
    with pytest.raises(OSError) as raised, atomic_file(tmp_path / "x.json"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert raised.value.filename == str(tmp_path / "x.json")
    with pytest.raises(FileNotFoundError) as raised:
        write_atomic(tmp_path / "no" / "x.json", "")
    assert raised.value.filename == str(tmp_path / "no" / "x.json")


KILLED = """
import os, signal, sys
from pathlib import Path
from fineline_jax.atomic_files import atomic_file, atomic_folder
make = {"file": atomic_file, "folder": atomic_folder}[sys.argv[1]]
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
        write_atomic(path, "whole", exclusive=True)
    else:
        with atomic_folder(path, exclusive=True):
            pass
    assert os.listdir(tmp_path) == [path.name]


def test_the_only_writer_leaves_other_names_alone(tmp_path):
    other = Path(tmp_path / ".xy.abc.partial")
    other.write_text("of xy")
    write_atomic(tmp_path / "x", "one", exclusive=True)
    assert other.exists()


@pytest.fixture
def on_disk(tmp_path, monkeypatch) -> list[tuple[str, ...]]:
    """What is told to the disk, in order: ("fsync", name, what it holds then), ("rename", new name)."""
    told: list[tuple[str, ...]] = []
    fsync, replace, rename = os.fsync, os.replace, os.rename
    plain = lambda path: re.sub(r"^\.(.+)\.[0-9a-f]{32}\.partial$", r"partial \1", Path(path).name)

    def synced(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        holds = ",".join(sorted(map(plain, os.listdir(path)))) if path.is_dir() else path.read_text()
        told.append(("fsync", plain(path), holds))
        return fsync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    for name, done in (("replace", replace), ("rename", rename)):
        monkeypatch.setattr(os, name, lambda old, new, done=done: (told.append(("rename", plain(new))), done(old, new)))
    return told


def test_a_file_is_on_the_disk_before_it_has_its_name_and_then_its_name_is(tmp_path, on_disk):
    write_atomic(tmp_path / "x.json", "content")
    assert on_disk == [("fsync", "partial x.json", "content"), ("rename", "x.json"), ("fsync", tmp_path.name, "x.json")]


def test_a_folder_is_on_the_disk_with_all_below_it_before_it_has_its_name(tmp_path, on_disk):
    with atomic_folder(tmp_path / "x") as partial:
        (partial / "a").write_text("1")
        (partial / "below").mkdir()
        (partial / "below" / "b").write_text("2")
    before, (renamed, last) = on_disk[:-2], on_disk[-2:]
    assert sorted(before) == [
        ("fsync", "a", "1"), ("fsync", "b", "2"), ("fsync", "below", "b"), ("fsync", "partial x", "a,below"),
    ]  # fmt: skip
    assert renamed == ("rename", "x") and last == ("fsync", tmp_path.name, "x")


def test_a_disk_that_cannot_sync_names_is_used_and_one_that_fails_is_told(tmp_path, monkeypatch):
    """Some network file systems answer EINVAL or ENOTSUP for a folder."""
    fsync, answer = os.fsync, errno.EINVAL

    def synced(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(answer, os.strerror(answer))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    for answer in (errno.EINVAL, errno.ENOTSUP):
        write_atomic(tmp_path / "x", str(answer))
        assert (tmp_path / "x").read_text() == str(answer)
    answer = errno.EIO
    with pytest.raises(OSError) as raised:
        write_atomic(tmp_path / "x", "lost")
    assert raised.value.errno == errno.EIO and raised.value.filename == str(tmp_path / "x")


def test_many_at_once_write_one_file_and_one_of_them_is_whole(tmp_path):
    """Each writes beside the others; none takes what another has half written."""
    with atomic_file(tmp_path / "x") as one, atomic_file(tmp_path / "x") as two:
        assert one != two and {one.parent, two.parent} == {tmp_path}
        one.write_text("one")
        two.write_text("two")
    assert (tmp_path / "x").read_text() == "one" and os.listdir(tmp_path) == ["x"]


def test_a_folder_stays_as_it_was_where_filling_fails_and_the_only_writer_removes_a_folder_left(tmp_path):
    (tmp_path / ".x.old.partial" / "below").mkdir(parents=True)
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "x", exclusive=True) as partial:
        assert os.listdir(tmp_path) == [partial.name]
        (partial / "a").write_text("half")
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []


def test_an_error_of_another_file_keeps_its_name(tmp_path):
    with pytest.raises(FileNotFoundError) as raised, atomic_file(tmp_path / "x"):
        (tmp_path / "source").read_text()
    assert raised.value.filename == str(tmp_path / "source")


def test_text_is_written_with_the_line_ends_it_has(tmp_path):
    write_atomic(tmp_path / "x", "a\r\nb\nü")
    assert (tmp_path / "x").read_bytes() == b"a\r\nb\n\xc3\xbc"
