"""Where the decoder's arrays lie on the mesh: one table from the names of their axes to axes of the mesh."""

import jax

from fineline_jax.errors import UserError
from fineline_jax.mesh import BATCH
from fineline_jax.models.config import ModelConfig

SPLIT: dict[str, str | tuple[str, ...]] = {
    "batch": BATCH,
    "width": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp_width": "tensor",
    "state_heads": "tensor",
    "key_heads": "tensor",
    "shared_expert_width": "tensor",
    "dense_mlp_width": "tensor",
    "vocab_size": "tensor",
    "q_lora_rank": "fsdp",
    "kv_lora_rank": "fsdp",
}
"""The mesh axis that splits an axis; every other axis is whole on each device. A parameter's axes are named as the
fields and properties of `ModelConfig`; `features` are those of the residual stream where they are not split."""


def spec(axes: str) -> jax.P:
    """The partition of an array whose axes are named: "width heads head_dim" -> P("fsdp", "tensor", None)."""
    return jax.P(*map(SPLIT.get, axes.split()))


def without_fsdp(partition: jax.P) -> jax.P:
    """The partition of a parameter where it is used: gathered over fsdp (ZeRO-3), still split over tensor."""
    return jax.P(*(None if axis == "fsdp" else axis for axis in partition))


TOKENS = spec("batch length")
STREAM = spec("batch length features")
HEADS = spec("batch length heads head_dim")
HIDDEN = spec("batch length mlp_width")
"""Inside an MLP or a Mamba layer."""


def check_fits(config: ModelConfig, mesh: jax.sharding.Mesh) -> None:
    """Raise UserError naming the model dimension that the mesh cannot split evenly."""
    for name, axis in SPLIT.items():
        size = getattr(config, name, 0)  # of the batch the model knows nothing
        if isinstance(axis, str) and size % mesh.shape[axis]:
            raise UserError(
                f"model.{name}={size} is not a multiple of mesh.{axis}={mesh.shape[axis]}; choose another mesh.{axis}"
            )
