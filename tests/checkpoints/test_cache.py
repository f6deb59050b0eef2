"""Downloads: resumed, tried again, verified, named when they fail, removed after use. No JAX but in the last ones."""

import concurrent.futures
import errno
import functools
import hashlib
import http.server
import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from remote_examples import Fault, Hub, commit_of, files_of, hub, serving

from fineline_jax.checkpoints.open import open_series
from fineline_jax.checkpoints.remote import cache as download_cache
from fineline_jax.checkpoints.remote import download, listing
from fineline_jax.checkpoints.remote.download import DiskFullError, FetchError, RemoteFile
from fineline_jax.checkpoints.series import Remote
from fineline_jax.errors import UserError

WEIGHTS = bytes(range(256)) * 1024
MODEL = {"config.json": b'{"a": 1}', "model.safetensors": WEIGHTS, "tokenizer.json": b"{}", "README.md": b"read me"}


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    monkeypatch.setattr(download, "BACKOFF", 0.001)
    monkeypatch.setattr(download, "BLOCK", 1 << 12)
    monkeypatch.setattr(download, "TIMEOUT", (2.0, 2.0))
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    download_cache._listed.cache_clear()


@pytest.fixture
def served(monkeypatch):
    with hub() as made:
        made.repositories["org/model"] = {"main": dict(MODEL), "step1": dict(MODEL)}
        monkeypatch.setenv("HF_ENDPOINT", made.url)
        yield made


def of(folder: Path, url: str = "hf://org/model@step1", **options) -> Remote:
    return Remote(url, folder, **options)


def here(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in files_of(folder).items() if name != download_cache.RECORD}


NEEDED = {name: content for name, content in MODEL.items() if name != "README.md"}


def test_a_revision_is_fetched_with_what_is_needed_of_it(served: Hub, tmp_path):
    folder = download_cache.fetch(of(tmp_path))
    assert here(folder) == NEEDED
    before = len(served.downloads())
    assert download_cache.fetch(of(tmp_path)) == folder
    assert len(served.downloads()) == before


def test_what_huggingface_hub_has_in_its_cache_is_verified_and_not_fetched_again(served: Hub, tmp_path, monkeypatch):
    import huggingface_hub

    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    commit = commit_of(served.repositories["org/model"]["step1"])
    for name in ("model.safetensors", "config.json"):
        huggingface_hub.hf_hub_download(
            "org/model", name, revision=commit, endpoint=served.url, cache_dir=cache, token="secret"
        )
    before = len(served.downloads())
    where = of(tmp_path / "downloads", keep=False)
    assert here(download_cache.fetch(where)) == NEEDED
    assert [path.rpartition("/")[2] for path, _ in served.downloads()[before:]] == ["tokenizer.json"]
    blob = cache / "models--org--model" / "blobs" / hashlib.sha256(WEIGHTS).hexdigest()
    download_cache.discard(where)
    assert blob.read_bytes() == WEIGHTS and not where.folder.exists()
    blob.chmod(0o644)
    blob.write_bytes(WEIGHTS[:-1] + b"x")  # of the right size
    assert here(download_cache.fetch(where)) == NEEDED and not (where.folder / "model.safetensors").is_symlink()
    assert (where.folder / "config.json").is_symlink()
    (where.folder / "config.json").resolve().unlink()  # the user has cleared the cache
    assert here(download_cache.fetch(where)) == NEEDED


def test_the_token_is_given_to_the_hub_and_to_no_other_host(served: Hub, tmp_path):
    download_cache.fetch(of(tmp_path))
    tokens = {path.split("/")[1]: headers.get("Authorization") for _, path, headers in served.asked}
    assert tokens == {"api": "Bearer secret", "org": "Bearer secret", "cdn": None}


@pytest.mark.parametrize("kind", ["status 503", "status 429", "cut", "short", "flipped"])
def test_what_passes_is_tried_again(served: Hub, tmp_path, kind):
    served.faults = [Fault("cdn.*safetensors", kind, times=1), Fault("api", "status 500", times=2)]
    assert here(download_cache.fetch(of(tmp_path))) == NEEDED
    assert not any(fault.times for fault in served.faults)


def test_after_a_cut_only_the_missing_bytes_are_asked_for(served: Hub, tmp_path):
    served.faults = [Fault("cdn.*safetensors", "cut", times=2)]
    assert here(download_cache.fetch(of(tmp_path))) == NEEDED
    ranges = [range for path, range in served.downloads() if path.endswith("safetensors")]
    assert ranges == ["", f"bytes={len(WEIGHTS) // 2}-", f"bytes={len(WEIGHTS) * 3 // 4}-"]


