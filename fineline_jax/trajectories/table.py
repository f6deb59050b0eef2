"""The tidy table of scores: one row per (series, checkpoint, task, metric), from whatever file holds them.

Its columns are those of `facts.score_table`. Files are read by `readers/`; here their tables are checked, joined and
written.
"""

import difflib
import fnmatch
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fineline_jax.atomic_files import atomic_file
from fineline_jax.errors import UserError
from fineline_jax.facts.metrics import METRICS, metric_of
from fineline_jax.facts.score_table import COLUMNS, KEY, NUMBERS, TEXT
from fineline_jax.facts.tasks import chance_of, task_of
from fineline_jax.trajectories.codes import codes_of, each
from fineline_jax.trajectories.csv_cells import write_csv
from fineline_jax.trajectories.readers.files import DRAWS_FILE, read_file
from fineline_jax.trajectories.readers.options import ReadOptions

log = logging.getLogger(__name__)
_ALIASES = {"model": "series", "acc_stderr": "stderr", "revision": "checkpoint"}
_SETTINGS = ("shots", "limit")
"""Columns of tables being read: scores that differ in them are of different curves."""
OPTIONAL = {
    "chance_from": "text", "score": "number", "ceiling": "number", "arm": "text", "seed": "text",
    "parameters": "number", "flops_per_token": "number", "resampled": "arrays",
}  # fmt: skip
"""Columns that a table may have beside COLUMNS: where the chance level is from; the score that the tokens to a fixed
score are counted to, and the highest that can be reached; what was changed in a run and which replicate it is; its size
and training FLOPs per token; arrays [draws] of a bootstrap over documents minus the value."""
Part = tuple[str, pd.DataFrame]
"""(what names it in errors, a table)."""


def read_table(paths: str | Path | Iterable[str | Path], **options: Any) -> pd.DataFrame:
    """Read and join files and folders of scores: tables, or the JSON results of evaluation tools.

    options: fields of `readers.options.ReadOptions`. Returns a normalised table (see `join`). Raises UserError naming
    the file and column of the first defect, and the files of a score that two sources give differently.
    """
    read = ReadOptions(**options)
    if isinstance(paths, (str, Path)):
        paths = [paths]
    return join([part for path in paths for part in read_parts(Path(path), read)], read)


def read_parts(path: Path, options: ReadOptions) -> list[Part]:
    """The tables of one input, of a folder of tables one per file, under the label that `options` gives the input."""
    parts = [(str(source), frame) for source, frame in read_file(path, options.tokens_per_step)]
    return labelled(parts, path, options)


def labelled(parts: list[Part], path: Path, options: ReadOptions) -> list[Part]:
    """The tables of input `path` with its label as the name of its one series.

    Raises UserError if a label names no series of its own.
    """
    label = options.labels.get(path)
    if label is None:
        return parts
    found = dict.fromkeys(name for _, frame in parts if "series" in frame for name in frame["series"].unique())
    if len(found) > 1:
        raise UserError(
            f"--label {label}={path}: holds the series {', '.join(map(str, found))}; a label can name one only"
        )
    return [(source, frame.assign(series=label)) for source, frame in parts]


def join(parts: Sequence[Part], options: ReadOptions = ReadOptions()) -> pd.DataFrame:
    """One normalised table of several, with what is known of public tasks filled in.

    A value that is no number is left out; a standard error that is not given is computed where the number of documents
    is known; percentages are divided by 100: each is said in the log. Where scores of one task differ in shots, or
    only some are of a part of the documents (`limit`), these are part of the series' names.
    Raises UserError as `read_table`.
    """
    if not parts:
        raise UserError("no score table was given: name a CSV, a Parquet file or a folder of lm-eval results")
    checked = []
    for source, frame in parts:
        frame = _as_shares(_without_missing(frame, source), source, options.percent)
        checked.append(_checked(frame, source).assign(source=source))
    joined = _by_settings(pd.concat(checked, ignore_index=True))
    ends = np.cumsum([len(part) for part in checked])
    for part, end in zip(checked, ends, strict=True):
        _refuse_contradictions(joined.iloc[end - len(part) : end], str(part["source"].iloc[0]))
    clash = joined.iloc[:0]
    if len(parts) > 1:
        joined = joined.drop_duplicates([*KEY, "step", "tokens", "value"])
        clash = joined[joined.duplicated(KEY, keep=False)]
    if len(clash):
        one = clash[(clash[KEY] == clash.iloc[0][KEY]).all(axis=1)]
        where = " and ".join(dict.fromkeys(one["source"]))
        raise UserError(
            f"{where}: {_describe(clash.iloc[0])} is given with different values; rename one series or drop a file"
        )
    joined = _picked(_facts_shared(joined), options)
    if options.tasks_table is not None:
        joined = _with_tasks(joined, options.tasks_table)
    if options.until is not None:
        joined = joined[joined["tokens"] <= options.until]
        if joined.empty:
            raise UserError(f"--until {options.until:g}: every checkpoint has more tokens; give a larger number")
    return _ordered(_with_score(_with_stderr(joined), options))


