"""The runs of a sweep: the same as alone, compiled once for each shape, kept over kills, and what they end as."""

import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import pytest
from sweep_examples import TOKENS, one_device_and_no_page, small_recipe, write_corpus

from fineline_jax import interface
from fineline_jax.ablation import Arm, Sweep, changed, grid
from fineline_jax.ablation import run as sweep_run
from fineline_jax.ablation.plan import cost, plan_text
from fineline_jax.ablation.summary import arms_text, time_text
from fineline_jax.checkpoints.runs.digest_record import damage, read_record
from fineline_jax.checkpoints.runs.retention import keep_only
from fineline_jax.checkpoints.runs.store import load_items
from fineline_jax.errors import UserError
from fineline_jax.recipe import Recipe
from fineline_jax.training import loop
from fineline_jax.training.metrics import TIMINGS, read_metrics
from fineline_jax.training.observers import Diverged
from fineline_jax.training.programs import shape_of
from fineline_jax.training.step import abstract_state, initial_state

ARMS = grid({"batch.sequences": (4, 8), "optimizer.schedule.peak": (1e-2, 3e-2)})
TIMES = ["seconds", "step_seconds"]
ENDS = ("steps", "tokens", "diverged", "train_loss", "validation_loss/held_out")


@pytest.fixture(scope="module", autouse=True)
def small():
    with one_device_and_no_page():
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def base(corpus) -> Recipe:
    return small_recipe(corpus)


@pytest.fixture(scope="module")
def sweep(base) -> Sweep:
    """Two shapes, four arms, two seeds."""
    return Sweep("small", base, ARMS, seeds=(0, 1), keep="all")


@pytest.fixture(scope="module")
def finished(sweep, tmp_path_factory):
    """Its outcome, and how many programs were lowered in each of its runs."""
    lowered = []
    real, patch = sweep_run.run_trial, pytest.MonkeyPatch()

    def counted(*arguments):
        lowered.append(0)
        return real(*arguments)

    def listen(event: str, seconds: float, **_) -> None:
        if lowered and event == "/jax/core/compile/jaxpr_to_mlir_module_duration":
            lowered[-1] += 1

    patch.setattr(sweep_run, "run_trial", counted)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        outcome = interface.ablate(sweep, tmp_path_factory.mktemp("sweep") / "out")
    finally:
        patch.undo()
        jax.monitoring.unregister_event_duration_listener(listen)
    return outcome, lowered


def lines_of(run: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in read_metrics(run)]


def test_each_shape_is_compiled_once_and_no_other_run_compiles_anything(finished):
    _, lowered = finished
    assert len(lowered) == 8
    first_of_shape = lowered[0], lowered[2]
    assert all(count > 0 for count in first_of_shape)
    assert [count for number, count in enumerate(lowered) if number not in (0, 2)] == [0] * 6


def test_a_run_of_a_sweep_is_bit_by_bit_that_of_pretrain(sweep, finished, tmp_path):
    trial = sweep.trials()[6]  # it runs with what others compiled, and its learning rates differ from theirs
    loop.pretrain(trial.recipe, tmp_path / trial.name)
    alone, within = tmp_path / trial.name, finished[0].out / "runs" / trial.name
    assert lines_of(alone) == lines_of(within)
    assert (alone / "recipe.json").read_bytes() == (within / "recipe.json").read_bytes()
    last = f"checkpoints/{trial.last_step}"
    target = abstract_state(trial.recipe, loop.make_mesh(trial.recipe.mesh))
    states = [load_items(run / last, target) for run in (alone, within)]
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_the_seed_of_the_weights_as_an_argument_gives_the_weights_of_the_seed_as_a_constant(base):
    seeds = 0, 11_111, 2**32 - 1
    with jax.set_mesh(loop.make_mesh(base.mesh)):
        constant = jax.jit(lambda: [initial_state(changed(base, {"seed": seed}))["params"] for seed in seeds])()
        of_seed = jax.jit(lambda seed: initial_state(base, seed)["params"])
        jax.tree.map(np.testing.assert_array_equal, constant, [of_seed(np.uint32(seed)) for seed in seeds])


