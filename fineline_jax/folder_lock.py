"""One writer per folder: a lock that ends with its process, and says who holds it.

The lock of FOLDER is the file .FOLDER.lock beside it, or FOLDER/.fineline.lock where nothing can be put beside (a mount
point). It holds process, host and time in JSON and is removed at the end. Two mechanisms guard it:

* flock: the kernel frees it when the process dies. On one machine it decides alone, at once.
* a lease: the holder renews the file's time of change every HEARTBEAT_SECONDS, and after STALE_SECONDS without that the
  file counts as abandoned. It decides between machines, whose locks some file systems do not share, and where flock is
  not supported. Ages are differences of two times of the file system, so the machines' clocks may differ.
"""

import contextlib
import datetime
import errno
import fcntl
import json
import logging
import os
import re
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fineline_jax.atomic_files import check_local
from fineline_jax.errors import UserError

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 5.0
STALE_SECONDS = 30.0
WAIT_SECONDS = 60.0
"""For a holder that may be dead: one on another machine, or without flock. Longer than STALE_SECONDS."""
GRACE_SECONDS = 1.0
"""For any holder: one that just ends, or just looks whether a lock is held."""
CONFIRM_SECONDS = 1.0
"""Between writing a lease and reading it again: of two processes that write one, the later has it."""
POLL_SECONDS = 0.25
ATTEMPTS = 100
"""To make a lock file whose folder others remove meanwhile; some folders, as those of /proc, never take a file."""

_UNSUPPORTED = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL)
_held: dict[Path, int] = {}
"""The thread that holds each lock of this process."""


class _Holder(NamedTuple):
    """Who has a lock."""

    process: int | None
    host: str
    since: str
    is_certain: bool = False
    """It lives: the kernel of this machine says so."""

    def __str__(self) -> str:
        if self.process is None:
            return "another process"
        return f"process {self.process} on host {self.host} since {self.since}"


@contextlib.contextmanager
def writing(folder: Path, remedy: str, *, part: tuple[int, int] | None = None, wait: float = 0.0) -> Iterator[None]:
    """Inside, no other process that asks for it writes `folder`; the same thread may ask again.

    remedy: the option to choose otherwise, such as --run. part: (index, count) of a share of the work; different parts
    of one count do not exclude each other, all else does. wait: seconds that any holder is waited for; also those of
    FINELINE_LOCK_WAIT, and WAIT_SECONDS for a holder that may be dead. Folders above are made; those still empty are
    removed at the end. Raises UserError naming the holder.
    """
    check_local(folder, remedy)
    path = _lock_file(folder, part)
    if _held.get(path) == threading.get_ident():
        yield
        return
    above = [parent for parent in path.parents if not parent.exists()]
    try:
        lock = _wait_for(path, folder, remedy, wait)
        _held[path] = threading.get_ident()
        try:
            yield
        finally:
            del _held[path]
            lock.release()
    finally:
        with contextlib.suppress(OSError):
            for parent in above:
                parent.rmdir()


def is_being_written(folder: Path) -> bool:
    """Whether another process holds the lock of the whole of `folder`, as far as this machine can tell."""
    path = _lock_file(folder, None)
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        return _inspect(descriptor, path)[0] is not None
    finally:
        os.close(descriptor)


def holder_text(folder: Path, part: tuple[int, int] | None = None) -> str:
    """What the lock of `folder` holds, as this machine sees it; "": there is none."""
    path = _lock_file(folder, part)
    with contextlib.suppress(OSError):
        os.listdir(path.parent)  # makes a network file system look again
        return path.read_text()
    return ""


def _lock_file(folder: Path, part: tuple[int, int] | None) -> Path:
    place = folder.resolve()
    inside = place.is_dir() and (os.path.ismount(place) or not os.access(place.parent, os.W_OK))
    share = "" if part is None else f".{part[0]}-of-{part[1]}"
    return place / f".fineline{share}.lock" if inside else place.with_name(f".{place.name}{share}.lock")


def _wait_for(path: Path, folder: Path, remedy: str, wait: float) -> "_Lock":
    asked = max(wait, _seconds_asked())
    start, told = time.monotonic(), False
    while True:
        try:
            found = _take(path, folder)
        except OSError as error:
            if error.errno == errno.ESTALE:  # of NFS: the file was removed by another machine
                continue
            error.filename = str(folder)
            raise
        if isinstance(found, _Lock):
            return found
        most = max(asked, GRACE_SECONDS if found.is_certain else WAIT_SECONDS)
        if time.monotonic() - start >= most:
            raise UserError(f"{folder}: being written by {found}; wait for it to end, or choose another {remedy}")
        if not told and most > GRACE_SECONDS:
            log.warning("%s: being written by %s; waiting up to %.0f s for it to end", folder, found, most)
            told = True
        time.sleep(POLL_SECONDS)


