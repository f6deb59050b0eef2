"""A pretraining run from top to bottom: recipe -> checkpoint series.

Everything a run needs follows from (recipe, seed, step), so starting, resuming after a kill and resuming elsewhere
are the same few lines: find the newest intact checkpoint, load it onto this mesh, go on.
"""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from fineline_jax.checkpoints.runs.store import CheckpointStore
from fineline_jax.data.loader import global_array, global_batch, open_batches
from fineline_jax.data.prefetch import prefetch
from fineline_jax.mesh import make_mesh
from fineline_jax.recipe import Recipe
from fineline_jax.training.metrics import MetricsLog
from fineline_jax.training.observers import Observer, Profiler, ProgressBar, StepMetrics, Validation
from fineline_jax.training.programs import Programs
from fineline_jax.training.run_folder import claim_folder
from fineline_jax.training.schedule import rates
from fineline_jax.training.step import BATCH_SPEC, State, abstract_state, initial_state, make_train_step
from fineline_jax.training.stop import stop_requests

logger = logging.getLogger(__name__)


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
    observers: Sequence[Observer] = (),
    programs: Programs | None = None,
) -> Outcome:
    """Train `recipe` into the folder `run`, or go on where it was interrupted.

    accept_changes: resume although the recipe, or what a data set holds, differs from what the folder records, which
    is replaced.
    observers: called after the run's own (metrics, profiler, validation, progress) at each of their hooks; closed
    with the run.
    programs: compiled by the runs before, for those of them that this one can share.

    Raises UserError for a recipe that does not fit the data, the devices or the folder, a loss that is not finite,
    and a checkpoint that cannot be written.
    """
    mesh, programs = make_mesh(recipe.mesh), programs or Programs()
    target = abstract_state(recipe, mesh)
    model, data, batch = recipe.model, recipe.data, recipe.batch
    batches = open_batches(data, sequences=batch.sequences, vocab_size=model.vocab_size, seed=recipe.order_seed)
    data_hashes = {str(data_set.path): data_set.data_hash for data_set, _ in batches.splits}
    claim_folder(recipe, run, data_hashes, accept_changes)

    kept_steps = recipe.kept_steps()
    sharding, replicated = jax.NamedSharding(mesh, BATCH_SPEC), jax.NamedSharding(mesh, jax.P())
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(mesh))
        requested = stack.enter_context(stop_requests())
        store = stack.enter_context(
            CheckpointStore(
                run / "checkpoints",
                kept_steps,
                recipe.latest_steps(),
                tokens_per_step=recipe.tokens_per_step,
                recipe=recipe.name,
            )
        )
        newest = store.latest_intact()
        if newest is None:
            initial = programs("initial", recipe, mesh, lambda: jax.jit(functools.partial(initial_state, recipe)))
            start, state = 0, initial(global_array((), replicated, lambda _: np.uint32(recipe.seed)))
        else:
            start, restored = store.restore(target, newest)
            state = dict(restored)
            logger.info("resuming %s at step %d", run, start)
        train_step = programs("step", recipe, mesh, lambda: jax.jit(make_train_step(recipe, mesh), donate_argnums=0))

        log = MetricsLog(run, recipe, newest)
        metrics_observer = stack.enter_context(contextlib.closing(StepMetrics(recipe, mesh, log, start)))
        observers = (
            stack.enter_context(contextlib.closing(Profiler(recipe, run))),
            metrics_observer,
            stack.enter_context(contextlib.closing(Validation(recipe, mesh, log, programs))),
            stack.enter_context(contextlib.closing(ProgressBar(recipe, start, metrics_observer))),
            *(stack.enter_context(contextlib.closing(observer)) for observer in observers),
        )

        def load(step: int) -> list[jax.Array]:
            """The arguments of a step besides the state."""
            scalars = rates(recipe, step * recipe.tokens_per_step)
            return [
                global_batch(batches, step, sharding),
                *(global_array((), replicated, lambda _, value=value: value) for value in scalars),
            ]

        loaded_steps = stack.enter_context(contextlib.closing(prefetch(load, range(start, recipe.steps))))

        def announce_saved(step: int, state: State) -> None:
            for observer in observers:
                observer.after_save(step, state["params"], step in kept_steps, store.wait)

        def save(step: int, state: State, *, force: bool = False) -> None:
            due = force or store.is_due(step)
            for observer in observers if due else ():
                observer.before_save(step, state["params"], step in kept_steps)
            store.maybe_save(step, state, force=force)
            if due:
                announce_saved(step, state)

        if newest is not None:
            announce_saved(start, state)
        elif 0 in kept_steps:
            save(0, state)
        step, stopped_by = start, requested(start)
        while stopped_by is None and step < recipe.steps:
            loaded = next(loaded_steps)
            for observer in observers:
                observer.before_step(step)
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, metrics = train_step(state, *loaded.value)
            step += 1
            for observer in observers:
                observer.after_step(step, metrics, loaded.wait_seconds)
            stopped_by = requested(step) if step < recipe.steps else None
            save(step, state, force=stopped_by is not None)
        store.wait()
    return Outcome(run, step, step * recipe.tokens_per_step, stopped_by)
