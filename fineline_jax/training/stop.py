"""Stopping a run from outside: SIGTERM (preemption) and the first Ctrl-C end it at the next step, saved."""

import contextlib
import signal
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[int], str | None]]:
    """Context whose value is asked after every step: `requested(step) -> name of the signal, or None`.

    One process: signal handlers, put back at the end; a second Ctrl-C interrupts at once. Several processes: JAX's
    preemption service, which makes all of them stop at the same step whichever got the signal.
    """
    if jax.process_count() > 1:
        yield lambda step: "SIGTERM" if multihost_utils.reached_preemption_sync_point(step) else None
        return
    received: list[str] = []

    def note(number: int, _: object) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(signal.Signals(number).name)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda step: received[0] if received else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
