"""The scoring step: log-probabilities of given tokens, in float32, without ever holding all logits.

A position of a row whose output predicts a scored token is a parent. Logits over the vocabulary are computed once per
parent, however many targets it has: that gives the normaliser and the arg-max. The logit of each target is one inner
product more.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from fineline_jax.mesh import BATCH
from fineline_jax.models import attention, decoder
from fineline_jax.models.config import ModelConfig
from fineline_jax.models.tree_attention import dispatch

P = jax.P
PARENTS = (1024, 256)
"""Parents whose logits are made at a time, on each device: as many as the first while there are so many, then fewer."""
CPU_BLOCK, ACCELERATOR_BLOCK = 256, 1 << 16
"""Tokens of the vocabulary whose logits exist at a time: on a CPU so few that they never leave its cache."""


def score_step(config: ModelConfig, dtype: str, attend: attention.Implementation) -> Callable:
    """A jitted (params, tokens, positions, targets) -> (logp, greedy), compiled once per shape of the batch.

    tokens int32 [rows, length]; positions, targets int32 [rows, targets], target -1: nothing. logp float32
    [rows, targets], 0 for nothing; greedy bool [rows, targets], whether the target is the arg-max (the first of
    equals), true for nothing. Both lie where the rows lie.
    """

    def step(
        params: decoder.Params,
        tokens: Int32[Array, "rows length"],
        positions: Int32[Array, "rows targets"],
        targets: Int32[Array, "rows targets"],
    ) -> tuple[Float32[Array, "rows targets"], Bool[Array, "rows targets"]]:
        depth = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        depth = jax.reshard(depth, P(BATCH, None))
        hidden = decoder.hidden_states(
            config, params, tokens, depth, attention.causal(attend), dtype=jnp.dtype(dtype), remat="none"
        )

        def local(hidden, positions, targets, head):
            rows, length = hidden.shape[:2]
            parents = (positions + length * jnp.arange(rows)[:, None]).reshape(-1)
            hidden = hidden.reshape(-1, hidden.shape[-1])[parents]
            every = jnp.arange(parents.size)
            scores = log_probabilities(hidden, parents.size, every, targets.reshape(-1), head, config.logit_softcap)
            return tuple(x.reshape(targets.shape) for x in scores)

        return _on_each_device(local, config, params, hidden, positions, targets)

    return jax.jit(step)


def tree_step(config: ModelConfig, dtype: str, attend: dispatch.Implementation) -> Callable:
    """A jitted (params, tokens, depth, end, parents) -> hidden over prefix-tree rows.

    tokens, depth, end int32 [rows, length] as of `prefix_tree.Plan`. parents int32 [shards, parents], a line per batch
    shard: indices into the shard's rows laid end to end. hidden [shards, parents, width] lies where the rows lie.
    """

    def step(
        params: decoder.Params,
        tokens: Int32[Array, "rows length"],
        depth: Int32[Array, "rows length"],
        end: Int32[Array, "rows length"],
        parents: Int32[Array, "shards parents"],
    ) -> Float[Array, "shards parents width"]:
        attention_over_rows = dispatch.over_rows(attend, end, depth)
        return decoder.hidden_states(
            config, params, tokens, depth, attention_over_rows, dtype=jnp.dtype(dtype), remat="none", flat_index=parents
        )

    return jax.jit(step)


def vocabulary_step(config: ModelConfig) -> Callable:
    """A jitted (params, hidden, positions, used, parents, targets) -> (logp, greedy), which computes the logits of the
    parents of several steps at once: the fewer times, the fewer positions of a block of parents are left empty.

    hidden: of each step, [shards, parents, width]. The others have a line per batch shard: positions int32
    [shards, positions], indices into the shard's parents of all steps laid end to end; used int32 [shards, 1], how many
    of them count; parents, targets int32 [shards, targets], the index of each target's parent in `positions` and its
    token, -1: nothing. logp, greedy [shards, targets] as of `score_step`.
    """

    def step(
        params: decoder.Params,
        hidden: Sequence[Float[Array, "shards parents width"]],
        positions: Int32[Array, "shards positions"],
        used: Int32[Array, "shards 1"],
        parents: Int32[Array, "shards targets"],
        targets: Int32[Array, "shards targets"],
    ) -> tuple[Float32[Array, "shards targets"], Bool[Array, "shards targets"]]:
        def local(hidden, positions, used, parents, targets, head):
            wanted = hidden[0][positions[0]]
            scores = log_probabilities(wanted, used[0, 0], parents[0], targets[0], head, config.logit_softcap)
            return tuple(x[None] for x in scores)

        of_all_steps = jnp.concatenate(hidden, axis=1)
        return _on_each_device(local, config, params, of_all_steps, positions, used, parents, targets)

    return jax.jit(step)


@jax.named_scope("head")
def _on_each_device(
    local: Callable, config: ModelConfig, params: decoder.Params, hidden: jax.Array, *arrays: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`local(hidden, *arrays, head)` of every device's rows and part of the vocabulary."""
    head = jax.reshard(decoder.head_weight(config, params).astype(hidden.dtype), P(None, "tensor"))
    rows = P(BATCH, None)
    mapped = jax.shard_map(
        local,
        in_specs=(P(BATCH, None, None), *[rows] * len(arrays), P(None, "tensor")),
        out_specs=(rows, rows),
        check_vma=False,
    )
    return mapped(hidden, *(jax.reshard(array, rows) for array in arrays), head)


