"""The folder of a run before its first step: the history that its checkpoints belong to, and how it goes on."""

import dataclasses
import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from fineline_jax.atomic_files import copy_folder, write_atomic
from fineline_jax.checkpoints.runs.digest_record import RECORD, check_path, damage, read_record
from fineline_jax.checkpoints.runs.history import (
    HISTORY,
    History,
    Parent,
    Segment,
    changes,
    from_plain,
    read_history,
    to_text,
)
from fineline_jax.data.loader import Batches, open_batches
from fineline_jax.errors import UserError
from fineline_jax.progress import short
from fineline_jax.recipe import Recipe, from_json, to_json
from fineline_jax.training.schedule import learning_rate

logger = logging.getLogger(__name__)

MAY_DIFFER = ("mesh.", "logging.", "name:")
"""Fields that change where a run computes and what it reports, never what it learns beyond rounding."""


@dataclasses.dataclass(frozen=True)
class Branch:
    """The checkpoint at which a new run begins."""

    run: Path
    step: int
    optimizer_state: Literal["kept", "fresh"] = "kept"
    """fresh: moments and their counts begin at 0, as for imported weights."""

    @property
    def folder(self) -> Path:
        """Of the checkpoint."""
        return self.run.resolve() / "checkpoints" / str(self.step)


def branch_at(place: str, optimizer_state: Literal["kept", "fresh"] = "kept") -> Branch:
    """The branch at RUN@STEP. Raises UserError for another form, or where there is no such run."""
    run, at, step = place.rpartition("@")
    if not at or not step.isdecimal():
        raise UserError(f"--from {place}: give RUN@STEP, the folder of a run and the step of one of its checkpoints")
    if not (Path(run) / "checkpoints").is_dir():
        raise UserError(f"--from {place}: {run} is no folder of a run; correct it")
    return Branch(Path(run), int(step), optimizer_state)


def recorded_history(run: Path) -> History | None:
    """What the folder records; None where there are no checkpoints, except for a branch that is yet to begin.

    Raises UserError where history.json and the newest checkpoint's record disagree.
    """
    history, folder = read_history(run), run / "checkpoints"
    numbers = sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit()) if folder.is_dir() else []
    complete = [step for step in numbers if read_record(folder / str(step)) is not None]
    if not complete:
        return history if history is not None and history.segments[-1].parent is not None else None
    of_checkpoint = history_of(folder / str(complete[-1]))
    if history is None:
        if of_checkpoint.segments[-1].why != "import":
            logger.warning("%s is gone; taken from checkpoint %d", run / HISTORY, complete[-1])
        return of_checkpoint
    if of_checkpoint.segments[-1].why != "import" and history.until(complete[-1]).plain() != of_checkpoint.plain():
        raise UserError(
            f"{run / HISTORY}: is not that of the newest checkpoint {folder / str(complete[-1])}; restore it, or delete"
            " it to go on with that of the checkpoint"
        )
    return history


def history_of(checkpoint: Path) -> History:
    """The history in the record of a checkpoint; of an imported one, a segment without windows."""
    record = read_record(checkpoint)
    if record is None:
        there = ", ".join(sorted((path.name for path in checkpoint.parent.glob("*") if path.name.isdigit()), key=int))
        raise UserError(f"{checkpoint}: no complete checkpoint; the run has {there or 'none'}")
    if "history" in record:
        return from_plain(record["history"], checkpoint / RECORD)
    if record["tokens"] is None:
        raise UserError(f"{checkpoint}: its trained tokens are not known; import it again with --tokens")
    recipe = from_json(checkpoint.parent.parent / "recipe.json")
    return History((Segment(record["step"], record["tokens"], {}, recipe, (), "import"),))


