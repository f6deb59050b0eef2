"""What makes a checkpoint folder complete: `complete.json`, with the digest of every file beside it and of itself.

Orbax keeps no checksum of array data, so a file that was cut short or overwritten can load as wrong numbers.
The record is written last; a folder without it is a save that was cut short. No JAX here.
"""

import concurrent.futures
import fnmatch
import functools
import glob
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fineline_jax.atomic_files import names_to_disk, to_disk, unsealed, write_sealed
from fineline_jax.errors import UserError

RECORD = "complete.json"
SAVING = ".saving"
"""Suffix of the empty file beside a folder that is being saved; without it a folder without a record is damaged."""
BLOCK = 1 << 24
"""Bytes hashed at a time; the blocks of one file are hashed by several threads."""


def check_path(folder: Path) -> None:
    """Raise UserError if no checkpoint can be saved below `folder`: Orbax takes its path for a pattern of names, and
    finds nothing, or other folders."""
    path = str(folder.resolve())
    if "\\" in path or glob.escape(path) != path:
        raise UserError(f"{path}: checkpoints cannot be saved in a folder with one of [ * ? \\ in its path; rename it")


def write_record(folder: Path, metadata: dict[str, Any]) -> None:
    """Write `metadata` with the size and digest of every file of `folder`, which is complete from then on."""
    to_disk(folder)  # Orbax does it for the arrays, not for what describes them
    names_to_disk(folder.parent)
    files = {name: [size, digest] for name, size, digest in digests(folder, files_below(folder))}
    write_sealed(folder / RECORD, metadata | {"files": files})


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of `folder`; None without one that is as it was written.

    {"step", "tokens", "kept", "recipe", "files": {name: [bytes, digest]}}, and of a run that trained "windows" and
    "history" (`history.py`); tokens: None where they are not known.
    """
    try:
        record = unsealed((folder / RECORD).read_bytes())
        known = {"step": int, "tokens": int | None, "kept": bool, "files": dict}
        whole = all(isinstance(record[key], kind) for key, kind in known.items()) and record["step"] >= 0
        entries = [(int(size), str(digest)) for size, digest in record["files"].values()]
        return record if whole and all(size >= 0 for size, _ in entries) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def lost_record(folder: Path) -> str:
    """What is wrong with the record of a step's folder that nobody is saving; "": nothing."""
    if read_record(folder) is not None or folder.with_name(folder.name + SAVING).exists():
        return ""
    missing = read_record(folder) is None and folder.is_dir()  # written, or the folder dropped, since the first look
    return _wrong_record(folder) if missing else ""


def _wrong_record(folder: Path) -> str:
    return f"{RECORD} is {'not as it was written' if (folder / RECORD).exists() else 'missing'}"


def damage(folder: Path, item: str = "") -> str | None:
    """What is wrong with the files of `folder`, or of its sub-folder `item`; None: nothing."""
    record = read_record(folder)
    if record is None:
        return _wrong_record(folder)
    wanted = {name: entry for name, entry in record["files"].items() if name.startswith(f"{item}/" if item else "")}
    for name, (size, _) in wanted.items():
        try:
            actual = (folder / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if actual != size:
            return f"{name} has {actual} bytes instead of {size}"
    for name in sorted(wanted):
        try:
            [(_, _, digest)] = digests(folder, [name])
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        if digest != wanted[name][1]:
            return f"the content of {name} has changed"
    return None


def files_below(folder: Path) -> list[str]:
    """Relative names of the files below `folder`, sorted, without the record itself and what a kill left of one."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if name != RECORD and not fnmatch.fnmatchcase(name, f".{RECORD}.*.partial"))


def digests(folder: Path, names: Sequence[str]) -> list[tuple[str, int, str]]:
    """(name, bytes, digest) of each file. The digest is the SHA-256 of the SHA-256s of the file's blocks.

    A file that was hashed before and has the same inode, size and times is not read again.
    """
    entries = []
    for name in names:
        state = (folder / name).stat()
        version = state.st_ino, state.st_mtime_ns, state.st_ctime_ns
        entries.append((name, state.st_size, _digest(folder / name, state.st_size, version)))
    return entries


@functools.lru_cache(maxsize=4096)
def _digest(path: Path, size: int, version: tuple[int, ...]) -> str:
    def block(start: int) -> bytes:
        with path.open("rb") as file:
            file.seek(start)
            return hashlib.sha256(file.read(BLOCK)).digest()

    threads = max(1, min(8, (os.cpu_count() or 1) // 2))
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        return hashlib.sha256(b"".join(pool.map(block, range(0, size, BLOCK)))).hexdigest()
