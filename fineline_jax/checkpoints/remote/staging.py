"""A folder of this machine that stands for one in a bucket (gs://…, s3://…): what is written is on the local disk
first, and in the bucket a little later.

    BUCKET/checkpoints/<step>/…, complete.json   the record follows when all files that it names are there
    BUCKET/metrics/<offset>.jsonl                metrics.jsonl in parts, by the bytes before each
    BUCKET/lease.json                            who writes it; renewed while that process lives
    BUCKET/sending.json, …, metadata.json        a data set: the metadata.json to come, its other files, and it last

Every object appears whole. A kill loses nothing: what the bucket lacks is on the local disk, and what the record of a
checkpoint names is in the bucket.
"""

import concurrent.futures
import contextlib
import itertools
import json
import logging
import os
import re
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fineline_jax.atomic_files import address_of, local_folder, unsealed
from fineline_jax.checkpoints.remote.cache import locked
from fineline_jax.checkpoints.remote.download import (
    FetchError,
    RemoteFile,
    TransientError,
    bucket,
    bucket_errors,
    download,
    wait_or_give_up,
)
from fineline_jax.checkpoints.runs.digest_record import RECORD, read_record
from fineline_jax.errors import UserError
from fineline_jax.progress import bar, periodically

SEND_SECONDS = 10.0
"""Between two looks at what is new on the local disk."""
BEAT_SECONDS = 10.0
DEAD_SECONDS = 60.0
"""A lease that has not changed for so long is that of a process that is gone."""
CONFIRM_SECONDS = 2.0
MOST_PARTS = 64
"""Of the metrics; then they become one."""
AT_A_TIME = 8
"""Files."""
METRICS, LEASE = "metrics.jsonl", "lease.json"
DATA, SENDING = "metadata.json", "sending.json"
DATA_FILES = re.compile(rf"(dataset_info|features)\.json|windows-[^/]+|tokenizer/.+|{SENDING}")
"""Of a data set that is not complete yet."""
_LOG = logging.getLogger(__name__)


def tried(url: str, act: Callable[[], Any]) -> Any:
    """What `act` gives, tried again where a bucket fails in passing. Raises FetchError."""
    failures = 0
    while True:
        try:
            with bucket_errors(url):
                return act()
        except TransientError as error:
            failures += 1
            wait_or_give_up(url, error, failures)


def files_in(address: str) -> dict[str, RemoteFile]:
    """All files below an address, by their names relative to it; none where nothing is there."""
    system = bucket(address)

    def find() -> dict[str, Any]:
        system.invalidate_cache()
        return system.find(address, detail=True)

    found, prefix = tried(address, find), address.partition("://")[2].rstrip("/") + "/"
    files = {}
    for path, entry in found.items():
        name = path.lstrip("/").removeprefix(prefix)
        version = str(entry.get("ETag") or entry.get("etag") or entry.get("md5Hash") or entry.get("size"))
        files[name] = RemoteFile(name, f"{address}/{name}", entry["size"], version)
    return files


def fetch_data(path: str | os.PathLike[str]) -> Path:
    """The folder of a data set: `path` itself, or where the address `path` is staged, with all its files.

    Nothing is fetched if the metadata.json there is that of the bucket and every file has its size. Raises FetchError.
    """
    address = address_of(path)
    if address is None:
        return local_folder(path)
    folder, files = local_folder(path), files_in(address)
    record = files.pop(DATA, None)
    if record is None:
        raise FetchError(
            f"{address}: no prepared data set there; prepare it with `fineline data prepare --out {address}`"
        )
    content, here = content_of(record.url), folder / record.name
    with locked(folder):
        same = here.is_file() and here.read_bytes() == content
        for file in [file for name, file in files.items() if name not in (LEASE, SENDING)]:
            target = folder / file.name
            if not (same and target.is_file() and target.stat().st_size == file.size):
                download(file, target)
        here.write_bytes(content)
    return folder


