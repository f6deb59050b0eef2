"""The mixer of a Mamba layer, a selective state-space model (2312.00752), and its two sequence operations: a short
causal convolution and the selective scan. Parameters are named as in the authors' code and in transformers, which hold
the two parts of in_proj in one tensor."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from fineline_jax.models.cpu_kernels import linear
from fineline_jax.models.layers import Stream, Weights
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
        # Decay rates 1, 2, ..., and steps from 0.001 to 0.1, evenly in the logarithm, as the authors begin.
        rates = jnp.log(jnp.arange(1, states + 1, dtype=jnp.float32))
        self.A_log = nnx.Param(jnp.broadcast_to(rates, (inner, states), out_sharding=spec("mlp_width state_size")))
        steps = jax.random.uniform(dt_key, (inner,), jnp.float32, out_sharding=spec("mlp_width"))
        self.dt_proj_bias = nnx.Param(jnp.log(jnp.expm1(0.001 * 100.0**steps)))

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
        dt = linear("bsr,rf->bsf", HIDDEN, dt, self.dt_proj[...]) + self.dt_proj_bias[...].astype(dtype)
        a = -jnp.exp(self.A_log[...].astype(jnp.float32))
        scanned = selective_scan(x, jax.nn.softplus(dt), a, b, c)
        mixed = (scanned + x * self.D[...]).astype(dtype) * jax.nn.silu(z)
        return linear("bsf,fd->bsd", STREAM, select(mixed), self.out_proj[...])


def causal_convolution(
    x: Float[Array, "batch length features"], weight: Float[Array, "tokens features"], bias: Float[Array, " features"]
) -> Float[Array, "batch length features"]:
    """Each feature's own convolution over its last tokens."""
    tokens, length = weight.shape[0], x.shape[1]
    padded = jnp.pad(x, ((0, 0), (tokens - 1, 0), (0, 0)))
    return bias + sum(padded[:, i : i + length] * weight[i] for i in range(tokens))


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


def _local_scan(x: jax.Array, dt: jax.Array, a: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
    batch, length, features = x.shape
    pad = -length % CHUNK
    # [chunks, CHUNK, batch, ...]; a padded token has dt = 0 and leaves the state alone
    cut = lambda y: jnp.pad(y.astype(jnp.float32), ((0, 0), (0, pad), (0, 0))).swapaxes(0, 1)
    inputs = tuple(cut(y).reshape(-1, CHUNK, batch, y.shape[-1]) for y in (x * dt, dt, b, c))

    def one(state: jax.Array, token: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        scaled, dt, b, c = token
        state = jnp.exp(dt[..., None] * a) * state + scaled[..., None] * b[:, None, :]
        return state, jnp.sum(state * c[:, None, :], axis=-1)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def chunk(state: jax.Array, tokens: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        return jax.lax.scan(one, state, tokens, unroll=4)

    state = jnp.zeros((batch, features, a.shape[1]), jnp.float32)
    _, y = jax.lax.scan(chunk, state, inputs)
    return y.reshape(-1, batch, features)[:length].swapaxes(0, 1)