def refuse_changes(
    recorded: History, run: Path, recipe: Recipe, sources: tuple[str, ...], accept_changes: bool
) -> None:
    """Raise UserError where the recipe, or what a data set holds, is not what the run goes on with."""
    last = recorded.segments[-1]
    changed = changes(last, recipe, sources, MAY_DIFFER)
    if changed and not accept_changes and last.why != "import":
        raise UserError(
            f"{run / 'recipe.json'}: the recipe has changed ({'; '.join(changed)}); train into another --run folder,"
            " begin a branch with --from, or give --accept-changes to go on with the new one"
        )
    refuse_another_order(last, recipe, sources)
    file = run / "recipe.json"
    if changed or not file.exists():
        return
    written = from_json(file)
    differing = [changes(segment, written, segment.sources, MAY_DIFFER) for segment in recorded.segments]
    if all(differing):
        raise UserError(
            f"{file}: is not the recipe that the checkpoints record ({'; '.join(differing[-1])}); delete it: it is"
            " written again"
        )


def refuse_another_order(old: Segment, recipe: Recipe, sources: tuple[str, ...]) -> None:
    """Raise UserError where what was read of a source would come again, in another kind of order."""
    if old.recipe.data.order != recipe.data.order and set(old.sources) & set(sources):
        raise UserError(
            f"data.order: {old.recipe.data.order!r} -> {recipe.data.order!r} would read windows again that this run has"
            " read; keep it, or begin a new run"
        )


def going_on(recorded: History, run: Path, step: int, recipe: Recipe, sources: tuple[str, ...]) -> History:
    """The history of a run that goes on from its checkpoint of `step` with `recipe`: with a further segment if that is
    another, whose changes and learning rates are told."""
    lines, imported = changes(recorded.segments[-1], recipe, sources, MAY_DIFFER), recorded.segments[-1].why == "import"
    if not lines and not imported:
        return recorded
    before = [segment for segment in recorded.segments if segment.step <= step]
    record: dict[str, Any] = read_record(run / "checkpoints" / str(step)) or {}
    at_once = before[-1].step == step
    windows = before[-1].windows if at_once else record.get("windows", {})
    why = "start" if imported else "accepted change"
    segment, last = Segment(step, record["tokens"], windows, recipe, sources, why, lines), before[-1].clock
    rates = [
        learning_rate(last.recipe, last.tokens_at(max(step - 1, last.step))),
        learning_rate(recipe, segment.tokens),
        learning_rate(recipe, segment.clock.tokens_at(max(segment.clock.last_step - 1, step))),
    ]
    logger.info(
        "%s goes on from step %d (%s tokens) with %s; the learning rate, %.3g at the last step, is %.3g at the next and"
        " %.3g at the end",
        *(run, step, short(segment.tokens), "; ".join(lines) or "its recipe", *rates),
    )
    return History((*before, segment))


def beginning(branch: Branch | None, recipe: Recipe, sources: tuple[str, ...]) -> History:
    """The history of a run of which nothing is saved yet. Raises UserError for a checkpoint it cannot begin at."""
    if branch is None:
        return History((Segment(0, 0, {}, recipe, sources, "start"),))
    before, checkpoint = history_of(branch.folder), branch.folder
    if problem := damage(checkpoint):
        raise UserError(f"{checkpoint}: the checkpoint is damaged ({problem}); begin at another one")
    if branch.optimizer_state == "kept" and not (checkpoint / "opt_state").is_dir():
        beside = sorted(int(path.parent.name) for path in checkpoint.parent.glob("[0-9]*/opt_state"))
        have = f"begin at step {', '.join(map(str, beside))}, or " if beside else ""
        raise UserError(
            f"{checkpoint}: holds no optimizer state; {have}give --optimizer-state fresh, in a sweep"
            " optimizer_state='fresh'"
        )
    refuse_another_order(before.segments[-1], recipe, sources)
    record = read_record(checkpoint) or {}
    lines = changes(before.segments[-1], recipe, sources, MAY_DIFFER)
    digest = hashlib.sha256((checkpoint / RECORD).read_bytes()).hexdigest()
    parent = Parent(str(branch.run.resolve()), branch.step, digest, branch.optimizer_state)
    segment = Segment(
        branch.step, record["tokens"], record.get("windows", {}), recipe, sources, "branch", lines, parent
    )
    if segment.clock.last_step <= branch.step:
        raise UserError(
            f"tokens={recipe.tokens} is less than one step behind the {segment.tokens} of {checkpoint}; raise --tokens"
        )
    return History((*before.segments, segment))


