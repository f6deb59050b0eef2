"""The mixer of Gated DeltaNet (2412.06464): a state per head that forgets, and is corrected by the difference of a
value and what the state holds for its key. Parameters are named as in transformers."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from fineline_jax.models.cpu_kernels import linear, linears
from fineline_jax.models.layers import Heads, Stream, Weights, rms_norm
from fineline_jax.models.mamba import causal_convolution, first_steps, rates
from fineline_jax.models.sharding import HEADS, HIDDEN, STREAM, spec

CHUNK = 64
"""Tokens whose corrections are solved for at once."""
Select = Callable[[jax.Array], jax.Array]


class GatedDelta(nnx.Module):
    """The mixer of a layer; keys: heads of queries and keys, each shared by value heads next to each other:

    q, k [width, keys, state_size]   v, g [width, heads, value_dim]   a, b [width, heads] (to decays and strengths)
    q_conv, k_conv [conv_width, keys, state_size]   v_conv [conv_width, heads, value_dim]
    A_log, dt_bias [heads]   inner_norm [value_dim]   o [heads, value_dim, width]
    """

    def __init__(self, weights: Weights, key: jax.Array):
        self.config = config = weights.config
        self.q, self.k = (weights.normal("width key_heads state_size") for _ in "qk")
        self.v, self.g = (weights.normal("width state_heads value_dim") for _ in "vg")
        self.a, self.b = (weights.normal("width state_heads") for _ in "ab")
        self.q_conv, self.k_conv = (weights.normal("conv_width key_heads state_size") for _ in "qk")
        self.v_conv = weights.normal("conv_width state_heads value_dim")
        rates_key, steps_key = jax.random.split(key)
        drawn = jax.random.uniform(rates_key, (config.state_heads,), jnp.float32, out_sharding=spec("state_heads"))
        self.A_log = nnx.Param(jnp.log(16.0 * (1.0 - drawn)))  # rates from 0 to 16, as the authors begin
        self.dt_bias = first_steps(steps_key, config.state_heads, "state_heads")
        self.inner_norm = weights.constant(1.0, "value_dim")
        self.o = weights.normal("state_heads value_dim width")

    @jax.named_scope("gated_delta")
    def __call__(self, x: Stream, select: Select) -> Stream:
        """select: takes the tokens whose output is wanted."""
        config, dtype = self.config, x.dtype
        query, key, value, gate = linears(
            "bsd,dhk->bshk", HEADS, x, (self.q[...], self.k[...], self.v[...], self.g[...])
        )
        step, strength = linears("bsd,dh->bsh", HIDDEN, x, (self.a[...], self.b[...]))
        convolved = lambda y, weight: jax.nn.silu(causal_convolution(y, weight[...].astype(dtype)))
        query, key = convolved(query, self.q_conv), convolved(key, self.k_conv)
        value = convolved(value, self.v_conv)
        step, strength = step.astype(jnp.float32) + self.dt_bias[...], strength.astype(jnp.float32)
        strength = jax.nn.sigmoid(strength) * (2.0 if config.negative_eigenvalues else 1.0)
        read = gated_delta_rule(query, key, value, rates(self.A_log) * jax.nn.softplus(step), strength)
        gated = rms_norm(read, self.inner_norm, config.state_norm_eps or config.norm_eps).astype(jnp.float32)
        gated = (gated * jax.nn.silu(gate.astype(jnp.float32))).astype(dtype)
        return linear("bshk,hkd->bsd", STREAM, select(gated), self.o[...])


def gated_delta_rule(
    query: Float[Array, "batch length keys state"],
    key: Float[Array, "batch length keys state"],
    value: Heads,
    decay: Float[Array, "batch length heads"],
    strength: Float[Array, "batch length heads"],
) -> Heads:
    """y[t] = query[t] S[t] / sqrt(state), with S[t] = exp(decay[t]) S[t-1] + strength[t] key[t] (value[t] -
    key[t] exp(decay[t]) S[t-1]) per head; queries and keys are scaled to length 1 before. In float32, the result in
    the dtype of the values.

    All split over (batch axes, tensor); decay: not above 0. Every device computes its own rows and heads. Call it
    under `jax.set_mesh`.
    """
    specs = (HEADS, HEADS, HEADS, HIDDEN, HIDDEN)
    mapped = jax.shard_map(_local_rule, in_specs=specs, out_specs=HEADS, check_vma=False)
    return mapped(query, key, value, decay, strength)


def _local_rule(query: jax.Array, key: jax.Array, value: jax.Array, decay: jax.Array, strength: jax.Array) -> jax.Array:
    """Chunk by chunk: what all tokens of a chunk write is the solution of one triangular system (the WY form of the
    paper), so that products of matrices take the place of a step per token."""
    batch, length, heads, features = value.shape
    size = min(CHUNK, 1 << (length - 1).bit_length())

    def cut(x: jax.Array) -> jax.Array:
        """[chunks, batch, heads, size, ...]; a padded token writes nothing and lets the state be."""
        x = jnp.pad(x.astype(jnp.float32), [(0, 0), (0, -length % size), *[(0, 0)] * (x.ndim - 2)])
        x = jnp.repeat(x, heads // x.shape[2], axis=2).reshape(batch, -1, size, heads, *x.shape[3:])
        return x.transpose(1, 0, 3, 2, *range(4, x.ndim))

    unit = lambda x: x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)
    query, key, value = unit(cut(query)) * query.shape[-1] ** -0.5, unit(cut(key)), cut(value)
    strength, so_far = cut(strength)[..., None], jnp.cumsum(cut(decay), axis=-1)[..., None]
    lower = np.tril(np.ones((size, size), bool))
    between = jnp.exp(jnp.where(lower, so_far - so_far.swapaxes(-1, -2), -jnp.inf))
    turned = key.swapaxes(-1, -2)
    inverse = unit_lower_inverse((strength * key) @ turned * between)
    written, of_state = inverse @ (strength * value), inverse @ (strength * jnp.exp(so_far) * key)
    reads = query @ turned * between

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def chunk(state: jax.Array, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        query, turned, so_far, written, of_state, reads = inputs
        written = written - of_state @ state
        left = jnp.exp(so_far[..., -1:, :] - so_far).swapaxes(-1, -2)
        read = (jnp.exp(so_far) * query) @ state + reads @ written
        return jnp.exp(so_far[..., -1:, :]) * state + (turned * left) @ written, read

    state = jnp.zeros((batch, heads, key.shape[-1], features), jnp.float32)
    _, read = jax.lax.scan(chunk, state, (query, turned, so_far, written, of_state, reads))
    read = read.transpose(1, 0, 3, 2, 4).reshape(batch, -1, heads, features)
    return read[:, :length].astype(value.dtype)


def unit_lower_inverse(x: Float[Array, "*batch size size"]) -> Float[Array, "*batch size size"]:
    """Of the triangular matrices with ones on the diagonal and x below it; size: a power of two. By products, from
    blocks of 1 to those of half the size: [[a, 0], [b, c]] has the inverse [[a', 0], [-c' b a', c']]. XLA's own solver
    on CPU waits for threads that other devices hold while they wait for this one."""
    size, batch = x.shape[-1], x.shape[:-2]
    inverse = jnp.ones((*batch, size, 1, 1), x.dtype)
    for half in (1 << n for n in range(size.bit_length() - 1)):
        pairs, count = inverse.reshape(*batch, -1, 2, half, half), size // (2 * half)
        first, second = pairs[..., 0, :, :], pairs[..., 1, :, :]
        blocks = jnp.diagonal(x.reshape(*batch, count, 2 * half, count, 2 * half), axis1=-4, axis2=-2)
        below = -second @ jnp.moveaxis(blocks, -1, -3)[..., half:, :half] @ first
        upper = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
        inverse = jnp.concatenate([upper, jnp.concatenate([below, second], axis=-1)], axis=-2)
    return inverse.reshape(x.shape)
