"""The loop around the step, with a step whose state is a checksum of all it was given: cheap, and exactly restated."""

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import signal
import sys
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import events, lines_of
from data_examples import amber, jsonl, letters_tokenizer
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from profiles import COMPILES

from fineline_jax import progress
from fineline_jax.checkpoints.open import open_series
from fineline_jax.checkpoints.runs.history import Segment, read_history
from fineline_jax.checkpoints.runs.store import CheckpointStore, load_items
from fineline_jax.data.corpora import prepare_amber, prepare_text
from fineline_jax.data.loader import open_batches
from fineline_jax.data.storage import open_data_set
from fineline_jax.errors import UserError
from fineline_jax.mesh import make_mesh
from fineline_jax.models.config import ModelConfig
from fineline_jax.recipe import (
    Batch,
    Checkpoints,
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
    from_json,
)
from fineline_jax.training import loop, observers, run_folder, stop
from fineline_jax.training.metrics import read_metrics

LENGTH, SEQUENCES, STEPS = 4, 6, 23
TOKENS = SEQUENCES * LENGTH
VOCABULARY, IGNORED = 50, 7
KEPT = [0, 9, 18, 23]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """300 windows, and 10 of validation, in which the ignored id is unevenly spread."""
    folder = tmp_path_factory.mktemp("corpus")
    draw = np.random.default_rng(5)
    train = amber(folder / "train.jsonl", draw.integers(0, VOCABULARY, (300, LENGTH + 1)).tolist())
    held = draw.integers(0, VOCABULARY, (10, LENGTH + 1))
    held[:2, 1:4] = IGNORED
    held = amber(folder / "held.jsonl", held.tolist())
    prepare_amber([train], folder / "data", vocab_size=VOCABULARY, sequence_length=LENGTH, validation_inputs=[held])
    return folder / "data"


def recipe_of(corpus: Path, **changes) -> Recipe:
    values = {
        "name": "checksum",
        "model": ModelConfig(vocab_size=VOCABULARY, width=8, layers=1, heads=2, mlp_width=16, context=LENGTH),
        "data": Data((Source(str(corpus)),), sequence_length=LENGTH),
        "batch": Batch(SEQUENCES, accumulation=2),
        "optimizer": Optimizer(Schedule()),
        "tokens": STEPS * TOKENS + 5,
        "checkpoints": Checkpoints(every=(Every(9 * TOKENS),), latest_every_tokens=4 * TOKENS),
        "loss": Loss(ignore_token=IGNORED),
        "mesh": MeshShape(fsdp=1),
        "logging": Logging(tensorboard=False, validation=(Validation(windows=10),)),
        "seed": 3,
    }
    return Recipe(**(values | changes))


def checksum(total: int, windows: np.ndarray, step: int) -> int:
    """What the state becomes at step number `step` (from 0): it depends on each token, its place and the step."""
    weights = np.arange(1, windows.size + 1).reshape(windows.shape)
    return (31 * total + int((windows * weights).sum()) + 1009 * step) % 2**32


@pytest.fixture(autouse=True)
def explicit_transfers(monkeypatch):
    """Between host and devices, on any thread, nothing moves that is not asked for: no loop waits by accident."""
    real = loop.pretrain

    def guarded(*arguments, **options):
        jax.config.update("jax_transfer_guard", "disallow")
        try:
            return real(*arguments, **options)
        finally:
            jax.config.update("jax_transfer_guard", None)

    monkeypatch.setattr(loop, "pretrain", guarded)


@pytest.fixture(autouse=True)
def checksums(monkeypatch):
    """Instead of a model and its optimizer."""

    def initial_state(recipe, seed):
        return {"params": {"total": seed}, "opt_state": {"steps": jnp.int32(0)}}

    def abstract_state(recipe, mesh):
        place = jax.NamedSharding(mesh, jax.P())
        leaf = lambda dtype: jax.ShapeDtypeStruct((), dtype, sharding=place)
        return {"params": {"total": leaf(jnp.uint32)}, "opt_state": {"steps": leaf(jnp.int32)}}

    def make_train_step(recipe, mesh):
        def step(state, windows, index, weight_decay):
            weights = jnp.arange(1, windows.size + 1, dtype=jnp.uint32).reshape(windows.shape)
            added = jnp.sum(windows.astype(jnp.uint32) * weights) + jnp.uint32(1009) * index.astype(jnp.uint32)
            total = jnp.uint32(31) * state["params"]["total"] + added
            state = {"params": {"total": total}, "opt_state": {"steps": state["opt_state"]["steps"] + 1}}
            return state, {"loss": jnp.mean(windows.astype(jnp.float32))}

        return step

    def make_validation_step(recipe, mesh):
        def step(params, windows, weights):
            counted = (windows[:, 1:] != recipe.loss.ignore_token) & (weights[:, None] == 1)
            sums = jnp.sum(jnp.where(counted, windows[:, 1:], 0)), jnp.sum(counted)
            return tuple(value.astype(jnp.float32) * (1 + (params["total"] % 7)) ** k for value, k in zip(sums, (1, 0)))

        return step

    made = make_mesh(MeshShape(fsdp=1), jax.devices()[:1])
    for module, name, fake in (
        (loop, "initial_state", initial_state),
        (loop, "abstract_state", abstract_state),
        (loop, "make_train_step", make_train_step),
        (observers, "make_validation_step", make_validation_step),
        (loop, "rates", lambda recipe, tokens: np.array([tokens / recipe.tokens_per_step, 0], np.float32)),
        (loop, "make_mesh", lambda mesh: {MeshShape(fsdp=1): made}[mesh]),
    ):
        monkeypatch.setattr(module, name, fake)