def test_the_table_has_a_row_per_run_with_what_is_in_its_metrics(sweep, finished):
    table = finished[0].table
    assert finished[0].left == 0 and finished[0].stopped_by is None
    assert list(table["series"]) == [trial.name for trial in sweep.trials()]
    assert list(table["seed"]) == [0] * 4 + [1] * 4
    assert list(table["batch.sequences"]) == [4, 4, 8, 8] * 2
    assert (table["step_seconds"] > 0).all() and (table["step_seconds"] < table["seconds"]).all()
    for row in table.to_dict("records"):
        lines = read_metrics(finished[0].out / "runs" / row["series"])
        losses = [line["loss"] for line in lines if "loss" in line]
        assert len(losses) == row["steps"] == TOKENS // row["batch.sequences"] // 8
        assert row["train_loss"] == losses[-1]  # the last tenth of 8 steps is the last one
        assert row["validation_loss/held_out"] == lines[-1]["validation_loss/held_out"]
        assert row["tokens"] == TOKENS and row["diverged"] == ""
    for written in (pd.read_csv(finished[0].out / "summary.csv"), pd.read_parquet(finished[0].out / "summary.parquet")):
        assert written["train_loss"].tolist() == pytest.approx(table["train_loss"].tolist(), rel=1e-12)
    first = table[table["arm"] == ARMS[0].name]["train_loss"]
    assert f"{first.mean():.4f} ± {first.std(ddof=1):.4f}" in arms_text(table).splitlines()[1]


def test_the_time_of_a_sweep_is_that_of_its_steps_and_the_rest():
    table = pd.DataFrame({"seconds": [100.0, 25.0], "step_seconds": [85.0, 15.0]})
    assert time_text(table) == (
        "2 runs in 2m05s: 80% optimizer steps, 20% start, compilation, validation, scoring and saving"
    )


def test_the_plan_has_the_numbers_of_the_runs_before_they_are_run(sweep, finished, tmp_path):
    trials = sweep.trials()
    shapes = {shape_of(trial.recipe) for trial in trials}
    planned = cost(trials, "all", dict.fromkeys(shapes, 0.5))
    assert len(shapes) == 2 and (planned.runs, planned.tokens, planned.seconds) == (8, 8 * TOKENS, 0.5 * 4 * (8 + 4))
    # PaLM's count (2204.02311, appendix B): 6 per weight that multiplies, and half of 12 L H Q T for causal attention.
    weights = 2 * 8 * 8 + 2 * 8 * 8 + 3 * 8 * 16 + 8 * 32 + 3 * 8
    assert planned.flops == 8 * TOKENS * (6 * weights + 6 * 1 * 2 * 4 * 8)
    state = jax.tree.leaves(abstract_state(sweep.base, loop.make_mesh(sweep.base.mesh)))
    arrays = sum(leaf.size * leaf.dtype.itemsize for leaf in state if leaf.size > 1)  # without Adam's count
    assert planned.disk == 8 * 3 * arrays  # runs, checkpoints
    assert cost(trials, "last").disk == 8 * arrays and cost(trials, "weights").disk == 8 * (arrays + 2 * arrays // 3)
    text = plan_text(sweep, trials, tmp_path, None)
    assert "small: 4 arms, 8 runs into" in text and "batch.sequences" in text and "warmup" not in text


def test_rounding_to_whole_steps_is_said_by_the_plan_and_before_the_first_run(base, tmp_path, monkeypatch, caplog):
    sweep = Sweep("s", base, grid({"batch.sequences": (3, 4)}))
    said = "1 arm rounded down to whole steps: at most 16 tokens less (sequences-3)."
    assert said in plan_text(sweep, sweep.trials(), tmp_path, None)
    monkeypatch.setattr(sweep_run, "run_trial", lambda *_: None)
    with caplog.at_level("INFO"):
        sweep_run.run_trials(sweep, sweep.trials(), tmp_path, score=None, benchmarks=None)
    assert next(line for line in caplog.messages if "rounded" in line or line.startswith("run ")) == said


def test_data_that_are_not_there_are_told_by_the_plan_and_before_the_first_run(base, tmp_path, monkeypatch):
    """The second arm's: else the first would train before it is known."""
    arms = (Arm("a"), Arm("b", {"data.sources.0.path": "nowhere"}))
    sweep = Sweep("s", base, arms)
    assert "It cannot run yet: nowhere: no such data set" in plan_text(sweep, sweep.trials(), tmp_path, None)
    monkeypatch.setattr(sweep_run, "run_trial", lambda *_: pytest.fail("trained"))
    with pytest.raises(UserError, match="nowhere: no such data set"):
        interface.ablate(sweep, tmp_path)


def test_what_has_ended_is_not_run_again_and_a_changed_arm_is_refused(base, sweep, finished, monkeypatch):
    out = finished[0].out
    monkeypatch.setattr(sweep_run, "pretrain", lambda *_, **__: pytest.fail("trained again"))
    again = interface.ablate(sweep, out)
    pd.testing.assert_frame_equal(again.table, finished[0].table)
    other = Sweep("small", base, tuple(Arm(arm.name, {**arm.changes, "loss.z_loss": 1e-4}) for arm in ARMS))
    with pytest.raises(
        UserError, match=r"was trained with another recipe \(loss.z_loss: 0.0 -> 0.0001\); give another"
    ):
        interface.ablate(other, out)


class Killed(Exception):
    """Stands for SIGKILL: nothing after it is done."""


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param("second run begins", marks=pytest.mark.slow),
        "a run is trained",
        pytest.param("its checkpoints are thinned", marks=pytest.mark.slow),
    ],
)
def test_a_sweep_killed_and_started_again_ends_as_one_that_was_not(base, finished, tmp_path, monkeypatch, moment):
    sweep = Sweep("s", base, ARMS[:2], keep="weights")  # two of the runs of `finished`
    trained = []

    def counting(recipe, run, **options):
        if moment == "second run begins" and len(trained) == 1:
            raise Killed
        trained.append(run.name)
        return real(recipe, run, **options)

    def dying(*arguments):
        if moment == "its checkpoints are thinned":
            keep_only(*arguments)
        raise Killed

    with monkeypatch.context() as patch:
        real = sweep_run.pretrain
        patch.setattr(sweep_run, "pretrain", counting)
        if moment != "second run begins":
            patch.setattr(sweep_run, "keep_only", dying)
        with pytest.raises(Killed):
            interface.ablate(sweep, tmp_path / "killed")
    again = interface.ablate(sweep, tmp_path / "killed")
    assert (tmp_path / "killed" / "summary.csv").is_file()
    whole = finished[0]
    pd.testing.assert_frame_equal(*(table.drop(columns=TIMES) for table in (again.table, whole.table[:2])))
    for trial in sweep.trials():
        assert lines_of(again.out / "runs" / trial.name) == lines_of(whole.out / "runs" / trial.name)


