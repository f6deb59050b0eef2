"""OLMo in its two layouts (transformers' own, and the first releases'), OLMo 2 and 3."""

from typing import Any

from fineline_jax.models.config import ModelConfig
from fineline_jax.models.families import llama
from fineline_jax.models.families.family import Family
from fineline_jax.models.families.hf_config import HfConfig, Rope, Windows
from fineline_jax.models.families.lines import THIRDS, fused, fused_mlp, lines
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
        *lines(_LAYER, "attention_norm=post_attention_layernorm mlp_norm=post_feedforward_layernorm"),
        *llama.MLP,
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
        **dict.fromkeys(("attention_layer_norm", "norm_after", "alibi", "scale_logits"), (False,)),
        **dict.fromkeys(("multi_query_attention", "embedding_layer_norm"), (False,)),
    },
    read_more=_first,
    write_more=_write_first,
    weights=(
        *lines(_BLOCK, "embed=model.transformer.wte o=attn_out down=ff_out head=model.transformer.ff_out"),
        *fused(_BLOCK + "att_proj", THIRDS),
        *fused_mlp(_BLOCK + "ff_proj", ("up", "gate")),
    ),
    tied_copies=("model.transformer.ff_out.weight",),
)
