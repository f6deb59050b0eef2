"""The decoder: one transformer with the flags of `ModelConfig`, as Flax NNX modules with explicit sharding.

Parameters live outside as a nested pure dict (stacked over layers), so that checkpoints do not depend on classes:

    embed [vocab, width]
    layers.attention_norm [L, width]   q [L, width, heads, head_dim]   k, v [L, width, kv_heads, head_dim]
    layers.o [L, heads, head_dim, width]   mlp_norm [L, width]   gate, up [L, width, mlp]   down [L, mlp, width]
    norm [width]   head [width, vocab] (absent when tied), plus *_bias where the config has them
    with qk_norm: layers.q_norm [L, heads, head_dim]   k_norm [L, kv_heads, head_dim], per head both [L, head_dim]
    with experts: layers.router [L, width, experts], and gate, up and down have an axis of experts behind L
    with a shared expert: layers.shared_gate, shared_up [L, width, mlp]   shared_down [L, mlp, width]
    layers.shared_router [L, width]
    with mixer='mamba' the layers are those of `mamba.Mamba`, behind layers.mixer_norm [L, width]

Rotary positions use Hugging Face's half-split layout natively, so no weight is permuted on import or export.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int32

from fineline_jax.mesh import abstract
from fineline_jax.models.attention import Attend
from fineline_jax.models.config import ModelConfig
from fineline_jax.models.layers import MLP, Attention, Norm, Rotary, Stream, Weights, rotary_factors, scoped
from fineline_jax.models.mamba import Mamba
from fineline_jax.models.moe import Experts, Routing
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
    model = _decoder(config, params)
    return model(tokens, positions, attend, dtype, remat, scan_layers, flat_index)[0]


def hidden_states_and_routing(
    config: ModelConfig,
    params: Params,
    tokens: Int32[Array, "batch length"],
    positions: Int32[Array, "batch length"],
    attend: Attend,
    *,
    dtype: jnp.dtype = jnp.float32,
    remat: Remat = "none",
    scan_layers: bool = True,
) -> tuple[Float[Array, "batch length width"], Routing | None]:
    """`hidden_states` of all tokens, and how each layer sent them to its experts, [layers, …]; None without experts."""
    return _decoder(config, params)(tokens, positions, attend, dtype, remat, scan_layers, None)


@scoped("head")
def head_weight(config: ModelConfig, params: Params) -> Float[Array, "width vocab"]:
    """The output projection, sharded (fsdp, tensor): the transposed embedding when tied, and with columns of length 1
    when normalised (the rows of Baichuan 2's NormHead, whose files hold them as trained)."""
    head = params["embed"].T if config.tied_embeddings else params["head"]
    if config.head == "linear":
        return head
    length = jnp.linalg.norm(head.astype(jnp.float32), axis=0, keepdims=True)
    return (head / jnp.maximum(length, 1e-12)).astype(head.dtype)  # torch.nn.functional.normalize's floor


def _decoder(config: ModelConfig, params: Params) -> "Decoder":
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
    outer, inner = (path[:1], path[1:]) if path[0] == "layers" else ((), path)
    return *outer, "_".join(name for name in inner if name not in ("attention", "mlp", "mixer", "scale"))


Select = Callable[[jax.Array], jax.Array]
"""Takes the tokens of [batch, length, ...] for which a layer's output is wanted."""


def all_tokens(x: jax.Array) -> jax.Array:
    return x


class Block(nnx.Module):
    """Attention and MLP, each with its norm and added to the stream."""

    def __init__(self, config: ModelConfig, key: jax.Array):
        self.config = config
        weights = Weights(config, key)
        self.attention_norm = Norm(weights)
        self.attention = Attention(weights)
        self.mlp_norm = Norm(weights)
        self.mlp = Experts(weights) if config.experts else MLP(weights)

    def __call__(
        self, stream: Stream, rotary: Rotary, attend: Attend, select: Select = all_tokens
    ) -> tuple[Stream, Routing | None]:
        attend_selected: Attend = lambda *qkv: select(attend(*qkv))
        if self.config.norm_after:
            attended = self.attention(stream, rotary, attend_selected)
            stream = select(stream) + self.attention_norm(attended)
            y, routing = self._mlp(stream)
            return stream + self.mlp_norm(y), routing
        attended = self.attention(self.attention_norm(stream), rotary, attend_selected)
        stream = select(stream)
        if self.config.parallel_residual:
            y, routing = self._mlp(self.mlp_norm(stream))
            return stream + attended + y, routing
        stream = stream + attended
        y, routing = self._mlp(self.mlp_norm(stream))
        return stream + y, routing

    def _mlp(self, x: Stream) -> tuple[Stream, Routing | None]:
        return self.mlp(x) if isinstance(self.mlp, Experts) else (self.mlp(x), None)


class MambaBlock(nnx.Module):
    """A Mamba layer behind its norm and added to the stream; it sees no mask and no positions, so its rows must hold
    one sequence each."""

    def __init__(self, config: ModelConfig, key: jax.Array):
        key, dt_key = jax.random.split(key)
        weights = Weights(config, key)
        self.mixer_norm = Norm(weights)
        self.mixer = Mamba(weights, dt_key)

    def __call__(
        self, stream: Stream, rotary: Rotary | None, attend: Attend | None, select: Select = all_tokens
    ) -> tuple[Stream, None]:
        mixed = self.mixer(self.mixer_norm(stream), select)
        return select(stream) + mixed, None


class Decoder(nnx.Module):
    """Embedding, stacked blocks, final norm, and the head unless it is the embedding."""

    def __init__(self, config: ModelConfig, key: jax.Array):
        self.config = config
        embed_key, layers_key, head_key = jax.random.split(key, 3)
        weights = Weights(config, embed_key)
        self.embed = weights.normal("vocab_size width")
        block = Block if config.mixer == "attention" else MambaBlock
        self.layers = jax.vmap(lambda k: block(config, k))(jax.random.split(layers_key, config.layers))
        self.norm = Norm(weights)
        if not config.tied_embeddings:
            self.head = Weights(config, head_key).normal("width vocab_size")

    def __call__(
        self,
        tokens: Int32[Array, "batch length"],
        positions: Int32[Array, "batch length"],
        attend: Attend,
        dtype: jnp.dtype,
        remat: Remat,
        scan_layers: bool,
        flat_index: Int32[Array, "shards selected"] | None,
    ) -> tuple[jax.Array, Routing | None]:
        rotary = rotary_factors(positions, self.config.rotary_dim, self.config.rope_theta, dtype)
        with jax.named_scope("embed"):
            stream = jax.reshard(self.embed[...].astype(dtype), jax.P(None, None)).at[tokens].get(out_sharding=STREAM)

        def layer(stream: Stream, block: Block | MambaBlock) -> tuple[Stream, Routing | None]:
            return block(checkpoint_name(stream, "layer_input"), rotary, attend)

        routing = None
        if flat_index is None:
            stream, routing = jax.lax.scan(rematerialized(layer, remat), stream, self.layers, unroll=not scan_layers)
        else:
            *_, last = range(self.config.layers)
            stream = jax.lax.fori_loop(0, last, lambda i, x: layer(x, layer_of(self.layers, i))[0], stream)
            select = functools.partial(take_tokens, flat_index)
            stream, _ = layer_of(self.layers, last)(stream, rotary, attend, select)
        return self.norm(stream), routing


def layer_of(stacked: nnx.Module, index: jax.typing.ArrayLike) -> Any:
    """One of the layers that are stacked along the first axis of every parameter."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), stacked)


def take_tokens(flat_index: Int32[Array, "shards selected"], x: Float[Array, "batch length ..."]) -> jax.Array:
    """x at flat_index (see `hidden_states`): [shards, selected, ...]."""
    partition = jax.typeof(x).sharding.spec
    local = lambda index, x: x.reshape(-1, *x.shape[2:])[index[0]][None]
    mapped = jax.shard_map(local, in_specs=(TOKENS, partition), out_specs=partition, check_vma=False)
    return mapped(flat_index, x)


def rematerialized(layer: Callable, remat: Remat) -> Callable:
    """`layer` with the activations named by the policy kept for the backward pass and the rest computed again."""
    policies = jax.checkpoint_policies
    if remat == "none":
        return layer
    policy = {
        "full": policies.nothing_saveable,
        "context": policies.save_only_these_names("context"),
        "qkv_context": policies.save_only_these_names("context", "qkv"),
        "offload": policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=["layer_input", "context", "qkv"],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }[remat]
    return jax.checkpoint(layer, policy=policy, prevent_cse=False)