@contextlib.contextmanager
def staged_data(path: Path) -> Iterator[Path | None]:
    """Inside, this process alone writes the data set `path`, in `local_folder(path)`, whose lock it has
    (`folder_lock.writing`). Of an address the data set made there is sent at the end, its metadata.json last.

    Gives a folder with the records of the data set that is at the address, to which nothing is sent then; None: no
    complete one is there. Raises UserError where something else is there, another process writes it, or sending
    fails: the same command goes on with it.
    """
    address = address_of(path)
    if address is None:
        yield None
        return
    with _leased(address, local_folder(path)), tempfile.TemporaryDirectory() as records:
        there = files_in(address)
        there.pop(LEASE, None)
        if DATA in there:
            for name in (DATA, "dataset_info.json", "features.json"):
                (Path(records) / name).write_bytes(content_of(f"{address}/{name}"))
            yield Path(records)
            _remove(bucket(address), f"{address}/{SENDING}")
            return
        if not all(map(DATA_FILES.fullmatch, there)):
            raise UserError(f"{address}: exists and is not empty; name another folder or remove it")
        yield None
        _send_data(Mirror(address, local_folder(path)), there)


def _send_data(mirror: "Mirror", there: Mapping[str, RemoteFile]) -> None:
    """there: what is left at the address of a sending that was killed; of this data set it is not sent again."""
    folder, content = mirror.folder, (mirror.folder / DATA).read_bytes()
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    del files[DATA]
    mirror.there = set(there)
    if SENDING in there and content_of(there[SENDING].url) == content:
        whole = [name for name, size in files.items() if name in there and there[name].size == size]
        mirror.sent = {name: _state(folder / name) for name in whole}
    else:
        mirror._drop(list(there))
        tried(mirror.address, lambda: mirror.system.pipe_file(f"{mirror.address}/{SENDING}", content))
    with bar(
        f"send {mirror.address}", sum(files.values()), "bytes", sum(files[name] for name in mirror.sent)
    ) as advance:
        mirror._send(list(files), advance)
    mirror._send([DATA])
    mirror._drop([SENDING])


def fetch_recipe(name: str) -> str:
    """`name`, or of the address of a run its recipe.json, fetched."""
    if address_of(name) is None:
        return name
    path = local_folder(name) / "recipe.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content_of(f"{address_of(name)}/recipe.json"))
    return str(path)


def fetch_records(address: str, folder: Path) -> bool:
    """Whether a run is at the address; `folder` has its recipe, tokenizer and the records of its checkpoints then."""
    try:
        content_of(f"{address}/recipe.json")
    except FetchError:
        return False
    files = files_in(address)
    with locked(folder):
        for name in [name for name in files if _is_record(name) or re.match(r"recipe\.json$|tokenizer/", name)]:
            download(files[name], folder / name)
        for path in folder.glob(f"checkpoints/*/{RECORD}"):
            if path.relative_to(folder).as_posix() not in files:
                shutil.rmtree(path.parent)
    return True


def fetch_item(address: str, folder: Path) -> None:
    """Copy an item of a checkpoint, such as params, into its folder; the record tells whether it is whole."""
    with locked(folder):
        for name, file in files_in(address).items():
            if not ((folder / name).is_file() and (folder / name).stat().st_size == file.size):
                download(file, folder / name)


def content_of(url: str) -> bytes:
    return tried(url, lambda: bucket(url).cat_file(url))


@contextlib.contextmanager
def staged(path: Path, *, alone: bool) -> Iterator[Path]:
    """`path`; or of an address the folder that stands for it, with what a run or a scoring goes on from.

    Inside, what appears in the folder is sent to the bucket; at the end all of it is. alone: no other machine may write
    the address meanwhile; this process has the lock of the folder (`folder_lock.writing`). Raises UserError where one
    does, or what was made could not be sent: it is in the folder then, and the same command sends it.
    """
    address = address_of(path)
    if address is None:
        yield path
        return
    mirror = Mirror(address, local_folder(path))
    with _leased(address, mirror.folder) if alone else contextlib.nullcontext():
        mirror.bring()
        with contextlib.ExitStack() as stack:
            stack.callback(mirror.send)
            stack.enter_context(periodically(SEND_SECONDS, mirror.try_to_send, f"copy to {address}"))
            yield mirror.folder


