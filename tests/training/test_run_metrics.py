"""What a run says about itself: every field of a line against its definition, with a clock set by hand."""

import dataclasses
import gc
import json
import math
import os
import sys
import types
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
import pytest
from commands import events

from fineline_jax.errors import UserError
from fineline_jax.mesh import make_mesh
from fineline_jax.models.config import ModelConfig
from fineline_jax.recipe import Batch, Clock, Data, Logging, MeshShape, Optimizer, Recipe, Schedule, Source
from fineline_jax.training import observers
from fineline_jax.training.metrics import TIMINGS, MetricsLog, cut_behind, peak_flops, read_metrics
from fineline_jax.training.observers import StepMetrics

LENGTH, SEQUENCES, STEPS = 8, 4, 10
TOKENS = LENGTH * SEQUENCES
# One layer of width 8 with 2 heads of 4, a SwiGLU of 16, the head of 32 ids; the embedding is a look-up.
WEIGHTS = 4 * 8 * 8 + 3 * 8 * 16 + 2 * 8 + 8 + 8 * 32
FLOPS = 6 * WEIGHTS + 6 * 1 * 2 * 4 * LENGTH


def recipe_of(**logging) -> Recipe:
    return Recipe(
        "metrics",
        ModelConfig(vocab_size=32, width=8, layers=1, heads=2, mlp_width=16, context=LENGTH),
        Data((Source("x"),), sequence_length=LENGTH),
        Batch(SEQUENCES),
        Optimizer(Schedule(), skip_nonfinite=logging.pop("skip", False)),
        tokens=STEPS * TOKENS,
        logging=Logging(**({"tensorboard": False} | logging)),
    )


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(
        observers,
        "time",
        types.SimpleNamespace(perf_counter=lambda: now[0], monotonic=lambda: now[0], time=lambda: 9e8 + now[0]),
    )
    return now


def reporter(recipe: Recipe, start: int = 0, devices: int = 1, kind: str = "cpu") -> tuple[StepMetrics, list[dict]]:
    written: list[dict] = []
    chips = np.array([types.SimpleNamespace(device_kind=kind)] * devices, object).reshape(1, devices, 1)
    mesh = cast(Any, types.SimpleNamespace(devices=chips, size=devices))
    writer = cast(MetricsLog, types.SimpleNamespace(write=written.append))
    return StepMetrics(Clock(recipe), mesh, writer, start), written


def metrics(**values: float) -> dict[str, Any]:
    return {name: np.float32(value) for name, value in values.items()}


def test_the_metrics_of_a_step_are_read_when_the_next_one_is_under_way():
    read: list[int] = []

    class Metric:
        """A number that has to be waited for."""

        def __init__(self, step: int):
            self.step = step

        def __float__(self) -> float:
            read.append(self.step)
            return float(self.step)

    report, written = reporter(recipe_of())
    for step in (1, 2, 3):
        report.after_step(step, cast(dict, {"loss": Metric(step)}), wait_seconds=0.0)
        assert read == list(range(1, step)), "the host waited for a step that had only begun"
        assert report.note == ("" if step == 1 else f"loss {step - 1}.000")
    report.flush()
    report.flush()
    assert [(line["step"], line["loss"]) for line in written] == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert report.note == "loss 3.000"


def test_every_field_of_a_line_has_its_definition(clock):
    """Peak 0.5 TFLOP/s on each of 4 devices; a line per 3 steps and one of the last; resumed at step 1."""
    report, written = reporter(recipe_of(every_steps=3, peak_tflops=0.5), start=1, devices=4)
    began = clock[0]
    for step in range(2, STEPS + 1):
        clock[0] += step  # seconds until it is dispatched
        if step in (5, 6):
            with report.spending("checkpoint"):
                clock[0] += 0.0 if step == 5 else 1.0
            clock[0] -= 0.0 if step == 5 else 1.0
            report.count("compile", 0.25)
        report.after_step(step, metrics(loss=step / 4, gradient_norm=2.0), wait_seconds=0.1 * step)
    clock[0] += 100.0
    report.flush()
    # A line of step k is written when k + 1 is dispatched; the waits are those up to k.
    spans = {3: (2, 2 + 3 + 4, 0.2 + 0.3), 6: (3, 5 + 6 + 7, 0.4 + 0.5 + 0.6), 9: (3, 8 + 9 + 10, 0.7 + 0.8 + 0.9)}
    spans[10] = (1, 100, 1.0)
    expected = [
        {
            "step": step,
            "tokens": step * TOKENS,
            "loss": step / 4,
            "gradient_norm": 2.0,
            "tokens_per_second": pytest.approx(steps * TOKENS / seconds),
            "step_seconds": pytest.approx(seconds / steps),
            "data_wait_seconds": pytest.approx(waited / steps),
            "mfu": pytest.approx(steps * TOKENS / seconds * FLOPS / (4 * 0.5e12)),
            "interval_seconds": pytest.approx(seconds),
            "unix_time": pytest.approx(9e8 + began + sum(range(2, step + 2)) if step < 10 else 9e8 + clock[0]),
            **({"checkpoint_seconds": 1.0, "compile_seconds": 0.5} if step == 6 else {}),
        }
        for step, (steps, seconds, waited) in spans.items()
    ]
    assert written == expected
    assert {name for line in written for name in line} - set(TIMINGS) == {"step", "tokens", "loss", "gradient_norm"}


