"""Hostile servers, also such that send without end: each answer ends in one line, with no more on the disk than was
listed."""

import asyncio
import gzip
import http.server
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec.asyn
import pytest
from remote_examples import serving
from tally import Tally, tallied

from fineline_jax.checkpoints.remote import cache, download, listing
from fineline_jax.checkpoints.remote.download import FetchError, RemoteFile
from fineline_jax.checkpoints.remote.listing import list_files, list_names
from fineline_jax.checkpoints.series import Remote
from fineline_jax.errors import UserError

Send = Callable[[http.server.BaseHTTPRequestHandler], None]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "BACKOFF", 0.001)
    monkeypatch.setattr(download, "ATTEMPTS", 2)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def attack(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Send], str]]:
    """attack(send): the address of a server that answers every request by `send`; it is the hub as well."""
    script: dict[str, Send] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            try:
                script["send"](self)
            except OSError:  # it was broken off, as it should be
                self.close_connection = True

        do_HEAD = do_GET

    with serving(Handler) as url:

        def start(send: Send) -> str:
            script["send"] = send
            monkeypatch.setenv("HF_ENDPOINT", url)
            return url

        yield start


def head(handler: http.server.BaseHTTPRequestHandler, **headers: str) -> None:
    handler.send_response(200)
    for key, value in headers.items():
        handler.send_header(key.replace("_", "-"), value)
    handler.end_headers()


def test_a_download_stops_at_the_size_that_was_listed(attack, tmp_path: Path) -> None:
    def endless(handler: http.server.BaseHTTPRequestHandler) -> None:
        head(handler)
        for _ in range(500):  # 33 MB: no test may fill the disk
            handler.wfile.write(bytes(1 << 16))

    file = RemoteFile("f", f"{attack(endless)}/f", 1_000_000, "1")
    with pytest.raises(FetchError, match=r"more than the 1000000 bytes of its listing, in two downloads"):
        download.download(file, tmp_path / "f")
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 1_000_000


