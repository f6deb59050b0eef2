"""The decoder: a Llama-family transformer as Flax NNX modules with explicit sharding.

Parameters live outside as a nested pure dict (stacked over layers), so that checkpoints do not depend on classes:

    embed [vocab, width]
    layers.attention_norm [L, width]   q [L, width, heads, head_dim]   k, v [L, width, kv_heads, head_dim]
    layers.o [L, heads, head_dim, width]   mlp_norm [L, width]   gate, up [L, width, mlp]   down [L, mlp, width]
    norm [width]   head [width, vocab] (absent when tied), plus *_bias where the config has them

Rotary positions use Hugging Face's half-split layout natively, so no weight is permuted on import or export.
Every weight is cast and gathered where it is used (ZeRO-3); left to the compiler the gather is sometimes turned
into a re-layout of the activations.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from fineline_jax.mesh import BATCH, abstract, check_fits
from fineline_jax.models.attention import Attend
from fineline_jax.models.config import ModelConfig

P = jax.P
Params = dict
Remat = Literal["none", "context", "qkv_context", "full", "offload"]

STREAM = P(BATCH, None, None)
"""Residual stream [batch, length, width]."""


def init_params(config: ModelConfig, key: jax.Array) -> Params:
    """Fresh float32 parameters: normal(0, init_std) matrices, unit norms, zero biases. Call it inside `jax.jit`
    under `jax.set_mesh`: every shard is born on its device, with values that do not depend on the mesh."""
    return nnx.to_pure_dict(nnx.state(Decoder(config, key)))


def abstract_params(config: ModelConfig, mesh: jax.sharding.Mesh, dtype: jnp.dtype = jnp.float32) -> Params:
    """Shapes and shardings of the parameters on `mesh`. Raises UserError if they cannot be split evenly."""
    check_fits(config, mesh)
    tree = abstract(lambda: init_params(config, jax.random.key(0)), mesh)
    return jax.tree.map(lambda leaf: leaf.update(dtype=dtype), tree)


def hidden_states(
    config: ModelConfig,
    params: Params,
    tokens: jax.Array,
    positions: jax.Array,
    attend: Attend,
    *,
    dtype: jnp.dtype = jnp.float32,
    remat: Remat = "none",
    scan_layers: bool = True,
) -> jax.Array:
    """Activations after the final norm, [batch, length, width] in `dtype`.

    tokens, positions: int32 [batch, length], batch spread over (replica, fsdp). `attend` maps rotated queries and
    keys, and values, to the context, and holds the mask. Call it under `jax.set_mesh`.
    """
    model = nnx.merge(_graphdef(config), params)
    return model(tokens, positions, attend, dtype, remat, scan_layers)


def head_weight(config: ModelConfig, params: Params) -> jax.Array:
    """The output projection [width, vocab], sharded (fsdp, tensor); the transposed embedding when tied."""
    return params["embed"].T if config.tied_embeddings else params["head"]


@functools.lru_cache(maxsize=32)
def _graphdef(config: ModelConfig) -> nnx.GraphDef:
    return nnx.graphdef(nnx.eval_shape(lambda: Decoder(config, jax.random.key(0))))


@dataclasses.dataclass
class Weights:
    """Draws the weights of one module from one key."""

    key: jax.Array
    std: float

    def normal(self, shape: tuple[int, ...], spec: jax.P) -> nnx.Param:
        self.key, key = jax.random.split(self.key)
        return nnx.Param(self.std * jax.random.normal(key, shape, jnp.float32, out_sharding=spec))

    def constant(self, value: float, shape: tuple[int, ...], spec: jax.P) -> nnx.Param:
        return nnx.Param(jnp.full(shape, value, jnp.float32, out_sharding=spec))


class Block(nnx.Module):
    """Attention and SwiGLU MLP, each behind an RMSNorm and added to the stream."""

    def __init__(self, config: ModelConfig, key: jax.Array):
        self.config = config
        weights = Weights(key, config.init_std)
        width, heads, kv_heads, head_dim = config.width, config.heads, config.kv_heads, config.head_dim
        self.attention_norm = weights.constant(1.0, (width,), P(None))
        self.q = weights.normal((width, heads, head_dim), P("fsdp", "tensor", None))
        self.k = weights.normal((width, kv_heads, head_dim), P("fsdp", "tensor", None))
        self.v = weights.normal((width, kv_heads, head_dim), P("fsdp", "tensor", None))
        self.o = weights.normal((heads, head_dim, width), P("tensor", None, "fsdp"))
        self.mlp_norm = weights.constant(1.0, (width,), P(None))
        self.gate = weights.normal((width, config.mlp_width), P("fsdp", "tensor"))
        self.up = weights.normal((width, config.mlp_width), P("fsdp", "tensor"))
        self.down = weights.normal((config.mlp_width, width), P("tensor", "fsdp"))
        if config.attention_bias:
            self.q_bias = weights.constant(0.0, (heads, head_dim), P("tensor", None))
            self.k_bias = weights.constant(0.0, (kv_heads, head_dim), P("tensor", None))
            self.v_bias = weights.constant(0.0, (kv_heads, head_dim), P("tensor", None))
            self.o_bias = weights.constant(0.0, (width,), P(None))
        if config.mlp_bias:
            self.gate_bias = weights.constant(0.0, (config.mlp_width,), P("tensor"))
            self.up_bias = weights.constant(0.0, (config.mlp_width,), P("tensor"))
            self.down_bias = weights.constant(0.0, (width,), P(None))

    def __call__(self, stream: jax.Array, rotary: tuple[jax.Array, jax.Array], attend: Attend) -> jax.Array:
        stream = stream + self.attention(rms_norm(stream, self.attention_norm, self.config.norm_eps), rotary, attend)
        return stream + self.mlp(rms_norm(stream, self.mlp_norm, self.config.norm_eps))

    def attention(self, x: jax.Array, rotary: tuple[jax.Array, jax.Array], attend: Attend) -> jax.Array:
        per_head = P(BATCH, None, "tensor", None)

        def project(name: str) -> jax.Array:
            weight = gathered(getattr(self, name), P(None, "tensor", None), x.dtype)
            y = linear("bsd,dhk->bshk", per_head, x, weight)
            if self.config.attention_bias:
                y = y + getattr(self, name + "_bias")[...].astype(x.dtype)
            return y

        query, key = rotate(project("q"), rotary), rotate(project("k"), rotary)
        query, key, value = (checkpoint_name(y, "qkv") for y in (query, key, project("v")))
        context = checkpoint_name(attend(query, key, value), "context")
        out = gathered(self.o, P("tensor", None, None), x.dtype)
        y = linear("bshk,hkd->bsd", STREAM, context, out)
        return y + self.o_bias[...].astype(x.dtype) if self.config.attention_bias else y

    def mlp(self, x: jax.Array) -> jax.Array:
        hidden = P(BATCH, None, "tensor")
        gate = linear("bsd,df->bsf", hidden, x, gathered(self.gate, P(None, "tensor"), x.dtype))
        up = linear("bsd,df->bsf", hidden, x, gathered(self.up, P(None, "tensor"), x.dtype))
        if self.config.mlp_bias:
            gate, up = gate + self.gate_bias[...].astype(x.dtype), up + self.up_bias[...].astype(x.dtype)
        down = gathered(self.down, P("tensor", None), x.dtype)
        y = linear("bsf,fd->bsd", STREAM, jax.nn.silu(gate) * up, down)
        return y + self.down_bias[...].astype(x.dtype) if self.config.mlp_bias else y


class Decoder(nnx.Module):
    """Embedding, stacked blocks, final norm, and the head unless it is the embedding."""

    def __init__(self, config: ModelConfig, key: jax.Array):
        self.config = config
        embed_key, layers_key, head_key = jax.random.split(key, 3)
        table = Weights(embed_key, config.init_std)
        self.embed = table.normal((config.vocab_size, config.width), P("tensor", "fsdp"))
        self.layers = jax.vmap(lambda k: Block(config, k))(jax.random.split(layers_key, config.layers))
        self.norm = table.constant(1.0, (config.width,), P(None))
        if not config.tied_embeddings:
            head = Weights(head_key, config.init_std)
            self.head = head.normal((config.width, config.vocab_size), P("fsdp", "tensor"))

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        attend: Attend,
        dtype: jnp.dtype,
        remat: Remat,
        scan_layers: bool,
    ) -> jax.Array:
        rotary = rotary_factors(positions, self.config.head_dim, self.config.rope_theta, dtype)
        stream = gathered(self.embed, P(None, None), dtype).at[tokens].get(out_sharding=STREAM)

        def layer(stream: jax.Array, block: Block) -> tuple[jax.Array, None]:
            return block(checkpoint_name(stream, "layer_input"), rotary, attend), None

        stream, _ = jax.lax.scan(rematerialized(layer, remat), stream, self.layers, unroll=not scan_layers)
        return rms_norm(stream, self.norm, self.config.norm_eps)


def rematerialized(layer: Callable, remat: Remat) -> Callable:
    """`layer` with the activations named by the policy kept for the backward pass and the rest computed again."""
    policies = jax.checkpoint_policies
    if remat == "none":
        return layer
    policy = {
        "full": policies.nothing_saveable,
        "context": policies.save_only_these_names("context"),
        "qkv_context": policies.save_only_these_names("context", "qkv"),
        "offload": policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=["layer_input", "context", "qkv"],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }[remat]
    return jax.checkpoint(layer, policy=policy, prevent_cse=False)


def gathered(weight: nnx.Param, spec: jax.P, dtype: jnp.dtype) -> jax.Array:
    """The weight in `dtype`, whole over fsdp. The cast comes first: the gather moves the smaller numbers."""
    return jax.reshard(weight[...].astype(dtype), spec)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _linear(subscripts: str, out: jax.P, x: jax.Array, weight: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, x, weight, out_sharding=out)


def linear(subscripts: str, out: jax.P, x: jax.Array, weight: jax.Array) -> jax.Array:
    """`jnp.einsum(subscripts, x, weight, out_sharding=out)`, with the derivative written out.

    The derivative of einsum multiplies with the gradient of the output first, which XLA's CPU backend then turns
    around in memory; here the smaller of the two operands comes first.
    """
    return jnp.asarray(_linear(subscripts, out, x, weight))


def _linear_forward(subscripts: str, out: jax.P, x: jax.Array, weight: jax.Array):
    return linear(subscripts, out, x, weight), (x, weight)


def _linear_backward(subscripts: str, out: jax.P, saved: tuple[jax.Array, jax.Array], gradient: jax.Array):
    x, weight = saved
    operands, y_axes = subscripts.split("->")
    x_axes, w_axes = operands.split(",")
    spec = lambda array: jax.typeof(array).sharding.spec
    x_gradient = jnp.einsum(f"{y_axes},{w_axes}->{x_axes}", gradient, weight, out_sharding=spec(x))
    pair = [(x_axes, x), (y_axes, gradient)]
    (a_axes, a), (b_axes, b) = sorted(pair, key=lambda item: item[1].size)
    return x_gradient, jnp.einsum(f"{a_axes},{b_axes}->{w_axes}", a, b, out_sharding=spec(weight))


_linear.defvjp(_linear_forward, _linear_backward)


def rms_norm(x: jax.Array, scale: nnx.Param, eps: float) -> jax.Array:
    """x / rms(x) in float32, rounded to x's dtype, times the scale (1910.07467; order of casts as in transformers)."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return y.astype(x.dtype) * scale[...].astype(x.dtype)


def rotary_factors(positions: jax.Array, head_dim: int, theta: float, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """cos and sin [batch, length, 1, head_dim / 2] of the rotary angles (2104.09864), computed in float32."""
    frequencies = theta ** -(jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)


def rotate(x: jax.Array, rotary: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotary embedding, half-split layout: feature j is paired with feature j + head_dim / 2."""
    cos, sin = rotary
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
