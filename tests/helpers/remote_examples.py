"""A hub and a server of files on loopback, which fail when told to."""

import contextlib
import dataclasses
import hashlib
import http.client
import http.server
import json
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

Files = dict[str, bytes]


@dataclasses.dataclass
class Fault:
    """Requests whose path fits `path` go wrong, `times` times."""

    path: str
    kind: str
    """status 503, cut (the connection ends half-way), short (a shorter file), flipped (one wrong bit)"""
    times: int = 1 << 30


@dataclasses.dataclass
class Hub:
    """What a hub holds, and what was asked of it."""

    url: str = ""
    repositories: dict[str, dict[str, Files]] = dataclasses.field(default_factory=dict)
    """{org/name: {revision: {path: content}}}"""
    faults: list[Fault] = dataclasses.field(default_factory=list)
    asked: list[tuple[str, str, dict[str, str]]] = dataclasses.field(default_factory=list)
    """(method, path with query, headers)"""
    before: Callable[[str], None] = lambda path: None
    page: int = 1000

    def downloads(self) -> list[tuple[str, str]]:
        """(path, range) of the files that were asked for."""
        return [(path, headers.get("Range", "")) for _, path, headers in self.asked if path.startswith("/cdn/")]

    def fault(self, path: str) -> str:
        for fault in self.faults:
            if fault.times and re.search(fault.path, path):
                fault.times -= 1
                return fault.kind
        return ""


def commit_of(files: Files) -> str:
    digests = sorted((path, hashlib.sha1(content).hexdigest()) for path, content in files.items())
    return hashlib.sha1(repr(digests).encode()).hexdigest()


