"""GPT-2 and its relatives: LayerNorm, two projections around a function; positions learned, rotary or by ALiBi.
GPT-NeoX (Pythia), GPT-J, CodeGen, GPT-Neo, GPT-BigCode, OPT, BioGPT, BLOOM, MPT, Falcon, Phi, Starcoder2."""

from typing import Any

from fineline_jax.models.config import ModelConfig
from fineline_jax.models.families.family import Family
from fineline_jax.models.families.hf_config import HfConfig, Rope, Windows
from fineline_jax.models.families.lines import BY_HEAD, GROUPED, THIRDS, UNEQUAL, fused, lines
from fineline_jax.models.families.llama import KEYS, LAYER_NORM, LLAMA, MLP
from fineline_jax.models.families.name_map import Weight

GPT_NEOX = Family(
    name="gpt_neox",
    architectures=("GPTNeoXForCausalLM",),
    keys={
        **{field: key for field, key in KEYS.items() if field not in ("kv_heads", "head_dim", "mlp_bias")},
        **LAYER_NORM,
        "context": ("max_position_embeddings", 2048),
        "mlp": ("hidden_act", "gelu"),
        "attention_bias": ("attention_bias", True),
        "parallel_residual": ("use_parallel_residual", True),
    },
    fixed={"norm": "layer", "mlp_bias": True},
    gated=False,
    rope=Rope(
        fraction=0.25,
        theta_keys=("rotary_emb_base", "rope_theta"),
        fraction_keys=("rotary_pct", "partial_rotary_factor"),
    ),
    weights=(
        *lines(
            "gpt_neox.layers.{layer}.",
            "embed=gpt_neox.embed_in norm=gpt_neox.final_layer_norm head=embed_out attention_norm=input_layernorm"
            " mlp_norm=post_attention_layernorm o=attention.dense up=mlp.dense_h_to_4h down=mlp.dense_4h_to_h",
        ),
        *fused("gpt_neox.layers.{layer}.attention.query_key_value", BY_HEAD),
    ),
    # Old files hold the causal mask and the rotary frequencies, which are computed.
    ignored=(r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",),
    tied_copies=("embed_out.weight",),
)


def four_wide(raw: HfConfig, fields: dict[str, Any]) -> dict[str, Any]:
    """`Family.read_more`: an MLP of four times the width where the file is silent."""
    return {"mlp_width": fields.get("mlp_width", 4 * fields["width"])}


_BLOCK = "transformer.h.{layer}."
_GPT_KEYS = {
    "vocab_size": "vocab_size",
    "width": ("n_embd", "hidden_size", ...),
    "layers": ("n_layer", "num_hidden_layers", ...),
    "heads": ("n_head", "num_attention_heads", ...),
    "mlp_width": ("n_inner", None),
    "mlp": ("activation_function", "gelu_new"),
    "context": ("n_positions", "max_position_embeddings", 1024),
    "norm_eps": ("layer_norm_epsilon", 1e-5),
    "init_std": ("initializer_range", 0.02),
    "tied_embeddings": ("tie_word_embeddings", True),
}
_OF_GPT = (
    "embed=transformer.wte position_embed=transformer.wpe norm=transformer.ln_f head=lm_head attention_norm=ln_1"
    " mlp_norm=ln_2 up=mlp.c_fc down=mlp.c_proj "
)
_MASKS = (r"transformer\.h\.\d+\.attn\.(attention\.)?(bias|masked_bias|causal_mask|embed_positions)",)
_TURNED = {
    "o": "(heads dim) width -> heads dim width",
    "up": "width mlp -> width mlp",
    "down": "mlp width -> mlp width",
}
"""GPT-2's matrices are [in, out]."""
_OF_GPT2 = lines(_BLOCK, _OF_GPT + "o=attn.c_proj")
_GPT = Family(
    name="",
    architectures=(),
    keys=_GPT_KEYS,
    fixed={"norm": "layer", "positions": "learned", "attention_bias": True, "mlp_bias": True},
    gated=False,
    rope=None,
    read_more=four_wide,
    weights=(),
    ignored=_MASKS,
)
GPT2 = _GPT.like(
    "gpt2",
    "GPT2LMHeadModel",
    keys={"scale_by_layer": ("scale_attn_by_inverse_layer_idx", False)},
    only={"scale_attn_weights": (True,), "add_cross_attention": (False,)},
    weights=(
        *(Weight(line.hf, line.ours, _TURNED.get(line.ours.removeprefix("layers."), line.axes)) for line in _OF_GPT2),
        *fused(_BLOCK + "attn.c_attn", THIRDS)[1::2],
        *(
            Weight(_BLOCK + "attn.c_attn.weight", f"layers.{ours}", f"width {outputs} -> width heads dim")
            for ours, outputs in THIRDS.items()
        ),
    ),
)
# One key head; [out, in].
GPT_BIGCODE = _GPT.like(
    "gpt_bigcode",
    "GPTBigCodeForCausalLM",
    silent={"mlp": "gelu_pytorch_tanh"},
    fixed={"kv_heads": 1},
    only={"multi_query": (True,), "scale_attn_weights": (True,), "add_cross_attention": (False,)},
    weights=(*_OF_GPT2, *fused(_BLOCK + "attn.c_attn", UNEQUAL)),
)


def _expanded(raw: HfConfig, fields: dict[str, Any]) -> dict[str, Any]:
    """attention_types of GPT-Neo: [[["global", "local"], 12]] are 24 layers, every second with a window."""
    given = raw.find("attention_types") or [[["global", "local"], 12]]
    try:
        kinds = [kind for names, times in given for _ in range(times) for kind in names]
    except (TypeError, ValueError):
        kinds = []
    if len(kinds) != fields["layers"] or not {"global", "local"}.issuperset(kinds):
        raw.refuse("attention_types", given)
    full = tuple(layer for layer, kind in enumerate(kinds) if kind == "global")
    window = raw.integer("window_size", default=256)
    windows = {"window": window, "full_layers": full} if len(full) < len(kinds) and window < fields["context"] else {}
    return windows | four_wide(raw, fields)


def _attention_types(config: ModelConfig) -> dict[str, Any]:
    local = lambda layer: config.window and layer not in config.full_layers
    kinds = ["local" if local(layer) else "global" for layer in range(config.layers)]
    return {"attention_types": [[kinds, 1]], "window_size": config.window or config.context}


GPT_NEO = _GPT.like(
    "gpt_neo",
    "GPTNeoForCausalLM",
    keys={
        "width": "hidden_size",
        "layers": ("num_layers", "num_hidden_layers", ...),
        "heads": ("num_heads", "num_attention_heads", ...),
        "mlp_width": ("intermediate_size", None),
        "context": ("max_position_embeddings", 2048),
    },
    fixed={"attention_bias": None, "output_bias": True, "attention_scale": 1.0},
    read_more=_expanded,
    write_more=_attention_types,
    weights=lines(
        _BLOCK,
        _OF_GPT + "q=attn.attention.q_proj k=attn.attention.k_proj v=attn.attention.v_proj o=attn.attention.out_proj",
    ),
)


def _rotary_dim(raw: HfConfig, fields: dict[str, Any]) -> dict[str, Any]:
    share = raw.integer("rotary_dim", default=64) * fields["heads"] / fields["width"]
    return {"rotary_fraction": share, "positions": "rotary"} | four_wide(raw, fields)


GPT_J = _GPT.like(
    "gptj",
    "GPTJForCausalLM",
    silent={"context": 2048, "tied_embeddings": False},
    fixed={"attention_bias": None, "positions": None}
    | dict.fromkeys(("parallel_residual", "shared_norm", "rotary_interleaved", "head_bias"), True),
    read_more=_rotary_dim,
    write_more=lambda config: {"rotary_dim": config.rotary_dim, "rotary": True},
    weights=lines(
        _BLOCK,
        "embed=transformer.wte norm=transformer.ln_f head=lm_head attention_norm=ln_1 q=attn.q_proj k=attn.k_proj"
        " v=attn.v_proj o=attn.out_proj up=mlp.fc_in down=mlp.fc_out",
    ),
)
# The heads lie in four groups, each its queries, values and keys.
_CODEGEN_PARTS = {"q": 0, "v": 1, "k": 2}
CODEGEN = GPT_J.like(
    "codegen",
    "CodeGenForCausalLM",
    weights=(
        *(line for line in GPT_J.weights if line.ours.removeprefix("layers.")[:1] not in _CODEGEN_PARTS),
        *(
            Weight(
                _BLOCK + "attn.qkv_proj.weight",
                f"layers.{ours}",
                f"(4:group {part}/3 some dim) width -> width (4:group some) dim",
            )
            for ours, part in _CODEGEN_PARTS.items()
        ),
    ),
)

_OPT_LAYER = (
    " attention_norm=self_attn_layer_norm mlp_norm=final_layer_norm q=self_attn.q_proj k=self_attn.k_proj"
    " v=self_attn.v_proj o=self_attn.out_proj up=fc1 down=fc2"
)


OPT = _GPT.like(
    "opt",
    "OPTForCausalLM",
    keys={
        "width": "hidden_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "mlp_width": "ffn_dim",
        "mlp": ("activation_function", "relu"),
        "context": ("max_position_embeddings", 2048),
        "init_std": ("init_std", 0.02),
        "norm_eps": None,
    },
    fixed={"norm_eps": 1e-5, "position_offset": 2},
    only=dict.fromkeys(("do_layer_norm_before", "enable_bias", "layer_norm_elementwise_affine"), (True,))
    | {"_remove_final_layer_norm": (False,)},
    read_more=lambda raw, fields: raw.only("word_embed_proj_dim", fields["width"]) or {},
    write_more=lambda config: {"word_embed_proj_dim": config.width},
    weights=lines(
        "model.decoder.layers.{layer}.",
        "embed=model.decoder.embed_tokens position_embed=model.decoder.embed_positions head=lm_head"
        " norm=model.decoder.final_layer_norm" + _OPT_LAYER,
    ),
)
BIOGPT = OPT.like(
    "biogpt",
    "BioGptForCausalLM",
    keys={
        "mlp_width": "intermediate_size",
        "mlp": ("hidden_act", "gelu"),
        "context": ("max_position_embeddings", 1024),
        "init_std": ("initializer_range", 0.02),
    },
    only=dict.fromkeys(OPT.only) | {"scale_embedding": (True,)},
    read_more=lambda raw, fields: {"embed_scale": fields["width"] ** 0.5},
    write_more=lambda config: {},
    weights=lines(
        "biogpt.layers.{layer}.",
        "embed=biogpt.embed_tokens position_embed=biogpt.embed_positions norm=biogpt.layer_norm head=output_projection"
        + _OPT_LAYER,
    ),
    tied_copies=("output_projection.weight",),
)

_FALCON = (
    "embed=transformer.word_embeddings norm=transformer.ln_f head=lm_head o=self_attention.dense up=mlp.dense_h_to_4h"
    " down=mlp.dense_4h_to_h"
)
_BLOOM = " attention_norm=input_layernorm mlp_norm=post_attention_layernorm"
BLOOM = _GPT.like(
    "bloom",
    "BloomForCausalLM",
    keys={"width": ("hidden_size", "n_embed", ...), "context": ("seq_length", 2048), "mlp_width": None, "mlp": None},
    fixed={"mlp": "gelu_tanh", "positions": "alibi", "embed_norm": True},
    only={"apply_residual_connection_post_layernorm": (False,)},
    weights=(
        *lines(_BLOCK, _FALCON + _BLOOM + " embed_norm=transformer.word_embeddings_layernorm"),
        *fused(_BLOCK + "self_attention.query_key_value", BY_HEAD),
    ),
)


def _mpt(raw: HfConfig, fields: dict[str, Any]) -> dict[str, Any]:
    attention = HfConfig(f"{raw.where}: attn_config", raw.table("attn_config"))
    for key, allowed in {
        "alibi": True, "qk_ln": False, "prefix_lm": False, "attn_type": "multihead_attention", "alibi_bias_max": 8
    }.items():  # fmt: skip
        attention.only(key, allowed)
    scale, clip = (attention.number(key, default=0.0) for key in ("softmax_scale", "clip_qkv"))
    wide = fields["width"] * raw.integer("expansion_ratio", default=4)
    return {"attention_scale": scale, "clip_qkv": clip, "mlp_width": wide}


MPT = BLOOM.like(
    "mpt",
    "MptForCausalLM",
    keys={"width": "d_model", "layers": "n_layers", "heads": "n_heads", "context": ("max_seq_len", 2048)},
    fixed={"mlp": "gelu", "norm": "unbiased", "embed_norm": None, "attention_bias": None, "mlp_bias": None},
    only={
        "apply_residual_connection_post_layernorm": None,
        "no_bias": (True,),
        "logit_scale": (None,),
        "embedding_fraction": (1.0,),
        "norm_type": ("low_precision_layernorm",),
    },
    read_more=_mpt,
    write_more=lambda config: {
        "expansion_ratio": config.mlp_width // config.width,
        "attn_config": {"alibi": True}
        | {"clip_qkv": config.clip_qkv or None, "softmax_scale": config.attention_scale or None},
    },
    weights=(
        *lines(
            "transformer.blocks.{layer}.",
            "embed=transformer.wte norm=transformer.norm_f head=lm_head attention_norm=norm_1 mlp_norm=norm_2"
            " o=attn.out_proj up=ffn.up_proj down=ffn.down_proj",
        ),
        *fused("transformer.blocks.{layer}.attn.Wqkv", THIRDS)[::2],
    ),
)

# The first layout, of the 7B: one key head, one norm.
FALCON = _GPT.like(
    "falcon",
    "FalconForCausalLM",
    keys={
        "width": ("hidden_size", "n_embed", ...),
        "layers": ("num_hidden_layers", "n_layer", ...),
        "heads": ("num_attention_heads", "n_head", ...),
        "context": ("max_position_embeddings", 2048),
        "mlp_width": ("ffn_hidden_size", None),
        "mlp": ("activation", "gelu"),
        "attention_bias": ("bias", False),
        "mlp_bias": ("bias", False),
    },
    fixed=dict.fromkeys(("positions", "attention_bias", "mlp_bias"))
    | {"parallel_residual": True, "shared_norm": True, "kv_heads": 1},
    only={"alibi": (False,), "multi_query": (True,), "parallel_attn": (True,), "new_decoder_architecture": (False,)},
    rope=Rope(),
    write_more=lambda config: {"num_kv_heads": 1},
    weights=(
        *lines(_BLOCK, _FALCON + " attention_norm=input_layernorm"),
        *fused(_BLOCK + "self_attention.query_key_value", UNEQUAL),
    ),
)
# The second, of the 40B and 180B: each key head with its queries in front; two norms.
FALCON_NEW = FALCON.like(
    "falcon_new",
    "FalconForCausalLM",
    model_type="falcon",
    keys={"kv_heads": ("num_kv_heads", None)},
    fixed={"shared_norm": None, "kv_heads": None},
    only={"multi_query": None, "new_decoder_architecture": (True,), "num_ln_in_parallel_attn": (2,)},
    write_more=lambda config: {},
    weights=(
        *lines(_BLOCK, _FALCON + " attention_norm=ln_attn mlp_norm=ln_mlp"),
        *fused(_BLOCK + "self_attention.query_key_value", GROUPED, "(heads group)"),
    ),
)

# The RefinedWeb models: ALiBi and a key head for every query head.
FALCON_RW = FALCON.like(
    "falcon_rw",
    "FalconForCausalLM",
    model_type="falcon",
    keys=dict.fromkeys(("parallel_residual", "shared_norm"), ("parallel_attn", True)),
    fixed={"positions": "alibi", "rounded_alibi": True}
    | dict.fromkeys(("parallel_residual", "shared_norm", "kv_heads")),
    only={"alibi": (True,), "multi_query": (False,), "parallel_attn": None},
    rope=None,
    read_more=lambda raw, fields: raw.only("multi_query", False, default=True) or four_wide(raw, fields),
    write_more=lambda config: {"num_kv_heads": config.heads},
    weights=(
        *lines(_BLOCK, _FALCON + _BLOOM),
        *fused(_BLOCK + "self_attention.query_key_value", BY_HEAD),
    ),
)

PHI = GPT_NEOX.like(
    "phi",
    "PhiForCausalLM",
    keys={
        "kv_heads": ("num_key_value_heads", None),
        "mlp": ("hidden_act", "gelu_new"),
        "attention_bias": None,
        "parallel_residual": None,
    },
    fixed={"attention_bias": True, "parallel_residual": True, "shared_norm": True, "head_bias": True},
    only={"qk_layernorm": (False,)},
    rope=Rope(fraction=0.5, fraction_keys=("partial_rotary_factor",)),
    weights=lines(
        "model.layers.{layer}.",
        "embed=model.embed_tokens norm=model.final_layernorm head=lm_head attention_norm=input_layernorm"
        " q=self_attn.q_proj k=self_attn.k_proj v=self_attn.v_proj o=self_attn.dense up=mlp.fc1 down=mlp.fc2",
    ),
    ignored=(),
    tied_copies=LLAMA.tied_copies,
)
STARCODER2 = LLAMA.like(
    "starcoder2",
    "Starcoder2ForCausalLM",
    keys={
        "norm_eps": ("norm_epsilon", 1e-5),
        **dict.fromkeys(("attention_bias", "mlp_bias"), ("use_bias", True)),
        "head_dim": None,
    },
    silent={"context": 4096, "kv_heads": 2, "mlp": "gelu_pytorch_tanh", "init_std": 0.018042, "tied_embeddings": True},
    fixed={"norm": "layer"},
    gated=False,
    windows=Windows(None, by_layer=False),
    weights=(
        *(line for line in LLAMA.weights if line not in MLP),
        *lines("model.layers.{layer}.", "up=mlp.c_fc down=mlp.c_proj"),
    ),
)
