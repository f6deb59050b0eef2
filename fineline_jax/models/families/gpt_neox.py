"""GPT-NeoX: Pythia. Queries, keys and values lie in one tensor, head by head."""

from typing import Any

from fineline_jax.models.config import ModelConfig
from fineline_jax.models.families.family import Family
from fineline_jax.models.families.hf_config import HfConfig
from fineline_jax.models.families.name_map import Weight

_LAYER = "gpt_neox.layers.{layer}."
_QKV = _LAYER + "attention.query_key_value."


def from_hf(raw: HfConfig) -> ModelConfig:
    raw.only("hidden_act", "gelu")
    raw.only("quantization_config")
    older = raw.number("rotary_pct", default=0.25)
    rope = HfConfig(f"{raw.where}: rope_parameters", raw.rope())
    return ModelConfig(
        vocab_size=raw.integer("vocab_size"),
        width=raw.integer("hidden_size"),
        layers=raw.integer("num_hidden_layers"),
        heads=raw.integer("num_attention_heads"),
        mlp_width=raw.integer("intermediate_size"),
        context=raw.integer("max_position_embeddings", default=2048),
        rope_theta=raw.rope_theta("rotary_emb_base"),
        norm_eps=raw.number("layer_norm_eps", default=1e-5),
        tied_embeddings=raw.flag("tie_word_embeddings", default=False),
        attention_bias=raw.flag("attention_bias", default=True),
        mlp_bias=True,
        init_std=raw.number("initializer_range", default=0.02),
        norm="layer",
        parallel_residual=raw.flag("use_parallel_residual", default=True),
        rotary_fraction=rope.number("partial_rotary_factor", default=older),
        mlp="gelu",
    )


def to_hf(config: ModelConfig) -> dict[str, Any]:
    rotary = {"rope_type": "default", "rope_theta": config.rope_theta, "partial_rotary_factor": config.rotary_fraction}
    return {
        "model_type": "gpt_neox",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.mlp_width,
        "hidden_act": "gelu",
        "max_position_embeddings": config.context,
        "initializer_range": config.init_std,
        "layer_norm_eps": config.norm_eps,
        "rotary_pct": config.rotary_fraction,  # transformers 4, with the next
        "rotary_emb_base": config.rope_theta,
        "rope_parameters": rotary,  # transformers 5
        "attention_bias": config.attention_bias,
        "use_parallel_residual": config.parallel_residual,
        "tie_word_embeddings": config.tied_embeddings,
        "use_cache": True,
    }


GPT_NEOX = Family(
    name="gpt_neox",
    architectures=("GPTNeoXForCausalLM",),
    from_hf=from_hf,
    to_hf=to_hf,
    weights=(
        Weight("gpt_neox.embed_in.weight", "embed", "vocab width -> vocab width"),
        Weight(_LAYER + "input_layernorm.weight", "layers.attention_norm", "width -> width"),
        Weight(_LAYER + "input_layernorm.bias", "layers.attention_norm_bias", "width -> width"),
        Weight(_QKV + "weight", "layers.q", "(heads 0/3 dim) width -> width heads dim"),
        Weight(_QKV + "weight", "layers.k", "(heads 1/3 dim) width -> width heads dim"),
        Weight(_QKV + "weight", "layers.v", "(heads 2/3 dim) width -> width heads dim"),
        Weight(_QKV + "bias", "layers.q_bias", "(heads 0/3 dim) -> heads dim"),
        Weight(_QKV + "bias", "layers.k_bias", "(heads 1/3 dim) -> heads dim"),
        Weight(_QKV + "bias", "layers.v_bias", "(heads 2/3 dim) -> heads dim"),
        Weight(_LAYER + "attention.dense.weight", "layers.o", "width (heads dim) -> heads dim width"),
        Weight(_LAYER + "attention.dense.bias", "layers.o_bias", "width -> width"),
        Weight(_LAYER + "post_attention_layernorm.weight", "layers.mlp_norm", "width -> width"),
        Weight(_LAYER + "post_attention_layernorm.bias", "layers.mlp_norm_bias", "width -> width"),
        Weight(_LAYER + "mlp.dense_h_to_4h.weight", "layers.up", "mlp width -> width mlp"),
        Weight(_LAYER + "mlp.dense_h_to_4h.bias", "layers.up_bias", "mlp -> mlp"),
        Weight(_LAYER + "mlp.dense_4h_to_h.weight", "layers.down", "width mlp -> mlp width"),
        Weight(_LAYER + "mlp.dense_4h_to_h.bias", "layers.down_bias", "width -> width"),
        Weight("gpt_neox.final_layer_norm.weight", "norm", "width -> width"),
        Weight("gpt_neox.final_layer_norm.bias", "norm_bias", "width -> width"),
        Weight("embed_out.weight", "head", "vocab width -> width vocab"),
    ),
    # Old files hold the causal mask and the rotary frequencies, which are computed.
    ignored=(r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",),
    tied_copies=("embed_out.weight",),
)
