"""OLMo in its two layouts (transformers' own, and the first releases'), OLMo 2 and 3."""

from typing import Any

from fineline_jax.models.config import ModelConfig
from fineline_jax.models.families import llama
from fineline_jax.models.families.family import Family
from fineline_jax.models.families.hf_config import FULL, HfConfig, Rope, Windows
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


def _hybrid(raw: HfConfig, fields: dict[str, Any]) -> dict[str, Any]:
    """Sizes of the gated delta rule, which kind each layer is, and whether attention has rotary positions."""
    layers, heads = fields["layers"], fields["heads"]
    usual = [FULL if layer % 4 == 3 or layer == layers - 1 < 3 else LINEAR for layer in range(layers)]
    kinds = (raw.items("layer_types", str) or usual)[:layers]
    if len(kinds) < layers or {*kinds} != {FULL, LINEAR}:
        raw.refuse("layer_types", kinds)
    sizes = {name: fields.get(name, heads) for name in ("state_heads", "state_groups")}
    state = fields.get("state_size", int(0.75 * fields["width"] / max(1, sizes["state_groups"])))
    more = {
        "state_size": state,
        "inner_width": sizes["state_heads"] * raw.integer("linear_value_head_dim", default=2 * state),
        "attention_layers": tuple(layer for layer, kind in enumerate(kinds) if kind == FULL),
    }
    theta = {"rope_theta": 0, **raw.raw, **raw.table("rope_parameters")}["rope_theta"]
    return sizes | more | ({"positions": "none"} if theta is None else {})


def _write_hybrid(config: ModelConfig) -> dict[str, Any]:
    kinds = [FULL if layer in config.attention_layers else LINEAR for layer in range(config.layers)]
    written: dict[str, Any] = {
        "layer_types": kinds,
        "linear_value_head_dim": config.inner_width // max(1, config.state_heads),
    }
    written["pad_token_id"] = None  # the class has one that is beyond a small vocabulary
    if config.positions == "none":
        written |= {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": None}}
    return written


LINEAR = "linear_attention"
_RECURRENT = {"layer": _LAYER, "stack": "recurrent_layers"}
_DELTA = {"layer": _LAYER + "linear_attn.", "stack": "recurrent_layers"}
# Layers of the gated delta rule, and Llama's order of norms in them; those with attention are OLMo 2's.
OLMO_HYBRID = OLMO2.like(
    "olmo_hybrid",
    "OlmoHybridForCausalLM",
    silent={"context": 65_536},
    keys={
        "norm_eps": ("rms_norm_eps", 1e-6),
        "state_heads": ("linear_num_value_heads", None),
        "state_groups": ("linear_num_key_heads", None),
        "state_size": ("linear_key_head_dim", None),
        "conv_width": ("linear_conv_kernel_dim", 4),
        "negative_eigenvalues": ("linear_allow_neg_eigval", True),
    },
    fixed={"mixer": "gated_delta", "state_norm_eps": 1e-5},  # FLA's FusedRMSNormGated; no file states it
    only={"hidden_act": ("silu",)},
    kinds=(LINEAR,),
    read_more=_hybrid,
    write_more=_write_hybrid,
    weights=(
        *OLMO2.weights,
        *lines(**_RECURRENT, names="mixer_norm=input_layernorm mlp_norm=post_attention_layernorm"),
        *lines(**_RECURRENT, names="gate=mlp.gate_proj up=mlp.up_proj down=mlp.down_proj"),
        *lines(**_DELTA, names="q=q_proj k=k_proj v=v_proj g=g_proj a=a_proj b=b_proj o=o_proj inner_norm=o_norm"),
        *lines(**_DELTA, names="q_conv=q_conv1d k_conv=k_conv1d v_conv=v_conv1d"),
        *(
            Weight(f"{_DELTA['layer']}{name}", f"recurrent_layers.{name}", "heads -> heads")
            for name in ("A_log", "dt_bias")
        ),
    ),
    # transformers' own, which it also gives to the second norm of layers with attention
    other_names={"attention_layer_norm": "input_layernorm", "feedforward_layer_norm": "post_attention_layernorm"},
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
