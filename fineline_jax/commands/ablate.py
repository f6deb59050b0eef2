"""`fineline ablate`: a sweep planned, run and compared."""

import os
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from fineline_jax import interface
from fineline_jax.text_table import counted


def ablate(
    sweep: Annotated[Positional[str], arg(metavar="SWEEP")],
    out: Path | None = None,
    plan: bool = False,
    part: str | None = None,
    score: str | None = None,
    benchmarks: Path | None = None,
    include_path: Path | None = None,
    until: int | None = None,
    together: int = 1,
) -> None:
    """Train every run of a sweep, one after another, and compare them; runs that have ended are kept.

    Args:
        sweep: Name in configs/sweeps, or a Python file with a function sweep().
        out: Folder of runs, scores, summary and page; default: ablations/NAME.
        plan: Print runs, tokens, FLOPs, disk, hours and what differs, and run nothing.
        part: I/N: only the I-th of N parts of the runs, for N machines that do not talk to each other; auto or auto/N:
            from the job's variables, as in `fineline score`.
        score: Suite or request pack: score every kept checkpoint of every run in memory.
        benchmarks: For --score SUITE: folder of data sets in Hugging Face layout; default: the hub.
        include_path: For --score SUITE: folder of task files of your own, which the suite names.
        until: Tokens at which every run ends, though its schedule may be longer; default: what the sweep says.
        together: Train so many runs of one shape as one program, where they do not fill the device alone.
    """
    if plan:
        from fineline_jax.ablation.plan import measured, plan_text
        from fineline_jax.ablation.sweep import load_sweep
        from fineline_jax.scoring.job_shard import job_shard

        planned = load_sweep(sweep, until)
        trials = job_shard(part, os.environ).of(planned.trials())
        print(plan_text(planned, trials, out or Path("ablations") / planned.name, measured(trials)))
        return
    ended = interface.ablate(
        sweep, out, part=part, score=score, benchmarks=benchmarks, include_path=include_path, until=until,
        together=together,
    )  # fmt: skip
    from fineline_jax.ablation.compare import differences_text
    from fineline_jax.ablation.summary import arms_text, time_text

    if len(ended.table):
        print(f"At the last checkpoint:\n{arms_text(ended.table)}\n\n{differences_text(ended.comparisons)}".rstrip())
        print(time_text(ended.table))
    if ended.stopped_by:
        print(f"stopped by {ended.stopped_by}, saved; run the same command again to go on")
    elif ended.left:
        print(f"{ended.out}: {counted(ended.left, 'run')} left to other parts")
    print(f"{ended.report or ended.out / 'summary.csv'}")
