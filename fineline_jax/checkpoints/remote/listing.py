"""What lies at an address: the files of one checkpoint, or the names of all of them.

    hf://org/name@revision/folder      the Hugging Face hub, through its HTTP endpoints
    http(s)://host/folder              a server of files
    s3://, gs://, … bucket/folder      whatever fsspec opens

In an address with `{name}` that part is the name of a checkpoint: a revision, a repository, a folder or a prefix.
"""

import contextlib
import dataclasses
import json
import operator
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote, unquote, urljoin

import requests

from fineline_jax.checkpoints.formats.weight_files import FIXED_NAMES
from fineline_jax.checkpoints.remote.download import (
    LARGEST_ANSWER,
    FetchError,
    NotThereError,
    RemoteFile,
    TransientError,
    bucket,
    bucket_errors,
    endpoint,
    get,
    hub_headers,
    offline,
)
from fineline_jax.checkpoints.series import Options
from fineline_jax.errors import UserError
from fineline_jax.tokenizers.files import TOKENIZER_FILES

NAME_SLOT = "{name}"
MOST_PAGES = 1000
"""Of one listing."""
MOST_FILES = 10_000
"""Links of an index page that are asked for one by one."""
LISTING_ATTEMPTS = 3
"""Fewer than for a file: somebody waits for the answer."""
WELL_KNOWN = ("config.json", *FIXED_NAMES, *TOKENIZER_FILES)
"""Asked for by name where a server lists nothing."""


@dataclasses.dataclass(frozen=True)
class HubAddress:
    """hf://repository@revision/folder"""

    repository: str
    revision: str
    folder: str


def parse_hub(url: str) -> HubAddress:
    """Raises UserError if `url` is no address of the hub. A slash in a revision is written %2F."""
    match = re.fullmatch(r"hf://([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.*?))?/?", url)
    if not match:
        raise UserError(f"{url}: expected hf://organisation/name@revision or hf://organisation/name@revision/folder")
    return HubAddress(match[1], unquote(match[2] or "main"), match[3] or "")


def list_files(url: str, options: Options = ()) -> list[RemoteFile]:
    """The files directly in the folder `url`, by name.

    Raises FetchError if it is not there or cannot be asked.
    """
    if url.startswith("hf://"):
        return _hub_files(parse_hub(url))
    if url.startswith(("http://", "https://")):
        return _http_files(url.rstrip("/") + "/")
    return _bucket_files(url.rstrip("/"), options)


def list_names(template: str, options: Options = ()) -> list[str]:
    """What stands for `{name}` in the addresses that exist, in no particular order.

    Raises FetchError if the address cannot be listed.
    """
    before, slot, after = template.partition(NAME_SLOT)
    if not slot:
        raise UserError(f"{template}: nothing to list; {NAME_SLOT} must stand for the name of a checkpoint")
    if template.startswith("hf://"):
        names, prefix, suffix = _hub_names(template)
    else:
        parent, _, prefix = before.rpartition("/")
        suffix = after.partition("/")[0]
        if template.startswith(("http://", "https://")):
            names = [name[:-1] for name in _links(parent + "/") if name.endswith("/")]
        else:
            folders = [entry for entry in _bucket_entries(parent, options) if entry["type"] == "directory"]
            names = [str(entry["name"]).rstrip("/").rpartition("/")[2] for entry in folders]
    inside = [name for name in dict.fromkeys(names) if name.startswith(prefix) and name.endswith(suffix)]
    return [name[len(prefix) : len(name) - len(suffix)] for name in inside if len(name) > len(prefix) + len(suffix)]


# The hub


def _hub_files(address: HubAddress) -> list[RemoteFile]:
    where = f"api/models/{address.repository}/revision/{quote(address.revision, safe='')}?blobs=true"
    info = _hub_json(where)
    prefix = f"{address.folder}/" if address.folder else ""
    files = []
    with _hub_answer(where):
        # The commit and not the branch: a push between two files would mix two sets of weights.
        commit = str(info["sha"])
        for entry in info["siblings"]:
            path = str(entry["rfilename"])
            name = path.removeprefix(prefix)
            if not path.startswith(prefix) or "/" in name:
                continue
            lfs = entry.get("lfs") or {}
            size = lfs.get("size", entry.get("size"))
            blob = entry.get("blobId") or ""
            if not re.fullmatch("[0-9a-f]*", (lfs.get("sha256") or "") + blob):  # they are looked up by name
                raise ValueError(f"a hash of {name}")
            files.append(
                RemoteFile(
                    name,
                    f"{endpoint()}/{address.repository}/resolve/{commit}/{quote(path)}",
                    None if size is None else operator.index(size),
                    lfs.get("sha256") or blob or commit,
                    sha256=lfs.get("sha256"),
                    git_sha1=None if lfs else (blob or None),
                )
            )
    return sorted(files, key=lambda file: file.name)


