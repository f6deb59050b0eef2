"""A run is a function of (history, step): however it is interrupted, what it leaves behind is the same."""

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import tensorflow_datasets as tfds
from commands import assert_same_run, free_port, in_a_process, lines_of, start, wait_for_step
from data_examples import amber

from fineline_jax.checkpoints.load import load
from fineline_jax.checkpoints.open import open_series
from fineline_jax.checkpoints.series import Checkpoint
from fineline_jax.data.corpora import prepare_amber
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
    Loss,
    MeshShape,
    Optimizer,
    Recipe,
    Schedule,
    Source,
    Validation,
    to_json,
)
from fineline_jax.training import loop
from fineline_jax.training.metrics import read_metrics
from fineline_jax.training.schedule import learning_rate

STEPS, SEQUENCES, LENGTH = 24, 4, 8
IGNORED = 5
ONE_DEVICE = MeshShape(fsdp=1)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    tokens = np.random.default_rng(0)
    files = []
    for name, count in (("train_0", 70), ("train_1", 50), ("validation", 8)):
        files.append(folder / f"{name}.jsonl")
        rows = tokens.integers(0, 32, (count, LENGTH + 1))
        if name == "validation":
            rows[:4, 2:7] = IGNORED  # the two batches have unequal numbers of targets
        amber(files[-1], rows.tolist())
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
        "loss": Loss(ignore_token=IGNORED, z_loss=1e-2),
        "mesh": ONE_DEVICE,
        "compute": Compute(dtype="float32", remat="none"),
        "logging": Logging(tensorboard=False, validation=(Validation(windows=8),)),
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
    assert [line["step"] for line in lines if "validation_loss/held_out" in line] == [0, 8, 16, 24]
    assert all(line["tokens"] == line["step"] * SEQUENCES * LENGTH for line in lines if "loss" in line)


def test_what_is_not_finite_can_be_skipped_and_every_skipped_step_is_counted_in_the_log(corpus, tmp_path):
    # The first update makes weights of 1e30; with them no gradient is finite, and no later update may touch anything.
    wild = Optimizer(Schedule(peak=1e30, kind="constant"), clip_norm=1e30, skip_nonfinite=True)
    per_step = SEQUENCES * LENGTH
    kept, quiet = Checkpoints(False, at_tokens=(per_step,)), Logging(tensorboard=False, validation=())
    loop.pretrain(recipe_of(corpus, optimizer=wild, tokens=6 * per_step, checkpoints=kept, logging=quiet), tmp_path)
    lines = lines_of(tmp_path)
    assert [line["skipped"] for line in lines] == [0, 1, 2, 3, 4, 5]
    bad = [None in (line["loss"], line["gradient_norm"]) for line in lines]
    assert bad == [False, True, True, True, True, True]
    first, last = open_series(str(tmp_path)).checkpoints
    assert (first.step, last.step) == (1, 6)
    jax.tree.map(np.testing.assert_array_equal, params_of(first), params_of(last))


def params_of(checkpoint: Checkpoint) -> dict:
    return load(checkpoint, make_mesh(ONE_DEVICE, jax.devices()[:1]))[1]


def test_the_validation_loss_is_the_mean_over_the_targets_of_all_validation_windows(corpus, uninterrupted):
    source = tfds.builder_from_directory(corpus).as_data_source("validation")
    windows = np.stack([source[i]["tokens"] for i in range(8)]).astype(np.int32)
    counted = windows[:, 1:] != IGNORED
    assert counted[:4].sum() < counted[4:].sum() - 10
    key = "validation_loss/held_out"
    logged = {line["step"]: line[key] for line in read_metrics(uninterrupted) if key in line}
    model = recipe_of(corpus).model
    for checkpoint in open_series(str(uninterrupted)).checkpoints:
        with jax.set_mesh(make_mesh(ONE_DEVICE, jax.devices()[:1])):
            params, places = params_of(checkpoint), jnp.broadcast_to(jnp.arange(LENGTH), (8, LENGTH))
            hidden = decoder.hidden_states(model, params, jnp.asarray(windows[:, :-1]), places, attention.causal("xla"))
            logits = np.asarray(hidden @ decoder.head_weight(model, params), np.float64)
        logp = scipy.special.log_softmax(logits, axis=-1)
        losses = -np.take_along_axis(logp, windows[:, 1:, None], axis=-1)[..., 0]
        assert logged[checkpoint.step] == pytest.approx(losses[counted].mean(), rel=1e-5)