@pytest.mark.parametrize("what", ["file", "listing"])
def test_a_drip_is_broken_off(attack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    monkeypatch.setattr(download, "WINDOW", 0.2)
    monkeypatch.setattr(listing, "LISTING_ATTEMPTS", 2)

    def drip(handler: http.server.BaseHTTPRequestHandler) -> None:
        head(handler, Content_Length="1000000")
        for _ in range(1000):
            handler.wfile.write(b" ")
            time.sleep(0.02)

    url, began = attack(drip), time.monotonic()
    with pytest.raises(FetchError, match=r"only \d+ bytes in \d+ s, 2 times in a row"):
        if what == "file":
            download.download(RemoteFile("f", f"{url}/f", 1_000_000, "1"), tmp_path / "f")
        else:
            list_files("hf://org/name")
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("line", [b"X: y", b"HTTP/1.1 100 Continue\r\n"])
def test_headers_that_drip_or_have_no_end_are_left_behind(attack, monkeypatch: pytest.MonkeyPatch, line) -> None:
    """Each arrives well within the seconds between two pieces of an answer."""
    monkeypatch.setattr(download, "WINDOW", 0.2)
    monkeypatch.setattr(download, "TIMEOUT", (0.3, 0.3))
    monkeypatch.setattr(listing, "LISTING_ATTEMPTS", 2)

    def headers(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"" if line.startswith(b"HTTP") else b"HTTP/1.1 200 OK\r\n")
        for _ in range(90):
            handler.wfile.write(line + b"\r\n")
            time.sleep(0.03)

    attack(headers)
    began = time.monotonic()
    with pytest.raises(FetchError, match=r"no end of the headers in 1 s, 2 times in a row; try again later"):
        list_files("hf://org/name")
    assert time.monotonic() - began < 2.5


def test_a_listing_that_unpacks_to_too_much_is_refused(attack, monkeypatch: pytest.MonkeyPatch) -> None:
    """A megabyte of zeros is about a kilobyte of gzip."""
    monkeypatch.setattr(download, "LARGEST_ANSWER", 1 << 20)
    packed = gzip.compress(bytes(1 << 24))

    def bomb(handler: http.server.BaseHTTPRequestHandler) -> None:
        head(handler, Content_Length=str(len(packed)), Content_Encoding="gzip")
        handler.wfile.write(packed)

    attack(bomb)
    with pytest.raises(FetchError, match="an answer of more than 1048576 bytes; check the address"):
        list_files("hf://org/name")


@pytest.mark.parametrize("target", ["itself", "another each time"])
def test_a_listing_whose_pages_have_no_end_is_refused(attack, monkeypatch, target: str) -> None:
    monkeypatch.setattr(listing, "MOST_PAGES", 20)
    asked = itertools.count(1)

    def pages(handler: http.server.BaseHTTPRequestHandler) -> None:
        number = next(asked)
        base = f"http://127.0.0.1:{handler.server.server_address[1]}"  # type: ignore[index]
        following = {
            "itself": base + handler.path,
            "another each time": f"{base}/api/models?page={number}",
        }[target]
        content = json.dumps([{"id": f"org/x-{number}"}]).encode()
        more = {"Link": f'<{following}>; rel="next"'} if number < 60 else {}  # so that the test ends
        head(handler, Content_Length=str(len(content)), **more)
        handler.wfile.write(content)

    attack(pages)
    with pytest.raises(FetchError, match=r"a listing without end \(\d+ pages\); check the address"):
        list_names("hf://org/x-{name}")
    assert next(asked) <= 22


def test_an_index_page_with_too_many_links_is_not_asked_for_each(attack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "MOST_FILES", 50)
    page, asked = "".join(f'<a href="x{i}">x</a>' for i in range(60)).encode(), itertools.count(1)

    def links(handler: http.server.BaseHTTPRequestHandler) -> None:
        next(asked)
        head(handler, Content_Length=str(len(page)), Content_Type="text/html")
        handler.wfile.write(page)

    with pytest.raises(FetchError, match="lists 60 files; give the folder of a checkpoint"):
        list_files(attack(links))
    assert next(asked) == 2


def test_an_encoding_that_was_not_asked_for_is_refused(attack) -> None:
    attack(lambda handler: head(handler, Content_Encoding="br"))
    with pytest.raises(FetchError, match="an answer in 'br', which was not asked for"):
        list_files("hf://org/name")


class Drip:
    """A file system that gives a range of up to 200 bytes at once, and a longer one never."""

    async_impl = True

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []
        self.loop = fsspec.asyn.get_loop()

    async def _cat_file(self, url: str, start: int, end: int) -> bytes:
        self.asked.append((start, end))
        if end - start > 200:
            await asyncio.sleep(3600)
        return bytes(end - start)


def test_a_bucket_that_drips_is_broken_off_and_what_came_stays(tmp_path: Path, monkeypatch) -> None:
    """The first range is what the slowest rate lets through in the window; 50, 200 arrive, 800 does not, twice."""
    monkeypatch.setattr(download, "WINDOW", 0.5)
    monkeypatch.setattr(download, "SLOWEST", 100)
    monkeypatch.setattr(download, "PROGRESS", 1000)
    drip = Drip()
    monkeypatch.setattr(download, "bucket", lambda url, options: drip)
    began = time.monotonic()
    with pytest.raises(FetchError, match=r"fewer than \d+ bytes in 0 s, 2 times in a row"):
        download.download(RemoteFile("f", "gs://b/f", 10_000, "1"), tmp_path / "f")
    assert time.monotonic() - began < 20
    assert drip.asked == [(0, 50), (50, 250), (250, 1050), (250, 300), (300, 500), (500, 1300)]
    [partial] = tmp_path.iterdir()
    assert partial.stat().st_size == 500


# ---- Many answers, each to every kind of question

OK = b"HTTP/1.1 200 OK\r\n"


def body(content: bytes, headers: bytes = b"") -> bytes:
    return OK + headers + b"Content-Length: %d\r\n\r\n" % len(content) + content


def json_body(content: Any) -> bytes:
    return body(json.dumps(content).encode())


def model(*files: Any, **more: Any) -> bytes:
    """A listing of the hub, of config.json and these files."""
    return json_body({"sha": "c" * 40, "siblings": [{"rfilename": "config.json", "size": 2}, *files]} | more)


def file(name: Any = "model.safetensors", **keys: Any) -> dict[str, Any]:
    return {"rfilename": name, "size": 2} | keys


def redirect(to: str) -> bytes:
    return f"HTTP/1.1 302 Found\r\nLocation: {to}\r\nContent-Length: 0\r\n\r\n".encode("latin-1")


ANSWERS: dict[str, bytes] = {
    "nothing": b"",
    "no HTTP": b"220 ftp ready\r\n",
    "zeros": bytes(70_000),
    "a status of letters": b"HTTP/1.1 abc OK\r\n\r\n",
    "a status without end": b"HTTP/1.1 200 " + b"x" * 70_000,
    "a header without end": OK + b"X: " + b"x" * 70_000,
    "headers without end": OK + b"X: y\r\n" * 2000,
    "two lengths": OK + b"Content-Length: 2\r\nContent-Length: 9\r\n\r\n{}",
    "a negative length": OK + b"Content-Length: -1\r\n\r\n{}",
    "a length of 5000 digits": OK + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n{}",
    "a length of letters": OK + b"Content-Length: two\r\n\r\n{}",
    "a length too large": OK + b"Content-Length: 1000\r\n\r\n{}",
    "a chunk of letters": OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
    "a negative chunk": OK + b"Transfer-Encoding: chunked\r\n\r\n-5\r\n{}\r\n0\r\n\r\n",
    "a chunk cut short": OK + b"Transfer-Encoding: chunked\r\n\r\nff\r\n{}",
    "gzip that is none": body(b"{}", b"Content-Encoding: gzip\r\n"),
    "gzip cut short": body(gzip.compress(b'{"sha": 1}')[:-9], b"Content-Encoding: gzip\r\n"),
    "brotli": body(b"{}", b"Content-Encoding: br\r\n"),
    "two encodings": body(b"{}", b"Content-Encoding: gzip, gzip\r\n"),
    "a redirect to itself": redirect("/again"),
    "a redirect to a file": redirect("file:///etc/passwd"),
    "a redirect to ftp": redirect("ftp://127.0.0.1/x"),
    "a redirect to no address": redirect("http://[::1"),
    "a redirect to a name with a point": redirect("http://.example:0/"),
    "a redirect to a large port": redirect("http://127.0.0.1:99999999/"),
    "a redirect to bytes": redirect("http://127.0.0.1:1/\xff\xfe"),
    "a redirect to nowhere": b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n",
    "status 500 and a long wait": b"HTTP/1.1 500 No\r\nRetry-After: 0\r\nContent-Length: 0\r\n\r\n",
    "status 418 with bytes": b"HTTP/1.1 418 \xff\xfe\x1b[2J\r\nContent-Length: 3\r\n\r\n\x1b[2",
    "status 404 of an unknown code": b"HTTP/1.1 404 No\r\nX-Error-Code: \x1b[31m\r\nContent-Length: 0\r\n\r\n",
    "status 401 and a message of many lines": b"HTTP/1.1 401 No\r\nX-Error-Message: a\r\n b\r\n\r\n",
    "status 999": b"HTTP/1.1 999 What\r\nContent-Length: 0\r\n\r\n",
    "status 206 unasked": b"HTTP/1.1 206 Part\r\nContent-Range: bytes 7-8/9\r\nContent-Length: 2\r\n\r\n{}",
    "status 204": b"HTTP/1.1 204 None\r\n\r\n",
    "no JSON": body(b"\xff\xfe{"),
    "JSON 100,000 deep": body(b"[" * 100_000),
    "a number of 5000 digits": body(b'{"sha": ' + b"9" * 5000 + b"}"),
    "null": json_body(None),
    "a number": json_body(5),
    "a text": json_body("x"),
    "a list of numbers": json_body([1, 2]),
    "lists of lists": json_body([[[]]]),
    "an empty object": json_body({}),
    "files that are none": json_body({"sha": "c" * 40, "siblings": 5}),
    "files that are texts": json_body({"sha": "c" * 40, "siblings": ["config.json"]}),
    "a commit that is an object": model(sha={"a": 1}),
    "a commit that leaves": model(file(), sha="../../../etc"),
    "a name that leaves": model(file("../model.safetensors")),
    "the name of the folder above": model(file(".."), file()),
    "no name": model(file(""), file()),
    "a name of half a character": model(file("\ud800"), file()),
    "a name of a zero": model(file("a\0b"), file()),
    "a name of lines": model(file("model.safetensors\nx")),
    "a name of 5000 characters": model(file("x" * 5000), file()),
    "a name that is a number": model(file(5), file()),
    "one name twice": model(file(), file(size=7)),
    "a size of letters": model(file(size="two")),
    "a negative size": model(file(size=-5)),
    "half a byte": model(file(size=0.5)),
    "a size beyond any disk": model(file(size=10**30)),
    "a true size": model(file(size=True)),
    "a large file that is a number": model(file(lfs=5)),
    "a hash that is a number": model(file(lfs={"sha256": 5, "size": 2})),
    "a hash that is a list": model(file(blobId=[1])),
    "a hash that leaves": model(file(lfs={"sha256": "../../../etc/passwd", "size": 2})),
    "a hash of half a character": model(file(lfs={"sha256": "\ud800", "size": 2})),
    "an index that leaves": json_body({"weight_map": {"a": "..", "b": "../x", "c": "/etc/passwd"}}),
    "an index of no names": json_body({"weight_map": {"a": "", "b": 5, "c": None, "d": [], "e": "."}}),
    "an index of half a character": json_body({"weight_map": {"a": "\ud800"}}),
    "an index of a zero": json_body({"weight_map": {"a": "x\0y\nz"}}),
    "an index of 20,000 files": json_body({"weight_map": {str(one): f"{one}.safetensors" for one in range(20_000)}}),
    "an index that is a list": json_body({"weight_map": [1]}),
    "names that are objects": json_body([{"id": {}}, {"id": None}]),
    "a page that leads to a file": body(b"[]", b'Link: <file:///etc/passwd>; rel="next"\r\n'),
    "a page that leads nowhere": body(b"[]", b'Link: <>; rel="next"\r\n'),
    "a page that leads to no address": body(b"[]", b'Link: <http://[::1>; rel="next"\r\n'),
    "a link that is none": body(b"[]", b"Link: ;;;=,<\r\n"),
    "links that leave": body(
        b'<a href="../x"><a href="%2e%2e%2fx"><a href="..%00"><a href="config.json">', b"Content-Type: text/html\r\n"
    ),
    "links of half a character": body(b'<a href="%ed%a0%80"><a href="\xff">', b"Content-Type: text/html\r\n"),
}  # fmt: skip


def questions(url: str, folder: Path) -> dict[str, Callable[[], Any]]:
    """What is asked of a server; each leaves its files in `folder`."""
    remote = Remote("hf://org/name", folder / "d")
    return {
        "a file": lambda: download.download(RemoteFile("f", f"{url}/f", 2, "1", sha256="0" * 64), folder / "d/f"),
        "a file without a size": lambda: download.download(RemoteFile("f", f"{url}/f", None, "1"), folder / "d/f"),
        "files": lambda: list_files("hf://org/name"),
        "files of a server": lambda: list_files(url),
        "repositories": lambda: list_names("hf://org/x-{name}"),
        "revisions": lambda: list_names("hf://org/name@{name}"),
        "folders": lambda: list_names("hf://org/name@main/{name}"),
        "a checkpoint": lambda: cache.fetch(remote),
    }


@pytest.fixture(scope="module")
def tally(request: pytest.FixtureRequest) -> Iterator[Tally]:
    with tallied("hostile answers", request) as counts:
        yield counts


@pytest.mark.parametrize("question", sorted(questions("", Path())))
def test_every_answer_is_read_or_refused_in_one_line(question, attack, tmp_path: Path, monkeypatch, tally) -> None:
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    monkeypatch.setattr(listing, "LISTING_ATTEMPTS", 1)
    monkeypatch.setattr(listing, "MOST_PAGES", 5)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    wrong = []
    for number, (name, answer) in enumerate(ANSWERS.items()):
        folder = tmp_path / str(number)
        url = attack(
            lambda handler, answer=answer: (handler.wfile.write(answer), setattr(handler, "close_connection", True))
        )
        cache._listed.cache_clear()
        began, ended = time.monotonic(), "read"
        try:
            with tally.one():
                try:
                    questions(url, folder)[question]()
                except UserError as error:
                    ended = str(error)
                    assert ended.isprintable() and len(ended) < 2000, f"said as {ended[:300]!r}"
                assert time.monotonic() - began < 10, "takes long"
                files = [path for path in tmp_path.rglob("*") if not path.is_dir()]
                places = (folder / "d", Remote("hf://org/name", folder / "d").folder)
                assert not [path for path in files if path.is_relative_to(folder) and path.parent not in places], files
                assert sum(path.stat().st_size for path in files if path.is_relative_to(folder)) < 1_000_000, files
        except Exception as error:
            wrong.append(f"{question}, {name}: {type(error).__name__}: {error}"[:300])
    assert not wrong, "\n".join(wrong)
