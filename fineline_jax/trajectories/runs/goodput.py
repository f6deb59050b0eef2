"""What the time of a run went into, from the lines of its metrics.jsonl."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from fineline_jax.progress import duration

KINDS = ("step", "data_wait", "compile", "checkpoint", "evaluation", "restart")


def seconds_by_kind(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds of each of KINDS from the start of a run to its last line; {} for lines without times.

    step: optimizer steps that count; data_wait: before a step, for its batch; compile: first calls of a compiled step;
    checkpoint: the state copied, and the save before waited for; evaluation: validation and scoring; restart: from a
    line to the first step after the next start: what was trained and not saved, the time that nothing ran, the start.
    """
    spent: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    before = None
    timed = [line for line in lines if "interval_seconds" in line]
    for line in timed:
        interval = line["interval_seconds"]
        share = line["data_wait_seconds"] / line["step_seconds"] if line["step_seconds"] else 0.0
        others = {kind: line.get(f"{kind}_seconds", 0.0) for kind in ("compile", "checkpoint", "evaluation")}
        others["data_wait"] = min(share, 1.0) * interval
        if "start_seconds" in line:
            idle = line["unix_time"] - before - interval if before is not None else line["start_seconds"]
            others["restart"] = max(idle, 0.0)
            interval += others["restart"]
        for kind, seconds in others.items():
            spent[kind] += seconds
        spent["step"] += max(interval - sum(others.values()), 0.0)
        before = line["unix_time"]
    return spent if timed else {}


def goodput_table(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> pd.DataFrame:
    """A row per run with times: run, goodput (share of the time in steps), seconds of each of KINDS."""
    found = {run: seconds_by_kind(lines) for run, lines in runs.items()}
    rows = [{"run": run, "goodput": _share(spent), **spent} for run, spent in found.items() if spent]
    return pd.DataFrame(rows, columns=["run", "goodput", *KINDS])


def goodput_line(lines: Sequence[Mapping[str, Any]]) -> str:
    """One sentence of the same; "": without times."""
    spent = seconds_by_kind(lines)
    parts = ", ".join(f"{kind.replace('_', ' ')} {duration(seconds)}" for kind, seconds in spent.items())
    return f"goodput {_share(spent):.0%}: {parts}" if spent else ""


def _share(spent: Mapping[str, float]) -> float:
    return spent["step"] / total if (total := sum(spent.values())) else 0.0
