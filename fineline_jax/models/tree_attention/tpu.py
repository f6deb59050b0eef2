"""Attention over prefix-tree rows as a Pallas kernel for TPU: a flash forward pass that visits visible blocks only.

The list of visible key blocks of each block of queries is prefetched, so that the pipeline fetches these and no others;
steps past the end of a list fetch nothing and compute nothing. Mask, maximum and sum are float32.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from fineline_jax.models.tree_attention.blockwise import block_size, visible_blocks

BLOCK = 512
LANES = 128
MASKED = -1e30


def kernel(
    query: jax.Array, key: jax.Array, value: jax.Array, end: jax.Array, *, block: int = BLOCK, interpret: bool = False
) -> jax.Array:
    """`blockwise.reference` on a TPU. The length must be a multiple of 128.

    block: queries and keys per block, halved until it divides the length. interpret: run the kernel's Python (tests).
    """
    batch, length, heads, head_dim = query.shape
    group = heads // key.shape[2]
    block = block_size(length, block)
    blocks = length // block
    order, count = visible_blocks(end, block, block)

    def of_query(row: jax.Array, head: jax.Array, i: jax.Array, step: jax.Array, order, count) -> tuple:
        return row, head, i, 0

    def key_block(row: jax.Array, i: jax.Array, step: jax.Array, order, count) -> jax.Array:
        # Past the end of the list the last block again: the same block is not fetched twice.
        return order[(row * blocks + i) * blocks + jnp.minimum(step, count[row * blocks + i] - 1)]

    def of_key(row: jax.Array, head: jax.Array, i: jax.Array, step: jax.Array, order, count) -> tuple:
        return row, head // group, key_block(row, i, step, order, count), 0

    def of_end(row: jax.Array, head: jax.Array, i: jax.Array, step: jax.Array, order, count) -> tuple:
        return row, 0, key_block(row, i, step, order, count)

    heads_first = (0, 2, 1, 3)
    context = pl.pallas_call(
        functools.partial(_step, blocks=blocks),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, heads, blocks, blocks),
            in_specs=[
                pl.BlockSpec((None, None, block, head_dim), of_query),
                pl.BlockSpec((None, None, block, head_dim), of_key),
                pl.BlockSpec((None, None, block, head_dim), of_key),
                pl.BlockSpec((None, 1, block), of_end),
            ],
            out_specs=pl.BlockSpec((None, None, block, head_dim), of_query),
            scratch_shapes=[
                pltpu.VMEM((block, LANES), jnp.float32),
                pltpu.VMEM((block, LANES), jnp.float32),
                pltpu.VMEM((block, head_dim), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((batch, heads, length, head_dim), query.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")),
        interpret=interpret,
    )(
        order.reshape(-1),
        count.reshape(-1),
        (query * head_dim**-0.5).transpose(heads_first),
        key.transpose(heads_first),
        value.transpose(heads_first),
        end[:, None, :],
    )
    return context.transpose(heads_first)


def _step(order, count, query, key, value, end, out, largest, total, context, *, blocks: int) -> None:
    """One block of queries against one block of keys; the state stays in scratch memory between steps."""
    row, i, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    block = query.shape[0]
    listed = row * blocks + i
    # Products of float32 numbers are exact to float32; the default would round them to bfloat16 first.
    precision = jax.lax.Precision.HIGHEST if query.dtype == jnp.float32 else jax.lax.Precision.DEFAULT

    @pl.when(step == 0)
    def start() -> None:
        largest[...] = jnp.full(largest.shape, MASKED, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)
        context[...] = jnp.zeros(context.shape, jnp.float32)

    @pl.when(step < count[listed])
    def add() -> None:
        dot = functools.partial(jax.lax.dot_general, precision=precision, preferred_element_type=jnp.float32)
        first_key = order[listed * blocks + step] * block
        positions = i * block + jax.lax.broadcasted_iota(jnp.int32, (block, block), 0)
        keys = first_key + jax.lax.broadcasted_iota(jnp.int32, (block, block), 1)
        seen = (keys <= positions) & (positions < end[...])
        scores = jnp.where(seen, dot(query[...], key[...], (((1,), (1,)), ((), ()))), MASKED)
        old = largest[:, :1]
        new = jnp.maximum(old, jnp.max(scores, axis=1, keepdims=True))
        # A query that has seen nothing yet has new = MASKED, where exp(0) would count.
        weights = jnp.where(seen, jnp.exp(scores - new), 0.0)
        fade = jnp.exp(old - new)
        largest[...] = jnp.broadcast_to(new, largest.shape)
        total[...] = total[...] * fade + jnp.sum(weights, axis=1, keepdims=True)
        part = dot(weights.astype(value.dtype), value[...], (((1,), (0,)), ((), ())))
        context[...] = context[...] * fade + part

    @pl.when(step == blocks - 1)
    def finish() -> None:
        out[...] = (context[...] / total[:, :1]).astype(out.dtype)
