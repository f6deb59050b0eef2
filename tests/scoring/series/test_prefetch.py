"""Several processes open the next checkpoint ahead, and do what process 0 decides.

The processes are played one at a time: what process 0 says is given, and so is whether the others could read.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from series_examples import one_device

from fineline_jax import multihost
from fineline_jax.checkpoints import load as checkpoint_load
from fineline_jax.checkpoints.remote.download import STOP, DiskFullError, FetchError
from fineline_jax.checkpoints.series import Checkpoint
from fineline_jax.errors import UserError
from fineline_jax.mesh import make_mesh
from fineline_jax.recipe import MeshShape
from fineline_jax.scoring.series import prefetch
from fineline_jax.scoring.series.prefetch import Failed, Opened, open_each
from fineline_jax.tokenizers.open import UnreadableTokenizer


@pytest.fixture
def events(monkeypatch) -> list[str]:
    """What is read, in order; every checkpoint holds one array."""
    found: list[str] = []

    def load(checkpoint: Checkpoint, *_: Any) -> tuple[Any, dict[str, jax.Array]]:
        found.append(f"read {checkpoint.name}")
        if checkpoint.name == "broken":
            raise UserError("cut short")
        return "config", {"embed": jnp.zeros(3)}

    monkeypatch.setattr(checkpoint_load, "load", load)
    monkeypatch.setattr(checkpoint_load, "fetch", lambda checkpoint: found.append(f"fetch {checkpoint.name}"))
    monkeypatch.setattr(checkpoint_load, "stat_signature", lambda checkpoint: "v")
    monkeypatch.setattr(checkpoint_load, "weights_hash", lambda checkpoint: f"hash of {checkpoint.name}")
    monkeypatch.setattr(checkpoint_load, "discard", lambda checkpoint: None)
    return found


def checkpoints(*names: str, kind: Literal["orbax", "hf"] = "hf") -> list[Checkpoint]:
    return [Checkpoint("s", name, None, None, Path(name), kind) for name in names]


def one_after_another(names: list[Checkpoint]) -> Callable[[], Checkpoint | None]:
    return functools.partial(next, iter(names), None)


def as_process(monkeypatch, index: int, said: Callable[[Any], Any] = lambda value: value, others: bool = True) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: index)
    monkeypatch.setattr(prefetch, "broadcast_from_process_0", said)
    monkeypatch.setattr(prefetch, "all_true", lambda mine: mine and others)


def opened(names: list[Checkpoint], wanted: Callable[..., bool] = lambda *_: True) -> Any:
    return open_each(one_after_another(names), one_device(), "float32", wanted, lambda checkpoint: None)


def until(events: list[str], event: str) -> bool:
    import time

    end = time.monotonic() + 10
    while event not in events and time.monotonic() < end:
        time.sleep(0.01)
    return event in events


@pytest.mark.parametrize("index", [0, 1])
def test_the_next_one_is_read_while_this_one_is_scored(events, monkeypatch, index):
    says = {"weights_hash": "w", "stat_signature": "v", "wanted": True}
    as_process(monkeypatch, index, lambda value: value if index == 0 else says)
    each = opened(checkpoints("a", "b"))
    first = next(each)
    assert isinstance(first, Opened) and first.weights_hash == ("hash of a" if index == 0 else "w")
    assert until(events, "read b"), "before the second one is asked for"
    assert first.model is not None and not first.model[1]["embed"].is_deleted()
    second = next(each)
    assert isinstance(second, Opened) and first.model[1]["embed"].is_deleted()
    assert events == ["fetch a", "read a", "fetch b", "read b"], "each once"


def test_what_process_0_does_not_want_is_freed(events, monkeypatch):
    as_process(monkeypatch, 1, lambda value: {"weights_hash": "w", "stat_signature": "v", "wanted": False})
    freed: list[dict] = []
    monkeypatch.setattr(prefetch, "_free", freed.append)
    [found] = list(opened(checkpoints("a")))
    assert isinstance(found, Opened) and found.model is None and found.weights_hash == "w"
    assert events == ["fetch a", "read a"] and len(freed) == 1


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
    assert events == ["fetch a", "fetch a", "read a", "fetch b", "fetch b", "read b"], "what is here is not fetched"


def test_where_two_do_not_fit_the_second_is_read_when_the_first_is_freed(events, monkeypatch):
    monkeypatch.setattr(prefetch, "memory_of_device", lambda: 12.0)  # one array has 12 bytes
    each = opened(checkpoints("a", "b"))
    first = next(each)
    assert until(events, "fetch b") and "read b" not in events
    assert isinstance(next(each), Opened) and isinstance(first, Opened) and first.model is not None
    assert first.model[1]["embed"].is_deleted() and events == ["fetch a", "read a", "fetch b", "fetch b", "read b"]


def test_room_for_two_is_counted_for_both_and_on_one_device(monkeypatch):
    """Twelve bytes each, and two may take 0.6 of the memory."""
    params = {"a": jnp.zeros(2), "b": {"c": jnp.zeros(1)}}
    at = lambda limit: (
        monkeypatch.setattr(prefetch, "memory_of_device", lambda: limit),
        prefetch._room_for_two(params),
    )[1]
    assert at(40.0) and not at(39.9) and at(0.0), "where nothing is known there is room"
    assert prefetch._room_for_two(None)
    place = jax.NamedSharding(make_mesh(MeshShape(replica=1, fsdp=8)), jax.P("fsdp"))
    params = {"a": jax.device_put(jnp.zeros(24), place)}
    assert at(40.0) and not at(39.9)


class Disk:
    """A disk with what is fetched; what is called broken is found to be so when it is loaded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.here: set[str] = set()
        self.most = 0
        self.told: list[tuple] = []
        self.tried: list[str] = []
        for name in ("fetch", "load", "discard"):
            monkeypatch.setattr(checkpoint_load, name, getattr(self, name))
        monkeypatch.setattr(checkpoint_load, "stat_signature", lambda checkpoint: f"version of {checkpoint.name}")
        monkeypatch.setattr(checkpoint_load, "weights_hash", lambda checkpoint: f"hash of {checkpoint.name}")

    def fetch(self, checkpoint: Checkpoint) -> None:
        if not checkpoint.name.startswith("absent"):
            self.here.add(checkpoint.name)
            self.most = max(self.most, len(self.here))
        self.tried.append(checkpoint.name)
        if checkpoint.name.startswith("absent"):
            raise FetchError(f"{checkpoint.name} is not there")

    def load(self, checkpoint: Checkpoint, mesh: Any, dtype: Any) -> Any:
        assert checkpoint.name in self.here, "fetched before"
        self.told.append((checkpoint.name, mesh, dtype))
        if checkpoint.name.startswith("broken"):
            raise ValueError("first line\nsecond line")
        return "config", {"embed": jnp.zeros(3)}

    def discard(self, checkpoint: Checkpoint) -> None:
        self.here.discard(checkpoint.name)


