"""A series is scored once: whatever happens meanwhile, finished checkpoints stay and none is half there."""

import json
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scoring_examples import score_series, write_benchmarks, write_tokenizer
from series_examples import make_series, one_device

from fineline_jax import prepare_pack
from fineline_jax.checkpoints import load as checkpoint_load
from fineline_jax.checkpoints.open import open_series
from fineline_jax.errors import UserError
from fineline_jax.scoring import score_files
from fineline_jax.scoring.engine import step as engine_step
from fineline_jax.scoring.engine import tree_engine
from fineline_jax.scoring.job_shard import JobShard, job_shard
from fineline_jax.scoring.options import ScoreOptions
from fineline_jax.scoring.requests import pack
from fineline_jax.scoring.series import score_series as series_loop


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizers") / "bpe", adds_bos=True)


@pytest.fixture(scope="module")
def made(tokenizer, tmp_path_factory) -> pack.Pack:
    folder = tmp_path_factory.mktemp("pack")
    benchmarks = write_benchmarks(folder / "benchmarks", documents=6)
    return prepare_pack("piqa,arc_easy", tokenizer, folder / "p", benchmarks=benchmarks)


@pytest.fixture(scope="module")
def released(tokenizer, tmp_path_factory) -> Path:
    return make_series(tmp_path_factory.mktemp("series") / "run", tokenizer, (1, 2, 3))


@pytest.fixture
def run(released, tmp_path) -> Path:
    """A copy to damage."""
    copy = tmp_path / "run"
    for source in released.rglob("*"):
        if source.is_file():
            target = copy / source.relative_to(released)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    return copy


def score(run: Path, made: pack.Pack, out: Path) -> list[Path]:
    return score_series(open_series(str(run)), made, out, one_device())


def count_calls(monkeypatch, owner, name: str) -> list[str]:
    """The names of the checkpoints that `owner.name` is called with, from now on."""
    calls: list[str] = []
    original = getattr(owner, name)

    def counted(first, *arguments, **options):
        calls.append(getattr(first, "name", ""))
        return original(first, *arguments, **options)

    monkeypatch.setattr(owner, name, counted)
    return calls


