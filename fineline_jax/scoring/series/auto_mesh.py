"""On which mesh a series is scored where the user names none."""

import os
from collections.abc import Sequence

import jax

from fineline_jax.checkpoints.load import weight_files
from fineline_jax.checkpoints.series import Series
from fineline_jax.errors import UserError
from fineline_jax.mesh import make_mesh
from fineline_jax.recipe import MeshShape

SHARE_OF_MEMORY = 0.25
"""Of a device's memory, for one whole copy of the weights in float32: a second is read while one is scored."""


def scoring_mesh(asked: MeshShape, opened: Sequence[Series]) -> jax.sharding.Mesh:
    """`asked`, unless it is the default: then every device holds a whole copy of the weights if that fits easily.

    Devices with whole copies never wait for each other. Larger weights, and those whose size is not known before they
    are fetched, are sharded over all devices.
    """
    if asked == MeshShape():
        largest = max(weight_bytes(series) for series in opened)
        if 2 * largest <= SHARE_OF_MEMORY * memory_of_device():  # 2: stored in two bytes, computed with in four
            return make_mesh(MeshShape(replica=-1, fsdp=1))
    return make_mesh(asked)


def weight_bytes(series: Series) -> float:
    """Size of the first checkpoint's weight files; infinite where they are not here."""
    first = series.checkpoints[0]
    if first.remote is not None:
        return float("inf")
    try:
        return sum((first.location / name).stat().st_size for name in weight_files(first))
    except (UserError, OSError):
        return float("inf")


def memory_of_device() -> float:
    """Bytes that one device may use; a CPU's memory is shared by its devices."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / jax.local_device_count()
    return (device.memory_stats() or {}).get("bytes_limit", 0.0)
