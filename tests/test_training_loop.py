"""A run is a function of (recipe, seed, step): however it is interrupted, what it leaves behind is the same."""

import contextlib
import dataclasses
import gc
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import tensorflow_datasets as tfds
from commands import assert_same_run, lines_of, start, wait_for_step
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fineline_jax.checkpoints.series import Checkpoint, load, open_series
from fineline_jax.data.corpora import prepare_amber
from fineline_jax.errors import UserError
from fineline_jax.mesh import make_mesh
from fineline_jax.models import attention, decoder
from fineline_jax.models.config import ModelConfig
from fineline_jax.recipe import (
    Batch,
    Checkpoints,
    Compute,
    Data,
    Every,
    Logging,
    Mesh,
    Optimizer,
    Recipe,
    Schedule,
    Source,
    to_json,
)
from fineline_jax.training import loop
from fineline_jax.training.metrics import MetricsLog, cut_behind, read_metrics

STEPS, SEQUENCES, LENGTH = 24, 4, 8
ONE_DEVICE = Mesh(fsdp=1)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    tokens = np.random.default_rng(0)
    files = []
    for name, count in (("train_0", 70), ("train_1", 50), ("validation", 8)):
        files.append(folder / f"{name}.jsonl")
        rows = tokens.integers(0, 32, (count, LENGTH + 1)).tolist()
        files[-1].write_text("".join(json.dumps({"token_ids": row, "source": "x"}) + "\n" for row in rows))
    out = folder / "data"
    prepare_amber(files[:2], out, vocab_size=32, sequence_length=LENGTH, validation_inputs=files[2:])
    return out


def recipe_of(corpus: Path, **changes) -> Recipe:
    tokens_per_step = SEQUENCES * LENGTH
    values = {
        "name": "loop",
        "model": ModelConfig(vocab_size=32, width=8, layers=1, heads=2, mlp_width=16, context=LENGTH),
        "data": Data((Source(str(corpus)),), sequence_length=LENGTH, order="chunks"),
        "batch": Batch(SEQUENCES),
        "optimizer": Optimizer(Schedule(peak=1e-2, warmup_tokens=3 * tokens_per_step)),
        "tokens": STEPS * tokens_per_step,
        "checkpoints": Checkpoints(every=(Every(8 * tokens_per_step),), latest_every_tokens=3 * tokens_per_step),
        "mesh": ONE_DEVICE,
        "compute": Compute(dtype="float32", remat="none"),
        "logging": Logging(tensorboard=False, validation_sequences=4),
    }
    return Recipe(**(values | changes))


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Runs in this process use one device unless a test says otherwise."""
    real = loop.make_mesh
    monkeypatch.setattr(loop, "make_mesh", lambda mesh: real(mesh, jax.devices()[:1] if mesh == ONE_DEVICE else None))


@pytest.fixture(scope="module")
def uninterrupted(corpus, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        real = loop.make_mesh
        patch.setattr(loop, "make_mesh", lambda mesh: real(mesh, jax.devices()[:1]))
        outcome = loop.pretrain(recipe_of(corpus), run)
    assert (outcome.step, outcome.stopped_by) == (STEPS, None)
    return run


class Killed(Exception):
    pass


def test_a_run_keeps_its_scheduled_checkpoints_and_logs_every_step(uninterrupted):
    names = [checkpoint.step for checkpoint in open_series(str(uninterrupted)).checkpoints]
    assert names == [0, 8, 16, 24]
    lines = read_metrics(uninterrupted)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines if "validation_loss" in line] == [0, 8, 16, 24]
    assert all(line["tokens"] == line["step"] * SEQUENCES * LENGTH for line in lines if "loss" in line)


def test_threads_that_begin_while_a_profile_is_taken_are_not_hooked(corpus, tmp_path):
    profiler = loop.Profiler(recipe_of(corpus, logging=Logging(profile_start_step=2, profile_steps=2)), tmp_path)
    profiler.before(2)
    try:
        assert threading.getprofile() is None and sys.getprofile() is None
    finally:
        profiler.close()


def test_the_recipe_chooses_profile_tensorboard_and_the_peak_of_the_mfu(corpus, tmp_path):
    peak = 0.01
    logging = Logging(validation_sequences=4, profile_start_step=2, profile_steps=2, peak_tflops=peak)
    recipe = recipe_of(corpus, tokens=6 * SEQUENCES * LENGTH, logging=logging)
    loop.pretrain(recipe, tmp_path / "run")

    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb")), "no trace was written"
    lines = [line for line in read_metrics(tmp_path / "run") if "loss" in line]
    # One layer of width 8 with 2 heads of 4, a SwiGLU of 16, the head of 32 ids; the embedding is a look-up.
    weights = 4 * 8 * 8 + 3 * 8 * 16 + 2 * 8 + 8 + 8 * 32
    flops = 6 * weights + 6 * 1 * 2 * 4 * LENGTH
    for line in lines:
        assert line["mfu"] == pytest.approx(line["tokens_per_second"] * flops / (peak * 1e12))
        assert line["data_wait_seconds"] >= 0
    shown = scalars(tmp_path / "run" / "tensorboard")
    assert [shown["loss", line["step"]] for line in lines] == pytest.approx([line["loss"] for line in lines])
    assert ("validation_loss", 0) in shown and ("mfu", 6) in shown


def scalars(folder: Path) -> dict[tuple[str, int], float]:
    """(name, step) -> value of TensorBoard's event files: records of length (8 bytes), 4 bytes, event, 4 bytes."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for file in folder.glob("events*"):
        data, place = file.read_bytes(), 0
        while place < len(data):
            size = int.from_bytes(data[place : place + 8], "little")
            event = Event.FromString(data[place + 12 : place + 12 + size])
            found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
            place += 16 + size
    return found


