"""Relatives of Llama with factors, other norms or interleaved rotary positions: Gemma, Granite, Cohere, GLM, Helium,
Ernie, HunYuan, EXAONE."""

from typing import Any

from fineline_jax.models.families import llama
from fineline_jax.models.families.family import Family, Turned
from fineline_jax.models.families.hf_config import FULL, HfConfig, Rope, Windows
from fineline_jax.models.families.lines import lines

_LAYER = "model.layers.{layer}."


def _one_full_in(default: int) -> Windows:
    """One layer of so many, the last of them, sees everything."""
    every = lambda raw: raw.integer("sliding_window_pattern", "_sliding_window_pattern", default=default)
    return Windows(4096, lambda layer, raw: (layer + 1) % every(raw) == 0)


GEMMA = llama.LLAMA.like(
    "gemma",
    "GemmaForCausalLM",
    silent={"context": 8192, "kv_heads": 16, "head_dim": 256, "mlp": "gelu_pytorch_tanh", "tied_embeddings": True},
    keys={"mlp_bias": None},
    fixed={"norm_offset": 1.0},
    only={"use_bidirectional_attention": (None, False)},
    read_more=lambda raw, fields: {"embed_scale": fields["width"] ** 0.5},
)
VAULT_GEMMA = GEMMA.like(
    "vaultgemma",
    "VaultGemmaForCausalLM",
    keys={
        "kv_heads": ("num_key_value_heads", 4),
        "mlp": ("hidden_activation", "gelu_pytorch_tanh"),
        "attention_scale": Turned("query_pre_attn_scalar", 256.0, lambda x: x**-0.5, lambda x: x**-2.0),
        "attention_softcap": ("attn_logit_softcapping", 50.0),
        "logit_softcap": ("final_logit_softcapping", 30.0),
    },
    windows=Windows(4096, lambda layer, raw: layer % 2 == 1),
    weights=(
        *llama.OUTER,
        *lines(_LAYER, "attention_norm=input_layernorm mlp_norm=pre_feedforward_layernorm"),
        *llama.ATTENTION,
        *llama.MLP,
    ),
)
GEMMA2 = VAULT_GEMMA.like(
    "gemma2",
    "Gemma2ForCausalLM",
    fixed={"post_norms": True},
    weights=(
        *VAULT_GEMMA.weights,
        *lines(_LAYER, "attention_out_norm=post_attention_layernorm mlp_out_norm=post_feedforward_layernorm"),
    ),
)
GEMMA3 = GEMMA2.like(
    "gemma3_text",
    "Gemma3ForCausalLM",
    silent={"context": 131_072, "attention_softcap": 0.0, "logit_softcap": 0.0},
    fixed=llama.PER_HEAD,
    rope=Rope(1_000_000.0, window_theta=10_000.0),
    windows=_one_full_in(6),
    weights=GEMMA2.weights + llama.HEAD_NORMS,
)

_INVERSE = lambda key: Turned(key, 1.0, lambda x: 1 / x, lambda x: 1 / x)
GRANITE = llama.LLAMA.like(
    "granite",
    "GraniteForCausalLM",
    keys={
        "embed_scale": ("embedding_multiplier", 1.0),
        "residual_scale": ("residual_multiplier", 1.0),
        "attention_scale": ("attention_multiplier", 1.0),
        "logit_scale": _INVERSE("logits_scaling"),
    },
)
HYPERCLOVAX = GRANITE.like(
    "hyperclovax",
    "HyperCLOVAXForCausalLM",
    keys={"post_norms": ("use_post_norm", True)},
    weights=(*llama.LLAMA.weights, *lines(_LAYER, "attention_out_norm=post_norm1 mlp_out_norm=post_norm2")),
)

COHERE = llama.LLAMA.like(
    "cohere",
    "CohereForCausalLM",
    silent={"context": 8192, "tied_embeddings": True},
    keys={"logit_scale": ("logit_scale", 0.0625), "head_dim": None, "mlp_bias": None, **llama.LAYER_NORM},
    fixed={"norm": "unbiased", "parallel_residual": True, "shared_norm": True, "rotary_interleaved": True},
    only={"use_qk_norm": (False,)},
    rope=Rope(500_000.0),
)


