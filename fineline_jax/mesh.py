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
    """Inside `jax.shard_map`: the sum of x over `fsdp`, of whose first axis each device keeps its part."""
    scatter = functools.partial(jax.lax.psum_scatter, axis_name="fsdp", tiled=True)
    mesh = jax.sharding.get_abstract_mesh()
    shards, device = mesh.shape["fsdp"], mesh.abstract_device
    inner = second_stage(device.device_kind, shards) if device is not None and shards == mesh.size else 1
    if shards % inner or inner == 1:
        return scatter(x)
    outer = shards // inner
    x = scatter(x, axis_index_groups=[[i * inner + j for i in range(outer)] for j in range(inner)])
    return scatter(x, axis_index_groups=[[i * inner + j for j in range(inner)] for i in range(outer)])


def second_stage(kind: str, devices: int) -> int:
    """Devices of the second of two stages in which a sum is scattered over all devices of a kind; 1: one stage does it.

    TPUs scatter a sum over some devices as they sum. Over all of them, from 16 on and on 8 of a torus of three
    dimensions, they make the whole sum everywhere, twice the traffic, and in a stage of 32 as well
    (tests/plan/test_lowering.py). The fewer take part in the second stage, the less is moved twice.
    """
    if not kind.startswith("TPU") or devices < (16 if "lite" in kind else 8):
        return 1
    return 4 if devices == 64 else 2


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
