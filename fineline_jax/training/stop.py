"""Stopping a run from outside: SIGTERM (preemption) and the first Ctrl-C end it at the next step, saved; a terminal
that is lost does not end it."""

import contextlib
import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

_in_main_thread: list[Callable[[int], str | None]] = []
"""What the contexts of `stop_requests` there give; those of other threads give the innermost one of it."""


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[int], str | None]]:
    """Context whose value is asked after every step: `requested(step) -> name of the signal, or None`.

    One process: signal handlers, put back at the end; a second Ctrl-C interrupts at once. Several processes: JAX's
    preemption service, which makes all of them stop at the same step whichever got the signal; Ctrl-C is handed on to
    it as a SIGTERM. SIGHUP, and output that nobody reads any more, are passed over meanwhile.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: _in_main_thread[-1](step)  # which alone is told of signals
        return
    received: list[str] = []
    several = jax.process_count() > 1

    def note(number: int, _: object) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(signal.Signals(number).name)
        if several:
            os.kill(os.getpid(), signal.SIGTERM)

    def requested(step: int) -> str | None:
        if several:
            return "SIGTERM" if multihost_utils.reached_preemption_sync_point(step) else None
        return received[0] if received else None

    handlers = {signal.SIGINT: note, signal.SIGHUP: signal.SIG_IGN}
    handlers |= {} if several else {signal.SIGTERM: note}  # else JAX's service has it
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(_Unbroken, streams)
    _in_main_thread.append(requested)
    try:
        yield requested
    finally:
        _in_main_thread.pop()
        sys.stdout, sys.stderr = streams
        for number, handler in before.items():
            signal.signal(number, handler)


class _Unbroken:
    """A stream whose writes do nothing once its reader or its terminal is gone."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, act: Callable[[], object]) -> None:
        try:
            act()
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
