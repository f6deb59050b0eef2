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
    with mixer='mamba' the layers are those of `MambaBlock`

Rotary positions use Hugging Face's half-split layout natively, so no weight is permuted on import or export.
Every weight is cast and gathered where it is used (ZeRO-3); left to the compiler the gather is sometimes turned
into a re-layout of the activations.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from fineline_jax.mesh import BATCH, abstract, check_fits
from fineline_jax.models import mamba, moe
from fineline_jax.models.attention import Attend
from fineline_jax.models.config import ModelConfig
from fineline_jax.models.products import linear, linears, swiglu

P = jax.P
Params = dict
Remat = Literal["none", "context", "qkv_context", "full", "offload"]

STREAM = P(BATCH, None, None)
"""Residual stream [batch, length, width]."""


def init_params(config: ModelConfig, key: jax.Array) -> Params:
    """Fresh float32 parameters: normal(0, init_std) matrices, unit norms, zero biases. Call it inside `jax.jit`
    under `jax.set_mesh`: every shard is born on its device, with values that do not depend on the mesh."""
    return nnx.to_pure_dict(nnx.state(Decoder(config, key)))


def abstract_params(config: ModelConfig, mesh: jax.sharding.Mesh, dtype: jnp.dtype = jnp.float32) -> Params:
    """Shapes and shardings of the parameters on `mesh`. Raises UserError if they cannot be split evenly."""
    check_fits(config, mesh)
    tree = abstract(lambda: init_params(config, jax.random.key(0)), mesh)
    return jax.tree.map(lambda leaf: leaf.update(dtype=dtype), tree)


def hidden_states(
    config: ModelConfig,
    params: Params,
    tokens: jax.Array,
    positions: jax.Array,
    attend: Attend,
    *,
    dtype: jnp.dtype = jnp.float32,
    remat: Remat = "none",
    scan_layers: bool = True,
    places: jax.Array | None = None,
) -> jax.Array:
    """Activations after the final norm, [batch, length, width] in `dtype`.

    tokens, positions: int32 [batch, length], batch spread over (replica, fsdp). `attend` maps rotated queries and
    keys, and values, to the context, and holds the mask. places: int32 [shards, places], a line for each part of the
    batch, indices into its rows laid end to end: only their activations are wanted, [shards, places, width], and the
    last layer computes no more for the others than keys and values. Call it under `jax.set_mesh`.
    """
    model = nnx.merge(_graphdef(config), params)
    return model(tokens, positions, attend, dtype, remat, scan_layers, places)[0]


def hidden_states_and_routing(
    config: ModelConfig,
    params: Params,
    tokens: jax.Array,
    positions: jax.Array,
    attend: Attend,
    *,
    dtype: jnp.dtype = jnp.float32,
    remat: Remat = "none",
    scan_layers: bool = True,
) -> tuple[jax.Array, moe.Routing | None]:
    """`hidden_states` of all places, and how each layer sent them to its experts, [layers, …]; None without experts."""
    model = nnx.merge(_graphdef(config), params)
    return model(tokens, positions, attend, dtype, remat, scan_layers, None)


def head_weight(config: ModelConfig, params: Params) -> jax.Array:
    """The output projection [width, vocab], sharded (fsdp, tensor): the transposed embedding when tied, and with
    columns of length 1 when normalised (the rows of Baichuan 2's NormHead, whose files hold them as trained)."""
    head = params["embed"].T if config.tied_embeddings else params["head"]
    if config.head == "linear":
        return head
    length = jnp.linalg.norm(head.astype(jnp.float32), axis=0, keepdims=True)
    return (head / jnp.maximum(length, 1e-12)).astype(head.dtype)  # torch.nn.functional.normalize's floor


@functools.lru_cache(maxsize=32)
def _graphdef(config: ModelConfig) -> nnx.GraphDef:
    return nnx.graphdef(nnx.eval_shape(lambda: Decoder(config, jax.random.key(0))))


