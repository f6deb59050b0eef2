"""The tidy table of scores: its columns, what they mean, and which of them name a row."""

from typing import Literal, NamedTuple


class Column(NamedTuple):
    """One column."""

    kind: Literal["text", "number"]
    meaning: str


TABLE: dict[str, Column] = {
    "series": Column("text", "the run or released model"),
    "checkpoint": Column("text", "its name within the series"),
    "step": Column("number", "optimizer steps; empty where unknown"),
    "tokens": Column("number", "training tokens"),
    "domain": Column("text", "the ability that the task counts towards"),
    "task": Column("text", "task, or group of tasks"),
    "metric": Column("text", "name of the metric"),
    "value": Column("number", "its value"),
    "stderr": Column("number", "its standard error; empty where there is none"),
    "n": Column("number", "documents"),
    "chance": Column("number", "value that guessing gives; empty where it has no meaning or is not known"),
}

COLUMNS = tuple(TABLE)
KEY = ["series", "checkpoint", "task", "metric"]
"""One row for each."""
TEXT = tuple(name for name, column in TABLE.items() if column.kind == "text")
NUMBERS = tuple(name for name, column in TABLE.items() if column.kind == "number")
