"""The one mesh: replica x fsdp x tensor, explicit axes, built here and nowhere else.

`replica` holds whole copies of the parameters, `fsdp` shards parameters and batch (ZeRO-3: a weight is gathered
where it is used), `tensor` shards heads, hidden features and the vocabulary.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
from jax.experimental import mesh_utils

from fineline_jax.errors import UserError

AXES = ("replica", "fsdp", "tensor")
BATCH = ("replica", "fsdp")
"""The axes over which rows of a batch are spread."""
STAGED_FROM, INNER = 16, 4
"""Devices from which on a sum that is scattered over all of them is scattered in two stages, and those of the second
stage: with 8 or 16 TPUs made the whole sum of some of the arrays."""


class Shape(Protocol):
    """Sizes of the axes, as `recipe.MeshShape` holds them."""

    @property
    def replica(self) -> int: ...
    @property
    def fsdp(self) -> int: ...
    @property
    def tensor(self) -> int: ...


def make_mesh(shape: Shape | None = None, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """The mesh over `devices` (default: all of all processes); an axis of -1 takes what the others leave. Without a
    shape fsdp takes all.

    Without an accelerator, where devices are only the cores of one machine, a mesh of a half or a quarter of them takes
    the first ones. Several slices of TPUs, between which the network is slow, hold replicas. Raises UserError if the
    axes do not multiply to the number of devices.
    """
    count = len(devices) if devices is not None else jax.device_count()
    given = (shape.replica, shape.fsdp, shape.tensor) if shape else (1, -1, 1)
    sizes = list(given)
    if -1 in sizes:
        rest = -sizes[0] * sizes[1] * sizes[2]
        sizes[sizes.index(-1)] = count // rest
    asked = sizes[0] * sizes[1] * sizes[2]
    one_cpu = devices is None and jax.default_backend() == "cpu" and jax.process_count() == 1
    if one_cpu and 0 < asked < count and count % asked == 0:
        devices, count = jax.devices()[:asked], asked
    if asked != count:
        axes = ", ".join(f"mesh.{axis}={size}" for axis, size in zip(AXES, given))
        raise UserError(f"{axes} does not divide the {count} device(s); the axes must multiply to that number")
    slices = len({getattr(device, "slice_index", 0) for device in devices or jax.devices() if device.platform == "tpu"})
    if slices > 1 and sizes[0] % slices:
        raise UserError(f"mesh.replica={sizes[0]} must be a multiple of the {slices} slices; set mesh.replica={slices}")
    try:
        if slices > 1:
            inside, between = (sizes[0] // slices, *sizes[1:]), (slices, 1, 1)
            placed = mesh_utils.create_hybrid_device_mesh(inside, between, devices)
            return jax.sharding.Mesh(placed, AXES, axis_types=(jax.sharding.AxisType.Explicit,) * len(AXES))
        return jax.make_mesh(tuple(sizes), AXES, devices=devices)
    except NotImplementedError as error:  # a slice of TPUs whose shape these axes do not fit
        axes = ", ".join(f"mesh.{axis}={size}" for axis, size in zip(AXES, sizes))
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{axes} cannot be laid over these devices ({reason}); choose other sizes") from error


def batch_shards(mesh: jax.sharding.Mesh) -> int:
    """Number of shards the rows of a batch are split into."""
    return mesh.shape["replica"] * mesh.shape["fsdp"]


def scattered_sum(x: jax.Array) -> jax.Array:
    """Inside `jax.shard_map`: the sum of x over `fsdp`, of whose first axis each device keeps its part.

    Over some of the devices TPUs scatter it as they sum; over all of them they would make the whole sum everywhere,
    twice the traffic, so there it is done in two stages, each over some.
    """
    scatter = functools.partial(jax.lax.psum_scatter, axis_name="fsdp", tiled=True)
    mesh = jax.sharding.get_abstract_mesh()
    shards = mesh.shape["fsdp"]
    if shards < mesh.size or shards < STAGED_FROM or shards % INNER:
        return scatter(x)
    outer, inner = range(shards // INNER), range(INNER)
    x = scatter(x, axis_index_groups=[[i * INNER + j for i in outer] for j in inner])
    return scatter(x, axis_index_groups=[[i * INNER + j for j in inner] for i in outer])


def device_bytes(tree: Any) -> int:
    """Bytes that one device holds of the arrays in `tree`, or of their shapes with shardings."""
    shard = lambda leaf: math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return sum(map(shard, jax.tree.leaves(tree)))


def abstract(function: Callable[[], Any], mesh: jax.sharding.Mesh) -> Any:
    """Shapes, dtypes and shardings on `mesh` of what `function()` returns, without computing it."""

    def on_mesh(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = leaf.sharding.spec if leaf.sharding is not None else jax.P()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=jax.NamedSharding(mesh, spec))

    with jax.set_mesh(mesh):
        return jax.tree.map(on_mesh, jax.eval_shape(function))