class Mirror:
    """What of `folder` is at `address`, and the copying of the rest."""

    def __init__(self, address: str, folder: Path):
        self.address, self.folder = address, folder
        self.system = bucket(address)
        self.sent: dict[str, tuple[int, int]] = {}
        """Size and time of change of the files here when they were sent; (-1, -1): of another content there, maybe."""
        self.there: set[str] = set()
        """Names of the files at the address."""
        self.metrics: bytes | None = None
        """What its parts of the metrics hold; None: not looked at yet."""

    def bring(self) -> None:
        """Make the folder of a run what the bucket holds, unless the folder is further: everything but the arrays of
        checkpoints before the newest state, of which the records alone. To another folder, add what it lacks."""
        files = files_in(self.address)
        files.pop(LEASE, None)
        self.there = set(files)
        self.folder.mkdir(parents=True, exist_ok=True)
        records = {name: content_of(f"{self.address}/{name}") for name in files if _is_record(name)}
        here = {path.relative_to(self.folder).as_posix(): path.read_bytes() for path in self._records()}
        in_bucket, newest = _newest_state(records), _newest_state(here)
        if here and newest >= in_bucket:
            same = [name for name in records.keys() & here.keys() if _history(records[name]) == _history(here[name])]
            if len(same) < len(records.keys() & here.keys()):
                raise UserError(f"{self.folder}: holds another run than {self.address}; remove one of the two")
            self.sent = {name: _state(self.folder / name) for name in same if records[name] == here[name]}
            _LOG.info("%s: going on from what is staged in %s", self.address, self.folder)
            return
        for path in self.folder.iterdir() if records else ():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        wanted = [
            name
            for name in files.keys() - records.keys()
            if not (-1 < _step(name) < in_bucket or name.startswith("metrics/") or (self.folder / name).exists())
        ]
        both = {name: (-1, -1) for name in files if (self.folder / name).is_file()}
        with concurrent.futures.ThreadPoolExecutor(AT_A_TIME, thread_name_prefix="fetch") as pool:
            list(pool.map(lambda name: download(files[name], self.folder / name), wanted))
        self.sent = both | {name: _state(self.folder / name) for name in wanted}
        for name, content in records.items():
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).write_bytes(content)
            self.sent[name] = _state(self.folder / name)
        if metrics := self._metrics():
            (self.folder / METRICS).write_bytes(metrics)

    def try_to_send(self) -> None:
        try:
            self.send()
        except (UserError, OSError) as error:  # the next time, or at the end
            _LOG.warning("%s: not all is sent yet (%s)", self.address, error)

    def send(self) -> None:
        """Copy what is new: files, the metrics, then each complete checkpoint with its record last; then drop from the
        bucket what was removed here, and here the arrays that are in the bucket and before the newest state."""
        names: list[str] = []
        for root, folders, files in os.walk(self.folder):
            folders[:] = [
                name for name in folders if name[0] != "." and Path(root, name) != self.folder / "checkpoints"
            ]
            inside = Path(root).relative_to(self.folder)
            names += [(inside / name).as_posix() for name in files if name[0] != "."]
        self._send([name for name in names if name != METRICS])
        self._drop([name for name in self.sent if names and _step(name) < 0 and not (self.folder / name).exists()])
        self._send_metrics()
        records = {path.relative_to(self.folder).as_posix(): path.read_bytes() for path in self._records()}
        newest = _newest_state(records)
        for name in sorted(records, key=_step):
            with contextlib.suppress(FileNotFoundError):  # superseded and removed meanwhile
                self._send_checkpoint(name)
                if _step(name) < newest and self._is_sent(name):
                    for item in (self.folder / name).parent.iterdir():
                        shutil.rmtree(item) if item.is_dir() else None
        if newest >= 0:
            gone = {_step(name) for name in self.there} - {_step(name) for name in records}
            self._drop([name for name in self.there if _step(name) in gone - {-1}])

    def _send_checkpoint(self, name: str) -> None:
        """Its files, then the record `name`."""
        folder = (self.folder / name).parent
        record = None if self._is_sent(name) else read_record(folder)
        if record is None or not all((folder / file).is_file() for file in record["files"]):
            return
        self._drop([one for one in self.there if _step(one) == _step(name)])
        self._send([f"checkpoints/{folder.name}/{file}" for file in record["files"]])
        there = files_in(f"{self.address}/checkpoints/{folder.name}")
        for file, (size, _) in record["files"].items():
            if file not in there or there[file].size != size:
                raise FetchError(f"{self.address}: {file} of checkpoint {folder.name} is not there as it was sent")
        self._send([name])

    def _records(self) -> list[Path]:
        return [path for path in self.folder.glob(f"checkpoints/*/{RECORD}") if path.parent.name.isdigit()]

    def _is_sent(self, name: str) -> bool:
        return self.sent.get(name) == _state(self.folder / name)

    def _send(self, names: list[str], advance: Callable[[int], None] = lambda size: None) -> None:
        def send(name: str) -> None:
            state, url = _state(self.folder / name), f"{self.address}/{name}"
            tried(url, lambda: self.system.put_file(str(self.folder / name), url))
            self.sent[name] = state
            self.there.add(name)
            advance(state[0])

        with concurrent.futures.ThreadPoolExecutor(AT_A_TIME, thread_name_prefix="send") as pool:
            list(pool.map(send, [name for name in names if not self._is_sent(name)]))

    def _metrics(self) -> bytes:
        """The parts in the bucket, each from its offset on."""
        content = b""
        for name in sorted(name for name in self.there if name.startswith("metrics/")):
            content = content[: int(Path(name).stem)] + content_of(f"{self.address}/{name}")
        return content

    def _send_metrics(self) -> None:
        """The lines since the last part; all as one part, where others than those were there or there are many."""
        path = self.folder / METRICS
        content, before = path.read_bytes() if path.is_file() else b"", self.metrics
        if before is None:
            before = self._metrics()
        parts = [name for name in self.there if name.startswith("metrics/")]
        goes_on = content.startswith(before) and len(parts) < MOST_PARTS
        if content != before and content:
            name = f"metrics/{len(before) if goes_on else 0:015}.jsonl"
            more = content[len(before) :] if goes_on else content
            tried(self.address, lambda: self.system.pipe_file(f"{self.address}/{name}", more))
            self.there.add(name)
            self._drop([] if goes_on else [one for one in parts if one != name])
        self.metrics = content

    def _drop(self, names: list[str]) -> None:
        """Records first: a checkpoint that is half removed must not look complete."""
        for name in sorted(names, key=lambda name: not _is_record(name)):
            _remove(self.system, f"{self.address}/{name}")
            self.there.discard(name)
            self.sent.pop(name, None)


