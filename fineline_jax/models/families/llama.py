"""Llama and what is named like it: Amber, OpenLLaMA, the m-a-p reproductions, TinyLlama, DeepSeek LLM, Yi, Qwen."""

import dataclasses
import functools
from typing import Any

from fineline_jax.models.config import ModelConfig
from fineline_jax.models.families.family import Family
from fineline_jax.models.families.hf_config import HfConfig
from fineline_jax.models.families.name_map import Weight

_LAYER = "model.layers.{layer}."
_ATTENTION = _LAYER + "self_attn."
_MLP = _LAYER + "mlp."

OUTER = (
    Weight("model.embed_tokens.weight", "embed", "vocab width -> vocab width"),
    Weight("model.norm.weight", "norm", "width -> width"),
    Weight("lm_head.weight", "head", "vocab width -> width vocab"),
)
NORMS = (
    Weight(_LAYER + "input_layernorm.weight", "layers.attention_norm", "width -> width"),
    Weight(_LAYER + "post_attention_layernorm.weight", "layers.mlp_norm", "width -> width"),
)
ATTENTION = (
    Weight(_ATTENTION + "q_proj.weight", "layers.q", "(heads dim) width -> width heads dim"),
    Weight(_ATTENTION + "k_proj.weight", "layers.k", "(heads dim) width -> width heads dim"),
    Weight(_ATTENTION + "v_proj.weight", "layers.v", "(heads dim) width -> width heads dim"),
    Weight(_ATTENTION + "o_proj.weight", "layers.o", "width (heads dim) -> heads dim width"),
    Weight(_ATTENTION + "q_proj.bias", "layers.q_bias", "(heads dim) -> heads dim"),
    Weight(_ATTENTION + "k_proj.bias", "layers.k_bias", "(heads dim) -> heads dim"),
    Weight(_ATTENTION + "v_proj.bias", "layers.v_bias", "(heads dim) -> heads dim"),
    Weight(_ATTENTION + "o_proj.bias", "layers.o_bias", "width -> width"),
)
MLP = (
    Weight(_MLP + "gate_proj.weight", "layers.gate", "mlp width -> width mlp"),
    Weight(_MLP + "up_proj.weight", "layers.up", "mlp width -> width mlp"),
    Weight(_MLP + "down_proj.weight", "layers.down", "width mlp -> mlp width"),
    Weight(_MLP + "gate_proj.bias", "layers.gate_bias", "mlp -> mlp"),
    Weight(_MLP + "up_proj.bias", "layers.up_bias", "mlp -> mlp"),
    Weight(_MLP + "down_proj.bias", "layers.down_bias", "width -> width"),
)
# Old files hold the rotary frequencies, which are computed.
ROTARY = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)


def from_hf(
    raw: HfConfig,
    *,
    context: int = 2048,
    kv_heads: int | None = None,
    norm_eps: float = 1e-6,
    rope_theta: float = 10_000.0,
) -> ModelConfig:
    """The model of a Llama-like config.json, as transformers 4 or 5 wrote it.

    The others: what the family's own class takes where the file is silent (kv_heads None: as many as query heads).
    """
    raw.only("hidden_act", "silu", "swish")
    raw.only("quantization_config")
    for fraction in (raw.rope().get("partial_rotary_factor"), raw.raw.get("partial_rotary_factor")):
        if fraction not in (None, 1, 1.0):
            raw.refuse("partial_rotary_factor", fraction)
    heads = raw.integer("num_attention_heads")
    if kv_heads is None or "num_key_value_heads" in raw.raw:  # null means so in every family
        kv_heads = heads
    context = raw.integer("max_position_embeddings", "max_sequence_length", "model_max_length", default=context)
    raw.no_window(context)
    return ModelConfig(
        vocab_size=raw.integer("vocab_size"),
        width=raw.integer("hidden_size"),
        layers=raw.integer("num_hidden_layers"),
        heads=heads,
        mlp_width=raw.integer("intermediate_size"),
        kv_heads=raw.integer("num_key_value_heads", default=kv_heads),
        head_dim=raw.integer("head_dim", default=0),
        context=context,
        rope_theta=raw.rope_theta(default=rope_theta),
        norm_eps=raw.number("rms_norm_eps", default=norm_eps),
        tied_embeddings=raw.flag("tie_word_embeddings", default=False),
        attention_bias=raw.flag("attention_bias", default=False),
        mlp_bias=raw.flag("mlp_bias", default=False),
        init_std=raw.number("initializer_range", default=0.02),
    )


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """config.json of a Llama-like model, readable by transformers 4 and 5."""
    return {
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.context,
        "initializer_range": config.init_std,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,  # transformers 4
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},  # transformers 5
        "tie_word_embeddings": config.tied_embeddings,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "use_cache": True,
    }


