"""Runs trained as one program: the losses that each has alone, up to rounding, and folders that go on after a kill."""

import dataclasses

import jax
import numpy as np
import pytest
from sweep_examples import TOKENS, one_device_and_no_page, small_recipe, write_corpus

from fineline_jax import interface
from fineline_jax.ablation import Arm, Sweep, changed, grid
from fineline_jax.ablation import run as sweep_run
from fineline_jax.ablation.run import grouped
from fineline_jax.checkpoints.runs.digest_record import damage
from fineline_jax.errors import UserError
from fineline_jax.recipe import Recipe
from fineline_jax.training.metrics import TIMINGS, read_metrics
from fineline_jax.training.observers import Observer

EQUAL = 1e-5
"""Relative: float32 sums in another order. Over eight steps of so small a model they differ by less than 1e-6."""


@pytest.fixture(scope="module", autouse=True)
def small():
    with one_device_and_no_page():
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Recipe:
    return small_recipe(write_corpus(tmp_path_factory.mktemp("corpus")))


@pytest.fixture(scope="module")
def sweep(base) -> Sweep:
    """Three runs of one shape, and one of another that no other runs beside; one ends before the others."""
    arms = (
        Arm("a"),
        Arm("b", {"optimizer.schedule.peak": 3e-2, "optimizer.weight_decay": 0.3}),
        Arm("short", {"tokens": TOKENS // 2}),
        Arm("double", {"batch.sequences": 8}),
    )
    return Sweep("s", base, arms, equal_tokens=False, keep="all")


@pytest.fixture(scope="module")
def alone(sweep, tmp_path_factory):
    return interface.ablate(sweep, tmp_path_factory.mktemp("alone") / "out")


def assert_same_lines(sweep: Sweep, one, other) -> None:
    for trial in sweep.trials():
        lines = [read_metrics(end.out / "runs" / trial.name) for end in (one, other)]
        assert len(lines[0]) == len(lines[1]) > 4
        for pair in zip(*lines, strict=True):
            first, second = ({k: v for k, v in line.items() if k not in TIMINGS} for line in pair)
            assert first == pytest.approx(second, rel=EQUAL)


def test_runs_trained_together_have_the_losses_they_have_alone(sweep, alone, tmp_path):
    outcome = interface.ablate(sweep, tmp_path / "out", together=3)
    assert outcome.left == 0 and list(outcome.table["steps"]) == list(alone.table["steps"]) == [8, 8, 4, 4]
    assert_same_lines(sweep, outcome, alone)
    for trial in sweep.trials():
        folders = [end.out / "runs" / trial.name / "checkpoints" for end in (outcome, alone)]
        names = [sorted(path.name for path in folder.iterdir()) for folder in folders]
        assert names[0] == names[1]
        assert all(damage(folders[0] / name) is None for name in names[0])


@pytest.mark.slow
def test_one_program_is_made_for_all_and_none_when_a_run_ends_before_the_others(base, tmp_path):
    made = []

    def listen(event: str, seconds: float, fun_name: str = "", **_) -> None:
        if event == "/jax/core/compile/jaxpr_to_mlir_module_duration":
            made.append(fun_name)

    arms = (Arm("a"), Arm("b", {"optimizer.schedule.peak": 2e-2}), Arm("short", {"tokens": TOKENS // 2}))
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        interface.ablate(Sweep("s", base, arms, equal_tokens=False), tmp_path, together=3)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert [made.count(name) for name in ("jit(step)", "jit(initial_state)")] in ([1, 1], [2, 1])


@pytest.mark.slow
def test_a_kill_of_one_run_leaves_the_others_and_all_go_on_from_their_checkpoints(sweep, alone, tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    real = sweep_run.pretrain

    class Dying(Observer):
        def after_step(self, step, metrics, wait_seconds):
            if step == 3:
                raise Killed

    def dying(recipe, run, observers, **options):
        return real(recipe, run, observers=[*observers, *([Dying()] if run.name.startswith("b_") else [])], **options)

    with monkeypatch.context() as patch:
        patch.setattr(sweep_run, "pretrain", dying)
        with pytest.raises(Killed):
            interface.ablate(sweep, tmp_path / "out", together=3)
    records = {path.parent.name for path in (tmp_path / "out").glob("runs/*/outcome.json")}
    assert records == {"a_seed-0", "short_seed-0"}
    assert_same_lines(sweep, interface.ablate(sweep, tmp_path / "out", together=3), alone)


@pytest.mark.slow
def test_a_run_that_diverges_leaves_the_others_as_they_are(base, alone, tmp_path):
    arms = (Arm("wild", {"optimizer.schedule.peak": 1e30, "optimizer.schedule.warmup_tokens": 0}), Arm("a"))
    outcome = interface.ablate(Sweep("s", base, arms, keep="all"), tmp_path, together=2)
    assert outcome.table["diverged"].str.startswith("loss ").tolist() == [True, False]
    assert_same_lines(Sweep("s", base, (Arm("a"),)), outcome, alone)


def test_groups_are_of_one_shape_and_a_batch_schedule_is_alone(base):
    trials = Sweep("s", base, grid({"batch.sequences": (4, 8), "optimizer.weight_decay": (0.0, 0.1)}), (0, 1)).trials()
    names = [[(t.recipe.batch.sequences, t.seed) for t in group] for group in grouped(trials, 3)]
    assert names == [[(4, 0), (4, 0), (4, 1)], [(8, 0), (8, 0), (8, 1)], [(4, 1)], [(8, 1)]]
    assert [len(group) for group in grouped(trials, 1)] == [1] * 8
    scheduled = changed(base, {"batch.schedule": ((64, 8),)})
    runs = [dataclasses.replace(trials[0], recipe=recipe) for recipe in (scheduled, scheduled, base)]
    assert [len(group) for group in grouped(runs, 4)] == [1, 1, 1]


def test_fewer_than_one_run_together_is_refused(sweep, tmp_path):
    with pytest.raises(UserError, match="--together 0: give 1, one run after another, or more"):
        interface.ablate(sweep, tmp_path, together=0)


@pytest.mark.slow
def test_several_micro_batches_are_added_as_alone(base, tmp_path):
    accumulated = changed(base, {"batch.accumulation": 2, "compute.micro_gradient_norm": True})
    sweep = Sweep("s", accumulated, (Arm("a"), Arm("b", {"optimizer.schedule.peak": 3e-2})))
    ends = [interface.ablate(sweep, tmp_path / str(count), together=count) for count in (1, 2)]
    assert_same_lines(sweep, *ends)
    assert np.isfinite(ends[1].table["train_loss"]).all()
