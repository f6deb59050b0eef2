"""What both engines share: the scorer they make, arrays given to the devices, and results read back behind them."""

import collections
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Bool, Float64

from fineline_jax.mesh import BATCH

T = TypeVar("T")
IN_FLIGHT = 4
"""Batches given to the device before the oldest result is read."""


class Scorer(Protocol):
    """Scores the requests it was made for; its plan and its compiled steps live as long as it."""

    def __call__(
        self, params: dict, advance: Callable[[int], None] = ...
    ) -> tuple[Float64[np.ndarray, " requests"], Bool[np.ndarray, " requests"]]:
        """Log-likelihood and greediness of every request under `params`, which lie on the mesh.

        advance: called with the number of requests that were completed since the last call.
        """
        ...


def results(
    steps: Iterator[tuple[T, jax.Array, jax.Array]], mesh: jax.sharding.Mesh, in_flight: int
) -> Iterator[tuple[T, np.ndarray, np.ndarray]]:
    """(tag, logp, greedy) of each (tag, logp, greedy) that `steps` gives to the device under `jax.set_mesh`, in order;
    so many steps run ahead of the one whose result is read."""
    waiting: collections.deque[tuple[T, jax.Array, jax.Array]] = collections.deque()
    more = True
    while more or waiting:
        with jax.set_mesh(mesh):
            started = next(steps, None)
        more = started is not None
        if started:
            waiting.append(started)
        if waiting and (not more or len(waiting) > in_flight):
            tag, logp, greedy = waiting.popleft()
            yield tag, _whole(logp), _whole(greedy)


def _whole(array: jax.Array) -> np.ndarray:
    """All of it on every process. Devices are not made to wait for each other: they meet here, if at all."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def put(arrays: Iterable[np.ndarray], mesh: jax.sharding.Mesh) -> list[jax.Array]:
    """Arrays [rows, ...] with rows over (replica, fsdp); every process holds all and gives its devices their rows."""
    sharding = jax.NamedSharding(mesh, jax.P(BATCH, None))
    return [jax.make_array_from_callback(array.shape, sharding, lambda index, x=array: x[index]) for array in arrays]