def totals(recipe: Recipe) -> list[int]:
    """The state after 0, 1, ... steps, restated."""
    batches = open_batches(recipe.data, sequences=SEQUENCES, vocab_size=VOCABULARY, seed=recipe.seed)
    found = [recipe.seed]
    for step in range(recipe.steps):
        found.append(checksum(found[-1], batches.rows(step), step))
    return found


def stored_totals(run: Path) -> dict[int, tuple[int, int]]:
    """step -> (checksum, steps counted) of the kept checkpoints."""
    target = loop.abstract_state(None, make_mesh(MeshShape(fsdp=1), jax.devices()[:1]))  # pyright: ignore
    found = {}
    for checkpoint in open_series(str(run)).checkpoints:
        items = load_items(Path(checkpoint.location), target)
        found[checkpoint.step] = int(items["params"]["total"]), int(items["opt_state"]["steps"])
    return found


def expected_lines(recipe: Recipe) -> list[dict]:
    """metrics.jsonl without the clock, from the definition."""
    batches = open_batches(recipe.data, sequences=SEQUENCES, vocab_size=VOCABULARY, seed=recipe.seed)
    from tensorflow_datasets import builder_from_directory

    held = builder_from_directory(recipe.data.sources[0].path).as_data_source("validation")
    # 10 windows in batches of 6 / 2 = 3: the last batch holds one.
    targets = np.stack([held[i]["tokens"] for i in range(10)])[:, 1:].astype(int)
    mean, lines = targets[targets != IGNORED].mean(), []
    for step, total in enumerate(totals(recipe)):
        if step:
            loss = batches.rows(step - 1).mean()
            lines.append({"step": step, "tokens": step * TOKENS, "loss": pytest.approx(loss, rel=1e-6)})
        if step in recipe.kept_steps():
            held_out = pytest.approx(mean * (1 + total % 7), rel=1e-6)
            lines.append({"step": step, "tokens": step * TOKENS, "validation_loss/held_out": held_out})
    return lines


def segments_of(run: Path) -> tuple[Segment, ...]:
    history = read_history(run)
    assert history is not None
    return history.segments


def stop_at(patch, decide: Callable[[int], str | None]) -> None:
    patch.setattr(loop, "stop_requests", lambda: contextlib.nullcontext(decide))


class Killed(Exception):
    pass


def test_a_run_feeds_each_step_its_batch_and_its_number_and_keeps_what_it_should(corpus, tmp_path):
    recipe = recipe_of(corpus)
    assert loop.pretrain(recipe, tmp_path / "run") == loop.Outcome(tmp_path / "run", STEPS, STEPS * TOKENS, None)
    restated = totals(recipe)
    assert stored_totals(tmp_path / "run") == {step: (restated[step], step) for step in KEPT}
    assert lines_of(tmp_path / "run") == expected_lines(recipe)
    # The last rolling one, at 20, went when the last step was kept.
    folders = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert sorted(map(int, folders)) == KEPT
    assert from_json(tmp_path / "run" / "recipe.json") == recipe
    data_hash = open_data_set(corpus).data_hash
    [segment] = json.loads((tmp_path / "run" / "history.json").read_text())["segments"]
    assert (segment["step"], segment["tokens"], segment["windows"], segment["why"]) == (0, 0, {}, "start")
    assert segment["sources"] == [data_hash] and segment["recipe"]["tokens"] == recipe.tokens
    record = json.loads((tmp_path / "run" / "checkpoints" / "9" / "complete.json").read_text())
    assert (record["tokens"], record["recipe"], record["kept"]) == (9 * TOKENS, "checksum", True)
    assert record["windows"] == {data_hash: 9 * SEQUENCES} and record["history"] == [segment]


