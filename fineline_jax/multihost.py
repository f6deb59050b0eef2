"""What several processes of one job must agree on. All of them call these, in the same order, from the main thread."""

import contextlib
import ctypes
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from fineline_jax.errors import UserError
from fineline_jax.folder_lock import holder_text, writing

SHARED_SECONDS = 60.0
"""Longer than a network file system keeps what it has seen of a folder."""
GRACE_SECONDS = 3.0
"""From learning that a process is gone to ending: one that fails for a reason of its own says that instead."""
PORT = "fineline_jax/watch"
"""Key of the port at which process 0 is watched, in the store of the job."""
_LOST = re.compile(r"Gloo|NCCL|[Cc]oordination ?[Ss]ervice|heartbeat")
"""In what XLA's collectives and JAX's service say when a process is gone; Gloo adds its address."""
_ADDRESS = re.compile(r"\[(\d+(?:\.\d+){3}|[\da-f:]*:[\da-f:]*)\]")


def broadcast_from_process_0(value: Any) -> Any:
    """Process 0's `value`, which JSON can hold."""
    if jax.process_count() == 1:
        return value
    content = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    buffer = np.zeros(size, np.uint8)
    if jax.process_index() == 0:
        buffer[:] = content
    return json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(buffer))))


def all_true(value: bool) -> bool:
    """Whether `value` is true on every process."""
    if jax.process_count() == 1:
        return value
    return bool(np.all(multihost_utils.process_allgather(np.int32(value))))


def check_on_process_0(check: Callable[[], object]) -> None:
    """Run `check` on process 0; a UserError of it is raised by all."""
    message = ""
    if jax.process_index() == 0:
        try:
            check()
        except UserError as error:
            message = str(error)
    message = broadcast_from_process_0(message)
    if message:
        raise UserError(message)


@contextlib.contextmanager
def writing_as_one(folder: Path, remedy: str, *, part: tuple[int, int] | None = None) -> Iterator[None]:
    """`folder_lock.writing` for all processes of the job, which write `folder` together: process 0 holds the lock.

    Raises UserError on all of them if some do not see that lock within SHARED_SECONDS: their folder is another one.
    """
    with contextlib.ExitStack() as stack:

        def take() -> None:
            try:
                stack.enter_context(writing(folder, remedy, part=part))
            except OSError as error:  # the other processes wait to hear of it
                raise UserError(f"{folder}: {error.strerror}; check the path and its permissions") from error

        check_on_process_0(take)
        if jax.process_count() > 1:
            _check_shared(folder, remedy, part)
        yield


def _check_shared(folder: Path, remedy: str, part: tuple[int, int] | None) -> None:
    held, end = broadcast_from_process_0(holder_text(folder, part)), time.monotonic() + SHARED_SECONDS
    while not (seen := holder_text(folder, part) == held) and time.monotonic() < end:
        time.sleep(0.2)
    blind = np.flatnonzero(multihost_utils.process_allgather(np.int32(seen)) == 0).tolist()
    if blind:
        raise UserError(
            f"{remedy} {folder}: not shared: process {', '.join(map(str, blind))} of {jax.process_count()} does not see"
            " what process 0 writes there; name a folder on a file system that all hosts share"
        )