def test_a_checkpoint_that_cannot_be_opened_is_passed_over_and_named(run, made, tmp_path, monkeypatch):
    weights = run / "step2/model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(series_loop.NotAllScored, match=r"1 checkpoint .* run/step2 \(.*safetensors.*others are scored"):
        score(run, made, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out/run").glob("*.parquet")) == ["step1.parquet", "step3.parquet"]
    weights.write_bytes(whole)
    calls = count_calls(monkeypatch, series_loop, "make_scorer")
    assert len(score(run, made, tmp_path / "out")) == 3
    assert len(calls) == 1


def test_a_checkpoint_whose_config_is_damaged_is_passed_over_too(run, made, tmp_path):
    """transformers reads it when it opens the tokenizer; that is not another tokenizer, which would end the series."""
    (run / "step2/config.json").write_text("{")
    refused = r"1 checkpoint .* run/step2 \(.*config\.json.*others are scored"
    with pytest.raises(series_loop.NotAllScored, match=refused):
        score(run, made, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out/run").glob("*.parquet")) == ["step1.parquet", "step3.parquet"]


def test_two_checkpoints_of_one_name_are_not_written_into_one_file(run, made, tmp_path):
    again = make_series(tmp_path / "elsewhere" / "run", run / "step1", (1,))
    found = [open_series(str(folder)) for folder in (run, again)]
    with pytest.raises(UserError, match=r"are both called run/step1, and their scores would be one file; rename"):
        series_loop.SeriesScorer(made, tmp_path / "scores", one_device())(found)
    assert not (tmp_path / "scores").exists()
    score_files.check_unique_names([found[0], found[0]])  # the same place twice is no matter


def test_unchanged_weights_are_not_even_read(run, made, tmp_path, monkeypatch):
    files = score(run, made, tmp_path / "out")
    read, scored = (
        count_calls(monkeypatch, *where) for where in ((checkpoint_load, "weights_hash"), (series_loop, "make_scorer"))
    )
    before = [path.read_bytes() for path in files]
    score(run, made, tmp_path / "out")
    assert read == []
    assert [path.read_bytes() for path in files] == before
    os.utime(run / "step2/model.safetensors", ns=(0, 0))
    score(run, made, tmp_path / "out")
    assert (read, scored) == (["step2"], []), "the same content with another time is read once and not scored"
    score(run, made, tmp_path / "out")
    assert read == ["step2"]


def test_the_next_checkpoint_is_opened_while_one_is_scored_and_two_are_the_most(released, made, tmp_path, monkeypatch):
    alive: list[tuple[str, jax.Array]] = []
    most: list[int] = []
    names = ["step1", "step3", "step2"]  # coarse to fine
    loading = {name: threading.Event() for name in names}
    load, make_scorer = checkpoint_load.load, series_loop.make_scorer

    def watched_load(checkpoint, *arguments):
        config, params = load(checkpoint, *arguments)
        alive.append((checkpoint.name, params["embed"]))
        most.append(sum(not array.is_deleted() for _, array in alive))
        loading[checkpoint.name].set()
        return config, params

    def watched_scorer(*arguments, **options):
        score = make_scorer(*arguments, **options)

        def watched_score(params, advance):
            name = next(name for name, array in reversed(alive) if array is params["embed"])
            for following in names[names.index(name) + 1 :][:1]:
                assert loading[following].wait(60), f"{following} is not read while {name} is scored"
            return score(params, advance)

        return watched_score

    monkeypatch.setattr(checkpoint_load, "load", watched_load)
    monkeypatch.setattr(series_loop, "make_scorer", watched_scorer)
    score(released, made, tmp_path / "out")
    assert max(most) == 2


def test_one_program_is_compiled_for_all_checkpoints(released, made, tmp_path, monkeypatch):
    steps: list[Any] = []

    def made_step(*arguments: Any) -> Any:
        steps.append(engine_step.tree_step(*arguments))
        return steps[-1]

    monkeypatch.setattr(tree_engine, "tree_step", made_step)
    assert len(score(released, made, tmp_path / "out")) == 3
    assert [step._cache_size() for step in steps] == [1]


def test_a_file_appears_whole_or_not_at_all(released, made, tmp_path, monkeypatch):
    score(released, made, tmp_path / "out")
    for path in (tmp_path / "out/run").iterdir():
        path.unlink()
    write_table = score_files.pq.write_table

    def die(table, file, **options):
        file.write_bytes(b"PAR1 half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(score_files.pq, "write_table", die)
    with pytest.raises(KeyboardInterrupt):
        score(released, made, tmp_path / "out")
    assert not list((tmp_path / "out/run").glob("[!.]*"))
    monkeypatch.setattr(score_files.pq, "write_table", write_table)
    score(released, made, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out/run").iterdir()) == [f"step{i}.parquet" for i in (1, 2, 3)]


# Parts


@given(items=st.lists(st.integers()), count=st.integers(1, 12), shift=st.integers(0, 5))
def test_parts_are_disjoint_complete_and_even(items, count, shift):
    named = list(enumerate(items))
    parts = [JobShard(index, count).of(named, shift) for index in range(count)]
    assert sorted(item for part in parts for item in part) == named
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(items=st.lists(st.integers(), min_size=1), more=st.lists(st.integers()), count=st.integers(1, 5))
def test_a_part_keeps_its_items_when_the_series_grows(items, more, count):
    for index in range(count):
        before = JobShard(index, count).of(list(enumerate(items)))
        assert JobShard(index, count).of(list(enumerate(items + more)))[: len(before)] == before


ARRAY = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": "4"}
POD = {"TPU_WORKER_ID": "2", "TPU_WORKER_HOSTNAMES": "a,b,c,d"}


@pytest.mark.parametrize(
    ("text", "environment", "part"),
    [
        (None, ARRAY, JobShard(0, 1)),
        ("2/8", {}, JobShard(1, 8)),
        ("auto", ARRAY | {"SLURM_ARRAY_TASK_STEP": "2"}, JobShard(3, 4)),
        ("auto", {"JOB_COMPLETION_INDEX": "0", "JOB_COMPLETIONS": "3"}, JobShard(0, 3)),
        ("auto/3", {"JOB_COMPLETION_INDEX": "2"}, JobShard(2, 3)),
        ("auto", {"BATCH_TASK_INDEX": "1", "BATCH_TASK_COUNT": "2"}, JobShard(1, 2)),
        ("auto", POD, JobShard(2, 4)),
        ("auto/4", {"CLOUD_TPU_TASK_ID": "3"}, JobShard(3, 4)),
        ("auto", {"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, JobShard(1, 2)),
    ],
)
def test_a_part_is_read_from_the_flag_or_the_job(text, environment, part):
    assert job_shard(text, environment) == part


@pytest.mark.parametrize(
    ("text", "environment", "message"),
    [
        ("0/4", {}, "from 1"),
        ("5/4", {}, "from 1"),
        ("third", {}, "I/N"),
        ("auto", {}, "no job index"),
        ("auto", {"JOB_COMPLETION_INDEX": "2"}, "does not say of how many"),
        ("auto/2", {"JOB_COMPLETION_INDEX": "2"}, "part 3 of 2"),
        ("auto/3", ARRAY | {"SLURM_ARRAY_TASK_ID": "2"}, "there are 4 parts"),
        ("auto", ARRAY, "gaps"),
    ],
)
def test_a_part_that_cannot_be_told_is_refused(text, environment, message):
    with pytest.raises(UserError, match=message):
        job_shard(text, environment)


def test_workers_of_one_distributed_job_are_no_parts():
    with pytest.raises(UserError, match="no job index"):
        job_shard("auto", POD, distributed=True)
    assert job_shard("auto", ARRAY | POD | {"SLURM_ARRAY_TASK_ID": "2"}, distributed=True) == JobShard(1, 4)


def test_the_parts_together_are_the_series(released, made, tmp_path):
    opened = open_series(str(released))
    for index in range(2):
        options = ScoreOptions(part=f"{index + 1}/2")
        score_series(opened, made, tmp_path / "parts", one_device(), options)
    whole = score(released, made, tmp_path / "whole")
    assert [(tmp_path / "parts/run" / path.name).read_bytes() for path in whole] == [p.read_bytes() for p in whole]


# Processes


def command(run: Path, packed: Path, out: Path) -> list[str]:
    return ["score", str(run), "--pack", str(packed), "--out", str(out)]


@pytest.mark.slow
def test_sigkill_at_random_moments_leaves_whole_files_only(tokenizer, tmp_path):
    benchmarks = write_benchmarks(tmp_path / "benchmarks", documents=40)
    prepare_pack("piqa,arc_easy,winogrande", tokenizer, tmp_path / "p", benchmarks=benchmarks)
    run = make_series(tmp_path / "run", tokenizer, tuple(range(1, 21)))
    # Commands on both sides: they divide the work over other devices than this process would, and bytes are compared.
    environment = os.environ | {"XLA_FLAGS": ""}
    arguments = [sys.executable, "-m", "fineline_jax", *command(run, tmp_path / "p", tmp_path / "killed")]
    uninterrupted = [*arguments[:-1], str(tmp_path / "whole")]
    subprocess.run(uninterrupted, env=environment, check=True, capture_output=True)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole/run").iterdir()}
    assert len(whole) == 20
    out, moments = tmp_path / "killed/run", random.Random(5)
    kept: dict[str, tuple[int, bytes]] = {}
    stopped_early = 0
    for _ in range(3):
        process = subprocess.Popen(arguments, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while process.poll() is None and len(list(out.glob("[!.]*.parquet"))) <= len(kept):
            time.sleep(0.01)
        time.sleep(moments.random() * 0.3)
        stopped_early += process.poll() is None
        process.kill()
        process.wait()
        now = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.glob("[!.]*.parquet")}
        assert kept.items() <= now.items(), "a finished file was written again"
        assert all(data == whole[name] for name, (_, data) in now.items()), "a file is not whole"
        kept = now
    assert stopped_early, "every kill came too late"
    subprocess.run(arguments, env=environment, check=True, capture_output=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == whole
    assert all((out / name).stat().st_mtime_ns == written for name, (written, _) in kept.items())
    lines = [json.loads(line)["checkpoint"] for line in (tmp_path / "killed/log.jsonl").read_text().splitlines()]
    assert len(lines) <= len(whole) + 3, "only what a kill interrupted was scored again"


@pytest.mark.slow
def test_two_processes_of_two_devices_score_like_one_device(run, made, tmp_path):
    (run / "step2/model.safetensors").write_bytes(b"no weights")
    pack.save(made, tmp_path / "p")
    with pytest.raises(series_loop.NotAllScored):
        score(run, made, tmp_path / "one")
    program = (
        "import sys, jax; jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]));"
        "from fineline_jax.cli import main; sys.exit(main(sys.argv[3:]))"
    )
    port = 20_000 + os.getpid() % 20_000
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    arguments = [*command(run, tmp_path / "p", tmp_path / "two"), "--mesh.fsdp", "2", "--mesh.tensor", "2"]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, f"127.0.0.1:{port}", str(index), *arguments],
            env=os.environ | flags,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    errors = [process.communicate(timeout=400)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 1], errors
    assert all("step2" in error for error in errors)
    for name in ("step1", "step3"):
        one, two = (score_files.read(tmp_path / where / f"run/{name}.parquet") for where in ("one", "two"))
        assert one.header == two.header
        np.testing.assert_allclose(two.loglikelihood, one.loglikelihood, atol=1e-5)
        np.testing.assert_array_equal(two.is_greedy, one.is_greedy)
