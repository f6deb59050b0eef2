"""Servers that send without end: each attack ends in one line, with no more on the disk than was listed."""

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

from fineline_jax.checkpoints.remote import download, listing
from fineline_jax.checkpoints.remote.download import FetchError, RemoteFile
from fineline_jax.checkpoints.remote.listing import list_files, list_names

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
