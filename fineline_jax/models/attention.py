"""Causal attention behind one function: blockwise XLA, cuDNN on CUDA, splash on TPU; and a plain reference for tests.

All take queries [batch, length, heads, head_dim] and keys and values [batch, length, kv_heads, head_dim] and
return the context [batch, length, heads, head_dim]. Query head h reads key head h // (heads / kv_heads). Each
device works on its own rows and heads (`shard_map`), so a kernel never sees a sharded array.

With `documents` [batch, length], the number of each token's document, a query sees keys of its own document alone. Its
rotary positions may count on from the document before: the attention of two tokens depends on their distance only.

With `Scores`, windows, ALiBi and caps, `changed` runs on every platform: no kernel here takes a window that differs
from layer to layer within one program.

What an implementation leaves for its gradient beside its arguments, context and normalisers, bears the name `context`,
so that the remat policies save it once and the forward pass is not run twice (cuDNN's: see `decoder.rematerialized`).
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int32

from fineline_jax.errors import UserError
from fineline_jax.models.sharding import HEADS, TOKENS

Queries = Float[Array, "batch length heads head_dim"]
Keys = Float[Array, "batch length kv_heads head_dim"]
Documents = Int32[Array, "batch length"]
Attend = Callable[..., Queries]
"""(queries, keys, values) and, by the name `scores`, `Scores` where the model changes them -> context."""
Implementation = Literal["auto", "xla", "cudnn", "splash"]

QUERY_BLOCK = 128
"""Queries whose scores exist at a time on CPU and in the fallback; keys behind the block are never touched."""
SCORES_IN_CACHE = 1 << 21
"""Bytes of scores of the rows that a CPU device works on at a time: what the second cache of a core holds."""
SCORES_OF_A_CUT = SCORES_IN_CACHE // 4
"""The same where a row does not fit and is cut by heads: all that is made of the scores fits too."""
SPLASH_BLOCK = 1024
SPLASH_MULTIPLE = 128
"""A block's positions are a multiple of this: lanes of a TPU."""


class Scores(NamedTuple):
    """What a layer does to its scores beside hiding what comes later."""

    window: jax.typing.ArrayLike | None = None
    """Tokens that a query sees, itself the last of them."""
    slopes: Float[Array, " heads"] | None = None
    """A score falls by this for every token between query and key (ALiBi)."""
    softcap: float = 0.0
    """Scores x become this * tanh(x / this) before all else; 0: not."""
    rounded: float = 0.0
    """Where it is not 0, a score rises instead by this times slope times the key's position, these two and their
    product rounded to bfloat16 (Falcon)."""

    def of(self, scores: jax.Array, query: Any, key: Any, slopes: jax.Array | None) -> jax.Array:
        """The changed scores; query, key: positions; these and slopes: shaped as the scores want them."""
        scores = self.softcap * jnp.tanh(scores / self.softcap) if self.softcap else scores
        if slopes is not None and self.rounded:
            bfloat16 = functools.partial(jax.lax.reduce_precision, exponent_bits=8, mantissa_bits=7)
            scores += self.rounded * bfloat16(bfloat16(slopes) * bfloat16(jnp.asarray(key, jnp.float32)))
        elif slopes is not None:
            scores -= slopes * (query - key)
        return scores if self.window is None else jnp.where(query - key < self.window, scores, -jnp.inf)


def alibi_slopes(heads: int) -> np.ndarray:
    """float32 [heads] (2108.12409): powers of one number, and between them where heads is no power of two."""
    below = 1 << int(math.log2(heads))
    powers = [8 * (i + 1) / below for i in range(below)] + [4 * (2 * i + 1) / below for i in range(heads - below)]
    return (2.0 ** -np.array(powers)).astype(np.float32)