@dataclasses.dataclass
class Weights:
    """Draws the weights of one module from one key."""

    key: jax.Array
    std: float

    def normal(self, shape: tuple[int, ...], spec: jax.P) -> nnx.Param:
        self.key, key = jax.random.split(self.key)
        return nnx.Param(self.std * jax.random.normal(key, shape, jnp.float32, out_sharding=spec))

    def constant(self, value: float, shape: tuple[int, ...], spec: jax.P) -> nnx.Param:
        return nnx.Param(jnp.full(shape, value, jnp.float32, out_sharding=spec))


Keep = Callable[[jax.Array], jax.Array]
"""Takes the places of [batch, length, ...] for which a layer's output is wanted."""


def everything(x: jax.Array) -> jax.Array:
    return x


class Block(nnx.Module):
    """Attention and MLP, each with its norm and added to the stream."""

    def __init__(self, config: ModelConfig, key: jax.Array):
        self.config = config
        weights = Weights(key, config.init_std)
        width, heads, kv_heads, head_dim = config.width, config.heads, config.kv_heads, config.head_dim
        add_norm(self, "attention_norm", weights, config)
        self.q = weights.normal((width, heads, head_dim), P("fsdp", "tensor", None))
        self.k = weights.normal((width, kv_heads, head_dim), P("fsdp", "tensor", None))
        self.v = weights.normal((width, kv_heads, head_dim), P("fsdp", "tensor", None))
        self.o = weights.normal((heads, head_dim, width), P("tensor", None, "fsdp"))
        add_norm(self, "mlp_norm", weights, config)
        experts, of_experts = ((config.experts,), (None,)) if config.experts else ((), ())
        if config.mlp == "swiglu":
            self.gate = weights.normal((*experts, width, config.mlp_width), P(*of_experts, "fsdp", "tensor"))
        self.up = weights.normal((*experts, width, config.mlp_width), P(*of_experts, "fsdp", "tensor"))
        self.down = weights.normal((*experts, config.mlp_width, width), P(*of_experts, "tensor", "fsdp"))
        if config.experts:
            self.router = weights.normal((width, config.experts), P("fsdp", None))
        if config.shared_expert_width:
            self.shared_gate = weights.normal((width, config.shared_expert_width), P("fsdp", "tensor"))
            self.shared_up = weights.normal((width, config.shared_expert_width), P("fsdp", "tensor"))
            self.shared_down = weights.normal((config.shared_expert_width, width), P("tensor", "fsdp"))
            self.shared_router = weights.normal((width,), P(None))
        if config.has_qkv_bias:
            self.q_bias = weights.constant(0.0, (heads, head_dim), P("tensor", None))
            self.k_bias = weights.constant(0.0, (kv_heads, head_dim), P("tensor", None))
            self.v_bias = weights.constant(0.0, (kv_heads, head_dim), P("tensor", None))
        if config.attention_bias:
            self.o_bias = weights.constant(0.0, (width,), P(None))
        if config.qk_norm:
            for name, of_heads in (("q_norm", heads), ("k_norm", kv_heads)):
                if config.qk_norm_per_head:
                    setattr(self, name, weights.constant(1.0, (head_dim,), P(None)))
                else:
                    setattr(self, name, weights.constant(1.0, (of_heads, head_dim), P("tensor", None)))
        if config.mlp_bias:
            if config.mlp == "swiglu":
                self.gate_bias = weights.constant(0.0, (config.mlp_width,), P("tensor"))
            self.up_bias = weights.constant(0.0, (config.mlp_width,), P("tensor"))
            self.down_bias = weights.constant(0.0, (width,), P(None))

    def __call__(
        self, stream: jax.Array, rotary: tuple[jax.Array, jax.Array], attend: Attend, keep: Keep = everything
    ) -> tuple[jax.Array, moe.Routing | None]:
        attention_norm = functools.partial(normed, self, "attention_norm")
        mlp_norm = functools.partial(normed, self, "mlp_norm")
        kept_context: Attend = lambda *qkv: keep(attend(*qkv))
        if self.config.norm_after:
            stream = keep(stream) + attention_norm(self.attention(stream, rotary, kept_context))
            y, routing = self.mlp(stream)
            return stream + mlp_norm(y), routing
        attended = self.attention(attention_norm(stream), rotary, kept_context)
        stream = keep(stream)
        if self.config.parallel_residual:
            y, routing = self.mlp(mlp_norm(stream))
            return stream + attended + y, routing
        stream = stream + attended
        y, routing = self.mlp(mlp_norm(stream))
        return stream + y, routing

    def attention(self, x: jax.Array, rotary: tuple[jax.Array, jax.Array], attend: Attend) -> jax.Array:
        config, per_head = self.config, P(BATCH, None, "tensor", None)

        def finished(name: str, y: jax.Array) -> jax.Array:
            if config.has_qkv_bias:
                y = y + getattr(self, name + "_bias")[...].astype(x.dtype)
            if config.qk_norm and name != "v":
                axes = -1 if config.qk_norm_per_head else (-2, -1)
                y = rms_norm(y, getattr(self, name + "_norm"), config.norm_eps, axes)
            y = jnp.clip(y, -config.clip_qkv, config.clip_qkv) if config.clip_qkv else y
            return checkpoint_name(y if name == "v" else rotate(y, rotary), "qkv")

        weights = tuple(gathered(getattr(self, name), P(None, "tensor", None), x.dtype) for name in "qkv")
        query, key, value = map(finished, "qkv", linears("bsd,dhk->bshk", per_head, x, weights))
        context = checkpoint_name(attend(query, key, value), "context")
        out = gathered(self.o, P("tensor", None, None), x.dtype)
        y = linear("bshk,hkd->bsd", STREAM, context, out)
        return y + self.o_bias[...].astype(x.dtype) if config.attention_bias else y

    def mlp(self, x: jax.Array) -> tuple[jax.Array, moe.Routing | None]:
        return self.mixture(x) if self.config.experts else (self.feed_forward(x), None)

    def feed_forward(self, x: jax.Array, prefix: str = "") -> jax.Array:
        """The MLP whose weights are called `prefix` + gate, up and down."""

        def project(name: str) -> jax.Array:
            weight = gathered(getattr(self, prefix + name), P(None, "tensor"), x.dtype)
            y = linear("bsd,df->bsf", P(BATCH, None, "tensor"), x, weight)
            return y + getattr(self, name + "_bias")[...].astype(x.dtype) if self.config.mlp_bias else y

        if self.config.mlp == "swiglu":
            hidden = swiglu(project("gate"), project("up"))
        else:
            hidden = jax.nn.gelu(project("up"), approximate=False)
        down = gathered(getattr(self, prefix + "down"), P("tensor", None), x.dtype)
        y = linear("bsf,fd->bsd", STREAM, hidden, down)
        return y + self.down_bias[...].astype(x.dtype) if self.config.mlp_bias else y

    def mixture(self, x: jax.Array) -> tuple[jax.Array, moe.Routing]:
        into, out = P(None, None, "tensor"), P(None, "tensor", None)
        mixed, routing = moe.mixture(
            x,
            gathered(self.router, P(None, None), x.dtype),
            gathered(self.gate, into, x.dtype),
            gathered(self.up, into, x.dtype),
            gathered(self.down, out, x.dtype),
            per_token=self.config.experts_per_token,
            normalise=self.config.normalise_experts,
        )
        if not self.config.shared_expert_width:
            return mixed, routing
        score = jnp.einsum("bsd,d->bs", x, self.shared_router[...].astype(x.dtype), out_sharding=P(BATCH, None))
        return mixed + jax.nn.sigmoid(score)[..., None] * self.feed_forward(x, "shared_"), routing