def test_the_peak_is_that_of_one_device_of_the_kind_that_the_mesh_has(clock):
    report, written = reporter(recipe_of(), devices=2, kind="TPU v4")
    clock[0] += 4.0
    report.after_step(1, metrics(loss=1.0), 0.0)
    report.flush()
    assert written[0]["mfu"] == pytest.approx(TOKENS / 4.0 * FLOPS / (2 * 275e12))
    report, written = reporter(recipe_of(), kind="cpu")
    report.after_step(1, metrics(loss=1.0), 0.0)
    report.flush()  # the clock stands still
    assert "mfu" not in written[0] and written[0]["tokens_per_second"] == pytest.approx(TOKENS / 1e-9)


@pytest.mark.parametrize(
    ("kind", "tflops"),
    [
        # Names that jax.Device.device_kind has; dense bfloat16 from the vendors' data sheets.
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5e", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU v6e", 918),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H200", 989),
        ("cpu", None),
        ("TPU v3", None),
        ("Quadro NVIDIA A100", None),
    ],
)
def test_peaks_are_the_published_ones(kind, tflops):
    assert peak_flops(recipe_of(), kind) == (None if tflops is None else tflops * 1e12)
    assert peak_flops(recipe_of(peak_tflops=2.5), kind) == 2.5e12


