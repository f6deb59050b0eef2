"""The decoder: one transformer with the flags of `ModelConfig`, as Flax NNX modules with explicit sharding.

Parameters live outside as a nested pure dict (stacked over layers), so that checkpoints do not depend on classes:

    embed [vocab, width]
    layers.attention_norm [L, width]   q [L, width, heads, head_dim]   k, v [L, width, kv_heads, head_dim]
    layers.o [L, heads, head_dim, width]   mlp_norm [L, width]   gate, up [L, width, mlp]   down [L, mlp, width]
    norm [width]   head [width, vocab] (absent when tied), plus *_bias where the config has them
    with qk_norm: layers.q_norm [L, heads, head_dim]   k_norm [L, kv_heads, head_dim], per head both [L, head_dim]
    with post_norms: layers.attention_out_norm, mlp_out_norm [L, width]   with mlp='xielu': layers.alpha_p, … [L, 1]
    with positions='learned': position_embed [position_rows, width]   embed_norm [width]   head_bias [vocab]
    with experts: layers.router [L, width, experts], and gate, up and down have an axis of experts behind L
    with a shared expert: layers.shared_gate, shared_up [L, width, mlp]   shared_down [L, mlp, width]
    layers.shared_router [L, width]
    with dense_layers: these under dense_layers.*, the others under layers.*
    with kv_lora_rank the weights of attention are those of `layers.LatentAttention`
    with mixer='gated_delta': layers.* are those with attention, and recurrent_layers.* [R, …] those of
    `gated_delta.GatedDelta` behind mixer_norm, with mlp_norm, gate, up and down
    with mixer='mamba' the layers are those of `mamba.Mamba` or `mamba.Mamba2`, behind layers.mixer_norm [L, width]

Rotary positions use Hugging Face's half-split layout natively, so no weight is permuted on import or export.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int32

from fineline_jax.mesh import abstract
from fineline_jax.models import layer_order
from fineline_jax.models.attention import Attend, Scores, alibi_slopes
from fineline_jax.models.config import ModelConfig
from fineline_jax.models.gated_delta import GatedDelta
from fineline_jax.models.layers import MLP, Attention, LatentAttention, Norm, Stream, Weights
from fineline_jax.models.mamba import Mamba, Mamba2
from fineline_jax.models.moe import Experts, Routing
from fineline_jax.models.rotary import Rotary, rotary_factors
from fineline_jax.models.sharding import STREAM, TOKENS, check_fits

Params = dict
Remat = Literal["none", "context", "qkv_context", "full", "offload"]


def init_params(config: ModelConfig, key: jax.Array) -> Params:
    """Fresh float32 parameters: normal(0, init_std) matrices, unit norms, zero biases. Call it inside `jax.jit`
    under `jax.set_mesh`: every shard is born on its device, with values that do not depend on the mesh."""
    state = flatten_dict(nnx.to_pure_dict(nnx.state(Decoder(config, key))))
    return unflatten_dict({_parameter_path(path): value for path, value in state.items()})


def abstract_params(config: ModelConfig, mesh: jax.sharding.Mesh, dtype: jnp.dtype = jnp.float32) -> Params:
    """Shapes and shardings of the parameters on `mesh`. Raises UserError if they cannot be split evenly."""
    check_fits(config, mesh)
    tree = abstract(lambda: init_params(config, jax.random.key(0)), mesh)
    return jax.tree.map(lambda leaf: leaf.update(dtype=dtype), tree)


def hidden_states(
    config: ModelConfig,
    params: Params,
    tokens: Int32[Array, "batch length"],
    positions: Int32[Array, "batch length"],
    attend: Attend,
    *,
    dtype: jnp.dtype = jnp.float32,
    remat: Remat = "none",
    scan_layers: bool = True,
    flat_index: Int32[Array, "shards selected"] | None = None,
) -> Float[Array, "batch length width"] | Float[Array, "shards selected width"]:
    """Activations after the final norm, in `dtype`.

    tokens, positions: batch spread over (replica, fsdp). `attend` maps rotated queries and keys, and values, to the
    context, and holds the mask. flat_index: for each shard of the batch, indices into its rows laid end to end: only
    these activations are computed, [shards, selected, width], and the last layer computes no more for the other tokens
    than keys and values. Call it under `jax.set_mesh`.
    """
    return decoder_of(config, params)(tokens, positions, attend, dtype, remat, scan_layers, flat_index)[0]


@jax.named_scope("head")
def head_weight(config: ModelConfig, params: Params) -> Float[Array, "width vocab"]:
    """The output projection, sharded (fsdp, tensor): the transposed embedding when tied, and with columns of length 1
    when normalised (the rows of Baichuan 2's NormHead, whose files hold them as trained). A bias is one more row, for
    the 1 among the features of `hidden_states`, followed by `bias_rows() - 1` of zeros."""
    head = params["embed"].T if config.tied_embeddings else params["head"]
    if config.head_bias:
        more = np.eye(bias_rows(), 1, dtype=np.float32) * params["head_bias"][None]
        whole = [jax.reshard(x, jax.P(None, "tensor")) for x in (head, more.astype(head.dtype))]
        return jax.reshard(jnp.concatenate(whole), jax.P("fsdp", "tensor"))
    if config.head == "linear":
        return head
    length = jnp.linalg.norm(head.astype(jnp.float32), axis=0, keepdims=True)
    return (head / jnp.maximum(length, 1e-12)).astype(head.dtype)  # torch.nn.functional.normalize's floor


def decoder_of(config: ModelConfig, params: Params) -> "Decoder":
    """The modules with these parameters."""
    graph, paths = _structure(config)
    leaves = flatten_dict(params)
    return nnx.merge(graph, unflatten_dict({path: leaves[_parameter_path(path)] for path in paths}))


@functools.lru_cache(maxsize=32)
def _structure(config: ModelConfig) -> tuple[nnx.GraphDef, list[tuple[str, ...]]]:
    """The decoder without its weights, and their paths through its modules."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, jax.random.key(0))))
    return graph, list(flatten_dict(nnx.to_pure_dict(state)))


def _parameter_path(path: tuple[str, ...]) -> tuple[str, ...]:
    """The path of a weight in the tree of parameters, in which a layer is flat: layers.attention.q is layers.q there,
    layers.mlp_norm.scale layers.mlp_norm, and layers.mlp.shared.up layers.shared_up."""
    outer, inner = (path[:1], path[1:]) if path[0].endswith("layers") else ((), path)
    return *outer, "_".join(name for name in inner if name not in ("attention", "mlp", "mixer", "scale"))


STACKS = ("dense_layers", "layers", "recurrent_layers")
"""Where the parameters of layers are (`ModelConfig.layers_of`)."""
Select = Callable[[jax.Array], jax.Array]
"""Takes the tokens of [batch, length, ...] for which a layer's output is wanted."""


class Block(nnx.Module):
    """Attention and MLP, each with its norm and added to the stream. dense: without experts."""

    def __init__(self, config: ModelConfig, key: jax.Array, dense: bool = False):
        self.config = config
        weights = Weights(config, key)
        self.attention_norm = Norm(weights)
        self.attention = LatentAttention(weights) if config.kv_lora_rank else Attention(weights)
        self.mlp_norm = None if config.shared_norm else Norm(weights)
        mixed = config.experts and not dense
        self.mlp = Experts(weights) if mixed else MLP(weights, "dense_mlp_width" if dense else "mlp_width")
        self.attention_out_norm = Norm(weights) if config.post_norms else None
        self.mlp_out_norm = Norm(weights) if config.post_norms else None

    def __call__(
        self, stream: Stream, rotary: Rotary | None, attend: Attend, select: Select = lambda x: x
    ) -> tuple[Stream, Routing | None]:
        before = (lambda norm, x: x) if self.config.norm_after else (lambda norm, x: norm(x))
        attention_out, mlp_out = self.attention_out_norm, self.mlp_out_norm
        if self.config.norm_after:
            attention_out, mlp_out = self.attention_norm, self.mlp_norm
        normed = before(self.attention_norm, stream)
        attended = _part(self.config, self.attention(normed, rotary, lambda *qkv: select(attend(*qkv))), attention_out)
        stream = select(stream)
        if self.config.parallel_residual:
            y, routing = self._mlp(select(normed) if self.mlp_norm is None else self.mlp_norm(stream))
            return stream + attended + _part(self.config, y), routing
        stream = stream + attended
        y, routing = self._mlp(before(self.mlp_norm, stream))
        return stream + _part(self.config, y, mlp_out), routing

    def _mlp(self, x: Stream) -> tuple[Stream, Routing | None]:
        return self.mlp(x) if isinstance(self.mlp, Experts) else (self.mlp(x), None)


def _part(config: ModelConfig, y: Stream, norm: Norm | None = None) -> Stream:
    """What a part of a layer adds to the stream."""
    y = y if norm is None else norm(y)
    return y if config.residual_scale == 1 else y * config.residual_scale


class RecurrentBlock(nnx.Module):
    """A Mamba layer, or a gated delta rule and an MLP, each behind its norm and added to the stream; it sees no mask
    and no positions, so its rows must hold one sequence each."""

    def __init__(self, config: ModelConfig, key: jax.Array):
        self.config = config
        key, own_key = jax.random.split(key)
        weights = Weights(config, key)
        delta = config.mixer == "gated_delta"
        self.mixer_norm = Norm(weights)
        self.mixer = (GatedDelta if delta else Mamba2 if config.state_heads else Mamba)(weights, own_key)
        self.mlp_norm = Norm(weights) if delta else None
        self.mlp = MLP(weights) if delta else None

    def __call__(
        self, stream: Stream, rotary: Rotary | None, attend: Attend | None, select: Select = lambda x: x
    ) -> tuple[Stream, None]:
        stream = select(stream) + _part(self.config, self.mixer(self.mixer_norm(stream), select))
        if self.mlp is None or self.mlp_norm is None:
            return stream, None
        return stream + _part(self.config, self.mlp(self.mlp_norm(stream))), None


class Kind(NamedTuple):
    """In what layers differ, as numbers, so that one program computes all; None: in nothing."""

    window: np.ndarray | None
    """int32 [layers]: tokens that a query sees."""
    table: np.ndarray | None
    """int32 [layers]: which of `Decoder._rotary`'s tables turns queries and keys."""
    scale: np.ndarray | None
    """float32 [layers]: a factor of the scores."""


def layer_kinds(config: ModelConfig) -> Kind:
    full, unrotated = (np.isin(np.arange(config.layers), of) for of in (config.full_layers, config.unrotated_layers))
    window = np.where(full, np.iinfo(np.int32).max, config.window).astype(np.int32) if config.window else None
    own = ~full if config.window_rope_theta else np.zeros_like(full)
    table = np.where(unrotated, 2, own).astype(np.int32)
    scale = 1 / np.arange(1, config.layers + 1, dtype=np.float32) if config.scale_by_layer else None
    return Kind(window, table if table.any() else None, scale)


class Decoder(nnx.Module):
    """Embedding, stacked blocks, final norm, and the head unless it is the embedding."""

    def __init__(self, config: ModelConfig, key: jax.Array):
        self.config = config
        embed_key, layers_key, head_key = jax.random.split(key, 3)
        weights = Weights(config, embed_key)
        self.embed = weights.normal("vocab_size width")
        self.position_embed = weights.normal("position_rows width") if config.positions == "learned" else None
        self.embed_norm = Norm(weights) if config.embed_norm else None
        keys = jax.random.split(layers_key, config.layers)

        def stack(name: str, block: Callable[..., Any]) -> Any:
            of = config.layers_of(name)
            own = keys[of.start : of.stop] if isinstance(of, range) else keys[np.array(of, int)]
            return jax.vmap(lambda k: block(config, k))(own) if len(of) else None

        self.dense_layers = stack("dense_layers", functools.partial(Block, dense=True))
        self.layers = stack("layers", RecurrentBlock if config.mixer == "mamba" else Block)
        self.recurrent_layers = stack("recurrent_layers", RecurrentBlock)
        self.norm = Norm(weights)
        if not config.tied_embeddings:
            self.head = Weights(config, head_key).normal("width vocab_size")
        self.head_bias = weights.constant(0.0, "vocab_size") if config.head_bias else None

    def __call__(
        self,
        tokens: Int32[Array, "batch length"],
        positions: Int32[Array, "batch length"],
        attend: Attend,
        dtype: jnp.dtype,
        remat: Remat,
        scan_layers: bool,
        flat_index: Int32[Array, "shards selected"] | None = None,
    ) -> tuple[jax.Array, Routing | None]:
        """See `hidden_states`; and how each layer sent its tokens to its experts, [layers, …], None without experts or
        with flat_index."""
        config, kinds = self.config, layer_kinds(self.config)
        rotary = self._rotary(positions, dtype)
        alibi = config.positions == "alibi"
        slopes = jax.reshard(jnp.asarray(alibi_slopes(config.heads)), jax.P("tensor")) if alibi else None
        stream = self._embedded(tokens, positions, dtype)

        def layer(
            stream: Stream, block: Any, kind: Kind, select: Select = lambda x: x
        ) -> tuple[Stream, Routing | None]:
            here, attend_here = rotary, attend
            if kind.table is not None:
                here = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, kind.table, keepdims=False), rotary)
            if not config.plain_scores:
                rounded = config.head_dim**-0.5 if config.rounded_alibi else 0.0
                scores = Scores(kind.window, slopes, config.attention_softcap, rounded)
                attend_here = functools.partial(attend, scores=scores)
            if kind.scale is not None:
                inner, scale = attend_here, kind.scale.astype(dtype)
                attend_here = lambda query, *others: inner(query * scale, *others)
            return block(checkpoint_name(stream, "layer_input"), here, attend_here, select)

        of_stack = {name: np.array(config.layers_of(name), int) for name in STACKS}
        stacks = {
            name: (getattr(self, name), jax.tree.map(lambda x, of=of: x[of], kinds)) for name, of in of_stack.items()
        }
        order = [name for _, name in sorted((layer, name) for name, of in of_stack.items() for layer in of)]
        if flat_index is None:
            every = rematerialized(lambda stream, block: layer(stream, *block), remat)
            stream, routing = layer_order.scan(every, stream, stacks, order, unroll=not scan_layers)
        else:
            stream = layer_order.loop(lambda stream, block: layer(stream, *block)[0], stream, stacks, order[:-1])
            block, kind = layer_order.layer_of(stacks[order[-1]], len(of_stack[order[-1]]) - 1)
            stream, routing = layer(stream, block, kind, functools.partial(take_tokens, flat_index))
        states = self.norm(stream)
        if config.logit_scale != 1:
            states = states * jnp.asarray(config.logit_scale, dtype)
        if not config.head_bias:
            return states, routing
        # A 1 for the bias, and zeros (see `head_weight`).
        ones = jnp.ones_like(states[..., : bias_rows()]) * np.eye(1, bias_rows(), dtype=np.float32)[0]
        return jnp.concatenate([states, ones.astype(states.dtype)], axis=-1), routing

    @jax.named_scope("embed")
    def _embedded(self, tokens: jax.Array, positions: jax.Array, dtype: jnp.dtype) -> Stream:
        config = self.config
        row = lambda table, at: jax.reshard(table[...].astype(dtype), jax.P(None, None)).at[at].get(out_sharding=STREAM)
        stream = row(self.embed, tokens)
        if config.embed_scale != 1:
            stream = stream * jnp.asarray(config.embed_scale, dtype)
        if self.position_embed is not None:
            stream = stream + row(self.position_embed, positions + config.position_offset)
        return stream if self.embed_norm is None else self.embed_norm(stream)

    def _rotary(self, positions: jax.Array, dtype: jnp.dtype) -> Rotary | None:
        """The table of rotary factors; where layers differ, three of them: the model's, that of layers with a window,
        and one that turns nothing."""
        config = self.config
        if config.positions != "rotary" or not config.heads:
            return None
        of = functools.partial(rotary_factors, positions, config.rotary_dim, dtype=dtype)
        usual = of(config.rope_theta, scaling=config.rope_scaling, interleaved=config.rotary_interleaved)
        if layer_kinds(config).table is None:
            return usual
        local = of(config.window_rope_theta or config.rope_theta, interleaved=config.rotary_interleaved)
        still = jnp.ones_like(usual[0]), jnp.zeros_like(usual[1])
        return jax.tree.map(lambda *tables: jnp.stack(tables), usual, local, still)