@given(points=st.lists(st.integers(0, STEPS - 1), min_size=1, max_size=3, unique=True))
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_point_of_interruption_resumes_bitwise(points, corpus, uninterrupted, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "resumed"
    for point in sorted(points):

        def die(step, point=point):
            if step >= point:
                raise Killed

        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            patch.setattr(loop, "stop_requests", lambda: contextlib.nullcontext(die))
            loop.pretrain(recipe_of(corpus), run)
    loop.pretrain(recipe_of(corpus), run)
    assert_same_run(run, uninterrupted, recipe_of(corpus))


def test_a_finished_run_is_left_alone(corpus, uninterrupted):
    before = lines_of(uninterrupted)
    assert loop.pretrain(recipe_of(corpus), uninterrupted).step == STEPS
    assert lines_of(uninterrupted) == before


def test_a_changed_recipe_is_refused_with_its_fields_unless_accepted(corpus, tmp_path):
    run = tmp_path / "run"
    short = recipe_of(corpus, tokens=4 * SEQUENCES * LENGTH)
    loop.pretrain(short, run)
    longer = dataclasses.replace(short, seed=5, tokens=6 * SEQUENCES * LENGTH)
    with pytest.raises(UserError, match=r"recipe\.json: the recipe has changed \(tokens: 128 -> 192; seed: 0 -> 5\)"):
        loop.pretrain(longer, run)
    assert json.loads((run / "recipe.json").read_text())["seed"] == 0
    assert loop.pretrain(longer, run, accept_changes=True).step == 6
    assert json.loads((run / "recipe.json").read_text())["seed"] == 5


def test_a_recipe_of_which_nothing_is_saved_yet_may_be_changed(corpus, tmp_path):
    loop.claim_folder(recipe_of(corpus), tmp_path / "run", {"data": "1"}, accept_changes=False)
    loop.claim_folder(recipe_of(corpus, seed=5), tmp_path / "run", {"data": "2"}, accept_changes=False)
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["seed"] == 5


def test_other_data_at_the_same_path_are_refused_unless_accepted(tmp_path):
    lines, place, run = tmp_path / "train_0.jsonl", tmp_path / "data", tmp_path / "run"

    def prepare(seed: int) -> None:
        rows = np.random.default_rng(seed).integers(0, 32, (40, LENGTH + 1)).tolist()
        lines.write_text("".join(json.dumps({"token_ids": row}) + "\n" for row in rows))
        shutil.rmtree(place, ignore_errors=True)
        prepare_amber([lines], place, vocab_size=32, sequence_length=LENGTH)

    recipe = recipe_of(place, tokens=4 * SEQUENCES * LENGTH, checkpoints=Checkpoints(initial=False))
    prepare(0)
    loop.pretrain(recipe, run)
    prepare(0)  # the same again
    assert loop.pretrain(recipe, run).step == 4
    prepare(1)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"data: holds other data than .*run was trained on; .* give --accept-changes"):
        loop.pretrain(recipe, run)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert loop.pretrain(recipe, run, accept_changes=True).step == 4
    assert loop.pretrain(recipe, run).step == 4  # these are the run's data now
    (run / "data.json").write_text("[1")
    with pytest.raises(UserError, match=r"data\.json: not the record of a run's data sets .* delete it"):
        loop.pretrain(recipe, run)


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_used(corpus, uninterrupted, tmp_path, caplog):
    run = tmp_path / "run"
    loop.pretrain(recipe_of(corpus), run)
    victim = max((run / "checkpoints" / "24").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    victim.write_bytes(victim.read_bytes()[:-7])
    loop.pretrain(recipe_of(corpus), run)
    assert "24 is damaged" in caplog.text
    assert_same_run(run, uninterrupted, recipe_of(corpus))


def test_another_mesh_sees_the_same_data_and_the_same_losses_to_rounding(corpus, uninterrupted, tmp_path):
    run = tmp_path / "run"
    loop.pretrain(recipe_of(corpus, mesh=Mesh(replica=2, fsdp=2, tensor=2)), run)
    ours = [line["loss"] for line in lines_of(run) if "loss" in line]
    whole = [line["loss"] for line in lines_of(uninterrupted) if "loss" in line]
    np.testing.assert_allclose(ours, whole, rtol=1e-5)


def test_a_run_goes_on_on_another_mesh_with_the_same_data(corpus, uninterrupted, tmp_path):
    def die(step):
        if step >= 10:
            raise Killed

    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop, "stop_requests", lambda: contextlib.nullcontext(die))
        loop.pretrain(recipe_of(corpus), run)
    loop.pretrain(recipe_of(corpus, mesh=Mesh(replica=2, fsdp=2, tensor=2)), run)
    ours, whole = lines_of(run), lines_of(uninterrupted)
    assert [line["step"] for line in ours] == [line["step"] for line in whole]
    losses = ([line["loss"] for line in lines if "loss" in line] for lines in (ours, whole))
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_a_loss_that_is_not_finite_stops_the_run_by_name(corpus, tmp_path):
    wild = Optimizer(Schedule(peak=1e30, kind="constant"), clip_norm=1e30)
    with pytest.raises(UserError, match=r"the loss of step \d+ is (nan|inf)"):
        loop.pretrain(recipe_of(corpus, optimizer=wild), tmp_path / "run")
    steps = [checkpoint.step for checkpoint in open_series(str(tmp_path / "run")).checkpoints]
    assert steps == [0], "a state that is not finite was kept"