@contextlib.contextmanager
def device_errors(remedy: str) -> Iterator[None]:
    """What XLA raises for lack of memory, as a UserError; remedy: what needs less of it.

    Where another process of the job has ended, this one ends with one line and LOST_STATUS: what it would still do at
    its end would wait for that process for ever. Enter it last.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        text = " ".join(str(error).split())
        if "RESOURCE_EXHAUSTED" in text or "Out of memory" in text:
            raise UserError(f"the devices have too little memory: {_memory(text)}; {remedy}") from error
        if jax.process_count() > 1 and _LOST.search(text):
            if _watching:
                time.sleep(2 * GRACE_SECONDS)  # the watch knows which one, and ends this process
            address = _ADDRESS.search(text)
            _end(f"another process{f' at {address[1]}' if address else ''}")
        raise


LOST_STATUS = 143
"""As if by SIGTERM, which job managers take for "start it again"; 2 is a mistake in the command."""
_watching: list[socket.socket] = []
"""Connections to process 0, or of process 0 to all others; while they are open, those processes live."""
_ending = threading.Event()
"""This process ends by itself, for a reason that it says."""


@contextlib.contextmanager
def watching_each_other(coordinator: str, store: Any) -> Iterator[None]:
    """Inside, a process that dies or fails ends all others of the job: in one line that names it, with LOST_STATUS.

    A connection between each and process 0 is open as long as both live, so that it is noticed also while nobody
    computes, or where the devices only wait. coordinator: host:port of process 0; store: the key-value store of the job
    (`DistributedRuntimeClient`).
    """
    index, count = jax.process_index(), jax.process_count()
    host = coordinator.rpartition(":")[0].strip("[]")
    try:
        if index == 0:
            with socket.create_server(("", 0)) as server:
                server.settimeout(SHARED_SECONDS)
                store.key_value_set(PORT, str(server.getsockname()[1]))
                accepted = [server.accept()[0] for _ in range(count - 1)]
            others = {int.from_bytes(_received(one, 4)): one for one in accepted}
        else:
            port = int(store.blocking_key_value_get(PORT, 1000 * int(SHARED_SECONDS)))
            others = {0: socket.create_connection((host, port), SHARED_SECONDS)}
            others[0].settimeout(None)
            others[0].sendall(index.to_bytes(4))
    except OSError as error:
        raise UserError(
            f"--distributed: process {index} and process 0 at {host} do not reach each other ({error}); open the ports"
            " between the hosts"
        ) from error
    _watching.extend(others.values())
    threads = [
        threading.Thread(target=_watch, args=(number, one), daemon=True, name=f"watch of process {number}")
        for number, one in others.items()
    ]
    for one, thread in zip(_watching, threads, strict=True):
        one.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # for a host that is gone, not only its process
        thread.start()
    system = ctypes.CDLL(None)
    system.signal(signal.SIGABRT, _WHILE_ABORTING)
    said = b"fail"
    try:
        yield
        said = b"done"
    finally:
        _ending.set()
        system.signal(signal.SIGABRT, None)  # as it was: SIG_DFL
        _say(said)
        # JAX's service is in process 0, and aborts those that it leaves.
        if index == 0:
            for thread in threads:
                thread.join(SHARED_SECONDS)
        jax.distributed.shutdown()
        for one in _watching:
            one.close()


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _WHILE_ABORTING(_: int) -> None:
    """JAX's threads abort the process as soon as process 0 is gone; the watch is to say so, and end it, first."""
    time.sleep(2 * GRACE_SECONDS)


def _watch(number: int, connection: socket.socket) -> None:
    """Until process `number`, at the other end, ends; process 0 says of each other one that ended, too."""
    said = _received(connection, 4)
    # Process 0 waits no longer: the others wait for it in JAX's shutdown, and hear from it who is lost.
    if said == b"done" and (jax.process_index() == 0 or not (said := _received(connection, 4))):
        return
    lost = number if said in (b"", b"fail") else int.from_bytes(said)
    if jax.process_index() == 0:
        _say(lost.to_bytes(4))
    time.sleep(GRACE_SECONDS)
    if not _ending.is_set():
        _end(f"process {lost}")


def _say(message: bytes) -> None:
    for one in _watching:
        with contextlib.suppress(OSError):
            one.sendall(message)


def _received(connection: socket.socket, size: int) -> bytes:
    """So many bytes; b"": the connection ended before."""
    content = b""
    with contextlib.suppress(OSError):
        while len(content) < size and (more := connection.recv(size - len(content))):
            content += more
    return content if len(content) == size else b""


def _end(who: str) -> None:
    """At once: what this process would still do at its end would wait for the other for ever."""
    sys.stderr.write(
        f"fineline: process {jax.process_index()} of {jax.process_count()}: {who} has ended; start all of them again,"
        " the work goes on from what is saved\n"
    )
    sys.stderr.flush()
    os._exit(LOST_STATUS)


def _memory(text: str) -> str:
    """Wanted and there, as far as the message and the devices say."""
    asked = re.search(r"allocat\w+ ([\d.]+ ?\w+)", text)
    used = re.search(r"Used ([\d.]+\w+ of [\d.]+\w+)", text)
    said = f"{asked[1]} wanted" if asked else f"{used[1]} used" if used else ""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    limits = [(one["bytes_limit"], one.get("bytes_in_use", 0)) for one in stats if one.get("bytes_limit")]
    limit, taken = min(limits, key=lambda each: each[0] - each[1], default=(0, 0))
    there = f"{limit - taken:,} of {limit:,} bytes free" if limit else ""
    return ", ".join(filter(None, (said, there))) or text[:200]
