"""The products of the decoder and its gated activation, with their derivatives written out for XLA's CPU backend."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

P = jax.P


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _linears(subscripts: str, out: jax.P, x: jax.Array, weights: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    return tuple(jnp.einsum(subscripts, x, weight, out_sharding=out) for weight in weights)


def linears(subscripts: str, out: jax.P, x: jax.Array, weights: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """`jnp.einsum(subscripts, x, weight, out_sharding=out)` of activations [batch, length, ...] and each weight, which
    has the features of x before those of the output; the derivative is written out.

    In einsum's own derivative batch and length are two axes summed over, for which XLA's CPU backend turns an operand
    around in memory; here they are one. Where the outputs are not split over `tensor`, one product makes the gradient
    of x from all outputs side by side, and one the gradients of all weights.
    """
    return tuple(map(jnp.asarray, _linears(subscripts, out, x, weights)))


def linear(subscripts: str, out: jax.P, x: jax.Array, weight: jax.Array) -> jax.Array:
    """`linears` of one weight."""
    return linears(subscripts, out, x, (weight,))[0]


def _linears_forward(subscripts: str, out: jax.P, x: jax.Array, weights: tuple[jax.Array, ...]):
    return linears(subscripts, out, x, weights), (x, weights)


def _linears_backward(subscripts: str, out: jax.P, saved, gradients: tuple[jax.Array, ...]):
    x, weights = saved
    spec = lambda array: jax.typeof(array).sharding.spec
    tokens = x.shape[0] * x.shape[1]
    features = x.size // tokens
    (rows, _, x_split, *_), y_split = spec(x), spec(gradients[0])[2]
    if len(weights) > 1 and jax.sharding.get_abstract_mesh().shape["tensor"] == 1:
        y_split = None
    flat = lambda array, shape, *split: jax.lax.reshape(array, shape, out_sharding=P(*split))
    flat_x = flat(x, (tokens, features), rows, x_split)
    ys = [flat(y, (tokens, y.size // tokens), rows, y_split) for y in gradients]
    ws = [flat(w, (features, w.size // features), x_split, y_split) for w in weights]
    widths = [w.shape[1] for w in ws]
    if y_split is None:
        ys, ws = [jnp.concatenate(ys, axis=1)], [jnp.concatenate(ws, axis=1)]
    parts = [jnp.einsum("ty,xy->tx", y, w, out_sharding=P(rows, x_split)) for y, w in zip(ys, ws)]
    x_gradient = flat(functools.reduce(jnp.add, parts), x.shape, *spec(x))
    w_gradients = [jnp.einsum("tx,ty->xy", flat_x, y, out_sharding=P(x_split, y_split)) for y in ys]
    if y_split is None:
        w_gradients = jnp.split(w_gradients[0], np.cumsum(widths)[:-1], axis=1)
    return x_gradient, tuple(flat(g, w.shape, *spec(w)) for g, w in zip(w_gradients, weights))


_linears.defvjp(_linears_forward, _linears_backward)


@jax.custom_vjp
def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up (2002.05202), in float32, which XLA's CPU backend computes in one pass as it is written here;
    the derivative keeps only the two arguments and computes the rest again."""
    gate32 = gate.astype(jnp.float32)
    return (gate32 / (1.0 + jnp.exp(-gate32)) * up.astype(jnp.float32)).astype(gate.dtype)


def _swiglu_backward(saved: tuple[jax.Array, jax.Array], gradient: jax.Array):
    # Without barriers XLA would keep exp(-gate) of the forward pass, and compute each of three factors in a pass.
    gate, up = jax.lax.optimization_barrier(saved)
    again = jax.lax.optimization_barrier(gate)
    gate32, again32, up32, gradient32 = (x.astype(jnp.float32) for x in (gate, again, up, gradient))
    share = 1.0 / (1.0 + jnp.exp(-gate32))
    of_gate = gradient32 * up32 * share * (1.0 + gate32 * (1.0 - share))
    of_up = gradient32 * again32 / (1.0 + jnp.exp(-again32))
    return of_gate.astype(gate.dtype), of_up.astype(up.dtype)


swiglu.defvjp(lambda gate, up: (swiglu(gate, up), (gate, up)), _swiglu_backward)
