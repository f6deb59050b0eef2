"""Training the runs of a sweep one after another: each a run folder, each compiled program made once for each shape.

OUT/runs/TRIAL/                a run (docs/formats.md)
OUT/runs/TRIAL/outcome.json    written last: how it ended; a trial with one is not touched again
OUT/scores/                    of --score: pack, and the scores of every kept checkpoint of every run
"""

import dataclasses
import logging
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fineline_jax.ablation.sweep import Sweep, Trial, rounding
from fineline_jax.ablation.together import run_together
from fineline_jax.atomic_files import unsealed, write_sealed
from fineline_jax.checkpoints.runs.retention import keep_only
from fineline_jax.data.loader import open_sources
from fineline_jax.errors import UserError
from fineline_jax.folder_lock import writing
from fineline_jax.progress import Stopwatch
from fineline_jax.recipe import differences, from_json
from fineline_jax.scoring.requests.pack import Pack
from fineline_jax.scoring.requests.suite import Suite
from fineline_jax.scoring.series.in_training import ScoreInTraining, check_pack, open_pack
from fineline_jax.training.loop import UNTIL, Outcome, pretrain
from fineline_jax.training.observers import AtKeptCheckpoints, Diverged, Observer
from fineline_jax.training.programs import Programs, shape_of
from fineline_jax.training.run_folder import MAY_DIFFER, Branch

log = logging.getLogger(__name__)

FORMAT = 2


@dataclasses.dataclass(frozen=True)
class Ending:
    """How a trial ended."""

    step: int
    tokens: int
    seconds: float
    """Of this process, from opening the run to its end; a trial that was interrupted counts its last part."""
    step_seconds: float
    """Of those, the seconds of optimizer steps; the rest is start, compilation, validation, scoring and saving."""
    diverged: str = ""
    """Why it could not go on; "": it reached its end."""


def run_trials(
    sweep: Sweep,
    trials: Sequence[Trial],
    out: Path,
    *,
    score: str | Suite | None,
    benchmarks: Path | None,
    together: int = 1,
) -> Outcome | None:
    """Train those `trials` of `sweep` that have not ended yet; the outcome of one that a signal stopped, or None.

    score: suite or request pack, for every kept checkpoint of every run; it is prepared once. benchmarks: its
    documents. together: runs that one program trains at a time, where their shapes are the same (`together.py`).
    Raises UserError for a run folder that holds another recipe; before the first run, for data that one of them lacks.
    """
    left = [trial for trial in trials if ending(out / "runs" / trial.name, trial) is None]
    if not left:
        return None
    for data, vocabulary in {(trial.recipe.data, trial.recipe.model.vocab_size): None for trial in left}:
        open_sources(data, vocabulary)
    for sentence in rounding(trials):
        log.info("%s", sentence)
    programs, scorers, number = Programs(), _Scorers(out, left, score, benchmarks), len(trials) - len(left)

    def run_one(trial: Trial, programs: Programs, beside: int) -> Outcome | None:
        run = out / "runs" / trial.name
        with writing(run, "--out"):
            if ending(run, trial) is not None:  # another process was faster
                return None
            return run_trial(trial, run, scorers.of(trial, run), programs, sweep.keep, beside)

    for group in grouped(left, together):
        for trial in group:
            number += 1
            log.info("run %d of %d: %s", number, len(trials), trial.name)
        outcomes = run_together(group, programs, run_one) if len(group) > 1 else [run_one(group[0], programs, 1)]
        if stopped := [outcome for outcome in outcomes if outcome is not None]:
            return stopped[0]
    return None


def grouped(trials: Sequence[Trial], together: int) -> list[list[Trial]]:
    """The trials in groups of at most `together` that one program can train: of one shape, without a batch schedule."""
    groups, newest = [], dict[Any, list[Trial]]()
    for trial in trials:
        key = shape_of(trial.recipe), trial.recipe.batch.schedule
        if trial.recipe.batch.schedule or len(newest.get(key, ())) in (0, together):
            newest[key] = []
            groups.append(newest[key])
        newest[key].append(trial)
    return groups


def run_trial(
    trial: Trial, run: Path, observers: Sequence[Observer], programs: Programs, keep: Any, beside: int = 1
) -> Outcome | None:
    """Train one trial to its end and record that; its outcome, if a signal stopped it.

    beside: runs that are trained at this time, this one among them; each counts its part of the seconds.
    """
    start, stopwatch, diverged = time.perf_counter(), Stopwatch(), ""
    try:
        until = trial.clock.tokens_at(trial.last_step)
        branch = None if trial.parent is None else Branch(*trial.parent, trial.optimizer_state)
        outcome = pretrain(
            trial.recipe,
            run,
            branch=branch,
            until=until,
            observers=observers,
            programs=programs,
            stopwatch=stopwatch,
        )
        step, tokens = outcome.step, outcome.tokens
        if outcome.stopped_by not in (None, UNTIL):
            return outcome
    except Diverged as error:
        step, tokens, diverged = error.step, trial.clock.tokens_at(error.step), f"loss {error.loss}"
        log.warning("%s: diverged at step %d (%s)", trial.name, step, diverged)
    keep_only(run / "checkpoints", keep)
    seconds, of_steps = (round(whole / beside, 3) for whole in (time.perf_counter() - start, stopwatch()))
    ended = Ending(step, tokens, seconds, of_steps, diverged)
    write_sealed(run / "outcome.json", {"format": FORMAT, **dataclasses.asdict(ended)})
    return None


def ending(run: Path, trial: Trial) -> Ending | None:
    """How the trial in the folder `run` ended; None: it has not.

    Raises UserError where that was a trial of another recipe, or longer, or the record is not as it was written.
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
        ended = Ending(**record)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not the record of a finished run ({error}); delete it to finish the run again"
        ) from error
    if ended.step > trial.last_step and not ended.diverged:
        raise UserError(
            f"{run}: was trained to step {ended.step}, the sweep ends it at {trial.last_step}; give another --out"
        )
    return ended if ended.diverged or ended.step == trial.last_step else None  # None: the sweep ends later than it did


class _Scorers:
    """The pack of a sweep, prepared once, and a scorer for each model shape in it."""

    def __init__(self, out: Path, trials: Sequence[Trial], score: str | Suite | None, benchmarks: Path | None):
        self.scores, self.made, self.score = out / "scores", dict[Any, ScoreInTraining](), score
        self.one_at_a_time = threading.Lock()
        if score is None:
            return
        tokenizer = trials[0].recipe.data.sources[0].tokenizer
        self.pack: Pack = open_pack(score, tokenizer, benchmarks)
        for trial in trials:  # before the first step of the first run
            check_pack(self.pack, trial.recipe)

    def of(self, trial: Trial, run: Path) -> list[Observer]:
        """The observer that scores a run; none without --score."""
        if self.score is None:
            return []
        model = trial.recipe.model
        with self.one_at_a_time:
            if model not in self.made:
                self.made[model] = ScoreInTraining(run, model, self.pack, self.scores)
            scored = self.made[model].of_run(run)

        def alone(*arguments: Any) -> None:
            with self.one_at_a_time:
                scored(*arguments)

        return [AtKeptCheckpoints(alone)]