def check_branch(recorded: History, branch: Branch, run: Path) -> None:
    """Raise UserError where a run that has begun did so elsewhere than at `branch`."""
    parents = [segment.parent for segment in recorded.segments if segment.parent is not None]
    wanted = Parent(str(branch.run.resolve()), branch.step, "", branch.optimizer_state)
    if not parents or dataclasses.replace(parents[-1], digest="") != wanted:
        begun = f"a branch of {parents[-1].run}@{parents[-1].step}" if parents else "no branch"
        raise UserError(f"{run}: is {begun} already; give another --run folder, or go on without --from")


def skipping(history: History, batches: Batches, step: int, skip: tuple[int, int]) -> History:
    """The history with a segment that leaves out the batches which hold windows skip[0] to skip[1] - 1, numbered as the
    sources of the run passed them. batches: of the last segment; step: reached."""
    segment = history.segments[-1]
    if any(one.skipped == skip for one in history.segments):
        return history
    passed = lambda at: sum({**segment.windows, **batches.passed(at)}.values())
    if not passed(step) <= skip[0] < skip[1]:
        raise UserError(
            f"--skip-windows {skip[0]}:{skip[1]}: the run has passed window {passed(step)} already; give a later and"
            " larger B, or begin a branch at an earlier checkpoint with --from"
        )
    begin = step
    while passed(begin + 1) <= skip[0]:
        begin += 1
    end = begin
    while passed(end) < skip[1]:
        end += 1
    at_begin = max(begin, segment.step)
    left_out = dataclasses.replace(
        segment,
        step=at_begin,
        tokens=segment.clock.tokens_at(at_begin),
        windows={**segment.windows, **batches.passed(end)},
        why="skipped windows",
        changes=(f"windows {passed(begin)} to {passed(end) - 1} are not read",),
        parent=None,
        skipped=skip,
    )
    logger.info("step %d: %s", at_begin, left_out.changes[0])
    return History((*history.segments, left_out))


def batches_of(history: History, number: int, recipe: Recipe) -> Batches:
    """The batches of a segment; recipe: its own, on this machine."""
    segment = history.segments[number]
    return open_batches(
        recipe.data,
        sequences=[(step, sequences) for step, _, sequences in segment.clock.pieces],
        vocab_size=recipe.model.vocab_size,
        seed=recipe.order_seed,
        passed=segment.windows,
        seeds=history.seeds(number),
    )


def on_this_machine(history: History, number: int, recipe: Recipe, sources: Sequence[str]) -> Recipe:
    """The recipe of a segment with what does not count as a change as it is in `recipe`, that of the command."""
    segment = history.segments[number]
    places = {source: one.path for source, one in zip(sources, recipe.data.sources, strict=True)}
    moved = tuple(
        dataclasses.replace(source, path=places.get(data_hash, source.path))
        for data_hash, source in zip(segment.sources, segment.recipe.data.sources, strict=True)
    )
    data = dataclasses.replace(segment.recipe.data, sources=moved)
    return dataclasses.replace(segment.recipe, name=recipe.name, mesh=recipe.mesh, logging=recipe.logging, data=data)


def claim_folder(run: Path, recipe: Recipe, history: History) -> None:
    """Write history, recipe and tokenizer into `run`; on process 0.

    Weights that another history trained, behind the state that the run goes on from, are renamed to STEP.replaced.
    """
    check_path(run)
    run.mkdir(parents=True, exist_ok=True)
    for path in (run / "checkpoints").glob("*"):
        record = read_record(path) if path.name.isdigit() else None
        if record is None or "weights" not in record or "history" not in record:
            continue
        if history_of(path).plain() != history.until(record["step"]).plain():
            logger.warning("%s: trained by the recipe before; renamed to %s.replaced", path, path.name)
            path.rename(path.with_suffix(".replaced"))
    for file, text in ((run / HISTORY, to_text(history)), (run / "recipe.json", to_json(recipe))):
        write_atomic(file, text, exclusive=True)
    tokenizer = recipe.data.sources[0].tokenizer
    if tokenizer.is_dir() and not (run / "tokenizer").exists():
        copy_folder(tokenizer, run / "tokenizer")