def bias_rows() -> int:
    """Features that stand for a head's bias: so many that the mesh splits them like the others."""
    return jax.sharding.get_abstract_mesh().shape["fsdp"]


def take_tokens(flat_index: Int32[Array, "shards selected"], x: Float[Array, "batch length ..."]) -> jax.Array:
    """x at flat_index (see `hidden_states`): [shards, selected, ...]."""
    partition = jax.typeof(x).sharding.spec
    local = lambda index, x: x.reshape(-1, *x.shape[2:])[index[0]][None]
    mapped = jax.shard_map(local, in_specs=(TOKENS, partition), out_specs=partition, check_vma=False)
    return mapped(flat_index, x)


def rematerialized(layer: Callable, remat: Remat) -> Callable:
    """`layer` with the activations named by the policy kept for the backward pass and the rest computed again."""
    policies = jax.checkpoint_policies
    # cuDNN's results inside JAX's own derivative have no name.
    of_cudnn = lambda primitive, *_, **__: primitive.name.startswith("dot_product_attention_fwd")
    save = lambda *names: policies.save_from_both_policies(policies.save_only_these_names(*names), of_cudnn)
    policy = {
        "none": lambda primitive, *_, **given: primitive.name != "reshard" and given.get("name") != "gathered",
        "full": policies.nothing_saveable,
        "context": save("context"),
        "qkv_context": save("context", "qkv"),
        "offload": policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=["layer_input", "context", "qkv"],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }[remat]
    return jax.checkpoint(layer, policy=policy, prevent_cse=False)