def normalise(frame: pd.DataFrame, *, source: str = "table") -> pd.DataFrame:
    """Check a table and bring it to COLUMNS, text as str, numbers as float64, ordered by series, task, tokens.

    Accepts `model` for `series`, and `shots` (joined to the series name when several occur). Fills what may be absent:
    checkpoint from step or tokens, domain and chance of public tasks, n and stderr with NaN. Rows with a missing value
    are refused, because a curve with silent holes is not the curve that was measured.
    `source` names the table in errors.
    """
    table = _checked(frame, source)
    if table["shots"].nunique() > 1:
        table["series"] = _with_shots(table)
    _refuse_contradictions(table, source)
    return _ordered(table)


def _checked(frame: pd.DataFrame, source: str) -> pd.DataFrame:
    """COLUMNS and the settings, in the order of the file."""
    frame = frame.rename(columns={k: v for k, v in _ALIASES.items() if k in frame and v not in frame})
    needed = [c for c in ("series", "task", "metric", "value") if c not in frame]
    if "tokens" not in frame:
        needed.append("tokens")
    if needed:
        raise UserError(
            f"{source}: column {needed[0]!r} is missing (found: {', '.join(map(str, frame.columns))}); "
            "a tidy table needs series, tokens, task, metric, value"
        )
    if frame.empty:
        raise UserError(f"{source}: the table has no rows; score at least one checkpoint first")
    frame = frame.reset_index(drop=True)
    out = pd.DataFrame(index=frame.index)
    for name in NUMBERS:
        out[name] = _numbers(frame, name, source)
    for name in ("series", "task", "metric"):
        if frame[name].isna().any():
            raise UserError(f"{source}: column {name!r} is empty in {_row(frame[name].isna())}; fill it in")
        out[name] = frame[name].astype(str)
    for name, low, high in (("tokens", 0, np.inf), ("stderr", 0, np.inf), ("n", 0, np.inf), ("chance", 0, 1)):
        bad = (out[name] < low) | (out[name] > high) | np.isinf(out[name])
        if bad.any():
            limit = f"at least {low}" if np.isinf(high) else f"from {low} to {high}"
            raise UserError(f"{source}: column {name!r} is {out[name][bad].iloc[0]} in {_row(bad)}; it must be {limit}")
    for name in ("tokens", "value"):
        bad = out[name].isna() | np.isinf(out[name])
        if bad.any():
            raise UserError(f"{source}: column {name!r} is not a finite number in {_row(bad)}; mend or drop the row")
    if "checkpoint" in frame:
        out["checkpoint"] = frame["checkpoint"].astype(str)
    else:
        by_step = "step_" + each(out["step"], "{:.0f}".format)
        out["checkpoint"] = by_step.where(out["step"].notna(), "tokens_" + each(out["tokens"], "{:.0f}".format))
    known_domain = each(out["task"], lambda task: task_of(str(task)).domain)
    out["domain"] = (
        frame["domain"].astype(object).fillna(known_domain).astype(str) if "domain" in frame else known_domain
    )
    if "chance" not in frame:
        pairs = pd.DataFrame({"pair": codes_of(out, ["task", "metric"]), "task": out["task"], "metric": out["metric"]})
        known = {
            one.pair: chance_of(str(one.task), str(one.metric)) for one in pairs.drop_duplicates("pair").itertuples()
        }
        out["chance"] = each(pairs["pair"], known.__getitem__)
    for name in TEXT:
        out[name] = out[name].astype("str")
    for name in _SETTINGS:
        out[name] = _numbers(frame, name, source)
    if "stderr_missing" in frame:
        out["stderr_missing"] = frame["stderr_missing"].to_numpy(bool)
    for name, kind in OPTIONAL.items():
        if name in frame:
            column = frame[name]
            numbers = kind == "number"
            out[name] = _numbers(frame, name, source) if numbers else column if kind == "arrays" else _text(column)
    return out


