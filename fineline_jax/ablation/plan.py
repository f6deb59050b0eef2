"""What a sweep will take, before anything runs: runs, tokens, FLOPs, disk, hours, and what differs between its arms."""

import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from fineline_jax.ablation.changes import changed
from fineline_jax.ablation.sweep import Sweep, Trial, rounding
from fineline_jax.errors import UserError
from fineline_jax.progress import duration, short
from fineline_jax.recipe import Recipe, fields
from fineline_jax.text_table import counted, text_table
from fineline_jax.training.programs import shape_of

log = logging.getLogger(__name__)

TIMED_STEPS = 5
FLOAT_BYTES = 4


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a sweep takes, or a part of it."""

    runs: int
    tokens: int
    flops: float
    """Of forward and backward passes (`ModelConfig.train_flops_per_token`)."""
    disk: int
    """Bytes of the checkpoints that stay."""
    seconds: float | None
    """Of optimizer steps alone: compilation, saving and scoring are not in it; None: not measured."""


def cost(trials: Sequence[Trial], keep: str, step_seconds: Mapping[Recipe, float] | None = None) -> Cost:
    """The cost of `trials`; step_seconds: of each shape (`measured`)."""
    flops = sum(
        trial.tokens * trial.recipe.model.train_flops_per_token(trial.recipe.data.sequence_length) for trial in trials
    )
    seconds = None
    if step_seconds is not None:
        seconds = sum(steps * step_seconds[shape] for trial in trials for shape, steps in shapes_of(trial))
    return Cost(len(trials), sum(trial.tokens for trial in trials), flops, sum(_disk(t, keep) for t in trials), seconds)


def _disk(trial: Trial, keep: str) -> int:
    """float32 weights of each checkpoint that stays, and Adam's two moments where the optimizer state does."""
    kept = len({trial.last_step, *(step for step in trial.clock.kept_steps() if step < trial.last_step)})
    whole = 3 * FLOAT_BYTES * trial.recipe.model.parameters
    return {"last": whole, "weights": whole + (kept - 1) * whole // 3, "all": kept * whole}[keep]


def measured(trials: Sequence[Trial]) -> dict[Recipe, float]:
    """Seconds of one optimizer step of each shape in `trials`, the median of TIMED_STEPS on these devices; on random
    tokens, so that no data set is needed."""
    shapes = {shape for trial in trials for shape, _ in shapes_of(trial)}
    log.info("timing optimizer steps of %s", counted(len(shapes), "shape"))
    return {shape: _seconds_per_step(shape) for shape in shapes}


def shapes_of(trial: Trial) -> list[tuple[Recipe, int]]:
    """The shapes of its steps, one for each stage of a batch schedule, and how many steps of each there are."""
    pieces, last = trial.clock.pieces, trial.last_step
    ends = [*(step for step, _, _ in pieces[1:]), last]
    return [
        (shape_of(changed(trial.recipe, {"batch.sequences": sequences, "batch.schedule": ()})), min(end, last) - first)
        for (first, _, sequences), end in zip(pieces, ends, strict=True)
        if first < last
    ]


def _seconds_per_step(recipe: Recipe) -> float:
    import jax
    import numpy as np

    from fineline_jax.data.loader import global_array
    from fineline_jax.mesh import make_mesh
    from fineline_jax.training.step import BATCH_SPEC, abstract_state, initial_state, make_train_step, padded_rows

    mesh = make_mesh(recipe.mesh)
    abstract_state(recipe, mesh)  # refuses what does not fit these devices
    shape = padded_rows(recipe.batch.sequences, recipe, mesh), recipe.data.sequence_length + 1
    tokens = np.random.default_rng(0).integers(0, recipe.model.vocab_size, shape, np.int32)
    with jax.set_mesh(mesh):
        state = jax.jit(lambda: initial_state(recipe))()
        step = jax.jit(make_train_step(recipe, mesh), donate_argnums=0)
        windows = global_array(shape, jax.NamedSharding(mesh, BATCH_SPEC), lambda index: tokens[index])
        times = []
        for _ in range(TIMED_STEPS + 1):  # the first compiles
            start = time.perf_counter()
            state, metrics = step(state, windows, np.float32(0), np.float32(0))
            jax.block_until_ready(metrics)
            times.append(time.perf_counter() - start)
    return float(np.median(times[1:]))


def plan_text(sweep: Sweep, trials: Sequence[Trial], out: Path, step_seconds: Mapping[Recipe, float] | None) -> str:
    """The plan as text: all in all, a line per arm, and a table of the fields in which arms differ."""
    whole = cost(trials, sweep.keep, step_seconds)
    head = (
        f"{sweep.name}: {counted(len(sweep.arms), 'arm')}, {counted(whole.runs, 'run')} into {out},"
        f" {short(whole.tokens)} tokens, {short(whole.flops)} FLOPs, {short(whole.disk)}B of checkpoints"
    )
    if whole.seconds is not None:
        head += f", {duration(whole.seconds)} of steps at the measured rate (compilation, scoring and saving not in it)"
    rows = [["arm", "runs", "steps", "tokens", "FLOPs", "disk", *(["time"] if step_seconds else [])]]
    for arm in sweep.arms:
        of_arm = [trial for trial in trials if trial.arm == arm.name]
        if of_arm:
            one, each = of_arm[0], cost(of_arm, sweep.keep, step_seconds)
            row = [
                arm.name,
                str(each.runs),
                f"{one.steps:,}",
                f"{one.tokens:,}",
                short(each.flops),
                f"{short(each.disk)}B",
            ]
            rows.append([*row, *([] if each.seconds is None else [duration(each.seconds)])])
    return "\n\n".join(
        [
            head,
            text_table(rows, right=range(1, len(rows[0]))),
            *rounding(trials),
            *_lacking(trials),
            _differing(sweep, trials),
        ]
    )


def _lacking(trials: Sequence[Trial]) -> list[str]:
    """What the data of the runs lack, in a sentence each; those in a bucket are not looked at."""
    from fineline_jax.data.loader import check_local_sources

    lacking = []
    for data, vocabulary in {(trial.recipe.data, trial.recipe.model.vocab_size): None for trial in trials}:
        try:
            check_local_sources(data, vocabulary)
        except UserError as error:
            lacking.append(f"It cannot run yet: {error}.")
    return lacking


def _differing(sweep: Sweep, trials: Sequence[Trial]) -> str:
    """A column for each recipe field that is not the same in all arms, of the first seed."""
    first = {}
    for trial in trials:
        first.setdefault(trial.arm, trial.recipe)
    values = {arm: fields(recipe) for arm, recipe in first.items()}
    names = list(dict.fromkeys(name for one in values.values() for name in one))
    same = {"name", "seed", "data_seed"}
    differ = [n for n in names if n not in same and len({repr(one.get(n)) for one in values.values()}) > 1]
    if not differ:
        return "The arms differ in nothing but their seeds."
    rows = [["arm", *differ], *([arm, *(_written(one.get(n)) for n in differ)] for arm, one in values.items())]
    return text_table(rows, right=range(1, len(rows[0])))


def _written(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
