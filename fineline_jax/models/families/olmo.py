"""OLMo in its two layouts (transformers' own, and the first releases'), OLMo 2 and 3."""

from typing import Any

from fineline_jax.models.config import ModelConfig
from fineline_jax.models.families import llama
from fineline_jax.models.families.family import Family
from fineline_jax.models.families.hf_config import HfConfig, Rope, Windows
from fineline_jax.models.families.name_map import Weight

# The norm's epsilon is 1e-5; no file states it (transformers OlmoLayerNorm, allenai/OLMo LayerNorm).
_NORM = {"norm": "nonparametric", "norm_eps": 1e-5}
OLMO = llama.LLAMA.like(
    "olmo",
    "OlmoForCausalLM",
    keys={"norm_eps": None, "clip_qkv": ("clip_qkv", 0.0)},
    fixed=_NORM,
    weights=llama.OUTER + llama.ATTENTION + llama.MLP,
    ignored=(),
    write_more=lambda config: {"clip_qkv": config.clip_qkv or None},
)


_LAYER = "model.layers.{layer}."
QK_NORMS = (
    Weight(_LAYER + "self_attn.q_norm.weight", "layers.q_norm", "(heads dim) -> heads dim"),
    Weight(_LAYER + "self_attn.k_norm.weight", "layers.k_norm", "(heads dim) -> heads dim"),
)
OLMO2 = llama.LLAMA.like(
    "olmo2",
    "Olmo2ForCausalLM",
    keys={"norm_eps": ("rms_norm_eps", 1e-5)},
    fixed={"norm_after": True, "qk_norm": True},
    weights=(
        *llama.OUTER,
        *llama.ATTENTION,
        *QK_NORMS,
        Weight(_LAYER + "post_attention_layernorm.weight", "layers.attention_norm", "width -> width"),
        *llama.MLP,
        Weight(_LAYER + "post_feedforward_layernorm.weight", "layers.mlp_norm", "width -> width"),
    ),
    ignored=(),
)
# Three layers with a window, whose angles are not scaled, then one without.
OLMO3 = OLMO2.like(
    "olmo3",
    "Olmo3ForCausalLM",
    rope=Rope(500_000.0, window_theta=500_000.0),
    windows=Windows(4096, lambda layer, raw: (layer + 1) % 4 == 0),
)


def _first(raw: HfConfig, fields: dict[str, Any]) -> dict[str, Any]:
    """What allenai/OLMo's own ModelConfig (olmo/config.py) has beside; silence may mean what is not computed."""
    for key in ("layer_norm_with_affine", "include_bias"):
        raw.only(key, False, default=True)
    raw.only("rope", True, default=False)
    raw.only("n_kv_heads", fields["heads"])
    # mlp_hidden_size counts gate and up together
    usual = fields["width"] * raw.integer("mlp_ratio", default=4)
    return {"mlp_width": raw.integer("mlp_hidden_size", default=usual) // 2}


def _write_first(config: ModelConfig) -> dict[str, Any]:
    off = {"layer_norm_with_affine": False, "include_bias": False, "alibi": False}
    sizes = {"vocab_size": config.vocab_size, "mlp_hidden_size": 2 * config.mlp_width}
    return off | sizes | {"rope": True, "clip_qkv": config.clip_qkv or None}


_BLOCK = "model.transformer.blocks.{layer}."
OLMO_FIRST = Family(
    name="olmo_first",
    model_type="hf_olmo",
    architectures=("OLMoForCausalLM",),
    keys={
        "vocab_size": ("embedding_size", "vocab_size", ...),
        "width": "d_model",
        "layers": "n_layers",
        "heads": "n_heads",
        "context": ("max_sequence_length", 1024),
        "tied_embeddings": ("weight_tying", True),
        "init_std": ("init_std", 0.02),
        "clip_qkv": ("clip_qkv", 0.0),
    },
    fixed=_NORM,
    only={
        "activation_type": ("swiglu",),
        "block_type": ("sequential",),
        "layer_norm_type": ("default", "low_precision"),
        **dict.fromkeys(
            (
                "attention_layer_norm",
                "norm_after",
                "alibi",
                "scale_logits",
                "multi_query_attention",
                "embedding_layer_norm",
            ),
            (False,),
        ),
    },
    read_more=_first,
    write_more=_write_first,
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
