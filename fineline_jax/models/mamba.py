"""The mixers of Mamba (2312.00752) and Mamba-2 (2405.21060), selective state-space models, and their two sequence
operations: a short causal convolution and the selective scan. Parameters are named as in the authors' code and in
transformers, which hold the parts of in_proj, and of Mamba-2's conv1d, in one tensor."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from fineline_jax.models.cpu_kernels import linear
from fineline_jax.models.layers import Stream, Weights, rms_norm
from fineline_jax.models.sharding import HIDDEN, STREAM, spec

CHUNK = 64
"""Steps between the states that the backward pass finds saved."""


class Mamba(nnx.Module):
    """The mixer of a layer:

    in_proj_x, in_proj_z [width, inner]   conv1d [conv_width, inner]   conv1d_bias [inner]
    x_proj [inner, step_rank + 2 state_size] (to dt, B, C)   dt_proj [step_rank, inner]   dt_proj_bias [inner]
    A_log [inner, state_size]   D [inner]   out_proj [inner, width]
    """

    def __init__(self, weights: Weights, dt_key: jax.Array):
        self.config = config = weights.config
        inner, states = config.mlp_width, config.state_size
        self.in_proj_x = weights.normal("width mlp_width")
        self.in_proj_z = weights.normal("width mlp_width")
        self.conv1d = weights.normal("conv_width mlp_width")
        self.conv1d_bias = weights.constant(0.0, "mlp_width")
        self.x_proj = weights.normal("mlp_width x_proj_width")
        self.dt_proj = weights.normal("step_rank mlp_width")
        self.D = weights.constant(1.0, "mlp_width")
        self.out_proj = weights.normal("mlp_width width")
        rates = jnp.log(jnp.arange(1, states + 1, dtype=jnp.float32))  # as the authors begin
        self.A_log = nnx.Param(jnp.broadcast_to(rates, (inner, states), out_sharding=spec("mlp_width state_size")))
        self.dt_proj_bias = first_steps(dt_key, inner, "mlp_width")

    @jax.named_scope("mamba")
    def __call__(self, y: Stream, select: Callable[[jax.Array], jax.Array]) -> Stream:
        """select: takes the tokens whose output is wanted."""
        dtype = y.dtype
        x = linear("bsd,df->bsf", HIDDEN, y, self.in_proj_x[...])
        z = linear("bsd,df->bsf", HIDDEN, y, self.in_proj_z[...])
        x = jax.nn.silu(causal_convolution(x, self.conv1d[...].astype(dtype), self.conv1d_bias[...].astype(dtype)))
        projected = linear("bsf,fr->bsr", STREAM, x, self.x_proj[...])
        rank, states = self.config.step_rank, self.config.state_size
        dt, b, c = jnp.split(projected, [rank, rank + states], axis=-1)
        if eps := self.config.state_norm_eps:
            dt, b, c = (rms_norm(y, np.ones(()), eps) for y in (dt, b, c))
        dt = linear("bsr,rf->bsf", HIDDEN, dt, self.dt_proj[...]) + self.dt_proj_bias[...].astype(dtype)
        a = rates(self.A_log)
        scanned = selective_scan(x, jax.nn.softplus(dt), a, b, c)
        mixed = (scanned + x * self.D[...]).astype(dtype) * jax.nn.silu(z)
        return linear("bsf,fd->bsd", STREAM, select(mixed), self.out_proj[...])


class Mamba2(nnx.Module):
    """The mixer of a Mamba-2 layer; io: for each group what writes into the states (B), then what reads them (C):

    in_proj_z, in_proj_x [width, inner]   in_proj_io [width, io]   in_proj_dt [width, heads]
    conv1d [conv_width, inner]   conv1d_bias [inner]   conv1d_io [conv_width, io]   conv1d_io_bias [io]
    dt_bias, A_log, D [heads]   inner_norm [inner]   out_proj [inner, width]
    """

    def __init__(self, weights: Weights, dt_key: jax.Array):
        self.config = config = weights.config
        self.in_proj_z = weights.normal("width mlp_width")
        self.in_proj_x = weights.normal("width mlp_width")
        self.in_proj_io = weights.normal("width state_io_width")
        self.in_proj_dt = weights.normal("width state_heads")
        self.conv1d = weights.normal("conv_width mlp_width")
        self.conv1d_bias = weights.constant(0.0, "mlp_width")
        self.conv1d_io = weights.normal("conv_width state_io_width")
        self.conv1d_io_bias = weights.constant(0.0, "state_io_width")
        self.dt_bias = first_steps(dt_key, config.state_heads, "state_heads")
        rates = jnp.log(jnp.arange(1, config.state_heads + 1, dtype=jnp.float32))
        self.A_log = nnx.Param(jax.reshard(rates, spec("state_heads")))
        self.D = weights.constant(1.0, "state_heads")
        self.inner_norm = weights.constant(1.0, "mlp_width")
        self.out_proj = weights.normal("mlp_width width")

    @jax.named_scope("mamba")
    def __call__(self, y: Stream, select: Callable[[jax.Array], jax.Array]) -> Stream:
        """select: takes the tokens whose output is wanted."""
        dtype = y.dtype
        z = linear("bsd,df->bsf", HIDDEN, y, self.in_proj_z[...])
        x = linear("bsd,df->bsf", HIDDEN, y, self.in_proj_x[...])
        io = linear("bsd,df->bsf", STREAM, y, self.in_proj_io[...])
        dt = linear("bsd,dh->bsh", HIDDEN, y, self.in_proj_dt[...]) + self.dt_bias[...].astype(dtype)
        convolved = lambda x, weight, bias: jax.nn.silu(causal_convolution(x, weight.astype(dtype), bias.astype(dtype)))
        x = convolved(x, self.conv1d[...], self.conv1d_bias[...])
        io = convolved(io, self.conv1d_io[...], self.conv1d_io_bias[...])
        a = rates(self.A_log)
        of_heads = spec("state_heads")
        on_device = functools.partial(_local_mamba2, groups=self.config.state_groups, eps=self.config.norm_eps)
        specs = (HIDDEN, HIDDEN, HIDDEN, of_heads, of_heads, STREAM)
        mixed = jax.shard_map(on_device, in_specs=specs, out_specs=HIDDEN, check_vma=False)(
            x, z, jax.nn.softplus(dt), a, self.D[...], io
        )
        mixed = mixed.astype(dtype) * self.inner_norm[...].astype(dtype)
        return linear("bsf,fd->bsd", STREAM, select(mixed), self.out_proj[...])


def _local_mamba2(
    x: jax.Array, z: jax.Array, dt: jax.Array, a: jax.Array, d: jax.Array, io: jax.Array, *, groups: int, eps: float
) -> jax.Array:
    """One device's heads: scan, skip, gate, and an RMS norm over each group's features, which may lie on several."""
    features = x.shape[-1]
    each = lambda of_heads: jnp.repeat(of_heads, features // a.shape[0], axis=-1)
    size = features * jax.lax.axis_size("tensor") // groups
    group = (jax.lax.axis_index("tensor") * features + jnp.arange(features)) // size
    b, c = jnp.split(io, 2, axis=-1)
    y = _local_scan(x, each(dt), each(a)[:, None], b, c, groups, group)
    y = (y + x * each(d)).astype(jnp.float32) * jax.nn.silu(z.astype(jnp.float32))
    squares = jax.lax.psum(jnp.square(y) @ jax.nn.one_hot(group, groups), "tensor")
    return y * jax.lax.rsqrt(squares / size + eps)[..., group]


def rates(log: nnx.Param) -> jax.Array:
    """Of the logarithms that are trained: below 0, float32."""
    return -jnp.exp(log[...].astype(jnp.float32))


def first_steps(key: jax.Array, count: int, axis: str) -> nnx.Param:
    """Biases that give steps from 0.001 to 0.1, evenly in the logarithm, as the authors begin."""
    steps = jax.random.uniform(key, (count,), jnp.float32, out_sharding=spec(axis))
    return nnx.Param(jnp.log(jnp.expm1(0.001 * 100.0**steps)))


def causal_convolution(
    x: Float[Array, "batch length ..."], weight: Float[Array, "tokens ..."], bias: jax.Array | float = 0.0
) -> Float[Array, "batch length ..."]:
    """Each feature's own convolution over its last tokens."""
    tokens, length = weight.shape[0], x.shape[1]
    padded = jnp.pad(x, [(0, 0), (tokens - 1, 0), *[(0, 0)] * (x.ndim - 2)])
    return jnp.add(sum(padded[:, i : i + length] * weight[i] for i in range(tokens)), bias)


