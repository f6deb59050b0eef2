"""Series on a hub and in a bucket, scored end to end by the command."""

import functools
import json
import re
import shutil
import threading
import time
import types
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from remote_examples import Fault, Hub, commit_of, faulty, files_of, google_storage, hub
from safetensors.numpy import load_file, save_file
from scoring_examples import score_series, write_benchmarks, write_tokenizer
from series_examples import CONFIG, make_series, one_device

from fineline_jax.checkpoints.load import fetch
from fineline_jax.checkpoints.open import open_series
from fineline_jax.checkpoints.remote import cache, download
from fineline_jax.cli import main
from fineline_jax.errors import UserError
from fineline_jax.scoring import score_files
from fineline_jax.scoring.requests import pack
from fineline_jax.scoring.series import compatibility
from fineline_jax.scoring.series.prefetch import Failed, open_each

STEPS = tuple(range(100, 1300, 100))
ENTRY = """
name: tiny
title: A tiny Llama in twelve revisions
location: hf://org/tiny@{name}
names: "step{100..1200..100}"
pattern: step{step}
tokens: step * 4096
tokenizer: hf://org/tiny@step200
scoring: {bos: always, notes: [Trained with BOS.]}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Twelve checkpoints, their tokenizer, documents."""
    folder = tmp_path_factory.mktemp("tiny")
    write_tokenizer(folder / "tokenizer", adds_bos=False)
    make_series(folder / "tiny", folder / "tokenizer", STEPS)
    write_benchmarks(folder / "benchmarks", documents=4)
    (folder / "tiny.yaml").write_text(ENTRY)
    return folder


@pytest.fixture
def served(made, monkeypatch):
    monkeypatch.setattr(download, "BACKOFF", 0.001)
    monkeypatch.setenv("HF_TOKEN", "secret")
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    cache._listed.cache_clear()
    with hub() as started:
        started.repositories["org/tiny"] = {
            f"step{step}": files_of(made / "tiny" / f"step{step}") for step in STEPS if step != 500
        }
        monkeypatch.setenv("HF_ENDPOINT", started.url)
        yield started


class Disk:
    """The most checkpoints that lie in a folder at any time, looked at again and again."""

    def __init__(self, folder: Path):
        self.folder, self.most, self.ended = folder, 0, threading.Event()
        self.thread = threading.Thread(target=self._watch)

    def count(self) -> int:
        try:
            found = {path.parent for path in self.folder.glob("*/*model.safetensors*")}
        except FileNotFoundError:  # removed while it is looked at
            return 0
        self.most = max(self.most, len(found))
        return len(found)

    def _watch(self) -> None:
        while not self.ended.is_set():
            self.count()
            time.sleep(0.002)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *raised):
        self.ended.set()
        self.thread.join()


def score(made: Path, spec: str, out: Path, *options: str) -> int:
    suite = ["--suite", "piqa", "--benchmarks", str(made / "benchmarks"), "--out", str(out)]
    return main(["score", spec, *suite, "--downloads", str(out.parent / "downloads"), *options])


def test_a_series_on_a_flaky_hub_is_scored_but_for_what_is_damaged_or_missing(made, served: Hub, tmp_path, capsys):
    served.faults = [
        Fault("revision/step300", "status 503", times=1),
        Fault("cdn.*config.json", "status 500", times=1),
        Fault("cdn.*safetensors", "short", times=1),
    ]
    damaged = commit_of(served.repositories["org/tiny"]["step900"])
    served.faults.append(Fault(f"cdn/org/tiny/{damaged}/model.safetensors", "short"))
    out = tmp_path / "scores"
    with Disk(tmp_path / "downloads") as disk:
        served.before = lambda path: disk.count() and None
        status = score(made, str(made / "tiny.yaml"), out, "--keep-downloads", "no")
    said = capsys.readouterr().err
    assert status == 1
    summary = said.strip().splitlines()[-1]
    assert summary.startswith("fineline: 2 checkpoints could not be opened")
    assert "tiny/step500" in summary and "no such revision" in summary
    assert "tiny/step900" in summary and "shorter than its listing says" in summary
    names = [f"step{step}" for step in STEPS if step not in (500, 900)]
    assert sorted(path.stem for path in (out / "tiny").glob("*.parquet")) == sorted(names)
    assert [fault.times for fault in served.faults[:3]] == [0, 0, 0]
    assert 1 <= disk.most <= 2
    assert disk.count() == 0

    requests = pack.load(out / "pack")
    assert requests.manifest["bos"] == "always"
    local = score_series(open_series(str(made / "tiny@step[17]00")), requests, tmp_path / "local", one_device())
    for file in local:
        ours, theirs = score_files.read(out / "tiny" / file.name), score_files.read(file)
        np.testing.assert_allclose(ours.loglikelihood, theirs.loglikelihood, atol=1e-5)
        assert ours.header.step == theirs.header.step and ours.header.tokens == (ours.header.step or 0) * 4096

    # What was missing has come, and the damaged file is mended: only these two are fetched.
    served.faults = []
    served.repositories["org/tiny"]["step500"] = files_of(made / "tiny" / "step500")
    cache._listed.cache_clear()
    fetch(open_series(str(made / "tiny.yaml"), downloads=tmp_path / "downloads").checkpoints[0])
    assert disk.count() == 1, "as a run leaves it that is killed between scoring a checkpoint and removing it"
    served.asked.clear()
    assert score(made, str(made / "tiny.yaml"), out, "--keep-downloads", "no") == 0
    assert disk.count() == 0
    assert len([path for path, _ in served.downloads() if path.endswith("safetensors")]) == 2
    assert len(list((out / "tiny").glob("*.parquet"))) == 12


