"""A pretraining run from top to bottom: recipe -> checkpoint series.

Everything a run needs follows from (history, step), so starting, resuming after a kill and resuming elsewhere are the
same few lines: find the newest intact checkpoint, load it onto this mesh, go on.
"""

import contextlib
import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from fineline_jax.checkpoints.runs.digest_record import check_path
from fineline_jax.checkpoints.runs.history import History, from_plain
from fineline_jax.checkpoints.runs.store import CheckpointStore, check_intact, load_items
from fineline_jax.data.loader import global_array, global_batch, open_sources
from fineline_jax.data.prefetch import prefetch
from fineline_jax.mesh import make_mesh
from fineline_jax.multihost import broadcast_from_process_0, check_on_process_0, device_errors
from fineline_jax.progress import Stopwatch
from fineline_jax.recipe import Recipe
from fineline_jax.training import run_folder
from fineline_jax.training.metrics import MetricsLog
from fineline_jax.training.observers import Epochs, Observer, Profiler, ProgressBar, StepMetrics, Validation
from fineline_jax.training.optimizer import make_optimizer
from fineline_jax.training.programs import Programs
from fineline_jax.training.run_folder import Branch
from fineline_jax.training.schedule import rates
from fineline_jax.training.step import BATCH_SPEC, State, abstract_state, initial_state, make_train_step, padded_rows
from fineline_jax.training.stop import stop_requests

logger = logging.getLogger(__name__)

UNTIL = "--until"
LESS_MEMORY = (
    "more --batch.accumulation, --compute.remat full or offload, --compute.dtype bfloat16, or a larger --mesh.fsdp"
    " needs less"
)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    run: Path
    step: int
    tokens: int
    stopped_by: str | None
    """What ended it early: the name of a signal, or `--until`; None: it is complete."""


@device_errors(LESS_MEMORY)
def pretrain(
    recipe: Recipe,
    run: Path,
    *,
    accept_changes: bool = False,
    branch: Branch | None = None,
    until: int | None = None,
    skip_windows: tuple[int, int] | None = None,
    observers: Sequence[Observer] = (),
    programs: Programs | None = None,
    stopwatch: Stopwatch | None = None,
) -> Outcome:
    """Train `recipe` into the folder `run`, or go on where it was interrupted.

    accept_changes: resume although the recipe, or what a data set holds, differs from what the folder records; the
    history gets a segment that begins at the newest checkpoint.
    branch: the checkpoint that a new run begins at, as `Branch(run, step, optimizer_state)`: its steps, tokens and
    windows are carried on, and the recipe's tokens count from the first run's start. The same argument resumes it.
    until: tokens at which the run ends for now, its checkpoint kept; the same call without it goes on.
    skip_windows: (first, last + 1) of windows to leave out, numbered as the run passes them.
    observers: called after the run's own (metrics, profiler, validation, progress) at each of their hooks; closed
    with the run.
    programs: compiled by the runs before, for those of them that this one can share.
    stopwatch: runs while optimizer steps do; it stands while one is compiled and at saves.

    Raises UserError for a recipe that does not fit the data, the devices or the folder, a loss that is not finite,
    and a checkpoint that cannot be written.
    """
    began = time.perf_counter()
    mesh, programs = make_mesh(recipe.mesh), programs or Programs()
    target = abstract_state(recipe, mesh)
    sources = tuple(data_set.data_hash for data_set in open_sources(recipe.data, recipe.model.vocab_size))
    recorded = _agreed(lambda: _recorded(recipe, run, sources, accept_changes, branch), run)
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(mesh))
        requested = stack.enter_context(stop_requests())
        for observer in observers:
            stack.enter_context(contextlib.closing(observer))
        if recorded is not None and recorded.segments[-1].parent is not None and branch is None:
            parent = recorded.segments[-1].parent
            branch = Branch(Path(parent.run), parent.step, parent.optimizer_state)
        with CheckpointStore(run / "checkpoints", ()) as store:
            newest = store.latest_intact()
        if newest is not None:
            # Weights that were imported without a recipe have no optimizer state.
            folder = run / "checkpoints" / str(newest)
            first = recorded.segments[0] if recorded is not None else None
            imported = first is not None and (first.why, first.step) == ("import", newest)
            fresh = imported and not (folder / "opt_state").is_dir()
            state = _state_at(folder, recipe, target, programs, fresh=fresh)
            logger.info("resuming %s at step %d", run, newest)

        def going_on() -> History:
            if newest is None or recorded is None:
                return run_folder.beginning(branch, recipe, sources)
            return run_folder.going_on(recorded, run, newest, recipe, sources)

        history = _agreed(going_on, run)
        assert history is not None
        start = history.segments[-1].step if newest is None else newest
        if skip_windows is not None:
            last = len(history.segments) - 1
            batches = run_folder.batches_of(history, last, run_folder.on_this_machine(history, last, recipe, sources))
            history = run_folder.skipping(history, batches, start, skip_windows)
        check_on_process_0(functools.partial(run_folder.claim_folder, run, recipe, history))
        if newest is None and branch is None:
            replicated = jax.NamedSharding(mesh, jax.P())
            initial = programs("initial", recipe, mesh, lambda: jax.jit(functools.partial(initial_state, recipe)))
            state = initial(global_array((), replicated, lambda _: np.uint32(recipe.seed)))
        elif newest is None and branch is not None:
            state = _state_at(branch.folder, recipe, target, programs, fresh=branch.optimizer_state == "fresh")
        clock = stopwatch or Stopwatch()
        session = _Session(run, recipe, sources, mesh, programs, history, requested, tuple(observers), clock, began)
        number = history.at(start)
        state, step, stopped_by = session.train(number, state, start, newest, until, first=True)
        while stopped_by is None and history.at(step) > number:
            number = history.at(step)
            state, step, stopped_by = session.train(number, state, step, step, until, first=False)
    return Outcome(run, step, history.tokens(step), stopped_by)


