"""Files that hold a table, CSV, TSV, JSON lines or Parquet, with headings of many tools, as tables of scores.

A table may be tidy (a row per score) or wide: a row per checkpoint and a column per task (W&B, OLMo's ladder), or a row
per task and a column per checkpoint (OpenCompass).
"""

import json
import logging
from pathlib import Path

import numpy as np
import pandas as pd

from fineline_jax.errors import UserError
from fineline_jax.text_table import amount
from fineline_jax.trajectories.csv_cells import as_written
from fineline_jax.trajectories.readers.wide import of_checkpoint_columns, of_task_columns

log = logging.getLogger(__name__)
SUFFIXES = (".csv", ".csv.gz", ".tsv", ".tsv.gz", ".jsonl", ".parquet")
_HEADINGS = {
    "model": "series", "run": "series", "run_name": "series", "_step": "step", "global_step": "step", "steps": "step",
    "iteration": "step", "revision": "checkpoint", "dataset": "task", "benchmark": "task", "score": "value",
    "acc_stderr": "stderr", "num_fewshot": "shots", "fewshot": "shots", "n_shot": "shots", "n-shot": "shots",
    "throughput/total_tokens": "tokens", "total_tokens": "tokens", "num_tokens": "tokens",
    "tokens_k": "tokens", "tokens_m": "tokens", "tokens_b": "tokens", "tokens_t": "tokens",
}  # fmt: skip
"""Headings of other tools in small letters; a column that has its own name already is not replaced."""
_OWN = {"series", "checkpoint", "step", "tokens", "domain", "task", "metric", "value", "stderr", "n", "chance", "shots"}
_TEXT = {"checkpoint", "task", "series", "model", "run", "run_name", "revision", "dataset", "benchmark"}


def read_table_file(path: Path, *, tokens_per_step: float | None = None) -> pd.DataFrame:
    """The table of one file with this package's headings; not checked (`table.normalise` does).

    Raises UserError naming the file if it cannot be read, or if a wide table does not say what its columns are.
    """
    frame = with_own_headings(_read(path), source=str(path))
    stem = path.name.removesuffix(".gz").rsplit(".", 1)[0]
    if "value" not in frame and "task" in frame and not {"series", "tokens"} <= set(frame):
        frame = of_checkpoint_columns(frame, str(path), tokens_per_step)
    if "tokens" in frame:
        frame = frame.assign(tokens=_amounts(frame["tokens"], str(path)))
    elif "step" in frame and "batch_size_in_tokens" in frame:
        frame = frame.copy().assign(tokens=frame["step"] * frame["batch_size_in_tokens"])
    if tokens_per_step is not None and "step" in frame:
        of_steps = pd.to_numeric(frame["step"], errors="coerce") * tokens_per_step
        frame = frame.assign(tokens=frame["tokens"].fillna(of_steps) if "tokens" in frame else of_steps)
    if "value" not in frame and "task" not in frame and {"tokens", "step"} & set(frame):
        frame = of_task_columns(frame, str(path), stem)
    if "series" not in frame and {"tokens", "task", "metric", "value"} <= set(frame):
        frame = frame.assign(series=stem)
        log.warning("%s: has no column 'series'; its series is called %s", path, stem)
    if "tokens" not in frame and {"series", "step", "task", "metric", "value"} <= set(frame):
        raise UserError(f"{path}: has steps but no tokens; give the tokens of a step with --tokens-per-step")
    return frame


def with_own_headings(frame: pd.DataFrame, *, source: str) -> pd.DataFrame:
    """The table with headings of other tools, in any case, renamed; `tokens_B` is multiplied out."""
    small = {name: str(name).strip().lower() for name in frame.columns}
    new = {name: low for name, low in small.items() if low in _OWN}
    for name, low in small.items():
        if (own := _HEADINGS.get(low)) and own not in new.values():
            new[name] = own
            if own == "tokens" and low.startswith("tokens_"):
                frame = frame.assign(**{str(name): _amounts(frame[name], source) * amount(f"1{low[-1]}")})
    return frame.rename(columns=new)


def _read(path: Path) -> pd.DataFrame:
    name = path.name.lower().removesuffix(".gz")
    try:
        if name.endswith((".csv", ".tsv")):
            heading = pd.read_csv(path, sep="\0", header=None, nrows=1, dtype="str", engine="c", quoting=3)
            line = str(heading.iloc[0, 0])
            separator = max(",;\t", key=line.count)
            names = pd.read_csv(path, sep=separator, nrows=0).columns
            dtype = {n: "str" for n in names if n.strip().lower() in _TEXT}
            return as_written(pd.read_csv(path, sep=separator, dtype=dtype, decimal="," if separator == ";" else "."))
        if name.endswith(".jsonl"):
            with path.open(encoding="utf-8") as lines:
                return pd.DataFrame([json.loads(line) for line in lines if line.strip()])
        return pd.read_parquet(path)
    except (ValueError, OSError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: cannot be read as a table ({reason}); write it again") from error


def _amounts(column: pd.Series, source: str) -> pd.Series:
    """Numbers, also as "1B" or "2.5M tokens"."""
    if pd.api.types.is_numeric_dtype(column):
        return column.astype("float64")
    amounts = dict[object, float]()
    for text in column.dropna().unique():
        try:
            amounts[text] = amount(str(text))
        except ValueError:
            line = int(np.flatnonzero((column == text).to_numpy())[0]) + 2
            raise UserError(f"{source}: column 'tokens' holds {text!r} in line {line}; a number is needed") from None
    return column.map(amounts).astype("float64")
