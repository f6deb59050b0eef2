"""A statistic as a value: what it computes, and what its columns mean."""

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd


@dataclass(frozen=True)
class Column:
    """One column of a statistic's frame."""

    name: str
    unit: str
    """"" for names and verdicts, "1" for shares and pure numbers, else tokens, nats, points (of 100) …"""
    meaning: str
    empty: str = ""
    """When there is no value."""


@dataclass(frozen=True)
class Statistic:
    """`compute(table, …)` returns a frame of exactly these columns."""

    name: str
    title: str
    compute: Callable[..., pd.DataFrame]
    columns: tuple[Column, ...]
    source: str
    """Paper or file of the formula."""

    def frame(self, rows: list[dict]) -> pd.DataFrame:
        """The rows in the order of the columns, also where there are none; a row with another key is our mistake."""
        names = [column.name for column in self.columns]
        for row in rows:
            assert row.keys() <= set(names), sorted(row.keys() - set(names))
        return pd.DataFrame(rows, columns=names)


def wide(table: pd.DataFrame, by: str) -> pd.DataFrame:
    """Curves side by side: tokens x `by` (tasks of one series and metric, or series of one task and metric).

    Only tokens at which all were scored, ascending. Of several checkpoints at one token count the last one counts.
    """
    last = table.drop_duplicates([by, "tokens"], keep="last")
    return last.pivot(index="tokens", columns=by, values="value").dropna().sort_index()
