"""Opening the checkpoints of a series one after another, the next one while the current one is scored.

At most two are in memory, and of remote ones that are not to be kept at most two on disk. Opening one reads its files
for their hash, which is also the check that they are whole, and then its arrays, from what the operating system keeps
of the files: the disk is read once.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

from fineline_jax.checkpoints import load as checkpoint_load
from fineline_jax.checkpoints.remote.download import DiskFullError, FetchError, stopped
from fineline_jax.checkpoints.series import Checkpoint
from fineline_jax.errors import UserError
from fineline_jax.models.config import ModelConfig
from fineline_jax.multihost import all_true, broadcast_from_process_0
from fineline_jax.scoring.series.auto_mesh import SHARE_OF_DEVICE, memory_of_device
from fineline_jax.tokenizers.open import UnreadableTokenizer

DAMAGE = (UserError, OSError, ValueError, jax.errors.JaxRuntimeError)
"""What readers, and JAX on the way to the devices, raise for files that are damaged. Anything else is a mistake in the
program and ends it with its traceback."""


@dataclasses.dataclass(frozen=True)
class Opened:
    """A checkpoint on the devices."""

    checkpoint: Checkpoint
    weights_hash: str
    """`load.weights_hash`"""
    stat_signature: str
    """`load.stat_signature`"""
    model: tuple[ModelConfig, dict[str, Any]] | None
    """Config and parameters; None: not wanted, which the hash decided."""
    times: tuple[float, ...] = ()
    """When it was begun, when its files were here and hashed, when its arrays were on the devices: Unix seconds."""


@dataclasses.dataclass(frozen=True)
class Failed:
    """A checkpoint that cannot be opened."""

    checkpoint: Checkpoint
    reason: str


def open_each(
    following: Callable[[], Checkpoint | None],
    mesh: jax.sharding.Mesh,
    dtype: str,
    wanted: Callable[[Checkpoint, str], bool],
    check: Callable[[Checkpoint], None],
) -> Iterator[Opened | Failed]:
    """Each checkpoint that `following` gives. Its parameters are freed when the next one is asked for.

    following(): the next checkpoint; None: none as long as the current one is not scored, after which it is asked
    again. wanted(checkpoint, weights_hash): whether the parameters are to be loaded. check(checkpoint) comes first;
    what it raises ends the iteration, while a checkpoint that cannot be read (`DAMAGE`) is passed over as `Failed`.
    The next checkpoint is opened by a thread meanwhile, unless the devices have no room for two. With several processes
    each one's thread reads its own shards, and process 0 decides afterwards whether they are wanted. A checkpoint of a
    run is then only hashed ahead: Orbax runs collectives, whose order must be the same everywhere.
    """
    alone = jax.process_count() == 1

    def ahead(checkpoint: Checkpoint) -> Opened | Failed:
        opened = _hash(checkpoint, wanted, check)
        if _loads_alone(checkpoint):
            if jax.process_index() != 0:  # most likely it is wanted
                opened = Opened(checkpoint, "", "", _UNREAD)
            return _load(opened, mesh, dtype)
        if isinstance(opened, Opened) and (opened.model is not None or jax.process_index() != 0):
            _fetch(checkpoint)  # each process has its own disk, or waits for the one that fetches
        return opened

    with ThreadPoolExecutor(1, thread_name_prefix="open") as pool:
        try:
            checkpoint = following()
            pending = pool.submit(ahead, checkpoint) if checkpoint else None
            while checkpoint is not None:
                assert pending is not None
                try:
                    opened = pending.result() if alone else _load_together(checkpoint, pending, mesh, dtype)
                except DiskFullError:  # the one before may have been in the way, and is gone
                    if not alone:
                        raise
                    opened = pool.submit(ahead, checkpoint).result()
                if isinstance(opened, Failed):
                    checkpoint_load.discard(checkpoint)
                params = opened.model[1] if isinstance(opened, Opened) and opened.model is not None else None
                then, pending = following(), None
                if then is not None and (not _loads_alone(then) or _room_for_two(params)):
                    pending = pool.submit(ahead, then)
                elif then is not None:
                    pool.submit(_fetch, then)
                yield opened
                del opened
                if params is not None:
                    _free(params)
                    checkpoint_load.discard(checkpoint)
                checkpoint = then or following()
                if checkpoint is not None and pending is None:
                    pending = pool.submit(ahead, checkpoint)  # after the download, since the pool has one thread
        finally:
            with stopped():  # a download may have an hour to go
                pool.shutdown(wait=True, cancel_futures=True)


_UNREAD: tuple[Any, dict[str, Any]] = (None, {})


def _hash(
    checkpoint: Checkpoint, wanted: Callable[[Checkpoint, str], bool], check: Callable[[Checkpoint], None]
) -> Opened | Failed:
    """The checkpoint with its hash; its model is still to be read where it is wanted."""
    if jax.process_index() != 0:
        return Opened(checkpoint, "", "", None)
    begun = time.time()
    try:
        check(checkpoint)
    except (FetchError, UnreadableTokenizer) as error:  # a wrong tokenizer ends it, one that is not to be had does not
        return Failed(checkpoint, _reason(error))
    try:
        stat_signature = checkpoint_load.stat_signature(checkpoint)
        weights_hash = checkpoint_load.weights_hash(checkpoint)
    except DAMAGE as error:
        return Failed(checkpoint, _reason(error))
    model = _UNREAD if wanted(checkpoint, weights_hash) else None
    return Opened(checkpoint, weights_hash, stat_signature, model, (begun, time.time()))


def _load(opened: Opened | Failed, mesh: jax.sharding.Mesh, dtype: str) -> Opened | Failed:
    if isinstance(opened, Failed) or opened.model is None:
        return opened
    try:
        checkpoint_load.fetch(opened.checkpoint)
        model = checkpoint_load.load(opened.checkpoint, mesh, dtype)
        jax.block_until_ready(model[1])
    except DiskFullError as error:
        if jax.process_count() == 1:
            raise  # it would be the same for all others
        return Failed(opened.checkpoint, _reason(error))
    except DAMAGE as error:
        return Failed(opened.checkpoint, _reason(error))
    return dataclasses.replace(opened, model=model, times=(*opened.times, time.time()))


def _fetch(checkpoint: Checkpoint) -> None:
    """Download it ahead; what goes wrong shows when it is opened."""
    with contextlib.suppress(UserError):
        checkpoint_load.fetch(checkpoint)


def _loads_alone(checkpoint: Checkpoint) -> bool:
    """Whether a process reads its shards without the others."""
    return checkpoint.kind == "hf" or jax.process_count() == 1


def _load_together(
    checkpoint: Checkpoint, pending: Future[Opened | Failed], mesh: jax.sharding.Mesh, dtype: str
) -> Opened | Failed:
    """All processes do what process 0 decides: load, pass over, or stop."""
    own: Opened | Failed = Failed(checkpoint, "")
    try:
        own = pending.result()
        if isinstance(own, Failed):
            decision = {"failed": own.reason}
        else:
            wanted = own.model is not None
            decision = {"weights_hash": own.weights_hash, "stat_signature": own.stat_signature, "wanted": wanted}
    except UserError as error:
        decision = {"stop": str(error)}
    decision = broadcast_from_process_0(decision)
    if "stop" in decision:
        raise UserError(decision["stop"])
    if "failed" in decision:
        _drop(own)
        return Failed(checkpoint, decision["failed"])
    identity = decision["weights_hash"], decision["stat_signature"]
    if not decision["wanted"]:
        _drop(own)
        return Opened(checkpoint, *identity, None)
    if isinstance(own, Opened):
        own = Opened(checkpoint, *identity, own.model)
        if own.model is None or own.model is _UNREAD:
            own = _load(dataclasses.replace(own, model=_UNREAD), mesh, dtype)
    if all_true(isinstance(own, Opened)):
        return own
    _drop(own)
    return own if isinstance(own, Failed) else Failed(checkpoint, "another process could not open it; see its log")


def _drop(opened: Opened | Failed) -> None:
    """Free what was read ahead in vain."""
    if isinstance(opened, Opened) and opened.model is not None:
        _free(opened.model[1])


def _room_for_two(params: dict[str, Any] | None) -> bool:
    """Whether each device can hold a second set of parameters."""
    if params is None:
        return True
    limit = memory_of_device() or float("inf")  # unknown
    held = sum(shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards[:1])
    return 2 * held <= SHARE_OF_DEVICE * limit


def _free(params: dict[str, Any]) -> None:
    for leaf in jax.tree.leaves(params):
        leaf.delete()


def _reason(error: Exception) -> str:
    if isinstance(error, UserError):
        return str(error)
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