@dataclasses.dataclass(frozen=True)
class _Session:
    """What all segments share that a process trains."""

    run: Path
    recipe: Recipe
    """Of the command."""
    sources: tuple[str, ...]
    mesh: jax.sharding.Mesh
    programs: Programs
    history: History
    requested: Callable[[int], str | None]
    observers: tuple[Observer, ...]
    stopwatch: Stopwatch
    began: float
    """When the call began, by time.perf_counter."""

    def train(
        self, number: int, state: State, start: int, saved: int | None, until: int | None, first: bool
    ) -> tuple[State, int, str | None]:
        """Train a segment from step `start` to its end, where the next begins or the run ends.

        saved: step of the checkpoint that has `state`; None: nothing is saved yet. first: in this process.
        Returns the state, its step, and what stopped the run.
        """
        segments, mesh, run = self.history.segments, self.mesh, self.run
        recipe = run_folder.on_this_machine(self.history, number, self.recipe, self.sources)
        segment, clock = segments[number], dataclasses.replace(segments[number].clock, recipe=recipe)
        last_step = clock.last_step if number + 1 == len(segments) else segments[number + 1].step
        end = last_step if until is None else min(last_step, max(start, clock.step_at(until)))
        batches = run_folder.batches_of(self.history, number, recipe)
        kept_steps = {step for step in clock.kept_steps() if step <= last_step}
        kept_steps |= {end} if end < last_step else set()
        kept_steps |= {segment.step} if segment.why == "branch" and recipe.checkpoints.initial else set()
        sharding, replicated = jax.NamedSharding(mesh, BATCH_SPEC), jax.NamedSharding(mesh, jax.P())

        def record(step: int) -> dict:
            return {
                "tokens": clock.tokens_at(step),
                "recipe": recipe.name,
                "windows": {**segment.windows, **batches.passed(step)},
                "history": self.history.until(step).plain(),
            }

        with contextlib.ExitStack() as stack:
            store = stack.enter_context(
                CheckpointStore(
                    run / "checkpoints",
                    kept_steps,
                    is_rolling=clock.is_rolling,
                    weights_only=(clock.weights_only_steps(), recipe.checkpoints.keep),
                    record=record,
                )
            )
            make = functools.partial(make_train_step, recipe, mesh)
            train_step = self.programs("step", recipe, mesh, lambda: jax.jit(make(), donate_argnums=0))
            log = MetricsLog(run, recipe, saved)
            metrics_observer = stack.enter_context(contextlib.closing(StepMetrics(clock, mesh, log, start)))
            if first:
                metrics_observer.count("start", metrics_observer.last_time - self.began)
            observers = (
                stack.enter_context(contextlib.closing(Profiler(recipe, run))),
                metrics_observer,
                stack.enter_context(
                    contextlib.closing(ProgressBar(clock, start, end, metrics_observer, self.stopwatch))
                ),
                Validation(clock, mesh, log, self.programs),
                Epochs(batches, recipe.data),
                *self.observers,
            )

            def load(step: int) -> list[jax.Array]:
                """The arguments of a step besides the state."""
                scalars = rates(recipe, clock.tokens_at(step))
                rows = padded_rows(batches.sequences(step), recipe, mesh)
                return [
                    global_batch(batches, step, sharding, rows),
                    *(global_array((), replicated, lambda _, value=value: value) for value in scalars),
                ]

            loaded_steps = stack.enter_context(contextlib.closing(prefetch(load, range(start, end))))
            stack.enter_context(device_errors(LESS_MEMORY))  # last, so that nothing waits for a process that is gone

            def announce_saved(step: int, state: State) -> None:
                for observer in observers:
                    observer.after_save(step, state["params"], step in kept_steps, store.wait)

            def save(step: int, state: State, *, force: bool = False) -> None:
                if force or store.is_due(step):
                    metrics_observer.flush()
                    with metrics_observer.spending("evaluation"):
                        for observer in observers:
                            observer.before_save(step, state["params"], step in kept_steps)
                    with metrics_observer.spending("checkpoint"):
                        store.maybe_save(step, state, force=force)
                    with metrics_observer.spending("evaluation"):
                        announce_saved(step, state)

            if saved is None and (start in kept_steps or segment.why == "branch"):
                save(start, state, force=start not in kept_steps)
            elif saved is not None and first:
                announce_saved(start, state)
            step, stopped_by = start, self.requested(start)
            compiled: set[int] = set()
            while stopped_by is None and step < end:
                loaded = next(loaded_steps)
                for observer in observers:
                    observer.before_step(step)
                called = time.perf_counter()
                with jax.profiler.StepTraceAnnotation("train", step_num=step):
                    state, metrics = train_step(state, *loaded.value)
                if (sequences := clock.sequences_at(step)) not in compiled:
                    compiled.add(sequences)
                    metrics_observer.count("compile", time.perf_counter() - called)
                step += 1
                for observer in observers:
                    observer.after_step(step, metrics, loaded.wait_seconds)
                stopped_by = self.requested(step) if step < end else None
                save(step, state, force=stopped_by is not None or step == end)
            store.wait()
        if stopped_by is None and step == end < last_step:
            stopped_by = UNTIL
        return state, step, stopped_by


