"""What lies at an address, as the servers say it; and what a download becomes on the disk. No JAX."""

import concurrent.futures
import hashlib
import http.server
import json
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from remote_examples import Fault, Hub, commit_of, files_of, hub, serving

from fineline_jax.checkpoints.open import open_series
from fineline_jax.checkpoints.remote import cache, download
from fineline_jax.checkpoints.remote import listing as remote_listing
from fineline_jax.checkpoints.remote.download import FetchError
from fineline_jax.checkpoints.remote.listing import HubAddress, list_files, list_names, parse_hub
from fineline_jax.checkpoints.series import Remote
from fineline_jax.errors import UserError


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    monkeypatch.setattr(download, "BACKOFF", 0.001)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN", "secret")
    cache._listed.cache_clear()


@pytest.fixture
def served(monkeypatch):
    with hub() as made:
        monkeypatch.setenv("HF_ENDPOINT", made.url)
        yield made


# The hub


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("hf://o/n", HubAddress("o/n", "main", "")),
        ("hf://o/n/", HubAddress("o/n", "main", "")),
        ("hf://o/n@r", HubAddress("o/n", "r", "")),
        ("hf://o/n@r/", HubAddress("o/n", "r", "")),
        ("hf://o/n@refs%2Fpr%2F1/a/b/", HubAddress("o/n", "refs/pr/1", "a/b")),
        ("hf://o/n/a/b", HubAddress("o/n", "main", "a/b")),
        ("hf://o", None), ("hf://o/", None), ("hf:///n", None), ("hf://o/n@", None), ("hf://o@r/n", None),
    ],
)  # fmt: skip
def test_an_address_of_the_hub_is_repository_revision_and_folder(url: str, expected: HubAddress | None) -> None:
    if expected is None:
        with pytest.raises(UserError, match="expected hf://"):
            parse_hub(url)
    else:
        assert parse_hub(url) == expected


def test_the_files_of_a_revision_are_those_of_its_commit_with_size_and_hash(served: Hub) -> None:
    files = {"b.json": b"{}", "a b.safetensors": b"weights", "folder/c.bin": b"deep", "folder/x/d": b"deeper"}
    served.repositories["o/n"] = {"main": {}, "refs/pr/1": files}
    commit = commit_of(files)
    top = list_files("hf://o/n@refs%2Fpr%2F1")
    assert [(one.name, one.size, one.url) for one in top] == [
        ("a b.safetensors", 7, f"{served.url}/o/n/resolve/{commit}/a%20b.safetensors"),
        ("b.json", 2, f"{served.url}/o/n/resolve/{commit}/b.json"),
    ]
    sha256, blob = hashlib.sha256(b"weights").hexdigest(), hashlib.sha1(b"blob 2\0{}").hexdigest()
    assert [(one.sha256, one.git_sha1, one.version) for one in top] == [(sha256, None, sha256), (None, blob, blob)]
    [inside] = list_files("hf://o/n@refs%2Fpr%2F1/folder")
    assert (inside.name, inside.url) == ("c.bin", f"{served.url}/o/n/resolve/{commit}/folder/c.bin")
    assert served.asked[0][1] == "/api/models/o/n/revision/refs%2Fpr%2F1?blobs=true"


def test_an_answer_that_is_none_of_the_hub_is_said(served: Hub, monkeypatch) -> None:
    file = {"rfilename": "f", "size": "many"}
    for answer in ({}, [], {"sha": "1"}, {"sha": "1", "siblings": [1]}, {"sha": "1", "siblings": [{}, file]},
                   {"sha": "1", "siblings": [file]}):  # fmt: skip
        monkeypatch.setattr(remote_listing, "_hub_json", lambda where, *attempts, answer=answer: answer)
        with pytest.raises(FetchError, match="not an answer of the hub"):
            list_files("hf://o/n")
    for refs in ([], {"branches": [1]}, {"tags": [{"ref": "x"}]}, {"branches": 5}):
        monkeypatch.setattr(remote_listing, "_hub_json", lambda where, *attempts, refs=refs: refs)
        with pytest.raises(FetchError, match=r"/refs: not an answer of the hub"):
            list_names("hf://o/n@{name}")
    for page in (["run-1"], [{"type": "directory"}], 5):
        monkeypatch.setattr(remote_listing, "_json", lambda answer, page=page: page)
        monkeypatch.setattr(remote_listing, "_hub_get", lambda *asked: SimpleNamespace(links={}))
        with pytest.raises(FetchError, match=r"/tree/main/a: not an answer of the hub"):
            list_names("hf://o/n/a/{name}")
    for page in (["run-1"], 5):
        monkeypatch.setattr(remote_listing, "_json", lambda answer, page=page: page)
        with pytest.raises(FetchError, match=r"author=o.*: not an answer of the hub"):
            list_names("hf://o/{name}")


