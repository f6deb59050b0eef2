"""DeepSeek-V2, and V3 with Moonlight: latent attention, experts chosen by groups, first layers without; and models that
have V3's experts with other attention: GLM-4.5, dots.llm1, Ling 2.0, Solar Open, EXAONE MoE, MiniMax-M2."""

import dataclasses
from typing import Any

from fineline_jax.models.config import ModelConfig
from fineline_jax.models.families.hf_config import HfConfig, Rope, Windows
from fineline_jax.models.families.lines import UNEQUAL, fused, lines
from fineline_jax.models.families.llama import (
    ATTENTION,
    HEAD_NORMS,
    LLAMA,
    MLP,
    NO_BIASES,
    NORMS,
    OUTER,
    OUTPUT,
    PER_HEAD,
)
from fineline_jax.models.families.mixtures import EXPERTS, MIXTRAL, SILU, shared_expert
from fineline_jax.models.families.name_map import Weight
from fineline_jax.models.families.olmo import QK_NORMS
from fineline_jax.models.families.scaled import EVERY_4TH, unrotated_where_full

_LAYER = "model.layers.{layer}."
_ATTENTION = _LAYER + "self_attn."
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


def _dense(*of_layer: Weight) -> tuple[Weight, ...]:
    """The lines of layers and of the first layers, which have no experts, in which the MLP's are added."""
    return (*of_layer, *(dataclasses.replace(line, ours=f"dense_{line.ours}") for line in (*of_layer, *MLP)))


def _groups(shared: tuple[str, int], groups: tuple[int, int], method: str = "noaux_tc") -> Any:
    """`Family.read_more` of a class that takes these where the file is silent; shared: the key of how many experts all
    tokens go through."""

    def read(raw: HfConfig, fields: dict[str, Any]) -> dict[str, Any]:
        ungrouped = (raw.find("topk_method") or method) == "greedy"
        number = 1 if ungrouped else raw.integer("n_group", default=groups[0])
        return {
            "shared_expert_width": raw.integer(shared[0], default=shared[1]) * fields["mlp_width"],
            "expert_groups": number,
            "groups_per_token": raw.integer("topk_group", default=groups[1]) if number > 1 else 1,
        }

    return read


def _latent(*of_groups: Any) -> Any:
    """`Family.read_more`: of latent attention, and `_groups`."""

    def read(raw: HfConfig, fields: dict[str, Any]) -> dict[str, Any]:
        short = "q_lora_rank" not in raw.raw or raw.find("q_lora_rank") is not None
        turns = {**raw.table("rope_parameters"), **raw.table("rope_scaling")}
        if turns.get("mscale_all_dim") and turns.get("rope_type", turns.get("type")) != "yarn":
            raw.refuse("mscale_all_dim", turns["mscale_all_dim"])
        return {
            "head_dim": fields["nope_head_dim"] + raw.integer("qk_rope_head_dim", default=64),
            "q_lora_rank": raw.integer("q_lora_rank", default=1536) if short else 0,
            **_groups(*of_groups)(raw, fields),
        }

    return read


def _write(config: ModelConfig) -> dict[str, Any]:
    grouped = "group_limited_greedy" if config.expert_groups > 1 else "greedy"
    return {
        "qk_rope_head_dim": config.rotary_dim,
        "q_lora_rank": config.q_lora_rank or None,
        "topk_method": grouped if config.router == "softmax" else "noaux_tc",
        **_write_groups("n_shared_experts")(config),
    }


def _write_groups(shared: str) -> Any:
    return lambda config: {
        shared: config.shared_expert_width // config.mlp_width,
        "n_group": config.expert_groups,
        "topk_group": config.groups_per_token,
    }


def _exaone(raw: HfConfig, fields: dict[str, Any]) -> dict[str, Any]:
    kinds = raw.items("mlp_layer_types", str)
    dense = fields["dense_layers"]
    if kinds and kinds != ["dense"] * dense + ["sparse"] * (fields["layers"] - dense):
        raw.refuse("mlp_layer_types", kinds)
    grouped = _groups(("num_shared_experts", 1), (1, 1))
    return grouped(raw, fields) | unrotated_where_full(EVERY_4TH, False)(raw, fields)


def _write_exaone(config: ModelConfig) -> dict[str, Any]:
    kinds = ["dense"] * config.dense_layers + ["sparse"] * (config.layers - config.dense_layers)
    return _write_groups("num_shared_experts")(config) | {"mlp_layer_types": kinds}


def _bailing(raw: HfConfig, fields: dict[str, Any]) -> dict[str, Any]:
    grouped = _groups(("num_shared_experts", 0), (8, 4))(raw, fields)
    return grouped | {"normalise_experts": fields["experts_per_token"] > 1}


def _rotary_dim(raw: HfConfig, fields: dict[str, Any]) -> dict[str, Any]:
    """`Family.read_more`: rotary_dim, which the first uploads of MiniMax-M2 have for partial_rotary_factor."""
    turned = raw.find("rotary_dim")
    return {} if turned is None else {"rotary_fraction": raw.integer("rotary_dim") / fields["head_dim"]}


def _router_bias(name: str) -> Weight:
    return Weight(_LAYER + name, "layers.router_bias", "experts -> experts")


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
    read_more=_latent(("n_shared_experts", 2), (1, 1), "greedy"),
    write_more=_write,
    weights=(
        *OUTER,
        *_dense(*_LATENT),
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
    read_more=_latent(("n_shared_experts", 1), (8, 4)),
    weights=(*DEEPSEEK_V2.weights, _router_bias("mlp.gate.e_score_correction_bias")),
    ignored=(*LLAMA.ignored, r"model\.layers\.61\..*"),  # a layer that predicts the token after the next
)

