"""A small state of a run and its store, also for the processes that tests start."""

import functools
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from fineline_jax.checkpoints.runs.store import CheckpointStore
from fineline_jax.models import decoder
from fineline_jax.models.config import ModelConfig

CONFIG = ModelConfig(vocab_size=64, width=32, layers=2, heads=4, kv_heads=2, mlp_width=48, context=32)


OPTIMIZER = optax.adamw(1e-3)


@functools.cache
def abstract_state(mesh: jax.sharding.Mesh) -> dict[str, Any]:
    params = decoder.abstract_params(CONFIG, mesh)
    by_shape = {leaf.shape: leaf.sharding for leaf in jax.tree.leaves(params)}
    whole = jax.NamedSharding(mesh, jax.P())

    def place(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=by_shape.get(leaf.shape, whole))

    with jax.set_mesh(mesh):
        moments = jax.eval_shape(OPTIMIZER.init, params)
    return {"params": params, "opt_state": jax.tree.map(place, moments)}


def fresh_state(mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Random parameters and moments."""
    random = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.device_put(random.normal(size=leaf.shape).astype(leaf.dtype), leaf.sharding)

    return jax.tree.map(draw, abstract_state(mesh))


@jax.jit(donate_argnums=0)
def advanced(state: dict[str, Any]) -> dict[str, Any]:
    """Every array changes, in the buffers of the old ones."""
    return jax.tree.map(lambda x: x * 2 + 1, state)


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def open_store(folder: Path, kept: Collection[int] = (), latest_every: int = 0) -> CheckpointStore:
    rolling = lambda step: latest_every > 0 and step % latest_every == 0
    return CheckpointStore(
        folder, kept, is_rolling=rolling, record=lambda step: {"tokens": 100 * step, "recipe": "test"}
    )


def largest_file(folder: Path) -> Path:
    """But the record."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "complete.json")
    return max(files, key=lambda path: path.stat().st_size)


def truncate(folder: Path) -> str:
    path = largest_file(folder)
    os.truncate(path, path.stat().st_size // 2)
    return path.name