def _text(column: pd.Series) -> pd.Series:
    """Whole numbers, such as seeds beside empty cells, are written without a point."""
    return each(column, lambda cell: "" if pd.isna(cell) else f"{cell:g}" if isinstance(cell, float) else str(cell))


def _without_missing(frame: pd.DataFrame, source: str) -> pd.DataFrame:
    """The rows that have a finite value; the others are named in the log."""
    if "value" not in frame:
        return frame
    values = pd.to_numeric(frame["value"], errors="coerce").astype("float64")
    missing = frame["value"].isna() | np.isinf(values)
    if not missing.any():
        return frame
    if missing.all():
        raise UserError(f"{source}: no row has a finite number in column 'value'; evaluate again or drop the file")
    count = int(missing.sum())
    first = "of a task" if "task" not in frame else f"first of {frame['task'][missing].iloc[0]}"
    log.warning("%s: left out, no finite value: %d rows, %s in %s", source, count, first, _row(missing))
    return frame[~missing]


def _is_share(metric: str, *, known: bool) -> bool:
    """Whether the metric is a share of documents or a probability. known: to this package, else also by assumption."""
    meant = metric_of(metric)
    if known and metric.partition(" (")[0] not in METRICS:
        return False
    return meant.chance != "none" and meant.better == 1 and not meant.log


def _as_shares(frame: pd.DataFrame, source: str, percent: bool) -> pd.DataFrame:
    """The table with percentages divided by 100: where the user says so, or every value of a metric is above 1."""
    if not {"metric", "value", "task"} <= set(frame):
        return frame
    values = pd.to_numeric(frame["value"], errors="coerce").astype("float64")
    scaled = pd.Series(False, index=frame.index)
    for metric, rows in values.groupby(frame["metric"].astype(str)):
        if not _is_share(str(metric), known=not percent) or not (percent or (rows > 1).any()):
            continue
        mixed = not percent and bool(((rows > 0) & (rows <= 1)).any())
        high = rows[rows > (1 if mixed else 100)]
        if len(high):
            remedy = "mend it" if high.iloc[0] > 100 else "if all are percentages give --percent, else mend it"
            task = frame["task"][high.index[0]]
            raise UserError(f"{source}: {task} {metric} is {high.iloc[0]:g}, but a share is at most 1; {remedy}")
        scaled |= frame["metric"].astype(str) == metric
    if not scaled.any():
        return frame
    names = ", ".join(map(str, frame["metric"][scaled].unique()))
    small = scaled & (values > 0) & (values < 1)
    below = f"; {int(small.sum())} of them are below 1 %, such as {frame['task'][small].iloc[0]}" if small.any() else ""
    log.warning("%s: percentages are divided by 100: %s%s", source, names, below)
    frame = frame.assign(value=values.where(~scaled, values / 100))
    if "stderr" in frame:
        errors = _numbers(frame, "stderr", source)
        frame["stderr"] = errors.where(~scaled, errors / 100)
    return frame


def _by_settings(table: pd.DataFrame) -> pd.DataFrame:
    """The table with shots and limit in the names of the series, where scores of one task differ in them."""
    curve = ["series", "task"]
    if table["shots"].notna().any():
        several = table.groupby("task")["shots"].nunique().max() > 1
        if several or table.groupby(curve)["shots"].nunique(dropna=False).max() > 1:
            table["series"] = _with_shots(table)
    if table["limit"].notna().any() and table.groupby(curve)["limit"].nunique(dropna=False).max() > 1:
        limit = table["limit"]
        table["series"] += each(limit, lambda n: "" if np.isnan(n) else f" (limit {n:g})")
    return table


def _with_shots(table: pd.DataFrame) -> pd.Series:
    """Names of series with the shots; unknown ones are said only beside known ones."""
    unknown = table["series"].isin(table["series"][table["shots"].notna()].unique())
    names = each(table["shots"], lambda shots: "" if np.isnan(shots) else f" ({shots:g}-shot)")
    return table["series"] + names.where(table["shots"].notna() | ~unknown, " (shots unknown)")


def _facts_shared(table: pd.DataFrame) -> pd.DataFrame:
    """Domain and chance of a task that one source knows, for the rows of those that do not (lm-eval's files)."""
    if table["source"].nunique() > 1:
        known = table[table["domain"] != "other"].drop_duplicates("task")
        known = dict(zip(known["task"], known["domain"], strict=True))
        table["domain"] = each(table["task"], lambda task: known.get(task, "other"))
        table["chance"] = table["chance"].fillna(table.groupby(["task", "metric"])["chance"].transform("first"))
    return table


