"""What happens beside the training of a run: observers, whose hooks the loop calls at fixed moments.

Every process calls every hook, in the same order: hooks may compute on the mesh.
"""

import contextlib
import faulthandler
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from fineline_jax import progress
from fineline_jax.data.loader import Batches
from fineline_jax.data.validation import open_validation
from fineline_jax.errors import UserError
from fineline_jax.multihost import LOST_STATUS
from fineline_jax.recipe import Clock, Data, Recipe
from fineline_jax.training.metrics import MetricsLog, peak_flops
from fineline_jax.training.programs import Programs
from fineline_jax.training.step import BATCH_SPEC, Metrics, make_validation_step

logger = logging.getLogger(__name__)


class Observer:
    """Does nothing at any hook; an observer overrides the hooks it needs."""

    def before_step(self, step: int) -> None:
        """Update number `step` (from 0) is dispatched next."""

    def after_step(self, step: int, metrics: Metrics, wait_seconds: float) -> None:
        """Update number `step` (from 1) is dispatched, `wait_seconds` after it could have been but for its batch.

        metrics: its metrics, on the devices; reading them waits for the update.
        """

    def before_save(self, step: int, params: dict, kept: bool) -> None:
        """The state after `step` updates is saved next; for ever, or as the rolling latest checkpoint."""

    def after_save(self, step: int, params: dict, kept: bool, wait: Callable[[], None]) -> None:
        """That state is being written; `wait()` returns when it is complete. Called for the checkpoint that a run
        resumes from as well."""

    def close(self) -> None:
        """The run has ended, in whatever way."""


class AtKeptCheckpoints(Observer):
    """Calls `function(step, params, wait)` at every kept checkpoint, in time order; training goes on when it returns.

    The checkpoint is being written meanwhile; `wait()` returns when it is complete. A run that resumes at a kept
    checkpoint calls it for that one again.
    """

    def __init__(self, function: Callable[[int, dict, Callable[[], None]], None]):
        self.function = function

    def after_save(self, step: int, params: dict, kept: bool, wait: Callable[[], None]) -> None:
        if kept:
            self.function(step, params, wait)


class Diverged(UserError):
    """The loss of a step is not finite."""

    def __init__(self, step: int, loss: float):
        super().__init__(
            f"the loss of step {step} is {loss}; resume with a lower optimizer.schedule.peak (and --accept-changes), or"
            " set optimizer.skip_nonfinite"
        )
        self.step, self.loss = step, loss


