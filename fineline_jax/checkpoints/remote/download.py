"""One file from a server to the disk: resumed, tried again, and verified.

What has arrived of a file lies in `.NAME.VERSION.partial` beside it until all of it is there and right.
"""

import contextlib
import dataclasses
import errno
import hashlib
import logging
import os
import queue
import re
import shutil
import threading
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import requests
import urllib3

from fineline_jax.checkpoints.series import Options
from fineline_jax.errors import UserError

ATTEMPTS = 6
"""In a row without progress, before a file is given up."""
BACKOFF = 1.0
"""Seconds before the second attempt; doubled for each one after it."""
LONGEST_WAIT = 60.0
TIMEOUT = (15.0, 60.0)
"""Seconds to connect, and between two pieces of the answer."""
BLOCK = 1 << 18
"""Bytes read from an HTTP server at a time; those of a block within which the connection breaks come again."""
SLOWEST = 1000
"""Bytes per second over WINDOW; a slower answer is broken off like one that has ended."""
WINDOW = 60.0
PROGRESS = 1000
"""Bytes with which an attempt counts as progress."""
LARGEST_ANSWER = 1 << 25
"""Bytes of a listing or an index, unpacked."""
RANGE = 1 << 25
"""Bytes asked of a bucket at a time, at most: what takes longer than WINDOW is broken off, so the first range is what
SLOWEST lets through in that time, and each next one four times as long while they come quickly."""
STOP = threading.Event()
"""Set it to end all downloads at their next block; what has arrived stays for the next run."""
_PASSING = (408, 425, 429, 500, 502, 503, 504)
_LOG = logging.getLogger(__name__)


class FetchError(UserError):
    """What a server does not have, will not give, or gives wrong."""


class NotThereError(FetchError):
    """The server has no such file, or shows it to nobody."""


class DiskFullError(FetchError):
    """No room for a download."""


class TransientError(Exception):
    """Worth another attempt, after `wait` seconds if the server asks for that."""

    def __init__(self, reason: str, wait: float | None = None):
        super().__init__(reason)
        self.wait = wait


class _WrongContentError(Exception):
    """The whole file is there and not what the listing says."""


@contextlib.contextmanager
def stopped() -> Iterator[None]:
    """Downloads of other threads end meanwhile."""
    STOP.set()
    try:
        yield
    finally:
        STOP.clear()


@dataclasses.dataclass(frozen=True)
class RemoteFile:
    """A file on a server."""

    name: str
    """Relative to the folder of the checkpoint."""
    url: str
    size: int | None
    """None: the server does not say."""
    version: str
    """Changes when the content does: a hash, an ETag or a time of change."""
    sha256: str | None = None
    git_sha1: str | None = None
    """SHA-1 of git's blob: "blob SIZE\\0" and the content."""
    options: Options = ()
    """Of the fsspec file system."""

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.size} {self.version}".encode()).hexdigest()[:12]