def test_a_download_that_was_given_up_goes_on_in_the_next_run(served: Hub, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    served.faults = [Fault("cdn.*safetensors", "cut", times=1)]
    with pytest.raises(FetchError, match=r"model.safetensors"):
        download_cache.fetch(of(tmp_path))
    assert here(download_cache.fetch(of(tmp_path))) == NEEDED
    assert served.downloads()[-1][1] == f"bytes={len(WEIGHTS) // 2}-"
    asked = [path.rpartition("/")[2] for path, _ in served.downloads()]
    assert sorted(asked) == ["config.json", "model.safetensors", "model.safetensors", "tokenizer.json"]


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("short", "the server's file is shorter than its listing says, in two downloads"),
        ("flipped", "sha256 .* instead of .* in two downloads"),
        ("cut", "6 times in a row"),
        ("status 502", "status 502, 6 times in a row"),
        ("status 403", "refused .status 403"),
    ],
)
def test_what_stays_wrong_is_named_and_leaves_no_file_under_its_name(served: Hub, tmp_path, monkeypatch, kind, said):
    if kind == "cut":  # the second half never comes
        served.repositories["org/model"]["step1"]["model.safetensors"] = b"x"
    served.faults = [Fault("cdn.*safetensors", kind)]
    with pytest.raises(FetchError, match=rf"model\.safetensors: .*{said}") as error:
        download_cache.fetch(of(tmp_path))
    assert "\n" not in str(error.value)
    assert not (of(tmp_path).folder / "model.safetensors").exists()
    served.faults = []
    download_cache.fetch(of(tmp_path))


def test_small_files_are_verified_by_their_git_hash(served: Hub, tmp_path):
    served.faults = [Fault("cdn.*config.json", "flipped")]
    with pytest.raises(FetchError, match=r"config.json: git hash"):
        download_cache.fetch(of(tmp_path))


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("hf://org/model@step9", "revision/step9.*no such revision"),
        ("hf://org/none@step1", "no such repository, or it is private"),
        ("hf://org/model@step1/folder", "no config.json there"),
        ("hf://model", "expected hf://organisation/name@revision"),
        ("nothing://a/b", "nothing"),
    ],
)
def test_what_is_not_there_is_said(served: Hub, tmp_path, url, said):
    with pytest.raises(UserError, match=said) as error:
        download_cache.fetch(of(tmp_path, url))
    assert "\n" not in str(error.value)


def test_a_gated_repository_says_what_to_do(served: Hub, tmp_path, monkeypatch):
    answer = namedtuple("Answer", "status_code headers")
    assert "accept its terms" in download._refusal(answer(403, {"X-Error-Code": "GatedRepo"}))  # type: ignore[arg-type]


def test_a_pushed_revision_is_another_identity_and_only_its_files_are_fetched(served: Hub, tmp_path):
    download_cache.fetch(of(tmp_path))
    first = download_cache.weights_hash(of(tmp_path))
    files = served.repositories["org/model"]["step1"]
    files["model.safetensors"] = WEIGHTS[::-1]
    download_cache._listed.cache_clear()
    before = len(served.downloads())
    assert download_cache.weights_hash(of(tmp_path)) != first
    assert here(download_cache.fetch(of(tmp_path)))["model.safetensors"] == WEIGHTS[::-1]
    assert [path.rpartition("/")[2] for path, _ in served.downloads()[before:]] == ["model.safetensors"]
    files["README.md"] = b"new"
    download_cache._listed.cache_clear()
    assert download_cache.weights_hash(of(tmp_path)) == download_cache.weights_hash(
        of(tmp_path, "hf://org/model@step1")
    )


def test_files_of_an_older_version_do_not_stay(served: Hub, tmp_path):
    files = served.repositories["org/model"]["step1"]
    del files["model.safetensors"]
    files |= {"model.safetensors.index.json": b"{}", "model-00001-of-00001.safetensors": WEIGHTS}
    folder = download_cache.fetch(of(tmp_path))
    del files["model.safetensors.index.json"], files["model-00001-of-00001.safetensors"]
    files["model.safetensors"] = WEIGHTS
    download_cache._listed.cache_clear()
    download_cache.fetch(of(tmp_path))
    assert here(folder) == NEEDED


