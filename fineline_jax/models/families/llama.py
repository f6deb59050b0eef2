"""Llama and what is named like it: Amber, OpenLLaMA, the m-a-p reproductions, TinyLlama, DeepSeek LLM, Yi, Qwen,
Mistral, SmolLM3, Baichuan, and others."""

from typing import Any

from fineline_jax.errors import UserError
from fineline_jax.models.config import RopeScaling
from fineline_jax.models.families.family import Family
from fineline_jax.models.families.hf_config import HfConfig, Rope, Windows
from fineline_jax.models.families.lines import THIRDS, UNEQUAL, fused, fused_mlp, lines
from fineline_jax.models.families.name_map import Weight

_LAYER = "model.layers.{layer}."
_ATTENTION = _LAYER + "self_attn."
_MLP = _LAYER + "mlp."

OUTER = lines("", "embed=model.embed_tokens norm=model.norm head=lm_head")
NORMS = lines(_LAYER, "attention_norm=input_layernorm mlp_norm=post_attention_layernorm")
OUTPUT = lines(_ATTENTION, "o=o_proj")
ATTENTION = (*lines(_ATTENTION, "q=q_proj k=k_proj v=v_proj"), *OUTPUT)
DOWN = lines(_MLP, "down=down_proj")
MLP = (*lines(_MLP, "gate=gate_proj up=up_proj"), *DOWN)
# Old files hold the rotary frequencies, which are computed.
ROTARY = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)


KEYS = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "mlp_width": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": ("num_key_value_heads", None),
    "head_dim": ("head_dim", 0),
    "mlp": ("hidden_act", "silu"),
    "context": ("max_position_embeddings", "max_sequence_length", "model_max_length", 2048),
    "init_std": ("initializer_range", 0.02),
    "norm_eps": ("rms_norm_eps", 1e-6),
    "tied_embeddings": ("tie_word_embeddings", False),
    "attention_bias": ("attention_bias", False),
    "mlp_bias": ("mlp_bias", False),
}
LLAMA3_SCALING = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
"""rope_scaling of Llama 3.1's config.json."""
LLAMA = Family(
    name="llama",
    architectures=("LlamaForCausalLM", "LLaMAForCausalLM"),
    keys=KEYS,
    weights=OUTER + NORMS + ATTENTION + MLP,
    ignored=ROTARY,
)
LAYER_NORM = {"norm_eps": ("layer_norm_eps", 1e-5)}
NO_BIASES = {"attention_bias": None, "mlp_bias": None}

# The first uploads of Yi: Llama with other names for the norms, and other defaults (its configuration_yi.py).
YI = LLAMA.like(
    "yi",
    "YiForCausalLM",
    model_type="Yi",
    silent={"context": 4096, "kv_heads": 4, "norm_eps": 1e-5},
    rope=Rope(5_000_000.0),
    weights=(*OUTER, *lines(_LAYER, "attention_norm=ln1 mlp_norm=ln2"), *ATTENTION, *MLP),
)

MISTRAL = LLAMA.like(
    "mistral", "MistralForCausalLM", silent={"context": 131_072, "kv_heads": 8}, windows=Windows(4096, by_layer=False)
)
MINISTRAL = MISTRAL.like("ministral", "MinistralForCausalLM", windows=Windows(4096))

QWEN2 = LLAMA.like(
    "qwen2",
    "Qwen2ForCausalLM",
    silent={"context": 32_768, "kv_heads": 32},
    keys=NO_BIASES,
    fixed={"qkv_bias": True},
    windows=Windows(4096, lambda layer, raw: layer < raw.integer("max_window_layers", default=28), in_use=False),
)

# RMSNorm of each head's queries and keys, with one scale for all heads.
HEAD_NORMS = lines(_ATTENTION, "q_norm=q_norm k_norm=k_norm")
PER_HEAD = {"qk_norm": True, "qk_norm_per_head": True}
QWEN3 = QWEN2.like(
    "qwen3",
    "Qwen3ForCausalLM",
    # 128 is what transformers takes where the file is silent; Qwen's files state it.
    silent={"head_dim": 128},
    keys={"attention_bias": ("attention_bias", False)},
    fixed={"qkv_bias": None} | PER_HEAD,
    weights=OUTER + NORMS + ATTENTION + HEAD_NORMS + MLP,
)


def _smollm3(raw: HfConfig, fields: dict[str, Any]) -> dict[str, Any]:
    every = raw.integer("no_rope_layer_interval", default=4)
    usual = [int((layer + 1) % every != 0) for layer in range(fields["layers"])]
    turned = raw.items("no_rope_layers", int) or usual
    if len(turned) < len(usual):
        raw.refuse("no_rope_layers", turned)
    return {"unrotated_layers": tuple(layer for layer in range(fields["layers"]) if not turned[layer])}


SMOLLM3 = LLAMA.like(
    "smollm3",
    "SmolLM3ForCausalLM",
    silent={"context": 32_768, "kv_heads": 4, "tied_embeddings": True},
    rope=Rope(2_000_000.0),
    windows=Windows(None, lambda layer, raw: True, in_use=False),
    read_more=_smollm3,
    write_more=lambda config: {
        "no_rope_layers": [int(layer not in config.unrotated_layers) for layer in range(config.layers)]
    },
)

