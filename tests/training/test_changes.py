"""Runs whose recipe changes, which branch, are killed, moved and damaged; with a real model, compared bit by bit."""

import contextlib
import dataclasses
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from data_examples import numbered

from fineline_jax.checkpoints.convert import import_checkpoint
from fineline_jax.checkpoints.formats.huggingface import export_hf
from fineline_jax.checkpoints.runs.digest_record import read_record
from fineline_jax.checkpoints.runs.history import Segment, read_history
from fineline_jax.checkpoints.runs.store import load_items
from fineline_jax.data.loader import read_windows
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
)  # fmt: skip
from fineline_jax.training import loop
from fineline_jax.training.metrics import TIMINGS, read_metrics
from fineline_jax.training.observers import Observer
from fineline_jax.training.programs import Programs
from fineline_jax.training.run_folder import Branch
from fineline_jax.training.step import abstract_state

LENGTH = 4
MESH = MeshShape(fsdp=1)


@pytest.fixture(scope="module")
def programs() -> Programs:
    return Programs()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("data")
    return {name: numbered(folder / name, {"train": count}, LENGTH, 300) for name, count in (("a", 60), ("b", 90))}


@pytest.fixture(autouse=True)
def one_device(monkeypatch) -> None:
    made = make_mesh(MESH, jax.devices()[:1])
    monkeypatch.setattr(loop, "make_mesh", lambda shape: made)


@pytest.fixture(scope="module")
def recipe(data) -> Recipe:
    return Recipe(
        name="changes",
        model=ModelConfig(vocab_size=300, width=8, layers=1, heads=2, mlp_width=8, context=LENGTH),
        data=Data((Source(data["a"]),), LENGTH),
        batch=Batch(4),
        optimizer=Optimizer(Schedule(1e-2, 1e-3, warmup_tokens=32)),
        tokens=160,
        checkpoints=Checkpoints(every=(Every(80),), latest_every_tokens=32),
        compute=Compute(dtype="float32", remat="none"),
        logging=Logging(tensorboard=False, validation=()),
        mesh=MESH,
    )


class Killed(Exception):
    pass


class Dies(Observer):
    """At a step, before its update."""

    def __init__(self, at: int):
        self.at = at

    def before_step(self, step: int) -> None:
        if step == self.at:
            raise Killed


