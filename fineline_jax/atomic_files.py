"""Files and folders that appear under their names whole or not at all, whatever stops the process or the machine, and
records that show whether they are as they were written.

What a killed process left beside `path` starts with the name's `.NAME.` and ends in `.partial`. Where only one process
at a time writes `path`, it says so (`exclusive`): it removes that first.
"""

import contextlib
import ctypes
import errno
import glob
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fineline_jax.errors import UserError

DIGEST = "record_sha256"
"""Key of a record's own digest."""


def check_local(path: str | os.PathLike[str], option: str, *, or_bucket: bool = False) -> None:
    """Raise UserError if `path`, given by `option`, is an address and no folder of this machine; or_bucket: nor in a
    bucket of Google (gs://…) or Amazon (s3://…)."""
    if re.match(r"[a-z][a-z0-9+.-]+:/", os.fspath(path)) and not (or_bucket and address_of(path)):
        address = re.sub(":/+", "://", os.fspath(path), count=1)
        kinds = "a folder of this machine, gs://… or s3://…" if or_bucket else "a folder of this machine"
        raise UserError(f"{option} {address}: must be {kinds}; mount the bucket, or give another")


def address_of(path: str | os.PathLike[str]) -> str | None:
    """The address gs://… or s3://… that `path` is, also as a Path, which has one slash less; None: it is none."""
    match = re.match(r"(gs|s3):/+([^/].*?)/*$", os.fspath(path))
    return f"{match[1]}://{match[2]}" if match else None


def local_folder(path: str | os.PathLike[str]) -> Path:
    """The folder of this machine that stands for `path`: of an address one below $FINELINE_STAGING, by default
    ~/.cache/fineline_jax/staged; else itself."""
    address = address_of(path)
    if address is None:
        return Path(path).expanduser()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "fineline_jax" / "staged"
    return Path(os.environ.get("FINELINE_STAGING") or cache).expanduser() / address.replace("://", "/")


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


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON object `record` with the SHA-256 of its content under DIGEST, which `unsealed` checks."""
    content = {key: value for key, value in record.items() if key != DIGEST}
    return {**content, DIGEST: _digest(content)}


def write_sealed(path: Path, record: Mapping[str, Any]) -> None:
    """Write `sealed(record)` in JSON as `atomic_file` does; one process at a time."""
    write_atomic(path, json.dumps(sealed(record), indent=1) + "\n", exclusive=True)


def unsealed(text: bytes | str) -> dict[str, Any]:
    """The record in a JSON text that `sealed` made, without its digest.

    Layout and order of keys do not count. Raises ValueError where the text is no such record, or was changed.
    """
    try:
        record = json.loads(text)
    except RecursionError as error:
        raise ValueError("brackets within brackets without end") from error
    if not isinstance(record, dict) or DIGEST not in record:
        raise ValueError(f"it has no {DIGEST}")
    if record.pop(DIGEST) != _digest(record):
        raise ValueError("it was changed since it was written")
    return record


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def atomic_folder(path: Path, *, exclusive: bool = False, replace: bool = False) -> Iterator[Path]:
    """A new folder to fill; when the block ends, what it holds is on the disk and it becomes `path`, which must be
    absent or an empty folder, or is replaced (`replace`).

    If the block raises, `path` is as it was and nothing is left beside it. Folders above are made. Raises OSError if
    another process was first.
    """
    with _naming(path):
        partial = _beside(path, exclusive)
        partial.mkdir(parents=True)
        try:
            yield partial
            put_in_place(partial, path, replace=replace)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def copy_folder(source: Path, path: Path) -> None:
    """Write a copy of the folder `source` as `path`, whole or not at all, as its only writer.

    The first error is raised as it is: shutil.copytree gathers them in one that has no number.
    """
    with atomic_folder(path, exclusive=True) as copy:
        for one in sorted(source.rglob("*")):
            if one.is_dir():
                (copy / one.relative_to(source)).mkdir()
            else:
                shutil.copyfile(one, copy / one.relative_to(source))


def put_in_place(partial: Path, path: Path, *, replace: bool = False) -> None:
    """Give the finished folder `partial` the name `path`, on the disk with all it holds, when it returns.

    `path` must be absent or an empty folder; raises OSError if it is not. replace: a folder that is there is removed
    afterwards. Where the system cannot exchange two names in one step, there is an instant without either; the old one
    has its name again if the new one cannot have it.
    """
    to_disk(partial)
    if replace and path.is_dir() and _exchange(partial, path):
        names_to_disk(path.parent)
        shutil.rmtree(partial, ignore_errors=True)
        return
    old = _beside(path, False) if replace and path.exists() else None
    if old is not None:
        path.rename(old)
    try:
        partial.rename(path)
    except OSError:
        if old is not None:
            old.rename(path)
        raise
    names_to_disk(path.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, two: Path) -> bool:
    """Whether the system could swap the two names."""
    try:
        rename = ctypes.CDLL(None).renameat2  # of Linux
    except (AttributeError, OSError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename(here, os.fsencode(one.absolute()), here, os.fsencode(two.absolute()), exchange) == 0


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
