"""Files and folders that appear under their names whole or not at all, whatever stops the process or the machine.

What a killed process left beside `path` starts with the name's `.NAME.` and ends in `.partial`. Where only one process
at a time writes `path`, it says so (`exclusive`): it removes that first.
"""

import contextlib
import errno
import glob
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_file(path: Path, *, exclusive: bool = False) -> Iterator[Path]:
    """A name to write to; when the block ends, what it holds is on the disk and replaces `path`.

    If the block raises, `path` is as it was and nothing is left beside it. The folder of `path` must exist. An OSError
    names `path`, also where it does not know its file (a write to a full disk).
    """
    with _naming(path):
        partial = _beside(path, exclusive)
        try:
            yield partial
            _to_disk(partial)
            partial.replace(path)
            names_to_disk(path.parent)
        finally:
            partial.unlink(missing_ok=True)  # a full disk is not made fuller


def write_atomic(path: Path, text: str, *, exclusive: bool = False) -> None:
    """Write `text` in UTF-8 as `atomic_file` does."""
    with atomic_file(path, exclusive=exclusive) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")


@contextlib.contextmanager
def atomic_folder(path: Path, *, exclusive: bool = False) -> Iterator[Path]:
    """A new folder to fill; when the block ends, what it holds is on the disk and it becomes `path`, which must be
    absent or an empty folder.

    If the block raises, `path` is as it was and nothing is left beside it. Folders above are made. Raises OSError if
    another process was first.
    """
    with _naming(path):
        partial = _beside(path, exclusive)
        partial.mkdir(parents=True)
        try:
            yield partial
            to_disk(partial)
            partial.rename(path)
            names_to_disk(path.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def to_disk(folder: Path) -> None:
    """When it returns, the files below `folder` are on the disk, with their names."""
    for path in (*folder.rglob("*"), folder):
        names_to_disk(path) if path.is_dir() else _to_disk(path)


def names_to_disk(folder: Path) -> None:
    """Which files the folder holds, under which names."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # not every network file system can
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _beside(path: Path, exclusive: bool) -> Path:
    if exclusive:
        for left in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")


def _to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.filename is None or str(error.filename).endswith(".partial"):
            error.filename = str(path)
        raise
