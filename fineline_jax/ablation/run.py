"""Training the runs of a sweep one after another: each a run folder, each compiled program made once for each shape.

OUT/runs/TRIAL/                a run (docs/formats.md)
OUT/runs/TRIAL/outcome.json    written last: how it ended; a trial with one is not touched again
OUT/scores/                    of --score: pack, and the scores of every kept checkpoint of every run
"""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fineline_jax.ablation.sweep import Sweep, Trial
from fineline_jax.atomic_files import unsealed, write_sealed
from fineline_jax.checkpoints.runs.retention import keep_only
from fineline_jax.errors import UserError
from fineline_jax.folder_lock import writing
from fineline_jax.recipe import differences, from_json
from fineline_jax.scoring.requests.pack import Pack
from fineline_jax.scoring.series.in_training import ScoreInTraining, check_pack, open_pack
from fineline_jax.training.loop import UNTIL, Outcome, pretrain
from fineline_jax.training.observers import AtKeptCheckpoints, Diverged, Observer
from fineline_jax.training.programs import Programs
from fineline_jax.training.run_folder import MAY_DIFFER, Branch

log = logging.getLogger(__name__)

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Ending:
    """How a trial ended."""

    step: int
    tokens: int
    seconds: float
    """Of this process, from opening the run to its end; a trial that was interrupted counts its last part."""
    diverged: str = ""
    """Why it could not go on; "": it reached its end."""


def run_trials(
    sweep: Sweep, trials: Sequence[Trial], out: Path, *, score: str | None, benchmarks: Path | None
) -> Outcome | None:
    """Train those `trials` of `sweep` that have not ended yet; the outcome of one that a signal stopped, or None.

    score: suite or request pack, for every kept checkpoint of every run; it is prepared once. benchmarks: its
    documents. Raises UserError for a run folder that holds another recipe.
    """
    left = [trial for trial in trials if ending(out / "runs" / trial.name, trial) is None]
    if not left:
        return None
    programs, scorers = Programs(), _Scorers(out, left, score, benchmarks)
    for number, trial in enumerate(left, start=1):
        log.info("run %d of %d: %s", number, len(left), trial.name)
        run = out / "runs" / trial.name
        with contextlib.ExitStack() as stack:
            stack.enter_context(writing(run, "--out"))
            if ending(run, trial) is not None:  # another process was faster
                continue
            observers = [AtKeptCheckpoints(scorers.of(trial, run))] if score is not None else []
            stopped = run_trial(trial, run, observers, programs, sweep.keep)
        if stopped is not None:
            return stopped
    return None


def run_trial(trial: Trial, run: Path, observers: Sequence[Observer], programs: Programs, keep: Any) -> Outcome | None:
    """Train one trial to its end and record that; its outcome, if a signal stopped it."""
    start, diverged = time.perf_counter(), ""
    try:
        until = trial.clock.tokens_at(trial.last_step)
        branch = None if trial.parent is None else Branch(*trial.parent, trial.optimizer_state)
        outcome = pretrain(trial.recipe, run, branch=branch, until=until, observers=observers, programs=programs)
        step, tokens = outcome.step, outcome.tokens
        if outcome.stopped_by not in (None, UNTIL):
            return outcome
    except Diverged as error:
        step, tokens, diverged = error.step, trial.clock.tokens_at(error.step), f"loss {error.loss}"
        log.warning("%s: diverged at step %d (%s)", trial.name, step, diverged)
    keep_only(run / "checkpoints", keep)
    ended = Ending(step, tokens, round(time.perf_counter() - start, 3), diverged)
    write_sealed(run / "outcome.json", {"format": FORMAT, **dataclasses.asdict(ended)})
    return None


def ending(run: Path, trial: Trial) -> Ending | None:
    """How the trial in the folder `run` ended; None: it has not.

    Raises UserError where that was a trial of another recipe, or the record is not as it was written.
    """
    path = run / "outcome.json"
    if not path.exists():
        return None
    lines = differences(from_json(run / "recipe.json"), trial.recipe)
    if changed := [line for line in lines if not line.startswith(MAY_DIFFER)]:
        raise UserError(
            f"{run}: was trained with another recipe ({'; '.join(changed)}); give another --out, or delete the folder"
        )
    try:
        record = unsealed(path.read_bytes())
        if record.pop("format") != FORMAT:
            raise ValueError("of another format")
        return Ending(**record)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not the record of a finished run ({error}); delete it to finish the run again"
        ) from error


class _Scorers:
    """The pack of a sweep, prepared once, and a scorer for each model shape in it."""

    def __init__(self, out: Path, trials: Sequence[Trial], score: str | None, benchmarks: Path | None):
        self.scores, self.made = out / "scores", dict[Any, ScoreInTraining]()
        if score is None:
            return
        tokenizer = trials[0].recipe.data.sources[0].tokenizer
        self.pack: Pack = open_pack(score, tokenizer, benchmarks)
        for trial in trials:  # before the first step of the first run
            check_pack(self.pack, trial.recipe)

    def of(self, trial: Trial, run: Path) -> ScoreInTraining:
        model = trial.recipe.model
        if model not in self.made:
            self.made[model] = ScoreInTraining(run, model, self.pack, self.scores)
        return self.made[model].of_run(run)