def _hub_names(template: str) -> tuple[list[str], str, str]:
    """Names of revisions, repositories or folders, and what each begins and ends with besides a checkpoint's name."""
    before, _, after = template.partition(NAME_SLOT)
    repository, at, revision = before.removeprefix("hf://").partition("@")
    if at and "/" not in revision:  # a revision
        end = after.partition("/")[0]
        where = f"api/models/{repository}/refs"
        refs = _hub_json(where, LISTING_ATTEMPTS)
        with _hub_answer(where):
            names = [str(ref["name"]) for kind in ("branches", "tags") for ref in refs.get(kind) or []]
        prefix, suffix = unquote(revision), unquote(end)
    elif repository.count("/") == 1 and not at:  # a repository
        organisation, _, prefix = repository.partition("/")
        suffix = re.split("[@/]", after)[0]
        search = f"&search={quote(prefix or suffix)}" if prefix or suffix else ""
        where = f"api/models?author={quote(organisation)}{search}&limit=1000"
        with _hub_answer(where):
            ids = [str(model.get("id", "")) for model in _hub_pages(where)]
        names = [name.partition("/")[2] for name in ids if name.startswith(f"{organisation}/")]
    else:  # a folder in a repository
        parent, _, prefix = before.rpartition("/")
        address = parse_hub(parent)
        suffix = after.partition("/")[0]
        where = f"api/models/{address.repository}/tree/{quote(address.revision, safe='')}/{quote(address.folder)}"
        with _hub_answer(where):
            listed = _hub_pages(where.rstrip("/"))
            names = [str(e["path"]).rpartition("/")[2] for e in listed if e.get("type") == "directory"]
    return names, prefix, suffix


@contextlib.contextmanager
def _hub_answer(where: str) -> Iterator[None]:
    """What is raised where an answer has another form than the hub's, as FetchError."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise FetchError(f"{endpoint()}/{where}: not an answer of the hub ({error!r})") from error


def _hub_json(where: str, attempts: int | None = None) -> Any:
    return _json(_hub_get(f"{endpoint()}/{where}", attempts))


def _hub_pages(where: str) -> list[Mapping[str, Any]]:
    url, entries, seen, size = f"{endpoint()}/{where}", [], set(), 0
    while url:
        if url in seen or len(seen) == MOST_PAGES or size > LARGEST_ANSWER:
            raise FetchError(f"{endpoint()}/{where}: a listing without end ({len(seen)} pages); check the address")
        seen.add(url)
        answer = _hub_get(url, LISTING_ATTEMPTS)
        size += len(answer.content)
        entries += _json(answer)
        url = answer.links.get("next", {}).get("url", "")
    return entries


def _json(answer: requests.Response) -> Any:
    try:
        return json.loads(answer.content)
    except (ValueError, RecursionError) as error:
        raise FetchError(f"{answer.url}: not valid JSON ({error}); check the address") from error


def _hub_get(url: str, attempts: int | None) -> requests.Response:
    if offline():
        raise FetchError(f"{url}: not asked, since HF_HUB_OFFLINE is set; unset it, or use what is downloaded")
    return get(url, hub_headers(url), attempts=attempts)


# A server of files


def _http_files(url: str) -> list[RemoteFile]:
    names = [name for name in _links(url) if not name.endswith("/")]
    if len(names) > MOST_FILES:
        raise FetchError(f"{url}: lists {len(names)} files; give the folder of a checkpoint")
    if "config.json" not in names:
        names = list(WELL_KNOWN)
    files = {file.name: file for name in names if (file := _http_head(url, name)) is not None}
    for index in (name for name in FIXED_NAMES if name.endswith(".json")):
        if index in files and names == list(WELL_KNOWN):
            content = _json(get(files[index].url))
            weight_map = content.get("weight_map") if isinstance(content, dict) else None
            if not isinstance(weight_map, dict):
                raise FetchError(f"{files[index].url}: not an index of weight files; check the address")
            parts = sorted({str(part) for part in weight_map.values()})
            if len(parts) > MOST_FILES:
                raise FetchError(f"{files[index].url}: names {len(parts)} files; give the folder of a checkpoint")
            for name in parts:
                if "/" not in name and name.isprintable() and (file := _http_head(url, name)) is not None:
                    files[name] = file
    if not files:
        raise FetchError(f"{url}: no files there; give the folder of a checkpoint")
    return [files[name] for name in sorted(files)]


def _http_head(url: str, name: str) -> RemoteFile | None:
    address = urljoin(url, quote(name))
    try:
        headers = get(address, {"Accept-Encoding": "identity"}, "HEAD").headers
    except NotThereError:
        return None
    size = headers.get("Content-Length", "")
    version = headers.get("ETag") or headers.get("Last-Modified") or size
    return RemoteFile(name, address, int(size) if size.isdecimal() and len(size) < 20 else None, version)


def _links(url: str) -> list[str]:
    """Names in an index page, those of folders with a slash; none if the server shows none."""
    try:
        answer = get(url)
    except NotThereError:
        return []
    if "html" not in answer.headers.get("Content-Type", ""):
        return []
    text = answer.content.decode("utf-8", "replace")
    links = (unquote(link.removeprefix("./")) for link in re.findall(r'href="([^"?#]+)"', text))
    return [link for link in links if re.fullmatch(r"[^/:]+/?", link) and link not in ("./", "../")]


# Buckets


def _bucket_files(url: str, options: Options) -> list[RemoteFile]:
    files = []
    for entry in _bucket_entries(url, options):
        if entry["type"] != "file":
            continue
        name = str(entry["name"]).rstrip("/").rpartition("/")[2]
        keys = ("ETag", "etag", "md5Hash", "LastModified", "last_modified", "updated", "mtime", "created")
        version = next((str(entry[key]) for key in keys if entry.get(key)), "")
        files.append(RemoteFile(name, f"{url}/{name}", entry.get("size"), version, options=options))
    if not files:
        raise FetchError(f"{url}: no files there; give the folder of a checkpoint")
    return sorted(files, key=lambda file: file.name)


def _bucket_entries(url: str, options: Options) -> list[Mapping[str, Any]]:
    system = bucket(url, options)
    try:
        with bucket_errors(url):
            system.invalidate_cache()
            return system.ls(url, detail=True)
    except TransientError as error:
        raise FetchError(f"{url}: {error}; try again later") from error
