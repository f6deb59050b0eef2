"""Mixtures of experts named like Llama: OLMoE and Mixtral."""

import dataclasses

from fineline_jax.models.config import ModelConfig
from fineline_jax.models.families import llama
from fineline_jax.models.families.family import Family
from fineline_jax.models.families.hf_config import HfConfig
from fineline_jax.models.families.name_map import Weight
from fineline_jax.models.families.olmo import QK_NORMS

_LAYER = "model.layers.{layer}."


def _olmoe(raw: HfConfig) -> ModelConfig:
    return dataclasses.replace(
        llama.from_hf(raw),
        qk_norm=True,
        clip_qkv=raw.number("clip_qkv", default=0.0),
        experts=raw.integer("num_experts", default=64),
        experts_per_token=raw.integer("num_experts_per_tok", default=8),
        normalise_experts=raw.flag("norm_topk_prob", default=False),
    )


_EXPERT = _LAYER + "mlp.experts.{expert}."
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
        Weight(_LAYER + "mlp.gate.weight", "layers.router", "experts width -> width experts"),
        Weight(_EXPERT + "gate_proj.weight", "layers.gate", "mlp width -> width mlp"),
        Weight(_EXPERT + "up_proj.weight", "layers.up", "mlp width -> width mlp"),
        Weight(_EXPERT + "down_proj.weight", "layers.down", "width mlp -> mlp width"),
    ),
)


def _mixtral(raw: HfConfig) -> ModelConfig:
    return dataclasses.replace(
        llama.from_hf(raw),
        experts=raw.integer("num_local_experts", default=8),
        experts_per_token=raw.integer("num_experts_per_tok", default=2),
        normalise_experts=True,
    )


_EXPERT = _LAYER + "block_sparse_moe.experts.{expert}."
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
        Weight(_EXPERT + "w1.weight", "layers.gate", "mlp width -> width mlp"),
        Weight(_EXPERT + "w3.weight", "layers.up", "mlp width -> width mlp"),
        Weight(_EXPERT + "w2.weight", "layers.down", "width mlp -> mlp width"),
    ),
)
