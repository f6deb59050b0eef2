"""Attention over prefix-tree rows as a Pallas kernel for CUDA (Triton): a flash forward pass over visible blocks only.

One program is a block of queries of one head; it walks the list of key blocks that some of its queries see. Mask,
maximum and sum are float32 and stay in registers.
"""

import functools
import warnings

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from fineline_jax.models.tree_attention.blockwise import block_size, visible_blocks

BLOCKS = {
    ("bfloat16", 64): (128, 64),
    ("bfloat16", 128): (128, 64),
    ("bfloat16", 256): (128, 64),
    ("float32", 64): (32, 32),
    ("float32", 128): (64, 32),
    ("float32", 256): (32, 32),
}
"""Queries and keys of a block, by dtype and features of a head, filled up to a power of two: the largest of which
ptxas keeps all in registers on Hopper (sm_90a)."""
MASKED = -1e30

# JAX 0.12 warns where the kernel is lowered. Its successor, Mosaic GPU, needs Hopper; this one runs from Ampere on.
warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)


def kernel(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    end: jax.Array,
    *,
    query_block: int | None = None,
    key_block: int | None = None,
    interpret: bool = False,
) -> jax.Array:
    """`blockwise.reference` on a GPU. The length must be a multiple of 16.

    query_block, key_block: default: from BLOCKS. Blocks are halved until they divide the length. interpret: run the
    kernel's Python (tests).
    """
    batch, length, heads, head_dim = query.shape
    group = heads // key.shape[2]
    # Triton's blocks are powers of two; zeros change no inner product.
    padded = max(16, 1 << (head_dim - 1).bit_length())
    best = BLOCKS["float32" if query.dtype == jnp.float32 else "bfloat16", min(max(padded, 64), 256)]
    query_block, key_block = block_size(length, query_block or best[0]), block_size(length, key_block or best[1])
    order, count = visible_blocks(end, query_block, key_block)
    widen = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, padded - head_dim)))
    context = pl.pallas_call(
        functools.partial(_block_of_queries, key_block=key_block),
        grid=(length // query_block, heads, batch),
        in_specs=[
            pl.BlockSpec((None, query_block, None, padded), lambda i, head, row: (row, i, head, 0)),
            pl.BlockSpec((None, length, None, padded), lambda i, head, row: (row, 0, head // group, 0)),
            pl.BlockSpec((None, length, None, padded), lambda i, head, row: (row, 0, head // group, 0)),
            pl.BlockSpec((None, length), lambda i, head, row: (row, 0)),
            pl.BlockSpec((None, None, length // key_block), lambda i, head, row: (row, i, 0)),
            pl.BlockSpec((None, None), lambda i, head, row: (row, i)),
        ],
        out_specs=pl.BlockSpec((None, query_block, None, padded), lambda i, head, row: (row, i, head, 0)),
        out_shape=jax.ShapeDtypeStruct((batch, length, heads, padded), query.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=8 if padded >= 128 else 4, num_stages=2),
        interpret=interpret,
        name="tree_attention",
    )(widen(query * head_dim**-0.5), widen(key), widen(value), end, order, count)
    return context[..., :head_dim]


def _block_of_queries(query, key, value, end, order, count, out, *, key_block: int) -> None:
    queries = query[...]
    block, features = queries.shape
    positions = pl.program_id(0) * block + jnp.arange(block)
    # Products of float32 numbers are exact to float32; the default would round them to tf32 first.
    precision = jax.lax.Precision.HIGHEST if queries.dtype == jnp.float32 else None
    dot = functools.partial(plgpu.dot, precision=precision)

    def add(step: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        largest, total, context = state
        first_key = order[step] * key_block
        some = pl.ds(first_key, key_block)
        keys = first_key + jnp.arange(key_block)
        seen = (keys[None, :] <= positions[:, None]) & (positions[:, None] < end[some][None, :])
        scores = jnp.where(seen, dot(queries, key[some, :].T), MASKED)
        new = jnp.maximum(largest, jnp.max(scores, axis=1))
        # A query that has seen nothing yet has new = MASKED, where exp(0) would count.
        weights = jnp.where(seen, jnp.exp(scores - new[:, None]), 0.0)
        fade = jnp.exp(largest - new)
        part = dot(weights.astype(value.dtype), value[some, :])
        return new, total * fade + jnp.sum(weights, axis=1), context * fade[:, None] + part

    start = (
        jnp.full((block,), MASKED, jnp.float32),
        jnp.zeros((block,), jnp.float32),
        jnp.zeros((block, features), jnp.float32),
    )
    _, total, context = jax.lax.fori_loop(0, count[...], add, start)
    out[...] = (context / total[:, None]).astype(out.dtype)