def test_without_the_initial_checkpoint_nothing_is_kept_or_validated_before_the_first_step(
    corpus, tmp_path, monkeypatch
):
    checkpoints = Checkpoints(initial=False, latest_every_tokens=TOKENS)
    recipe = recipe_of(corpus, checkpoints=checkpoints, tokens=2 * TOKENS)
    loop.pretrain(recipe, tmp_path / "run")
    assert list(stored_totals(tmp_path / "run")) == [2]
    assert lines_of(tmp_path / "run") == expected_lines(recipe)
    stop_at(monkeypatch, lambda step: "SIGTERM")
    loop.pretrain(recipe, tmp_path / "stopped")
    assert not list((tmp_path / "stopped" / "checkpoints").iterdir())


def test_each_validation_set_has_a_loss_of_its_own(corpus, tmp_path):
    sets = (Validation(windows=10), Validation("train", str(corpus), next(iter(open_data_set(corpus).splits)), 7))
    recipe = recipe_of(corpus, logging=Logging(tensorboard=False, validation=sets), tokens=2 * TOKENS)
    loop.pretrain(recipe, tmp_path / "run")
    last = lines_of(tmp_path / "run")[-1]
    data_set, losses = open_data_set(corpus), []
    for one in sets:
        targets = data_set.read(one.split, range(one.windows))[:, 1:]
        losses.append(targets[targets != IGNORED].mean() * (1 + totals(recipe)[2] % 7))
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)
    assert last == {
        "step": 2,
        "tokens": 2 * TOKENS,
        "validation_loss/held_out": pytest.approx(losses[0], rel=1e-6),
        "validation_loss/train": pytest.approx(losses[1], rel=1e-6),
    }


def test_without_validation_windows_no_validation_loss_is_written(corpus, tmp_path):
    recipe = recipe_of(corpus, logging=Logging(tensorboard=False, validation=()), tokens=2 * TOKENS)
    loop.pretrain(recipe, tmp_path / "run")
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2]


