"""A pretraining run from top to bottom: recipe -> checkpoint series.

Everything a run needs follows from (recipe, seed, step), so starting, resuming after a kill and resuming elsewhere
are the same few lines: find the newest intact checkpoint, load it onto this mesh, go on.
"""

import contextlib
import dataclasses
import json
import logging
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from fineline_jax import progress
from fineline_jax.checkpoints.store import CheckpointStore
from fineline_jax.data.loader import global_batch, open_batches, open_validation_batches
from fineline_jax.data.prefetch import prefetch
from fineline_jax.errors import UserError
from fineline_jax.mesh import make_mesh
from fineline_jax.recipe import Recipe, differences, from_json, to_json
from fineline_jax.training.metrics import MetricsLog, peak_flops
from fineline_jax.training.step import (
    BATCH_SPEC,
    Metrics,
    State,
    abstract_state,
    initial_state,
    make_train_step,
    make_validation_step,
)
from fineline_jax.training.stop import stop_requests
from fineline_jax.whole import whole_folder, write_whole

log = logging.getLogger(__name__)

MAY_DIFFER = ("mesh.", "logging.", "name:")
"""Fields that change where a run computes and what it reports, never what it learns beyond rounding."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    run: Path
    step: int
    tokens: int
    stopped_by: str | None
    """Name of the signal that ended it early; None: it is complete."""


def pretrain(
    recipe: Recipe,
    run: Path,
    *,
    accept_changes: bool = False,
    on_kept: Callable[[int, dict], Callable[[], None] | None] | None = None,
) -> Outcome:
    """Train `recipe` into the folder `run`, or go on where it was interrupted.

    accept_changes: resume although the recipe, or what a data set holds, differs from what the folder records, which
    is replaced.
    on_kept: called with (step, params) at every kept checkpoint, in time order, while it is being written; what it
    returns is called when the checkpoint is complete, before training goes on. A run that resumes at a kept
    checkpoint calls it for that one again.

    Raises UserError for a recipe that does not fit the data, the devices or the folder, a loss that is not finite,
    and a checkpoint that cannot be written.
    """
    mesh = make_mesh(recipe.mesh)
    target = abstract_state(recipe, mesh)
    model, data, batch = recipe.model, recipe.data, recipe.batch
    batches = open_batches(data, sequences=batch.sequences, vocab_size=model.vocab_size, seed=recipe.seed)
    data_sets = {str(data_set.path): data_set.fingerprint for data_set, _ in batches.parts}
    claim_folder(recipe, run, data_sets, accept_changes)

    kept = recipe.kept_steps()
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(mesh))
        requested = stack.enter_context(stop_requests())
        store = stack.enter_context(
            CheckpointStore(
                run / "checkpoints",
                kept,
                recipe.latest_steps(),
                tokens_per_step=recipe.tokens_per_step,
                recipe=recipe.name,
            )
        )
        newest = store.latest_intact()
        if newest is None:
            start, state = 0, jax.jit(lambda: initial_state(recipe))()
        else:
            start, restored = store.restore(target, newest)
            state = dict(restored)
            log.info("resuming %s at step %d", run, start)
        writer = MetricsLog(run, recipe, newest)
        stack.callback(writer.close)
        report = Reporter(recipe, mesh, writer, start)
        profiler = Profiler(recipe, run)
        stack.callback(profiler.close)
        validate = make_validation(recipe, mesh)
        train_step = jax.jit(make_train_step(recipe, mesh), donate_argnums=0)

        sharding = jax.NamedSharding(mesh, BATCH_SPEC)
        load = lambda step: global_batch(batches, step, sharding)
        windows = stack.enter_context(contextlib.closing(prefetch(load, range(start, recipe.steps))))
        advance = stack.enter_context(
            progress.bar(recipe.name, recipe.steps * recipe.tokens_per_step, "tokens", start * recipe.tokens_per_step)
        )

        def at_kept(step: int, state: State) -> None:
            """What happens at a kept checkpoint besides saving it; on disk before the checkpoint is."""
            report.flush()
            if validate is not None:
                report.write({"step": step, "validation_loss": validate(state["params"])})

        def after_kept(step: int, state: State) -> None:
            """What happens beside saving it."""
            finish = on_kept(step, state["params"]) if on_kept is not None else None
            if finish is not None:
                store.wait()
                finish()

        if newest is None and 0 in kept:
            at_kept(0, state)
            store.maybe_save(0, state)
        if start in kept:
            after_kept(start, state)
        step, stopped_by = start, requested(start)
        while stopped_by is None and step < recipe.steps:
            loaded = next(windows)
            profiler.before(step)
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, metrics = train_step(state, loaded.value, np.int32(step))
            profiler.after(step, metrics)
            step += 1
            report.step(step, metrics, loaded.wait_seconds)
            advance(recipe.tokens_per_step, report.note)
            stopped_by = requested(step) if step < recipe.steps else None
            if step in kept:
                at_kept(step, state)
            elif stopped_by or store.is_due(step):
                report.flush()  # a checkpoint is never ahead of the metrics
            store.maybe_save(step, state, force=stopped_by is not None)
            if step in kept:
                after_kept(step, state)
        report.flush()
        store.wait()
    return Outcome(run, step, step * recipe.tokens_per_step, stopped_by)


def claim_folder(recipe: Recipe, run: Path, data_sets: dict[str, str], accept_changes: bool) -> None:
    """Write the recipe, the fingerprints of its data sets (by path) and the tokenizer into `run`; refuse a folder that
    holds checkpoints of another recipe or of other data."""
    path, data_path = run / "recipe.json", run / "data.json"
    if path.exists() and any((run / "checkpoints").glob("*")) and not accept_changes:
        changed = [line for line in differences(from_json(path), recipe) if not line.startswith(MAY_DIFFER)]
        if changed:
            raise UserError(
                f"{path}: the recipe has changed ({'; '.join(changed)}); train into another --run folder, or give"
                " --accept-changes to go on with the new one"
            )
        seen = _recorded_data_sets(data_path)
        for data_set, fingerprint in data_sets.items():
            if seen.get(data_set, fingerprint) != fingerprint:
                raise UserError(
                    f"{data_set}: holds other data than {run} was trained on; restore it, train into another --run"
                    " folder, or give --accept-changes to go on with it"
                )
    if jax.process_index() != 0:
        return
    run.mkdir(parents=True, exist_ok=True)
    for file, text in ((data_path, json.dumps(data_sets, indent=2) + "\n"), (path, to_json(recipe))):
        write_whole(file, text, alone=True)
    tokenizer = recipe.data.sources[0].tokenizer
    if tokenizer.is_dir() and not (run / "tokenizer").exists():
        with whole_folder(run / "tokenizer", alone=True) as copy:
            shutil.copytree(tokenizer, copy, dirs_exist_ok=True)


def _recorded_data_sets(path: Path) -> dict[str, str]:
    """Fingerprints of data sets by path; none where the run was imported and never trained."""
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{path}: not the record of a run's data sets ({error}); restore it, or delete it if the data are the same"
        ) from error


def make_validation(recipe: Recipe, mesh: jax.sharding.Mesh) -> Callable[[dict], float] | None:
    """`validate(params)`: mean cross-entropy in nats over the fixed validation windows; None without any."""
    sequences = recipe.batch.sequences // recipe.batch.accumulation
    opened = open_validation_batches(
        recipe.data,
        windows=recipe.logging.validation_sequences,
        sequences=sequences,
        vocab_size=recipe.model.vocab_size,
    )
    if opened is None:
        return None
    batches, count = opened
    sharding = jax.NamedSharding(mesh, BATCH_SPEC)
    windows = [global_batch(batches, index, sharding) for index in range(count)]
    step = jax.jit(make_validation_step(recipe, mesh))

    def validate(params: dict) -> float:
        sums = [step(params, piece) for piece in windows]
        return sum(float(loss) for loss, _ in sums) / sum(float(targets) for _, targets in sums)

    return validate


class Reporter:
    """Metrics one step late: step k is read while step k+1 runs, so the host never makes the device wait."""

    def __init__(self, recipe: Recipe, mesh: jax.sharding.Mesh, writer: MetricsLog, start: int):
        self.recipe, self.writer = recipe, writer
        self.note = ""
        self.pending: tuple[int, Metrics] | None = None
        peak = peak_flops(recipe, mesh.devices.flat[0].device_kind)
        flops = recipe.model.train_flops_per_token(recipe.data.sequence_length)
        self.mfu_per_rate = flops / (peak * mesh.size) if peak else None
        self.last_time, self.last_step = time.perf_counter(), start
        self.waited = 0.0

    def step(self, step: int, metrics: Metrics, waited: float) -> None:
        """Take the metrics of update number `step` (from 1) and write those of the one before."""
        self.flush()
        self.pending = step, metrics
        self.waited += waited

    def flush(self) -> None:
        """Write what is pending. Raises UserError if its loss is not finite and such steps are not skipped."""
        if self.pending is None:
            return
        (step, metrics), self.pending = self.pending, None
        values = {name: float(value) for name, value in metrics.items()}
        bad = not math.isfinite(values["loss"]) and not self.recipe.optimizer.skip_nonfinite
        if bad or step % self.recipe.logging.every_steps == 0 or step == self.recipe.steps:
            self._write_line(step, values)
        self.note = f"loss {values['loss']:.3f}"
        if bad:
            raise UserError(
                f"the loss of step {step} is {values['loss']}; resume with a lower optimizer.schedule.peak (and"
                " --accept-changes), or set optimizer.skip_nonfinite"
            )

    def write(self, record: dict) -> None:
        self.writer.write(record)

    def _write_line(self, step: int, values: dict[str, float]) -> None:
        now = time.perf_counter()
        steps = max(step - self.last_step, 1)
        seconds = (now - self.last_time) / steps
        rate = self.recipe.tokens_per_step / max(seconds, 1e-9)
        record = {"step": step, "tokens": step * self.recipe.tokens_per_step, **values}
        record |= {"tokens_per_second": rate, "step_seconds": seconds, "data_wait_seconds": self.waited / steps}
        if self.mfu_per_rate is not None:
            record["mfu"] = rate * self.mfu_per_rate
        self.writer.write(record)
        self.last_time, self.last_step, self.waited = now, step, 0.0


class Profiler:
    """The jax.profiler trace of the recipe's window of steps, in RUN/profile."""

    def __init__(self, recipe: Recipe, run: Path):
        self.first = recipe.logging.profile_start_step
        self.end = self.first + recipe.logging.profile_steps
        self.folder, self.running = run / "profile", False

    def before(self, step: int) -> None:
        """Call it before update `step` (from 0) is started."""
        if self.first <= step < self.end and not self.running:
            options = jax.profiler.ProfileOptions()
            # Python's own calls are not traced: the hook for that fails threads which begin meanwhile, a save's too.
            options.python_tracer_level = 0
            jax.profiler.start_trace(str(self.folder), profiler_options=options)
            self.running = True

    def after(self, step: int, metrics: Metrics) -> None:
        """Call it with the metrics of update `step`; waits for them at the end of the window."""
        if self.running and step == self.end - 1:
            jax.block_until_ready(metrics)
            self.close()

    def close(self) -> None:
        if self.running:
            jax.profiler.stop_trace()
            self.running = False