@pytest.mark.parametrize("limit", [1e9, 12.0])
def test_at_most_two_are_on_the_disk_and_none_stays_though_some_cannot_be_read(monkeypatch, limit):
    monkeypatch.setattr(prefetch, "memory_of_device", lambda: limit)
    disk = Disk(monkeypatch)
    names = ["a", "broken1", "broken2", "b", "absent1", "c", "d", "broken3"]
    reasons = {}
    for found, following in zip(opened(checkpoints(*names)), [*names[1:], ""], strict=True):
        name = found.checkpoint.name
        assert not following or until(disk.tried, following), "while this one is scored"
        if isinstance(found, Failed):
            reasons[name] = found.reason
            assert name not in disk.here, "its place is needed for the next"
        else:
            assert (found.weights_hash, found.stat_signature) == (f"hash of {name}", f"version of {name}")
            assert name in disk.here
    assert reasons == {
        **dict.fromkeys(("broken1", "broken2", "broken3"), "ValueError: first line"), "absent1": "absent1 is not there"
    }  # fmt: skip
    assert disk.here == set() and disk.most == 2
    mesh = one_device()
    assert disk.told == [(name, mesh, "float32") for name in names if name != "absent1"], "each once, in order"


def test_what_is_not_wanted_is_not_loaded_and_the_wish_is_asked_with_its_identity(monkeypatch):
    disk, asked = Disk(monkeypatch), []

    def wanted(checkpoint: Checkpoint, identity: str) -> bool:
        asked.append((checkpoint.name, identity))
        return checkpoint.name != "b"

    found = [(one.checkpoint.name, one.model is None) for one in opened(checkpoints("a", "b", "c"), wanted)]
    assert found == [("a", False), ("b", True), ("c", False)]
    assert asked == [(name, f"hash of {name}") for name in "abc"] and [name for name, *_ in disk.told] == ["a", "c"]


@pytest.mark.parametrize("error", [FetchError, UnreadableTokenizer])
def test_a_tokenizer_that_is_not_to_be_had_passes_over_its_checkpoint(monkeypatch, error):
    Disk(monkeypatch)

    def check(checkpoint: Checkpoint) -> None:
        if checkpoint.name == "b":
            raise error("no tokenizer")

    found = list(
        open_each(one_after_another(checkpoints("a", "b", "c")), one_device(), "float32", lambda *_: True, check)
    )
    assert [isinstance(one, Failed) for one in found] == [False, True, False]
    assert isinstance(found[1], Failed) and found[1].reason == "no tokenizer"


def test_a_wrong_tokenizer_ends_it(monkeypatch):
    Disk(monkeypatch)

    def check(checkpoint: Checkpoint) -> None:
        if checkpoint.name == "b":
            raise UserError("another tokenizer")

    each = open_each(one_after_another(checkpoints("a", "b", "c")), one_device(), "float32", lambda *_: True, check)
    next(each)
    with pytest.raises(UserError, match="another tokenizer"):
        next(each)