def test_an_arm_that_diverges_is_a_result_and_the_others_go_on(base, tmp_path):
    arms = (Arm("wild", {"optimizer.schedule.peak": 1e30, "optimizer.schedule.warmup_tokens": 0}), Arm("tame"))
    outcome = interface.ablate(Sweep("s", base, arms), tmp_path)
    wild, tame = outcome.table.to_dict("records")
    assert tame["diverged"] == "" and tame["steps"] == 8 and outcome.left == 0
    assert wild["diverged"].startswith("loss ") and 1 <= wild["steps"] < 8
    assert wild["tokens"] == 32 * wild["steps"]
    assert math.isfinite(wild["train_loss"]) and math.isfinite(wild["validation_loss/held_out"])
    lines = arms_text(outcome.table).splitlines()
    assert lines[1].split()[:3] == ["wild", "1", "1"] and lines[2].split()[:3] == ["tame", "1", "0"]


@pytest.mark.parametrize("keep", ["all", "weights", "last"])
def test_a_finished_run_keeps_what_was_asked_for_and_it_is_whole(finished, tmp_path, keep):
    run = tmp_path / "run"
    shutil.copytree(finished[0].out / "runs" / finished[0].table["series"][0], run)
    before = {path.relative_to(run): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for _ in range(2):  # the second time there is nothing left to do
        keep_only(run / "checkpoints", keep)
    found = {
        path.name: sorted(p.name for p in path.iterdir() if p.is_dir()) for path in (run / "checkpoints").iterdir()
    }
    both, weights = ["opt_state", "params"], ["params"]
    steps = {"all": both, "weights": weights, "last": None}[keep]
    assert found == {"8": both} | ({} if steps is None else {"0": steps, "4": steps})
    for name in found:
        assert damage(run / "checkpoints" / name) is None
    for path in run.rglob("*"):
        assert not path.is_file() or path.name == "complete.json" or path.read_bytes() == before[path.relative_to(run)]
    assert [c.step for c in interface.open_series(run).checkpoints] == sorted(map(int, found))


@pytest.mark.slow
def test_every_run_is_in_one_part(base, tmp_path):
    sweep = Sweep("s", base, ARMS[:2], seeds=(0,), keep="last")
    first = interface.ablate(sweep, tmp_path, part="1/2")
    assert list(first.table["arm"]) == [ARMS[0].name] and first.left == 1
    second = interface.ablate(sweep, tmp_path, part="2/2")
    assert list(second.table["arm"]) == [arm.name for arm in ARMS[:2]] and second.left == 0


def test_a_horizon_ends_every_run_there_with_a_checkpoint_and_its_losses(base, tmp_path):
    ended = lambda until: interface.ablate(Sweep("s", base, (Arm("a"),), until=until), tmp_path).table.to_dict(
        "records"
    )
    (row,) = ended(100)
    assert (row["steps"], row["tokens"]) == (3, 96)
    run = tmp_path / "runs" / "a_seed-0"
    assert read_record(run / "checkpoints" / "3")["kept"]  # pyright: ignore[reportOptionalSubscript]
    rates = [line["learning_rate"] for line in read_metrics(run) if "loss" in line]
    assert rates == pytest.approx([0, 5e-3, 1e-2])  # the warmup of 64 tokens, as in the whole run
    assert ended(160)[0]["steps"] == 5  # a later horizon goes on
    with pytest.raises(UserError, match="was trained to step 5, the sweep ends it at 3; give another --out"):
        ended(100)


SWEEP = """
from pathlib import Path
import sys
sys.path.insert(0, {helpers!r})
from sweep_examples import small_recipe
from fineline_jax.ablation import Sweep, changed, grid

def sweep():
    checkpoints = {{"checkpoints.at_tokens": (1024,), "checkpoints.latest_every_tokens": 512}}
    base = changed(small_recipe(Path({corpus!r})), {{"tokens": 2048, **checkpoints}})
    axes = {{"batch.sequences": (4, 8), "optimizer.schedule.peak": (1e-2, 3e-2)}}
    return Sweep("killed", base, grid(axes))
"""


@pytest.mark.slow
def test_twenty_sigkills_at_random_moments_of_a_sweep_lose_and_repeat_nothing(corpus, tmp_path):
    """The command itself. A run that has ended is not touched again, and table and metrics are those without kills."""
    file = tmp_path / "mine.py"
    file.write_text(SWEEP.format(helpers=str(Path(__file__).parents[1] / "helpers"), corpus=str(corpus)))
    command = [sys.executable, "-m", "fineline_jax", "ablate", str(file), "--out"]
    start = time.monotonic()
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
    seconds = time.monotonic() - start
    draw, kills = random.Random(7), 0

    def run(out: Path, until: float | None) -> int:
        process = subprocess.Popen([*command, str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            _, errors = process.communicate(timeout=until)
            assert process.returncode == 0, errors.decode()
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.communicate()
        return process.returncode

    for number in itertools.count():
        killed, ended = tmp_path / f"killed-{number}", dict[str, tuple[int, bytes]]()
        status = 1
        while status != 0:  # ended by itself, at last without a limit
            status = run(killed, draw.uniform(0.2, 1.0) * seconds if kills < 20 else None)
            kills += status == -signal.SIGKILL
            for record in killed.glob("runs/*/outcome.json"):
                now = record.stat().st_mtime_ns, record.read_bytes()
                assert ended.setdefault(record.parent.name, now) == now
        _equal_sweeps(killed, tmp_path / "whole")
        if kills >= 20:
            break


def _equal_sweeps(killed: Path, whole: Path) -> None:
    made = [path.relative_to(killed) for path in killed.glob("*/*.csv")]
    assert len(made) > 10
    for file in [*made, Path("losses.csv"), Path("report/findings.json"), Path("report/report.html")]:
        assert (killed / file).read_bytes() == (whole / file).read_bytes(), file
    tables = [pd.read_csv(folder / "summary.csv")[["series", *ENDS]] for folder in (whole, killed)]
    pd.testing.assert_frame_equal(*tables)
    for trial in tables[0]["series"]:
        assert lines_of(killed / "runs" / trial) == lines_of(whole / "runs" / trial)


def test_a_record_that_was_changed_is_named(sweep, finished, tmp_path):
    trial = sweep.trials()[0]
    run = tmp_path / trial.name
    run.mkdir()
    for name in ("recipe.json", "outcome.json"):
        (run / name).write_bytes((finished[0].out / "runs" / trial.name / name).read_bytes())
    assert sweep_run.ending(run, trial) is not None
    record = json.loads((run / "outcome.json").read_bytes())
    (run / "outcome.json").write_text(json.dumps(record | {"step": 9}))
    with pytest.raises(UserError, match=r"not the record of a finished run.*delete it to finish the run again"):
        sweep_run.ending(run, trial)


def test_divergence_names_the_step_and_its_loss():
    error = Diverged(12, math.inf)
    assert (error.step, error.loss) == (12, math.inf) and "step 12 is inf" in str(error)
