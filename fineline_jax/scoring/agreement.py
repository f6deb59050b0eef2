"""What several processes of one job must agree on. All of them call these, in the same order, from the main thread."""

import json
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def from_first(value: Any) -> Any:
    """Process 0's `value`, which JSON can hold."""
    if jax.process_count() == 1:
        return value
    content = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    mine = np.zeros(size, np.uint8)
    if jax.process_index() == 0:
        mine[:] = content
    return json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(mine))))


def all_true(mine: bool) -> bool:
    """Whether `mine` holds on every process."""
    if jax.process_count() == 1:
        return mine
    return bool(np.all(multihost_utils.process_allgather(np.int32(mine))))
