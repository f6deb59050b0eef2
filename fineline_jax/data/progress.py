"""Progress of long work on standard error: a bar with rate and time left, or plain lines in a log."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Literal

import rich.console
import rich.progress

SECONDS_BETWEEN_LINES = 30.0


@contextlib.contextmanager
def bar(name: str, total: int, unit: Literal["bytes", "chunks", "files"]) -> Iterator[Callable[[int], None]]:
    """Context in which the value, a function, is called with the amount of work done since its last call."""
    console = rich.console.Console(stderr=True)
    if not console.is_terminal:
        yield _plain(console, name, total, unit)
        return
    amount = (
        (rich.progress.DownloadColumn(), rich.progress.TransferSpeedColumn())
        if unit == "bytes"
        else (rich.progress.MofNCompleteColumn(), rich.progress.TextColumn(unit))
    )
    columns = (
        rich.progress.TextColumn(name),
        rich.progress.BarColumn(),
        *amount,
        rich.progress.TimeRemainingColumn(),
    )
    with rich.progress.Progress(*columns, console=console) as display:
        task = display.add_task(name, total=total)
        yield lambda done: display.advance(task, done)


def _plain(console: rich.console.Console, name: str, total: int, unit: str) -> Callable[[int], None]:
    start = last = time.monotonic()
    done = 0

    def advance(amount: int) -> None:
        nonlocal done, last
        done += amount
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES:
            last = now
            left = (total - done) * (now - start) / max(done, 1)
            console.print(f"{name}: {done:,} of {total:,} {unit}, {left:,.0f} s left", highlight=False)

    return advance
