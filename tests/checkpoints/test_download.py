"""One file over the network: who gets the token, what is waited, where it goes on, what is verified. No JAX."""

import dataclasses
import errno
import hashlib
import http.server
import os
import re
import shutil
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from remote_examples import serving

from fineline_jax.checkpoints.remote import download
from fineline_jax.checkpoints.remote.download import (
    DiskFullError,
    FetchError,
    NotThereError,
    RemoteFile,
    TransientError,
)

CONTENT = bytes(range(250)) * 4
BLOCK = download.BLOCK


class Waits:
    """Instead of the event that ends downloads: notes for how long it was waited."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.stopped = False

    def wait(self, seconds: float) -> None:
        self.seconds.append(seconds)

    def is_set(self) -> bool:
        return self.stopped


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> Waits:
    made = Waits()
    monkeypatch.setattr(download, "STOP", made)
    monkeypatch.setattr(download, "BLOCK", 1)
    monkeypatch.setattr(download, "PROGRESS", 1)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_ENDPOINT", "HTTP_PROXY", "http_proxy", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN", "secret")
    return made


@dataclasses.dataclass
class Server:
    """Gives these answers one after another, the last one again and again."""

    url: str = ""
    answers: list[tuple[int, dict[str, str], bytes]] = dataclasses.field(default_factory=list)
    """(status, headers, body); a Content-Length above the body's breaks the connection off. Status 0: nothing at all.
    Status -1: as a server with ranges, of `body`."""
    asked: list[tuple[str, dict[str, str]]] = dataclasses.field(default_factory=list)

    def header(self, name: str) -> list[str | None]:
        return [headers.get(name) for _, headers in self.asked]


class _Handler(http.server.BaseHTTPRequestHandler):
    script: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.script.asked.append((self.command, dict(self.headers)))
        status, headers, body = self.script.answers[min(len(self.script.asked), len(self.script.answers)) - 1]
        self.close_connection = True
        if status == 0:
            return
        if status == -1:
            found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            start = int(found[1]) if found and self.headers.get("If-Range") in (None, headers.get("ETag")) else 0
            status, body = (206, body[start:]) if start else (200, body)
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body)), "Connection": "close"} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    with serving(type("Handler", (_Handler,), {"script": made})) as url:
        made.url = url
        yield made


def piece(body: bytes, status: int = 206, **headers: str) -> tuple[int, dict[str, str], bytes]:
    """An answer that breaks off behind `body`."""
    return status, {"Content-Length": str(len(body) + 10), **headers}, body


def file_at(server: Server, **changes: Any) -> RemoteFile:
    listed: dict[str, Any] = {"size": len(CONTENT), "version": "1", "sha256": hashlib.sha256(CONTENT).hexdigest()}
    return RemoteFile("f", f"{server.url}/f", **(listed | changes))


# The token


@pytest.mark.parametrize(
    ("url", "gets"),
    [
        ("https://huggingface.co/api/models/a/b", True),
        ("https://huggingface.co/", True),
        ("https://huggingface.co.evil/api", False),
        ("https://huggingface.community/api", False),
        ("https://huggingface.co@evil.com/api", False),
        ("https://user@huggingface.co/api", False),
        ("https://huggingface.co:8443/api", False),
        ("https://cdn-lfs.huggingface.co/api", False),
        ("https://evil.com/https://huggingface.co/api", False),
        ("https://evil.com/?x=https://huggingface.co/", False),
        ("http://huggingface.co/api", False),
        ("https://huggingface.co", False),
        ("https://cdn.hf.co/x", False),
    ],
)
def test_only_addresses_of_the_hub_itself_get_the_token(url: str, gets: bool) -> None:
    assert download.hub_headers(url) == ({"Authorization": "Bearer secret"} if gets else {})


def test_another_hub_gets_the_token_in_place_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    for endpoint in ("https://mirror.example/hf", "https://mirror.example/hf/"):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        assert download.endpoint() == "https://mirror.example/hf"
        assert download.hub_headers("https://mirror.example/hf/api/models") == {"Authorization": "Bearer secret"}
        assert download.hub_headers("https://mirror.example/hf-evil/api") == {}
        assert download.hub_headers("https://huggingface.co/api/models") == {}


def test_the_token_is_that_of_the_environment_else_the_one_logged_in_with(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    token: list[str | None] = ["logged in"]
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token[0])
    url = "https://huggingface.co/x"
    assert download.hub_headers(url) == {"Authorization": "Bearer secret"}
    monkeypatch.delenv("HF_TOKEN")
    assert download.hub_headers(url) == {"Authorization": "Bearer logged in"}
    token[0] = None
    assert download.hub_headers(url) == {}


def test_a_redirect_to_another_host_is_followed_without_the_token(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    elsewhere = server.url.replace("127.0.0.1", "localhost") + "/cdn"
    server.answers = [(302, {"Location": "/again"}, b""), (307, {"Location": elsewhere}, b""), (200, {}, CONTENT)]
    download.download(file_at(server), tmp_path / "f")
    assert server.header("Authorization") == ["Bearer secret", "Bearer secret", None]


# Waiting and giving up


def busy(status: int = 503, **headers: str) -> tuple[int, dict[str, str], bytes]:
    return status, {key.replace("_", "-"): value for key, value in headers.items()}, b"busy"


def test_six_attempts_are_made_after_1_2_4_8_and_16_seconds(server: Server, waits: Waits, tmp_path: Path) -> None:
    server.answers = [busy()]
    with pytest.raises(FetchError, match="status 503, 6 times in a row"):
        download.download(file_at(server), tmp_path / "f")
    assert waits.seconds == [1, 2, 4, 8, 16] and len(server.asked) == 6


def test_no_wait_is_longer_than_a_minute(server: Server, waits: Waits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "ATTEMPTS", 9)
    server.answers = [busy(), busy(), busy(Retry_After="3"), busy()]
    with pytest.raises(FetchError, match="9 times in a row"):
        download.get(server.url)
    assert waits.seconds == [1, 2, 3, 8, 16, 32, 60, 60]


@pytest.mark.parametrize(
    ("said", "seconds"),
    [("7", 7), ("0", 0), ("59", 59), ("60", 60), ("61", 60), ("3600", 60), ("99999999999", 60), (None, 1), ("", 1),
     ("Fri, 31 Dec 2049 23:59:59 GMT", 1), ("-5", 1), ("1.5", 1), ("\u00b2", 1), ("soon", 1)],
)  # fmt: skip
def test_a_server_may_say_how_long_to_wait_up_to_a_minute(
    server: Server, waits: Waits, said: str | None, seconds: float
) -> None:
    server.answers = [busy(429) if said is None else busy(429, Retry_After=said), (200, {}, b"x")]
    assert download.get(server.url).content == b"x"
    assert waits.seconds == [seconds]


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_what_passes_is_asked_again(server: Server, waits: Waits, status: int) -> None:
    server.answers = [busy(status), (200, {}, b"x")]
    assert download.get(server.url).content == b"x" and len(waits.seconds) == 1


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 410, 416, 451, 501])
def test_what_stays_is_not(server: Server, waits: Waits, status: int) -> None:
    server.answers = [busy(status)]
    with pytest.raises(FetchError) as error:
        download.get(server.url)
    assert isinstance(error.value, NotThereError) == (status in (403, 404, 405, 410))
    assert len(server.asked) == 1 and not waits.seconds


def test_a_connection_that_breaks_is_tried_again_as_often_as_asked_for(server: Server, waits: Waits) -> None:
    server.answers = [(0, {}, b""), piece(b"half", 200), (200, {}, b"x")]
    assert download.get(server.url, attempts=3).content == b"x"
    server.asked.clear()
    with pytest.raises(FetchError, match="2 times in a row"):
        download.get(server.url, attempts=2)
    assert len(server.asked) == 2


def test_a_request_says_who_asks_for_what_and_ends_after_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def request(method: str, url: str, **options: Any) -> Any:
        asked.append((method, url, options))
        raise requests.exceptions.InvalidURL("no")

    monkeypatch.setattr(requests, "request", request)
    with pytest.raises(FetchError, match="InvalidURL: no"):
        download.get("http://x/y", {"A": "b"}, "HEAD")
    assert asked == [("HEAD", "http://x/y", {"headers": {"A": "b"}, "stream": True, "timeout": (15.0, 60.0),
                                             "allow_redirects": True})]  # fmt: skip


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [(403, "GatedRepo", "accept its terms"), (401, "GatedRepo", "accept its terms"),
     (404, "RevisionNotFound", "no such revision"), (404, "EntryNotFound", "no such file"),
     (404, "RepoNotFound", "or it is private"), (401, "", "or it is private"),
     (404, "", r"not there \(status 404\)"), (403, "", r"refused \(status 403\)")],
)  # fmt: skip
def test_a_refusal_says_what_to_do(server: Server, status: int, code: str, said: str) -> None:
    server.answers = [(status, {"X-Error-Code": code}, b"")]
    with pytest.raises(FetchError, match=said):
        download.get(server.url)


# Going on


def test_each_range_begins_behind_the_last_byte_that_came(server: Server, tmp_path: Path) -> None:
    server.answers = [piece(CONTENT[:300], 200), piece(CONTENT[300:301]), (-1, {}, CONTENT)]
    download.download(file_at(server), tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert server.header("Range") == [None, "bytes=300-", "bytes=301-"]
    assert server.header("Accept-Encoding") == ["identity"] * 3


def test_of_what_came_before_a_connection_broke_less_than_256_kib_are_asked_for_again(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "BLOCK", BLOCK)
    content = CONTENT * 1000
    server.answers = [piece(content[:700_000], 200), (-1, {}, content)]
    download.download(file_at(server, size=len(content), sha256=None), tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == content
    [_, again] = server.header("Range")
    assert 700_000 - (256 << 10) < int(again[6:-1]) <= 700_000  # type: ignore[index]


def test_a_server_that_cannot_go_on_sends_all_of_it_again(server: Server, tmp_path: Path) -> None:
    server.answers = [piece(CONTENT[:300], 200), (200, {}, CONTENT)]
    download.download(file_at(server), tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == CONTENT and server.header("Range") == [None, "bytes=300-"]


def test_progress_begins_the_count_of_failures_anew(
    server: Server, waits: Waits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three in a row without a byte: what breaks off after some is the first of a new row, and waits as the first."""
    monkeypatch.setattr(download, "ATTEMPTS", 3)
    server.answers = [busy(), busy(), piece(CONTENT[:1], 200), busy(), piece(CONTENT[1:9]), busy(), (-1, {}, CONTENT)]
    download.download(file_at(server), tmp_path / "f")
    assert waits.seconds == [1, 2, 1, 2, 1, 2]
    server.asked.clear()
    server.answers = [busy(), busy(), piece(CONTENT[:1], 200), busy(), piece(b""), (-1, {}, CONTENT)]
    with pytest.raises(FetchError, match="3 times in a row"):
        download.download(file_at(server), tmp_path / "g")
    assert len(server.asked) == 5