def test_of_repositories_on_several_pages_all_are_listed_and_no_other(served: Hub) -> None:
    """One named like the beginning alone is no checkpoint, nor one of another organisation, nor one that ends so."""
    names = ["run-1", "run-2-x", "run-", "run-3", "other-run-4", "Run-5", "run-6"]
    served.repositories = {f"o/{name}": {} for name in names} | {"oo/run-7": {}}
    for served.page in (1, 2, 3, 6, 7):
        served.asked.clear()
        assert list_names("hf://o/run-{name}") == ["1", "2-x", "3", "6"]
        assert len(served.asked) == -(-7 // served.page), "other-run-4 and Run-5 hold the words that are searched for"
    assert list_names("hf://o/{name}-x") == ["run-2"]
    assert list_names("hf://o/run-{name}-x@main") == ["2"]
    assert list_names("hf://o/{name}@main")[:2] == ["run-1", "run-2-x"]


def test_a_further_page_on_another_host_is_asked_for_without_the_token(served: Hub, monkeypatch) -> None:
    served.repositories = {f"o/run-{i}": {} for i in range(3)}
    served.page = 2
    elsewhere = served.url.replace("127.0.0.1", "localhost")
    monkeypatch.setenv("HF_ENDPOINT", served.url)
    served.url = elsewhere  # in the link to the next page
    assert list_names("hf://o/run-{name}") == ["0", "1", "2"]
    assert [headers.get("Authorization") for _, _, headers in served.asked] == ["Bearer secret", None]


def test_revisions_and_folders_with_something_before_and_behind_the_name(served: Hub) -> None:
    files = {
        "a/ck-1-x/f": b"",
        "a/ck-2-x/f": b"",
        "a/ck--x/f": b"",
        "a/ck-3/f": b"",
        "a/ck-9-x": b"",
        "b/ck-8-x/f": b"",
    }
    served.repositories["o/n"] = {"main": files, "s1-step10": {}, "s1-step9": {}, "s1-step": {}, "s2-step3": {}}
    served.repositories["o/n"] |= {"tag-5": {}, "tag-6": {}}
    assert list_names("hf://o/n@s1-step{name}") == ["10", "9"]
    assert list_names("hf://o/n@tag-{name}") == ["5", "6"]
    assert sorted(list_names("hf://o/n@{name}")) == sorted(served.repositories["o/n"])
    assert list_names("hf://o/n@{name}/folder") == list_names("hf://o/n@{name}")
    assert list_names("hf://o/n@main/a/ck-{name}-x") == ["1", "2"]
    assert list_names("hf://o/n/a/ck-{name}-x/deeper") == ["1", "2"]
    with pytest.raises(UserError, match="nothing to list"):
        list_names("hf://o/n@main")


def test_listings_are_tried_three_times(served: Hub) -> None:
    served.repositories = {"o/n": {"main": {}}}
    for times, found in ((2, ["main"]), (3, None)):
        served.faults = [Fault("refs", "status 503", times)]
        served.asked.clear()
        if found:
            assert list_names("hf://o/n@{name}") == found
        else:
            with pytest.raises(FetchError, match="3 times in a row"):
                list_names("hf://o/n@{name}")
        assert len(served.asked) == 3


# Servers of files


PAGE = b"""<html><a href="../">up</a> <a href="?C=M;O=A">sort</a> <a href="/root/">root</a> <a href="./step%201/">1</a>
<a href="step2/">2</a> <a href="step2/">again</a> <a href="a/b/">deep</a> <a href="http://x/y">x</a>
<a href="file">f</a> <a href="#top">top</a> <a href="./">here</a></html>"""


class _Files(http.server.BaseHTTPRequestHandler):
    """Answers with what `there` holds: {path: (headers, body)}."""

    there: dict[str, tuple[dict[str, str], bytes]]

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        headers, body = self.there.get(self.path, ({}, b""))
        if self.command == "HEAD" and self.headers["Accept-Encoding"] != "identity":
            headers = {"Content-Length": "1", **headers}  # of a compressed answer
        self.send_response(200 if self.path in self.there else 404)
        for key, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET


def test_folders_of_an_index_page_are_those_directly_below(tmp_path) -> None:
    there = {
        "/run/": ({"Content-Type": "text/html; charset=utf-8"}, PAGE),
        "/text/": ({"Content-Type": "text/plain"}, PAGE),
    }
    with serving(type("Handler", (_Files,), {"there": there})) as url:
        assert list_names(f"{url}/run/{{name}}") == ["step 1", "step2"]
        assert list_names(f"{url}/run/step{{name}}") == [" 1", "2"]
        assert list_names(f"{url}/run/st{{name}}2/x") == ["ep"]
        assert list_names(f"{url}/text/{{name}}") == [] == list_names(f"{url}/none/{{name}}")


def test_of_a_server_that_lists_nothing_the_well_known_files_and_those_of_an_index_are_found() -> None:
    index = json.dumps(
        {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "sub/x", "d": "gone"}}
    )
    there = {
        "/c/config.json": ({"ETag": '"e"', "Last-Modified": "then"}, b"{}"),
        "/c/model.safetensors.index.json": ({"Last-Modified": "then"}, index.encode()),
        "/c/model-1.safetensors": ({}, b"12345"),
        "/c/model-2.safetensors": ({"Content-Length": "\u00b2"}, b""),
        "/c/sub/x": ({}, b"x"),
        "/c/README.md": ({}, b"x"),
    }
    with serving(type("Handler", (_Files,), {"there": there})) as url:
        found = list_files(f"{url}/c")
    assert [(one.name, one.size, one.version, one.url) for one in found] == [
        ("config.json", 2, '"e"', f"{url}/c/config.json"),
        ("model-1.safetensors", 5, "5", f"{url}/c/model-1.safetensors"),
        ("model-2.safetensors", None, "\u00b2", f"{url}/c/model-2.safetensors"),
        ("model.safetensors.index.json", len(index), "then", f"{url}/c/model.safetensors.index.json"),
    ]