def test_a_loss_that_is_not_finite_is_written_and_named_unless_skipped():
    report, written = reporter(recipe_of(every_steps=5))
    report.after_step(3, metrics(loss=math.inf), 0.0)
    with pytest.raises(UserError, match="the loss of step 3 is inf"):
        report.after_step(4, metrics(loss=1.0), 0.0)
    assert [line["step"] for line in written] == [3]
    report, written = reporter(recipe_of(every_steps=5, skip=True))
    for step in range(1, 8):
        report.after_step(step, metrics(loss=math.nan), 0.0)
    assert [line["step"] for line in written] == [5]


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_is_in_the_file_when_write_returns_and_what_is_not_finite_is_null(tmp_path):
    log = MetricsLog(tmp_path, recipe_of(), None)
    log.write({"step": 1, "loss": math.nan, "norm": -math.inf, "rate": 0.5, "count": 3})
    assert records(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": None, "norm": None, "rate": 0.5, "count": 3}]
    log.close()


@pytest.mark.parametrize(("step", "left"), [(None, []), (0, [0]), (2, [0, 1, 2]), (9, [0, 1, 2, 3])])
def test_a_log_goes_on_behind_the_step_that_is_resumed(tmp_path, step, left):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": number}) + "\n" for number in range(4)) + '{"st')
    log = MetricsLog(tmp_path, recipe_of(), step)
    log.write({"step": 7})
    log.close()
    assert [record["step"] for record in records(path)] == [*left, 7]


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    log = MetricsLog(tmp_path, recipe_of(tensorboard=True), None)
    log.write({"step": 1})
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_a_file_with_nothing_to_cut_is_not_touched(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    before = path.stat()
    cut_behind(path, 2)
    assert path.stat() == before
    cut_behind(tmp_path / "absent.jsonl", 2)
    assert not (tmp_path / "absent.jsonl").exists()


def test_lines_behind_the_checkpoint_and_a_line_cut_short_are_removed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    cut_behind(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    path.write_text('{"step": 1}\n{"step": 2}')  # whole but for its end
    cut_behind(path, 2)
    assert path.read_text() == '{"step": 1}\n'


def test_lines_are_cut_in_a_file_of_their_own_that_is_on_the_disk_first(tmp_path, monkeypatch):
    """A machine that stops meanwhile leaves all lines, or those before the checkpoint."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    with monkeypatch.context() as stopping:
        stopping.delattr(os, "fsync")
        with pytest.raises(AttributeError):
            cut_behind(path, 1)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    cut_behind(path, 1)
    assert path.read_text() == '{"step": 1}\n'


def test_lines_that_are_none_are_removed_on_resume_and_named_by_readers(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(tmp_path) == []
    path.write_text('{"step": 1}\n[2]\n{"loss": 2.0}\n{"step": 2}\n{"step": 3')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: no line of metrics \(it has no step\); remove it"):
        read_metrics(tmp_path)
    cut_behind(path, 2)
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 2}]
    path.write_text('{"step": 1}\n{"step": 2')  # as one may find it while the run goes on
    assert read_metrics(tmp_path) == [{"step": 1}]
    path.write_text('{"step": 1}\n{"step": "2"}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: "):
        read_metrics(tmp_path)


def test_zeros_that_a_crash_of_the_machine_left_are_removed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + bytes(40) + b"\n")
    cut_behind(path, 2)
    assert path.read_text() == '{"step": 1}\n'


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_is_said_once_by_the_name_of_the_metrics_file(tmp_path):
    log = MetricsLog(tmp_path, recipe_of(), None)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, log.file.fileno())
    os.close(full)
    with pytest.raises(UserError, match=r"metrics\.jsonl: No space left on device; .* run the same command again"):
        log.write({"step": 1, "loss": 2.0})
    log.close()
    del log
    gc.collect()


def test_a_write_that_takes_half_of_a_line_is_gone_on_with(tmp_path):
    log, taken = MetricsLog(tmp_path, recipe_of(), None), []
    log.file.close()
    log.file = cast(Any, types.SimpleNamespace(write=lambda line: taken.append(line[:5]) or 5, close=lambda: None))
    log.write({"step": 1, "loss": 2.0})
    assert json.loads(b"".join(taken)) == {"step": 1, "loss": 2.0}
    log.close()


def test_tensorboard_shows_every_number_at_its_step_and_forgets_what_is_trained_again(tmp_path):
    recipe = recipe_of(tensorboard=True)
    log = MetricsLog(tmp_path, recipe, None)
    log.write({"step": 4, "loss": 2.5, "tokens": 128})
    log.write({"step": 4, "validation_loss/held_out": 3.5})
    log.close()
    board = events(tmp_path / "tensorboard")
    shown = {(value.tag, event.step): value.simple_value for event in board for value in event.summary.value}
    assert shown == {("loss", 4): 2.5, ("tokens", 4): 128.0, ("validation_loss/held_out", 4): 3.5}
    assert [event.step for event in board if event.session_log.status == 1] == [1]
    for file in (tmp_path / "tensorboard").iterdir():
        file.unlink()
    MetricsLog(tmp_path, recipe, 4).close()
    purged = [event.step for event in events(tmp_path / "tensorboard") if event.session_log.status == 1]
    assert purged == [5]  # SessionLog.START: what stands at this step and behind it is void
    MetricsLog(tmp_path / "tensorboard", recipe_of(), None).close()
    assert not (tmp_path / "tensorboard" / "tensorboard").exists()


def test_a_full_disk_under_tensorboard_is_told_at_once(tmp_path, monkeypatch):
    """The thread of tensorboardX's SummaryWriter ends without a word, and the tenth number after that waits forever."""
    full = lambda path: os.fdopen(os.open("/dev/full", os.O_WRONLY), "wb")
    monkeypatch.setattr("tensorboardX.record_writer.open_file", full)
    log = MetricsLog(tmp_path, recipe_of(tensorboard=True), None)
    with pytest.raises(
        UserError, match="tensorboard: No space left on device; fix that and run the same command again"
    ):
        log.write({"step": 1, "loss": 2.0})
    assert [record["step"] for record in records(tmp_path / "metrics.jsonl")] == [1]


def test_weights_and_biases_gets_one_run_per_folder_and_no_step_that_it_has_already(tmp_path, monkeypatch):
    begun, sent = [], []

    def init(**options):
        begun.append(options)
        return types.SimpleNamespace(
            step=5, log=lambda numbers, step: sent.append((step, numbers)), finish=lambda: sent.append("finished")
        )

    fake = types.ModuleType("wandb")
    vars(fake).update(init=init, Error=RuntimeError)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    recipe = recipe_of(wandb_project="p")
    for _ in range(2):
        log = MetricsLog(tmp_path, recipe, 3)
        log.write({"step": 4, "loss": 1.0})
        log.write({"step": 5, "loss": 2.0, "name": "x"})
        log.write({"step": 5, "validation_loss/held_out": 3.0})
        log.close()
        assert sent == [(5, {"loss": 2.0}), (5, {"validation_loss/held_out": 3.0}), "finished"]
        sent.clear()
    assert begun[0] == begun[1]
    number = begun[0].pop("id")
    assert len(number) == 32 and (tmp_path / "wandb" / "id").read_text() == number
    expected = {"project": "p", "name": "metrics", "resume": "allow", "dir": tmp_path}
    assert begun[0] == {**expected, "config": dataclasses.asdict(recipe)}
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"logging\.wandb_project='p' needs the wandb extra"):
        MetricsLog(tmp_path, recipe, None)


def test_the_mesh_of_a_run_says_how_many_devices_share_the_work():
    mesh = make_mesh(MeshShape(fsdp=2, tensor=2), jax.devices()[:4])
    report = StepMetrics(Clock(recipe_of(peak_tflops=1.0)), mesh, cast(Any, None), 0)
    assert report.mfu_per_rate == pytest.approx(FLOPS / 4e12)