def download(file: RemoteFile, target: Path) -> None:
    """Write `file` to `target`; resumes an interrupted download. What huggingface_hub has in its cache is linked to.

    Raises FetchError naming the file if it is not there, stays unreachable, or twice arrives whole but wrong;
    DiskFullError if there is no room.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{file.fingerprint}.partial")
    for stale in target.parent.glob(f".{target.name}.*.partial"):
        if stale != partial:  # of another version
            stale.unlink()
    if (cached := _in_hub_cache(file)) is not None:
        partial.unlink(missing_ok=True)
        target.unlink(missing_ok=True)
        target.symlink_to(cached)
        return
    failures = wrong = 0
    while True:
        before = _size(partial)
        try:
            if file.size is None or before != file.size or not partial.exists():
                if file.size is not None and shutil.disk_usage(partial.parent).free < file.size - before:
                    raise _no_room(file, partial)
                _append(file, partial, before)
            _verify(file, partial)
            partial.replace(target)
            return
        except _WrongContentError as error:
            partial.unlink(missing_ok=True)
            wrong += 1
            if wrong == 2:
                raise FetchError(f"{file.url}: {error}, in two downloads; the file on the server is damaged") from None
            _LOG.info("%s: %s; downloading it again", file.url, error)
        except TransientError as error:
            failures = 1 if _size(partial) - before >= PROGRESS else failures + 1
            wait_or_give_up(file.url, error, failures)


def _in_hub_cache(file: RemoteFile) -> Path | None:
    """Where huggingface_hub keeps the content of `file`, whole and right; None: it has it not."""
    match = re.fullmatch(re.escape(endpoint()) + r"/([^/]+)/([^/]+)/resolve/.*", file.url)
    content = file.sha256 or file.git_sha1
    if match is None or content is None:
        return None
    from huggingface_hub.constants import HF_HUB_CACHE

    blob = Path(HF_HUB_CACHE) / f"models--{match[1]}--{match[2]}" / "blobs" / content
    try:
        _verify(file, blob)
    except (OSError, _WrongContentError):
        return None
    return blob


def get(
    url: str, headers: Mapping[str, str] | None = None, method: str = "GET", attempts: int | None = None
) -> requests.Response:
    """A whole answer, tried again on 5xx, 408, 429 and broken connections; raises FetchError otherwise, and for an
    answer of more than LARGEST_ANSWER bytes."""
    failures = 0
    while True:
        try:
            with _answer(url, headers or {}, method) as answer:
                content = bytearray()
                for block in _blocks(answer):
                    content += block
                    if len(content) > LARGEST_ANSWER:
                        raise FetchError(f"{url}: an answer of more than {LARGEST_ANSWER} bytes; check the address")
                answer._content = bytes(content)
                return answer
        except TransientError as error:
            failures += 1
            wait_or_give_up(url, error, failures, attempts)


def hub_headers(url: str) -> dict[str, str]:
    """The user's token for addresses of the hub, and for no other."""
    if not url.startswith(endpoint() + "/"):
        return {}
    from huggingface_hub import get_token

    token = os.environ.get("HF_TOKEN") or get_token()
    return {"Authorization": f"Bearer {token}"} if token else {}