def test_what_is_not_finite_can_be_skipped_and_every_skipped_step_is_counted_in_the_log(corpus, tmp_path):
    # The first update makes weights of 1e30; with them no gradient is finite, and no later update may touch anything.
    wild = Optimizer(Schedule(peak=1e30, kind="constant"), clip_norm=1e30, skip_nonfinite=True)
    recipes = [recipe_of(corpus, optimizer=wild, tokens=steps * SEQUENCES * LENGTH) for steps in (6, 1)]
    for recipe, name in zip(recipes, ("run", "one"), strict=True):
        assert loop.pretrain(recipe, tmp_path / name).step == recipe.steps
    lines = [line for line in lines_of(tmp_path / "run") if "loss" in line]
    assert [line["skipped"] for line in lines] == [0, 1, 2, 3, 4, 5]
    bad = [None in (line["loss"], line["gradient_norm"]) for line in lines]
    assert bad == [False, True, True, True, True, True]
    last, first = (params_of(open_series(str(tmp_path / name)).checkpoints[-1]) for name in ("run", "one"))
    jax.tree.map(np.testing.assert_array_equal, last, first)


def params_of(checkpoint: Checkpoint) -> dict:
    return load(checkpoint, make_mesh(ONE_DEVICE, jax.devices()[:1]))[1]


