"""Attention over prefix-tree rows: the mask is one integer per token.

`end` [batch, length], int32, comes from `scoring.engine.prefix_tree`: query q of a row sees key k iff k <= q < end[k].
Queries [batch, length, heads, head_dim], keys and values [batch, length, kv_heads, head_dim], as in `attention`.
Forward only.

What a model does to scores by distance (`attention.Scores`) goes by `depth` [batch, length], the position of each token
in its request: the keys that a query sees are the tokens before it in its request, each at its own depth.

`reference` is the plain formula. `blockwise` never holds more than a block of scores and touches only blocks in which
some query sees some key: its work grows with the visible blocks, not with the square of the row. `tpu` and `gpu` do the
same as kernels (`tree_attention.tpu`, `tree_attention.gpu`).
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from fineline_jax.models.attention import Keys, Queries, Scores

QUERY_BLOCK = 64
KEY_BLOCK = 64
"""Small blocks waste least on short subtrees; these were the fastest on a CPU over few-shot and zero-shot rows."""


PLAIN = Scores()


def reference(
    query: Queries,
    key: Keys,
    value: Keys,
    end: Int32[Array, "batch length"],
    depth: Int32[Array, "batch length"] | None = None,
    change: Scores = PLAIN,
) -> Queries:
    """All scores at once, softmax in float32."""
    heads = query.shape[2]
    key, value = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (key, value))
    scores = jnp.einsum("bqhd,bkhd->bhqk", query * query.shape[3] ** -0.5, key, preferred_element_type=jnp.float32)
    if depth is not None:
        slopes = None if change.slopes is None else change.slopes[:, None, None]
        scores = change.of(scores, depth[:, None, :, None], depth[:, None, None, :], slopes)
    weights = jax.nn.softmax(jnp.where(visible(end)[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights.astype(value.dtype), value)


def visible(end: Int32[Array, "batch length"]) -> Bool[Array, "batch queries keys"]:
    position = jnp.arange(end.shape[1])
    return (position[None, None, :] <= position[None, :, None]) & (position[None, :, None] < end[:, None, :])


def blockwise(
    query: Queries,
    key: Keys,
    value: Keys,
    end: Int32[Array, "batch length"],
    depth: Int32[Array, "batch length"] | None = None,
    *,
    change: Scores = PLAIN,
    query_block: int = QUERY_BLOCK,
    key_block: int = KEY_BLOCK,
) -> Queries:
    """Blocks of queries one after the other; for each, a running softmax in float32 over its visible blocks of keys
    (2112.05682).

    Blocks are halved until they divide the length.
    """
    batch, length, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    group = heads // kv_heads
    query_block, key_block = block_size(length, query_block), block_size(length, key_block)
    blocks, key_blocks = length // query_block, length // key_block
    order, count = visible_blocks(end, query_block, key_block)
    order, count = order.reshape(-1, key_blocks), count.reshape(-1)
    ends = end.reshape(-1, key_block)
    depths = None if depth is None else depth.reshape(-1)
    slopes = None
    if change.slopes is not None:
        slopes = jnp.repeat(change.slopes.reshape(kv_heads, group), query_block, axis=1)[..., None]
    queries, keys, values = (x.reshape(batch * length, *x.shape[2:]) for x in (query, key, value))

    def heads_first(x: jax.Array, block: jax.Array, size: int) -> jax.Array:
        """Block `block` of x [batch * length, heads, head_dim]: [kv_heads, group * size, head_dim]."""
        taken = jax.lax.dynamic_slice_in_dim(x, block * size, size).reshape(size, kv_heads, -1, head_dim)
        return taken.transpose(1, 2, 0, 3).reshape(kv_heads, -1, head_dim)

    def one_block(index: jax.Array, contexts: jax.Array) -> jax.Array:
        q = heads_first(contexts, index, query_block) * head_dim**-0.5
        row, block = index // blocks, index % blocks
        positions = block * query_block + jnp.tile(jnp.arange(query_block), group)

        def add(i: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
            largest, total, context = state
            here = order[index, i]
            at = row * key_blocks + here
            seen = (here * key_block + jnp.arange(key_block))[None, :] <= positions[:, None]
            seen &= positions[:, None] < ends[at][None, :]
            k, v = heads_first(keys, at, key_block), heads_first(values, at, key_block)
            scores = jnp.einsum("hqd,hkd->hqk", q, k, preferred_element_type=jnp.float32)
            if depths is not None:
                take = functools.partial(jax.lax.dynamic_slice_in_dim, depths)
                own = jnp.tile(take(index * query_block, query_block), group)
                scores = change.of(scores, own[:, None], take(at * key_block, key_block)[None], slopes)
            scores = jnp.where(seen, scores, -jnp.inf)
            # Finite from the start: a query may see nothing of a block.
            new = jnp.maximum(largest, jnp.max(scores, axis=-1))
            weights = jnp.exp(scores - new[..., None])
            fade = jnp.exp(largest - new)
            part = jnp.einsum("hqk,hkd->hqd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
            return new, total * fade + jnp.sum(weights, axis=-1), context * fade[..., None] + part

        start = (
            jnp.full(q.shape[:2], jnp.finfo(jnp.float32).min, jnp.float32),
            jnp.zeros(q.shape[:2], jnp.float32),
            jnp.zeros(q.shape, jnp.float32),
        )
        _, total, context = jax.lax.fori_loop(0, count[index], add, start)
        context = (context / total[..., None]).astype(query.dtype)
        context = context.reshape(kv_heads, group, query_block, head_dim).transpose(2, 0, 1, 3)
        context = context.reshape(query_block, heads, head_dim)
        return jax.lax.dynamic_update_slice_in_dim(contexts, context, index * query_block, axis=0)

    # A block of queries is read once; its context is written over it.
    return jax.lax.fori_loop(0, batch * blocks, one_block, queries).reshape(query.shape)


def visible_blocks(
    end: Int32[Array, "batch length"], query_block: int, key_block: int
) -> tuple[Int32[Array, "batch query_blocks key_blocks"], Int32[Array, "batch query_blocks"]]:
    """For each block of queries, the blocks of keys of which it sees anything.

    Returns their order, the visible ones first, ascending; and how many these are, never 0: every query sees itself.
    """
    batch, length = end.shape
    farthest = jnp.max(end.reshape(batch, 1, length // key_block, key_block), axis=-1)
    first_query = jnp.arange(0, length, query_block)[None, :, None]
    first_key = jnp.arange(0, length, key_block)[None, None, :]
    seen = (farthest > first_query) & (first_key < first_query + query_block)
    order = jnp.argsort(~seen, axis=-1, stable=True)
    return order.astype(jnp.int32), jnp.sum(seen, axis=-1, dtype=jnp.int32)


def block_size(length: int, block: int) -> int:
    """`block`, halved until it divides `length`."""
    while length % block:
        block //= 2
    return block