def _picked(table: pd.DataFrame, options: ReadOptions) -> pd.DataFrame:
    """The rows of the series and tasks that the options name, those of the reference first."""
    for column, option, wanted in (("series", "--series", options.series), ("task", "--task", options.tasks)):
        there = list(map(str, table[column].unique()))
        found = {one: [name for name in there if name == one or fnmatch.fnmatchcase(name, one)] for one in wanted}
        for pattern, names in found.items():
            if not names:
                raise UserError(f"{option} {pattern}: there is none of that name; there are {_nearest(pattern, there)}")
        if found:
            table = table[table[column].isin([name for names in found.values() for name in names])]
    if options.reference is None:
        return table
    first = table["series"] == options.reference
    if not first.any():
        there = _nearest(options.reference, list(map(str, table["series"].unique())))
        raise UserError(f"--reference {options.reference}: there is no series of that name; there are {there}")
    return pd.concat([table[first], table[~first]], ignore_index=True)


def _nearest(wanted: str, names: list[str], most: int = 8) -> str:
    """The names; of more than `most` those most like `wanted`, and how many more there are."""
    if len(names) <= most:
        return ", ".join(names)
    near = difflib.get_close_matches(wanted, names, n=most, cutoff=0)
    return f"{', '.join(near)} and {len(names) - most} more"


def _with_tasks(table: pd.DataFrame, path: Path) -> pd.DataFrame:
    """The table with the facts of a tasks table (CSV: task, domain, chance, n) in place of those known."""
    try:
        tasks = pd.read_csv(path, dtype={"task": "str", "domain": "str"})
    except (OSError, ValueError) as error:
        raise UserError(f"--tasks-table {path}: cannot be read ({error}); give a CSV") from error
    if "task" not in tasks or tasks["task"].isna().any() or tasks["task"].duplicated().any():
        raise UserError(f"--tasks-table {path}: column 'task' must name each task once")
    tasks = tasks.set_index("task")
    for name in ("chance", "n"):
        tasks[name] = _numbers(tasks, name, f"--tasks-table {path}")
    if not tasks["chance"].dropna().between(0, 1, inclusive="left").all():
        raise UserError(f"--tasks-table {path}: column 'chance' must be from 0 to below 1")
    if "domain" in tasks:
        table["domain"] = table["task"].map(tasks["domain"]).fillna(table["domain"]).astype("str")
    given = table["task"].map(tasks["chance"])
    guessed = each(table["metric"], lambda metric: metric_of(metric).chance == "task")
    table["chance"] = given.where(given.notna() & guessed, table["chance"])
    table["n"] = table["n"].fillna(table["task"].map(tasks["n"]))
    if "ceiling" in tasks:
        given = table["task"].map(_numbers(tasks, "ceiling", f"--tasks-table {path}"))
        table["ceiling"] = given.where(guessed, table.get("ceiling", np.nan))
    return table


def _with_score(table: pd.DataFrame, options: ReadOptions) -> pd.DataFrame:
    """The table with a column `score`, where the options state one, or a ceiling to count the way to."""
    if options.share is None and options.ceiling is None and not options.scores and "ceiling" not in table:
        return table
    scores = table["score"] if "score" in table else pd.Series(np.nan, index=table.index)
    highest = table["ceiling"] if "ceiling" in table else scores * np.nan
    highest = highest.fillna(np.nan if options.ceiling is None else options.ceiling)
    bad = (highest <= table["chance"]) | (highest > 1)
    if bad.any():
        row = table[bad].iloc[0]
        raise UserError(
            f"ceiling {highest[bad].iloc[0]:g} of {row['task']}: must be above its chance level {row['chance']:g} and "
            "at most 1; mend --ceiling or the column 'ceiling'"
        )
    if options.share is not None or highest.notna().any():
        half = 0.5 if options.share is None else options.share
        counted = table["chance"] + half * (highest.fillna(1.0) - table["chance"])
        stated = options.share is not None or options.ceiling is not None  # else what the table says counts first
        scores = counted.fillna(scores) if stated else scores.fillna(counted)
    for name, score in options.scores.items():
        meant = (table["metric"] == name) | ((table["task"] == name) & table["chance"].notna())
        if not meant.any():
            tasks = table["task"][table["chance"].notna()].unique()
            there = _nearest(name, [*map(str, tasks), *map(str, table["metric"].unique())])
            raise UserError(
                f"--to-score {name}={score:g}: no metric, and no task with a chance level; there are {there}"
            )
        if score > 1 and table["chance"][meant].notna().any():
            raise UserError(f"--to-score {name}={score:g}: a share is at most 1; write 0.5 for 50 %")
        scores = scores.where(~meant, score)
    return table.assign(score=scores)


