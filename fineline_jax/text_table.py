"""A table, a count and an amount of tokens as plain text."""

import re
from collections.abc import Iterable, Sequence


def text_table(rows: Sequence[Sequence[str]], right: Iterable[int] = ()) -> str:
    """Columns as wide as their widest cell, two spaces between them; those in `right` are set to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    to_right = set(right)
    aligned = [
        "  ".join(cell.rjust(width) if i in to_right else cell.ljust(width) for i, (cell, width) in cells).rstrip()
        for cells in ([*enumerate(zip(row, widths))] for row in rows)
    ]
    return "\n".join(aligned)


_AMOUNT = re.compile(r"\s*([\d.]+(?:e[+-]?\d+)?)\s*([KMBT]?)(?:\s*tok(?:en)?s?)?\s*", re.IGNORECASE)


def amount(text: str) -> float:
    """`1B`, `2.5M tokens`, `1e9` as a number; ValueError for anything else."""
    found = _AMOUNT.fullmatch(text)
    if found is None:
        raise ValueError(text)
    return float(found[1]) * {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}[found[2].upper()]


def counted(number: int, noun: str) -> str:
    """`1 task`, `9,501 tasks`"""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def listed(names: Iterable[object], most: int = 20) -> str:
    """a, b, c; of more than `most` the first, and how many more there are."""
    every = list(map(str, names))
    more = f" and {len(every) - most} more" if len(every) > most else ""
    return ", ".join(every[:most]) + more
