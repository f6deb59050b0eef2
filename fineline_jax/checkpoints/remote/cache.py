"""Checkpoints that lie elsewhere: fetched into a folder, recognised without being fetched, removed after use.

DOWNLOADS/<address>/            config.json, the weights, the tokenizer as they are on the server
DOWNLOADS/<address>/fetched.json   the server's listing, and which of the files are here and verified
DOWNLOADS/tokenizers/<hash>/    tokenizers, one folder for all checkpoints that bring the same files
"""

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fineline_jax.atomic_files import write_atomic
from fineline_jax.checkpoints.formats.weight_files import KNOWN, preferred_names
from fineline_jax.checkpoints.remote.download import FetchError, RemoteFile, download, offline
from fineline_jax.checkpoints.remote.listing import list_files
from fineline_jax.checkpoints.series import Options, Remote
from fineline_jax.progress import duration, short
from fineline_jax.tokenizers.files import TOKENIZER_FILES, VOCABULARY_FILES

RECORD = "fetched.json"
FILES_AT_A_TIME = 4
LOGGED_BYTES = 100_000_000
"""Downloads of this size are announced."""
_LOG = logging.getLogger(__name__)


def default_downloads() -> Path:
    """$XDG_CACHE_HOME/fineline_jax or ~/.cache/fineline_jax"""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fineline_jax"


def fetch(remote: Remote) -> Path:
    """The folder with all files of the checkpoint, verified; fetches those that are missing or have changed.

    Several processes may do so at once: one fetches, the others wait. Raises FetchError naming the file.
    """
    folder = remote.folder
    with locked(folder):
        files = _wanted(remote)
        _fetch_into(folder, files, remote.url)
    return folder


def fetch_config(remote: Remote, folder: Path) -> None:
    """Fetch the checkpoint's config.json alone into `folder`. Raises FetchError."""
    [config] = [file for file in _wanted(remote) if file.name == "config.json"]
    here = remote.folder / config.name
    if here.is_file():
        shutil.copy(here, folder)
    else:
        download(config, folder / config.name)


def discard(remote: Remote) -> None:
    """Remove the download, unless it is to be kept."""
    if not remote.keep:
        shutil.rmtree(remote.folder, ignore_errors=True)
        _lock_of(remote.folder).unlink(missing_ok=True)


def weights_hash(remote: Remote) -> str:
    """SHA-256 over names, sizes and hashes (ETags, times of change) of the weight files, from the listing alone."""
    weights = [file for file in _wanted(remote) if file.name not in (*TOKENIZER_FILES, "config.json")]
    listed = [(file.name, file.size, file.version) for file in weights]
    return hashlib.sha256(json.dumps(["remote", *listed]).encode()).hexdigest()


def tokenizer(remote: Remote) -> Path | None:
    """A folder with the tokenizer's files; None if the checkpoint brings none."""
    if remote.tokenizer and offline() and remote.tokenizer.startswith("hf://"):
        for folder in sorted((remote.downloads / "tokenizers").glob("*/")):
            record = _read_record(folder)
            if record is not None and record["complete"] and record["url"] == remote.tokenizer:
                return folder
        raise FetchError(f"{remote.tokenizer}: not downloaded, and HF_HUB_OFFLINE is set; unset it to fetch")
    if remote.tokenizer:
        folder, _, last = remote.tokenizer.rpartition("/")
        single = last if last in TOKENIZER_FILES else ""
        listed = _listed(folder if single else remote.tokenizer, remote.options)
        files = [file for file in listed if file.name in ((single,) if single else TOKENIZER_FILES)]
        if not files:
            raise FetchError(f"{remote.tokenizer}: no tokenizer there; looked for {', '.join(VOCABULARY_FILES)}")
    else:
        files = [file for file in _wanted(remote) if file.name in TOKENIZER_FILES]
        if not {file.name for file in files} & set(VOCABULARY_FILES):
            return None
    name = hashlib.sha256(json.dumps([(file.name, file.fingerprint) for file in files]).encode()).hexdigest()[:16]
    folder = remote.downloads / "tokenizers" / name
    with locked(folder):
        _fetch_into(folder, files, remote.tokenizer or remote.url)
    return folder


def _wanted(remote: Remote) -> list[RemoteFile]:
    """The files of a checkpoint worth fetching. Offline: as when it was fetched."""
    if offline() and remote.url.startswith("hf://"):
        record = _read_record(remote.folder)
        if record is None or not record["complete"]:
            raise FetchError(f"{remote.url}: not downloaded, and HF_HUB_OFFLINE is set; unset it to fetch")
        return record["files"]
    listed = _listed(remote.url, remote.options)
    names = {file.name for file in listed}
    if "config.json" not in names:
        raise FetchError(f"{remote.url}: no config.json there; give the folder or revision of one checkpoint")
    if weights := preferred_names(names):
        chosen = weights | {"config.json", *TOKENIZER_FILES}
        return [file for file in listed if file.name in chosen]
    raise FetchError(f"{remote.url}: no weights there; looked for {KNOWN}")


@functools.lru_cache(maxsize=1024)
def _listed(url: str, options: Options) -> tuple[RemoteFile, ...]:
    """One request per checkpoint and process; a failure is asked again."""
    return tuple(list_files(url, options))


def _fetch_into(folder: Path, files: Sequence[RemoteFile], url: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    record = _read_record(folder) or {"have": {}}
    have: dict[str, str] = dict(record["have"])
    writing = threading.Lock()

    def is_here(file: RemoteFile) -> bool:
        path = folder / file.name
        right_size = path.is_file() and file.size in (None, path.stat().st_size)
        return right_size and have.get(file.name) == file.fingerprint

    def get(file: RemoteFile) -> None:
        download(file, folder / file.name)
        with writing:
            have[file.name] = file.fingerprint
            _write_record(folder, url, files, have)

    missing = [file for file in files if not is_here(file)]
    size = sum(file.size or 0 for file in missing)
    if size >= LOGGED_BYTES:
        _LOG.info("fetching %s: %s bytes to %s", url, short(size), folder)
    began = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(FILES_AT_A_TIME, thread_name_prefix="fetch") as pool:
        tasks = [pool.submit(get, file) for file in missing]
        try:
            for task in concurrent.futures.as_completed(tasks):
                task.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    if size >= LOGGED_BYTES:
        seconds = time.monotonic() - began
        _LOG.info("fetched %s in %s, %s bytes/s", url, duration(seconds), short(size / max(seconds, 1e-9)))
    names = {file.name for file in files}
    for path in folder.iterdir():  # of another version: the reader would take them for part of this one
        if path.name not in names and path.name != RECORD and not path.is_dir():
            path.unlink()
    _write_record(folder, url, files, {file.name: file.fingerprint for file in files})


def _read_record(folder: Path) -> dict[str, Any] | None:
    try:
        record = json.loads((folder / RECORD).read_bytes())
        known = {"url": str, "complete": bool, "files": list, "have": dict}
        whole = all(isinstance(record[key], kind) for key, kind in known.items())
        return record | {"files": [RemoteFile(**file) for file in record["files"]]} if whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_record(folder: Path, url: str, files: Sequence[RemoteFile], have: dict[str, str]) -> None:
    complete = all(have.get(file.name) == file.fingerprint for file in files)
    listing = [dataclasses.asdict(file) | {"options": ()} for file in files]
    record = {"url": url, "complete": complete, "files": listing, "have": have}
    write_atomic(folder / RECORD, json.dumps(record, indent=1))


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Only one process of this machine at a time fetches into `folder`; released by the system if it dies."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _lock_of(folder).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