@contextlib.contextmanager
def serving(handler: type[http.server.BaseHTTPRequestHandler]) -> Iterator[str]:
    """Address of a server that runs meanwhile."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.hub.asked.append((self.command, self.path, dict(self.headers)))
        address = urlsplit(self.path)
        path, query = unquote(address.path), parse_qs(address.query)
        self.hub.before(path)
        kind = self.hub.fault(path)
        if kind.startswith("status"):
            return self._send(int(kind.split()[1]), b"busy", {"Retry-After": "0"})
        if path == "/api/models":
            return self._repositories(query)
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|refs|tree)(?:/(.*))?", path)
        if found:
            return self._api(found[1], found[2], address.path.split(f"/{found[2]}", 1)[1].lstrip("/"))
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            where = f"/cdn/{found[1]}/{found[2]}/{found[3]}"
            # As the hub does for large files: from another host, which must not see the token.
            headers = {"Location": self.hub.url.replace("127.0.0.1", "localhost") + where, "X-Repo-Commit": found[2]}
            for files in self.hub.repositories.get(found[1], {}).values():
                if commit_of(files) == found[2] and found[3] in files:
                    entry = _sibling(found[3], files[found[3]])
                    headers["X-Linked-ETag"] = f'"{entry.get("lfs", {}).get("sha256") or entry["blobId"]}"'
                    headers["X-Linked-Size"] = str(entry["size"])
            return self._send(302, b"", headers)
        if found := re.fullmatch(r"/cdn/([^/]+/[^/]+)/([^/]+)/(.+)", path):
            for files in self.hub.repositories.get(found[1], {}).values():
                if commit_of(files) == found[2] and found[3] in files:
                    return self._content(files[found[3]], kind)
        self._send(404, b"", {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET

    def _api(self, repository: str, what: str, rest: str) -> None:
        revisions = self.hub.repositories.get(repository)
        if revisions is None:
            return self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
        if what == "refs":
            refs = [(kind, name) for name in revisions for kind in ("tags" if name.startswith("tag") else "heads",)]
            listed = [(kind, {"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": "0"}) for kind, name in refs]
            branches, tags = ([ref for of, ref in listed if of == kind] for kind in ("heads", "tags"))
            return self._json({"branches": branches, "tags": tags, "converts": []})
        revision, _, folder = rest.partition("/")
        files = revisions.get(unquote(revision))
        if files is None:
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        if what == "tree":
            prefix = f"{unquote(folder)}/" if folder else ""
            inside = {name.removeprefix(prefix).partition("/")[0] for name in files if name.startswith(prefix)}
            kind = {name: "file" if prefix + name in files else "directory" for name in inside}
            return self._json([{"type": kind[name], "path": prefix + name} for name in sorted(inside)])
        self._json({"id": repository, "sha": commit_of(files), "siblings": [_sibling(*item) for item in files.items()]})

    def _repositories(self, query: dict[str, list[str]]) -> None:
        wanted = [
            {"id": name}
            for name in self.hub.repositories
            if name.startswith(query["author"][0] + "/") and query.get("search", [""])[0].lower() in name.lower()
        ]
        start = int(query.get("start", ["0"])[0])
        headers = {}
        if start + self.hub.page < len(wanted):
            again = "&".join(f"{key}={value[0]}" for key, value in query.items() if key != "start")
            headers["Link"] = f'<{self.hub.url}/api/models?{again}&start={start + self.hub.page}>; rel="next"'
        self._json(wanted[start : start + self.hub.page], headers)

    def _content(self, content: bytes, kind: str) -> None:
        if kind == "short":
            content = content[: len(content) // 2]
        if kind == "flipped":
            content = content[:-1] + bytes([content[-1] ^ 1])
        headers, status, body = {"ETag": '"x"'}, 200, content
        if found := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(found[1])
            if start >= len(content):
                return self._send(416, b"")
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            status, body = 206, content[start:]
        if kind == "cut":
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.close_connection = True
            return
        self._send(status, body, headers)

    def _json(self, value: Any, headers: dict[str, str] | None = None) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class _Proxy(http.server.BaseHTTPRequestHandler):
    """Hands requests on to another server, but for the faults."""

    hub: Hub
    target: str
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        kind = self.hub.fault(f"{self.command} {unquote(self.path)}")
        connection = http.client.HTTPConnection(self.target, timeout=30)
        connection.request(self.command, self.path, body, dict(self.headers))
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        self.send_response(int(kind.split()[1]) if kind.startswith("status") else answer.status)
        for key, value in answer.getheaders():
            if key.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(key, value)
        is_head = self.command == "HEAD"
        self.send_header("Content-Length", answer.getheader("Content-Length", "0") if is_head else str(len(content)))
        self.end_headers()
        self.wfile.write(b"" if is_head else content[: len(content) // 2] if kind == "cut" else content)
        self.close_connection = self.close_connection or kind == "cut"

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET


@contextlib.contextmanager
def faulty(target: str) -> Iterator[Hub]:
    """A server before `target` (host:port) with faults on "METHOD /path"."""
    made = Hub()
    with serving(type("Proxy", (_Proxy,), {"hub": made, "target": target})) as url:
        made.url = url
        yield made


class _GoogleStorage(http.server.BaseHTTPRequestHandler):
    """What reading and writing need of the JSON API: what is there, a file's bytes, small uploads, removals."""

    files: Files
    """{bucket/path: content}"""
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(address.query).items()}
        found = re.fullmatch(r"(?:/download)?/storage/v1/b/([^/]+)/o(?:/(.+))?", address.path)
        if not found:
            return self._send(404, b"{}")
        bucket, name = found[1], unquote(found[2] or "")
        if not name:
            return self._send(200, json.dumps(self._listing(bucket, query)).encode())
        if f"{bucket}/{name}" not in self.files:
            return self._send(404, b"{}")
        content = self.files[f"{bucket}/{name}"]
        if query.get("alt") != "media" and not address.path.startswith("/download"):
            return self._send(200, json.dumps(self._item(bucket, name)).encode())
        if span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            return self._send(206, content[int(span[1]) : int(span[2] or len(content)) + 1])
        self._send(200, content)

    def do_POST(self) -> None:
        """A multipart upload: the object's name in JSON, then its bytes."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        boundary = self.headers["Content-Type"].partition("boundary=")[2].strip('"').encode()
        _, described, sent, _ = body.split(b"--" + boundary, 3)
        name = json.loads(described.partition(b"\n\n")[2])["name"]
        found = re.fullmatch(r"/upload/storage/v1/b/([^/]+)/o", urlsplit(self.path).path)
        assert found
        head, _, content = sent.partition(b"\n\n")
        assert b"Content-Type" in head
        self.files[f"{found[1]}/{name}"] = content.removesuffix(b"\n")
        self._send(200, json.dumps(self._item(found[1], name)).encode())

    def do_DELETE(self) -> None:
        found = re.fullmatch(r"/storage/v1/b/([^/]+)/o/(.+)", urlsplit(self.path).path)
        gone = self.files.pop(f"{found[1]}/{unquote(found[2])}", None) if found else None
        self._send(404 if gone is None else 204, b"")

    def _listing(self, bucket: str, query: dict[str, str]) -> dict[str, Any]:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        names = [path.partition("/")[2] for path in self.files if path.startswith(f"{bucket}/{prefix}")]
        deeper = {prefix + name[len(prefix) :].partition("/")[0] + "/" for name in names if "/" in name[len(prefix) :]}
        items = [self._item(bucket, name) for name in names if not delimiter or "/" not in name[len(prefix) :]]
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(deeper) if delimiter else []}

    def _item(self, bucket: str, name: str) -> dict[str, Any]:
        content = self.files[f"{bucket}/{name}"]
        etag = hashlib.md5(content).hexdigest()
        times = {"timeCreated": "2024-01-01T00:00:00Z", "updated": "2024-01-01T00:00:00Z"}
        return {
            "kind": "storage#object",
            "bucket": bucket,
            "name": name,
            "size": str(len(content)),
            "etag": etag,
        } | times

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(body)


@contextlib.contextmanager
def google_storage(files: Files) -> Iterator[str]:
    """Address of a server with these files, {bucket/path: content}."""
    with serving(type("Handler", (_GoogleStorage,), {"files": files})) as url:
        yield url


def _sibling(path: str, content: bytes) -> dict[str, Any]:
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    entry: dict[str, Any] = {"rfilename": path, "size": len(content), "blobId": blob}
    if path.endswith((".safetensors", ".bin", ".model")):
        entry["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return entry


@contextlib.contextmanager
def hub() -> Iterator[Hub]:
    """A hub that answers meanwhile."""
    made = Hub()
    handler = type("Handler", (_Handler,), {"hub": made})
    with serving(handler) as url:
        made.url = url
        yield made


def files_of(folder: Path) -> Files:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