def _with_stderr(table: pd.DataFrame) -> pd.DataFrame:
    """The table with √(p(1−p)/n) where an accuracy has no standard error, which is said."""
    counted = each(table["metric"], lambda metric: metric.startswith("acc") and metric in METRICS)
    wanted = table["stderr"].isna() & counted & table["value"].between(0, 1)
    if "stderr_missing" in table:
        wanted &= ~table["stderr_missing"].fillna(False).astype(bool)
    known = each(table["task"], lambda task: float(task_of(task).documents or np.nan))
    n = table["n"].fillna(known.where(table["limit"].isna()))
    value = table["value"].where(wanted)
    error = np.sqrt(value * (1 - value) / n.where(n > 0))
    filled = wanted & error.notna()
    if filled.any():
        log.warning(
            "standard errors that are not given are computed from the number of documents, √(p(1−p)/n): %s",
            ", ".join(table["task"][filled].unique()),
        )
    return table.assign(stderr=table["stderr"].where(~filled, error), n=table["n"].where(~filled, n))


def write_table(table: pd.DataFrame, folder: Path) -> None:
    """Write `tidy.csv` and `tidy.parquet` into `folder`, each complete or not at all, and DRAWS_FILE where there are
    draws: all that a later analysis needs for the same verdicts."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DRAWS_FILE).unlink(missing_ok=True)
    if "resampled" in table:
        with atomic_file(folder / DRAWS_FILE) as partial:
            table[[*KEY, "resampled"]].dropna().to_parquet(partial, index=False)
        table = table.drop(columns="resampled")
    with atomic_file(folder / "tidy.csv") as partial:
        write_csv(table, partial)
    with atomic_file(folder / "tidy.parquet") as partial:
        table.to_parquet(partial, index=False)


def _numbers(frame: pd.DataFrame, name: str, source: str) -> pd.Series:
    """Column `name` as float64, NaN where it is absent or empty; text that is no number is an error."""
    if name not in frame:
        return pd.Series(np.nan, index=frame.index)
    numbers = pd.to_numeric(frame[name], errors="coerce").astype("float64")
    bad = numbers.isna() & frame[name].notna()
    if bad.any():
        raise UserError(
            f"{source}: column {name!r} holds {frame[name][bad].iloc[0]!r} in {_row(bad)}; a number is needed"
        )
    return numbers


def _refuse_contradictions(table: pd.DataFrame, source: str) -> None:
    twice = pd.Series(codes_of(table, KEY)).duplicated().to_numpy()
    if twice.any():
        raise UserError(f"{source}: {_describe(table[twice].iloc[0])} occurs twice; keep one row of each")
    row = _first_of_several(table, ["series", "checkpoint"], "tokens")
    if row is not None:
        raise UserError(
            f"{source}: checkpoint {row['checkpoint']!r} of series {row['series']!r} has several values of 'tokens'; "
            "one is right"
        )
    row = _first_of_several(table, ["task"], "domain")
    if row is not None:
        raise UserError(f"{source}: task {row['task']!r} is in several domains; column 'domain' must be one")


def _first_of_several(table: pd.DataFrame, of: list[str], column: str) -> pd.Series | None:
    """A row of those that agree in `of` and not in `column`; None: there is none."""
    found = pd.DataFrame({"of": codes_of(table, of), "value": table[column].to_numpy()}).drop_duplicates()
    several = found["of"].duplicated()
    return table.iloc[found.index[several][0]] if several.any() else None


def _ordered(table: pd.DataFrame) -> pd.DataFrame:
    """Series, domains, tasks and metrics in the order of their first appearance, checkpoints by tokens."""
    curves = codes_of(table, ["series", "domain", "task", "metric"])
    order = np.lexsort((table["step"].to_numpy(float), table["tokens"].to_numpy(float), curves))
    kept = table[[*COLUMNS, *(name for name in OPTIONAL if name in table)]]
    return (kept if (np.diff(order) == 1).all() else kept.iloc[order]).reset_index(drop=True)


def _row(bad: pd.Series) -> str:
    """Where a defect is, counted as in the file: the header is line 1."""
    return f"line {int(np.flatnonzero(bad.to_numpy())[0]) + 2}"


def _describe(row: pd.Series) -> str:
    return f"({row['series']}, {row['checkpoint']}, {row['task']}, {row['metric']})"