def log_probabilities(
    hidden: Float[Array, "parents width"],
    used: Int32[Array, ""] | int,
    parents: Int32[Array, " targets"],
    targets: Int32[Array, " targets"],
    head: Float[Array, "width vocabulary"],
    softcap: float = 0.0,
) -> tuple[Float32[Array, " targets"], Bool[Array, " targets"]]:
    """(logp, greedy) [targets] of a device's parents, inside `shard_map`; the vocabulary is split over `tensor`.

    hidden [parents, width], of which the first `used` count; parents, targets [targets]: the index of each target's
    parent in `hidden` and its token, -1: nothing; head [width, the device's vocabulary]; softcap: as of `capped`.
    Collectives are left to the end: devices go round the loops different numbers of times.
    """
    first = jax.lax.axis_index("tensor") * head.shape[1]
    *many, few = block_sizes(len(hidden))
    hidden = jnp.pad(hidden, ((0, -len(hidden) % few), (0, 0)))

    def compute_logits(size: int, i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        block = _normalisers(jax.lax.dynamic_slice_in_dim(hidden, i * size, size), head, softcap)
        return tuple(jax.lax.dynamic_update_slice(a, b, (i * size,)) for a, b in zip(state, block, strict=True))

    zeros = jnp.zeros(len(hidden), jnp.float32)
    state = zeros, zeros, jnp.zeros(len(hidden), jnp.int32)
    done = 0
    for size in (*many, few):
        until = used // size if size > few else -(-used // size)
        state = jax.lax.fori_loop(done // size, until, functools.partial(compute_logits, size), state)
        done = until * size
    largest, total, best = state
    over_all = jax.lax.pmax(largest, "tensor")
    total = jax.lax.psum(total * jnp.exp(largest - over_all), "tensor")
    best = jax.lax.pmin(jnp.where(largest == over_all, best + first, jnp.iinfo(jnp.int32).max), "tensor")
    normaliser = over_all + jnp.log(jnp.maximum(total, jnp.finfo(jnp.float32).tiny))

    is_local = (targets >= first) & (targets < first + head.shape[1])
    logit = capped(_logits_of_targets(hidden, parents, jnp.where(is_local, targets - first, 0), head), softcap)
    logit = jax.lax.psum(jnp.where(is_local, logit, 0.0), "tensor")
    nothing = targets < 0
    return jnp.where(nothing, 0.0, logit - normaliser[parents]), nothing | (best[parents] == targets)


def capped(logits: jax.Array, softcap: float) -> jax.Array:
    """softcap * tanh(logits / softcap); 0: the logits."""
    return softcap * jnp.tanh(logits / softcap) if softcap else logits


def block_sizes(parents: int) -> list[int]:
    """Sizes of the blocks in which the logits of so many parents are computed, the last one for what the others leave.

    All but the last are smaller than `parents`: XLA takes the work of a loop that can only go round once out of the
    loop, and then does it also where the loop would go round not at all.
    """
    few = min(*PARENTS, parents)
    return [size for size in PARENTS if few < size < parents] + [few]


def _normalisers(
    hidden: Float[Array, "parents width"], head: Float[Array, "width vocabulary"], softcap: float
) -> tuple[Float32[Array, " parents"], Float32[Array, " parents"], Int32[Array, " parents"]]:
    """Of the capped logits hidden [n, width] @ head [width, vocabulary]: the largest, the sum of exp(logits - largest),
    and the index of the first largest, each [n]; a block of the vocabulary at a time."""
    cpu, default = (functools.partial(_in_blocks, block, softcap) for block in (CPU_BLOCK, ACCELERATOR_BLOCK))
    return jax.lax.platform_dependent(hidden, head, cpu=cpu, default=default)


def _in_blocks(
    block: int, softcap: float, hidden: jax.Array, head: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    vocabulary = head.shape[1]
    block = min(block, vocabulary)

    def add(i: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        largest, total, best = state
        start = jnp.minimum(i * block, vocabulary - block)  # the last block overlaps the one before it
        columns = jax.lax.dynamic_slice_in_dim(head, start, block, axis=1)
        logits = capped(jnp.dot(hidden, columns, preferred_element_type=jnp.float32), softcap)
        index = jnp.arange(block, dtype=jnp.float32)  # XLA's CPU backend finds the largest of floats fast
        if vocabulary % block:
            logits = jnp.where(index >= i * block - start, logits, -jnp.inf)
        here = jnp.max(logits, axis=1)
        new = jnp.maximum(largest, here)
        part = jnp.sum(jnp.exp(logits - new[:, None]), axis=1)
        from_end = jnp.max(jnp.where(logits == here[:, None], block - index, 0.0), axis=1)
        at = start + block - from_end.astype(jnp.int32)
        return new, total * jnp.exp(largest - new) + part, jnp.where(here > largest, at, best)

    rows = hidden.shape[:1]
    lowest = jnp.full(rows, jnp.finfo(jnp.float32).min, jnp.float32)
    state = lowest, jnp.zeros(rows, jnp.float32), jnp.zeros(rows, jnp.int32)
    return jax.lax.fori_loop(0, -(-vocabulary // block), add, state)


def _logits_of_targets(
    hidden: Float[Array, "parents width"],
    parents: Int32[Array, " targets"],
    targets: Int32[Array, " targets"],
    head: Float[Array, "width vocabulary"],
) -> Float32[Array, " targets"]:
    """float32 [targets]: hidden[parent] . head[:, target]"""

    def some(block: tuple[jax.Array, jax.Array]) -> jax.Array:
        parent, target = block
        return jnp.sum(hidden[parent].astype(jnp.float32) * head[:, target].T.astype(jnp.float32), axis=1)

    count = parents.size
    size = min(max(PARENTS), count)
    cut = lambda x: jnp.pad(x, (0, -count % size)).reshape(-1, size)
    return jax.lax.map(some, (cut(parents), cut(targets))).reshape(-1)[:count]