def unrotated_where_full(windows: Windows, without_window: bool) -> Any:
    """`Family.read_more` where layers that see everything have no positions; without_window: also of a model that has
    no windows at all."""

    def read(raw: HfConfig, fields: dict[str, Any]) -> dict[str, Any]:
        window, kinds = raw.layer_types(fields["layers"], windows)
        if not window and not without_window:
            return {}
        return {"unrotated_layers": tuple(layer for layer, kind in enumerate(kinds) if kind == FULL)}

    return read


EVERY_4TH = _one_full_in(4)
COHERE2 = COHERE.like(
    "cohere2",
    "Cohere2ForCausalLM",
    only={"use_qk_norm": None},
    windows=EVERY_4TH,
    read_more=unrotated_where_full(EVERY_4TH, True),
)
EXAONE4 = llama.LLAMA.like(
    "exaone4",
    "Exaone4ForCausalLM",
    keys={"kv_heads": ("num_key_value_heads", 32), "norm_eps": ("rms_norm_eps", 1e-5)} | llama.NO_BIASES,
    fixed={"norm_after": True} | llama.PER_HEAD,
    windows=EVERY_4TH,
    read_more=unrotated_where_full(EVERY_4TH, False),
    weights=(
        *llama.OUTER,
        *lines(_LAYER, "attention_norm=post_attention_layernorm mlp_norm=post_feedforward_layernorm"),
        *llama.ATTENTION,
        *llama.HEAD_NORMS,
        *llama.MLP,
    ),
)

HELIUM = llama.LLAMA.like(
    "helium",
    "HeliumForCausalLM",
    silent={"context": 4096, "kv_heads": 20, "head_dim": 128, "norm_eps": 1e-8},
    keys={"attention_bias": None, "qkv_bias": ("attention_bias", False)},
    fixed={"rotary_interleaved": True},
    rope=Rope(100_000.0),
)
ERNIE = llama.LLAMA.like(
    "ernie4_5",
    "Ernie4_5ForCausalLM",
    silent={"context": 131_072, "kv_heads": 2, "head_dim": 128, "norm_eps": 1e-5, "tied_embeddings": True},
    keys=dict.fromkeys(("attention_bias", "mlp_bias"), ("use_bias", False)),
    fixed={"rotary_interleaved": True},
    rope=Rope(500_000.0),
)
GLM = llama.LLAMA.like(
    "glm",
    "GlmForCausalLM",
    silent={"context": 131_072, "kv_heads": 2, "head_dim": 128, "norm_eps": 1.5625e-7},
    keys={"attention_bias": None, "mlp_bias": None, "qkv_bias": ("attention_bias", True)},
    fixed={"rotary_interleaved": True},
    rope=Rope(fraction=0.5, fraction_keys=("partial_rotary_factor",)),
    weights=llama.OUTER + llama.NORMS + llama.ATTENTION + llama.FUSED_MLP,
)
GLM4 = GLM.like(
    "glm4",
    "Glm4ForCausalLM",
    fixed={"post_norms": True},
    weights=(
        *GLM.weights,
        *lines(_LAYER, "attention_out_norm=post_self_attn_layernorm mlp_out_norm=post_mlp_layernorm"),
    ),
)
HUNYUAN = llama.LLAMA.like(
    "hunyuan_v1_dense",
    "HunYuanDenseV1ForCausalLM",
    silent={"norm_eps": 1e-5},
    keys={"mlp_bias": None},
    fixed={"qk_norm_after_rotary": True} | llama.PER_HEAD,
    weights=(
        *llama.LLAMA.weights,
        *lines(_LAYER + "self_attn.", "q_norm=query_layernorm k_norm=key_layernorm"),
    ),
)
SCALED: tuple[Family, ...] = (
    GEMMA, GEMMA2, GEMMA3, VAULT_GEMMA, GRANITE, HYPERCLOVAX, COHERE, COHERE2, EXAONE4, HELIUM, ERNIE, GLM, GLM4,
    HUNYUAN
)  # fmt: skip