class Reads(Observer):
    """The steps that were dispatched."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def before_step(self, step: int) -> None:
        self.steps.append(step)


@pytest.fixture
def read(monkeypatch) -> Iterator[dict[int, list[int]]]:
    """step -> the records of its windows, as the last process to train it read them."""
    found: dict[int, list[int]] = {}
    real = loop.global_batch

    def global_batch(batches, step, *where):
        found[step] = [place.record for place in batches.positions(step)]
        assert found[step] == read_windows(batches.splits, batches.positions(step), LENGTH + 1, 300)[:, 0].tolist()
        return real(batches, step, *where)

    monkeypatch.setattr(loop, "global_batch", global_batch)
    yield found


def in_turn(read: dict[int, list[int]], steps: range) -> list[int]:
    return [record for step in steps for record in read[step]]


def states(run: Path, recipe: Recipe) -> dict[int, list[np.ndarray]]:
    """The arrays of every kept checkpoint."""
    mesh = make_mesh(MESH, jax.devices()[:1])
    with jax.set_mesh(mesh):
        target = abstract_state(recipe, mesh)
        folders = {int(path.name): path for path in (run / "checkpoints").iterdir() if path.name.isdigit()}
        records = {step: read_record(path) or {} for step, path in folders.items()}
        return {
            step: jax.tree.map(np.asarray, jax.tree.leaves(load_items(folders[step], target)))
            for step in sorted(folders)
            if records[step]["kept"]
        }


def equal(ours: dict[int, list[np.ndarray]], theirs: dict[int, list[np.ndarray]]) -> bool:
    return list(ours) == list(theirs) and all(
        np.array_equal(a, b) for step in ours for a, b in zip(ours[step], theirs[step], strict=True)
    )


def lines(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in read_metrics(run)]


def segments_of(run: Path) -> tuple[Segment, ...]:
    history = read_history(run)
    assert history is not None
    return history.segments


def commands(recipe: Recipe, data: dict[str, str]) -> list[tuple[Recipe, int | None]]:
    """Three recipes, each with the tokens at which the next goes on: other batches, another seed, another mixture."""
    mixture = Data((Source(data["b"], 2.0), Source(data["a"], 1.0)), LENGTH)
    return [
        (recipe, 96),  # 6 steps of 16
        (dataclasses.replace(recipe, batch=Batch(6, 2), tokens=400), 190),  # 24 tokens, to 192 at step 10
        (dataclasses.replace(recipe, batch=Batch(3), tokens=400, data_seed=9, data=mixture), None),  # 12, to step 27
    ]


def train(
    recipe: Recipe, run: Path, programs: Programs, kills: list[int] | None = None, **options: Any
) -> loop.Outcome:
    """To the end, through deaths before these updates."""
    for at in kills or ():
        with contextlib.suppress(Killed):
            loop.pretrain(recipe, run, programs=programs, observers=[Dies(at)], **options)
    return loop.pretrain(recipe, run, programs=programs, **options)


@pytest.fixture(scope="module")
def uninterrupted(recipe, data, programs, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        made = make_mesh(MESH, jax.devices()[:1])
        patch.setattr(loop, "make_mesh", lambda shape: made)
        for one, until in commands(recipe, data):
            train(one, run, programs, accept_changes=True, until=until)
    return run


def test_two_changes_with_kills_between_leave_the_run_that_was_never_killed(
    recipe, data, programs, uninterrupted, read, tmp_path
):
    run, ends = tmp_path / "run", []
    deaths = [[0, 1, 5], [6, 9], [10, 11, 20, 26]]
    for (one, until), kills in zip(commands(recipe, data), deaths, strict=True):
        ends.append(train(one, run, programs, kills, accept_changes=True, until=until))
    assert [(end.step, end.tokens, end.stopped_by) for end in ends] == [
        (6, 96, "--until"), (10, 192, "--until"), (27, 396, None),
    ]  # fmt: skip
    found = states(run, recipe)
    # Every 80 tokens, the first step with as many, and the ends: 5 x 16; (160 - 96) / 24 and (192 is the end); 12 each.
    assert list(found) == [0, 5, 6, 9, 10, 14, 21, 27]
    assert equal(found, states(uninterrupted, recipe)) and lines(run) == lines(uninterrupted)
    assert [(line["step"], line["tokens"]) for line in lines(run)][5:11] == [
        (6, 96), (7, 120), (8, 144), (9, 168), (10, 192), (11, 204),
    ]  # fmt: skip
    first, second, third = segments_of(run)
    assert segments_of(uninterrupted) == (first, second, third)
    assert (first.why, second.why, third.why) == ("start", "accepted change", "accepted change")
    assert [(s.step, s.tokens, list(s.windows.values())) for s in (second, third)] == [(6, 96, [24]), (10, 192, [48])]
    # Of the last 17 x 3 windows two thirds are of b; a had 6 x 4 + 4 x 6 before.
    record = read_record(run / "checkpoints" / "27") or {}
    assert sorted(record["windows"].values()) == [34, 48 + 17]
    records = in_turn(read, range(10))
    assert len(records) == 48 == len(set(records)), "another batch goes on with the windows that are left"


@pytest.mark.slow
def test_a_run_damaged_behind_its_last_change_trains_that_change_again(recipe, data, programs, uninterrupted, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    for step in (9, 10, 14, 21, 27):
        (run / "checkpoints" / str(step) / "complete.json").write_text("{}")
    third, reads = commands(recipe, data)[2][0], Reads()
    assert loop.pretrain(third, run, programs=programs, observers=[reads]).step == 27
    assert reads.steps == list(range(6, 27)), "the second recipe, then the third"
    found, whole = states(run, recipe), states(uninterrupted, recipe)
    assert all(equal({step: found[step]}, {step: whole[step]}) for step in (0, 5, 6, 9, 14, 21, 27))
    assert lines(run) == lines(uninterrupted)


def test_a_data_set_that_was_moved_is_the_same_and_the_same_place_with_others_is_not(
    recipe, data, programs, uninterrupted, tmp_path
):
    run, third = tmp_path / "run", commands(recipe, data)[2][0]
    shutil.copytree(uninterrupted, run)
    moved = {name: shutil.copytree(place, tmp_path / name) for name, place in data.items()}
    there = dataclasses.replace(
        third, data=Data((Source(str(moved["b"]), 2.0), Source(str(moved["a"]), 1.0)), LENGTH), name="moved"
    )
    assert loop.pretrain(there, run, programs=programs).step == 27
    assert len(segments_of(run)) == 3
    swapped = Data((Source(str(moved["a"]), 2.0), Source(str(moved["b"]), 1.0)), LENGTH)
    with pytest.raises(
        UserError, match=r"recipe has changed \(data\.sources\.0\.path: .*/b' -> .*/a'; data\.sources\.1"
    ):
        loop.pretrain(dataclasses.replace(third, data=swapped), run, programs=programs)


def test_records_that_disagree_are_named_and_a_lost_history_is_that_of_the_checkpoints(
    recipe, data, programs, uninterrupted, tmp_path, caplog
):
    run, third = tmp_path / "run", commands(recipe, data)[2][0]
    shutil.copytree(uninterrupted, run)
    text = (run / "history.json").read_text()
    (run / "history.json").unlink()
    assert loop.pretrain(third, run, programs=programs).step == 27
    assert (
        "history.json is gone; taken from checkpoint 27" in caplog.text and (run / "history.json").read_text() == text
    )
    (run / "history.json").write_text(text.replace('"tokens": 192', '"tokens": 190'))
    with pytest.raises(
        UserError, match=r"history\.json: is not that of the newest checkpoint .*27; restore it, or delete"
    ):
        loop.pretrain(third, run, programs=programs)
    (run / "history.json").write_text(text.replace('"format": 1', '"format": 2'))
    with pytest.raises(UserError, match=r"history\.json: has format 2, not 1"):
        loop.pretrain(third, run, programs=programs)
    (run / "history.json").write_text(text)
    edited = (run / "recipe.json").read_text().replace('"weight_decay": 0.1', '"weight_decay": 0.2')
    (run / "recipe.json").write_text(edited)
    with pytest.raises(
        UserError, match=r"recipe\.json: is not the recipe that the checkpoints record \(.*weight_decay"
    ):
        loop.pretrain(third, run, programs=programs)


def test_a_branch_goes_on_from_a_kept_checkpoint_in_a_folder_of_its_own(
    recipe, data, programs, uninterrupted, tmp_path
):
    """A decay to nothing from the second segment: its batches are those of the run, its rates its own."""
    schedule = Schedule(1e-2, 0.0, kind="wsd", decay_tokens=48)
    decay = dataclasses.replace(recipe, batch=Batch(4), tokens=168 + 64, optimizer=Optimizer(schedule), name="decay")
    run, branch = tmp_path / "branch", Branch(uninterrupted, 9)
    before = {path: path.read_bytes() for path in uninterrupted.rglob("*") if path.is_file()}
    outcome = train(decay, run, programs, [9, 11], branch=branch)
    assert (outcome.step, outcome.tokens) == (13, 168 + 64)
    assert {path: path.read_bytes() for path in uninterrupted.rglob("*") if path.is_file()} == before
    first, second, own = segments_of(run)
    assert (first, second) == segments_of(uninterrupted)[:2]
    digest = hashlib.sha256((uninterrupted / "checkpoints" / "9" / "complete.json").read_bytes()).hexdigest()
    assert own.parent is not None and dataclasses.astuple(own.parent) == (str(uninterrupted), 9, digest, "kept")
    assert (own.why, own.step, own.tokens, list(own.windows.values())) == ("branch", 9, 168, [42])
    assert "batch.sequences: 6 -> 4" in own.changes and "tokens: 400 -> 232" in own.changes
    found, parent = states(run, recipe), states(uninterrupted, recipe)
    assert list(found) == [9, 13] and equal({9: found[9]}, {9: parent[9]})
    # 16 tokens a step, down from 48 before the end: 1, 1, 2/3, 1/3 of the peak.
    rates = [line["learning_rate"] for line in lines(run)]
    np.testing.assert_allclose(rates, [1e-2, 1e-2, 2e-2 / 3, 1e-2 / 3], rtol=1e-6)
    again = tmp_path / "again"
    assert train(decay, again, programs, branch=branch).step == 13 and equal(states(again, recipe), found)
    with pytest.raises(UserError, match=r"branch: is a branch of .*whole@9 already; give another --run folder"):
        loop.pretrain(decay, run, branch=Branch(uninterrupted, 10), programs=programs)
    with pytest.raises(
        UserError, match=r"checkpoints/8: no complete checkpoint; the run has 0, 5, 6, 9, 10, 14, 21, 27"
    ):
        loop.pretrain(decay, tmp_path / "new", branch=Branch(uninterrupted, 8), programs=programs)
    with pytest.raises(UserError, match=r"tokens=168 is less than one step behind the 168 of"):
        short = dataclasses.replace(decay, tokens=168)
        loop.pretrain(short, tmp_path / "new", branch=branch, programs=programs)
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_a_branch_may_begin_with_a_fresh_optimizer(recipe, programs, uninterrupted, tmp_path):
    run = tmp_path / "fresh"
    longer = dataclasses.replace(recipe, tokens=96 + 16)
    assert train(longer, run, programs, branch=Branch(uninterrupted, 6, "fresh")).step == 7
    mesh = make_mesh(MESH, jax.devices()[:1])
    with jax.set_mesh(mesh):
        target = abstract_state(recipe, mesh)
        ours, theirs = (load_items(place / "checkpoints" / "6", target) for place in (run, uninterrupted))
    jax.tree.map(np.testing.assert_array_equal, ours["params"], theirs["params"])
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(ours["opt_state"]))
    assert any(np.any(leaf) for leaf in jax.tree.leaves(theirs["opt_state"]))
    with pytest.raises(UserError, match=r"fresh: is a branch of .*whole@6 already"):
        loop.pretrain(longer, run, branch=Branch(uninterrupted, 6), programs=programs)


def test_windows_that_are_to_be_skipped_are_not_read_and_the_history_says_so(recipe, programs, read, tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    train(recipe, whole, programs)
    order = in_turn(read, range(10))
    read.clear()
    # Windows 13 to 17 are in the fourth and fifth batch of four.
    outcome = train(recipe, run, programs, [1, 3, 7], skip_windows=(13, 18))
    assert (outcome.step, outcome.tokens, outcome.stopped_by) == (10, 160, None)
    assert in_turn(read, range(8)) == [*order[:12], *order[20:40]]
    _, second = segments_of(run)
    assert (second.step, second.tokens, second.skipped, list(second.windows.values())) == (3, 48, (13, 18), [20])
    assert second.changes == ("windows 12 to 19 are not read",)
    with pytest.raises(UserError, match=r"--skip-windows 20:30: the run has passed window 48 already; .* --from"):
        loop.pretrain(recipe, run, skip_windows=(20, 30), programs=programs)


@pytest.mark.slow
def test_epochs_are_told_as_they_begin(recipe, programs, tmp_path, caplog):
    longer = dataclasses.replace(recipe, tokens=3 * 60 * LENGTH)
    with caplog.at_level("INFO"):
        train(longer, tmp_path / "run", programs)
    told = [record.message for record in caplog.records if "being read" in record.message]
    assert told == ["windows of `a` are being read a 2nd time", "windows of `a` are being read a 3rd time"]


def test_an_imported_checkpoint_is_trained_on_in_its_folder(recipe, programs, uninterrupted, tmp_path):
    mesh = make_mesh(MESH, jax.devices()[:1])
    with jax.set_mesh(mesh):
        params = load_items(uninterrupted / "checkpoints" / "6", abstract_state(recipe, mesh))["params"]
        export_hf(recipe.model, params, tmp_path / "weights")
    run, unknown = tmp_path / "run", tmp_path / "unknown"
    import_checkpoint(tmp_path / "weights", run, mesh, step=6, tokens=96)  # as `fineline import` without --recipe
    import_checkpoint(tmp_path / "weights", unknown, mesh, recipe=recipe, step=6)
    with pytest.raises(UserError, match=r"checkpoints/6: holds no optimizer state; give --optimizer-state fresh"):
        loop.pretrain(recipe, tmp_path / "new", branch=Branch(run, 6), programs=programs)
    assert train(recipe, run, programs, [7]).step == 10
    first, second = segments_of(run)
    assert (first.why, second.why, second.step, second.tokens, second.windows) == ("import", "start", 6, 96, {})
    assert [line["step"] for line in lines(run)] == [7, 8, 9, 10]
    with pytest.raises(UserError, match=r"unknown/checkpoints/6: its trained tokens are not known; import it again"):
        loop.pretrain(recipe, unknown, programs=programs)
