"""Folders in buckets of loopback servers: what is written on the local disk is in the bucket, whatever ends when."""

import contextlib
import dataclasses
import hashlib
import json
import random
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import jax
import numpy as np
import pytest
from commands import assert_same_run, free_port, in_a_process
from data_examples import amber, numbered
from fsspec.implementations.memory import MemoryFileSystem
from remote_examples import Files, files_of, google_storage
from scoring_examples import write_benchmarks, write_tokenizer
from series_examples import make_series

import fineline_jax
from fineline_jax.checkpoints import load
from fineline_jax.checkpoints.open import open_series
from fineline_jax.checkpoints.remote import download, staging
from fineline_jax.checkpoints.remote.staging import Mirror
from fineline_jax.checkpoints.runs.digest_record import damage, read_record, write_record
from fineline_jax.cli import main
from fineline_jax.data.corpora import prepare_amber
from fineline_jax.data.loader import open_fitting
from fineline_jax.errors import UserError
from fineline_jax.mesh import make_mesh
from fineline_jax.models.config import ModelConfig
from fineline_jax.recipe import (
    Batch,
    Checkpoints,
    Compute,
    Data,
    Every,
    Logging,
    MeshShape,
    Optimizer,
    Recipe,
    Schedule,
    Source,
    to_json,
)


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch) -> Path:
    """Where this machine stages."""
    monkeypatch.setenv("FINELINE_STAGING", str(tmp_path / "staging"))
    monkeypatch.setattr(download, "BACKOFF", 0.001)
    monkeypatch.setattr(staging, "SEND_SECONDS", 0.2)
    return tmp_path / "staging"


@contextlib.contextmanager
def google(monkeypatch: pytest.MonkeyPatch) -> Iterator[Files]:
    """What a bucket of Google holds, {bucket/path: content}."""
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # it would ask Google about the bucket
    gcsfs = pytest.importorskip("gcsfs", reason="pip install gcsfs")
    monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "anon"})
    files: Files = {}
    with google_storage(files) as url:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
        gcsfs.GCSFileSystem.clear_instance_cache()
        yield files
    gcsfs.GCSFileSystem.clear_instance_cache()


