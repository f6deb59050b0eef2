"""The two sequence operations of a Mamba layer (2312.00752): a short causal convolution and the selective scan."""

import functools

import jax
import jax.numpy as jnp

from fineline_jax.mesh import BATCH

P = jax.P
CHUNK = 64
"""Steps between the states that the backward pass finds saved."""


def causal_convolution(x: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
    """Each feature's own convolution over its last tokens: x [batch, length, features], weight [tokens, features]."""
    tokens, length = weight.shape[0], x.shape[1]
    padded = jnp.pad(x, ((0, 0), (tokens - 1, 0), (0, 0)))
    return bias + sum(padded[:, i : i + length] * weight[i] for i in range(tokens))


def selective_scan(x: jax.Array, step: jax.Array, a: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
    """y[t] = state[t] . c[t] with state[t] = exp(step[t] a) state[t-1] + step[t] b[t] x[t], per feature; float32.

    x, step [batch, length, features], split over (batch axes, tensor); a [features, state], negative, split over
    tensor; b, c [batch, length, state]. Returns [batch, length, features]. One pass over the sequence that holds one
    state per feature; every device scans its own rows and features. Call it under `jax.set_mesh`.
    """
    features, states = P(BATCH, None, "tensor"), P(BATCH, None, None)
    specs = (features, features, P("tensor", None), states, states)
    return jax.shard_map(_local_scan, in_specs=specs, out_specs=features, check_vma=False)(x, step, a, b, c)


def _local_scan(x: jax.Array, step: jax.Array, a: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
    batch, length, features = x.shape
    pad = -length % CHUNK
    # [chunks, CHUNK, batch, ...]; a padded step has size 0 and leaves the state alone
    cut = lambda y: jnp.pad(y.astype(jnp.float32), ((0, 0), (0, pad), (0, 0))).swapaxes(0, 1)
    inputs = tuple(cut(y).reshape(-1, CHUNK, batch, y.shape[-1]) for y in (x * step, step, b, c))

    def one(state: jax.Array, token: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        scaled, step, b, c = token
        state = jnp.exp(step[..., None] * a) * state + scaled[..., None] * b[:, None, :]
        return state, jnp.sum(state * c[:, None, :], axis=-1)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def chunk(state: jax.Array, tokens: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        return jax.lax.scan(one, state, tokens, unroll=4)

    state = jnp.zeros((batch, features, a.shape[1]), jnp.float32)
    _, y = jax.lax.scan(chunk, state, inputs)
    return y.reshape(-1, batch, features)[:length].swapaxes(0, 1)
