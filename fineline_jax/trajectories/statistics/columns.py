"""A statistic as a value: what it computes, what its columns mean, how it is drawn."""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
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
    interval: tuple[str, str] | None = None
    """Columns with the ends of its 95 % interval."""

    @classmethod
    def texts(cls, **meanings: str) -> "tuple[Column, ...]":
        """Columns without a unit, name="meaning", such as those that name a row."""
        return tuple(cls(name, "", meaning) for name, meaning in meanings.items())

    @classmethod
    def ends(cls, unit: str, empty: str = "", of: str = "", *, prefix: str = "") -> "tuple[Column, ...]":
        """The columns PREFIXlow and PREFIXhigh of a 95 % interval; of: what it holds, such as "over tasks"."""
        held = f" ({of})" if of else ""
        which = (("low", "lower"), ("high", "upper"))
        return tuple(cls(prefix + name, unit, f"{end} end of the 95 % interval{held}", empty) for name, end in which)

    @classmethod
    def estimate(
        cls, name: str, unit: str, meaning: str, empty: str = "", of: str = "", *, prefix: str = ""
    ) -> "tuple[Column, ...]":
        """A column and the `ends` of its interval, which are empty where it is."""
        interval = f"{prefix}low", f"{prefix}high"
        return cls(name, unit, meaning, empty, interval), *cls.ends(unit, empty, of, prefix=prefix)

    def text(self, value: object) -> str:
        """The value for people; "–" where there is none."""
        if value is None or value != value:
            return "–"
        if not self.unit or isinstance(value, str):
            return str(value)
        number = float(value)  # pyright: ignore[reportArgumentType]
        if self.unit == "tokens":
            return format_tokens(number)
        whole = self.unit == "1" and abs(number) < 1e15 and number == int(number)
        return format(number, ".0f" if whole else ".3g")


@dataclass(frozen=True)
class Chart:
    """How a frame is drawn: a point per row at column `value`, with its interval."""

    value: str
    panel: str = ""
    """Key column of which one value at a time is shown."""
    reference: float | None = None
    """Where nothing would lie: 0 of a difference."""
    over: str = ""
    """Column of tokens along which rows are curves, one per value of the first key, in a plot per value of `panel`."""
    ratio: str = ""
    """Column drawn beside those curves, 1 where nothing would lie."""


@dataclass(frozen=True)
class Statistic:
    """`compute(table, …)` returns a frame of exactly these columns."""

    name: str
    title: str
    compute: Callable[..., pd.DataFrame]
    columns: tuple[Column, ...]
    source: str
    """Paper or file of the formula."""
    definition: str = ""
    """One or two sentences: what is computed."""
    caveat: str = ""
    """What a reader may take it for and should not."""
    chart: Chart | None = None
    count: str = ""
    """Column of the number n that a value rests on."""

    @property
    def keys(self) -> list[str]:
        """The columns that name a row: those without a unit before the first with one."""
        keys = itertools.takewhile(lambda one: not one.unit and one.name not in ("verdict", "reason"), self.columns)
        return [column.name for column in keys]

    @property
    def ends(self) -> set[str]:
        """The columns that are ends of intervals of others."""
        return {name for column in self.columns for name in column.interval or ()}

    def frame(self, rows: Iterable[dict]) -> pd.DataFrame:
        """The rows in the order of the columns, also where there are none; a row with another key is our mistake.

        Columns of text are empty where a row does not have them, columns of numbers NaN.
        """
        made, known = list(rows), [column.name for column in self.columns]
        for row in made:
            assert row.keys() <= set(known), sorted(row.keys() - set(known))
        texts = {column.name: "" for column in self.columns if not column.unit}
        return pd.DataFrame([texts | row for row in made], columns=known)


def groups(table: pd.DataFrame, *by: str) -> Iterator[tuple[dict, pd.DataFrame]]:
    """({column: value}, rows) of all values that the columns have together, in the order of first appearance."""
    for key, part in table.groupby(list(by), sort=False, observed=True):
        yield dict(zip(by, key, strict=True)), part


def wide(table: pd.DataFrame, by: str) -> pd.DataFrame:
    """Curves side by side: tokens x `by` (tasks of one series and metric, or series of one task and metric).

    Only tokens at which all were scored, ascending. Of several checkpoints at one token count the last one counts.
    """
    tokens, row = np.unique(table["tokens"].to_numpy(), return_inverse=True)
    codes, names = pd.factorize(table[by], sort=True)
    values = np.full((len(tokens), len(names)), np.nan)
    values[row, codes] = table["value"].to_numpy(float)
    index = pd.Index(tokens, name="tokens")
    return pd.DataFrame(values, index, pd.Index(names, name=by)).dropna()


def shots_of(series: str) -> str:
    """ "0" of "m (0-shot)", "" where the name says nothing: series that differ in it are not compared."""
    found = re.search(r"\((\d+)-shot\)", series)
    return found[1] if found else ""


def size_of(series: str) -> float:
    """Parameters that a name states (m-160m, m-1.4B-x); NaN where it states none or several."""
    found = {
        float(number) * {"m": 1e6, "b": 1e9}[unit]
        for number, unit in re.findall(r"(?<![\d.])(\d+(?:\.\d+)?)([mb])(?![a-z])", series.lower())
    }
    return found.pop() if len(found) == 1 else float("nan")


def parameters_of(table: pd.DataFrame) -> dict[str, float]:
    """Parameters by series: as stated, else by its name, else NaN."""
    return {str(name): size_of(str(name)) for name in table["series"].unique()} | _stated(table, "parameters")


def flops_per_token(table: pd.DataFrame) -> dict[str, float]:
    """Training FLOPs per token by series: as stated, else 6 x its parameters, stated or by its name, else NaN."""
    return {name: 6 * size for name, size in parameters_of(table).items()} | _stated(table, "flops_per_token")


def _stated(table: pd.DataFrame, column: str) -> dict[str, float]:
    known = table.groupby("series", observed=True)[column].first().dropna() if column in table else pd.Series()
    return {str(name): float(value) for name, value in known.items()}


def format_tokens(tokens: float) -> str:
    """Tokens for people: 0, 950, 1.2 M, 3.5 B, 1.04 T."""
    value, unit = float(tokens), 0
    while abs(value) >= 999.5 and unit < 4:
        value, unit = value / 1000, unit + 1
    digits = 2 if abs(value) < 10 else 3
    return f"{value:.{digits}g} {' KMBT'[unit]}".rstrip() if value else "0"
