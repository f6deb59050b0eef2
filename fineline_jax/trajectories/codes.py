"""Columns of text as numbers: what millions of rows are grouped and ordered by."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd


def codes_of(table: pd.DataFrame, columns: Sequence[str]) -> np.ndarray:
    """int64 [rows]: equal where the rows are equal in all of `columns`; in the order of first appearance by column."""
    combined = np.zeros(len(table), np.int64)
    for name in columns:
        codes, entries = pd.factorize(table[name], use_na_sentinel=False)
        combined = combined * len(entries) + codes
    return combined


def each(column: pd.Series, value: Callable[[Any], Any]) -> pd.Series:
    """`column.map(value)`, computed once per distinct entry."""
    codes, entries = pd.factorize(column, use_na_sentinel=False)
    found = pd.Series([value(entry) for entry in entries], dtype=None if len(entries) else "float64")
    return found.take(codes).set_axis(column.index)