def _seconds_asked() -> float:
    text = os.environ.get("FINELINE_LOCK_WAIT", "0")
    try:
        return float(text)
    except ValueError:
        raise UserError(f"FINELINE_LOCK_WAIT={text}: must be a number of seconds") from None


def _take(path: Path, folder: Path) -> "_Lock | _Holder":
    """The lock, or who has it."""
    attempt = 0
    while True:
        attempt += 1
        try:
            with contextlib.suppress(FileExistsError):  # a file: opening says so
                path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # the folder above was removed meanwhile
            if attempt == ATTEMPTS:
                raise UserError(f"{folder}: no file can be made in {path.parent}; choose a folder elsewhere") from None
            continue
        try:
            holder, needs_lease = _inspect(descriptor, path)
            if holder is None and not _is_at(descriptor, path):
                continue  # released, and so removed, meanwhile
            lock = None
            if holder is None:
                lock = _Lock(path, folder, descriptor)
                if needs_lease:
                    time.sleep(CONFIRM_SECONDS)
                    holder = None if lock.is_ours() else _read(path)
                holder = holder or _holder_of_conflicting(path)
            if lock is not None and holder is None:
                descriptor = -1
                lock.renew()
                return lock
            if lock is not None:
                lock.remove()
            assert holder is not None
            return holder
        finally:
            if descriptor >= 0:
                os.close(descriptor)


def _inspect(descriptor: int, path: Path) -> tuple[_Holder | None, bool]:
    """Who has the open lock file, None: this process, or nobody, may take it; and whether flock cannot decide it."""
    flocked = _flock(descriptor)
    named = _read(path)
    here = named is not None and named.host == socket.gethostname()
    if flocked is False:
        return (named or _Holder(None, "", ""))._replace(is_certain=named is None or here), False
    needs_lease = flocked is None or (named is not None and not here)
    if needs_lease and named is not None and _age(descriptor, path) < STALE_SECONDS:
        return named, True
    return None, needs_lease


def _flock(descriptor: int) -> bool | None:
    """Whether this process has it now; None: the file system has no flock."""
    if os.environ.get("FINELINE_LOCK_LEASE") == "1":
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return None
        raise
    return True


def _holder_of_conflicting(path: Path) -> _Holder | None:
    """Who has another lock of the folder: that of the whole, or of a part of another count."""
    pattern = re.compile(r"(.+?)(?:\.\d+-of-(\d+))?\.lock")
    own = pattern.fullmatch(path.name)
    assert own is not None
    for other in path.parent.iterdir():
        same = pattern.fullmatch(other.name)
        if other == path or same is None or same[1] != own[1] or (own[2] is not None and same[2] == own[2]):
            continue
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(other, os.O_RDWR)
            try:
                if (holder := _inspect(descriptor, other)[0]) is not None:
                    return holder
            finally:
                os.close(descriptor)
    return None


def _read(path: Path) -> _Holder | None:
    """Whom the lock file names."""
    try:
        named = json.loads(path.read_bytes())
        return _Holder(named["process"], named["host"], named["since"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _age(descriptor: int, path: Path) -> float:
    """Seconds since the lock file was renewed, by the clock of its file system."""
    with tempfile.TemporaryFile(dir=path.parent) as now:
        return os.fstat(now.fileno()).st_mtime - os.fstat(descriptor).st_mtime


class _Lock:
    """A lock file that is taken: it names this process. Renewed by a thread from `renew` on."""

    def __init__(self, path: Path, folder: Path, descriptor: int):
        self._path, self._folder, self._descriptor = path, folder, descriptor
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name=f"lock of {folder}")
        since = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        names = {"process": os.getpid(), "host": socket.gethostname(), "since": since, "token": uuid.uuid4().hex}
        self._content = json.dumps(names).encode() + b"\n"
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, self._content, 0)

    def is_ours(self) -> bool:
        """Whether the file still names this process."""
        try:
            return self._path.read_bytes() == self._content
        except FileNotFoundError:
            return False

    def renew(self) -> None:
        """Begin to renew the lease."""
        self._thread.start()

    def release(self) -> None:
        self._ended.set()
        self._thread.join()
        self.remove()
        os.close(self._descriptor)

    def remove(self) -> None:
        """Remove the file if it still names this process."""
        with contextlib.suppress(OSError):
            if self.is_ours():
                self._path.unlink()

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):  # the file system is away: the next time
                if self.is_ours():
                    os.utime(self._path)
                elif (other := _read(self._path)) is not None:
                    # This process stood still for so long that the other took it for dead. Two must not write.
                    sys.stderr.write(f"fineline: {self._folder}: taken over by {other}; this process has ended\n")
                    os._exit(UserError.exit_status)
