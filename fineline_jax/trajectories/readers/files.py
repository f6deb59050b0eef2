"""The one way from a path to tables of scores: a table, a folder of them, result files of evaluation tools."""

import logging
from pathlib import Path

import pandas as pd

from fineline_jax.errors import UserError, reading
from fineline_jax.facts.score_table import KEY
from fineline_jax.trajectories.readers.json_files import files_below, json_files, read_json
from fineline_jax.trajectories.readers.table_files import SUFFIXES, read_table_file

log = logging.getLogger(__name__)
DRAWS_FILE = "resampled.parquet"
"""Beside the tidy.csv or tidy.parquet of a report: the columns KEY of its scores, and the arrays `resampled`."""

_NO_SCORES = {
    "recipe.json": "the folder of a run", "*/recipe.json": "a folder of runs", "*/complete.json": "a run's checkpoints",
    "contexts.parquet": "a request pack",
}  # fmt: skip
"""What is given instead of scores, by a file inside."""


def read_file(path: Path, tokens_per_step: float | None = None) -> list[tuple[Path, pd.DataFrame]]:
    """(file, its table) of every table at or below `path`, or (path, the table of all JSON results there).

    A folder is the report that holds tidy.parquet or tidy.csv, else a tree of JSON results, else its tables.
    Raises UserError naming the file.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; name a CSV, a Parquet file or a folder of lm-eval results")
    read = _tables(path, tokens_per_step)
    for columns in dict.fromkeys(table.attrs.pop("left_out", "") for _, table in read):
        if columns:
            log.warning("%s: columns left out, no scores: %s", path, columns)
    return read


def _tables(path: Path, tokens_per_step: float | None) -> list[tuple[Path, pd.DataFrame]]:
    if not path.is_dir():
        return [(path, _read(path, tokens_per_step))]
    for name in ("tidy.parquet", "tidy.csv"):
        if (path / name).exists():
            return [(path, _read(path / name, tokens_per_step))]
    tables = [
        file
        for file in files_below(path, "*")
        if file.name.lower().endswith(SUFFIXES) and not file.name.startswith("samples_")
    ]
    results = json_files(path)
    named = any(file.name.startswith("results_") or file.name == "metrics.json" for file in results)
    if not named and (what := next((what for inside, what in _NO_SCORES.items() if any(path.glob(inside))), "")):
        raise UserError(f"{path}: is {what}, no scores; make them with `fineline score` and give the folder it writes")
    if results and (named or not tables):
        return [(path, read_json(path, tokens_per_step=tokens_per_step))]
    if not tables:
        raise UserError(f"{path}: no scores of `fineline score`, no table and no result file (results_*.json) inside")
    return [(file, _read(file, tokens_per_step)) for file in tables]


def _read(file: Path, tokens_per_step: float | None) -> pd.DataFrame:
    name, draws = file.name.lower(), file.with_name(DRAWS_FILE)
    if name.endswith(SUFFIXES):
        frame = read_table_file(file, tokens_per_step=tokens_per_step)
        if name not in ("tidy.csv", "tidy.parquet") or not draws.is_file():
            return frame
        with reading(draws, "write the report again or remove it", "damaged"):
            return frame.merge(pd.read_parquet(draws), on=KEY, how="left")
    if name.endswith(".json"):
        return read_json(file, tokens_per_step=tokens_per_step)
    raise UserError(f"{file}: not a table this command reads; use {', '.join(SUFFIXES)} or lm-eval's .json")