@given(
    deaths=st.lists(
        st.tuples(st.integers(0, STEPS), st.sampled_from(["between steps", "before a save", "after a save"])),
        max_size=3,
    )
)
@example(deaths=[(0, "before a save"), (4, "before a save"), (20, "after a save")])
@example(deaths=[(9, "after a save"), (10, "between steps"), (23, "after a save")])
@settings(parent=COMPILES, max_examples=3, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_interruptions_leave_the_files_of_a_run_never_interrupted(deaths, corpus, tmp_path_factory):
    recipe, run = recipe_of(corpus), tmp_path_factory.mktemp("runs") / "run"
    save = CheckpointStore.maybe_save
    for point, place in sorted(deaths):

        def die(step, here, point=point, place=place):
            if place == here and step >= point:
                raise Killed

        def saving(self, step, state, die=die, **options):
            die(step, "before a save")
            done = save(self, step, state, **options)
            die(step, "after a save")
            return done

        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
            stop_at(patch, lambda step, die=die: die(step, "between steps"))
            patch.setattr(CheckpointStore, "maybe_save", saving)
            loop.pretrain(recipe, run)
    loop.pretrain(recipe, run)
    restated = totals(recipe)
    assert stored_totals(run) == {step: (restated[step], step) for step in KEPT}
    assert lines_of(run) == expected_lines(recipe)


def test_under_a_schedule_of_batches_every_window_comes_once_and_an_interrupted_run_is_the_same(
    corpus, tmp_path, monkeypatch
):
    """Steps of 24, 48 and 8 tokens: 72 is the first multiple of 24 from 70 on, 216 the first 72 + 48 k from 200 on."""
    monkeypatch.setattr(loop, "rates", lambda recipe, tokens: np.array([tokens, 0], np.float32))
    recipe = recipe_of(corpus, batch=Batch(SEQUENCES, 2, ((70, 12), (200, 2))))
    batches = [6] * 3 + [12] * 3 + [2] * 42  # 216 + 42 * 8 = 552 of 557 tokens
    tokens = [LENGTH * sum(batches[:step]) for step in range(len(batches) + 1)]
    one_by_one = open_batches(recipe.data, sequences=1, vocab_size=VOCABULARY, seed=recipe.seed)
    stream = np.concatenate([one_by_one.rows(number) for number in range(sum(batches))])
    expected, losses = [recipe.seed], []
    for step, sequences in enumerate(batches):
        windows = stream[tokens[step] // LENGTH :][:sequences]
        expected.append(checksum(expected[-1], windows, tokens[step]))
        losses.append({"step": step + 1, "tokens": tokens[step + 1], "loss": pytest.approx(windows.mean(), rel=1e-6)})
    kept = [0, 6, 33, 48]  # 0, 216 and 432 tokens, and the end

    def killed(point: int, how: str):
        def decide(step: int) -> str | None:
            if step == point and how == "killed":
                raise Killed
            return "SIGTERM" if step == point else None

        return decide

    for run, points in (
        ("whole", []),
        ("in_parts", [(2, "killed"), (3, ""), (5, "killed"), (6, ""), (7, ""), (40, "")]),
    ):
        for point, how in [*points, (-1, "")]:
            stop_at(monkeypatch, killed(point, how))
            with contextlib.suppress(Killed):
                loop.pretrain(recipe, tmp_path / run)
        assert stored_totals(tmp_path / run) == {step: (expected[step], step) for step in kept}, run
        assert [line for line in lines_of(tmp_path / run) if "loss" in line] == losses
        validated = [(line["step"], line["tokens"]) for line in lines_of(tmp_path / run) if "loss" not in line]
        assert validated == [(step, tokens[step]) for step in kept]
        record = json.loads((tmp_path / run / "checkpoints" / "6" / "complete.json").read_text())
        assert record["tokens"] == 216 and sum(record["windows"].values()) == 54


def test_no_checkpoint_is_begun_before_the_metrics_up_to_it_are_in_the_file(corpus, tmp_path, monkeypatch):
    """A kill right after a save must find each line: the steps before a checkpoint are never run again."""
    run, begun = tmp_path / "run", []
    save = CheckpointStore.maybe_save

    def saving(self, step, state, *, force=False):
        if force or self.is_due(step):
            lines = (run / "metrics.jsonl").read_text().splitlines()
            begun.append((step, [json.loads(line)["step"] for line in lines if "loss" in json.loads(line)]))
            assert ("validation_loss/held_out" in lines[-1]) == (step in KEPT)
        return save(self, step, state, force=force)

    monkeypatch.setattr(CheckpointStore, "maybe_save", saving)
    stop_at(monkeypatch, lambda step: "SIGTERM" if step == 6 else None)
    loop.pretrain(recipe_of(corpus), run)
    stop_at(monkeypatch, lambda step: None)
    loop.pretrain(recipe_of(corpus), run)
    assert begun == [(step, list(range(1, step + 1))) for step in (0, 4, 6, 8, 9, 12, 16, 18, 20, 23)]


def test_a_request_to_stop_ends_the_run_at_that_step_saved_and_the_same_command_goes_on(corpus, tmp_path, monkeypatch):
    recipe, run = recipe_of(corpus), tmp_path / "run"
    asked: list[int] = []
    stop_at(monkeypatch, lambda step: asked.append(step) or ("SIGINT" if step == 5 else None))
    assert loop.pretrain(recipe, run) == loop.Outcome(run, 5, 5 * TOKENS, "SIGINT")
    assert asked == [0, 1, 2, 3, 4, 5]
    assert (run / "checkpoints" / "5" / "complete.json").exists()
    assert [line["step"] for line in lines_of(run) if "loss" in line] == [1, 2, 3, 4, 5]
    assert loop.pretrain(recipe, run) == loop.Outcome(run, 5, 5 * TOKENS, "SIGINT")  # asked before its first step
    stop_at(monkeypatch, lambda step: "SIGTERM" if step == STEPS else None)
    assert loop.pretrain(recipe, run).stopped_by is None, "a run that is complete was not stopped"
    assert lines_of(run) == expected_lines(recipe)
    assert stored_totals(run)[STEPS] == (totals(recipe)[STEPS], STEPS)


def test_a_kept_checkpoint_is_announced_while_it_is_written_and_finished_when_it_is_complete(corpus, tmp_path):
    recipe, run, calls = recipe_of(corpus), tmp_path / "run", []
    complete = lambda step: (run / "checkpoints" / str(step) / "complete.json").exists()

    def at_kept(step, params, wait):
        calls.append(("begun", step, int(params["total"])))
        if step != 18:
            wait()
            calls.append(("complete", step, complete(step)))

    given = (observers.AtKeptCheckpoints(at_kept),)

    def die(step):
        if step == 21:
            raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        stop_at(patch, die)
        loop.pretrain(recipe, run, observers=given)
    restated = totals(recipe)
    first = [("begun", 0, restated[0]), ("complete", 0, True), ("begun", 9, restated[9]), ("complete", 9, True)]
    assert calls == [*first, ("begun", 18, restated[18])]
    calls.clear()
    loop.pretrain(recipe, run, observers=given)  # resumes at 20, which is not kept
    assert calls == [("begun", 23, restated[23]), ("complete", 23, True)]
    loop.pretrain(recipe, run, observers=given)
    assert calls == 2 * [("begun", 23, restated[23]), ("complete", 23, True)]


def test_a_finished_run_is_left_alone_and_one_whose_newest_checkpoint_is_damaged_goes_on_from_the_one_before(
    corpus, tmp_path, caplog
):
    recipe, run = recipe_of(corpus), tmp_path / "run"
    loop.pretrain(recipe, run)
    before = (run / "metrics.jsonl").read_bytes()
    assert loop.pretrain(recipe, run) == loop.Outcome(run, STEPS, STEPS * TOKENS, None)
    assert (run / "metrics.jsonl").read_bytes() == before
    victim = max((path for path in (run / "checkpoints" / "23").rglob("*") if path.is_file()), key=os.path.getsize)
    victim.write_bytes(victim.read_bytes()[:-7])
    loop.pretrain(recipe, run)
    assert "23 is damaged" in caplog.text
    assert lines_of(run) == expected_lines(recipe)
    assert stored_totals(run)[STEPS] == (totals(recipe)[STEPS], STEPS)


def test_the_state_before_a_step_gives_its_memory_to_the_state_behind_it(corpus, tmp_path, monkeypatch):
    """Whether it does shows only where nothing else, such as a save, reads it meanwhile; so that it is asked for."""
    asked, jit = [], jax.jit
    monkeypatch.setattr(loop.jax, "jit", lambda function, **options: asked.append(options) or jit(function, **options))
    loop.pretrain(recipe_of(corpus, tokens=TOKENS), tmp_path)
    assert {"donate_argnums": 0} in asked


def test_tensorboard_has_the_last_step_when_the_run_has_ended(corpus, tmp_path):
    loop.pretrain(recipe_of(corpus, tokens=2 * TOKENS, logging=Logging(validation=())), tmp_path)
    board = events(tmp_path / "tensorboard")
    assert {event.step for event in board for value in event.summary.value if value.tag == "loss"} == {1, 2}


def test_only_the_batches_that_are_left_are_read(corpus, tmp_path, monkeypatch):
    read: list[int] = []
    real = loop.global_batch

    def reading(batches, step, *where):
        read.append(step)
        return real(batches, step, *where)

    monkeypatch.setattr(loop, "global_batch", reading)
    stop_at(monkeypatch, lambda step: "SIGTERM" if step == 7 else None)
    loop.pretrain(recipe_of(corpus), tmp_path / "run")
    assert read[:7] == list(range(7)) and max(read) <= 9  # two are made ready ahead
    read.clear()
    stop_at(monkeypatch, lambda step: None)
    loop.pretrain(recipe_of(corpus), tmp_path / "run")
    assert read == list(range(7, STEPS))


def test_progress_counts_tokens_from_where_the_run_resumes_and_shows_the_loss(corpus, tmp_path, monkeypatch):
    recipe, shown = recipe_of(corpus), []

    @contextlib.contextmanager
    def bar(name, total, unit, done, clock):
        shown.append((name, total, unit, done))
        yield lambda amount, note="": shown.append((amount, note))

    monkeypatch.setattr(progress, "bar", bar)
    stop_at(monkeypatch, lambda step: "SIGTERM" if step == 20 else None)
    loop.pretrain(recipe, tmp_path / "run")
    shown.clear()
    stop_at(monkeypatch, lambda step: None)
    loop.pretrain(recipe, tmp_path / "run")
    losses = {line["step"]: line["loss"] for line in read_metrics(tmp_path / "run") if "loss" in line}
    notes = ["", f"loss {losses[21]:.3f}", f"loss {losses[22]:.3f}"]  # of the step before
    assert shown == [("checksum", STEPS * TOKENS, "tokens", 20 * TOKENS), *((TOKENS, note) for note in notes)]


def test_waits_for_data_are_those_of_the_loader(corpus, tmp_path, monkeypatch):
    real = loop.prefetch

    def slow(load, steps):
        for loaded in real(load, steps):
            yield loaded._replace(wait_seconds=0.5 + loaded.step)

    monkeypatch.setattr(loop, "prefetch", slow)
    quiet = Logging(tensorboard=False, validation=(), every_steps=3)
    loop.pretrain(recipe_of(corpus, tokens=7 * TOKENS, logging=quiet, checkpoints=Checkpoints()), tmp_path / "run")
    lines = read_metrics(tmp_path / "run")
    assert [(line["step"], line["data_wait_seconds"]) for line in lines] == [(3, 1.5), (6, 4.5), (7, 6.5)]


def test_a_resumed_run_counts_its_speed_from_where_it_resumed(corpus, tmp_path, monkeypatch):
    stop_at(monkeypatch, lambda step: "SIGTERM" if step == 20 else None)
    loop.pretrain(recipe_of(corpus), tmp_path)
    stop_at(monkeypatch, lambda step: None)
    looks = iter(range(100))  # each look at the clock a second later
    fake = types.SimpleNamespace(perf_counter=lambda: next(looks), monotonic=time.monotonic, time=time.time)
    monkeypatch.setattr(observers, "time", fake)
    loop.pretrain(recipe_of(corpus), tmp_path)
    lines = [line for line in read_metrics(tmp_path) if line["step"] > 20 and "loss" in line]
    assert [line["step_seconds"] for line in lines] == [1.0, 1.0, 1.0]
    assert [line["tokens_per_second"] for line in lines] == [TOKENS] * 3


def test_a_changed_recipe_is_refused_with_its_fields_unless_accepted(corpus, tmp_path, caplog):
    run = tmp_path / "run"
    short = recipe_of(corpus, tokens=4 * TOKENS)
    loop.pretrain(short, run)
    longer = dataclasses.replace(short, seed=5, tokens=6 * TOKENS)
    with pytest.raises(UserError, match=r"recipe\.json: the recipe has changed \(tokens: 96 -> 144; seed: 3 -> 5\)"):
        loop.pretrain(longer, run)
    assert json.loads((run / "recipe.json").read_text())["seed"] == 3
    with caplog.at_level("INFO"):
        assert loop.pretrain(longer, run, accept_changes=True).step == 6
    assert json.loads((run / "recipe.json").read_text())["seed"] == 5
    first, second = segments_of(run)
    assert (first.recipe, first.step) == (short, 0) and (second.recipe, second.step) == (longer, 4)
    assert second.changes == ("tokens: 96 -> 144", "seed: 3 -> 5")
    # A cosine that had come down goes up again: 3e-5 + 0.5 (1 + cos(pi k / n)) (3e-4 - 3e-5) for k / n = 3/4, 4/6, 5/6.
    assert (
        "the learning rate, 6.95e-05 at the last step, is 9.75e-05 at the next and 4.81e-05 at the end" in caplog.text
    )


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        ({"mesh": MeshShape(replica=2)}, None),
        ({"name": "other"}, None),
        ({"logging": Logging(every_steps=7, tensorboard=False)}, None),
        ({"batch": Batch(SEQUENCES, accumulation=1)}, "batch.accumulation: 2 -> 1"),
        ({"checkpoints": Checkpoints()}, "checkpoints.every"),
        ({"loss": Loss()}, "loss.ignore_token: 7 -> None"),
        ({"data": Data((Source("other"),), sequence_length=LENGTH)}, None),
        ({"data": Data((Source("other", 2.0),), sequence_length=LENGTH)}, "data.sources.0.weight"),
        ({"data": Data((Source("other"),), sequence_length=LENGTH, order="chunks")}, "data.order"),
    ],
)
def test_only_where_and_how_it_computes_and_reports_may_change_between_resumptions(corpus, tmp_path, change, refused):
    recorded = run_folder.beginning(None, recipe_of(corpus), ("data",))
    check = functools.partial(run_folder.refuse_changes, recorded, tmp_path, recipe_of(corpus, **change), ("data",))
    with contextlib.nullcontext() if refused is None else pytest.raises(UserError, match=refused):
        check(accept_changes=False)
    with (
        pytest.raises(UserError, match=r"would read windows again")
        if refused == "data.order"
        else (contextlib.nullcontext())
    ):
        check(accept_changes=True)
    with pytest.raises(UserError, match=r"data\.sources\.0\.path: .* holds other data"):
        run_folder.refuse_changes(recorded, tmp_path, recipe_of(corpus), ("other data",), accept_changes=False)


