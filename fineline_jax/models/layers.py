"""The parts of a decoder layer: norms, self-attention, the MLP, and how their weights are drawn."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from fineline_jax.models.attention import Attend
from fineline_jax.models.config import GATED, ModelConfig
from fineline_jax.models.cpu_kernels import linear, linears, swiglu
from fineline_jax.models.rotary import Rotary, rotate
from fineline_jax.models.sharding import HEADS, HIDDEN, STREAM, spec

Stream = Float[Array, "batch length width"]
Heads = Float[Array, "batch length heads head_dim"]


@dataclasses.dataclass
class Weights:
    """Draws the weights of one part after the other from one key; `axes` name sizes and partition (see `sharding`)."""

    config: ModelConfig
    key: jax.Array

    def normal(self, axes: str) -> nnx.Param:
        self.key, key = jax.random.split(self.key)
        drawn = jax.random.normal(key, self.shape(axes), jnp.float32, out_sharding=spec(axes))
        return nnx.Param(self.config.init_std * drawn)

    def constant(self, value: float, axes: str) -> nnx.Param:
        return nnx.Param(jnp.full(self.shape(axes), value, jnp.float32, out_sharding=spec(axes)))

    def shape(self, axes: str) -> tuple[int, ...]:
        config = self.config
        others = {"features": config.width, "x_proj_width": config.step_rank + 2 * config.state_size, "one": 1}
        others |= {"q_latent": config.q_lora_rank, "kv_latent": config.kv_lora_rank}
        return tuple(others[axis] if axis in others else getattr(config, axis) for axis in axes.split())


class Norm(nnx.Module):
    """RMSNorm, or LayerNorm with a scale and a bias, a scale, or neither."""

    def __init__(self, weights: Weights):
        self.config = config = weights.config
        self.scale = weights.constant(1.0 - config.norm_offset, "features") if config.norm != "nonparametric" else None
        self.bias = weights.constant(0.0, "features") if config.norm == "layer" else None

    @jax.named_scope("norm")
    def __call__(self, x: Stream) -> Stream:
        eps, offset = self.config.norm_eps, self.config.norm_offset
        if self.config.norm == "rms":
            return rms_norm(x, self.scale, eps, offset=offset)
        return layer_norm(x, self.scale, self.bias, eps, offset)


class Attention(nnx.Module):
    """Self-attention with rotary positions, grouped queries, and the flags of its relatives."""

    def __init__(self, weights: Weights):
        self.config = config = weights.config
        self.q = weights.normal("width heads head_dim")
        self.k = weights.normal("width kv_heads head_dim")
        self.v = weights.normal("width kv_heads head_dim")
        self.o = weights.normal("heads head_dim width")
        bias = lambda axes, given: weights.constant(0.0, axes) if given else None
        self.q_bias = bias("heads head_dim", config.has_qkv_bias)
        self.k_bias = bias("kv_heads head_dim", config.has_qkv_bias)
        self.v_bias = bias("kv_heads head_dim", config.has_qkv_bias)
        self.o_bias = bias("features", config.attention_bias or config.output_bias)
        of = lambda heads: "head_dim" if config.qk_norm_per_head else f"{heads} head_dim"
        self.q_norm = weights.constant(1.0 - config.norm_offset, of("heads")) if config.qk_norm else None
        self.k_norm = weights.constant(1.0 - config.norm_offset, of("kv_heads")) if config.qk_norm else None

    @jax.named_scope("attention")
    def __call__(self, x: Stream, rotary: Rotary | None, attend: Attend) -> Stream:
        """The output projection of `attend(queries, keys, values)`."""
        query, key, value = linears("bsd,dhk->bshk", HEADS, x, (self.q[...], self.k[...], self.v[...]))
        query = checkpoint_name(self._finish(query, self.q_bias, self.q_norm, rotary), "qkv")
        key = checkpoint_name(self._finish(key, self.k_bias, self.k_norm, rotary), "qkv")
        value = checkpoint_name(self._finish(value, self.v_bias), "qkv")
        if self.config.attention_scale:
            query = query * self.config.query_scale
        y = linear("bshk,hkd->bsd", STREAM, attend(query, key, value), self.o[...])
        return add_bias(y, self.o_bias)

    def _finish(
        self, y: Heads, bias: nnx.Param | None, norm: nnx.Param | None = None, rotary: Rotary | None = None
    ) -> Heads:
        """Projected queries, keys or values with their bias, normalised, clipped and rotated."""
        config, y = self.config, add_bias(y, bias)
        turn = lambda y: y if rotary is None else rotate(y, rotary, config.rotary_interleaved)
        if config.qk_norm_after_rotary:
            y = turn(y)
        if norm is not None:
            axes = -1 if config.qk_norm_per_head else (-2, -1)
            y = rms_norm(y, norm, config.norm_eps, axes, config.norm_offset)
        y = jnp.clip(y, -config.clip_qkv, config.clip_qkv) if config.clip_qkv else y
        return y if config.qk_norm_after_rotary else turn(y)


LATENT_EPS = 1e-6
"""Of the norms of short vectors, whatever the model's own (transformers' DeepseekV2Attention)."""


class LatentAttention(nnx.Module):
    """Latent attention (2405.04434): keys and values of all heads are made from one short vector a token. Keys have a
    part that rotates, the same for all heads, and a part of each head.

    q [width, heads, head_dim], or q_a [width, rank]   q_a_norm [rank]   q_b [rank, heads, head_dim], of q_lora_rank
    kv_a [width, kv_lora_rank]   kv_a_norm [kv_lora_rank]   k_rope [width, rotary_dim]
    k_b [kv_lora_rank, heads, nope_head_dim]   v_b [kv_lora_rank, heads, v_head_dim]   o [heads, v_head_dim, width]
    """

    def __init__(self, weights: Weights):
        self.config = config = weights.config
        short = config.q_lora_rank > 0
        self.q = None if short else weights.normal("width heads head_dim")
        self.q_a = weights.normal("features q_lora_rank") if short else None
        self.q_a_norm = weights.constant(1.0, "q_latent") if short else None
        self.q_b = weights.normal("q_lora_rank heads head_dim") if short else None
        self.kv_a = weights.normal("features kv_lora_rank")
        self.kv_a_norm = weights.constant(1.0, "kv_latent")
        self.k_rope = weights.normal("width rotary_dim")
        self.k_b = weights.normal("kv_lora_rank heads nope_head_dim")
        self.v_b = weights.normal("kv_lora_rank heads v_head_dim")
        self.o = weights.normal("heads v_head_dim width")

    @jax.named_scope("attention")
    def __call__(self, x: Stream, rotary: Rotary | None, attend: Attend) -> Stream:
        """The output projection of `attend(queries, keys, values)`, the values with zeros up to head_dim features."""
        config = self.config
        turn = lambda y: y if rotary is None else rotate(y, rotary, config.rotary_interleaved)
        if self.q is not None:
            query = linear("bsd,dhk->bshk", HEADS, x, self.q[...])
        else:
            assert self.q_a is not None and self.q_b is not None
            short = rms_norm(linear("bsd,dr->bsr", STREAM, x, self.q_a[...]), self.q_a_norm, LATENT_EPS)
            query = linear("bsr,rhk->bshk", HEADS, short, self.q_b[...])
        short = rms_norm(linear("bsd,dr->bsr", STREAM, x, self.kv_a[...]), self.kv_a_norm, LATENT_EPS)
        k_rope = turn(linear("bsd,dr->bsr", STREAM, x, self.k_rope[...])[:, :, None])
        key, value = linears("bsr,rhk->bshk", HEADS, short, (self.k_b[...], self.v_b[...]))
        k_rope = jnp.broadcast_to(k_rope, (*key.shape[:3], k_rope.shape[3]), out_sharding=HEADS)
        still, turned = jnp.split(query * config.query_scale, [config.nope_head_dim], axis=-1)
        query = jnp.concatenate([still, turn(turned)], axis=-1)
        key = jnp.concatenate([key, k_rope], axis=-1)
        value = jnp.pad(value, [(0, 0)] * 3 + [(0, config.head_dim - config.v_head_dim)])
        context = attend(*(checkpoint_name(y, "qkv") for y in (query, key, value)))[..., : config.v_head_dim]
        return linear("bshk,hkd->bsd", STREAM, context, self.o[...])


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}
"""Of the kinds of `ModelConfig.mlp` without a gate and without weights of their own."""


class MLP(nnx.Module):
    """A gated MLP, or two projections around a function. hidden: the field that sizes the hidden layer."""

    def __init__(self, weights: Weights, hidden: str = "mlp_width"):
        self.config = config = weights.config
        gated = config.mlp in GATED
        self.gate = weights.normal(f"width {hidden}") if gated else None
        self.up = weights.normal(f"width {hidden}")
        self.down = weights.normal(f"{hidden} width")
        self.gate_bias = weights.constant(0.0, hidden) if gated and config.mlp_bias else None
        self.up_bias = weights.constant(0.0, hidden) if config.mlp_bias else None
        self.down_bias = weights.constant(0.0, "features") if config.mlp_bias else None
        # xIELU's own numbers at its authors' start: softplus(alpha_p) = 0.8, softplus(alpha_n) = 0.8 - beta.
        start = {"alpha_p": math.log(math.expm1(0.8)), "alpha_n": math.log(math.expm1(0.3)), "beta": 0.5, "eps": -1e-6}
        axes = lambda name: "one" if name.startswith("alpha") else ""
        made = lambda name: weights.constant(start[name], axes(name)) if config.mlp == "xielu" else None
        self.alpha_p, self.alpha_n, self.beta, self.eps = map(made, start)

    @jax.named_scope("mlp")
    def __call__(self, x: Stream) -> Stream:
        project = lambda weight, bias: add_bias(linear("bsd,df->bsf", HIDDEN, x, weight[...]), bias)
        kind, up = self.config.mlp, project(self.up, self.up_bias)
        if self.gate is not None:
            gate = project(self.gate, self.gate_bias)
            hidden = swiglu(gate, up) if kind == "swiglu" else ACTIVATIONS[kind.replace("geglu", "gelu")](gate) * up
        else:
            hidden = self._xielu(up) if kind == "xielu" else ACTIVATIONS[kind](up)
        y = linear("bsf,fd->bsd", STREAM, hidden, self.down[...])
        return add_bias(y, self.down_bias)

    def _xielu(self, x: jax.Array) -> jax.Array:
        """x (alpha_p x + beta) above 0, else alpha_n (expm1(x) - x) + beta x (2411.13010); beta and eps are fixed."""
        weight = lambda param: cast(nnx.Param, param)[...].astype(x.dtype)
        beta, eps = (jax.lax.stop_gradient(weight(param)) for param in (self.beta, self.eps))
        above, below = jax.nn.softplus(weight(self.alpha_p)), beta + jax.nn.softplus(weight(self.alpha_n))
        return jnp.where(x > 0, above * x * x, below * (jnp.expm1(jnp.minimum(x, eps)) - x)) + beta * x


def add_bias(y: jax.Array, bias: nnx.Param | None) -> jax.Array:
    return y if bias is None else y + bias[...].astype(y.dtype)


def rms_norm(x: jax.Array, scale: Any, eps: float, axes: int | tuple[int, ...] = -1, offset: float = 0.0) -> jax.Array:
    """x / rms(x) over `axes` in float32, rounded to x's dtype, times the scale (1910.07467; order of casts as in
    transformers, which with an offset, added to the scale, rounds last)."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=axes, keepdims=True) + eps)
    if offset:
        return (y * (offset + scale[...].astype(jnp.float32))).astype(x.dtype)
    return y.astype(x.dtype) * scale[...].astype(x.dtype)


def layer_norm(x: jax.Array, scale: Any, bias: Any, eps: float, offset: float = 0.0) -> jax.Array:
    """(x - mean) / standard deviation, times the scale, plus the bias, in float32 (1607.06450); either may be None."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    y = y if scale is None else y * (scale[...].astype(jnp.float32) + offset)
    return (y if bias is None else y + bias[...].astype(jnp.float32)).astype(x.dtype)