class MambaBlock(nnx.Module):
    """A selective state-space layer (2312.00752) behind an RMSNorm and added to the stream; it sees no mask and no
    positions, so its rows must hold one sequence each.

    mixer_norm [L, width]   x, z [L, width, inner]   conv [L, conv_width, inner]   conv_bias [L, inner]
    select [L, inner, step_rank + 2 state_size] (to step, b, c)   step [L, step_rank, inner]   step_bias [L, inner]
    a_log [L, inner, state_size]   skip [L, inner]   out [L, inner, width]
    """

    def __init__(self, config: ModelConfig, key: jax.Array):
        self.config = config
        key, step_key = jax.random.split(key)
        weights = Weights(key, config.init_std)
        width, inner, states, rank = config.width, config.mlp_width, config.state_size, config.step_rank
        add_norm(self, "mixer_norm", weights, config)
        self.x = weights.normal((width, inner), P("fsdp", "tensor"))
        self.z = weights.normal((width, inner), P("fsdp", "tensor"))
        self.conv = weights.normal((config.conv_width, inner), P(None, "tensor"))
        self.conv_bias = weights.constant(0.0, (inner,), P("tensor"))
        self.select = weights.normal((inner, rank + 2 * states), P("tensor", None))
        self.step = weights.normal((rank, inner), P(None, "tensor"))
        self.skip = weights.constant(1.0, (inner,), P("tensor"))
        self.out = weights.normal((inner, width), P("tensor", "fsdp"))
        # Decay rates 1, 2, ..., and steps from 0.001 to 0.1, evenly in the logarithm, as the authors begin.
        rates = jnp.log(jnp.arange(1, states + 1, dtype=jnp.float32))
        self.a_log = nnx.Param(jnp.broadcast_to(rates, (inner, states), out_sharding=P("tensor", None)))
        steps = jax.random.uniform(step_key, (inner,), jnp.float32, out_sharding=P("tensor"))
        self.step_bias = nnx.Param(jnp.log(jnp.expm1(0.001 * 100.0**steps)))

    def __call__(
        self, stream: jax.Array, rotary: tuple[jax.Array, jax.Array], attend: Attend, keep: Keep = everything
    ) -> tuple[jax.Array, None]:
        y = normed(self, "mixer_norm", stream)
        dtype, inner = y.dtype, P(BATCH, None, "tensor")
        x = linear("bsd,df->bsf", inner, y, gathered(self.x, P(None, "tensor"), dtype))
        z = linear("bsd,df->bsf", inner, y, gathered(self.z, P(None, "tensor"), dtype))
        x = jax.nn.silu(mamba.causal_convolution(x, self.conv[...].astype(dtype), self.conv_bias[...].astype(dtype)))
        selected = linear("bsf,fr->bsr", STREAM, x, self.select[...].astype(dtype))
        rank, states = self.config.step_rank, self.config.state_size
        step, b, c = jnp.split(selected, [rank, rank + states], axis=-1)
        step = linear("bsr,rf->bsf", inner, step, self.step[...].astype(dtype)) + self.step_bias[...].astype(dtype)
        decay = -jnp.exp(self.a_log[...].astype(jnp.float32))
        scanned = mamba.selective_scan(x, jax.nn.softplus(step), decay, b, c)
        mixed = (scanned + x * self.skip[...]).astype(dtype) * jax.nn.silu(z)
        out = gathered(self.out, P("tensor", None), dtype)
        return keep(stream) + linear("bsf,fd->bsd", STREAM, keep(mixed), out), None