SEED_OSS = LLAMA.like(
    "seed_oss",
    "SeedOssForCausalLM",
    silent={"context": 524_288, "kv_heads": 8, "head_dim": 128},
    keys={"attention_bias": None, "qkv_bias": ("attention_bias", True)},
    only={"attention_out_bias": (False,)},
)


def _llama3_where_silent(factor: float) -> Any:
    """`Family.read_more` of classes that scale as Llama 3 does where the file is silent."""
    usual = RopeScaling("llama3", factor, 8192)
    silent = lambda raw: raw.find("rope_parameters", "rope_scaling") is None
    return lambda raw, fields: {"rope_scaling": usual} if silent(raw) else {}


CWM = LLAMA.like(
    "cwm",
    "CwmForCausalLM",
    silent={"context": 131_072, "kv_heads": 8, "head_dim": 128, "norm_eps": 1e-5},
    keys={"attention_bias": None},
    rope=Rope(1_000_000.0),
    windows=Windows(8192, lambda layer, raw: layer % 4 == 0),
    read_more=_llama3_where_silent(16.0),
)

# Two projections around the square of ReLU.
ARCEE = LLAMA.like("arcee", "ArceeForCausalLM", silent={"mlp": "relu2", "context": 4096, "norm_eps": 1e-5}, gated=False)
NEMOTRON = ARCEE.like(
    "nemotron",
    "NemotronForCausalLM",
    silent={"init_std": 0.0134},
    keys={"norm_eps": ("norm_eps", 1e-5)},
    fixed={"norm": "layer", "norm_offset": 1.0},
    rope=Rope(fraction=0.5, fraction_keys=("partial_rotary_factor",)),
)
JAIS2 = ARCEE.like(
    "jais2",
    "Jais2ForCausalLM",
    silent={"context": 8192, "attention_bias": True, "mlp_bias": True},
    keys=LAYER_NORM,
    fixed={"norm": "layer"},
)
STABLELM = LLAMA.like(
    "stablelm",
    "StableLmForCausalLM",
    silent={"context": 4096, "kv_heads": 32},
    keys={
        "qkv_bias": ("use_qkv_bias", False),
        "parallel_residual": ("use_parallel_residual", False),
        "shared_norm": ("use_parallel_residual", False),
        **LAYER_NORM,
        **NO_BIASES,
    },
    fixed={"norm": "layer"},
    only={"qk_layernorm": (False,)},
    rope=Rope(fraction=0.25, fraction_keys=("partial_rotary_factor",)),
)

# xIELU has four numbers of its own; two of them are constants, which the files hold as well.
APERTUS = LLAMA.like(
    "apertus",
    "ApertusForCausalLM",
    silent={"mlp": "xielu", "context": 65_536, "norm_eps": 1e-5},
    keys={"mlp_bias": None},
    fixed=PER_HEAD,
    gated=False,
    rope=Rope(12_000_000.0),
    read_more=_llama3_where_silent(8.0),
    weights=(
        *OUTER,
        *lines(_LAYER, "attention_norm=attention_layernorm mlp_norm=feedforward_layernorm"),
        *ATTENTION,
        *HEAD_NORMS,
        *MLP,
        Weight(_MLP + "act_fn.alpha_p", "layers.alpha_p", "one -> one"),
        Weight(_MLP + "act_fn.alpha_n", "layers.alpha_n", "one -> one"),
        Weight(_MLP + "act_fn.beta", "layers.beta", " -> "),
        Weight(_MLP + "act_fn.eps", "layers.eps", " -> "),
    ),
)

# One tensor for queries, keys and values, and in Phi-3 and GLM for gate and up.
FUSED_MLP = (*fused_mlp(_MLP + "gate_up_proj"), *DOWN)
PHI3 = LLAMA.like(
    "phi3",
    "Phi3ForCausalLM",
    silent={"context": 4096, "norm_eps": 1e-5},
    keys={"head_dim": None, **NO_BIASES},
    rope=Rope(fraction_keys=("partial_rotary_factor",)),
    windows=Windows(None, by_layer=False),
    weights=(*OUTER, *NORMS, *fused(_ATTENTION + "qkv_proj", UNEQUAL), *OUTPUT, *FUSED_MLP),
)


def _not_13b(raw: HfConfig, fields: dict[str, Any]) -> dict[str, Any]:
    # The 13B models bear the same names, but have ALiBi instead of rotary positions, 40 heads and no such key.
    if raw.find("max_position_embeddings") is None or raw.find("num_attention_heads") == 40:
        raise UserError(
            f"{raw.where}: num_attention_heads={raw.find('num_attention_heads')!r} without rotary"
            " max_position_embeddings is Baichuan-13B, whose ALiBi positions are not computed; use a 7B model"
        )
    return {}


BAICHUAN = LLAMA.like(
    "baichuan",
    "BaiChuanForCausalLM",
    keys={"kv_heads": ("num_attention_heads", None)},
    read_more=_not_13b,
    write_more=lambda config: {"model_max_length": config.context},
    weights=(*OUTER, *NORMS, *fused(_ATTENTION + "W_pack", THIRDS), *OUTPUT, *MLP),
)
# The rows of its head have length 1; its files hold them as trained (`decoder.head_weight` normalises).
BAICHUAN2 = BAICHUAN.like("baichuan2", "BaichuanForCausalLM", model_type="baichuan", fixed={"head": "normalised"})