def test_the_preferred_format_is_fetched_and_no_other(served: Hub, tmp_path):
    files = served.repositories["org/model"]["step1"]
    files |= {"pytorch_model.bin": b"1", "consolidated.00.pth": b"2", "training_args.bin": b"3", "optimizer": b"4"}
    assert set(here(download_cache.fetch(of(tmp_path)))) == set(NEEDED)
    del files["model.safetensors"]
    download_cache._listed.cache_clear()
    assert set(here(download_cache.fetch(of(tmp_path)))) == {"config.json", "tokenizer.json", "pytorch_model.bin"}
    for name in ("pytorch_model.bin", "optimizer"):
        del files[name]
    download_cache._listed.cache_clear()
    with pytest.raises(FetchError, match="no weights there"):
        download_cache.fetch(of(tmp_path))
    files |= {"open_llama_7b_easylm": b"stream", "LICENSE": b"text"}
    download_cache._listed.cache_clear()
    assert set(here(download_cache.fetch(of(tmp_path)))) == {"config.json", "tokenizer.json", "open_llama_7b_easylm"}


def test_a_full_disk_is_said_before_and_while_it_happens(served: Hub, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage(100, 90, 10))
        with pytest.raises(DiskFullError, match=r"the disk is full: .* more bytes, 10 are free; .*--keep-downloads no"):
            download_cache.fetch(of(tmp_path))

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(DiskFullError, match="the disk is full"):
            download_cache.fetch(of(tmp_path))
    assert here(download_cache.fetch(of(tmp_path))) == NEEDED


def test_offline_what_is_fetched_can_be_used_and_nothing_is_asked(served: Hub, tmp_path, monkeypatch):
    download_cache.fetch(of(tmp_path))
    identity = download_cache.weights_hash(of(tmp_path))
    download_cache._listed.cache_clear()
    asked = len(served.asked)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert here(download_cache.fetch(of(tmp_path))) == NEEDED
    assert download_cache.weights_hash(of(tmp_path)) == identity
    with pytest.raises(FetchError, match="main: not downloaded, and HF_HUB_OFFLINE is set"):
        download_cache.fetch(of(tmp_path, "hf://org/model@main"))
    assert len(served.asked) == asked


@pytest.mark.parametrize(
    "record",
    ["", "[]", '{"complete": true}', '{"url": "u", "complete": true, "files": [1], "have": {}}',
     '{"url": "u", "complete": true, "files": [{"name": 1}], "have": {}}',
     '{"url": "u", "complete": true, "files": [], "have": [1, 2]}'],
)  # fmt: skip
def test_a_damaged_record_of_a_download_is_made_anew(served: Hub, tmp_path, monkeypatch, record):
    folder = download_cache.fetch(of(tmp_path))
    (folder / download_cache.RECORD).write_text(record)
    with monkeypatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(FetchError, match="not downloaded, and HF_HUB_OFFLINE is set"):
            download_cache.fetch(of(tmp_path))
    assert here(download_cache.fetch(of(tmp_path))) == NEEDED


def test_a_download_is_removed_only_if_it_is_not_to_be_kept(served: Hub, tmp_path):
    download_cache.fetch(of(tmp_path))
    download_cache.discard(of(tmp_path))
    assert of(tmp_path).folder.exists()
    download_cache.discard(of(tmp_path, keep=False))
    assert not of(tmp_path).folder.exists()


def test_several_at_once_fetch_it_once(served: Hub, tmp_path):
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(download_cache.fetch, [of(tmp_path)] * 4))
    assert len(set(folders)) == 1 and here(folders[0]) == NEEDED
    assert len(served.downloads()) == len(NEEDED)


def test_an_interrupted_download_ends_at_once_and_goes_on_later(served: Hub, tmp_path):
    with download.stopped(), pytest.raises(FetchError, match="interrupted after"):
        download_cache.fetch(of(tmp_path))
    assert here(download_cache.fetch(of(tmp_path))) == NEEDED


def test_equal_tokenizers_are_fetched_once_and_alone(served: Hub, tmp_path):
    folder = download_cache.tokenizer(of(tmp_path))
    assert folder is not None and here(folder) == {"tokenizer.json": b"{}"}
    assert download_cache.tokenizer(of(tmp_path, "hf://org/model@main")) == folder
    assert [path.rpartition("/")[2] for path, _ in served.downloads()] == ["tokenizer.json"]
    del served.repositories["org/model"]["main"]["tokenizer.json"]
    download_cache._listed.cache_clear()
    assert download_cache.tokenizer(of(tmp_path, "hf://org/model@main")) is None


