"""What several processes of one job must agree on. All of them call these, in the same order, from the main thread."""

import contextlib
import json
import os
import re
import sys
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


def check_on_process_0(check: Callable[[], None]) -> None:
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

    Where another process of the job has ended, this one ends with one line and status 2: what it would still do at its
    end would wait for that process for ever. Enter it last.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        text = " ".join(str(error).split())
        if "RESOURCE_EXHAUSTED" in text or "Out of memory" in text:
            raise UserError(f"the devices have too little memory: {_memory(text)}; {remedy}") from error
        if jax.process_count() > 1 and _LOST.search(text):
            address = _ADDRESS.search(text)
            where = f" at {address[1]}" if address else ""
            sys.stderr.write(
                f"fineline: process {jax.process_index()} of {jax.process_count()}: another process{where} has ended;"
                " start all of them again, the work goes on from what is saved\n"
            )
            sys.stderr.flush()
            os._exit(2)
        raise


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