def endpoint() -> str:
    """The hub's address (HF_ENDPOINT)."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def offline() -> bool:
    """Whether the hub must not be asked (HF_HUB_OFFLINE, TRANSFORMERS_OFFLINE)."""
    return any(
        os.environ.get(name, "").lower() in ("1", "true", "yes", "on")
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )


def wait_or_give_up(url: str, error: TransientError, failures: int, attempts: int | None = None) -> None:
    attempts = attempts or ATTEMPTS
    if failures >= attempts:
        raise FetchError(f"{url}: {error}, {failures} times in a row; try again later") from None
    wait = min(BACKOFF * 2 ** (failures - 1), LONGEST_WAIT) if error.wait is None else min(error.wait, LONGEST_WAIT)
    _LOG.info("%s: %s; attempt %d of %d in %.3g s", url, error, failures + 1, attempts, wait)
    STOP.wait(wait)


def _append(file: RemoteFile, partial: Path, start: int) -> None:
    """Add to `partial`, which holds `start` bytes, what comes after them."""
    with _reading(file, start) as (begins, blocks):
        try:
            with partial.open("r+b" if partial.exists() else "wb") as out:
                out.truncate(begins)
                out.seek(begins)
                for block in blocks:
                    if STOP.is_set():
                        raise FetchError(f"{file.url}: interrupted after {out.tell()} bytes; run the command again")
                    if file.size is not None and out.tell() + len(block) > file.size:
                        raise _WrongContentError(f"more than the {file.size} bytes of its listing")
                    out.write(block)
                out.flush()
                os.fsync(out.fileno())
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise _no_room(file, partial) from None
            raise FetchError(f"{partial}: cannot be written ({error.strerror or error})") from error
    have = _size(partial)
    if file.size is not None and have < file.size:
        raise TransientError(f"the answer ended after {have} of {file.size} bytes")


@contextlib.contextmanager
def _reading(file: RemoteFile, start: int) -> Iterator[tuple[int, Iterator[bytes]]]:
    """(where the bytes begin: `start`, or 0 if the server cannot go on, the bytes)."""
    if not file.url.startswith(("http://", "https://")):
        yield start, _of_bucket(file, start)
        return
    headers = hub_headers(file.url) | {"Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
        if not (file.sha256 or file.git_sha1):
            # Nothing would notice a file put together of two versions: one that has changed is to be sent whole.
            headers["If-Range"] = file.version
    with _answer(file.url, headers, "GET", past_end_is_wrong=True) as answer:
        begins = start if answer.status_code == 206 else 0
        yield begins, _blocks(answer)


@contextlib.contextmanager
def _answer(
    url: str, headers: Mapping[str, str], method: str, past_end_is_wrong: bool = False
) -> Iterator[requests.Response]:
    try:
        answer = _begun(url, headers, method)
    except (requests.ConnectionError, requests.Timeout) as error:
        raise TransientError(_short(error)) from error
    except (requests.RequestException, ValueError) as error:  # ValueError: a redirect to what is no address
        raise FetchError(f"{url}: {_short(error)}") from error
    with answer:
        status = answer.status_code
        if status in _PASSING:
            after = answer.headers.get("Retry-After", "")
            raise TransientError(f"status {status}", float(after) if after.isdecimal() else None)
        if status == 416 and past_end_is_wrong:
            raise _WrongContentError("the server's file is shorter than its listing says")
        if status >= 400:
            kind = NotThereError if status in (403, 404, 405, 410) else FetchError
            raise kind(f"{url}: {_refusal(answer)}")
        yield answer


def _begun(url: str, headers: Mapping[str, str], method: str) -> requests.Response:
    """An answer up to its content; who sends its headers without end, or drop by drop, is left behind."""
    came: queue.SimpleQueue[requests.Response | Exception] = queue.SimpleQueue()

    def ask() -> None:
        try:
            came.put(requests.request(method, url, headers=headers, stream=True, timeout=TIMEOUT, allow_redirects=True))
        except Exception as error:
            came.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = came.get(timeout=sum(TIMEOUT) + WINDOW)
    except queue.Empty:
        raise TransientError(f"no end of the headers in {sum(TIMEOUT) + WINDOW:.0f} s") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _blocks(answer: requests.Response) -> Iterator[bytes]:
    """The content as it arrives, unpacked, at most BLOCK bytes at a time."""
    encoding = answer.headers.get("Content-Encoding", "identity").lower()
    if encoding not in ("identity", "gzip", "deflate"):
        raise FetchError(f"{answer.url}: an answer in {encoding[:40]!r}, which was not asked for; check the address")
    unpack = None if encoding == "identity" else zlib.decompressobj(zlib.MAX_WBITS | 32)
    began, arrived = time.monotonic(), 0
    try:
        while packed := answer.raw.read1(BLOCK, decode_content=False):
            arrived, seconds = arrived + len(packed), time.monotonic() - began
            if seconds > WINDOW and arrived < SLOWEST * seconds:
                raise TransientError(f"only {arrived} bytes in {seconds:.0f} s")
            if seconds > WINDOW:
                began, arrived = time.monotonic(), 0
            while packed:
                yield packed if unpack is None else unpack.decompress(packed, BLOCK)
                packed = b"" if unpack is None else unpack.unconsumed_tail
    except (urllib3.exceptions.HTTPError, OSError, zlib.error) as error:
        raise TransientError(_short(error)) from error


def _of_bucket(file: RemoteFile, start: int) -> Iterator[bytes]:
    system, size = bucket(file.url, file.options), min(int(SLOWEST * WINDOW), RANGE)
    while file.size is None or start < file.size:
        stop = start + size if file.size is None else min(start + size, file.size)
        began = time.monotonic()
        with bucket_errors(file.url):
            block = _range_of(system, file.url, start, stop)
        if not block:
            return
        yield block
        start += len(block)
        size = min(4 * size, RANGE) if time.monotonic() - began < WINDOW / 8 else size


def _range_of(system: Any, url: str, start: int, stop: int) -> bytes:
    """Those bytes, within WINDOW where the file system works asynchronously, as those of Google and Amazon do."""
    if not getattr(system, "async_impl", False):
        return system.cat_file(url, start=start, end=stop)
    from fsspec.asyn import sync

    try:
        block: Any = sync(system.loop, system._cat_file, url, start=start, end=stop, timeout=WINDOW)
        return block
    except TimeoutError as error:
        raise TransientError(f"fewer than {stop - start} bytes in {WINDOW:.0f} s") from error


@contextlib.contextmanager
def bucket_errors(url: str) -> Iterator[None]:
    """What a file system raises, as FetchError if it is about the file or the user, else as TransientError."""
    try:
        yield
    except (FetchError, TransientError):
        raise
    except FileNotFoundError as error:
        raise FetchError(f"{url}: not there; check the name") from error
    except TypeError as error:  # of a constructor
        raise FetchError(f"{url}: {_short(error)}; check the options of its entry") from error
    except (PermissionError, ValueError, ImportError) as error:
        raise FetchError(f"{url}: {_short(error)}") from error
    except Exception as error:  # each file system has its own
        if "credential" in type(error).__name__.lower():
            raise FetchError(f"{url}: {_short(error)}; set the credentials of the bucket") from error
        raise TransientError(_short(error)) from error


def bucket(url: str, options: Options = ()) -> Any:
    """The fsspec file system of `url`. Raises FetchError naming the package that is missing."""
    import fsspec

    scheme = url.partition("://")[0]
    try:
        # An instance per thread and call would open connections anew; fsspec keeps one per options.
        return fsspec.filesystem(scheme, **dict(options))
    except ImportError as error:
        raise FetchError(f"{url}: {scheme}:// needs a package that is not installed: {_short(error)}") from error
    except ValueError as error:
        raise FetchError(f"{url}: {_short(error)}; known: hf, s3, gs, http(s) and fsspec's others") from error


def _verify(file: RemoteFile, path: Path) -> None:
    size = _size(path)
    if file.size is not None and size != file.size:
        raise _WrongContentError(f"{size} bytes instead of {file.size}")
    if file.sha256:
        with path.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        if digest != file.sha256:
            raise _WrongContentError(f"sha256 {digest[:12]}… instead of {file.sha256[:12]}…")
    elif file.git_sha1:
        digest = hashlib.sha1(b"blob %d\0" % size + path.read_bytes(), usedforsecurity=False).hexdigest()
        if digest != file.git_sha1:
            raise _WrongContentError(f"git hash {digest[:12]}… instead of {file.git_sha1[:12]}…")


def _no_room(file: RemoteFile, partial: Path) -> DiskFullError:
    free = shutil.disk_usage(partial.parent).free
    size = "an unknown number of" if file.size is None else f"{file.size - _size(partial):,}"
    return DiskFullError(
        f"{partial.parent}: the disk is full: {file.name} needs {size} more bytes, {free:,} are free;"
        " make room, name another disk with --downloads, or use --keep-downloads no"
    )


def _refusal(answer: requests.Response) -> str:
    status, code = answer.status_code, answer.headers.get("X-Error-Code", "")
    if code == "GatedRepo":
        return "the repository is gated; accept its terms on the hub and set HF_TOKEN"
    if code == "RevisionNotFound":
        return "no such revision"
    if code == "EntryNotFound":
        return "no such file"
    if code == "RepoNotFound" or status == 401:
        return "no such repository, or it is private; check the name, or set HF_TOKEN"
    if status == 404:
        return "not there (status 404)"
    return f"refused (status {status})"


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _short(error: BaseException) -> str:
    if isinstance(error, requests.ConnectionError):
        cause = error.args[0] if error.args else None
        why = type(getattr(cause, "reason", cause)).__name__
        return f"no connection ({why.removesuffix('Error')})"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