def test_the_validation_loss_is_the_mean_cross_entropy_of_the_first_windows(corpus, uninterrupted):
    source = tfds.builder_from_directory(corpus).as_data_source("validation")
    windows = jnp.asarray(np.stack([source[i]["tokens"] for i in range(4)]), jnp.int32)
    logged = {
        line["step"]: line["validation_loss"] for line in read_metrics(uninterrupted) if "validation_loss" in line
    }
    model = recipe_of(corpus).model
    for checkpoint in open_series(str(uninterrupted)).checkpoints:
        with jax.set_mesh(make_mesh(ONE_DEVICE, jax.devices()[:1])):
            params, places = params_of(checkpoint), jnp.broadcast_to(jnp.arange(LENGTH), (4, LENGTH))
            hidden = decoder.hidden_states(model, params, windows[:, :-1], places, attention.causal("reference"))
            logits = np.asarray(hidden @ decoder.head_weight(model, params), np.float64)
        logp = scipy.special.log_softmax(logits, axis=-1)
        expected = -np.take_along_axis(logp, np.asarray(windows)[:, 1:, None], axis=-1).mean()
        assert logged[checkpoint.step] == pytest.approx(expected, rel=1e-5)


def test_the_metrics_of_a_step_are_read_when_the_next_one_is_under_way(corpus):
    read: list[int] = []

    class Metric:
        """A number that has to be waited for."""

        def __init__(self, step: int):
            self.step = step

        def __float__(self) -> float:
            read.append(self.step)
            return float(self.step)

    written: list[dict] = []
    writer = cast(MetricsLog, types.SimpleNamespace(write=written.append))
    report = loop.Reporter(recipe_of(corpus), make_mesh(ONE_DEVICE, jax.devices()[:1]), writer, start=0)
    for step in (1, 2, 3):
        report.step(step, cast(dict, {"loss": Metric(step)}), waited=0.0)
        assert read == list(range(1, step)), "the host waited for a step that had only begun"
    report.flush()
    assert [(line["step"], line["loss"]) for line in written] == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_lines_behind_the_checkpoint_and_a_line_cut_short_are_removed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    cut_behind(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_lines_that_are_none_are_removed_on_resume_and_named_by_readers(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n[2]\n{"loss": 2.0}\n{"step": 2}\n{"step": 3')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: no line of metrics \(it has no step\); remove it"):
        read_metrics(tmp_path)
    cut_behind(path, 2)
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 2}]
    path.write_text('{"step": 1}\n{"step": 2')  # as one may find it while the run goes on
    assert read_metrics(tmp_path) == [{"step": 1}]


def test_zeros_that_a_crash_of_the_machine_left_are_removed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + bytes(40) + b"\n")
    cut_behind(path, 2)
    assert path.read_text() == '{"step": 1}\n'


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_is_said_once_by_the_name_of_the_metrics_file(corpus, tmp_path):
    log = MetricsLog(tmp_path, recipe_of(corpus), None)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, log.file.fileno())
    os.close(full)
    with pytest.raises(UserError, match=r"metrics\.jsonl: No space left on device; .* run the same command again"):
        log.write({"step": 1, "loss": 2.0})
    log.close()
    del log
    gc.collect()