def test_selections_and_globs_choose_what_is_scored_and_downloads_stay_by_default(made, served: Hub, tmp_path, caplog):
    out = tmp_path / "scores"
    assert score(made, f"{made / 'tiny.yaml'}@step?00", out, "--tokens", "0.4M:4M:3.3M", "--bos", "never") == 0
    assert {path.stem for path in (out / "tiny").glob("*.parquet")} == {"step100", "step900"}
    assert len(list((tmp_path / "downloads").glob("*/model.safetensors"))) == 2
    assert pack.load(out / "pack").manifest["bos"] == "never"
    assert "tiny: its entry wants --bos always, the pack has --bos never" in caplog.text
    assert "tiny: Trained with BOS." in caplog.text
    assert score(made, "org/tiny@step1?00", tmp_path / "other") == 0
    assert {path.stem for path in (tmp_path / "other" / "tiny").glob("*.parquet")} == {
        "step1000",
        "step1100",
        "step1200",
    }


def test_a_full_disk_ends_the_run_with_one_line(made, served: Hub, tmp_path, monkeypatch, capsys):
    usage = namedtuple("usage", "total used free")
    original = shutil.disk_usage
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: usage(1, 1, 50_000) if "tiny@step" in str(path) else original(path)
    )
    assert score(made, str(made / "tiny.yaml"), tmp_path / "scores") == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "the disk is full" in last and "model.safetensors needs" in last


def test_a_series_in_a_flaky_bucket_is_scored_but_for_what_is_damaged_or_missing(made, tmp_path, monkeypatch, capsys):
    moto = pytest.importorskip("moto.server", reason="pip install 'moto[server]' s3fs")
    s3fs = pytest.importorskip("s3fs", reason="pip install 'moto[server]' s3fs")
    monkeypatch.setattr(download, "BACKOFF", 0.001)
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # it is we who try again
    entry = ENTRY.replace("hf://org/tiny@", "s3://tiny-bucket/run/")
    (tmp_path / "tiny.yaml").write_text(entry)
    out = tmp_path / "scores"
    try:
        with faulty(f"{host}:{port}") as bucket, Disk(tmp_path / "downloads") as disk:
            monkeypatch.setenv("AWS_ENDPOINT_URL", bucket.url)
            s3fs.S3FileSystem.clear_instance_cache()
            system = s3fs.S3FileSystem()
            system.mkdir("tiny-bucket")
            for step in STEPS:
                for name, content in files_of(made / "tiny" / f"step{step}").items() if step != 500 else ():
                    cut = len(content) // 2 if (step, name) == (900, "model.safetensors") else len(content)
                    system.pipe(f"tiny-bucket/run/step{step}/{name}", content[:cut])
            bucket.faults = [
                Fault("GET /tiny-bucket/run/step300/model.safetensors", "status 503", times=1),
                Fault("GET /tiny-bucket/run/step700/config.json", "status 500", times=1),
                Fault("GET /tiny-bucket/run/step800/model.safetensors", "cut", times=1),
            ]
            assert score(made, str(tmp_path / "tiny.yaml"), out, "--keep-downloads", "no") == 1
            assert [fault.times for fault in bucket.faults] == [0, 0, 0]
            summary = capsys.readouterr().err.strip().splitlines()[-1]
            assert summary.startswith("fineline: 2 checkpoints could not be opened")
            assert "tiny/step500 (s3://tiny-bucket/run/step500: not there" in summary
            assert "tiny/step900 (" in summary and "it is cut short" in summary
            assert 1 <= disk.most <= 2 and disk.count() == 0
            assert {path.stem for path in (out / "tiny").glob("*.parquet")} == {
                f"step{step}" for step in STEPS if step not in (500, 900)
            }
            assert score(made, "s3://tiny-bucket/run/step[67]*", tmp_path / "other", "--bos", "always") == 0
            ours, theirs = (
                score_files.read(folder / "step600.parquet") for folder in (out / "tiny", tmp_path / "other" / "run")
            )
            assert ours.loglikelihood.tobytes() == theirs.loglikelihood.tobytes()
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        server.stop()