def test_on_another_mesh_and_from_one_to_another_the_data_are_the_same_and_the_losses_to_rounding(
    corpus, uninterrupted, tmp_path
):
    eight = MeshShape(replica=2, fsdp=2, tensor=2)
    for mesh, until in ((eight, 10), (ONE_DEVICE, 17), (eight, STEPS)):

        def stop(step, until=until):
            return "SIGTERM" if step == until else None

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "stop_requests", lambda stop=stop: contextlib.nullcontext(stop))
            assert loop.pretrain(recipe_of(corpus, mesh=mesh), tmp_path).step == until
    ours, whole = lines_of(tmp_path), lines_of(uninterrupted)
    assert [line["step"] for line in ours] == [line["step"] for line in whole]
    losses = ([line["loss"] for line in lines if "loss" in line] for lines in (ours, whole))
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.slow
def test_a_run_whose_batch_and_rate_grow_goes_on_bit_by_bit_at_and_beside_the_border(corpus, tmp_path):
    """Steps of 32 tokens, from 256 tokens on of 64: 8 and 8 of them; the rate is larger by the square root of two."""
    batch = Batch(SEQUENCES, schedule=((8 * SEQUENCES * LENGTH - 3, 2 * SEQUENCES),), learning_rate_rule="square_root")
    recipe = recipe_of(corpus, batch=batch)
    for run, stops in (("whole", ()), ("parts", (7, 8, 9, 12))):
        for until in (*stops, -1):
            with pytest.MonkeyPatch.context() as patch:
                stop = lambda step, until=until: "SIGTERM" if step == until else None
                patch.setattr(loop, "stop_requests", lambda stop=stop: contextlib.nullcontext(stop))
                loop.pretrain(recipe, tmp_path / run)
    assert_same_run(tmp_path / "parts", tmp_path / "whole", recipe)
    lines = [line for line in read_metrics(tmp_path / "parts") if "loss" in line]
    assert [line["tokens"] for line in lines] == [*range(32, 257, 32), *range(320, 769, 64)]
    constant = [learning_rate(recipe_of(corpus), line["tokens"] - (32 if line["step"] <= 8 else 64)) for line in lines]
    rates = [rate * (1 if step < 8 else 2**0.5) for step, rate in enumerate(constant)]
    np.testing.assert_allclose([line["learning_rate"] for line in lines], rates, rtol=1e-6)


# The libraries are imported once; each process is a fork.
KILLED = """
import os, signal, sys
from pathlib import Path
from fineline_jax.checkpoints.runs import store
from fineline_jax.recipe import from_json
from fineline_jax.training import loop, observers

def killed_before(owner, name, when):
    function = getattr(owner, name)
    def wrapped(*arguments, **options):
        if when(*arguments):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    setattr(owner, name, wrapped)

moments = [
    # Nothing is complete, not even the state before the first step.
    (store, "write_record", lambda path, metadata: True),
    # The files of a rolling checkpoint are there, its record is not, and later steps are in the log.
    (store, "write_record", lambda path, metadata: metadata["step"] == 9),
    # A checkpoint is complete and the one before it not yet gone.
    (store.shutil, "rmtree", lambda path, **_: Path(path).name == "9.deleting"),
    # Between a step and the next.
    (observers.StepMetrics, "after_step", lambda observer, step, *_: step == 23),
]
for moment in moments:
    child = os.fork()
    if child == 0:
        killed_before(*moment)
        loop.pretrain(from_json(Path(sys.argv[1])), Path(sys.argv[2]))
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (moment, status)
"""


def test_a_run_killed_at_four_moments_ends_bit_by_bit_like_one_that_was_not(corpus, uninterrupted, tmp_path):
    (tmp_path / "recipe.json").write_text(to_json(recipe_of(corpus)))
    done = in_a_process(KILLED, str(tmp_path / "recipe.json"), str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    loop.pretrain(recipe_of(corpus), tmp_path / "run")
    assert_same_run(tmp_path / "run", uninterrupted, recipe_of(corpus))


TWO_PROCESSES = """
import os, sys
from pathlib import Path
import jax
from fineline_jax.recipe import from_json
from fineline_jax.training import loop
index = int(os.fork() == 0)
jax.distributed.initialize(sys.argv[3], 2, index)
outcome = loop.pretrain(from_json(Path(sys.argv[1])), Path(sys.argv[2]))
assert outcome.step == 24 and jax.device_count() == 2 and jax.local_device_count() == 1
if index:
    jax.distributed.shutdown()
    os._exit(0)
jax.distributed.shutdown()
assert os.wait()[1] == 0
"""


def test_two_processes_train_like_one(corpus, uninterrupted, tmp_path):
    (tmp_path / "recipe.json").write_text(to_json(recipe_of(corpus, mesh=MeshShape(fsdp=2))))
    address = f"127.0.0.1:{free_port()}"
    done = in_a_process(TWO_PROCESSES, str(tmp_path / "recipe.json"), str(tmp_path / "run"), address)
    assert done.returncode == 0, done.stderr
    ours, whole = lines_of(tmp_path / "run"), lines_of(uninterrupted)
    assert [line["step"] for line in ours] == [line["step"] for line in whole]
    losses = ([line["loss"] for line in lines if "loss" in line] for lines in (ours, whole))
    np.testing.assert_allclose(*losses, rtol=1e-5)
    assert [checkpoint.step for checkpoint in open_series(str(tmp_path / "run")).checkpoints] == [0, 8, 16, 24]


def test_sigterm_ends_the_command_at_a_step_saved_and_with_status_0(corpus, tmp_path):
    long = recipe_of(corpus, tokens=20_000 * SEQUENCES * LENGTH, checkpoints=Checkpoints())
    (tmp_path / "recipe.json").write_text(to_json(long))
    run = tmp_path / "run"
    process = start(["pretrain", str(tmp_path / "recipe.json"), "--run", str(run)])
    wait_for_step(run, 10, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    stopped = read_metrics(run)[-1]["step"]
    assert f"stopped by SIGTERM at step {stopped} (" in out
    assert (run / "checkpoints" / str(stopped) / "complete.json").exists()


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_written_is_said_in_one_line(corpus, tmp_path):
    wide = ModelConfig(vocab_size=32, width=128, layers=1, heads=2, mlp_width=256, context=LENGTH)
    (tmp_path / "recipe.json").write_text(to_json(recipe_of(corpus, model=wide)))
    command = [sys.executable, "-m", "fineline_jax", "pretrain", "recipe.json", "--run", "run"]
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
    with_mesh = recipe_of(corpus, mesh=MeshShape(fsdp=4))
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
