"""DeepSeek-V2, and V3 with Moonlight: latent attention, experts chosen by groups, first layers without."""

import dataclasses
from typing import Any

from fineline_jax.models.config import ModelConfig
from fineline_jax.models.families.hf_config import HfConfig
from fineline_jax.models.families.llama import ATTENTION, LLAMA, MLP, NORMS, OUTER, OUTPUT
from fineline_jax.models.families.mixtures import EXPERTS, SILU, shared_expert
from fineline_jax.models.families.name_map import Weight

_ATTENTION = "model.layers.{layer}.self_attn."
_LATENT = (
    *NORMS,
    *ATTENTION[:1],
    Weight(_ATTENTION + "q_a_proj.weight", "layers.q_a", "rank width -> width rank"),
    Weight(_ATTENTION + "q_a_layernorm.weight", "layers.q_a_norm", "rank -> rank"),
    Weight(_ATTENTION + "q_b_proj.weight", "layers.q_b", "(heads dim) rank -> rank heads dim"),
    Weight(_ATTENTION + "kv_a_proj_with_mqa.weight", "layers.kv_a", "rank@0-{r}/{rr} width -> width rank"),
    Weight(_ATTENTION + "kv_a_proj_with_mqa.weight", "layers.k_rope", "rank@{r}-{rr}/{rr} width -> width rank"),
    Weight(_ATTENTION + "kv_a_layernorm.weight", "layers.kv_a_norm", "rank -> rank"),
    Weight(_ATTENTION + "kv_b_proj.weight", "layers.k_b", "(heads dim@0-{n}/{nv}) rank -> rank heads dim"),
    Weight(_ATTENTION + "kv_b_proj.weight", "layers.v_b", "(heads dim@{n}-{nv}/{nv}) rank -> rank heads dim"),
    *OUTPUT[:1],
)


def _more(n_shared: int, groups: tuple[int, int], method: str) -> Any:
    """`Family.read_more` of a class that takes these where the file is silent."""

    def read(raw: HfConfig, fields: dict[str, Any]) -> dict[str, Any]:
        short = "q_lora_rank" not in raw.raw or raw.find("q_lora_rank") is not None
        turns = {**raw.table("rope_parameters"), **raw.table("rope_scaling")}
        if turns.get("mscale_all_dim") and turns.get("rope_type", turns.get("type")) != "yarn":
            raw.refuse("mscale_all_dim", turns["mscale_all_dim"])
        known = {
            "head_dim": fields["nope_head_dim"] + raw.integer("qk_rope_head_dim", default=64),
            "q_lora_rank": raw.integer("q_lora_rank", default=1536) if short else 0,
            "shared_expert_width": raw.integer("n_shared_experts", default=n_shared) * fields["mlp_width"],
        }
        ungrouped = (raw.find("topk_method") or method) == "greedy"
        number = 1 if ungrouped else raw.integer("n_group", default=groups[0])
        chosen = raw.integer("topk_group", default=groups[1]) if number > 1 else 1
        return known | {"expert_groups": number, "groups_per_token": chosen}

    return read


def _write(config: ModelConfig) -> dict[str, Any]:
    grouped = "group_limited_greedy" if config.expert_groups > 1 else "greedy"
    return {
        "qk_rope_head_dim": config.rotary_dim,
        "q_lora_rank": config.q_lora_rank or None,
        "n_shared_experts": config.shared_expert_width // config.mlp_width,
        "n_group": config.expert_groups,
        "topk_group": config.groups_per_token,
        "topk_method": grouped if config.router == "softmax" else "noaux_tc",
    }


DEEPSEEK_V2 = LLAMA.like(
    "deepseek_v2",
    "DeepseekV2ForCausalLM",
    keys={
        "mlp_width": ("moe_intermediate_size", 1407),
        "dense_mlp_width": ("intermediate_size", 11_008),
        "dense_layers": ("first_k_dense_replace", 0),
        "experts": ("n_routed_experts", 64),
        "experts_per_token": ("num_experts_per_tok", ...),
        "expert_scale": ("routed_scaling_factor", 1.0),
        "kv_lora_rank": ("kv_lora_rank", 512),
        "nope_head_dim": ("qk_nope_head_dim", 128),
        "v_head_dim": ("v_head_dim", 128),
        **dict.fromkeys(("mlp", "head_dim", "attention_bias", "mlp_bias")),
    },
    fixed={"rotary_interleaved": True, "ungated_shared_expert": True},
    only={
        **SILU,
        **dict.fromkeys(("attention_bias", "mlp_bias", "norm_topk_prob"), (False,)),
        "moe_layer_freq": (1,),
        "scoring_func": ("softmax",),
        "topk_method": ("greedy", "group_limited_greedy"),
    },
    read_more=_more(2, (1, 1), "greedy"),
    write_more=_write,
    weights=(
        *OUTER,
        *_LATENT,
        *(dataclasses.replace(line, ours=f"dense_{line.ours}") for line in (*_LATENT, *MLP)),
        *EXPERTS,
        *shared_expert("shared_experts"),
    ),
)
DEEPSEEK_V3 = DEEPSEEK_V2.like(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    silent={"context": 4096, "mlp_width": 2048, "dense_mlp_width": 18_432, "dense_layers": 3, "experts": 256}
    | {"experts_per_token": 8, "expert_scale": 2.5},
    keys={"normalise_experts": ("norm_topk_prob", True), "rotary_interleaved": ("rope_interleave", True)},
    fixed={"rotary_interleaved": None, "router": "sigmoid"},
    only={"norm_topk_prob": None, "scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)},
    read_more=_more(1, (8, 4), "noaux_tc"),
    weights=(
        *DEEPSEEK_V2.weights,
        Weight("model.layers.{layer}.mlp.gate.e_score_correction_bias", "layers.router_bias", "experts -> experts"),
    ),
    ignored=(*LLAMA.ignored, r"model\.layers\.61\..*"),  # a layer that predicts the token after the next
)
