"""The statistics of a table as files: a CSV and a Parquet file each, and findings.json, which holds every number."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from fineline_jax import __version__
from fineline_jax.atomic_files import write_atomic
from fineline_jax.trajectories.ablation.tokens_to import TOKENS_TO, to_fixed_score
from fineline_jax.trajectories.csv_cells import write_frame
from fineline_jax.trajectories.registry import STATISTICS
from fineline_jax.trajectories.runs.early_slopes import EARLY_SLOPES
from fineline_jax.trajectories.sizes.declines import SIZE_DECLINES
from fineline_jax.trajectories.statistics.columns import Statistic

FORMAT = 1
Results = Sequence[tuple[Statistic, pd.DataFrame]]


def compute(table: pd.DataFrame) -> list[tuple[Statistic, pd.DataFrame]]:
    """Every registered statistic with its frame of a normalised tidy table; of several series that are no arms, also
    those of the dynamics of all."""
    found = [(statistic, statistic.compute(table)) for statistic in STATISTICS]
    sizes = {"parameters": table["parameters"]} if "parameters" in table else {}
    declines = SIZE_DECLINES.compute(found[0][1], pd.DataFrame({"series": table["series"]} | sizes))
    found += [(SIZE_DECLINES, declines)] if len(declines) else []
    if "arm" not in table and table["series"].nunique() > 1:
        summary = found[0][1]
        found += [(TOKENS_TO, to_fixed_score(summary)), (EARLY_SLOPES, EARLY_SLOPES.compute(table, summary))]
    return found


def write_results(results: Results, sentences: Mapping[str, Sequence[str]], out: Path, *, title: str) -> None:
    """Write NAME.csv and NAME.parquet of each statistic and findings.json into `out`, each whole or not at all."""
    for statistic, frame in results:
        write_frame(frame, out / statistic.name)
    found = {"format": FORMAT, "made by": f"fineline_jax {__version__}", "title": title, "sentences": sentences}
    found["statistics"] = {statistic.name: _findings(statistic, frame) for statistic, frame in results}
    write_atomic(out / "findings.json", json.dumps(found, allow_nan=False, ensure_ascii=False))


def _findings(statistic: Statistic, frame: pd.DataFrame) -> dict[str, Any]:
    """The definition of each column, and of each row: what it is of, values, intervals, n, verdict, reason."""
    words = [name for name in ("verdict", "reason") if name in frame]  # in one order, so that the file is the same
    apart = {*statistic.keys, *statistic.ends, *words}
    columns = {column.name: column for column in statistic.columns if column.name in frame}
    values = [name for name in columns if name not in apart]
    intervals = {name: columns[name].interval for name in values if columns[name].interval}
    rows = []
    for row in frame.to_dict("records"):
        made: dict[str, Any] = {"of": {name: row[name] for name in statistic.keys}}
        made["values"] = {name: _plain(row[name]) for name in values}
        ends = {name: [_plain(row[low]), _plain(row[high])] for name, (low, high) in intervals.items()}  # pyright: ignore
        made["intervals"] = {name: pair for name, pair in ends.items() if pair != [None, None]}
        if statistic.count:
            made["n"] = _plain(row[statistic.count])
        rows.append(made | {name: _plain(row[name]) for name in words})
    described = {
        f"{statistic.name}.{column.name}": {"unit": column.unit, "meaning": column.meaning, "empty": column.empty}
        for column in columns.values()
    }
    return {
        "title": statistic.title, "definition": statistic.definition, "caveat": statistic.caveat,
        "source": statistic.source, "interval": "95 %", "n": statistic.count or None, "columns": described,
        "findings": rows,
    }  # fmt: skip


def _plain(value: Any) -> Any:
    return value if isinstance(value, str) else None if value is None else short(value)


def short(value: Any, digits: int = 6) -> float | int | None:
    """A number with `digits` significant digits for JSON; NaN and infinities become null."""
    number = float(value)
    if not math.isfinite(number):
        return None
    rounded = float(f"{number:.{digits}g}")
    return int(rounded) if rounded == int(rounded) else rounded
