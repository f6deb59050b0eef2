"""The last checkpoints of each series side by side, and the change from the one before, as text."""

import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from fineline_jax.errors import UserError
from fineline_jax.facts.tasks import task_of
from fineline_jax.scoring import score_files
from fineline_jax.scoring.estimates import Metrics, Value, change
from fineline_jax.scoring.metrics import resampled, tidy
from fineline_jax.scoring.requests import pack as packs
from fineline_jax.text_table import text_table

Checkpoints = Sequence[tuple[str, Mapping[str, Metrics]]]
"""(name, task -> metric -> value) in the order of training."""


def of_scores(folder: Path, tasks: Sequence[str] = (), last: int = 2, series: Iterable[str] = ()) -> str:
    """The table of a folder of scores, of all series or of those named; see `text`.

    Standard errors that need a bootstrap, which takes seconds, are left out; changes are paired over documents.
    Raises UserError as `tidy.tidy`.
    """
    files, _ = score_files.usable_files(folder)
    pack, wanted = packs.load(folder / "pack"), set(series)
    headers: dict[str, list[tuple[tuple[float, float], Path]]] = {}
    for file in files:
        header = score_files.read_header(file)
        place = (-1 if header.tokens is None else header.tokens, -1 if header.step is None else header.step)
        if not wanted or header.series in wanted:
            headers.setdefault(header.series, []).append((place, file))
    shown = {}
    for name, found in headers.items():
        scores = [score_files.read_for(file, pack) for _, file in sorted(found)[-max(last, 2) :]]
        computed = [tidy.of_tasks(pack, one.loglikelihood, one.is_greedy, resample=False) for one in scores]
        shown[name] = [
            (one.header.checkpoint, resampled.with_deviations(pack, one, values))
            for one, values in zip(scores, computed, strict=True)
        ]
    rows = [*pack.manifest["groups"], *pack.tasks]
    first = {row.get("group") or row["task"]: row["metric"] for row in rows}
    members = {task for group in pack.manifest["groups"] for task in group["tasks"]}
    return text(shown, first, tasks or [name for name in first if name not in members], last, every=bool(tasks))


def of_tables(frames: Sequence[pd.DataFrame], source: str, tasks: Sequence[str] = (), last: int = 2) -> str:
    """The table of scores of other tools: columns series, task, metric, value; checkpoint, step or tokens; stderr, n.

    Of a task the first metric is that of `facts.tasks` where the table has it. Raises UserError, which names `source`.
    """
    series: dict[str, dict[str, dict[str, Metrics]]] = {}
    first: dict[str, str] = {}
    for frame in frames:
        frame = frame.rename(columns={"model": "series", "revision": "checkpoint", "acc_stderr": "stderr"})
        if missing := {"series", "task", "metric", "value"} - set(frame):
            raise UserError(f"{source}: has no column {min(missing)!r}; a table needs series, task, metric, value")
        order = [name for name in ("tokens", "step") if name in frame]
        frame = frame.sort_values(order, kind="stable", na_position="first") if order else frame
        for row in frame.to_dict("records"):
            checkpoint = next((str(row[key]) for key in ("checkpoint", *order) if pd.notna(row.get(key))), "main")
            values = series.setdefault(str(row["series"]), {}).setdefault(checkpoint, {})
            count = row.get("n", math.nan)
            found = Value(float(row["value"]), row.get("stderr", math.nan), 0 if pd.isna(count) else int(count))
            task, metric = str(row["task"]), str(row["metric"])
            values.setdefault(task, {})[metric] = found
            if metric == task_of(task).metric or task not in first:
                first[task] = metric
    shown = {name: list(checkpoints.items()) for name, checkpoints in series.items()}
    return text(shown, first, tasks or list(first), last, every=bool(tasks))


def text(
    series: Mapping[str, Checkpoints], first: Mapping[str, str], tasks: Sequence[str], last: int, *, every: bool
) -> str:
    """A table per series: the last checkpoints, value ± standard error, and the last one less the one before.

    first: task -> the metric that is shown of it; every: all metrics are. tasks: names or patterns such as mmlu_*.
    Raises UserError for one that names no task.
    """
    names = dict.fromkeys(task for found in series.values() for _, values in found for task in values)
    for pattern in tasks if every else ():
        if not fnmatch.filter(names, pattern):
            raise UserError(f"--task {pattern}: no such task here; there are {', '.join(names)}")
    chosen = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in tasks)]
    parts = []
    for one, checkpoints in series.items():
        columns = checkpoints[-last:]
        rows = [[one, "metric", "n", *(name for name, _ in columns), *(["change"] if len(checkpoints) > 1 else [])]]
        for task in chosen:
            metrics = dict.fromkeys(metric for _, values in columns for metric in values.get(task, {}))
            for metric in metrics if every else {first[task]} & metrics.keys():
                found = [values.get(task, {}).get(metric) for _, values in checkpoints]
                size = next((f"{value.n:,}" for value in reversed(found) if value is not None and value.n), "")
                cells = [_cell(value) for value in found[-last:]]
                if len(found) > 1:
                    before, after = found[-2:]
                    cells.append("" if before is None or after is None else _cell(change(before, after), "+"))
                rows.append([task, metric, size, *cells])
        parts.append(text_table(rows, right=[2]))
    return "\n\n".join(parts)


def _cell(value: Value | None, sign: str = "") -> str:
    if value is None:
        return ""
    error = f" ±{value.stderr:.4f}" if value.stderr == value.stderr else ""
    return f"{value.value:{sign}.4f}{error}"
