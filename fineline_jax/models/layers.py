"""The parts of a decoder layer: norms, rotary positions, self-attention, the MLP, and how their weights are drawn.

Every weight is cast and gathered where it is used (ZeRO-3); left to the compiler the gather is sometimes turned
into a re-layout of the activations.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from fineline_jax.models.attention import Attend
from fineline_jax.models.config import ModelConfig
from fineline_jax.models.cpu_kernels import linear, linears, swiglu
from fineline_jax.models.sharding import HEADS, HIDDEN, STREAM, spec, without_fsdp

Function = TypeVar("Function", bound=Callable)
Stream = Float[Array, "batch length width"]
Heads = Float[Array, "batch length heads head_dim"]
Rotary = tuple[Float[Array, "batch length 1 rotary_dim"], Float[Array, "batch length 1 rotary_dim"]]
"""cos and signed sin of the angles, see `rotary_factors`."""


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
        others = {"features": config.width, "x_proj_width": config.step_rank + 2 * config.state_size}
        return tuple(others[axis] if axis in others else getattr(config, axis) for axis in axes.split())


def gathered(weight: nnx.Param, dtype: jnp.dtype) -> jax.Array:
    """The weight in `dtype`, whole over fsdp. The cast comes first: the gather moves the smaller numbers."""
    cast = weight[...].astype(dtype)
    return jax.reshard(cast, without_fsdp(jax.typeof(cast).sharding.spec))


def scoped(name: str) -> Callable[[Function], Function]:
    """Decorator: what the function computes bears `name` in the program's metadata, so that a profile can be read."""

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            with jax.named_scope(name):
                return function(*args, **kwargs)

        return cast(Function, run)

    return decorate


class Norm(nnx.Module):
    """RMSNorm, or LayerNorm with a scale and a bias or with neither."""

    def __init__(self, weights: Weights):
        self.config = config = weights.config
        self.scale = weights.constant(1.0, "features") if config.norm != "nonparametric" else None
        self.bias = weights.constant(0.0, "features") if config.norm == "layer" else None

    @scoped("norm")
    def __call__(self, x: Stream) -> Stream:
        if self.config.norm == "rms":
            return rms_norm(x, self.scale, self.config.norm_eps)
        return layer_norm(x, self.scale, self.bias, self.config.norm_eps)


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
        self.o_bias = bias("features", config.attention_bias)
        of = lambda heads: "head_dim" if config.qk_norm_per_head else f"{heads} head_dim"
        self.q_norm = weights.constant(1.0, of("heads")) if config.qk_norm else None
        self.k_norm = weights.constant(1.0, of("kv_heads")) if config.qk_norm else None

    @scoped("attention")
    def __call__(self, x: Stream, rotary: Rotary, attend: Attend) -> Stream:
        """The output projection of `attend(queries, keys, values)`."""
        weights = tuple(gathered(weight, x.dtype) for weight in (self.q, self.k, self.v))
        query, key, value = linears("bsd,dhk->bshk", HEADS, x, weights)
        query = checkpoint_name(rotate(self._finish(query, self.q_bias, self.q_norm), rotary), "qkv")
        key = checkpoint_name(rotate(self._finish(key, self.k_bias, self.k_norm), rotary), "qkv")
        value = checkpoint_name(self._finish(value, self.v_bias), "qkv")
        context = checkpoint_name(attend(query, key, value), "context")
        y = linear("bshk,hkd->bsd", STREAM, context, gathered(self.o, x.dtype))
        return add_bias(y, self.o_bias)

    def _finish(self, y: Heads, bias: nnx.Param | None, norm: nnx.Param | None = None) -> Heads:
        """Projected queries, keys or values with their bias, normalised and clipped."""
        config, y = self.config, add_bias(y, bias)
        if norm is not None:
            y = rms_norm(y, norm, config.norm_eps, -1 if config.qk_norm_per_head else (-2, -1))
        return jnp.clip(y, -config.clip_qkv, config.clip_qkv) if config.clip_qkv else y


class MLP(nnx.Module):
    """SwiGLU, or two projections around an exact GELU. hidden: the field of the config that sizes the hidden layer."""

    def __init__(self, weights: Weights, hidden: str = "mlp_width"):
        self.config = config = weights.config
        gated = config.mlp == "swiglu"
        self.gate = weights.normal(f"width {hidden}") if gated else None
        self.up = weights.normal(f"width {hidden}")
        self.down = weights.normal(f"{hidden} width")
        self.gate_bias = weights.constant(0.0, hidden) if gated and config.mlp_bias else None
        self.up_bias = weights.constant(0.0, hidden) if config.mlp_bias else None
        self.down_bias = weights.constant(0.0, "features") if config.mlp_bias else None

    @scoped("mlp")
    def __call__(self, x: Stream) -> Stream:
        project = lambda weight, bias: add_bias(linear("bsd,df->bsf", HIDDEN, x, gathered(weight, x.dtype)), bias)
        if self.gate is not None:
            hidden = swiglu(project(self.gate, self.gate_bias), project(self.up, self.up_bias))
        else:
            hidden = jax.nn.gelu(project(self.up, self.up_bias), approximate=False)
        y = linear("bsf,fd->bsd", STREAM, hidden, gathered(self.down, x.dtype))
        return add_bias(y, self.down_bias)


def add_bias(y: jax.Array, bias: nnx.Param | None) -> jax.Array:
    return y if bias is None else y + bias[...].astype(y.dtype)


def rms_norm(x: jax.Array, scale: Any, eps: float, axes: int | tuple[int, ...] = -1) -> jax.Array:
    """x / rms(x) over `axes` in float32, rounded to x's dtype, times the scale (1910.07467; order of casts as in
    transformers)."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=axes, keepdims=True) + eps)
    return y.astype(x.dtype) * scale[...].astype(x.dtype)


def layer_norm(x: jax.Array, scale: Any, bias: Any, eps: float) -> jax.Array:
    """(x - mean) / standard deviation, times the scale, plus the bias, in float32 (1607.06450); either may be None."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    y = y if scale is None else y * scale[...].astype(jnp.float32)
    return (y if bias is None else y + bias[...].astype(jnp.float32)).astype(x.dtype)


def rotary_factors(positions: Int[Array, "batch length"], features: int, theta: float, dtype: jnp.dtype) -> Rotary:
    """cos and signed sin of the rotary angles (2104.09864), computed in float32."""
    frequencies = theta ** -(jnp.arange(0, features, 2, dtype=jnp.float32) / features)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    # As a product and not by concatenation, which XLA's CPU backend would compute again wherever the table is used.
    half = np.eye(features // 2, dtype=np.float32)
    spread = lambda table, first: jnp.einsum(
        "bsuj,jk->bsuk", table, np.concatenate([first * half, half], axis=1), precision="highest"
    ).astype(dtype)
    return spread(jnp.cos(angles), 1), spread(jnp.sin(angles), -1)


def rotate(x: Heads, rotary: Rotary) -> Heads:
    """Rotary embedding of the first features, half-split layout: of n, feature j is paired with feature j + n / 2."""
    cos, sin = rotary
    turned, kept = jnp.split(x, [cos.shape[-1]], axis=-1)
    pairs = turned.reshape(*turned.shape[:-1], 2, -1)
    y = turned * cos + jnp.flip(pairs, axis=-2).reshape(turned.shape) * sin
    return jnp.concatenate([y, kept], axis=-1) if kept.shape[-1] else y
