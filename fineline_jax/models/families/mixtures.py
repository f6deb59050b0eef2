"""Mixtures of experts named like Llama: OLMoE, Mixtral, Qwen2-MoE, Qwen3-MoE, Granite-MoE."""

import dataclasses
from typing import Any

from fineline_jax.models.families import llama
from fineline_jax.models.families.hf_config import HfConfig, Rope, Windows
from fineline_jax.models.families.lines import lines
from fineline_jax.models.families.name_map import Weight
from fineline_jax.models.families.olmo import OLMO2, QK_NORMS
from fineline_jax.models.families.scaled import GRANITE

_LAYER = "model.layers.{layer}."
EXPERTS = (
    *lines(_LAYER, "router=mlp.gate"),
    *lines(_LAYER + "mlp.experts.{expert}.", "gate=gate_proj up=up_proj down=down_proj"),
)
SILU = {"hidden_act": ("silu", "swish")}


def _keys(experts: int, per_token: int) -> dict[str, Any]:
    return {
        "mlp": None,
        "experts": ("num_experts", "num_local_experts", experts),
        "experts_per_token": ("num_experts_per_tok", per_token),
        "normalise_experts": ("norm_topk_prob", False),
    }


OLMOE = llama.LLAMA.like(
    "olmoe",
    "OlmoeForCausalLM",
    silent={"context": 4096, "norm_eps": 1e-5},
    keys={"clip_qkv": ("clip_qkv", 0.0), **_keys(64, 8)},
    fixed={"qk_norm": True},
    only=SILU,
    write_more=lambda config: {"clip_qkv": config.clip_qkv or None},
    weights=(*llama.OUTER, *llama.NORMS, *llama.ATTENTION, *QK_NORMS, *EXPERTS),
    ignored=(),
)
FLEX_OLMO = OLMO2.like(
    "flex_olmo",
    "FlexOlmoForCausalLM",
    keys={"context": ("max_position_embeddings", 4096), "norm_eps": ("rms_norm_eps", 1e-6), **_keys(7, 5)},
    only=SILU,
    rope=Rope(500_000.0),
    weights=(*(line for line in OLMO2.weights if line not in llama.MLP), *EXPERTS),
)

MIXTRAL = llama.LLAMA.like(
    "mixtral",
    "MixtralForCausalLM",
    silent={"context": 131_072, "kv_heads": 8, "norm_eps": 1e-5},
    keys={
        "experts": ("num_local_experts", "num_experts", 8),
        "experts_per_token": ("num_experts_per_tok", 2),
        "mlp": None,
    },
    fixed={"normalise_experts": True},
    only=SILU,
    rope=Rope(1_000_000.0),
    windows=Windows(None, by_layer=False),
    weights=(
        *llama.OUTER,
        *llama.NORMS,
        *llama.ATTENTION,
        *lines(_LAYER, "router=block_sparse_moe.gate"),
        *lines(_LAYER + "block_sparse_moe.experts.{expert}.", "gate=w1 up=w3 down=w2"),
    ),
    ignored=(),
)
_FUSED = _LAYER + "block_sparse_moe."
GRANITE_MOE = GRANITE.like(
    "granitemoe",
    "GraniteMoeForCausalLM",
    keys=_keys(8, 2) | {"experts": ("num_local_experts", 8), "normalise_experts": None, "mlp_bias": None},
    fixed={"normalise_experts": True},
    only=SILU,
    weights=(
        *llama.OUTER,
        *llama.NORMS,
        *llama.ATTENTION,
        *lines(_FUSED, "router=router.layer"),
        Weight(_FUSED + "input_linear.weight", "layers.gate", "experts (0/2 mlp) width -> experts width mlp"),
        Weight(_FUSED + "input_linear.weight", "layers.up", "experts (1/2 mlp) width -> experts width mlp"),
        Weight(_FUSED + "output_linear.weight", "layers.down", "experts width mlp -> experts mlp width"),
    ),
)


def _all_layers_have_experts(raw: HfConfig, fields: dict[str, Any]) -> dict[str, Any]:
    """Raise UserError where some layers have one MLP and others experts: ours are stacked, all alike."""
    dense = [layer for layer in raw.items("mlp_only_layers", int) if layer < fields["layers"]]
    if dense:
        raw.refuse("mlp_only_layers", dense)
    if fields.get("shared_expert_width") == 0:
        raw.refuse("shared_expert_intermediate_size", 0)
    return {}


def shared_expert(name: str) -> tuple[Weight, ...]:
    """Lines of the expert for all tokens, whose tensors stand behind `name`."""
    of_mlp = lines(f"{_LAYER}mlp.{name}.", "gate=gate_proj up=up_proj down=down_proj")
    return tuple(dataclasses.replace(line, ours=line.ours.replace(".", ".shared_")) for line in of_mlp)


QWEN2_MOE = llama.QWEN2.like(
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    silent={"kv_heads": 16},
    keys=_keys(60, 4)
    | {"mlp_width": "moe_intermediate_size", "shared_expert_width": "shared_expert_intermediate_size"}
    | {"qkv_bias": ("qkv_bias", True)},
    fixed={"qkv_bias": None},
    only={"decoder_sparse_step": (1,), **SILU},
    read_more=_all_layers_have_experts,
    write_more=lambda config: {"mlp_only_layers": []},
    weights=(
        *llama.OUTER,
        *llama.NORMS,
        *llama.ATTENTION,
        *EXPERTS,
        *shared_expert("shared_expert"),
        Weight(_LAYER + "mlp.shared_expert_gate.weight", "layers.shared_router", "1:one width -> (1:one width)"),
    ),
)
QWEN3_MOE = llama.QWEN3.like(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    silent={"kv_heads": 4, "head_dim": 0},
    keys={"mlp_width": "moe_intermediate_size", **_keys(128, 8)},
    only={"decoder_sparse_step": (1,), **SILU},
    windows=Windows(4096, in_use=False, by_layer=False),
    read_more=_all_layers_have_experts,
    write_more=lambda config: {"mlp_only_layers": []},
    weights=(*llama.OUTER, *llama.NORMS, *llama.ATTENTION, *llama.HEAD_NORMS, *EXPERTS),
)
