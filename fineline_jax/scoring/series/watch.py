"""Scoring the checkpoints of a run while it trains."""

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from fineline_jax import progress
from fineline_jax.checkpoints.open import open_series
from fineline_jax.checkpoints.runs.history import read_history
from fineline_jax.checkpoints.series import Series
from fineline_jax.errors import UserError
from fineline_jax.folder_lock import is_being_written
from fineline_jax.multihost import broadcast_from_process_0
from fineline_jax.recipe import from_json
from fineline_jax.scoring.series.score_series import NotAllScored

log = logging.getLogger(__name__)

POLL_SECONDS = 10.0


def wait_for_first(run: Path, timeout: float | None, *, poll_seconds: float = POLL_SECONDS) -> None:
    """Return when the run has a kept checkpoint.

    Raises UserError after `timeout` seconds without, and if `run` is another kind of folder.
    """
    if run.is_dir() and any(run.iterdir()) and not (run / "recipe.json").is_file():
        raise UserError(f"{run}: holds no recipe.json; --watch needs the folder of a run of `fineline pretrain`")
    start = time.monotonic()
    logged = False
    while not broadcast_from_process_0(bool(_complete(run).checkpoints)):
        if timeout is not None and time.monotonic() - start >= timeout:
            raise UserError(f"{run}: no kept checkpoint after {progress.duration(timeout)}; is the run training?")
        if not logged:
            log.info("%s: waiting for the first kept checkpoint", run)
            logged = True
        time.sleep(poll_seconds)


def watch_run(
    run: Path,
    score: Callable[[Sequence[Series]], list[Path]],
    timeout: float | None = None,
    *,
    poll_seconds: float = POLL_SECONDS,
) -> int:
    """Call `score([series])`, which passes over what is finished, whenever the run has new checkpoints.

    Only complete checkpoints are looked at: their record is written last. It ends when the last checkpoint of the run
    has been there, when the process that trained it has stopped, or after `timeout` seconds without a new one (None:
    never); returns how many files all calls of `score` returned. Checkpoints that could not be opened are tried again
    with each new one, and named in a `NotAllScored` at the end.
    """
    seen: list[str] = []
    files: set[Path] = set()
    problem: NotAllScored | None = None
    last, trained = time.monotonic(), False
    while True:
        training, last_step = is_being_written(run), _last_step(run)
        trained |= training
        series = _complete(run)  # after the look at the lock: what was written before it is free is here
        names = broadcast_from_process_0([checkpoint.name for checkpoint in series.checkpoints])
        if set(names) - set(seen):
            seen, problem = names, None
            complete = tuple(checkpoint for checkpoint in series.checkpoints if checkpoint.name in names)
            try:
                files.update(score([dataclasses.replace(series, checkpoints=complete)]))
            except NotAllScored as error:
                problem = error
            last = time.monotonic()
            continue
        done, stopped = f"step{last_step}" in seen, trained and not training
        late = timeout is not None and time.monotonic() - last >= timeout
        done, stopped, late = broadcast_from_process_0([done, stopped, late])
        if done or stopped or late:
            break
        time.sleep(poll_seconds)
    if not done:
        why = "its training was stopped" if stopped else f"no new checkpoint for {progress.duration(timeout or 0)}"
        log.warning("%s: %s; run the same command again to go on", run, why)
    if problem is not None:
        raise problem
    return len(files)


def _last_step(run: Path) -> int | None:
    """The step at which the run is complete."""
    try:
        history = read_history(run)
        return from_json(run / "recipe.json").steps if history is None else history.last_step()
    except UserError:
        return None  # not there yet, or just being replaced


def _complete(run: Path) -> Series:
    """The complete kept checkpoints; none while the run has none."""
    try:
        return open_series(str(run))
    except UserError:
        return Series(run.name, ())
