"""What several processes of one job must agree on. All of them call these, in the same order, from the main thread."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from fineline_jax.errors import UserError
from fineline_jax.folder_lock import writing


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
    """`folder_lock.writing` for all processes of the job, which write `folder` together: process 0 holds the lock."""
    with contextlib.ExitStack() as stack:

        def take() -> None:
            try:
                stack.enter_context(writing(folder, remedy, part=part))
            except OSError as error:  # the other processes wait to hear of it
                raise UserError(f"{folder}: {error.strerror}; check the path and its permissions") from error

        check_on_process_0(take)
        yield