def test_a_file_that_changed_meanwhile_is_not_put_together_of_two_versions(server: Server, tmp_path: Path) -> None:
    """Of a file without a hash the rest is asked for only if it is still the same; one with a hash is verified."""
    changed = CONTENT[::-1]
    server.answers = [piece(CONTENT[:300], 200), (-1, {"ETag": '"new"'}, changed)]
    download.download(file_at(server, sha256=None, version='"old"'), tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == changed
    assert server.header("If-Range") == [None, '"old"']
    server.asked.clear()
    server.answers = [piece(CONTENT[:300], 200), (-1, {"ETag": '"same"'}, CONTENT)]
    download.download(file_at(server, sha256=None, version='"same"'), tmp_path / "g")
    assert (tmp_path / "g").read_bytes() == CONTENT and server.header("Range") == [None, "bytes=300-"]
    server.asked.clear()
    download.download(file_at(server), tmp_path / "h")
    assert server.header("If-Range") == [None, None] and (tmp_path / "h").read_bytes() == CONTENT


def test_what_an_earlier_run_left_is_gone_on_with_if_it_is_of_this_version(server: Server, tmp_path: Path) -> None:
    file, other = file_at(server), file_at(server, version="2")
    assert len({file.fingerprint, other.fingerprint, file_at(server, size=999).fingerprint}) == 3
    server.answers = [(-1, {}, CONTENT)]
    for left, asked in ((CONTENT[:999], ["bytes=999-"]), (CONTENT, [])):
        (tmp_path / f".f.{file.fingerprint}.partial").write_bytes(left)
        (tmp_path / f".f.{other.fingerprint}.partial").write_bytes(b"of another version")
        (tmp_path / ".fg.x.partial").write_bytes(b"of another file")
        download.download(file, tmp_path / "f")
        assert (tmp_path / "f").read_bytes() == CONTENT and server.header("Range") == asked
        assert sorted(os.listdir(tmp_path)) == [".fg.x.partial", "f"]
        server.asked.clear()


def test_what_is_too_long_already_is_begun_again(server: Server, tmp_path: Path) -> None:
    file = file_at(server)
    (tmp_path / f".f.{file.fingerprint}.partial").write_bytes(CONTENT + b"more")
    server.answers = [busy(416), (200, {}, CONTENT)]
    download.download(file, tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == CONTENT and server.header("Range") == ["bytes=1004-", None]


def test_of_a_file_sent_whole_nothing_that_lay_there_stays(server: Server, tmp_path: Path) -> None:
    """Also where the server says neither size nor hash, so that nobody would notice."""
    file = file_at(server, size=None, sha256=None)
    (tmp_path / f".f.{file.fingerprint}.partial").write_bytes(CONTENT + b"more")
    server.answers = [(200, {}, CONTENT)]
    download.download(file, tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == CONTENT


def test_an_interrupted_download_keeps_what_came(server: Server, waits: Waits, tmp_path: Path) -> None:
    waits.stopped = True
    file = file_at(server)
    (tmp_path / f".f.{file.fingerprint}.partial").write_bytes(CONTENT[:400])
    server.answers = [(-1, {}, CONTENT)]
    with pytest.raises(FetchError, match="interrupted after 400 bytes"):
        download.download(file, tmp_path / "f")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [CONTENT[:400]]


# Verifying


BLOB = hashlib.sha1(b"blob 1000\0" + CONTENT).hexdigest()
WRONG = CONTENT[:-1] + b"?"


@pytest.mark.parametrize(
    ("listed", "sent", "said"),
    [
        ({}, WRONG, "sha256 .* instead of"),
        ({"sha256": None, "git_sha1": BLOB}, WRONG, "git hash .* instead of"),
        ({"sha256": "0" * 64, "git_sha1": BLOB}, CONTENT, "sha256 .* instead of"),
        ({"sha256": None}, CONTENT + b"x", "more than the 1000 bytes of its listing"),
        ({"size": None}, WRONG, "sha256 .* instead of"),
    ],
)
def test_what_arrives_whole_and_wrong_twice_is_refused_and_removed(
    server: Server, tmp_path: Path, listed: dict[str, Any], sent: bytes, said: str
) -> None:
    server.answers = [(200, {}, sent)]
    with pytest.raises(FetchError, match=rf"/f: {said}.*, in two downloads"):
        download.download(file_at(server, **listed), tmp_path / "f")
    assert len(server.asked) == 2 and os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "listed", [{}, {"sha256": None, "git_sha1": BLOB}, {"size": None}, {"size": None, "sha256": None}]
)
def test_what_is_right_is_taken_also_the_second_time(server: Server, tmp_path: Path, listed: dict[str, Any]) -> None:
    server.answers = (
        [(200, {}, CONTENT)] if "sha256" in listed and "size" in listed else [(200, {}, WRONG), (200, {}, CONTENT)]
    )
    download.download(file_at(server, **listed), tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == CONTENT and os.listdir(tmp_path) == ["f"]
    assert server.header("Range") == [None] * len(server.asked), "what was wrong is not gone on with"


def test_a_file_is_on_the_disk_before_it_has_its_name(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    replace = os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: told.append(os.fstat(descriptor).st_size))
    monkeypatch.setattr(os, "replace", lambda old, new: (told.append(Path(new).name), replace(old, new)))
    server.answers = [(200, {}, CONTENT)]
    download.download(file_at(server), tmp_path / "f")
    assert told == [1000, "f"]


@pytest.mark.parametrize(
    ("free", "have", "fits"), [(1000, 0, True), (999, 0, False), (600, 400, True), (599, 400, False)]
)
def test_there_must_be_room_for_what_is_still_to_come(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, have: int, fits: bool
) -> None:
    file = file_at(server)
    (tmp_path / f".f.{file.fingerprint}.partial").write_bytes(CONTENT[:have])
    server.answers = [(-1, {}, CONTENT)]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "free")(free))
    if fits:
        download.download(file, tmp_path / "f")
    else:
        with pytest.raises(DiskFullError, match=rf"f needs {1000 - have:,} more bytes, {free} are free"):
            download.download(file, tmp_path / "f")
        assert not server.asked


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ENOSPC, DiskFullError), (errno.EDQUOT, DiskFullError), (errno.EIO, FetchError)]
)
def test_a_disk_that_fails_is_told_apart_from_one_that_is_full(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception]
) -> None:
    def fails(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fails)
    server.answers = [(200, {}, CONTENT)]
    with pytest.raises(FetchError) as error:
        download.download(file_at(server), tmp_path / "f")
    assert type(error.value) is kind