def _recorded(
    recipe: Recipe, run: Path, sources: tuple[str, ...], accept_changes: bool, branch: Branch | None
) -> History | None:
    """What the folder records, if the command may go on with it; nothing is written."""
    check_path(run)
    recorded = run_folder.recorded_history(run)
    if recorded is not None:
        run_folder.refuse_changes(recorded, run, recipe, sources, accept_changes)
        if branch is not None:
            run_folder.check_branch(recorded, branch, run)
    elif branch is not None:
        run_folder.beginning(branch, recipe, sources)
    return recorded


def _agreed(look: Callable[[], History | None], run: Path) -> History | None:
    """What `look` gives on process 0, on all; its UserError too."""
    found: list[History | None] = []
    check_on_process_0(lambda: found.append(look()))
    plain = broadcast_from_process_0(found[0].plain() if found and found[0] is not None else None)
    return None if plain is None else from_plain(plain, run)


def _state_at(folder: Path, recipe: Recipe, target: State, programs: Programs, *, fresh: bool) -> State:
    """The state of a checkpoint; fresh: with the optimizer state of a first step."""
    check_intact(folder, "params" if fresh else "")
    if not fresh:
        return load_items(folder, target)
    params = load_items(folder, {"params": target["params"]})["params"]
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    begin = programs("fresh optimizer", recipe, mesh, lambda: jax.jit(make_optimizer(recipe.optimizer).init))
    return {"params": params, "opt_state": begin(params)}
