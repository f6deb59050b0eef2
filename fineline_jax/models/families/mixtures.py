"""Mixtures of experts named like Llama: OLMoE, Mixtral, Qwen2-MoE and Qwen3-MoE."""

import dataclasses
from typing import Any

from fineline_jax.models.config import ModelConfig
from fineline_jax.models.families import llama
from fineline_jax.models.families.family import Family
from fineline_jax.models.families.hf_config import HfConfig
from fineline_jax.models.families.name_map import Weight
from fineline_jax.models.families.olmo import QK_NORMS

_LAYER = "model.layers.{layer}."


def _olmoe(raw: HfConfig) -> ModelConfig:
    return dataclasses.replace(
        llama.from_hf(raw, context=4096, norm_eps=1e-5),
        qk_norm=True,
        clip_qkv=raw.number("clip_qkv", default=0.0),
        experts=raw.integer("num_experts", default=64),
        experts_per_token=raw.integer("num_experts_per_tok", default=8),
        normalise_experts=raw.flag("norm_topk_prob", default=False),
    )


_EXPERT = _LAYER + "mlp.experts.{expert}."
_EXPERTS = (
    Weight(_LAYER + "mlp.gate.weight", "layers.router", "experts width -> width experts"),
    Weight(_EXPERT + "gate_proj.weight", "layers.gate", "mlp width -> width mlp"),
    Weight(_EXPERT + "up_proj.weight", "layers.up", "mlp width -> width mlp"),
    Weight(_EXPERT + "down_proj.weight", "layers.down", "width mlp -> mlp width"),
)
OLMOE = Family(
    name="olmoe",
    architectures=("OlmoeForCausalLM",),
    from_hf=_olmoe,
    to_hf=lambda config: (
        llama.to_hf(config)
        | {
            "model_type": "olmoe",
            "clip_qkv": config.clip_qkv or None,
            "num_experts": config.experts,
            "num_experts_per_tok": config.experts_per_token,
            "norm_topk_prob": config.normalise_experts,
        }
    ),
    weights=(
        *llama.OUTER,
        *llama.NORMS,
        *llama.ATTENTION,
        *QK_NORMS,
        *_EXPERTS,
    ),
)


def _mixtral(raw: HfConfig) -> ModelConfig:
    return dataclasses.replace(
        llama.from_hf(raw, context=131_072, kv_heads=8, norm_eps=1e-5, rope_theta=1e6),
        experts=raw.integer("num_local_experts", default=8),
        experts_per_token=raw.integer("num_experts_per_tok", default=2),
        normalise_experts=True,
    )


_SPARSE = _LAYER + "block_sparse_moe.experts.{expert}."
MIXTRAL = Family(
    name="mixtral",
    architectures=("MixtralForCausalLM",),
    from_hf=_mixtral,
    to_hf=lambda config: (
        llama.to_hf(config)
        | {
            "model_type": "mixtral",
            "num_local_experts": config.experts,
            "num_experts_per_tok": config.experts_per_token,
        }
    ),
    weights=(
        *llama.OUTER,
        *llama.NORMS,
        *llama.ATTENTION,
        Weight(_LAYER + "block_sparse_moe.gate.weight", "layers.router", "experts width -> width experts"),
        Weight(_SPARSE + "w1.weight", "layers.gate", "mlp width -> width mlp"),
        Weight(_SPARSE + "w3.weight", "layers.up", "mlp width -> width mlp"),
        Weight(_SPARSE + "w2.weight", "layers.down", "width mlp -> mlp width"),
    ),
)


def _all_layers_have_experts(raw: HfConfig) -> None:
    """Raise UserError where some layers have one MLP and others experts: ours are stacked, all alike."""
    dense = [layer for layer in raw.items("mlp_only_layers", int) if layer < raw.integer("num_hidden_layers")]
    if dense:
        raw.refuse("mlp_only_layers", dense)
    raw.only("decoder_sparse_step", 1)


def _qwen(model: ModelConfig, raw: HfConfig, experts: int, per_token: int) -> ModelConfig:
    _all_layers_have_experts(raw)
    return dataclasses.replace(
        model,
        mlp_width=raw.integer("moe_intermediate_size"),
        experts=raw.integer("num_experts", "num_local_experts", default=experts),
        experts_per_token=raw.integer("num_experts_per_tok", default=per_token),
        normalise_experts=raw.flag("norm_topk_prob", default=False),
    )


def _qwen2_moe(raw: HfConfig) -> ModelConfig:
    model = _qwen(llama.from_hf(raw, context=32_768, kv_heads=16), raw, experts=60, per_token=4)
    shared = raw.integer("shared_expert_intermediate_size")
    if not shared:
        raw.refuse("shared_expert_intermediate_size", shared)
    return dataclasses.replace(model, qkv_bias=raw.flag("qkv_bias", default=True), shared_expert_width=shared)


def _to_qwen(config: ModelConfig) -> dict[str, Any]:
    return llama.to_hf(config) | {
        "num_experts": config.experts,
        "num_experts_per_tok": config.experts_per_token,
        "moe_intermediate_size": config.mlp_width,
        "norm_topk_prob": config.normalise_experts,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "use_sliding_window": False,
    }


_SHARED = _LAYER + "mlp.shared_expert."
QWEN2_MOE = Family(
    name="qwen2_moe",
    architectures=("Qwen2MoeForCausalLM",),
    from_hf=_qwen2_moe,
    to_hf=lambda config: (
        _to_qwen(config)
        | {
            "model_type": "qwen2_moe",
            "shared_expert_intermediate_size": config.shared_expert_width,
            "qkv_bias": config.qkv_bias,
        }
    ),
    weights=(
        *llama.OUTER,
        *llama.NORMS,
        *llama.ATTENTION,
        *_EXPERTS,
        Weight(_SHARED + "gate_proj.weight", "layers.shared_gate", "mlp width -> width mlp"),
        Weight(_SHARED + "up_proj.weight", "layers.shared_up", "mlp width -> width mlp"),
        Weight(_SHARED + "down_proj.weight", "layers.shared_down", "width mlp -> mlp width"),
        Weight(_LAYER + "mlp.shared_expert_gate.weight", "layers.shared_router", "1:one width -> (1:one width)"),
    ),
)

QWEN3_MOE = Family(
    name="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM",),
    from_hf=lambda raw: _qwen(llama.from_qwen3(raw, kv_heads=4), raw, experts=128, per_token=8),
    to_hf=lambda config: _to_qwen(config) | {"model_type": "qwen3_moe"},
    weights=(*llama.OUTER, *llama.NORMS, *llama.ATTENTION, *llama.HEAD_NORMS, *_EXPERTS),
)