# Buckets


class Bucket:
    """A file system of one file."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def cat_file(self, url: str, start: int, end: int) -> bytes:
        self.asked.append((start, end))
        assert len(self.asked) < 9
        return CONTENT[start:end]


@pytest.mark.parametrize(
    ("size", "have", "asked"),
    [
        (1000, 0, [(0, 400), (400, 800), (800, 1000)]),
        (1000, 399, [(399, 799), (799, 1000)]),
        (1000, 999, [(999, 1000)]),
        (None, 700, [(700, 1100), (1000, 1400)]),
    ],
)
def test_a_bucket_is_read_in_ranges_to_the_last_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int | None, have: int, asked: list[tuple[int, int]]
) -> None:
    assert download.RANGE == 32 << 20
    monkeypatch.setattr(download, "RANGE", 400)
    bucket = Bucket()
    monkeypatch.setattr(download, "bucket", lambda url, options: bucket if options == (("anon", True),) else None)
    file = RemoteFile("f", "s3://b/f", size, "1", options=(("anon", True),))
    (tmp_path / f".f.{file.fingerprint}.partial").write_bytes(CONTENT[:have])
    download.download(file, tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == CONTENT and bucket.asked == asked


class NoCredentialsError(Exception):
    pass


@pytest.mark.parametrize(
    ("raised", "kind", "said"),
    [(FileNotFoundError("x"), FetchError, "not there"), (TypeError("x"), FetchError, "check the options"),
     (PermissionError("x"), FetchError, "PermissionError: x"), (ValueError("x"), FetchError, "ValueError: x"),
     (NoCredentialsError("x"), FetchError, "set the credentials"), (OSError("x"), TransientError, "OSError: x"),
     (RuntimeError("x"), TransientError, "RuntimeError: x")],
)  # fmt: skip
def test_only_what_may_pass_of_a_bucket_is_tried_again(raised: Exception, kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=said), download.bucket_errors("s3://b"):
        raise raised


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_is_what_the_hub_s_own_library_takes_for_it(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    assert not download.offline()
    for value, means in {"1": 1, "true": 1, "YES": 1, "On": 1, "0": 0, "no": 0, "": 0, "off": 0, "2": 0}.items():
        monkeypatch.setenv(name, value)
        assert download.offline() == bool(means)
