"""Multi-head latent attention (2405.04434): the keys and values of all heads are made from one short vector a token."""

import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from fineline_jax.models.attention import Attend
from fineline_jax.models.cpu_kernels import linear, linears
from fineline_jax.models.layers import Stream, Weights, rms_norm, scoped
from fineline_jax.models.rotary import Rotary, rotate
from fineline_jax.models.sharding import HEADS, STREAM

EPS = 1e-6
"""Of the norms of the short vectors, whatever the model's own (transformers' DeepseekV2Attention)."""


class LatentAttention(nnx.Module):
    """Self-attention whose keys have a part that rotates, the same for all heads, and a part of each head:

    q [width, heads, head_dim], or q_a [width, rank]   q_a_norm [rank]   q_b [rank, heads, head_dim], of q_lora_rank
    kv_a [width, kv_lora_rank]   kv_a_norm [kv_lora_rank]   k_rope [width, rotary_dim]
    k_b [kv_lora_rank, heads, nope_head_dim]   v_b [kv_lora_rank, heads, v_head_dim]   o [heads, v_head_dim, width]
    """

    def __init__(self, weights: Weights):
        self.config = config = weights.config
        short = config.q_lora_rank > 0
        self.q = None if short else weights.normal("width heads head_dim")
        self.q_a = weights.normal("features q_lora_rank") if short else None
        self.q_a_norm = weights.constant(1.0, "q_latent") if short else None
        self.q_b = weights.normal("q_lora_rank heads head_dim") if short else None
        self.kv_a = weights.normal("features kv_lora_rank")
        self.kv_a_norm = weights.constant(1.0, "kv_latent")
        self.k_rope = weights.normal("width rotary_dim")
        self.k_b = weights.normal("kv_lora_rank heads nope_head_dim")
        self.v_b = weights.normal("kv_lora_rank heads v_head_dim")
        self.o = weights.normal("heads v_head_dim width")

    @scoped("attention")
    def __call__(self, x: Stream, rotary: Rotary | None, attend: Attend) -> Stream:
        """The output projection of `attend(queries, keys, values)`, the values with zeros up to head_dim features."""
        config = self.config
        turn = lambda y: y if rotary is None else rotate(y, rotary, config.rotary_interleaved)
        if self.q is not None:
            query = linear("bsd,dhk->bshk", HEADS, x, self.q[...])
        else:
            assert self.q_a is not None and self.q_b is not None
            short = rms_norm(linear("bsd,dr->bsr", STREAM, x, self.q_a[...]), self.q_a_norm, EPS)
            query = linear("bsr,rhk->bshk", HEADS, short, self.q_b[...])
        short = rms_norm(linear("bsd,dr->bsr", STREAM, x, self.kv_a[...]), self.kv_a_norm, EPS)
        k_rope = turn(linear("bsd,dr->bsr", STREAM, x, self.k_rope[...])[:, :, None])
        key, value = linears("bsr,rhk->bshk", HEADS, short, (self.k_b[...], self.v_b[...]))
        k_rope = jnp.broadcast_to(k_rope, (*key.shape[:3], k_rope.shape[3]), out_sharding=HEADS)
        still, turned = jnp.split(query * config.query_scale, [config.nope_head_dim], axis=-1)
        query = jnp.concatenate([still, turn(turned)], axis=-1)
        key = jnp.concatenate([key, k_rope], axis=-1)
        value = jnp.pad(value, [(0, 0)] * 3 + [(0, config.head_dim - config.v_head_dim)])
        context = attend(*(checkpoint_name(y, "qkv") for y in (query, key, value)))[..., : config.v_head_dim]
        return linear("bshk,hkd->bsd", STREAM, context, self.o[...])