def pick(
    implementation: Implementation,
    dtype: jnp.dtype,
    platform: str,
    within_documents: bool = False,
    plain_scores: bool = True,
) -> Implementation:
    """The implementation that `auto` stands for: splash on TPU, cudnn on CUDA in bfloat16, else xla. cudnn cannot be
    kept within documents: xla stands for it, and where it is asked for by name this raises UserError; so with both
    kernels where a model changes the scores."""
    if not plain_scores:
        if implementation in ("cudnn", "splash"):
            raise UserError(
                f"compute.attention={implementation!r} has no windows, ALiBi or caps, as this model has; use 'auto'"
            )
        return "xla"
    if implementation == "cudnn" and within_documents:
        raise UserError("compute.attention='cudnn' cannot mask documents (data.mask_documents_at); use 'xla' or 'auto'")
    if implementation != "auto":
        needs = {"cudnn": "gpu", "splash": "tpu"}.get(implementation, platform)
        if needs != platform:
            raise UserError(f"compute.attention={implementation!r} needs a {needs}, this is a {platform}; use 'auto'")
        return implementation
    if platform == "tpu":
        return "splash"
    return "cudnn" if platform == "gpu" and dtype == jnp.bfloat16 and not within_documents else "xla"


def document_numbers(tokens: Int32[Array, "batch length"], end_id: int) -> Documents:
    """The number of each token's document in its window, from 0; a document ends with the token `end_id`."""
    begins = jnp.pad(tokens[:, :-1] == end_id, ((0, 0), (1, 0)))
    return jnp.cumsum(begins, axis=1, dtype=jnp.int32)


def causal(implementation: Implementation, documents: Documents | None = None) -> Attend:
    """Causal self-attention, within documents where they are given; call it under `jax.set_mesh`. `implementation`
    must not be 'auto' (see `pick`)."""
    local = {"xla": blockwise, "cudnn": _cudnn, "splash": _splash}[implementation]
    return on_each_device(local, changed, documents)


def on_each_device(local: Callable[..., Queries], changed: Callable[..., Queries], *of_tokens: Any) -> Attend:
    """Every device works on its rows of the batch and its heads: `local`, or `changed`, which gets `Scores` last.
    of_tokens: further arguments of both, [batch, length] or None."""
    on_devices = functools.partial(jax.shard_map, out_specs=HEADS, check_vma=False)
    specs = (HEADS, HEADS, HEADS, *[TOKENS] * len(of_tokens))

    def attend(query: jax.Array, key: jax.Array, value: jax.Array, scores: Scores | None = None) -> jax.Array:
        if scores is None:
            return on_devices(local, in_specs=specs)(query, key, value, *of_tokens)
        run = lambda *arrays: changed(*arrays[:-2], scores._replace(window=arrays[-2], slopes=arrays[-1]))
        mapped = on_devices(run, in_specs=(*specs, jax.P(), jax.P("tensor")))
        return mapped(query, key, value, *of_tokens, scores.window, scores.slopes)

    return attend