def _remove(system: Any, url: str) -> None:
    def remove() -> None:
        with contextlib.suppress(FileNotFoundError):
            system.rm_file(url)

    tried(url, remove)


def _is_record(name: str) -> bool:
    return name.count("/") == 2 and _step(name) >= 0 and name.endswith(f"/{RECORD}")


def _step(name: str) -> int:
    """Of a file of a checkpoint; -1: of none."""
    first, _, rest = name.partition("/")
    step = rest.partition("/")[0]
    return int(step) if first == "checkpoints" and step.isdigit() else -1


def _newest_state(records: Mapping[str, bytes]) -> int:
    """The last step of records by name whose checkpoint holds more than weights; -1: none does."""
    return max((_step(name) for name, record in records.items() if "weights" not in _parsed(record)), default=-1)


def _history(record: bytes) -> Any:
    return _parsed(record).get("history")


def _parsed(record: bytes) -> dict[str, Any]:
    try:
        return unsealed(record)
    except ValueError:  # damaged: the store says so
        return {"weights": ""}


def _state(path: Path) -> tuple[int, int]:
    state = path.stat()
    return state.st_size, state.st_mtime_ns


@contextlib.contextmanager
def _leased(address: str, folder: Path) -> Iterator[None]:
    """Inside, this process alone writes the address. A lease ages while it does not change: no clocks are compared."""
    system, url = bucket(address), f"{address}/{LEASE}"
    own = {"host": socket.gethostname(), "folder": str(folder), "process": os.getpid(), "token": uuid.uuid4().hex}

    def held() -> dict[str, Any]:
        try:
            return json.loads(content_of(url))
        except (FetchError, ValueError):
            return {}

    numbers = itertools.count()

    def beat() -> None:
        content = json.dumps(own | {"beat": next(numbers)}).encode()
        tried(url, lambda: system.pipe_file(url, content))

    def beat_or_miss() -> None:
        with contextlib.suppress(UserError):
            beat()

    first = seen = held()
    # Who wrote it from this folder is dead, since this process has the lock of the folder.
    is_other = any(first.get(key) != own[key] for key in ("host", "folder")) if first else False
    end = time.monotonic() + DEAD_SECONDS
    while is_other and seen and time.monotonic() < end:
        if seen != first:
            who = f"process {seen.get('process')} on host {seen.get('host')}"
            raise UserError(f"{address}: being written by {who}; wait for it to end, or choose another folder")
        time.sleep(BEAT_SECONDS / 5)
        seen = held()
    beat()
    time.sleep(CONFIRM_SECONDS if is_other else 0)
    if held().get("token") != own["token"]:
        raise UserError(f"{address}: another process began to write it at the same time; choose another folder")
    try:
        with periodically(BEAT_SECONDS, beat_or_miss, f"lease of {address}"):
            yield
    finally:
        with contextlib.suppress(UserError):
            _remove(system, url)
