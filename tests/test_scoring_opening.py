"""Several processes open the next checkpoint ahead, and do what process 0 decides.

The processes are played one at a time: what process 0 says is given, and so is whether the others could read.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import pytest
from series_examples import one_device

from fineline_jax.checkpoints import series
from fineline_jax.checkpoints.series import Checkpoint
from fineline_jax.errors import UserError
from fineline_jax.scoring import opening
from fineline_jax.scoring.opening import Failed, Opened, open_each


@pytest.fixture
def events(monkeypatch) -> list[str]:
    """What is read, in order; every checkpoint holds one array."""
    found: list[str] = []

    def load(checkpoint: Checkpoint, *_: Any) -> tuple[Any, dict[str, jax.Array]]:
        found.append(f"read {checkpoint.name}")
        if checkpoint.name == "broken":
            raise UserError("cut short")
        return "config", {"embed": jnp.zeros(3)}

    monkeypatch.setattr(series, "load", load)
    monkeypatch.setattr(series, "fetch", lambda checkpoint: found.append(f"fetch {checkpoint.name}"))
    monkeypatch.setattr(series, "version", lambda checkpoint: "v")
    monkeypatch.setattr(series, "identity", lambda checkpoint: f"hash of {checkpoint.name}")
    monkeypatch.setattr(series, "discard", lambda checkpoint: None)
    return found


def checkpoints(*names: str, kind: Literal["orbax", "hf"] = "hf") -> list[Checkpoint]:
    return [Checkpoint("s", name, None, None, Path(name), kind) for name in names]


def as_process(monkeypatch, index: int, said: Callable[[Any], Any] = lambda value: value, others: bool = True) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: index)
    monkeypatch.setattr(opening, "from_first", said)
    monkeypatch.setattr(opening, "all_true", lambda mine: mine and others)


def opened(names: list[Checkpoint], wanted: Callable[..., bool] = lambda *_: True) -> Any:
    return open_each(names, one_device(), "float32", wanted, lambda checkpoint: None)


def until(events: list[str], event: str) -> bool:
    import time

    end = time.monotonic() + 10
    while event not in events and time.monotonic() < end:
        time.sleep(0.01)
    return event in events


@pytest.mark.parametrize("index", [0, 1])
def test_the_next_one_is_read_while_this_one_is_scored(events, monkeypatch, index):
    says = {"weights": "w", "version": "v", "wanted": True}
    as_process(monkeypatch, index, lambda value: value if index == 0 else says)
    each = opened(checkpoints("a", "b"))
    first = next(each)
    assert isinstance(first, Opened) and first.weights == ("hash of a" if index == 0 else "w")
    assert until(events, "read b"), "before the second one is asked for"
    assert first.model is not None and not first.model[1]["embed"].is_deleted()
    second = next(each)
    assert isinstance(second, Opened) and first.model[1]["embed"].is_deleted()
    assert events == ["read a", "read b"], "each once"


def test_what_process_0_does_not_want_is_freed(events, monkeypatch):
    as_process(monkeypatch, 1, lambda value: {"weights": "w", "version": "v", "wanted": False})
    freed: list[dict] = []
    monkeypatch.setattr(opening, "_free", freed.append)
    [found] = list(opened(checkpoints("a")))
    assert isinstance(found, Opened) and found.model is None and found.weights == "w"
    assert events == ["read a"] and len(freed) == 1


@pytest.mark.parametrize("index", [0, 1])
def test_one_process_that_cannot_read_makes_all_pass_over(events, monkeypatch, index):
    said = (lambda value: value) if index == 0 else (lambda value: {"failed": "cut short"})
    as_process(monkeypatch, index, said)
    found = list(opened(checkpoints("broken", "b")))
    assert isinstance(found[0], Failed) and found[0].reason == "cut short"
    as_process(monkeypatch, 0, others=False)
    [found] = list(opened(checkpoints("a")))
    assert isinstance(found, Failed) and "another process" in found.reason


def test_a_checkpoint_of_a_run_is_read_when_all_processes_are_there(events, monkeypatch):
    """Orbax meets the other processes; in a thread it could meet them in another order than they do."""
    as_process(monkeypatch, 0)
    each = opened(checkpoints("a", "b", kind="orbax"))
    next(each)
    assert until(events, "fetch b")
    assert "read b" not in events
    next(each)
    assert events == ["fetch a", "read a", "fetch b", "read b"]


def test_where_two_do_not_fit_the_second_is_read_when_the_first_is_freed(events, monkeypatch):
    monkeypatch.setattr(opening, "memory_of_device", lambda: 12.0)  # one array has 12 bytes
    each = opened(checkpoints("a", "b"))
    first = next(each)
    assert until(events, "fetch b") and "read b" not in events
    assert isinstance(next(each), Opened) and isinstance(first, Opened) and first.model is not None
    assert first.model[1]["embed"].is_deleted() and events == ["read a", "fetch b", "read b"]