def changed(query: Queries, key: Keys, value: Keys, documents: Documents | None, scores: Scores) -> Queries:
    """`reference` of changed `Scores`, a block of queries at a time, whose scores are made again for gradients."""
    batch, length, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    grouped = query.reshape(batch, length, kv_heads, heads // kv_heads, head_dim) * head_dim**-0.5
    by_head = None if scores.slopes is None else scores.slopes.reshape(kv_heads, -1, 1, 1)

    def block(start: int, stop: int) -> jax.Array:
        @functools.partial(jax.checkpoint, prevent_cse=False)
        def context(queries: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
            made = jnp.einsum("bqhgd,bkhd->bhgqk", queries, keys, preferred_element_type=jnp.float32)
            made = (
                scores.of(made, np.arange(start, stop)[:, None], np.arange(stop)[None, :], by_head)
                + _bias(start, stop, 0, documents)[..., None, :, :]
            )
            weights = jax.nn.softmax(made, axis=-1).astype(values.dtype)
            return jnp.einsum("bhgqk,bkhd->bqhgd", weights, values)

        return context(grouped[:, start:stop], key[:, :stop], value[:, :stop])

    return jnp.concatenate([block(*span) for span in _blocks(length)], axis=1).reshape(query.shape)


def reference(query: Queries, key: Keys, value: Keys, documents: Documents | None = None) -> Queries:
    """Causal softmax attention in float32 over the whole score matrix; what the others are tested against."""
    batch, length, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    grouped = query.reshape(batch, length, kv_heads, heads // kv_heads, head_dim) * head_dim**-0.5
    scores = jnp.einsum("bqhgd,bkhd->bhgqk", grouped, key, preferred_element_type=jnp.float32)
    scores = scores + _bias(0, length, 0, documents)[..., None, :, :]
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bhgqk,bkhd->bqhgd", weights, value).reshape(query.shape)


@jax.custom_vjp
def blockwise(query: Queries, key: Keys, value: Keys, documents: Documents | None = None) -> Queries:
    """The same, one block of queries at a time, with the score matrix made again in the backward pass (2205.14135).

    Written for CPU and as the fallback elsewhere: only plain batched products whose operands lie the way the product
    reads them. The backward pass makes the scores transposed, [keys, queries], so that no score-sized array is ever
    turned around, which is what costs most in the derivative of `reference`. A CPU takes a few rows of the batch, or
    heads of a row, at a time, so that products and softmax find the scores in its cache.
    """
    return _blockwise_forward(query, key, value, documents)[0]


def _blockwise_forward(query: jax.Array, key: jax.Array, value: jax.Array, documents: jax.Array | None):
    more = () if documents is None else (documents,)
    results = _few_rows_at_a_time_on_cpu(_rows_forward, query, key, value, *more)
    out, normaliser = (checkpoint_name(result, "context") for result in results)
    return out, (query, key, value, out, normaliser, more)


def _blockwise_backward(saved, gradient: jax.Array):
    *arrays, more = saved
    return *_few_rows_at_a_time_on_cpu(_rows_backward, *arrays, gradient, *more), None


blockwise.defvjp(_blockwise_forward, _blockwise_backward)


def _few_rows_at_a_time_on_cpu(of_rows: Callable[..., tuple[jax.Array, ...]], *arrays: jax.Array):
    """`of_rows` of arrays [batch, length, heads, head_dim], [batch * heads, ...] (of 3 axes) or [batch, length]; the
    first two are queries and keys.

    Where the scores of one row are too many for the cache, the rows are cut by heads too.
    """
    batch, length, heads, head_dim = arrays[0].shape
    kv_heads = arrays[1].shape[2]
    of_one_row = 4 * heads * length * max(stop - start for start, stop in _blocks(length))
    rows = max(n for n in range(1, batch + 1) if batch % n == 0 and (n == 1 or n * of_one_row <= SCORES_IN_CACHE))
    cuts = 1
    if of_one_row > SCORES_IN_CACHE:
        fits = lambda n: kv_heads % n == 0 and of_one_row <= n * SCORES_OF_A_CUT
        cuts = next(filter(fits, range(1, kv_heads)), kv_heads)
    turns = batch * cuts // rows

    def cut(x: jax.Array) -> jax.Array:
        if x.ndim == 2:
            return jnp.broadcast_to(x[:, None], (batch, cuts, length)).reshape(turns, rows, length)
        if x.ndim == 3:
            return x.reshape(turns, -1, *x.shape[1:])
        split = x.reshape(batch, length, cuts, -1, head_dim).transpose(0, 2, 1, 3, 4)
        return split.reshape(turns, rows, length, -1, head_dim)

    def join(x: jax.Array) -> jax.Array:
        if x.ndim == 4:
            return x.reshape(-1, *x.shape[2:])
        split = x.reshape(batch, cuts, length, -1, head_dim).transpose(0, 2, 1, 3, 4)
        return split.reshape(batch, length, -1, head_dim)

    def in_turn(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        results = jax.lax.map(lambda part: of_rows(*part), tuple(map(cut, arrays)))
        return tuple(map(join, results))

    return jax.lax.platform_dependent(*arrays, cpu=in_turn if turns > 1 else of_rows, default=of_rows)


def _rows_forward(
    query: jax.Array, key: jax.Array, value: jax.Array, documents: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Context, and log-normalisers [batch * kv_heads, groups, length]."""
    queries, keys, values, groups = _heads_first(query, key, value)
    batch, length, heads, _ = query.shape
    contexts, normalisers = [], []
    for start, stop in _blocks(length):
        block = _block_of_queries(queries, groups, start, stop)
        parts = []
        for first, last in ((0, start), (start, stop)) if start else ((start, stop),):
            scores = _product("nqd,nkd->nqk", block, keys[:, first:last])
            if last > start or documents is not None:  # else every query of the block sees the keys
                by_head = scores.reshape(batch, heads, stop - start, last - first)
                scores = (by_head + _bias(start, stop, first, documents)[..., : last - first]).reshape(scores.shape)
            parts.append(((first, last), scores))
        largest = functools.reduce(jnp.maximum, [jnp.max(scores, axis=-1, keepdims=True) for _, scores in parts])
        weights = [(span, jnp.exp(scores - largest)) for span, scores in parts]
        total = functools.reduce(jnp.add, [jnp.sum(some, axis=-1, keepdims=True) for _, some in weights])
        products = [_product("nqk,nkd->nqd", some.astype(values.dtype), values[:, a:b]) for (a, b), some in weights]
        context = functools.reduce(jnp.add, products) / total
        contexts.append(context.reshape(-1, groups, stop - start, context.shape[-1]))
        normalisers.append((largest + jnp.log(total)).reshape(-1, groups, stop - start))
    context = jnp.concatenate(contexts, axis=2).astype(query.dtype)
    normaliser = jnp.concatenate(normalisers, axis=2)
    out = context.reshape(query.shape[0], -1, length, query.shape[3]).transpose(0, 2, 1, 3)
    return out, normaliser


def _rows_backward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    out: jax.Array,
    normaliser: jax.Array,
    gradient: jax.Array,
    documents: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    queries, keys, values, groups = _heads_first(query, key, value)
    batch_heads, _, length, head_dim = queries.shape
    batch = out.shape[0]
    # As a product: XLA's CPU backend takes up to ten times as long for the sum over so few features.
    both = jax.lax.optimization_barrier(gradient.astype(jnp.float32) * out)
    delta = jnp.einsum("blhd,d->blh", both, np.ones(head_dim, np.float32), precision="highest")
    delta = delta.transpose(0, 2, 1).reshape(batch_heads, groups, length)
    gradients = gradient.transpose(0, 2, 1, 3).reshape(queries.shape)
    query_gradients = []
    key_gradient = value_gradient = jnp.zeros(())
    turned_keys = jax.lax.optimization_barrier(keys.transpose(0, 2, 1))  # else XLA turns them around in the products
    for start, stop in reversed(_blocks(length)):  # the last block meets all keys
        block = _block_of_queries(queries, groups, start, stop)
        upstream = gradients[:, :, start:stop].reshape(block.shape)
        row = lambda x, start=start, stop=stop: x[:, :, start:stop].reshape(batch_heads, 1, -1)
        scores = _product("nkd,nqd->nkq", keys[:, :stop], block)
        by_group = scores.reshape(batch, -1, stop, groups, stop - start)
        bias = _bias(start, stop, 0, documents).swapaxes(-1, -2)
        scores = (by_group + bias[..., None, :]).reshape(scores.shape)
        weights = jnp.exp(scores - row(normaliser))
        slopes = weights * (_product("nkd,nqd->nkq", values[:, :stop], upstream) - row(delta))
        weights, slopes = weights.astype(block.dtype), slopes.astype(block.dtype)
        of_values = _product("nkq,nqd->nkd", weights, upstream)
        of_keys = _product("nkq,nqd->nkd", slopes, block)
        value_gradient = of_values if stop == length else value_gradient.at[:, :stop].add(of_values)
        key_gradient = of_keys if stop == length else key_gradient.at[:, :stop].add(of_keys)
        turned = jax.lax.optimization_barrier(_product("ndk,nkq->ndq", turned_keys[:, :, :stop], slopes))
        query_gradients.append(turned.transpose(0, 2, 1).reshape(batch_heads, groups, stop - start, -1))
    query_gradient = jnp.concatenate(query_gradients[::-1], axis=2) * head_dim**-0.5
    unstack = lambda x: x.reshape(batch, -1, length, head_dim).transpose(0, 2, 1, 3).astype(out.dtype)
    return unstack(query_gradient), unstack(key_gradient), unstack(value_gradient)


def _blocks(length: int) -> list[tuple[int, int]]:
    size = max(QUERY_BLOCK, -(-length // 16))  # the blocks are unrolled: at most 16
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def _bias(start: int, stop: int, first: int, documents: jax.Array | None) -> np.ndarray | jax.Array:
    """float32 [queries start to stop, keys first to stop], with documents [batch, 1, queries, keys]: 0 where the query
    sees the key, else -inf. To be added: a sum XLA's CPU backend computes together with what follows, a choice of two
    values in a pass of its own."""
    causal = np.arange(start, stop)[:, None] >= np.arange(first, stop)[None, :]
    if documents is None:
        return np.where(causal, np.float32(0.0), np.float32(-np.inf))
    same = documents[:, start:stop, None] == documents[:, None, first:stop]
    return jnp.where(causal & same, jnp.float32(0.0), jnp.float32(-jnp.inf))[:, None]


def _heads_first(query: jax.Array, key: jax.Array, value: jax.Array):
    """Scaled queries [batch * kv_heads, groups, length, head_dim]; keys, values [batch * kv_heads, length, head_dim];
    groups. The query heads that share a key head are stacked, and one product serves them all."""
    batch, length, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    groups, batch_heads = heads // kv_heads, batch * kv_heads
    queries = (query * head_dim**-0.5).transpose(0, 2, 1, 3).reshape(batch_heads, groups, length, head_dim)
    keys, values = (x.transpose(0, 2, 1, 3).reshape(batch_heads, length, head_dim) for x in (key, value))
    return queries, keys, values, groups


def _block_of_queries(queries: jax.Array, groups: int, start: int, stop: int) -> jax.Array:
    return queries[:, :, start:stop].reshape(queries.shape[0], groups * (stop - start), queries.shape[3])


def _product(subscripts: str, left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, left, right, preferred_element_type=jnp.float32)


def _cudnn(query: jax.Array, key: jax.Array, value: jax.Array, documents: None = None) -> jax.Array:
    size, more = query.shape[-1], -query.shape[-1] % 8  # cudnn takes multiples of 8; zeros change no score
    if more:
        query, key, value = (jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, more))) for x in (query, key, value))
    out = jax.nn.dot_product_attention(query, key, value, scale=size**-0.5, is_causal=True, implementation="cudnn")
    return out[..., :size] if more else out


def _splash(
    query: jax.Array, key: jax.Array, value: jax.Array, documents: jax.Array | None = None, *, interpret: bool = False
) -> jax.Array:
    """Pallas TPU kernel. interpret: run the kernel's Python (tests)."""
    _, length, heads, head_dim = query.shape
    # Positions behind the end are keys that no query sees, and queries whose context is dropped.
    pad = -length % SPLASH_MULTIPLE
    query, key, value = (jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))) for x in (query, key, value))
    kernel = _splash_kernel(heads, length + pad, interpret)
    heads_first = (0, 2, 1, 3)
    scaled = query.transpose(heads_first) * head_dim**-0.5
    keys, values = (jnp.repeat(x.transpose(heads_first), heads // x.shape[2], axis=1) for x in (key, value))
    if documents is None:
        context = jax.vmap(kernel)(scaled, keys, values)
    else:
        from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import SegmentIds

        numbers = jnp.pad(documents, ((0, 0), (0, pad)))
        context = jax.vmap(kernel)(scaled, keys, values, SegmentIds(numbers, numbers))
    return jnp.transpose(jnp.asarray(context), heads_first)[:, :length]


def _splash_kernel(heads: int, length: int, interpret: bool):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    block = math.gcd(SPLASH_BLOCK, length)
    sizes = splash_attention_kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=min(block, 512),
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=min(block, 512),
        use_fused_bwd_kernel=True,
    )
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((length, length))] * heads)
    return splash_attention_kernel.make_splash_mha(
        mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, residual_checkpoint_name="context", interpret=interpret
    )
