"""Attention over prefix-tree rows: the mask is one integer per token.

`end` [batch, length], int32, comes from `scoring.prefix_tree`: query q of a row sees key k iff k <= q < end[k]. Queries
[batch, length, heads, head_dim], keys and values [batch, length, kv_heads, head_dim], as in `attention`. Forward only.

`reference` is the plain formula. `blockwise` never holds more than a block of scores and touches only blocks in which
some query sees some key: its work grows with the visible blocks, not with the square of the row. `tpu` and `gpu` do the
same as kernels (`tree_attention_tpu`, `tree_attention_gpu`).
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from fineline_jax.mesh import BATCH
from fineline_jax.models import attention

Implementation = Literal["reference", "blockwise", "tpu", "gpu"]

QUERY_BLOCK = 64
KEY_BLOCK = 64
"""Small blocks waste least on short subtrees; these were the fastest on a CPU over few-shot and zero-shot rows."""


def pick(platform: str) -> Implementation:
    """The fastest implementation there is for `platform`."""
    kernels: dict[str, Implementation] = {"tpu": "tpu", "gpu": "gpu"}
    return kernels.get(platform, "blockwise")


def over_rows(implementation: Implementation, end: jax.Array) -> attention.Attend:
    """Attention under the mask of `end`, for `decoder.hidden_states`; every device works on its rows and heads.

    end: int32 [batch, length], batch spread over (replica, fsdp). Call it under `jax.set_mesh`.
    """
    local: Callable = {"reference": reference, "blockwise": blockwise, "tpu": _tpu, "gpu": _gpu}[implementation]
    spec = jax.P(BATCH, None, "tensor", None)
    mapped = jax.shard_map(local, in_specs=(spec, spec, spec, jax.P(BATCH, None)), out_specs=spec, check_vma=False)
    return lambda query, key, value: mapped(query, key, value, end)


def reference(query: jax.Array, key: jax.Array, value: jax.Array, end: jax.Array) -> jax.Array:
    """All scores at once, softmax in float32."""
    heads = query.shape[2]
    key, value = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (key, value))
    scores = jnp.einsum("bqhd,bkhd->bhqk", query * query.shape[3] ** -0.5, key, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(visible(end)[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights.astype(value.dtype), value)


def visible(end: jax.Array) -> jax.Array:
    """bool [batch, queries, keys]"""
    place = jnp.arange(end.shape[1])
    return (place[None, None, :] <= place[None, :, None]) & (place[None, :, None] < end[:, None, :])


def blockwise(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    end: jax.Array,
    *,
    query_block: int = QUERY_BLOCK,
    key_block: int = KEY_BLOCK,
) -> jax.Array:
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
    queries, keys, values = (x.reshape(batch * length, *x.shape[2:]) for x in (query, key, value))

    def heads_first(x: jax.Array, block: jax.Array, size: int) -> jax.Array:
        """Block `block` of x [places, heads, head_dim]: [kv_heads, group * size, head_dim]."""
        taken = jax.lax.dynamic_slice_in_dim(x, block * size, size).reshape(size, kv_heads, -1, head_dim)
        return taken.transpose(1, 2, 0, 3).reshape(kv_heads, -1, head_dim)

    def one_block(index: jax.Array, contexts: jax.Array) -> jax.Array:
        q = heads_first(contexts, index, query_block) * head_dim**-0.5
        row, block = index // blocks, index % blocks
        places = block * query_block + jnp.tile(jnp.arange(query_block), group)

        def add(i: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
            largest, total, context = state
            here = order[index, i]
            at = row * key_blocks + here
            seen = (here * key_block + jnp.arange(key_block))[None, :] <= places[:, None]
            seen &= places[:, None] < ends[at][None, :]
            k, v = heads_first(keys, at, key_block), heads_first(values, at, key_block)
            scores = jnp.einsum("hqd,hkd->hqk", q, k, preferred_element_type=jnp.float32)
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

    # A block of queries is read once; its context takes its place.
    return jax.lax.fori_loop(0, batch * blocks, one_block, queries).reshape(query.shape)


def _tpu(query: jax.Array, key: jax.Array, value: jax.Array, end: jax.Array) -> jax.Array:
    from fineline_jax.models.tree_attention_tpu import kernel

    return kernel(query, key, value, end)


def _gpu(query: jax.Array, key: jax.Array, value: jax.Array, end: jax.Array) -> jax.Array:
    from fineline_jax.models.tree_attention_gpu import kernel

    return kernel(query, key, value, end)


def visible_blocks(end: jax.Array, query_block: int, key_block: int) -> tuple[jax.Array, jax.Array]:
    """For each block of queries, the blocks of keys of which it sees anything.

    end [batch, length] -> order int32 [batch, query blocks, key blocks], the visible ones first, ascending; and how
    many these are, int32 [batch, query blocks]. Never 0: every query sees itself.
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