class StepMetrics(Observer):
    """Lines of the metrics log, one step late: step k is read while step k + 1 runs, so the host never makes the
    device wait. A checkpoint is never ahead of its metrics.

    Raises Diverged, after its line is written, for a loss that is not finite where such steps are not skipped.
    """

    def __init__(self, clock: Clock, mesh: jax.sharding.Mesh, log: MetricsLog, start: int):
        recipe = clock.recipe
        self.clock, self.recipe, self.log = clock, recipe, log
        self.note = ""
        """The newest loss that was read, for the progress bar."""
        self.pending: tuple[int, Metrics] | None = None
        peak = peak_flops(recipe, mesh.devices.flat[0].device_kind)
        flops = recipe.model.train_flops_per_token(recipe.data.sequence_length)
        self.mfu_per_rate = flops / (peak * mesh.size) if peak else None
        self.last_time, self.last_step = time.perf_counter(), start
        self.wait_seconds = 0.0
        self.spent: dict[str, float] = {}
        """Seconds since the last line by what took them, of SPENT."""

    def after_step(self, step: int, metrics: Metrics, wait_seconds: float) -> None:
        self.flush()
        self.pending = step, metrics
        self.wait_seconds += wait_seconds

    def before_save(self, step: int, params: dict, kept: bool) -> None:
        self.flush()

    def flush(self) -> None:
        """Write what is pending."""
        if self.pending is None:
            return
        (step, metrics), self.pending = self.pending, None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        bad = not math.isfinite(values["loss"]) and not self.recipe.optimizer.skip_nonfinite
        if bad or step % self.recipe.logging.every_steps == 0 or step == self.clock.last_step:
            self._write_line(step, values)
        self.note = f"loss {values['loss']:.3f}"
        if bad:
            raise Diverged(step, values["loss"])

    def _write_line(self, step: int, values: dict[str, float]) -> None:
        now = time.perf_counter()
        steps = max(step - self.last_step, 1)
        seconds = (now - self.last_time) / steps
        tokens = self.clock.tokens_at(step)
        rate = (tokens - self.clock.tokens_at(step - steps)) / steps / max(seconds, 1e-9)
        record = {"step": step, "tokens": tokens, **values}
        record |= {"tokens_per_second": rate, "step_seconds": seconds, "data_wait_seconds": self.wait_seconds / steps}
        record |= {"unix_time": time.time(), "interval_seconds": now - self.last_time, **self.spent}
        if self.mfu_per_rate is not None:
            record["mfu"] = rate * self.mfu_per_rate
        self.log.write(record)
        self.last_time, self.last_step, self.wait_seconds, self.spent = now, step, 0.0, {}

    @contextlib.contextmanager
    def spending(self, kind: str) -> Iterator[None]:
        """Count the seconds inside as `kind`_seconds of the next line."""
        began = time.monotonic()
        yield
        self.count(kind, time.monotonic() - began)

    def count(self, kind: str, seconds: float) -> None:
        self.spent[f"{kind}_seconds"] = self.spent.get(f"{kind}_seconds", 0.0) + seconds

    def close(self) -> None:
        self.log.close()


class Validation(Observer):
    """At every kept checkpoint a line with the mean cross-entropy over the windows of each validation set, in nats, as
    validation_loss/NAME. The line follows that of its step: put it behind StepMetrics.

    Raises UserError for a set none of whose targets is trained on.
    """

    def __init__(self, clock: Clock, mesh: jax.sharding.Mesh, log: MetricsLog, programs: Programs):
        recipe = clock.recipe
        self.clock, self.log = clock, log
        sharding = jax.NamedSharding(mesh, BATCH_SPEC)
        rows = recipe.batch.sequences // recipe.batch.accumulation
        self.batches = {
            windows.name: list(windows.batches(rows, sharding))
            for windows in open_validation(recipe.data, recipe.logging.validation, recipe.model.vocab_size)
        }
        self.step = programs("validation", recipe, mesh, lambda: jax.jit(make_validation_step(recipe, mesh)))

    def before_save(self, step: int, params: dict, kept: bool) -> None:
        if kept and self.batches:
            losses = {f"validation_loss/{name}": self.loss(params, name) for name in self.batches}
            self.log.write({"step": step, "tokens": self.clock.tokens_at(step), **losses})

    def loss(self, params: dict, name: str) -> float:
        sums = jax.device_get([self.step(params, *batch) for batch in self.batches[name]])
        targets = sum(float(targets) for _, targets in sums)
        if not targets:
            raise UserError(f"logging.validation {name}: all its targets are loss.ignore_token; leave the set out")
        return sum(float(loss) for loss, _ in sums) / targets


class Profiler(Observer):
    """The jax.profiler trace of the recipe's window of steps, in RUN/profile."""

    def __init__(self, recipe: Recipe, run: Path):
        self.first = recipe.logging.profile_start_step
        self.end = self.first + recipe.logging.profile_steps
        self.folder, self.running = run / "profile", False

    def before_step(self, step: int) -> None:
        if self.first <= step < self.end and not self.running:
            options = jax.profiler.ProfileOptions()
            # Python's own calls are not traced: the hook for that fails threads which begin meanwhile, a save's too.
            options.python_tracer_level = 0
            jax.profiler.start_trace(str(self.folder), profiler_options=options)
            self.running = True

    def after_step(self, step: int, metrics: Metrics, wait_seconds: float) -> None:
        if self.running and step == self.end:
            jax.block_until_ready(metrics)
            self.close()

    def close(self) -> None:
        if self.running:
            jax.profiler.stop_trace()
            self.running = False


