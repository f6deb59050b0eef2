"""CSV files that a spreadsheet shows as they are: a text that it would take for a formula is written as text."""

import re
from pathlib import Path

import pandas as pd

from fineline_jax.atomic_files import atomic_file

_FORMULA = re.compile(r"[=+\-@\t]")
_QUOTED = re.compile(r"'[=+\-@\t]")


def write_csv(frame: pd.DataFrame, path: Path) -> None:
    """Write `frame` without its index; numbers stay numbers.

    A text that begins with = + - @ or a tab has an apostrophe before it (OWASP, "CSV Injection"). A carriage return,
    which readers take for the end of a line, is written as a space.
    """
    texts = {name: frame[name].map(_quoted) for name in frame if not pd.api.types.is_numeric_dtype(frame[name])}
    frame.assign(**{str(name): column for name, column in texts.items()}).to_csv(path, index=False)


def write_frame(frame: pd.DataFrame, path: Path, *, in_parquet: pd.DataFrame | None = None) -> None:
    """Write `frame` to PATH.csv and PATH.parquet, each whole or not at all; one process at a time.

    in_parquet: the same with columns that Parquet can hold, where `frame` has others.
    """
    with atomic_file(path.with_name(f"{path.name}.csv"), exclusive=True) as partial:
        write_csv(frame, partial)
    with atomic_file(path.with_name(f"{path.name}.parquet"), exclusive=True) as partial:
        (frame if in_parquet is None else in_parquet).to_parquet(partial, index=False)


def as_written(frame: pd.DataFrame) -> pd.DataFrame:
    """`frame`, read from a file of `write_csv`, without those apostrophes."""
    texts = {name: frame[name].map(_unquoted) for name in frame if not pd.api.types.is_numeric_dtype(frame[name])}
    return frame.assign(**{str(name): column for name, column in texts.items()})


def _quoted(cell: object) -> object:
    text = cell.replace("\r", " ") if isinstance(cell, str) else ""
    return f"'{text}" if _FORMULA.match(text) else text or cell


def _unquoted(cell: object) -> object:
    return cell[1:] if isinstance(cell, str) and _QUOTED.match(cell) else cell
