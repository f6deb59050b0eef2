"""Causal attention behind one function: a plain reference, cuDNN on CUDA, splash on TPU.

All take queries [batch, length, heads, head_dim] and keys and values [batch, length, kv_heads, head_dim] and
return the context [batch, length, heads, head_dim]. Query head h reads key head h // (heads / kv_heads). Each
device works on its own rows and heads (`shard_map`), so a kernel never sees a sharded array.
"""

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from fineline_jax.errors import UserError
from fineline_jax.mesh import BATCH

Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
Implementation = Literal["auto", "reference", "cudnn", "splash"]

QUERY_BLOCK = 256
"""Queries whose scores exist at a time in the reference; keys behind the block are never touched."""
SPLASH_BLOCK = 1024


def pick(implementation: Implementation, dtype: jnp.dtype, platform: str) -> Implementation:
    """The implementation that `auto` stands for: splash on TPU, cudnn on CUDA in bfloat16, else reference."""
    if implementation != "auto":
        needs = {"cudnn": "gpu", "splash": "tpu"}.get(implementation, platform)
        if needs != platform:
            raise UserError(f"compute.attention={implementation!r} needs a {needs}, this is a {platform}; use 'auto'")
        return implementation
    if platform == "tpu":
        return "splash"
    return "cudnn" if platform == "gpu" and dtype == jnp.bfloat16 else "reference"


def causal(implementation: Implementation) -> Attend:
    """Causal self-attention; call it under `jax.set_mesh`. `implementation` must not be 'auto' (see `pick`)."""
    local = {"reference": reference, "cudnn": _cudnn, "splash": _splash}[implementation]
    return on_each_device(local)


def on_each_device(local: Attend) -> Attend:
    """`local` run by every device on its rows of the batch and its heads."""
    spec = jax.P(BATCH, None, "tensor", None)
    return jax.shard_map(local, in_specs=(spec, spec, spec), out_specs=spec, check_vma=False)


def reference(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Softmax attention in float32, one block of queries at a time against the keys up to its last query."""
    length = query.shape[1]
    blocks = []
    for start in range(0, length, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, length)
        visible = np.arange(start, stop)[:, None] >= np.arange(stop)[None, :]
        blocks.append(masked(query[:, start:stop], key[:, :stop], value[:, :stop], jnp.asarray(visible)))
    return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=1)


def masked(query: jax.Array, key: jax.Array, value: jax.Array, visible: jax.Array) -> jax.Array:
    """Attention of all queries to the keys where `visible` [..., queries, keys] is true."""
    batch, queries, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    grouped = query.reshape(batch, queries, kv_heads, heads // kv_heads, head_dim) * head_dim**-0.5
    scores = jnp.einsum("bqhgd,bkhd->bhgqk", grouped, key, preferred_element_type=jnp.float32)
    scores = jnp.where(visible, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bhgqk,bkhd->bqhgd", weights, value).reshape(query.shape)


def _cudnn(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    return jax.nn.dot_product_attention(query, key, value, is_causal=True, implementation="cudnn")


def _splash(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Pallas TPU kernel; its residuals carry the name that the remat policies save, so that it is not run twice."""
    _, length, heads, head_dim = query.shape
    kernel = _splash_kernel(heads, length)
    heads_first = (0, 2, 1, 3)
    scaled = query.transpose(heads_first) * head_dim**-0.5
    context = jax.vmap(kernel)(scaled, _per_query_head(key, heads), _per_query_head(value, heads))
    return jnp.transpose(jnp.asarray(context), heads_first)


def _per_query_head(x: jax.Array, heads: int) -> jax.Array:
    """[batch, length, kv_heads, head_dim] -> [batch, heads, length, head_dim]."""
    return jnp.repeat(x.transpose(0, 2, 1, 3), heads // x.shape[2], axis=1)


@functools.cache
def _splash_kernel(heads: int, length: int):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    block = min(SPLASH_BLOCK, length)
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
    with jax.ensure_compile_time_eval():
        return splash_attention_kernel.make_splash_mha(
            mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, residual_checkpoint_name="context"
        )