@pytest.mark.parametrize("broken", ["stat_signature", "weights_hash"])
def test_a_checkpoint_that_cannot_be_hashed_is_passed_over(monkeypatch, broken):
    Disk(monkeypatch)

    def fail(checkpoint: Checkpoint) -> str:
        if checkpoint.name == "b":
            raise OSError()
        return "x"

    monkeypatch.setattr(checkpoint_load, broken, fail)
    found = list(opened(checkpoints("a", "b", "c")))
    assert [isinstance(one, Failed) for one in found] == [False, True, False]
    assert isinstance(found[1], Failed) and found[1].reason == "OSError"


@pytest.mark.parametrize("error", [TypeError, KeyError, AttributeError, AssertionError])
@pytest.mark.parametrize("where", ["stat_signature", "weights_hash", "load"])
def test_a_mistake_of_our_own_is_no_damaged_checkpoint(monkeypatch, error, where):
    """It comes through as it is, with the traceback of the place where it was made."""
    Disk(monkeypatch)

    def mistaken(*arguments: Any) -> Any:
        raise error("of ours")

    monkeypatch.setattr(checkpoint_load, where, mistaken)
    with pytest.raises(error, match="of ours") as raised:
        list(opened(checkpoints("a", "b")))
    assert raised.traceback[-1].name == "mistaken"


def test_what_does_not_reach_the_devices_is_passed_over(monkeypatch):
    """JAX tells of a copy that failed where it is waited for."""
    disk = Disk(monkeypatch)

    def arrive(params: Any) -> None:
        if disk.told[-1][0] == "b":
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")

    monkeypatch.setattr(jax, "block_until_ready", arrive)
    assert [isinstance(one, Failed) for one in opened(checkpoints("a", "b", "c"))] == [False, True, False]


@pytest.mark.parametrize("times", [1, 2])
def test_a_full_disk_is_tried_again_once_the_one_before_is_gone(monkeypatch, times):
    disk, tries = Disk(monkeypatch), []

    def fetch(checkpoint: Checkpoint) -> None:
        if checkpoint.name == "b":
            tries.append(sorted(disk.here))
            disk.tried.append("b")
            if len(tries) <= times:
                raise DiskFullError("the disk is full")
        Disk.fetch(disk, checkpoint)

    monkeypatch.setattr(checkpoint_load, "fetch", fetch)
    each = opened(checkpoints("a", "b", "c"))
    assert isinstance(next(each), Opened) and until(disk.tried, "b")
    if times == 2:
        with pytest.raises(DiskFullError):
            list(each)
    else:
        assert [isinstance(one, Opened) for one in each] == [True, True]
    assert tries == [["a"], []]


def test_what_is_left_when_the_series_is_given_up_is_not_opened(monkeypatch):
    """The consumer may fail while the next one is read; what is read then ends, and no more begins."""
    disk = Disk(monkeypatch)
    each = opened(checkpoints("a", "b", "c", "d"))
    next(each)
    each.close()
    assert [name for name, *_ in disk.told] in (["a"], ["a", "b"])


def test_a_download_ends_when_the_series_is_given_up(monkeypatch):
    disk, ended = Disk(monkeypatch), []

    def load(checkpoint: Checkpoint, *arguments: Any) -> Any:
        found = disk.load(checkpoint, *arguments)
        if checkpoint.name == "b":
            ended.append(STOP.wait(5))
        return found

    monkeypatch.setattr(checkpoint_load, "load", load)
    each = opened(checkpoints("a", "b", "c"))
    next(each)
    assert until(disk.tried, "b")
    each.close()
    assert ended == [True] and not STOP.is_set(), "the next series may download"


def test_no_checkpoints_give_nothing(monkeypatch):
    assert list(opened([])) == []


def test_all_processes_have_the_value_of_the_first(monkeypatch):
    """Both are played here: what the first one sends is what the second one gets."""
    value = {"names": ["step1", "Fäden"], "done": [True, None, 1.5]}
    assert multihost.broadcast_from_process_0(value) is value
    assert multihost.all_true(True) and not multihost.all_true(False)
    sent: list[Any] = []

    class Multihost:
        first = True

        def broadcast_one_to_all(self, mine: Any) -> Any:
            if self.first:
                sent.append(np.array(mine))
                return sent[-1]
            theirs = sent.pop(0)
            assert np.shape(mine) == theirs.shape and np.asarray(mine).dtype == theirs.dtype, "as JAX demands"
            return theirs

        def process_allgather(self, mine: Any) -> Any:
            return np.array([mine, others])

    monkeypatch.setattr(multihost, "multihost_utils", Multihost())
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    assert multihost.broadcast_from_process_0(value) == value
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    Multihost.first = False
    assert multihost.broadcast_from_process_0("of the second") == value
    for others in (0, 1):
        assert [multihost.all_true(mine) for mine in (False, True)] == [False, bool(others)]
