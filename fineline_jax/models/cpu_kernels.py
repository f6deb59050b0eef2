"""Linear layers and SwiGLU with derivatives written out: for XLA's CPU backend, and on every other platform so that a
weight's gradient is scattered as it is summed.

Both keep for the backward pass what they were given and nothing else.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from fineline_jax.mesh import BATCH, scattered_sum
from fineline_jax.models.sharding import without_fsdp

P = jax.P
Arrays = tuple[jax.Array, ...]


def linears(subscripts: str, out: jax.P, x: Float[Array, "batch length ..."], weights: Arrays) -> Arrays:
    """`jnp.einsum(subscripts, x, weight, out_sharding=out)` of activations and each weight, which has the features of x
    before those of the output. A weight lies as the parameters do and may have another dtype: it is gathered and cast
    here (ZeRO-3). A policy of recomputation without "gathered" gathers it for the backward pass once more."""
    whole = tuple(checkpoint_name(gathered(jax.lax.stop_gradient(weight), x.dtype), "gathered") for weight in weights)
    return tuple(map(jnp.asarray, _linears(subscripts, out, x, weights, whole)))


def linear(subscripts: str, out: jax.P, x: Float[Array, "batch length ..."], weight: jax.Array) -> jax.Array:
    """`linears` of one weight."""
    return linears(subscripts, out, x, (weight,))[0]


def gathered(weight: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The weight in `dtype`, whole over fsdp. The cast comes first: the gather moves the smaller numbers. Left to the
    compiler the gather is sometimes turned into a re-layout of the activations."""
    cast = weight.astype(dtype)
    return jax.reshard(cast, without_fsdp(jax.typeof(cast).sharding.spec))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _linears(subscripts: str, out: jax.P, x: jax.Array, weights: Arrays, whole: Arrays) -> Arrays:
    return tuple(jnp.einsum(subscripts, x, weight, out_sharding=out) for weight in whole)


def _linears_backward(subscripts: str, out: jax.P, saved: tuple[jax.Array, Arrays, Arrays], gradients: Arrays):
    scattering = functools.partial(_scattering_linears_backward, subscripts)
    return *jax.lax.platform_dependent(*saved, gradients, cpu=_cpu_linears_backward, default=scattering), None


def _scattering_linears_backward(subscripts: str, x: jax.Array, weights: Arrays, whole: Arrays, gradients: Arrays):
    """Every device sums over its own rows; the sums over devices are scattered over fsdp. Einsum's own derivative is
    the whole gradient on every device, of which each then takes its part: twice the traffic."""
    of_x, of_w, of_y = subscripts.replace("->", ",").split(",")
    spec = lambda array: jax.typeof(array).sharding.spec

    def of_weight(weight: jax.Array, y: jax.Array) -> jax.Array:
        axis = spec(weight).index("fsdp") if "fsdp" in spec(weight) else None

        def local(x: jax.Array, y: jax.Array) -> jax.Array:
            if axis is None:
                return jax.lax.psum(jnp.einsum(f"{of_x},{of_y}->{of_w}", x, y), BATCH)
            part = jnp.einsum(f"{of_x},{of_y}->{of_w[axis] + of_w.replace(of_w[axis], '')}", x, y)
            # TPUs scatter the first of three axes, of which the last fills the lanes; of two they sum the whole.
            lanes = math.gcd(part[0].size, 128)
            own = jax.lax.psum(scattered_sum(part.reshape(len(part), -1, lanes)), "replica")
            own = own.reshape(-1, *part.shape[1:])
            return jnp.moveaxis(own, 0, axis)

        mapped = jax.shard_map(local, in_specs=(spec(x), spec(y)), out_specs=spec(weight), check_vma=False)
        return mapped(x, y).astype(weight.dtype)

    parts = (
        jnp.einsum(f"{of_y},{of_w}->{of_x}", y, weight, out_sharding=spec(x)) for weight, y in zip(whole, gradients)
    )
    return functools.reduce(jnp.add, parts), tuple(map(of_weight, weights, gradients))


def _cpu_linears_backward(x: jax.Array, stored: Arrays, weights: Arrays, gradients: Arrays):
    """In einsum's own derivative batch and length are two axes summed over, for which XLA's CPU backend transposes an
    operand in memory; here they are one. Where the outputs are not split over `tensor`, one product makes the gradient
    of x from all outputs side by side, and one the gradients of all weights."""
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
    whole = (flat(g, w.shape, *spec(w)) for g, w in zip(w_gradients, weights))
    return x_gradient, tuple(jax.reshard(g, spec(w)).astype(w.dtype) for g, w in zip(whole, stored))


_linears.defvjp(lambda *args: (_linears(*args), args[2:]), _linears_backward)


@jax.custom_vjp
def swiglu(gate: Float[Array, "batch length hidden"], up: Float[Array, "batch length hidden"]) -> jax.Array:
    """silu(gate) * up (2002.05202), computed in float32 and rounded once."""
    return jax.lax.platform_dependent(gate, up, cpu=_cpu_swiglu, default=plain_swiglu)


def plain_swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    return (jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(gate.dtype)


def _cpu_swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """XLA's CPU backend computes it in one pass as it is written here."""
    gate32 = gate.astype(jnp.float32)
    return (gate32 / (1.0 + jnp.exp(-gate32)) * up.astype(jnp.float32)).astype(gate.dtype)


def _swiglu_backward(saved: tuple[jax.Array, jax.Array], gradient: jax.Array):
    plain = lambda gate, up, gradient: jax.vjp(plain_swiglu, gate, up)[1](gradient)
    return jax.lax.platform_dependent(*saved, gradient, cpu=_cpu_swiglu_backward, default=plain)


def _cpu_swiglu_backward(gate: jax.Array, up: jax.Array, gradient: jax.Array):
    # Without barriers XLA would keep exp(-gate) of the forward pass, and compute each of three factors in a pass.
    gate, up = jax.lax.optimization_barrier((gate, up))
    again = jax.lax.optimization_barrier(gate)
    gate32, again32, up32, gradient32 = (x.astype(jnp.float32) for x in (gate, again, up, gradient))
    share = 1.0 / (1.0 + jnp.exp(-gate32))
    of_gate = gradient32 * up32 * share * (1.0 + gate32 * (1.0 - share))
    of_up = gradient32 * again32 / (1.0 + jnp.exp(-again32))
    return of_gate.astype(gate.dtype), of_up.astype(up.dtype)


swiglu.defvjp(lambda gate, up: (swiglu(gate, up), (gate, up)), _swiglu_backward)
