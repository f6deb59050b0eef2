"""A mixture of SwiGLU experts without dropped tokens: every token goes through the experts it is sent to.

The tokens of a device are sorted by expert, so that each expert's are consecutive, and the products run over these
groups (`grouped_dot`). Experts are split over `tensor` like any MLP, so no token leaves its device (2211.15841's
dropless layer, with tensor instead of expert parallelism).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Int32

from fineline_jax.mesh import BATCH
from fineline_jax.models.cpu_kernels import gathered
from fineline_jax.models.layers import MLP, Stream, Weights
from fineline_jax.models.sharding import STREAM, TOKENS, spec

BLOCK = 128
"""Rows of one product on CPU: a group is padded to whole blocks."""


class Routing(NamedTuple):
    """How the tokens of a batch were sent to experts, float32; `load_balance` and `router_z` make losses of it."""

    chosen: Float[Array, "*layers experts"]
    """Tokens sent to each expert; no gradient."""
    probability: Float[Array, "*layers experts"]
    """Sum of the router's probabilities of each expert."""
    squares: Float[Array, "*layers"]
    """Sum of the squared log-normalisers of the router."""


class Experts(nnx.Module):
    """The MLP of a layer as a mixture, with one more expert for all tokens where the config has a shared one."""

    def __init__(self, weights: Weights):
        self.config = config = weights.config
        self.gate = weights.normal("experts width mlp_width")
        self.up = weights.normal("experts width mlp_width")
        self.down = weights.normal("experts mlp_width width")
        self.router = weights.normal("width experts")
        self.shared = MLP(weights, "shared_expert_width") if config.shared_expert_width else None
        gated = config.shared_expert_width and not config.ungated_shared_expert
        self.shared_router = weights.normal("features") if gated else None
        self.router_bias = weights.constant(0.0, "experts") if config.router == "sigmoid" else None

    @jax.named_scope("mlp")
    def __call__(self, x: Stream) -> tuple[Stream, Routing]:
        mixed, routing = mixture(
            x,
            *(gathered(weight[...], x.dtype) for weight in (self.router, self.gate, self.up, self.down)),
            bias=None if self.router_bias is None else self.router_bias[...],
            per_token=self.config.experts_per_token,
            normalise=self.config.normalise_experts,
            groups=self.config.expert_groups,
            groups_per_token=self.config.groups_per_token,
            scale=self.config.expert_scale,
        )
        if self.shared is None:
            return mixed, routing
        shared = self.shared(x)
        if self.shared_router is not None:
            score = jnp.einsum("bsd,d->bs", x, self.shared_router[...].astype(x.dtype), out_sharding=TOKENS)
            shared = jax.nn.sigmoid(score)[..., None] * shared
        return mixed + shared, routing


def load_balance(routing: Routing, tokens: int) -> jax.Array:
    """experts * sum over experts of (share of tokens sent there * mean probability), pooled over layers: as many as
    experts per token if all are used evenly (2101.03961, eq. 4 to 6; transformers' load_balancing_loss_func).

    routing: with one axis of layers. tokens: of the batch.
    """
    layers, experts = routing.chosen.shape
    sent, probability = (jnp.sum(x, axis=0) / (layers * tokens) for x in (routing.chosen, routing.probability))
    return experts * jnp.sum(sent * probability)


def router_z(routing: Routing, tokens: int) -> jax.Array:
    """The mean of the squared log-normaliser of the router over tokens and layers (2202.08906, eq. 5)."""
    return jnp.sum(routing.squares) / (routing.squares.size * tokens)


def mixture(
    x: Stream,
    router: Float[Array, "width experts"],
    gate: Float[Array, "experts width hidden"],
    up: Float[Array, "experts width hidden"],
    down: Float[Array, "experts hidden width"],
    bias: Float[Array, " experts"] | None = None,
    **rules: Any,
) -> tuple[Stream, Routing]:
    """The weighted sum of each token's experts, chosen by `rules` (of `route`), and the routing.

    router, bias: whole; gate, up, down: whole over fsdp and split over tensor. Call it under `jax.set_mesh`.
    """
    into, out = spec("experts features mlp_width"), spec("experts mlp_width features")
    local = functools.partial(_local_mixture, rules)
    specs = {"in_specs": (STREAM, jax.P(), into, into, out, jax.P()), "out_specs": (STREAM, jax.P())}
    run = jax.shard_map(local, **specs, check_vma=False)
    return run(x, router, gate, up, down, bias)