def test_sigterm_saves_and_exits_0_and_the_run_goes_on(corpus, tmp_path):
    long = recipe_of(corpus, tokens=20_000 * SEQUENCES * LENGTH, checkpoints=Checkpoints())
    (tmp_path / "recipe.json").write_text(to_json(long))
    run = tmp_path / "run"
    process = start(["pretrain", str(tmp_path / "recipe.json"), "--run", str(run)])
    wait_for_step(run, 10, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "stopped by SIGTERM at step" in out
    lines = [line for line in lines_of(run) if "loss" in line]
    stopped = lines[-1]["step"]
    assert str(stopped) in os.listdir(run / "checkpoints")
    shorter = dataclasses.replace(long, tokens=(stopped + 3) * SEQUENCES * LENGTH)
    assert loop.pretrain(shorter, run, accept_changes=True).step == stopped + 3
    assert [line["step"] for line in lines_of(run) if "loss" in line] == list(range(1, stopped + 4))


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_written_is_said_in_one_line(corpus, tmp_path):
    wide = ModelConfig(vocab_size=32, width=128, layers=1, heads=2, mlp_width=256, context=LENGTH)
    (tmp_path / "recipe.json").write_text(to_json(recipe_of(corpus, model=wide)))
    command = [sys.executable, "-m", "fineline_jax.cli", "pretrain", "recipe.json", "--run", "run"]
    variables = os.environ | {"XLA_FLAGS": "", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    limited = ["bash", "-c", 'ulimit -f 100; exec "$@"', "bash", *command]  # no file above 100 KiB
    done = subprocess.run(limited, cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert re.search(
        r"^fineline: .*run/checkpoints/\d+: the checkpoint could not be written", done.stderr, re.MULTILINE
    )
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "run" / "checkpoints").glob("*/complete.json"))


@pytest.mark.slow
def test_five_sigkills_at_random_moments_leave_no_trace(corpus, tmp_path):
    steps = 400
    recipe = recipe_of(
        corpus,
        tokens=steps * SEQUENCES * LENGTH,
        checkpoints=Checkpoints(every=(Every(40 * SEQUENCES * LENGTH),), latest_every_tokens=9 * SEQUENCES * LENGTH),
    )
    (tmp_path / "recipe.json").write_text(to_json(recipe))
    arguments = ["pretrain", str(tmp_path / "recipe.json"), "--run"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = start([*arguments, str(whole)])
    assert process.wait(300) == 0
    moments = random.Random(7)
    for _ in range(5):
        process = start([*arguments, str(killed)])
        done = len(read_metrics(killed)) if killed.exists() else 0
        wait_for_step(killed, min(done + moments.randrange(20, 80), steps - 1), process)
        time.sleep(moments.random() * 0.2)
        process.kill()
        process.wait()
    process = start([*arguments, str(killed)])
    assert process.wait(300) == 0
    assert_same_run(killed, whole, recipe)


@pytest.mark.slow
@pytest.mark.parametrize("begun", [False, True], ids=["from the start", "resumed from one process"])
def test_two_processes_of_two_devices_train_like_one_device(begun, corpus, uninterrupted, tmp_path):
    with_mesh = recipe_of(corpus, mesh=Mesh(fsdp=4))
    (tmp_path / "recipe.json").write_text(to_json(with_mesh))
    program = (
        "import sys, jax; jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]));"
        "from fineline_jax.cli import main; sys.exit(main(sys.argv[3:]))"
    )
    run, port = tmp_path / "run", 20_000 + os.getpid() % 20_000
    if begun:

        def die(step):
            if step >= 10:
                raise Killed

        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            patch.setattr(loop, "stop_requests", lambda: contextlib.nullcontext(die))
            loop.pretrain(recipe_of(corpus), run)
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    command = ["pretrain", str(tmp_path / "recipe.json"), "--run", str(run)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, f"127.0.0.1:{port}", str(index), *command],
            env=os.environ | flags,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    errors = [process.communicate(timeout=400)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert "rematerialization" not in "".join(errors)
    assert ("resuming" in "".join(errors)) == begun
    assert [line["step"] for line in lines_of(run)] == [line["step"] for line in lines_of(uninterrupted)]
    ours = [line["loss"] for line in lines_of(run) if "loss" in line]
    whole = [line["loss"] for line in lines_of(uninterrupted) if "loss" in line]
    np.testing.assert_allclose(ours, whole, rtol=1e-5)