class ProgressBar(Observer):
    """Trained tokens and the newest loss on standard error; put it behind StepMetrics, which waits for the steps.

    Rate and time left are those of the steps: the clock stands while one is compiled, and from before a save to the
    next step, which is when validation, scoring and other observers work.
    """

    def __init__(self, clock: Clock, start: int, end: int, metrics: StepMetrics, stopwatch: progress.Stopwatch):
        self.clock, self.metrics, self.stopwatch = clock, metrics, stopwatch
        self.stack, self.sequences = contextlib.ExitStack(), 0
        done, total = clock.tokens_at(start), clock.tokens_at(end)
        bar = progress.bar(clock.recipe.name, total, "tokens", done, self.stopwatch)
        self.advance = self.stack.enter_context(bar)

    def before_step(self, step: int) -> None:
        sequences = self.clock.sequences_at(step)
        compiles, self.sequences = sequences != self.sequences, sequences
        self.stopwatch.stop() if compiles else self.stopwatch.start()

    def after_step(self, step: int, metrics: Metrics, wait_seconds: float) -> None:
        self.advance(self.clock.tokens_at(step) - self.clock.tokens_at(step - 1), self.metrics.note)
        self.stopwatch.start()

    def before_save(self, step: int, params: dict, kept: bool) -> None:
        self.stopwatch.stop()

    def close(self) -> None:
        self.stopwatch.stop()
        self.stack.close()


class Watchdog(Observer):
    """Ends a process in which nothing has happened for `seconds`, one compilation or save included: the stacks of its
    threads and one line on standard error, LOST_STATUS."""

    def __init__(self, seconds: float):
        if not 0 < seconds < threading.TIMEOUT_MAX:
            raise UserError(f"--stuck-after {seconds:g}: must be a number of seconds above 0")
        self.seconds, self.closed = seconds, threading.Event()
        self.alive()
        self.thread = threading.Thread(target=self.watch, daemon=True, name="watchdog")
        self.thread.start()

    def alive(self) -> None:
        self.deadline = time.monotonic() + self.seconds
        assert sys.__stderr__ is not None
        faulthandler.dump_traceback_later(self.seconds, file=sys.__stderr__)  # by a thread that needs no lock of Python

    def before_step(self, step: int) -> None:
        self.alive()

    def after_step(self, step: int, metrics: Metrics, wait_seconds: float) -> None:
        self.alive()

    def before_save(self, step: int, params: dict, kept: bool) -> None:
        self.alive()

    def after_save(self, step: int, params: dict, kept: bool, wait: Callable[[], None]) -> None:
        self.alive()

    def watch(self) -> None:
        while not self.closed.wait(min(1.0, self.seconds / 10)):
            if time.monotonic() > self.deadline + self.seconds / 10:
                line = f"fineline: nothing has happened for {self.seconds:g} s (--stuck-after); start all again"
                print(line, file=sys.__stderr__, flush=True)
                os._exit(LOST_STATUS)

    def close(self) -> None:
        self.closed.set()
        self.thread.join()
        faulthandler.cancel_dump_traceback_later()


class Epochs(Observer):
    """Says when windows of a source are being read again, once for each epoch of it."""

    def __init__(self, batches: Batches, data: Data):
        self.batches = batches
        names = [Path(source.path).name for source in data.sources]
        self.epochs = {source: (name, 0) for source, name in zip(batches.lengths, names, strict=True)}

    def before_step(self, step: int) -> None:
        for source, passed in self.batches.passed(step + 1).items():
            (name, told), epoch = self.epochs[source], (passed - 1) // self.batches.lengths[source]
            if epoch > told:
                self.epochs[source] = name, epoch
                logger.info("windows of `%s` are being read a %s time", name, _ordinal(epoch + 1))


def _ordinal(number: int) -> str:
    """2 -> '2nd'."""
    suffix = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{suffix}"
