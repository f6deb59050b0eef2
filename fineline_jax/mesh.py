"""The one mesh: replica x fsdp x tensor, explicit axes, built here and nowhere else.

`replica` holds whole copies of the parameters, `fsdp` shards parameters and batch (ZeRO-3: a weight is gathered
where it is used), `tensor` shards heads, hidden features and the vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from fineline_jax.errors import UserError
from fineline_jax.models.config import ModelConfig
from fineline_jax.recipe import MeshShape

AXES = ("replica", "fsdp", "tensor")
BATCH = ("replica", "fsdp")
"""The axes over which rows of a batch are spread."""


def make_mesh(mesh: MeshShape = MeshShape(), devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """The mesh over `devices` (default: all of all processes); an axis of -1 takes what the others leave.

    Without an accelerator, where devices are only the cores of one machine, a mesh of a half or a quarter of them takes
    the first ones. Raises UserError if the axes do not multiply to the number of devices.
    """
    count = len(devices) if devices is not None else jax.device_count()
    sizes = [mesh.replica, mesh.fsdp, mesh.tensor]
    if -1 in sizes:
        rest = -sizes[0] * sizes[1] * sizes[2]
        sizes[sizes.index(-1)] = count // rest
    asked = sizes[0] * sizes[1] * sizes[2]
    one_cpu = devices is None and jax.default_backend() == "cpu" and jax.process_count() == 1
    if one_cpu and 0 < asked < count and count % asked == 0:
        devices, count = jax.devices()[:asked], asked
    if asked != count:
        axes = ", ".join(f"mesh.{axis}={size}" for axis, size in zip(AXES, (mesh.replica, mesh.fsdp, mesh.tensor)))
        raise UserError(f"{axes} does not divide the {count} device(s); the axes must multiply to that number")
    return jax.make_mesh(tuple(sizes), AXES, devices=devices)


def check_fits(config: ModelConfig, mesh: jax.sharding.Mesh) -> None:
    """Raise UserError naming the model dimension that the mesh cannot split evenly."""
    sharded = {
        "width": (config.width, "fsdp"),
        "heads": (config.heads, "tensor"),
        "kv_heads": (config.kv_heads, "tensor"),
        "mlp_width": (config.mlp_width, "tensor"),
        "shared_expert_width": (config.shared_expert_width, "tensor"),
        "vocab_size": (config.vocab_size, "tensor"),
    }
    for name, (size, axis) in sharded.items():
        if size % mesh.shape[axis]:
            raise UserError(
                f"model.{name}={size} is not a multiple of mesh.{axis}={mesh.shape[axis]}; choose another mesh.{axis}"
            )


def batch_shards(mesh: jax.sharding.Mesh) -> int:
    """Number of pieces the rows of a batch are split into."""
    return mesh.shape["replica"] * mesh.shape["fsdp"]


def abstract(function: Callable[[], Any], mesh: jax.sharding.Mesh) -> Any:
    """Shapes, dtypes and shardings on `mesh` of what `function()` returns, without computing it."""

    def place(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = leaf.sharding.spec if leaf.sharding is not None else jax.P()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=jax.NamedSharding(mesh, spec))

    with jax.set_mesh(mesh):
        return jax.tree.map(place, jax.eval_shape(function))