def test_an_index_that_is_none_is_named() -> None:
    there = {"/c/config.json": ({}, b"{}"), "/c/model.safetensors.index.json": ({}, b'["a"]')}
    with serving(type("Handler", (_Files,), {"there": there})) as url:
        for content in (b'["a"]', b"{}", b'{"weight_map": ["a"]}'):
            there["/c/model.safetensors.index.json"] = ({}, content)
            with pytest.raises(FetchError, match=r"model.safetensors.index.json: not an index of weight files"):
                list_files(f"{url}/c")


def test_of_a_bucket_files_and_folders_are_told_apart_and_a_change_is_seen(monkeypatch) -> None:
    class System:
        def invalidate_cache(self) -> None:
            self.fresh = True

        def ls(self, url: str, detail: bool) -> list[dict[str, Any]]:
            assert self.fresh and url in ("s3://b/run", "s3://b") and detail
            return [
                {"name": "b/run/z", "type": "file", "size": 3, "ETag": "e", "LastModified": "l"},
                {"name": "b/run/ck-1/", "type": "directory", "size": 0},
                {"name": "b/run/ck-2", "type": "directory", "size": 0},
                {"name": "b/run/ck-", "type": "directory", "size": 0},
                {"name": "b/run/a", "type": "file", "size": 4, "LastModified": "l", "mtime": "m"},
                {"name": "b/run/c", "type": "file", "size": 0, "mtime": 5.0, "created": 7},
            ]

    asked: list[Any] = []
    monkeypatch.setattr(remote_listing, "bucket", lambda url, options: (asked.append(options), System())[1])
    options = (("requester_pays", True),)
    found = list_files("s3://b/run/", options)
    assert [(one.name, one.url, one.size, one.version, one.options) for one in found] == [
        ("a", "s3://b/run/a", 4, "l", options), ("c", "s3://b/run/c", 0, "5.0", options),
        ("z", "s3://b/run/z", 3, "e", options),
    ]  # fmt: skip
    assert list_names("s3://b/run/{name}", options) == ["ck-1", "ck-2", "ck-"]
    assert list_names("s3://b/run/ck-{name}", options) == ["1", "2"]
    assert set(asked) == {options}