@contextlib.contextmanager
def amazon(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A bucket `bucket` of Amazon."""
    moto = pytest.importorskip("moto.server", reason="pip install 'moto[server]' s3fs")
    s3fs = pytest.importorskip("s3fs", reason="pip install 'moto[server]' s3fs")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    urllib.request.urlopen(f"http://{host}:{port}/moto-api/reset", data=b"")  # of the test before
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir("bucket")
    try:
        yield
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        server.stop()


@pytest.fixture
def bucket(monkeypatch) -> Iterator[Files]:
    with google(monkeypatch) as files:
        yield files


@pytest.fixture
def memory() -> Iterator[Callable[[], Files]]:
    """What a bucket in memory, memory://b, holds."""
    store = MemoryFileSystem.store
    store.clear()
    yield lambda: {path.lstrip("/"): file.getvalue() for path, file in store.items()}
    store.clear()


def checkpoint(run: Path, step: int, seed: int, weights_only: bool = False) -> None:
    """A complete one with random files, as the store writes it."""
    folder, draw = run / "checkpoints" / str(step), random.Random(seed)
    for item in ("params",) if weights_only else ("params", "opt_state"):
        (folder / item / "d").mkdir(parents=True)
        (folder / item / "d" / "0").write_bytes(draw.randbytes(500))
    more = {"weights": "float32"} if weights_only else {}
    write_record(folder, {"step": step, "tokens": step, "kept": True, "recipe": "r", "history": []} | more)


def whole_in(files: Files, place: str) -> dict[int, bool]:
    """The steps whose record is in the bucket; raises where a file that one names is not there as it was written."""
    steps = {}
    for name, content in list(files.items()):
        if name.startswith(f"{place}/checkpoints/") and name.endswith("complete.json"):
            record = json.loads(content)
            for file, (size, digest) in record["files"].items():
                found = files[f"{name.removesuffix('complete.json')}{file}"]
                assert len(found) == size
                blocks = hashlib.sha256(found).digest() if found else b""  # an empty file has none
                assert hashlib.sha256(blocks).hexdigest() == digest
            steps[record["step"]] = "weights" not in record
    return steps


class Killed(BaseException):
    pass


def killed_at(monkeypatch: pytest.MonkeyPatch, number: int) -> list[int]:
    """Every change of a bucket counts; before that one the process is killed. Returns the count."""
    count = [0]
    system = fsspec.filesystem("memory")

    def counted(act: Any) -> Any:
        def change(*arguments: Any, **options: Any) -> Any:
            count[0] += 1
            if count[0] == number:
                raise Killed
            return act(*arguments, **options)

        return change

    for name in ("put_file", "pipe_file", "rm_file"):
        monkeypatch.setattr(system, name, counted(getattr(system, name)))
    return count


def train_a_little(run: Path, part: int) -> None:
    """As a run goes on: lines, a kept checkpoint of weights alone, a state in place of the one before."""
    with (run / "metrics.jsonl").open("a") as log:
        log.writelines(f'{{"step": {10 * part + step}}}\n' for step in range(10))
    checkpoint(run, 10 * part + 1, part, weights_only=True)
    checkpoint(run, 10 * part + 5, 100 + part)
    before = run / "checkpoints" / str(10 * part - 5)
    if before.exists():
        staging.shutil.rmtree(before)


def test_a_kill_at_any_change_of_the_bucket_loses_nothing(memory: Callable[[], Files], tmp_path, monkeypatch) -> None:
    """Each state that was once whole in the bucket is there until a newer one is; the next send mends all."""
    number, tried = 1, 0
    while True:
        place, run = f"b/run{number}", tmp_path / f"run{number}"
        run.mkdir()
        (run / "recipe.json").write_text("{}")
        with monkeypatch.context() as patch:
            count = killed_at(patch, number)
            mirror, newest = Mirror(f"memory://{place}", run), -1
            try:
                for part in range(3):
                    train_a_little(run, part)
                    mirror.send()
                    newest = 10 * part + 5
            except Killed:
                pass
        ended = count[0] < number
        states = [step for step, is_state in whole_in(memory(), place).items() if is_state]
        assert max(states, default=-1) >= newest
        tried += 1
        if ended:
            break
        again = Mirror(f"memory://{place}", run)  # the same machine goes on
        again.bring()
        again.send()
        here = {int(path.parent.name) for path in run.glob("checkpoints/*/complete.json")}
        assert set(whole_in(memory(), place)) == here
        number += 1
    assert tried > 20
    other = tmp_path / "other"  # and another machine, from the bucket alone
    Mirror(f"memory://{place}", other).bring()
    assert (other / "metrics.jsonl").read_bytes() == (run / "metrics.jsonl").read_bytes()
    assert damage(other / "checkpoints" / "25") is None and not (other / "checkpoints" / "21" / "params").exists()
    assert read_record(other / "checkpoints" / "21") is not None


def test_of_two_tiers_the_nearer_state_goes_on(memory: Callable[[], Files], tmp_path: Path) -> None:
    """Killed after a state is whole on the local disk and before any of it is in the bucket: this machine goes on from
    its own disk, and sends it; an empty machine goes on from what the bucket had."""
    here = tmp_path / "here"
    here.mkdir()
    (here / "recipe.json").write_text("{}")
    train_a_little(here, 0)
    Mirror("memory://b/run", here).send()
    train_a_little(here, 1)  # and the kill
    states = lambda run: sorted(path.parent.name for path in run.glob("checkpoints/*/opt_state"))
    empty, fully = tmp_path / "empty", tmp_path / "fully"
    Mirror("memory://b/run", empty).bring()
    assert states(empty) == ["5"] and damage(empty / "checkpoints" / "5") is None
    assert (empty / "metrics.jsonl").read_text().count("\n") == 10
    again = Mirror("memory://b/run", here)
    again.bring()
    assert states(here) == ["15"] and (here / "metrics.jsonl").read_text().count("\n") == 20
    again.send()
    Mirror("memory://b/run", fully).bring()
    assert states(fully) == ["15"] and damage(fully / "checkpoints" / "15") is None


def test_metrics_in_the_bucket_are_those_of_the_folder_after_any_cut(
    memory: Callable[[], Files], tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(staging, "MOST_PARTS", 4)
    run, draw, mirror = tmp_path, random.Random(0), Mirror("memory://b/m", tmp_path)
    lines: list[bytes] = []
    for number in range(40):
        lines = lines[: draw.randint(0, len(lines))] if draw.random() < 0.3 else lines
        lines += [b"%d\n" % (1000 * number + more) for more in range(draw.randint(1, 3))]
        (run / "metrics.jsonl").write_bytes(b"".join(lines))
        if draw.random() < 0.2:
            mirror = Mirror("memory://b/m", tmp_path)  # another process
            mirror.there = set(staging.files_in("memory://b/m"))
        mirror.send()
        found = Mirror("memory://b/m", tmp_path)
        found.there = set(staging.files_in("memory://b/m"))
        assert found._metrics() == b"".join(lines)
    assert len([name for name in memory() if name.startswith("b/m/metrics/")]) <= 5


def test_the_folder_of_another_run_is_not_mixed_with_that_of_the_address(memory: Callable[[], Files], tmp_path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    checkpoint(one, 5, 0)
    Mirror("memory://b/run", one).send()
    folder = two / "checkpoints" / "5"
    (folder / "params").mkdir(parents=True)
    write_record(folder, {"step": 5, "tokens": 5, "kept": True, "recipe": "other", "history": [1]})
    with pytest.raises(UserError, match=r"two: holds another run than memory://b/run; remove one of the two"):
        Mirror("memory://b/run", two).bring()
    checkpoint(one, 9, 1)
    Mirror("memory://b/run", one).bring()
    assert (one / "checkpoints" / "9").is_dir(), "what is further stays"
    Mirror("memory://b/run", one).send()
    third = tmp_path / "third"
    checkpoint(third, 5, 0)  # behind the bucket: brought up to it
    Mirror("memory://b/run", third).bring()
    assert damage(third / "checkpoints" / "9") is None


@pytest.mark.parametrize("killed", [False, True])
def test_a_file_that_is_removed_here_goes_from_the_bucket_and_no_other_does(
    memory: Callable[[], Files], tmp_path, killed: bool
) -> None:
    """Such as a list of what is not scored yet; also where another process of this folder has sent it."""
    MemoryFileSystem().pipe_file("b/out/.of_somebody", b"x")
    (tmp_path / "series").mkdir()
    for name in ("log.jsonl", "series/order.json", "series/a.parquet"):
        (tmp_path / name).write_text(name)
    mirror = Mirror("memory://b/out", tmp_path)
    mirror.send()
    if killed:
        mirror = Mirror("memory://b/out", tmp_path)
        mirror.bring()
    (tmp_path / "series/order.json").unlink()
    MemoryFileSystem().pipe_file("b/out/series/of_another_machine", b"x")
    mirror.send()
    left = {".of_somebody", "log.jsonl", "series/a.parquet", "series/of_another_machine"}
    assert set(memory()) == {f"b/out/{name}" for name in left}
    staging.shutil.rmtree(tmp_path)
    mirror.send()
    assert len(memory()) == 4, "a disk that is gone removes nothing"


def test_one_machine_writes_an_address(memory: Callable[[], Files], tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(staging, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(staging, "DEAD_SECONDS", 0.5)
    monkeypatch.setattr(staging, "CONFIRM_SECONDS", 0.05)
    with staging._leased("memory://b/x", tmp_path), monkeypatch.context() as patch:
        patch.setattr(staging.socket, "gethostname", lambda: "other")
        with (
            pytest.raises(UserError, match=r"memory://b/x: being written by process \d+ on host .*; wait for it"),
            staging._leased("memory://b/x", tmp_path),
        ):
            pass
    assert "b/x/lease.json" not in memory()
    fsspec.filesystem("memory").pipe_file("b/x/lease.json", b'{"host": "gone", "folder": "f", "process": 1, "beat": 3}')
    began = time.monotonic()
    with staging._leased("memory://b/x", tmp_path):
        assert time.monotonic() - began >= 0.5 and json.loads(memory()["b/x/lease.json"])["host"] != "gone"


def test_a_data_set_is_staged_once(bucket: Files, tmp_path, monkeypatch) -> None:
    numbered(tmp_path / "data", {"train": 7}, 8, 512)
    bucket.update({f"b/data/{name}": content for name, content in files_of(tmp_path / "data").items()})
    data = Data((Source("gs://b/data"),), sequence_length=8)
    fetched: list[str] = []
    real = staging.download
    monkeypatch.setattr(staging, "download", lambda file, target: fetched.append(file.name) or real(file, target))
    for _ in range(2):
        found = open_fitting(Path("gs://b/data"), "--data.sources.0.path", data, 512)
        assert found.read("train", range(7))[:, 0].tolist() == list(range(7))
    assert sorted(fetched) == sorted(name for name in files_of(tmp_path / "data") if name != "metadata.json")
    with pytest.raises(UserError, match="gs://b/nothing: no prepared data set there"):
        open_fitting(Path("gs://b/nothing"), "x", data, 512)


def changes_of(monkeypatch: pytest.MonkeyPatch, kind: str, kill_at: int = 0) -> list[str]:
    """Every change of the bucket from now on, "put_file name"; before that number the process is killed."""
    made: list[str] = []
    system = staging.bucket(f"{kind}://bucket/x")

    def counted(name: str, act: Any, place: int) -> Any:
        def change(*arguments: Any, **options: Any) -> Any:
            made.append(f"{name} {arguments[place].partition('://')[2].partition('/')[2]}")
            if len(made) == kill_at:
                raise Killed
            return act(*arguments, **options)

        return change

    for name, place in (("put_file", 1), ("pipe_file", 0), ("rm_file", 0)):
        monkeypatch.setattr(system, name, counted(name, getattr(system, name), place))
    return made


def lines_and_tokenizer(folder: Path) -> tuple[Path, Path]:
    windows = [[(7 * i + j) % 400 for j in range(9)] for i in range(70)]
    return amber(folder / "lines.jsonl", windows), write_tokenizer(folder / "tokenizer", adds_bos=True)


@pytest.mark.parametrize("kind", ["gs", pytest.param("s3", marks=pytest.mark.slow)])
def test_a_data_set_prepared_into_a_bucket_is_that_of_a_folder(kind: str, tmp_path, monkeypatch, capsys) -> None:
    lines, tokenizer = lines_and_tokenizer(tmp_path)
    command = ["data", "prepare", "amber", str(lines), "--tokenizer", str(tokenizer), "--vocab-size", "512", "--out"]
    place, shape = f"{kind}://bucket/a/data", ["--sequence-length", "8"]
    with google(monkeypatch) if kind == "gs" else amazon(monkeypatch):
        assert main([*command, str(tmp_path / "here"), *shape]) == 0 == main([*command, place, *shape])
        assert f"{place}: prepared (chunk_000: 70 windows)" in capsys.readouterr().out
        system = fsspec.filesystem(kind)
        found = {path.removeprefix("bucket/a/data/"): system.cat_file(path) for path in system.find("bucket/a/data")}
        assert found == files_of(tmp_path / "here")
        for machine in (tmp_path / "staging", tmp_path / "another"):  # which has nothing of it
            monkeypatch.setenv("FINELINE_STAGING", str(machine))
            with monkeypatch.context() as patch:
                changed = changes_of(patch, kind)
                assert main([*command, place, *shape]) == 0
                assert f"{place}: already prepared (chunk_000: 70 windows)" in capsys.readouterr().out
                assert main([*command, place, "--sequence-length", "7"]) == 2
                told = f"{place}: holds a data set of another sequence_length; name another folder or remove it"
                assert capsys.readouterr().err == f"fineline: {told}\n"
            assert {name.rpartition("/")[2] for name in changed} == {"lease.json", "sending.json"}
            assert all(name.startswith("rm_file") for name in changed if name.endswith("sending.json"))
        data = Data((Source(place),), sequence_length=8)
        read = open_fitting(Path(place), "x", data, 512).read("chunk_000", [69, 0])
        assert read.tolist() == [[(7 * i + j) % 400 for j in range(9)] for i in (69, 0)]
        system.pipe_file("bucket/b/notes.txt", b"x")
        assert main([*command, f"{kind}://bucket/b", *shape]) == 2
        assert f"{kind}://bucket/b: exists and is not empty" in capsys.readouterr().err
        assert system.find("bucket/b") == ["bucket/b/notes.txt"]


def test_a_data_set_is_none_until_all_of_it_is_in_the_bucket_and_a_killed_sending_goes_on(
    bucket: Files, tmp_path, monkeypatch
) -> None:
    lines, tokenizer = lines_and_tokenizer(tmp_path)
    options = {"vocab_size": 512, "sequence_length": 8, "tokenizer": tokenizer}
    prepare_amber([lines], tmp_path / "here", **options)
    here, number, resumed = files_of(tmp_path / "here"), 1, 0
    data, reader = Data((Source("gs://b/data"),), sequence_length=8), str(tmp_path / "reader")
    monkeypatch.setattr(staging, "AT_A_TIME", 1)
    while True:
        bucket.clear()
        with monkeypatch.context() as patch:
            changed = changes_of(patch, "gs", kill_at=number)
            with contextlib.suppress(Killed):
                prepare_amber([lines], Path("gs://b/data"), **options)
        if len(changed) < number:
            break
        left = {name.removeprefix("b/data/") for name in bucket}
        with monkeypatch.context() as patch:  # another machine reads all of it, or is told that it is not there
            patch.setenv("FINELINE_STAGING", f"{reader}{number}")
            if "metadata.json" in left:
                assert open_fitting(Path("gs://b/data"), "x", data, 512).read("chunk_000", [69])[0, 0] == 483 % 400
            else:
                with pytest.raises(UserError, match="gs://b/data: no prepared data set there; prepare it with"):
                    open_fitting(Path("gs://b/data"), "x", data, 512)
        with monkeypatch.context() as patch:
            changed = changes_of(patch, "gs")
            assert prepare_amber([lines], Path("gs://b/data"), **options).windows == {"chunk_000": 70}
        sent = {name.removeprefix("put_file ").removeprefix("data/") for name in changed if name.startswith("put_file")}
        assert sent == (set() if "metadata.json" in left else set(here) - left)
        resumed += len(sent) < len(here) - 1
        assert {name.removeprefix("b/data/"): file for name, file in bucket.items()} == here
        number += 1
    assert number > len(here) and resumed > 2


def test_what_another_preparation_left_in_the_bucket_is_not_mixed_with_this_one(bucket: Files, tmp_path) -> None:
    lines, tokenizer = lines_and_tokenizer(tmp_path)
    options = {"vocab_size": 512, "sequence_length": 8, "tokenizer": tokenizer}
    prepare_amber([lines], tmp_path / "here", **options)
    here = files_of(tmp_path / "here")
    for name, content in here.items():  # of the same sizes
        bucket[f"b/data/{name}"] = b"x" * len(content)
    bucket["b/data/sending.json"] = bucket.pop("b/data/metadata.json")
    bucket["b/data/windows-train.array_record-00001-of-00002"] = b"x"
    prepare_amber([lines], Path("gs://b/data"), **options)
    assert {name.removeprefix("b/data/"): content for name, content in bucket.items()} == here


def test_beam_prepares_into_a_bucket_what_this_machine_does(bucket: Files, tmp_path) -> None:
    pytest.importorskip("apache_beam", reason="pip install -e '.[beam]'")
    lines, tokenizer = lines_and_tokenizer(tmp_path)
    options = {"vocab_size": 512, "sequence_length": 8, "tokenizer": tokenizer}
    prepare_amber([lines], tmp_path / "here", **options)
    prepare_amber([lines], Path("gs://b/data"), **options, beam_options="--runner=FnApiRunner")
    assert {name.removeprefix("b/data/"): content for name, content in bucket.items()} == files_of(tmp_path / "here")


def test_another_machine_that_prepares_the_same_address_is_refused(bucket: Files, tmp_path, monkeypatch) -> None:
    lines, tokenizer = lines_and_tokenizer(tmp_path)
    monkeypatch.setattr(staging, "BEAT_SECONDS", 0.05)
    with staging._leased("gs://b/data", tmp_path), monkeypatch.context() as patch:
        patch.setattr(staging.socket, "gethostname", lambda: "other")
        with pytest.raises(
            UserError, match=r"gs://b/data: being written by process \d+ on host .*; wait for it to end"
        ):
            prepare_amber([lines], Path("gs://b/data"), vocab_size=512, sequence_length=8, tokenizer=tokenizer)
    assert not bucket and not list((tmp_path / "staging").rglob("windows-*"))


def recipe_of(data: str) -> Recipe:
    model = ModelConfig(vocab_size=512, width=16, layers=1, heads=2, mlp_width=16, context=96)
    return Recipe(
        "mini", model, Data((Source(data),), sequence_length=8), Batch(4), Optimizer(Schedule()), 32 * 12,
        Checkpoints(every=(Every(96),), latest_every_tokens=32), mesh=MeshShape(fsdp=1),
        compute=Compute(dtype="float32", remat="none"), logging=Logging(tensorboard=False),
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gs", "s3"])
def test_a_run_in_a_bucket_goes_on_on_an_empty_machine_bit_by_bit(kind: str, tmp_path, monkeypatch) -> None:
    windows = [[(7 * i + j) % 400 for j in range(9)] for i in range(70)]
    tokenizer = write_tokenizer(tmp_path / "tokenizer", adds_bos=True)
    local = tmp_path / "data"
    lines = amber(tmp_path / "lines.jsonl", windows)
    prepare_amber([lines], local, vocab_size=512, sequence_length=8, tokenizer=tokenizer)
    recipe = recipe_of(f"{kind}://bucket/data")
    with google(monkeypatch) if kind == "gs" else amazon(monkeypatch):
        system = fsspec.filesystem(kind)
        for name, content in files_of(local).items():
            system.pipe_file(f"bucket/data/{name}", content)
        fineline_jax.pretrain(recipe, f"{kind}://bucket/run", until=32 * 5)
        for number, until in enumerate((32 * 8, None)):
            monkeypatch.setenv("FINELINE_STAGING", str(tmp_path / f"machine{number}"))
            outcome = fineline_jax.pretrain(f"{kind}://bucket/run", until=until)
        assert outcome.step == 12
        whole = tmp_path / "whole"
        fineline_jax.pretrain(dataclasses.replace(recipe, data=recipe_of(str(local)).data), whole)
        fetched = tmp_path / "fetched"
        for path in system.find("bucket/run"):
            target = fetched / path.removeprefix("bucket/run/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(system.cat_file(path))
        parts = sorted((fetched / "metrics").iterdir())
        (fetched / "metrics.jsonl").write_bytes(b"".join(part.read_bytes() for part in parts))
        for extra in (5, 8):  # where it ended for a while
            staging.shutil.rmtree(fetched / "checkpoints" / str(extra))
        assert_same_run(fetched, whole, recipe)
        assert not (fetched / "lease.json").exists()
        series = open_series(f"{kind}://bucket/run", downloads=tmp_path / "downloads", keep=False)
        ours = open_series(str(fetched))
        assert [(one.step, one.tokens) for one in series.checkpoints] == [
            (0, 0), (3, 96), (5, 160), (6, 192), (8, 256), (9, 288), (12, 384),
        ]  # fmt: skip
        one, same = series.checkpoints[1], ours.checkpoints[1]
        assert load.weights_hash(one) == load.weights_hash(same), "known by its record, not fetched"
        assert not (one.location / "params").exists() and load.tokenizer_folder(one) is not None
        load.fetch(one)
        left, right = (load.load(each, make_mesh(MeshShape(fsdp=1), jax.devices()[:1]))[1] for each in (one, same))
        assert all(jax.tree.leaves(jax.tree.map(lambda a, b: (a == b).all().item(), left, right)))
        load.discard(one)
        assert not (one.location / "params").exists()
        if kind == "gs":
            assert main(["pretrain", "gs://bucket/run"]) == 0


ON_TWO_HOSTS = """
import os, sys
import jax
jax.config.update("jax_num_cpu_devices", 1)
from fineline_jax.cli import main
process = str(int(os.fork() == 0))
job = ["--distributed", "--coordinator", sys.argv[1], "--processes", "2", "--process", process]
status = main(["pretrain", *sys.argv[2:], *job])
if process == "1":
    os._exit(status)
sys.exit(status or os.waitstatus_to_exitcode(os.wait()[1]))
"""


@pytest.mark.slow
def test_two_processes_train_on_data_and_into_a_run_of_a_bucket_like_one_with_folders(
    bucket: Files, tmp_path, monkeypatch
) -> None:
    """They read what was prepared into the bucket on another machine, end half-way, and go on on an empty one."""
    lines, tokenizer = lines_and_tokenizer(tmp_path)
    options = {"vocab_size": 512, "sequence_length": 8, "tokenizer": tokenizer}
    prepare_amber([lines], Path("gs://bucket/data"), **options)
    prepare_amber([lines], tmp_path / "data", **options)
    fineline_jax.pretrain(recipe_of(str(tmp_path / "data")), tmp_path / "whole")
    recipe = dataclasses.replace(recipe_of("gs://bucket/data"), mesh=MeshShape(fsdp=2))
    (tmp_path / "recipe.json").write_text(to_json(recipe))
    monkeypatch.setenv("FSSPEC_GS_TOKEN", "anon")
    for machine, arguments in (
        ("one", [str(tmp_path / "recipe.json"), "--run", "gs://bucket/run", "--until", str(32 * 5)]),
        ("two", ["gs://bucket/run"]),
    ):
        monkeypatch.setenv("FINELINE_STAGING", str(tmp_path / machine))
        done = in_a_process(ON_TWO_HOSTS, f"127.0.0.1:{free_port()}", *arguments)
        assert done.returncode == 0, done.stderr
    mirror = Mirror("gs://bucket/run", tmp_path / "none")
    mirror.there = set(staging.files_in("gs://bucket/run"))
    ours, whole = (
        [line for line in map(json.loads, content.splitlines()) if "loss" in line]
        for content in (mirror._metrics(), (tmp_path / "whole" / "metrics.jsonl").read_bytes())
    )
    assert [line["step"] for line in ours] == [line["step"] for line in whole] and ours[-1]["step"] == 12
    losses = ([line["loss"] for line in lines] for lines in (ours, whole))
    np.testing.assert_allclose(*losses, rtol=1e-5)
    assert whole_in(bucket, "bucket/run") == dict.fromkeys((0, 3, 5, 6, 9, 12), True)
    assert "bucket/run/lease.json" not in bucket


def test_scores_in_a_bucket_are_those_of_a_folder_and_are_scored_once(bucket: Files, tmp_path, monkeypatch, capsys):
    tokenizer = write_tokenizer(tmp_path / "tokenizer", adds_bos=True)
    series = make_series(tmp_path / "series", tokenizer, (1, 2))
    benchmarks = write_benchmarks(tmp_path / "benchmarks", documents=4)
    fineline_jax.prepare_pack("piqa", tokenizer, tmp_path / "pack", benchmarks=benchmarks)
    command = ["score", str(series), "--pack", f"{tmp_path}/pack", "--out"]
    assert main([*command, str(tmp_path / "here")]) == 0 == main([*command, "gs://b/scores"])
    there = {name.removeprefix("b/scores/"): content for name, content in bucket.items()}
    here = files_of(tmp_path / "here")
    assert {name for name in there} == set(here)
    assert all(there[name] == here[name] for name in here if name.startswith("series/"))
    monkeypatch.setenv("FINELINE_STAGING", str(tmp_path / "another"))
    before = dict(bucket)
    assert main([*command, "gs://b/scores"]) == 0 and before == bucket


def test_recipe_json_holds_the_address(tmp_path) -> None:
    recipe = recipe_of("gs://b/data")
    assert '"path": "gs://b/data"' in to_json(recipe)
    assert recipe.data.sources[0].tokenizer == tmp_path / "staging" / "gs" / "b" / "data" / "tokenizer"