class Decoder(nnx.Module):
    """Embedding, stacked blocks, final norm, and the head unless it is the embedding."""

    def __init__(self, config: ModelConfig, key: jax.Array):
        self.config = config
        embed_key, layers_key, head_key = jax.random.split(key, 3)
        table = Weights(embed_key, config.init_std)
        self.embed = table.normal((config.vocab_size, config.width), P("tensor", "fsdp"))
        block = Block if config.mixer == "attention" else MambaBlock
        self.layers = jax.vmap(lambda k: block(config, k))(jax.random.split(layers_key, config.layers))
        add_norm(self, "norm", table, config)
        if not config.tied_embeddings:
            head = Weights(head_key, config.init_std)
            self.head = head.normal((config.width, config.vocab_size), P("fsdp", "tensor"))

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        attend: Attend,
        dtype: jnp.dtype,
        remat: Remat,
        scan_layers: bool,
        places: jax.Array | None,
    ) -> tuple[jax.Array, moe.Routing | None]:
        rotary = rotary_factors(positions, self.config.rotary_dim, self.config.rope_theta, dtype)
        stream = gathered(self.embed, P(None, None), dtype).at[tokens].get(out_sharding=STREAM)

        def layer(stream: jax.Array, block: Block | MambaBlock) -> tuple[jax.Array, moe.Routing | None]:
            return block(checkpoint_name(stream, "layer_input"), rotary, attend)

        routing = None
        if places is None:
            stream, routing = jax.lax.scan(rematerialized(layer, remat), stream, self.layers, unroll=not scan_layers)
        else:
            *_, last = range(self.config.layers)
            stream = jax.lax.fori_loop(0, last, lambda i, x: layer(x, layer_of(self.layers, i))[0], stream)
            stream, _ = layer_of(self.layers, last)(stream, rotary, attend, functools.partial(at_places, places))
        return normed(self, "norm", stream), routing