LLAMA = Family(
    name="llama",
    architectures=("LlamaForCausalLM", "LLaMAForCausalLM"),
    from_hf=from_hf,
    to_hf=to_hf,
    weights=OUTER + NORMS + ATTENTION + MLP,
    ignored=ROTARY,
)

# The first uploads of Yi: Llama with other names for the norms, and another base of the rotary angles by default.
YI = Family(
    name="yi",
    architectures=("YiForCausalLM",),
    # The defaults of its configuration_yi.py.
    from_hf=functools.partial(from_hf, context=4096, kv_heads=4, norm_eps=1e-5, rope_theta=5_000_000.0),
    to_hf=lambda config: to_hf(config) | {"model_type": "Yi"},
    weights=(
        *OUTER,
        Weight(_LAYER + "ln1.weight", "layers.attention_norm", "width -> width"),
        Weight(_LAYER + "ln2.weight", "layers.mlp_norm", "width -> width"),
        *ATTENTION,
        *MLP,
    ),
    ignored=ROTARY,
)

MISTRAL = Family(
    name="mistral",
    architectures=("MistralForCausalLM",),
    # Where the file is silent the window is 4096 (transformers' MistralConfig); null means none.
    from_hf=lambda raw: from_hf(HfConfig(raw.where, {"sliding_window": 4096, **raw.raw}), context=131_072, kv_heads=8),
    to_hf=lambda config: to_hf(config) | {"model_type": "mistral", "sliding_window": None},
    weights=OUTER + NORMS + ATTENTION + MLP,
    ignored=ROTARY,
)

QWEN2 = Family(
    name="qwen2",
    architectures=("Qwen2ForCausalLM",),
    from_hf=lambda raw: dataclasses.replace(from_hf(raw, context=32_768, kv_heads=32), qkv_bias=True),
    to_hf=lambda config: to_hf(config) | {"model_type": "qwen2", "use_sliding_window": False},
    weights=OUTER + NORMS + ATTENTION + MLP,
)

# RMSNorm of each head's queries and keys, with one scale for all heads.
HEAD_NORMS = (
    Weight(_ATTENTION + "q_norm.weight", "layers.q_norm", "dim -> dim"),
    Weight(_ATTENTION + "k_norm.weight", "layers.k_norm", "dim -> dim"),
)


def from_qwen3(raw: HfConfig, kv_heads: int = 32) -> ModelConfig:
    model = from_hf(raw, context=32_768, kv_heads=kv_heads)
    return dataclasses.replace(model, qk_norm=True, qk_norm_per_head=True)


QWEN3 = Family(
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    # 128 is what transformers takes where the file is silent; Qwen's files state it.
    from_hf=lambda raw: dataclasses.replace(from_qwen3(raw), head_dim=raw.integer("head_dim", default=128)),
    to_hf=lambda config: to_hf(config) | {"model_type": "qwen3", "use_sliding_window": False},
    weights=OUTER + NORMS + ATTENTION + HEAD_NORMS + MLP,
)
