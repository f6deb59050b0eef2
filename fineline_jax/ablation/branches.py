"""Sweeps whose runs begin at the checkpoints of a finished run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from fineline_jax.ablation.sweep import Arm, Branches, Sweep, grid, tokens_of_checkpoint
from fineline_jax.catalogue import load_recipe
from fineline_jax.checkpoints.runs.digest_record import read_record
from fineline_jax.errors import UserError
from fineline_jax.training.schedule import learning_rate


def batch_branches(
    run: str | Path,
    steps: Sequence[int],
    batches: Sequence[int],
    *,
    tokens: int,
    learning_rate_rule: Literal["fixed", "square_root", "linear"] = "square_root",
    optimizer_state: Literal["kept", "fresh"] = "kept",
) -> Sweep:
    """The measurement of the critical batch size (2505.23971): from each of `steps`, checkpoints of `run`, a run of
    `tokens` tokens with each of `batches` windows per step.

    The learning rate of each branch is what the run's own schedule has there, times the rule's factor. Warmup is the
    run's, so that a branch behind it has none. Raises UserError where the run or a checkpoint is not there.
    """
    base = load_recipe(str(run))
    arms = grid({"batch.sequences": batches})
    last = max(tokens_of_checkpoint(Path(run), step) for step in steps)
    if last + tokens > base.tokens:
        raise UserError(
            f"{run}: its schedule ends at {base.tokens:,} tokens, a branch of {tokens:,} at {last + tokens:,}; branch"
            " from an earlier checkpoint, or for fewer tokens"
        )
    branches = Branches(str(run), tuple(steps), tokens, optimizer_state)
    return Sweep(
        f"{base.name}_batches", base, arms, (base.seed,), learning_rate_rule=learning_rate_rule, branches=branches
    )


def cooldowns(run: str | Path, *, tokens: int, steps: Sequence[int] = ()) -> Sweep:
    """From each of `steps`, checkpoints of `run` (none: every kept one but the first), a run of `tokens` in which
    the learning rate falls linearly from what it is there to 0.

    Raises UserError where the run or a checkpoint is not there.
    """
    base = load_recipe(str(run))
    arms, begun = [], tuple(steps) or tuple(kept_steps(Path(run)))
    for step in begun:
        before = tokens_of_checkpoint(Path(run), step)
        changes = {
            "tokens": before + tokens,
            "optimizer.schedule.kind": "wsd",
            "optimizer.schedule.peak": learning_rate(base, before),
            "optimizer.schedule.final": 0.0,
            "optimizer.schedule.warmup_tokens": 0,
            "optimizer.schedule.decay_tokens": tokens,
        }
        arms.append(Arm(f"cooldown-{step}", changes, step))
    return Sweep(f"{base.name}_cooldowns", base, tuple(arms), (base.seed,), branches=Branches(str(run), begun, tokens))


def kept_steps(run: Path) -> list[int]:
    """Steps of the kept checkpoints of a run that a run can go on from, ascending, without step 0."""
    records = {path.name: read_record(path) for path in (run / "checkpoints").glob("*") if path.name.isdigit()}
    kept = [int(name) for name, record in records.items() if record is not None and record["kept"]]
    found = sorted(step for step in kept if step and (run / "checkpoints" / str(step) / "opt_state").is_dir())
    if not found:
        raise UserError(f"{run}: no kept checkpoint with an optimizer state to branch from; name another run")
    return found
