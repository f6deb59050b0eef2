"""The scoring step: log-probabilities of given tokens, in float32, without ever holding all logits."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from fineline_jax.mesh import BATCH
from fineline_jax.models import attention, decoder, tree_attention
from fineline_jax.models.config import ModelConfig

LOGITS_BYTES = 1 << 28
"""Float32 logits that exist at a time, over all devices."""


@functools.lru_cache(maxsize=8)
def score_step(config: ModelConfig, mesh: jax.sharding.Mesh, dtype: str, attend: attention.Implementation) -> Callable:
    """A jitted (params, tokens, positions, targets) -> (logp, greedy), compiled once per shape of the batch.

    tokens int32 [rows, length]; positions, targets int32 [rows, targets], target -1: nothing. logp float32
    [rows, targets], 0 for nothing; greedy bool [rows, targets], whether the target is the arg-max (the first of
    equals), true for nothing. Both are replicated.
    """

    def step(
        params: decoder.Params, tokens: jax.Array, positions: jax.Array, targets: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        places = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        places = jax.reshard(places, jax.P(BATCH, None))
        hidden = decoder.hidden_states(
            config, params, tokens, places, attention.causal(attend), dtype=jnp.dtype(dtype), remat="none"
        )
        return _at(config, params, hidden, positions, targets)

    return jax.jit(step)


@functools.lru_cache(maxsize=8)
def tree_step(
    config: ModelConfig, mesh: jax.sharding.Mesh, dtype: str, attend: tree_attention.Implementation
) -> Callable:
    """A jitted (params, tokens, depth, end, parents, targets) -> (logp, greedy) over prefix-tree rows.

    tokens, depth, end int32 [rows, length] as of `prefix_tree.Plan`; parents, targets int32 [rows, pairs], target -1:
    nothing. Results as of `score_step`.
    """

    def step(
        params: decoder.Params,
        tokens: jax.Array,
        depth: jax.Array,
        end: jax.Array,
        parents: jax.Array,
        targets: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        attention_over_rows = tree_attention.over_rows(attend, end)
        hidden = decoder.hidden_states(
            config, params, tokens, depth, attention_over_rows, dtype=jnp.dtype(dtype), remat="none"
        )
        return _at(config, params, hidden, parents, targets)

    return jax.jit(step)


def _at(
    config: ModelConfig, params: decoder.Params, hidden: jax.Array, places: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Replicated (logp, greedy) of `targets` [rows, targets] predicted at `places` of `hidden`."""
    chosen = jnp.take_along_axis(hidden, places[..., None], axis=1)
    head = jax.reshard(decoder.head_weight(config, params).astype(hidden.dtype), jax.P(None, "tensor"))
    logp, greedy = _in_chunks(chosen, targets, head)
    return jax.reshard(logp, jax.P()), jax.reshard(greedy, jax.P())


def _in_chunks(hidden: jax.Array, targets: jax.Array, head: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`log_probabilities` over the targets axis, as many columns at a time as LOGITS_BYTES allows."""
    rows, width, features = hidden.shape
    chunk = width
    while chunk > 1 and rows * chunk * head.shape[1] * 4 > LOGITS_BYTES:
        chunk //= 2
    if chunk == width or width % chunk:
        return log_probabilities(hidden, targets, head)
    split_hidden = hidden.reshape(rows, width // chunk, chunk, features).transpose(1, 0, 2, 3)
    split_targets = targets.reshape(rows, width // chunk, chunk).transpose(1, 0, 2)
    logp, greedy = jax.lax.map(lambda part: log_probabilities(part[0], part[1], head), (split_hidden, split_targets))
    return logp.transpose(1, 0, 2).reshape(rows, width), greedy.transpose(1, 0, 2).reshape(rows, width)


def log_probabilities(hidden: jax.Array, targets: jax.Array, head: jax.Array) -> tuple[jax.Array, jax.Array]:
    """log softmax(hidden @ head) at `targets`, and whether each is the arg-max.

    Only reductions over the vocabulary: it may be sharded.
    """
    logits = jnp.einsum("btd,dv->btv", hidden, head, preferred_element_type=jnp.float32)
    vocabulary = jax.lax.broadcasted_iota(jnp.int32, (1, 1, logits.shape[-1]), 2)
    largest = jnp.max(logits, axis=-1)
    normaliser = largest + jnp.log(jnp.sum(jnp.exp(logits - largest[..., None]), axis=-1))
    hit = vocabulary == targets[..., None]
    target_logit = jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
    first = jnp.min(jnp.where(logits == largest[..., None], vocabulary, logits.shape[-1]), axis=-1)
    nothing = targets < 0
    return jnp.where(nothing, 0.0, target_logit - normaliser), nothing | (first == targets)
