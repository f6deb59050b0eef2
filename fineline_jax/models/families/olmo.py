"""OLMo in its two layouts (transformers' own, and the first releases'), and OLMo 2."""

import dataclasses
from typing import Any

from fineline_jax.models.config import ModelConfig
from fineline_jax.models.families import llama
from fineline_jax.models.families.family import Family
from fineline_jax.models.families.hf_config import HfConfig
from fineline_jax.models.families.name_map import Weight

NORM_EPS = 1e-5
"""OLMo's; no file states it (transformers OlmoLayerNorm, allenai/OLMo LayerNorm)."""


def _from_hf(raw: HfConfig) -> ModelConfig:
    clip = raw.number("clip_qkv", default=0.0)
    return dataclasses.replace(llama.from_hf(raw), norm="nonparametric", norm_eps=NORM_EPS, clip_qkv=clip)


def _to_hf(config: ModelConfig) -> dict[str, Any]:
    fields = llama.to_hf(config) | {"model_type": "olmo", "clip_qkv": config.clip_qkv or None}
    del fields["rms_norm_eps"]
    return fields


OLMO = Family(
    name="olmo",
    architectures=("OlmoForCausalLM",),
    from_hf=_from_hf,
    to_hf=_to_hf,
    weights=llama.OUTER + llama.ATTENTION + llama.MLP,
)


_LAYER = "model.layers.{layer}."
QK_NORMS = (
    Weight(_LAYER + "self_attn.q_norm.weight", "layers.q_norm", "(heads dim) -> heads dim"),
    Weight(_LAYER + "self_attn.k_norm.weight", "layers.k_norm", "(heads dim) -> heads dim"),
)

OLMO2 = Family(
    name="olmo2",
    architectures=("Olmo2ForCausalLM",),
    from_hf=lambda raw: dataclasses.replace(llama.from_hf(raw, norm_eps=1e-5), norm_after=True, qk_norm=True),
    to_hf=lambda config: llama.to_hf(config) | {"model_type": "olmo2"},
    weights=(
        *llama.OUTER,
        *llama.ATTENTION,
        *QK_NORMS,
        Weight(_LAYER + "post_attention_layernorm.weight", "layers.attention_norm", "width -> width"),
        *llama.MLP,
        Weight(_LAYER + "post_feedforward_layernorm.weight", "layers.mlp_norm", "width -> width"),
    ),
)


def _from_first(raw: HfConfig) -> ModelConfig:
    """The config of allenai/OLMo's own ModelConfig (olmo/config.py), which the first releases carry; its defaults."""
    raw.only("activation_type", "swiglu")
    raw.only("block_type", "sequential")
    raw.only("layer_norm_type", "default", "low_precision")
    for key in ("layer_norm_with_affine", "include_bias"):
        raw.only(key, False, default=True)
    off = ("attention_layer_norm", "norm_after", "alibi", "scale_logits")
    for key in (*off, "multi_query_attention", "embedding_layer_norm"):
        raw.only(key, False)
    raw.only("rope", True, default=False)
    heads, width = raw.integer("n_heads"), raw.integer("d_model")
    raw.only("n_kv_heads", heads)
    # mlp_hidden_size counts gate and up together
    both = raw.integer("mlp_hidden_size", default=width * raw.integer("mlp_ratio", default=4))
    return ModelConfig(
        vocab_size=raw.integer("embedding_size", "vocab_size"),
        width=width,
        layers=raw.integer("n_layers"),
        heads=heads,
        mlp_width=both // 2,
        context=raw.integer("max_sequence_length", default=1024),
        rope_theta=raw.number("rope_theta", default=10_000.0),
        norm_eps=NORM_EPS,
        tied_embeddings=raw.flag("weight_tying", default=True),
        init_std=raw.number("init_std", default=0.02),
        norm="nonparametric",
        clip_qkv=raw.number("clip_qkv", default=0.0),
    )


def _to_first(config: ModelConfig) -> dict[str, Any]:
    return {
        "model_type": "hf_olmo",
        "vocab_size": config.vocab_size,
        "embedding_size": config.vocab_size,
        "d_model": config.width,
        "n_layers": config.layers,
        "n_heads": config.heads,
        "mlp_hidden_size": 2 * config.mlp_width,
        "max_sequence_length": config.context,
        "rope": True,
        "rope_theta": config.rope_theta,
        "alibi": False,
        "activation_type": "swiglu",
        "block_type": "sequential",
        "layer_norm_type": "default",
        "layer_norm_with_affine": False,
        "include_bias": False,
        "weight_tying": config.tied_embeddings,
        "clip_qkv": config.clip_qkv or None,
        "init_std": config.init_std,
    }


_BLOCK = "model.transformer.blocks.{layer}."
OLMO_FIRST = Family(
    name="olmo_first",
    architectures=("OLMoForCausalLM",),
    from_hf=_from_first,
    to_hf=_to_first,
    weights=(
        Weight("model.transformer.wte.weight", "embed", "vocab width -> vocab width"),
        Weight(_BLOCK + "att_proj.weight", "layers.q", "(0/3 heads dim) width -> width heads dim"),
        Weight(_BLOCK + "att_proj.weight", "layers.k", "(1/3 heads dim) width -> width heads dim"),
        Weight(_BLOCK + "att_proj.weight", "layers.v", "(2/3 heads dim) width -> width heads dim"),
        Weight(_BLOCK + "attn_out.weight", "layers.o", "width (heads dim) -> heads dim width"),
        Weight(_BLOCK + "ff_proj.weight", "layers.up", "(0/2 mlp) width -> width mlp"),
        Weight(_BLOCK + "ff_proj.weight", "layers.gate", "(1/2 mlp) width -> width mlp"),
        Weight(_BLOCK + "ff_out.weight", "layers.down", "width mlp -> mlp width"),
        Weight("model.transformer.ff_out.weight", "head", "vocab width -> width vocab"),
    ),
    tied_copies=("model.transformer.ff_out.weight",),
)
