"""The plain engine: every request in a row of its own. The reference that `tree_engine` is held against."""

import collections
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from fineline_jax.mesh import BATCH, batch_shards
from fineline_jax.models import attention
from fineline_jax.models.config import ModelConfig
from fineline_jax.scoring.forward import score_step
from fineline_jax.scoring.pack import Pack
from fineline_jax.scoring.rows import Batch, batches, sequences

T = TypeVar("T")
IN_FLIGHT = 4
"""Batches given to the device before the oldest result is read."""


def score_rows(
    pack: Pack,
    config: ModelConfig,
    params: dict,
    context: int,
    mesh: jax.sharding.Mesh,
    dtype: str,
    *,
    batch_tokens: int | None = None,
    attend: attention.Implementation = "auto",
    advance: Callable[[int], None] = lambda requests: None,
) -> tuple[np.ndarray, np.ndarray]:
    """Log-likelihood (float64) and greediness (bool) of every request of `pack` under a model.

    context: tokens a row may hold. batch_tokens: tokens per step over all devices, None: 4096 on CPU, else 32768 per
    device. Other arguments as of `scorer.score_params`.
    """
    platform = mesh.devices.flat[0].platform
    step = score_step(config, mesh, dtype, attention.pick(attend, jnp.dtype(dtype), platform))
    loglikelihood = np.zeros(pack.requests.num_rows, np.float64)
    is_greedy = np.ones(pack.requests.num_rows, bool)
    plan = _plan(pack, context, batch_tokens, mesh)
    everyone = np.concatenate([np.empty(0, np.int32), *(batch.requests for batch in plan)])
    rows_left = np.bincount(everyone, minlength=len(is_greedy))
    advance(int((rows_left == 0).sum()))  # empty texts

    arrays = lambda batch: put([batch.tokens, batch.positions, batch.targets], mesh)
    steps = ((batch, *step(params, *arrays(batch))) for batch in plan)
    for batch, logp, greedy in results(steps, mesh, IN_FLIGHT):
        used = len(batch.requests)
        # a long document is several rows
        np.add.at(loglikelihood, batch.requests, logp[:used].sum(axis=1, dtype=np.float64))
        np.logical_and.at(is_greedy, batch.requests, greedy[:used].all(axis=1))
        np.subtract.at(rows_left, batch.requests, 1)
        advance(int((rows_left[np.unique(batch.requests)] == 0).sum()))
    return loglikelihood, is_greedy


def results(
    steps: Iterator[tuple[T, jax.Array, jax.Array]], mesh: jax.sharding.Mesh, in_flight: int
) -> Iterator[tuple[T, np.ndarray, np.ndarray]]:
    """(tag, logp, greedy) of each (tag, logp, greedy) that `steps` gives to the device under `jax.set_mesh`, in order;
    so many steps run ahead of the one whose result is read."""
    waiting: collections.deque[tuple[T, jax.Array, jax.Array]] = collections.deque()
    more = True
    while more or waiting:
        with jax.set_mesh(mesh):
            found = next(steps, None)
        more = found is not None
        if found:
            waiting.append(found)
        if waiting and (not more or len(waiting) > in_flight):
            tag, logp, greedy = waiting.popleft()
            yield tag, _whole(logp), _whole(greedy)


def _whole(array: jax.Array) -> np.ndarray:
    """All of it on every process. Devices are not made to wait for each other: they meet here, if at all."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


# The plan is the same for every checkpoint; one is kept so that a series does not make it again.
_plans: dict[tuple[str, int, int, int, int], list[Batch]] = {}


def _plan(pack: Pack, context: int, batch_tokens: int | None, mesh: jax.sharding.Mesh) -> list[Batch]:
    accelerator = mesh.devices.flat[0].platform != "cpu"
    tokens = batch_tokens or (32768 * mesh.devices.size if accelerator else 4096)
    least = 128 if accelerator else 32  # kernels want whole tiles
    key = (pack.hash, context, tokens, batch_shards(mesh), least)
    if key not in _plans:
        _plans.clear()
        _plans[key] = batches(list(sequences(pack, context)), tokens, batch_shards(mesh), least)
    return _plans[key]


def put(arrays: Iterable[np.ndarray], mesh: jax.sharding.Mesh) -> list[jax.Array]:
    """Arrays [rows, ...] with rows over (replica, fsdp); every process holds all and gives its devices their rows."""
    sharding = jax.NamedSharding(mesh, jax.P(BATCH, None))
    return [jax.make_array_from_callback(array.shape, sharding, lambda index, x=array: x[index]) for array in arrays]