# On the disk


MODEL = {"config.json": b"{}", "model.safetensors": bytes(5000), "tokenizer.json": b"{ }"}


def of(folder: Path, url: str = "hf://o/n@r", **options: Any) -> Remote:
    return Remote(url, folder, **options)


def test_every_address_has_a_folder_of_its_own_with_a_readable_name(tmp_path: Path) -> None:
    folder = of(tmp_path, "hf://LLM360/Amber@ckpt_000").folder
    assert folder.parent == tmp_path
    assert folder.name == "hf--LLM360--Amber@ckpt_000-" + hashlib.sha256(b"hf://LLM360/Amber@ckpt_000").hexdigest()[:8]
    alike = [of(tmp_path, url).folder.name for url in ("s3://b/a b", "s3://b/a/b", "s3://b/a//b", "s3://" + "x" * 500)]
    alike += [of(tmp_path, f"s3://{bucket}/{'x' * 200}").folder.name for bucket in "bc"]
    assert len({name.lower() for name in alike}) == 6 and all(len(name) <= 130 for name in alike)


def test_the_cache_lies_where_the_system_wants_caches(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.default_downloads() == tmp_path / "fineline_jax"
    for value in ("", None):
        monkeypatch.setenv("XDG_CACHE_HOME", "") if value == "" else monkeypatch.delenv("XDG_CACHE_HOME")
        assert cache.default_downloads() == Path.home() / ".cache" / "fineline_jax"


def test_four_files_are_fetched_at_a_time(served: Hub, tmp_path: Path) -> None:
    names = [f"model-{i:05d}-of-00009.safetensors" for i in range(1, 10)]
    index = json.dumps({"weight_map": dict(zip("abcdefghi", names))}).encode()
    served.repositories["o/n"] = {
        "r": MODEL | {"model.safetensors.index.json": index} | dict.fromkeys(names, bytes(10))
    }
    del served.repositories["o/n"]["r"]["model.safetensors"]
    at_once, most, gate = 0, 0, threading.Condition()

    def before(path: str) -> None:
        """Holds each file back until four are asked for, or no fourth has come for a while."""
        nonlocal at_once, most
        if not path.startswith("/cdn/"):
            return
        with gate:
            at_once += 1
            most = max(most, at_once)
            gate.notify_all()
            gate.wait_for(lambda: at_once >= 4, timeout=0.2)
        with gate:
            gate.wait(0.02)  # a fifth would come now
            at_once -= 1

    served.before = before
    cache.fetch(of(tmp_path))
    assert most == 4


def test_a_file_that_lost_bytes_on_the_disk_is_fetched_again_and_no_other(served: Hub, tmp_path: Path) -> None:
    served.repositories["o/n"] = {"r": MODEL}
    folder = cache.fetch(of(tmp_path))
    (folder / "model.safetensors").write_bytes(b"cut")
    (folder / "tokenizer.json").unlink()
    served.asked.clear()
    cache.fetch(of(tmp_path))
    assert sorted(path.rpartition("/")[2] for path, _ in served.downloads()) == ["model.safetensors", "tokenizer.json"]
    assert {name: content for name, content in files_of(folder).items() if name != "fetched.json"} == MODEL


def test_each_file_is_noted_when_it_is_there_and_offline_only_the_whole_is_used(
    served: Hub, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    served.repositories["o/n"] = {"r": MODEL}
    served.faults = [Fault("cdn.*safetensors", "status 503", times=1)]
    with pytest.raises(FetchError):
        cache.fetch(of(tmp_path))
    record = json.loads((of(tmp_path).folder / "fetched.json").read_bytes())
    assert not record["complete"] and "model.safetensors" not in record["have"]
    assert set(record["have"]) <= {"config.json", "tokenizer.json"} and len(record["files"]) == 3
    with monkeypatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        for ask in (cache.fetch, cache.weights_hash):
            with pytest.raises(FetchError, match="not downloaded, and HF_HUB_OFFLINE is set"):
                ask(of(tmp_path))
    served.asked.clear()
    cache.fetch(of(tmp_path))
    assert not {path.rpartition("/")[2] for path, _ in served.downloads()} & set(record["have"])
    assert json.loads((of(tmp_path).folder / "fetched.json").read_bytes())["complete"]


def test_the_identity_is_that_of_names_sizes_and_hashes_of_the_weights(served: Hub, tmp_path: Path) -> None:
    """Scores know their checkpoint by it: it must be the same in every version of this program."""
    weights = MODEL["model.safetensors"]
    served.repositories["o/n"] = {
        "r": MODEL,
        "s": MODEL | {"config.json": b"[]", "tokenizer.json": b"[]", "merges.txt": b""},
    }
    named = ["remote", ["model.safetensors", 5000, hashlib.sha256(weights).hexdigest()]]
    expected = hashlib.sha256(json.dumps(named).encode()).hexdigest()
    assert cache.weights_hash(of(tmp_path)) == expected == cache.weights_hash(of(tmp_path, "hf://o/n@s"))
    assert os.listdir(tmp_path) == [], "nothing is fetched for it"


def test_a_bucket_is_listed_once_for_each_of_its_options(monkeypatch, tmp_path: Path) -> None:
    asked: list[Any] = []

    def listing(url: str, options: Any) -> list[download.RemoteFile]:
        asked.append((url, options))
        return [download.RemoteFile(name, f"{url}/{name}", 1, str(options)) for name in MODEL]

    monkeypatch.setattr(cache, "list_files", listing)
    mine, theirs = (("profile", "mine"),), (("profile", "theirs"),)
    found = {cache.weights_hash(of(tmp_path, "s3://b/run", options=options)) for options in (mine, theirs, mine)}
    assert len(found) == 2 and asked == [("s3://b/run", mine), ("s3://b/run", theirs)]


LISTED = [*MODEL, "model-1-of-2.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "optimizer.bin",
          "pytorch_model-1-of-2.bin", "adapter_model.safetensors", "model.fp16.safetensors", "flax_model.msgpack",
          "LICENSE", "streaming_params", "pytorch_model.bin.index.json", "merges.txt", "vocab.json", "tokenizer.model",
          "special_tokens_map.json", "tokenizer_config.json", "added_tokens.json", "chat_template.jinja", "a.py",
          "model.safetensors.bak"]  # fmt: skip
TOKENIZER = {"tokenizer.json", "merges.txt", "vocab.json", "tokenizer.model", "special_tokens_map.json",
             "tokenizer_config.json", "added_tokens.json"}  # fmt: skip


@pytest.mark.parametrize(
    ("absent", "chosen"),
    [
        ("", {"model.safetensors", "model-1-of-2.safetensors", "model.safetensors.index.json"}),
        ("safetensors", {"pytorch_model.bin", "pytorch_model-1-of-2.bin", "pytorch_model.bin.index.json"}),
        ("safetensors bin", {"flax_model.msgpack", "streaming_params"}),
    ],
)
def test_of_a_listing_config_tokenizer_and_the_weights_of_one_format_are_wanted(
    served: Hub, tmp_path: Path, absent: str, chosen: set[str]
) -> None:
    files = {name: b"" for name in LISTED if not name.endswith(tuple(absent.split()))}
    served.repositories["o/n"] = {"r": files}
    assert {file.name for file in cache._wanted(of(tmp_path))} == {"config.json", *TOKENIZER, *chosen}


def test_an_index_without_its_files_is_no_weights(served: Hub, tmp_path: Path) -> None:
    served.repositories["o/n"] = {
        "r": {"config.json": b"{}", "model.safetensors.index.json": b"{}", "pytorch_model.bin": b""}
    }
    assert [file.name for file in cache._wanted(of(tmp_path))] == ["config.json", "pytorch_model.bin"]


def test_what_is_thrown_away_leaves_nothing_and_what_is_kept_all(served: Hub, tmp_path: Path) -> None:
    served.repositories["o/n"] = {"r": MODEL}
    cache.fetch(of(tmp_path))
    cache.discard(of(tmp_path))
    assert of(tmp_path).folder.is_dir() and Remote("u", tmp_path).keep
    cache.discard(of(tmp_path, keep=False))
    cache.discard(of(tmp_path, keep=False))
    assert os.listdir(tmp_path) == []


def test_two_that_fetch_one_checkpoint_wait_for_each_other_and_others_do_not(tmp_path: Path) -> None:
    inside, both = [], threading.Barrier(2)

    def hold(name: str, alone: bool) -> None:
        with cache.locked(tmp_path / name):
            inside.append(name)
            time.sleep(0.01)
            assert inside.count(name) == 1
            if not alone:
                both.wait(timeout=10)
            inside.remove(name)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(hold, ["a", "b"], [False, False]))
        list(pool.map(hold, ["a"] * 6, [True] * 6))


# Addresses that are opened


@pytest.mark.parametrize(
    ("spec", "series", "checkpoints", "location"),
    [
        ("hf://o/m@step2", "m", [("step2", 2, None, "hf://o/m@step2")], "hf://o/m@{name}"),
        ("hf://o/m", "m", [("main", None, None, "hf://o/m")], "hf://o/m@{name}"),
        ("hf://o/m-step7/", "m-step7", [("main", 7, None, "hf://o/m-step7/")], "hf://o/m-step7@{name}"),
        ("o/m@step2", "m", [("step2", 2, None, "hf://o/m@step2")], "hf://o/m@{name}"),
        ("hf://o/m@step*", "m", [("step2", 2, None, "hf://o/m@step2"), ("step10", 10, None, "hf://o/m@step10")],
         "hf://o/m@{name}"),
        ("hf://o/m@step2/sub", "sub", [("main", None, None, "hf://o/m@step2/sub")], "hf://o/m@step2/sub"),
        ("hf://o/m@step*/sub", "m", [("step2", 2, None, "hf://o/m@step2/sub"), ("step10", 10, None, "hf://o/m@step10/sub")],
         "hf://o/m@{name}/sub"),
        ("hf://o/m@main/s-*", "m-main", [("s-8BT", None, 8 * 10**9, "hf://o/m@main/s-8BT"),
                                         ("s-10BT", None, 10**10, "hf://o/m@main/s-10BT")], "hf://o/m@main/{name}"),
        ("hf://o/m@main/s-1*", "m-main", [("s-10BT", None, 10**10, "hf://o/m@main/s-10BT")], "hf://o/m@main/{name}"),
        ("hf://o/r-*", "o", [("r-1.5B", None, None, "hf://o/r-1.5B"), ("r-20B", None, None, "hf://o/r-20B")],
         "hf://o/{name}"),
        ("s3://b/run/step5", "step5", [("main", 5, None, "s3://b/run/step5")], "s3://b/run/step5"),
    ],
)  # fmt: skip
def test_an_address_opens_as_a_series_of_these_checkpoints(
    served: Hub, tmp_path: Path, spec: str, series: str, checkpoints: list[Any], location: str
) -> None:
    """A bare amount in a name is never tokens: it may be the size of the model."""
    folders = {f"s-{n}BT/config.json": b"{}" for n in (10, 8)}
    served.repositories = {
        "o/m": {"main": folders, "step10": {}, "step2": {}}, "o/r-20B": {}, "o/r-1.5B": {}, "p/r-3B": {},
    }  # fmt: skip
    found = open_series(spec, downloads=tmp_path, keep=False)
    assert (found.name, found.location) == (series, location)
    assert [(one.name, one.step, one.tokens, one.remote.url) for one in found.checkpoints if one.remote] == checkpoints
    for one in found.checkpoints:
        assert one.kind == "hf" and one.remote is not None and not one.remote.keep
        assert one.location == one.remote.folder and one.remote.downloads == tmp_path


def test_tokenizers_are_shared_by_content_and_those_of_other_content_apart(served: Hub, tmp_path: Path) -> None:
    other = MODEL | {"tokenizer.json": b"[ ]"}  # of the same size
    served.repositories["o/n"] = {"r": MODEL, "s": MODEL, "t": other, "u": MODEL | {"tokenizer_config.json": b"{}"}}
    folders = {revision: cache.tokenizer(of(tmp_path, f"hf://o/n@{revision}")) for revision in "rstu"}
    assert folders["r"] == folders["s"] and len(set(folders.values())) == 3
    assert {path.parent for path in folders.values() if path} == {tmp_path / "tokenizers"}
    assert folders["t"] and (folders["t"] / "tokenizer.json").read_bytes() == b"[ ]"