def test_a_series_in_a_google_bucket_is_scored(made, tmp_path, monkeypatch):
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # it would ask Google about the bucket
    pytest.importorskip("gcsfs", reason="pip install gcsfs")
    entry = ENTRY.replace("hf://org/tiny@{name}", "gs://tiny/run/{name}").replace("hf://org/tiny@", "gs://tiny/run/")
    listed = entry.replace('names: "step{100..1200..100}"', "listing: true\noptions: {token: anon}")
    (tmp_path / "tiny.yaml").write_text(listed)
    files = {
        f"tiny/run/step{step}/{name}": content
        for step in (100, 200)
        for name, content in files_of(made / "tiny" / f"step{step}").items()
    }
    with google_storage(files) as url:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
        assert score(made, str(tmp_path / "tiny.yaml"), tmp_path / "scores", "--keep-downloads", "no") == 0
    assert score(made, f"{made / 'tiny'}@step[12]00", tmp_path / "local", "--bos", "always") == 0
    for name in ("step100", "step200"):
        ours, theirs = (
            score_files.read(tmp_path / where / "tiny" / f"{name}.parquet") for where in ("scores", "local")
        )
        assert ours.loglikelihood.tobytes() == theirs.loglikelihood.tobytes()
        assert ours.header.tokens == int(name[4:]) * 4096


def test_a_tokenizer_beyond_the_embedding_is_refused_by_the_command(made, tmp_path, capsys):
    """With the suite, whose requests would not even hold such an id."""
    small = tmp_path / "small"
    shutil.copytree(made / "tiny" / "step100", small)
    config = json.loads((small / "config.json").read_text()) | {"vocab_size": 300}
    (small / "config.json").write_text(json.dumps(config))
    tensors = load_file(small / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:300].copy()
    save_file(tensors, small / "model.safetensors")
    assert score(made, str(small), tmp_path / "scores") == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(r"fineline: small/main: a request has token \d+, the embedding 300 rows; prepare the pack", said)
    assert not (tmp_path / "scores").exists()


def test_a_request_with_an_id_that_the_embedding_has_no_row_for_is_refused_by_name(made):
    """The largest id of a request counts, not the size of the tokenizer, which may have a padding token more."""

    def requests(largest: int) -> Any:
        asked = types.SimpleNamespace(largest_token=largest)
        return types.SimpleNamespace(manifest={"tokenizer": {"size": 513}}, request_tokens=asked)

    with pytest.raises(UserError, match="tiny/step100: a request has token 512, the embedding 512 rows"):
        compatibility.check_vocabulary(requests(512), CONFIG, "tiny/step100")
    compatibility.check_vocabulary(requests(511), CONFIG, "fits")


@pytest.mark.parametrize("kind", ["cut", "flipped"])
def test_at_no_time_lie_more_than_two_checkpoints_on_the_disk_whatever_fails(
    made, served: Hub, tmp_path, monkeypatch, kind
):
    """Looked at when each request comes and while each checkpoint is used; the second and the third fail for good."""
    monkeypatch.setattr(download, "BLOCK", 1 << 10)
    monkeypatch.setattr(download, "ATTEMPTS", 2)
    for step in (200, 300):
        files = served.repositories["org/tiny"][f"step{step}"]
        files["config.json"] += b" " * step  # a commit of its own
        served.faults.append(Fault(f"cdn/org/tiny/{commit_of(files)}/model.safetensors", kind))
    disk, seen = Disk(tmp_path), []
    served.before = lambda path: disk.count() and None
    chosen = open_series(f"{made / 'tiny.yaml'}@step[1-467]00", downloads=tmp_path, keep=False).checkpoints
    for found in open_each(
        functools.partial(next, iter(chosen), None), one_device(), "float32", lambda *_: True, lambda _: None
    ):
        seen.append((found.checkpoint.step, isinstance(found, Failed)))
        disk.count()
        time.sleep(0.1)  # the next one comes meanwhile
        disk.count()
    assert seen == [(100, False), (200, True), (300, True), (400, False), (600, False), (700, False)]
    assert disk.most <= 2 and disk.count() == 0
    assert not list(tmp_path.iterdir()), "nor anything else"