def _local_mixture(rules, x, router, gate, up, down, bias):
    tokens = x.reshape(-1, x.shape[-1])
    weights, chosen, logits = route(tokens, router, **rules, bias=bias)
    per_token = chosen.shape[1]
    order = jnp.argsort(chosen.reshape(-1), stable=True)  # of (token, choice) pairs
    sizes = jnp.bincount(chosen.reshape(-1), length=router.shape[1])
    grouped = tokens[order // per_token]
    hidden = jax.nn.silu(grouped_dot(grouped, gate, sizes)) * grouped_dot(grouped, up, sizes)
    result = grouped_dot(hidden, down, sizes)[jnp.argsort(order)].reshape(-1, per_token, x.shape[-1])
    mixed = jnp.einsum("tkd,tk->td", result, weights.astype(x.dtype), preferred_element_type=jnp.float32)
    routing = Routing(
        sizes.astype(jnp.float32),
        jnp.sum(jax.nn.softmax(logits, axis=-1), axis=0),
        jnp.sum(jax.nn.logsumexp(logits, axis=-1) ** 2),
    )
    return jax.lax.psum(mixed, "tensor").astype(x.dtype).reshape(x.shape), jax.lax.psum(routing, BATCH)


def route(
    tokens: Float[Array, "tokens width"],
    router: Float[Array, "width experts"],
    per_token: int,
    normalise: bool,
    groups: int = 1,
    groups_per_token: int = 1,
    scale: float = 1.0,
    bias: Float[Array, " experts"] | None = None,
) -> tuple[Float[Array, "tokens per_token"], Int[Array, "tokens per_token"], Float[Array, "tokens experts"]]:
    """Weights and numbers of each token's `per_token` experts, likeliest first; the router's logits. All float32.

    The weights are a softmax over all experts or, with a bias, which counts for the choice alone, sigmoids. normalise:
    they are scaled to sum to 1; scale: then multiplied with it. groups, groups_per_token: see `ModelConfig`.
    """
    logits = jnp.dot(tokens, router, preferred_element_type=jnp.float32)
    shares = jax.nn.softmax(logits, axis=-1) if bias is None else jax.nn.sigmoid(logits)
    ranks = shares if bias is None else shares + jax.lax.stop_gradient(bias.astype(jnp.float32))
    if groups > 1:
        grouped = ranks.reshape(ranks.shape[0], groups, -1)
        of_group = jnp.sum(jax.lax.top_k(grouped, 1 if bias is None else 2)[0], axis=-1)
        open_groups = jnp.any(jax.lax.top_k(of_group, groups_per_token)[1][..., None] == jnp.arange(groups), axis=1)
        ranks = jnp.where(open_groups[..., None], grouped, -jnp.inf).reshape(ranks.shape)
    chosen = jax.lax.top_k(ranks, per_token)[1]
    weights = jnp.take_along_axis(shares, chosen, axis=-1)
    weights = weights / jnp.sum(weights, axis=-1, keepdims=True) if normalise else weights
    return weights * scale, chosen, logits


def grouped_dot(
    rows: Float[Array, "rows n_in"], weights: Float[Array, "groups n_in n_out"], sizes: Int32[Array, " groups"]
) -> Float[Array, "rows n_out"]:
    """rows times weights[g] for the rows of group g, which are consecutive. sizes: rows of each group, together all.

    XLA's own grouped product on TPU and GPU; on CPU it would multiply every row with every group, so there the groups
    are gone through in blocks.
    """
    return jax.lax.platform_dependent(rows, weights, sizes, cpu=blocked_dot, default=jax.lax.ragged_dot)


@jax.custom_vjp
def blocked_dot(rows: jax.Array, weights: jax.Array, sizes: jax.Array) -> jax.Array:
    """`jax.lax.ragged_dot`, block after block of consecutive rows of one group."""
    count, group_of, start_of, _ = _blocks(rows.shape[0], sizes)
    padded = jnp.pad(rows, ((0, BLOCK), (0, 0)))

    def one(block: jax.Array, out: jax.Array) -> jax.Array:
        part = jax.lax.dynamic_slice_in_dim(padded, start_of[block], BLOCK)
        product = jnp.dot(part, weights[group_of[block]], preferred_element_type=jnp.float32)
        # Rows behind the group's end belong to later groups, whose blocks come later and write over them.
        return jax.lax.dynamic_update_slice_in_dim(out, product.astype(out.dtype), start_of[block], 0)

    out = jnp.zeros((padded.shape[0], weights.shape[2]), rows.dtype)
    return jax.lax.fori_loop(0, count, one, out)[: rows.shape[0]]


def _blocked_backward(saved: tuple[jax.Array, jax.Array, jax.Array], gradient: jax.Array):
    rows, weights, sizes = saved
    count, group_of, start_of, stop_of = _blocks(rows.shape[0], sizes)
    padded, slopes = (jnp.pad(x, ((0, BLOCK), (0, 0))) for x in (rows, gradient))

    def one(block: jax.Array, total: jax.Array) -> jax.Array:
        part, slope = (jax.lax.dynamic_slice_in_dim(x, start_of[block], BLOCK) for x in (padded, slopes))
        own = start_of[block] + jnp.arange(BLOCK) < stop_of[block]
        product = jnp.dot(jnp.where(own[:, None], part, 0).T, slope, preferred_element_type=jnp.float32)
        return total.at[group_of[block]].add(product)

    total = jax.lax.fori_loop(0, count, one, jnp.zeros(weights.shape, jnp.float32))
    return blocked_dot(gradient, weights.swapaxes(1, 2), sizes), total.astype(weights.dtype), None


blocked_dot.defvjp(lambda *args: (blocked_dot(*args), args), _blocked_backward)


def _blocks(rows: int, sizes: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """How many blocks there are, and for each its group, its first row and the end of its group."""
    ends = jnp.cumsum(sizes)
    blocks = -(-sizes // BLOCK)
    last = jnp.cumsum(blocks)
    number = jnp.arange(rows // BLOCK + sizes.shape[0])
    group = jnp.minimum(jnp.searchsorted(last, number, side="right"), sizes.shape[0] - 1)
    start = ends[group] - sizes[group] + (number - (last - blocks)[group]) * BLOCK
    return last[-1], group, start, ends[group]
