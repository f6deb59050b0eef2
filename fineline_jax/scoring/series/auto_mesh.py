"""On which mesh a series is scored where the user names none."""

import os
from collections.abc import Sequence

import jax
import numpy as np

from fineline_jax.checkpoints.load import config_of
from fineline_jax.checkpoints.series import Series
from fineline_jax.errors import UserError
from fineline_jax.mesh import make_mesh
from fineline_jax.recipe import MeshShape

SHARE_OF_DEVICE = 0.6
"""Two sets of parameters may take this share of a device's memory; the rest is for activations."""


def scoring_mesh(asked: MeshShape, opened: Sequence[Series], dtype: str) -> jax.sharding.Mesh:
    """`asked`, unless it is the default: then the `placement` of the largest model, weights in `dtype`; sharded where
    a size is not known. Raises UserError as `placement`."""
    if asked != MeshShape():
        return make_mesh(asked)
    return make_mesh(placement(max(map(parameters, opened)), dtype, jax.device_count(), memory_of_device()))


def placement(parameters: float, dtype: str, devices: int, memory: float) -> MeshShape:
    """A whole copy of the weights on every device, so that none waits for another, if it has room for two; else they
    are sharded over all.

    memory: bytes of a device, 0: unknown. Raises UserError where the weights alone do not fit.
    """
    size = lambda dtype: parameters * np.dtype("float32" if dtype == "float32" else "float16").itemsize
    if 2 * size(dtype) <= SHARE_OF_DEVICE * memory:
        return MeshShape(replica=-1, fsdp=1)
    gib = lambda number: f"{number / 2**30:.1f} GiB"
    if 0 < memory < size(dtype) / devices < float("inf"):
        less = "" if dtype == "bfloat16" else f"--dtype bfloat16 needs {gib(size('bfloat16') / devices)}, or "
        raise UserError(
            f"the weights in {dtype} need {gib(size(dtype) / devices)} of each of {devices} devices, which have"
            f" {gib(memory)}; {less}take more devices"
        )
    return MeshShape()


def parameters(series: Series) -> float:
    """Of the first checkpoint's model; infinite where its config cannot be read."""
    try:
        return config_of(series.checkpoints[0]).parameters
    except (UserError, OSError):
        return float("inf")


def memory_of_device() -> float:
    """Bytes that one device may use; a CPU's memory is shared by its devices."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / jax.local_device_count()
    return (device.memory_stats() or {}).get("bytes_limit", 0.0)