def test_a_tokenizer_elsewhere_may_be_a_folder_or_one_file(served: Hub, tmp_path, monkeypatch):
    served.repositories["org/words"] = {"main": {"tokenizer.model": b"m", "tokenizer_config.json": b"{}"}}
    whole = download_cache.tokenizer(of(tmp_path, tokenizer="hf://org/words"))
    bare = download_cache.tokenizer(of(tmp_path, tokenizer="hf://org/words@main/tokenizer.model"))
    assert whole and bare
    assert set(here(whole)) == {"tokenizer.model", "tokenizer_config.json"}
    assert set(here(bare)) == {"tokenizer.model"}
    with pytest.raises(FetchError, match="no tokenizer there"):
        download_cache.tokenizer(of(tmp_path, tokenizer="hf://org/words/vocab.json"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert download_cache.tokenizer(of(tmp_path, tokenizer="hf://org/words")) == whole
    with pytest.raises(FetchError, match="not downloaded"):
        download_cache.tokenizer(of(tmp_path, tokenizer="hf://org/others"))
    record = json.loads((whole / "fetched.json").read_bytes())
    (whole / "fetched.json").write_text(json.dumps(record | {"complete": False}))  # interrupted
    with pytest.raises(FetchError, match="not downloaded"):
        download_cache.tokenizer(of(tmp_path, tokenizer="hf://org/words"))


# What lies where


def test_checkpoints_are_listed_in_each_of_the_four_layouts(served: Hub, tmp_path):
    for name in ("Ours-8.39B", "Ours-20.97B", "Ours-100.66B", "Other"):
        served.repositories[f"org/{name}"] = {"main": dict(MODEL)}
    served.repositories["org/folders"] = {"main": {f"{n}/{file}": b"" for n in ("8B", "20B") for file in MODEL}}
    served.page = 2
    assert sorted(listing.list_names("hf://org/model@{name}")) == ["main", "step1"]
    assert sorted(listing.list_names("hf://org/model@st{name}1")) == ["ep"]
    assert listing.list_names("hf://org/Ours-{name}") == ["8.39B", "20.97B", "100.66B"]
    assert listing.list_names("hf://org/folders/{name}") == ["20B", "8B"]
    assert listing.list_names("hf://org/folders@main/{name}") == ["20B", "8B"]
    with pytest.raises(FetchError, match="no such repository"):
        listing.list_names("hf://org/none@{name}")


def test_addresses_and_globs_open_as_series(served: Hub, tmp_path):
    served.repositories["org/model"] |= {f"step{n}-tokens{n}B": dict(MODEL) for n in (10, 2)}
    for name in ("Ours-8.39B", "Ours-20.97B"):
        served.repositories[f"org/{name}"] = {"main": dict(MODEL)}

    def opened(spec: str) -> list[tuple[str, str, int | None]]:
        found = open_series(spec, downloads=tmp_path).checkpoints
        return [(one.series, one.name, one.tokens) for one in found]

    assert opened("hf://org/model@step1") == [("model", "step1", None)]
    assert opened("org/model@step1") == [("model", "step1", None)]
    assert opened("hf://org/model") == [("model", "main", None)]
    assert opened("org/model@step*-*") == [
        ("model", "step2-tokens2B", 2_000_000_000),
        ("model", "step10-tokens10B", 10_000_000_000),
    ]
    assert [name for _, name, _ in opened("hf://org/Ours-*")] == ["Ours-8.39B", "Ours-20.97B"]
    with pytest.raises(UserError, match="nothing there has such a name"):
        opened("org/model@stage*")


def test_a_plain_server_of_files_with_and_without_an_index_page(tmp_path):
    for name in ("step1", "step2"):
        (tmp_path / "site" / name).mkdir(parents=True)
        for file, content in MODEL.items():
            (tmp_path / "site" / name / file).write_bytes(content)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

    class Closed(Quiet):
        def list_directory(self, path):
            self.send_error(403)

    with serving(functools.partial(Quiet, directory=str(tmp_path / "site"))) as url:  # type: ignore[arg-type]
        found = open_series(f"{url}/step*", downloads=tmp_path)
        assert [(one.name, one.step) for one in found.checkpoints] == [("step1", 1), ("step2", 2)]
        assert found.checkpoints[0].remote is not None
        assert here(download_cache.fetch(found.checkpoints[0].remote)) == NEEDED
    with serving(functools.partial(Closed, directory=str(tmp_path / "site"))) as url:  # type: ignore[arg-type]
        assert here(download_cache.fetch(of(tmp_path, f"{url}/step2"))) == NEEDED
        with pytest.raises(FetchError, match="no files there"):
            download_cache.fetch(of(tmp_path, f"{url}/step3"))


def test_any_file_system_of_fsspec(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    system = fsspec.filesystem("memory")
    for name in ("step1", "step2"):
        for file, content in MODEL.items():
            system.pipe(f"/bucket/run/{name}/{file}", content)
    found = open_series("memory://bucket/run/*", downloads=tmp_path).checkpoints
    assert [(one.name, one.step) for one in found] == [("step1", 1), ("step2", 2)]
    assert found[1].remote is not None and here(download_cache.fetch(found[1].remote)) == NEEDED
    with pytest.raises(FetchError, match=r"no files there|not there"):
        download_cache.fetch(of(tmp_path, "memory://bucket/run/step3"))


@pytest.fixture(scope="module")
def bucket():
    """An S3-compatible server on loopback with a bucket."""
    moto = pytest.importorskip("moto.server", reason="pip install 'moto[server]' s3fs")
    pytest.importorskip("s3fs", reason="pip install 'moto[server]' s3fs")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    changes = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for key, value in changes.items():
            patch.setenv(key, value)
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()  # tests before have asked for one without credentials
        system = s3fs.S3FileSystem()
        system.mkdir("fineline-test")
        yield system
        s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def test_a_bucket_is_listed_fetched_in_ranges_and_resumed(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "RANGE", 1 << 16)
    for name in ("step1000", "step2000"):
        for file, content in MODEL.items():
            bucket.pipe(f"fineline-test/series/{name}/{file}", content)
    found = open_series("s3://fineline-test/series/*", downloads=tmp_path).checkpoints
    assert [(one.name, one.step) for one in found] == [("step1000", 1000), ("step2000", 2000)]
    where = found[0].remote
    assert where is not None
    files = {file.name: file for file in listing.list_files(where.url)}
    partial = where.folder / f".model.safetensors.{files['model.safetensors'].fingerprint}.partial"
    where.folder.mkdir(parents=True)
    partial.write_bytes(WEIGHTS[:100_000])  # as a killed run would leave it
    read: list[int] = []
    system = download.bucket("s3://fineline-test")
    original = system._cat_file

    async def counted(path: str, start: int, end: int) -> bytes:
        read.append(start)
        return await original(path, start=start, end=end)

    monkeypatch.setattr(system, "_cat_file", counted)
    assert here(download_cache.fetch(where)) == NEEDED
    first = 60_000  # bytes that the slowest rate, 1000 bytes/s, lets through in the 60 s of its window
    assert sorted(start for start in read if start) == [100_000, 100_000 + first, 100_000 + first + (1 << 16)]
    with pytest.raises(FetchError, match=r"s3://fineline-test/none: (not there|no files)"):
        download_cache.fetch(of(tmp_path, "s3://fineline-test/none"))


def test_deepseeks_folders_are_found_and_ordered_by_what_their_names_say(bucket, tmp_path):
    """Their names are not public: whatever the bucket lists is taken, and no tokens are guessed."""
    bucket.mkdir("deepseek-ai")
    for name in ("step_20000", "step_3000", "iter_100000", "ckpt-1200B-cooldown", "latest"):
        bucket.pipe(f"deepseek-ai/DeepSeek-LLM/DeepSeek-LLM-67B-Base/{name}/config.json", b"{}")
    found = open_series("deepseek-67b", downloads=tmp_path).checkpoints
    step = 4608 * 4096
    assert [(one.name, one.tokens) for one in found] == [
        ("step_3000", 3000 * step),
        ("step_20000", 20_000 * step),
        ("ckpt-1200B-cooldown", 1_200_000_000_000),
        ("iter_100000", 100_000 * step),
        ("latest", None),
    ]
    assert found[0].remote is not None and dict(found[0].remote.options) == {"requester_pays": True}
    assert [one.name for one in open_series("deepseek-67b@step*", downloads=tmp_path, tokens="300B:").checkpoints] == [
        "step_20000"
    ]
    with pytest.raises(FetchError, match=r"DeepSeek-LLM-7B-Base: not there"):
        open_series("deepseek-7b", downloads=tmp_path)


def test_the_version_of_a_file_decides_about_its_partial(tmp_path):
    content = tmp_path / "there"
    content.write_bytes(b"abc")
    old = RemoteFile("f", "memory://x/f", 3, "1")
    new = RemoteFile("f", "memory://x/f", 3, "2")
    assert old.fingerprint != new.fingerprint
    fsspec = pytest.importorskip("fsspec")
    fsspec.filesystem("memory").pipe("/x/f", b"new")
    (tmp_path / f".f.{old.fingerprint}.partial").write_bytes(b"ol")
    download.download(new, tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == b"new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f", "there"]


def test_the_record_is_what_the_server_listed(served: Hub, tmp_path):
    folder = download_cache.fetch(of(tmp_path))
    record = json.loads((folder / download_cache.RECORD).read_text())
    assert record["complete"] and record["url"] == "hf://org/model@step1"
    assert commit_of(served.repositories["org/model"]["step1"]) in record["files"][0]["url"]
