"""The tidy table of scores: one row per (series, checkpoint, task, metric), from whatever file holds them.

Its columns are those of `facts.score_table`. Here tables are read (tidy CSV or Parquet, the Pythia table, trees of
lm-eval result files), checked, and written.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from fineline_jax.atomic_files import atomic_file
from fineline_jax.errors import UserError
from fineline_jax.facts.score_table import COLUMNS, KEY, NUMBERS, TEXT
from fineline_jax.facts.tasks import chance_of, task_of
from fineline_jax.trajectories.readers.lm_eval import read_results_tree

_ALIASES = {"model": "series", "acc_stderr": "stderr", "revision": "checkpoint"}


def read_table(paths: str | Path | Iterable[str | Path], *, tokens_per_step: float | None = None) -> pd.DataFrame:
    """Read and join score tables: .csv, .csv.gz, .parquet, lm-eval result files (.json) or folders of those.

    `tokens_per_step` gives the token counts of lm-eval results whose revisions name only a step. Returns a normalised
    table (see `normalise`). Raises UserError naming the file and column of the first defect, and the files of a score
    that two sources give differently.
    """
    if isinstance(paths, (str, Path)):
        paths = [paths]
    parts = []
    for path in map(Path, paths):
        parts.append(normalise(_read_one(path, tokens_per_step), source=str(path)).assign(source=str(path)))
    if not parts:
        raise UserError("no score table was given: name a CSV, a Parquet file or a folder of lm-eval results")
    joined = pd.concat(parts, ignore_index=True)
    joined = joined.drop_duplicates([*KEY, "step", "tokens", "value"])
    clash = joined[joined.duplicated(KEY, keep=False)]
    if len(clash):
        one = clash[(clash[KEY] == clash.iloc[0][KEY]).all(axis=1)]
        where = " and ".join(dict.fromkeys(one["source"]))
        raise UserError(
            f"{where}: {_describe(clash.iloc[0])} is given with different values; rename one series or drop a file"
        )
    return _ordered(joined.drop(columns="source"))


def normalise(frame: pd.DataFrame, *, source: str = "table") -> pd.DataFrame:
    """Check a table and bring it to COLUMNS, text as str, numbers as float64, ordered by series, task, tokens.

    Accepts `model` for `series`, and `shots` (joined to the series name when several occur). Fills what may be absent:
    checkpoint from step or tokens, domain and chance of public tasks, n and stderr with NaN. Rows with a missing value
    are refused, because a curve with silent holes is not the curve that was measured.
    `source` names the table in errors.
    """
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
    if "shots" in frame and frame["shots"].nunique() > 1:
        out["series"] = out["series"] + " (" + frame["shots"].astype(str) + "-shot)"
    if "checkpoint" in frame:
        out["checkpoint"] = frame["checkpoint"].astype(str)
    else:
        by_step = "step_" + out["step"].map("{:.0f}".format)
        out["checkpoint"] = by_step.where(out["step"].notna(), "tokens_" + out["tokens"].map("{:.0f}".format))
    known_domain = out["task"].map(lambda task: task_of(str(task)).domain)
    out["domain"] = (
        frame["domain"].astype(object).fillna(known_domain).astype(str) if "domain" in frame else known_domain
    )
    if "chance" not in frame:
        pairs = zip(out["task"], out["metric"], strict=True)
        out["chance"] = [chance_of(task, metric) for task, metric in pairs]
    for name in TEXT:
        out[name] = out[name].astype("str")
    _refuse_contradictions(out, source)
    return _ordered(out)


def write_table(table: pd.DataFrame, folder: Path) -> None:
    """Write `tidy.csv` and `tidy.parquet` into `folder`, each complete or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    table = table[list(COLUMNS)]
    for name, write in (("tidy.csv", _to_csv), ("tidy.parquet", _to_parquet)):
        with atomic_file(folder / name) as partial:
            write(table, partial)


def _to_csv(table: pd.DataFrame, path: Path) -> None:
    table.to_csv(path, index=False)


def _to_parquet(table: pd.DataFrame, path: Path) -> None:
    table.to_parquet(path, index=False)


def _read_one(path: Path, tokens_per_step: float | None) -> pd.DataFrame:
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; name a CSV, a Parquet file or a folder of lm-eval results")
    if path.is_dir():
        for name in ("tidy.parquet", "tidy.csv"):
            if (path / name).exists():
                return _read_one(path / name, tokens_per_step)
        return read_results_tree(path, tokens_per_step=tokens_per_step)
    name = path.name.lower()
    try:
        if name.endswith((".csv", ".csv.gz")):
            return pd.read_csv(path, dtype={"checkpoint": "str", "task": "str", "series": "str", "model": "str"})
        if name.endswith(".parquet"):
            return pd.read_parquet(path)
    except (ValueError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: cannot be read as a table ({reason}); write it again") from error
    if name.endswith(".json"):
        return read_results_tree(path, tokens_per_step=tokens_per_step)
    raise UserError(f"{path}: not a table this command reads; use .csv, .csv.gz, .parquet or lm-eval's .json")


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
    twice = table.duplicated(KEY)
    if twice.any():
        raise UserError(f"{source}: {_describe(table[twice].iloc[0])} occurs twice; keep one row of each")
    places = table.groupby(["series", "checkpoint"], observed=True)["tokens"].nunique()
    if (places > 1).any():
        series, checkpoint = places.index[places > 1][0]
        raise UserError(
            f"{source}: checkpoint {checkpoint!r} of series {series!r} has several values of 'tokens'; one is right"
        )
    domains = table.groupby("task", observed=True)["domain"].nunique()
    if (domains > 1).any():
        raise UserError(
            f"{source}: task {domains.index[domains > 1][0]!r} is in several domains; column 'domain' must be one"
        )


def _ordered(table: pd.DataFrame) -> pd.DataFrame:
    """Series, domains, tasks and metrics in the order of their first appearance, checkpoints by tokens."""
    order = {
        name: {v: i for i, v in enumerate(dict.fromkeys(table[name]))}
        for name in ("series", "domain", "task", "metric")
    }
    ranked = table.assign(**{f"_{name}": table[name].map(ranks) for name, ranks in order.items()})
    ranked = ranked.sort_values(["_series", "_domain", "_task", "_metric", "tokens", "step"], kind="stable")
    return ranked[list(COLUMNS)].reset_index(drop=True)


def _row(bad: pd.Series) -> str:
    """Where a defect is, counted as in the file: the header is line 1."""
    return f"line {int(np.flatnonzero(bad.to_numpy())[0]) + 2}"


def _describe(row: pd.Series) -> str:
    return f"({row['series']}, {row['checkpoint']}, {row['task']}, {row['metric']})"