_MIXED = (*EXPERTS, *shared_expert("shared_experts"), _router_bias("mlp.gate.e_score_correction_bias"))
GLM4_MOE = LLAMA.like(
    "glm4_moe",
    "Glm4MoeForCausalLM",
    silent={"context": 131_072, "kv_heads": 8, "norm_eps": 1e-5},
    keys={
        "mlp_width": ("moe_intermediate_size", 1408),
        "dense_mlp_width": ("intermediate_size", 10_944),
        "dense_layers": ("first_k_dense_replace", 1),
        "experts": ("n_routed_experts", "num_local_experts", 128),
        "experts_per_token": ("num_experts_per_tok", 8),
        "expert_scale": ("routed_scaling_factor", 1.0),
        "normalise_experts": ("norm_topk_prob", True),
        "qkv_bias": ("attention_bias", False),
        **dict.fromkeys(("qk_norm", "qk_norm_per_head"), ("use_qk_norm", False)),
        **dict.fromkeys(("mlp", *NO_BIASES)),
    },
    fixed={"router": "sigmoid", "ungated_shared_expert": True},
    only=SILU,
    rope=Rope(fraction=0.5, fraction_keys=("partial_rotary_factor",)),
    read_more=_groups(("n_shared_experts", 1), (1, 1)),
    write_more=_write_groups("n_shared_experts"),
    weights=(*OUTER, *_dense(*NORMS, *ATTENTION, *HEAD_NORMS), *_MIXED),
    ignored=(*LLAMA.ignored, r"model\.layers\.(46|92)\..*"),
)
SOLAR_OPEN = GLM4_MOE.like(
    "solar_open",
    "SolarOpenForCausalLM",
    silent={"head_dim": 128, "mlp_width": 1280},
    keys=dict.fromkeys(("dense_mlp_width", "dense_layers", "qk_norm", "qk_norm_per_head")),
    rope=Rope(1_000_000.0, fraction_keys=("partial_rotary_factor",)),
    weights=(*OUTER, *NORMS, *ATTENTION, *_MIXED),
    ignored=LLAMA.ignored,
)
DOTS1 = GLM4_MOE.like(
    "dots1",
    "Dots1ForCausalLM",
    silent={"context": 2048, "kv_heads": None, "norm_eps": 1e-6, "dense_layers": 0, "normalise_experts": False}
    | {"experts": ..., "experts_per_token": ...},
    keys={"attention_bias": ("attention_bias", False)} | dict.fromkeys(("qkv_bias", "qk_norm", "qk_norm_per_head")),
    fixed=PER_HEAD,
    rope=Rope(),
    windows=Windows(4096, lambda layer, raw: layer < raw.integer("max_window_layers", default=62)),
    ignored=LLAMA.ignored,
)
EXAONE_MOE = DOTS1.like(
    "exaone_moe",
    "ExaoneMoeForCausalLM",
    silent={"kv_heads": 32, "norm_eps": 1e-5, "mlp_width": 1024, "dense_mlp_width": 16_384, "dense_layers": 1}
    | {"expert_scale": 2.5, "normalise_experts": True},
    keys={"experts": ("num_experts", 64), "experts_per_token": ("num_experts_per_tok", 8), "attention_bias": None},
    windows=EVERY_4TH,
    read_more=_exaone,
    write_more=_write_exaone,
    weights=(*DOTS1.weights[:-1], _router_bias("mlp.e_score_correction_bias")),
)
# The code that its authors publish with the weights; it rotates halves, as GLM-4.5 does.
BAILING_MOE_V2 = GLM4_MOE.like(
    "bailing_moe_v2",
    "BailingMoeV2ForCausalLM",
    silent={"context": 16_384, "experts_per_token": 2},
    keys={
        "mlp_width": "moe_intermediate_size",
        "dense_mlp_width": "intermediate_size",
        "dense_layers": ("first_k_dense_replace", 0),
        "experts": ("num_experts", 16),
        "expert_scale": ("routed_scaling_factor", 2.5),
        **dict.fromkeys(("qkv_bias", "qk_norm", "qk_norm_per_head", "normalise_experts")),
    },
    fixed=PER_HEAD,
    only=dict.fromkeys(("use_bias", "use_qkv_bias", "norm_head", "use_sliding_window"), (False,))
    | {"use_qk_norm": (True,), "score_function": ("sigmoid",), "moe_router_enable_expert_bias": (True,)},
    rope=Rope(fraction_keys=("partial_rotary_factor",)),
    read_more=_bailing,
    write_more=_write_groups("num_shared_experts"),
    weights=(
        *lines("", "embed=model.word_embeddings norm=model.norm head=lm_head"),
        *_dense(
            *NORMS,
            *fused(_LAYER + "attention.query_key_value", UNEQUAL),
            *lines(_LAYER + "attention.", "q_norm=query_layernorm k_norm=key_layernorm o=dense"),
        ),
        *_MIXED[:-1],
        _router_bias("mlp.gate.expert_bias"),
    ),
    ignored=(*LLAMA.ignored, r"model\.layers\.(20|32|80)\..*"),
)
MINIMAX_M2 = MIXTRAL.like(
    "minimax_m2",
    "MiniMaxM2ForCausalLM",
    silent={"context": 196_608, "head_dim": 128, "norm_eps": 1e-6, "experts": 256, "experts_per_token": 8},
    keys=NO_BIASES,
    fixed={"router": "sigmoid", "qk_norm": True},
    rope=Rope(5_000_000.0, fraction_keys=("partial_rotary_factor",)),
    windows=None,
    read_more=_rotary_dim,
    weights=(*MIXTRAL.weights, *QK_NORMS, _router_bias("block_sparse_moe.e_score_correction_bias")),
)