def test_a_recipe_of_which_nothing_is_saved_yet_may_be_changed(corpus, tmp_path):
    for seed in (3, 5):
        history = run_folder.beginning(None, recipe_of(corpus, seed=seed), ("data",))
        run_folder.claim_folder(tmp_path, recipe_of(corpus, seed=seed), history)
        (tmp_path / "checkpoints").mkdir(exist_ok=True)
        assert run_folder.recorded_history(tmp_path) is None
        assert json.loads((tmp_path / "recipe.json").read_text())["seed"] == seed


def test_what_a_killed_start_left_in_the_folder_is_removed(corpus, tmp_path):
    for name in ("recipe", "history"):
        (tmp_path / f".{name}.json.1234.partial").touch()
    run_folder.claim_folder(tmp_path, recipe_of(corpus), run_folder.beginning(None, recipe_of(corpus), ("data",)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["history.json", "recipe.json"]


def test_the_run_takes_the_tokenizer_of_its_first_source_once(tmp_path):
    folder = letters_tokenizer(tmp_path)
    for name in "ab":
        source = jsonl(tmp_path / f"{name}.jsonl", ["abc" * 50])
        prepare_text([source], tmp_path / name, tokenizer=folder, sequence_length=LENGTH)
        (tmp_path / name / "tokenizer" / "owner").write_text(name)
    data = Data((Source(str(tmp_path / "b")), Source(str(tmp_path / "a"))), sequence_length=LENGTH)
    recipe = recipe_of(tmp_path, data=data, tokens=TOKENS)
    loop.pretrain(recipe, tmp_path / "run")
    assert (tmp_path / "run" / "tokenizer" / "owner").read_text() == "b"
    assert (tmp_path / "run" / "tokenizer" / "tokenizer.json").exists()
    hashes = tuple(open_data_set(tmp_path / name).data_hash for name in "ba")
    assert segments_of(tmp_path / "run")[0].sources == hashes
    (tmp_path / "run" / "tokenizer" / "owner").write_text("mine")
    loop.pretrain(recipe, tmp_path / "run")
    assert (tmp_path / "run" / "tokenizer" / "owner").read_text() == "mine"


def test_a_run_has_its_tokenizer_whole_or_not_at_all(tmp_path, monkeypatch):
    (tmp_path / "data" / "tokenizer").mkdir(parents=True)
    (tmp_path / "data" / "tokenizer" / "tokenizer.json").touch()
    recipe = recipe_of(tmp_path, data=Data((Source(str(tmp_path / "data")),), sequence_length=LENGTH), tokens=TOKENS)

    def stops(source, target):
        Path(target).touch()
        raise KeyboardInterrupt

    with monkeypatch.context() as stopping:
        stopping.setattr(shutil, "copyfile", stops)
        with pytest.raises(KeyboardInterrupt):
            run_folder.claim_folder(tmp_path / "run", recipe, run_folder.beginning(None, recipe, ()))
    run_folder.claim_folder(tmp_path / "run", recipe, run_folder.beginning(None, recipe, ()))
    assert [path.name for path in (tmp_path / "run" / "tokenizer").iterdir()] == ["tokenizer.json"]


def test_other_data_at_the_same_path_are_refused_unless_accepted(tmp_path):
    lines, place, run = tmp_path / "train_0.jsonl", tmp_path / "data", tmp_path / "run"

    def prepare(seed: int) -> None:
        amber(lines, np.random.default_rng(seed).integers(0, VOCABULARY, (40, LENGTH + 1)).tolist())
        shutil.rmtree(place, ignore_errors=True)
        prepare_amber([lines], place, vocab_size=VOCABULARY, sequence_length=LENGTH)

    recipe = recipe_of(place, tokens=4 * TOKENS, checkpoints=Checkpoints(initial=False))
    prepare(0)
    loop.pretrain(recipe, run)
    prepare(0)  # the same again
    assert loop.pretrain(recipe, run).step == 4
    prepare(1)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(
        UserError,
        match=r"recipe has changed \(data\.sources\.0\.path: .*data holds other data\); .* give --accept-changes",
    ):
        loop.pretrain(recipe, run)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert loop.pretrain(recipe, run, accept_changes=True).step == 4
    assert loop.pretrain(recipe, run).step == 4  # these are the run's data now
    (run / "history.json").write_text("[1")
    with pytest.raises(UserError, match=r"history\.json: not the history of a run .* delete it"):
        loop.pretrain(recipe, run)


@pytest.mark.parametrize("skip", [False, True])
def test_a_loss_that_is_not_finite_ends_the_run_by_name_unless_such_steps_are_skipped(
    skip, corpus, tmp_path, monkeypatch
):
    make = loop.make_train_step

    def breaking(recipe, mesh):
        step = make(recipe, mesh)

        def broken(state, windows, index, weight_decay):
            state, metrics = step(state, windows, index, weight_decay)
            return state, metrics | {"loss": jnp.where(index == 7, jnp.nan, metrics["loss"])}

        return broken

    monkeypatch.setattr(loop, "make_train_step", breaking)
    optimizer = Optimizer(Schedule(), skip_nonfinite=skip)
    logging = Logging(tensorboard=False, validation=(), every_steps=5)
    recipe, run = recipe_of(corpus, optimizer=optimizer, logging=logging), tmp_path / "run"
    if skip:
        assert loop.pretrain(recipe, run).step == STEPS
        assert [line["step"] for line in read_metrics(run)] == [5, 10, 15, 20, 23]
        return
    with pytest.raises(UserError, match=r"the loss of step 8 is nan; resume with a lower optimizer\.schedule\.peak"):
        loop.pretrain(recipe, run)
    # It is in the log though its step would not be, and neither the rolling checkpoint of step 8 nor a later one is.
    assert [(line["step"], line["loss"] is None) for line in read_metrics(run)] == [(5, False), (8, True)]
    assert sorted(os.listdir(run / "checkpoints")) == ["0", "4"]


def test_threads_that_begin_while_a_profile_is_taken_are_not_hooked(corpus, tmp_path):
    profiler = observers.Profiler(recipe_of(corpus, logging=Logging(profile_start_step=2, profile_steps=2)), tmp_path)
    profiler.before_step(2)
    try:
        assert threading.getprofile() is None and sys.getprofile() is None
    finally:
        profiler.close()


def test_a_profile_holds_the_steps_of_its_window_and_is_closed_with_the_run(corpus, tmp_path, monkeypatch):
    events: list = []
    fake = types.SimpleNamespace(
        start_trace=lambda folder, profiler_options: events.append(folder),
        stop_trace=lambda: events.append("stop"),
        ProfileOptions=jax.profiler.ProfileOptions,
        StepTraceAnnotation=lambda name, step_num: events.append(step_num) or contextlib.nullcontext(),
    )
    monkeypatch.setattr(loop.jax, "profiler", fake)
    quiet = {"tensorboard": False, "validation": ()}

    def taken(start: int, count: int) -> list:
        events.clear()
        logging = Logging(profile_start_step=start, profile_steps=count, **quiet)
        run = tmp_path / f"{start}-{count}"
        loop.pretrain(recipe_of(corpus, tokens=6 * TOKENS, checkpoints=Checkpoints(), logging=logging), run)
        return [event if event != str(run / "profile") else "start" for event in events]

    assert taken(2, 3) == [0, 1, "start", 2, 3, 4, "stop", 5]
    assert taken(4, 9) == [0, 1, 2, 3, "start", 4, 5, "stop"]
    assert taken(0, 0) == [0, 1, 2, 3, 4, 5]


def test_the_last_step_of_a_profile_is_waited_for(corpus, tmp_path, monkeypatch):
    events: list = []
    monkeypatch.setattr(jax, "block_until_ready", events.append)
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: events.append("stop"))
    logging = Logging(profile_start_step=1, profile_steps=2)
    profiler = observers.Profiler(recipe_of(corpus, tokens=6 * TOKENS, logging=logging), tmp_path)
    profiler.running = True
    profiler.after_step(2, {"loss": 1}, 0.0)
    profiler.after_step(3, {"loss": 2}, 0.0)
    assert events == [{"loss": 2}, "stop"]


def test_a_resumed_run_profiles_what_is_left_of_the_window(corpus, tmp_path):
    profiler = observers.Profiler(recipe_of(corpus, logging=Logging(profile_start_step=2, profile_steps=3)), tmp_path)
    profiler.before_step(5)
    assert not profiler.running
    profiler.before_step(4)
    try:
        assert profiler.running
        profiler.after_step(5, {}, 0.0)
        assert not profiler.running and list((tmp_path / "profile").rglob("*.xplane.pb"))
    finally:
        profiler.close()


def test_signals_are_noted_by_name_the_first_counts_and_a_second_ctrl_c_interrupts():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    for first in (signal.SIGTERM, signal.SIGINT):
        with stop.stop_requests() as requested:
            assert requested(3) is None
            try:
                signal.raise_signal(first)
            except KeyboardInterrupt:
                pytest.fail("the first Ctrl-C interrupted the run")
            assert requested(4) == first.name
            signal.raise_signal(signal.SIGTERM)
            assert requested(5) == first.name
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_several_processes_stop_at_the_step_that_all_of_them_agree_on(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(stop.multihost_utils, "reached_preemption_sync_point", lambda step: step == 12)
    handed_on: list[int] = []
    monkeypatch.setattr(stop.os, "kill", lambda _, number: handed_on.append(number))
    before = signal.getsignal(signal.SIGTERM)
    with stop.stop_requests() as requested:
        assert signal.getsignal(signal.SIGTERM) == before  # JAX's service has the signal
        assert (requested(11), requested(12)) == (None, "SIGTERM")
        signal.raise_signal(signal.SIGINT)  # reaches all processes of a terminal, or only this one
        assert handed_on == [signal.SIGTERM]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_lost_terminal_does_not_end_a_run(monkeypatch):
    """SIGHUP, and writes to a pipe that nobody reads; any other error of a write is raised."""
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as broken, open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stderr", broken)
        before = signal.getsignal(signal.SIGHUP)
        with stop.stop_requests() as requested:
            signal.raise_signal(signal.SIGHUP)
            for _ in range(3):
                print("step", file=sys.stderr, flush=True)
            assert requested(1) is None and not sys.stderr.isatty()
        assert sys.stderr is broken and signal.getsignal(signal.SIGHUP) == before
        with contextlib.suppress(BrokenPipeError):
            broken.close()
        monkeypatch.setattr(sys, "stderr", full)
        with pytest.raises(OSError, match="No space"), stop.stop_requests():
            print("step", file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):
            full.close()