def selective_scan(
    x: Float[Array, "batch length features"],
    dt: Float[Array, "batch length features"],
    a: Float[Array, "features state"],
    b: Float[Array, "batch length state"],
    c: Float[Array, "batch length state"],
) -> Float[Array, "batch length features"]:
    """y[t] = state[t] . c[t] with state[t] = exp(dt[t] a) state[t-1] + dt[t] b[t] x[t], per feature; float32.

    x, dt: split over (batch axes, tensor); a: negative, split over tensor. One pass over the sequence that holds one
    state per feature; every device scans its own rows and features. Call it under `jax.set_mesh`.
    """
    specs = (HIDDEN, HIDDEN, spec("mlp_width state_size"), STREAM, STREAM)
    return jax.shard_map(_local_scan, in_specs=specs, out_specs=HIDDEN, check_vma=False)(x, dt, a, b, c)


def _local_scan(
    x: jax.Array, dt: jax.Array, a: jax.Array, b: jax.Array, c: jax.Array, groups: int = 1, group: Any = 0
) -> jax.Array:
    """With groups, b and c are [batch, length, groups * state], and group is that of each feature."""
    batch, length, features = x.shape
    pad = -length % CHUNK
    # [chunks, CHUNK, batch, ...]; a padded token has dt = 0 and leaves the state alone
    cut = lambda y: jnp.pad(y.astype(jnp.float32), ((0, 0), (0, pad), (0, 0))).swapaxes(0, 1)
    inputs = tuple(cut(y).reshape(-1, CHUNK, batch, y.shape[-1]) for y in (x * dt, dt, b, c))

    def one(state: jax.Array, token: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        scaled, dt, b, c = token
        b, c = (y[:, None] if groups == 1 else y.reshape(batch, groups, -1)[:, group] for y in (b, c))
        state = jnp.exp(dt[..., None] * a) * state + scaled[..., None] * b
        return state, jnp.sum(state * c, axis=-1)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def chunk(state: jax.Array, tokens: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        return jax.lax.scan(one, state, tokens, unroll=4)

    state = jnp.zeros((batch, features, b.shape[-1] // groups), jnp.float32)
    _, y = jax.lax.scan(chunk, state, inputs)
    return y.reshape(-1, batch, features)[:length].swapaxes(0, 1)
