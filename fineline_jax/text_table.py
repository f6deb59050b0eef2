"""A table and a count as plain text."""

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


def counted(number: int, noun: str) -> str:
    """`1 task`, `9,501 tasks`"""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