def layer_of(stacked: nnx.Module, index: jax.typing.ArrayLike) -> Any:
    """One of the layers that are stacked along the first axis of every parameter."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), stacked)


def at_places(places: jax.Array, x: jax.Array) -> jax.Array:
    """x [batch, length, ...] at places [shards, places] (see `hidden_states`): [shards, places, ...]."""
    spec = jax.typeof(x).sharding.spec
    local = lambda places, x: x.reshape(-1, *x.shape[2:])[places[0]][None]
    return jax.shard_map(local, in_specs=(P(BATCH, None), spec), out_specs=spec, check_vma=False)(places, x)


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


def gathered(weight: nnx.Param, spec: jax.P, dtype: jnp.dtype) -> jax.Array:
    """The weight in `dtype`, whole over fsdp. The cast comes first: the gather moves the smaller numbers."""
    return jax.reshard(weight[...].astype(dtype), spec)


def add_norm(module: nnx.Module, name: str, weights: Weights, config: ModelConfig) -> None:
    """Give `module` the parameters of the norm `name`: a scale, a scale and a bias, or none."""
    if config.norm != "nonparametric":
        setattr(module, name, weights.constant(1.0, (config.width,), P(None)))
    if config.norm == "layer":
        setattr(module, name + "_bias", weights.constant(0.0, (config.width,), P(None)))


def normed(module: Any, name: str, x: jax.Array) -> jax.Array:
    """The norm `name` of `module` applied to x."""
    eps = module.config.norm_eps
    if module.config.norm == "rms":
        return rms_norm(x, getattr(module, name), eps)
    return layer_norm(x, getattr(module, name, None), getattr(module, name + "_bias", None), eps)


def rms_norm(x: jax.Array, scale: nnx.Param, eps: float, axes: int | tuple[int, ...] = -1) -> jax.Array:
    """x / rms(x) in float32, rounded to x's dtype, times the scale (1910.07467; order of casts as in transformers)."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=axes, keepdims=True) + eps)
    return y.astype(x.dtype) * scale[...].astype(x.dtype)


def layer_norm(x: jax.Array, scale: nnx.Param | None, bias: nnx.Param | None, eps: float) -> jax.Array:
    """(x - mean) / standard deviation, times the scale, plus the bias, in float32 (1607.06450)."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    y = y if scale is None else y * scale[...].astype(jnp.float32)
    return (y if bias is None else y + bias[...].astype(jnp.float32)).astype(x.dtype)


def rotary_factors(positions: jax.Array, features: int, theta: float, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """cos and signed sin [batch, length, 1, features] of the rotary angles (2104.09864), computed in float32."""
    frequencies = theta ** -(jnp.arange(0, features, 2, dtype=jnp.float32) / features)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    # As a product and not by concatenation, which XLA's CPU backend would compute again wherever the table is used.
    half = np.eye(features // 2, dtype=np.float32)
    spread = lambda table, first: jnp.einsum(
        "bsuj,jk->bsuk", table, np.concatenate([first * half, half], axis=1), precision="highest"
    ).astype(dtype)
    return spread(jnp.cos(angles), 1), spread(jnp.sin(angles), -1)


def rotate(x: jax.Array, rotary: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotary embedding of the first features, half-split layout: of n, feature j is paired with feature j + n / 2."""
    cos, sin = rotary
    turned, kept = jnp.split(x, [cos.shape[-1]], axis=-1)
    pairs = turned.reshape(*turned.shape[:-1], 2, -1)
    y = turned * cos + jnp.flip(pairs, axis=-2).reshape(turned.shape) * sin
    return jnp.concatenate([y, kept], axis=-1) if kept.shape[-1] else y
