"""Progress of long work on standard error: a bar with rate and time left on a terminal, plain lines in a log."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import rich.console
import rich.progress
import rich.text

SECONDS_BETWEEN_LINES = 15.0

Advance = Callable[..., None]
"""`advance(amount, note="")`: so much was done since the last call; the note replaces the one before."""


class Stopwatch:
    """The seconds between `start` and `stop`, summed; it begins stopped."""

    def __init__(self) -> None:
        self._before, self._since = 0.0, None

    def __call__(self) -> float:
        return self._before + (0.0 if self._since is None else time.monotonic() - self._since)

    def start(self) -> None:
        self._before, self._since = self(), time.monotonic()

    def stop(self) -> None:
        self._before, self._since = self(), None


@contextlib.contextmanager
def bar(name: str, total: int, unit: str, done: int = 0, clock: Callable[[], float] | None = None) -> Iterator[Advance]:
    """Context whose value is an `Advance`.

    done: what an earlier run had done, not counted in the rate. clock: seconds of work, of which rate and time left are
    made; what is done while it stands still does not count in them. Default: all the time that passes.
    """
    console, clock = rich.console.Console(stderr=True), clock or time.monotonic
    if not console.is_terminal or threading.current_thread() is not threading.main_thread():  # it has one display
        yield _plain(console, name, total, unit, done, clock)
        return
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        _Amount(unit),
        rich.progress.TimeRemainingColumn(elapsed_when_finished=True),
        rich.progress.TextColumn("{task.fields[note]}"),
    )
    with rich.progress.Progress(*columns, console=console, speed_estimate_period=60.0, get_time=clock) as display:
        task = display.add_task(name, total=total, completed=done, note="")

        def advance(amount: int, note: str = "") -> None:
            if note:
                display.update(task, note=note)
            display.advance(task, amount)

        yield advance


class _Amount(rich.progress.ProgressColumn):
    def __init__(self, unit: str):
        super().__init__()
        self.unit = unit

    def render(self, task: rich.progress.Task) -> rich.text.Text:
        rate = f", {short(task.speed)}/s" if task.speed else ""
        return rich.text.Text(f"{short(task.completed)} of {short(task.total or 0)} {self.unit}{rate}")


def _plain(
    console: rich.console.Console, name: str, total: int, unit: str, done: int, clock: Callable[[], float]
) -> Advance:
    last, worked, last_done, note = time.monotonic(), clock(), done, ""
    last_worked = worked

    def advance(amount: int, new_note: str = "") -> None:
        nonlocal done, last, last_done, worked, last_worked, note
        done += amount
        note = new_note or note
        now, worked_before, worked = time.monotonic(), worked, clock()
        last_done += amount if worked == worked_before else 0
        if now - last >= SECONDS_BETWEEN_LINES or done >= total > done - amount:
            rate = (done - last_done) / max(worked - last_worked, 1e-9)  # since the last line
            left = f", {duration((total - done) / rate)} left" if rate and done < total else ""
            last, last_done, last_worked = now, done, worked
            text = f"{name}: {short(done)} of {short(total)} {unit}, {short(rate)}/s{left}"
            console.print(f"{text}, {note}" if note else text, highlight=False, soft_wrap=True)

    return advance


@contextlib.contextmanager
def periodically(seconds: float, act: Callable[[], None], name: str) -> Iterator[None]:
    """Inside, a thread `name` calls `act` every so many seconds; the last call has ended when the context has."""
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(seconds):
            act()

    thread = threading.Thread(target=repeat, daemon=True, name=name)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def short(number: float) -> str:
    """1234567 -> '1.23M'."""
    number = float(f"{number:.3g}")  # rounded first: 999,999 is 1M and not 1e+03k
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{suffix}"
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    """3661 -> '1h01m'."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02}h"
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"
