"""Counts of what was tried, and of how it ended, as one printed line."""

import contextlib
from collections.abc import Iterator

import pytest


class Tally:
    def __init__(self) -> None:
        self.tried = self.right = 0

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        """Inside, something is tried; it is right unless it raises."""
        self.tried += 1
        yield
        self.right += 1


@contextlib.contextmanager
def tallied(what: str, request: pytest.FixtureRequest) -> Iterator[Tally]:
    """For a fixture: prints `what: tried T, right R, wrong W` in the end."""
    tally = Tally()
    yield tally
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled() if capture else contextlib.nullcontext():
        print(f"\n{what}: tried {tally.tried}, right {tally.right}, wrong {tally.tried - tally.right}", flush=True)
