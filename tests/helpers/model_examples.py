"""A small model with random parameters, and its logits."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fineline_jax.models import attention, decoder
from fineline_jax.models.config import ModelConfig

SMALL = ModelConfig(vocab_size=48, width=32, layers=3, heads=4, kv_heads=2, head_dim=8, mlp_width=40, context=64)


def logits(config: ModelConfig, params: Any, tokens: np.ndarray, mesh: jax.sharding.Mesh) -> np.ndarray:
    """[batch, length, vocab] in float32."""
    attend = attention.causal("xla")

    @jax.jit
    def run(params: Any, tokens: jax.Array) -> jax.Array:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        states = decoder.hidden_states(config, params, tokens, positions, attend)
        head = jax.reshard(decoder.head_weight(config, params), jax.P(None, None))
        return jnp.einsum("bsd,dv->bsv", states, head)

    with jax.set_mesh(mesh):
        return np.asarray(run(params, jax.device_put(tokens, jax.NamedSharding(mesh, jax.P()))))


def random_params(config: ModelConfig, mesh: jax.sharding.Mesh, dtype: Any = jnp.float32) -> Any:
    random = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.device_put(random.normal(size=leaf.shape).astype(leaf.dtype), leaf.sharding)

    return jax.tree.map(draw, decoder.abstract_params(config, mesh, dtype))
