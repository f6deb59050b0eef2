"""Mamba, as transformers names it (state-spaces/mamba-130m-hf and its sisters)."""

from typing import Any

from fineline_jax.models.config import ModelConfig
from fineline_jax.models.families.family import Family
from fineline_jax.models.families.hf_config import HfConfig
from fineline_jax.models.families.name_map import Weight

_LAYER = "backbone.layers.{layer}."
_MIXER = _LAYER + "mixer."


def from_hf(raw: HfConfig) -> ModelConfig:
    raw.only("hidden_act", "silu", "swish")
    raw.only("use_bias", False)
    raw.only("use_conv_bias", True)
    raw.only("quantization_config")
    width = raw.integer("hidden_size")
    rank = raw.find("time_step_rank")
    return ModelConfig(
        vocab_size=raw.integer("vocab_size"),
        width=width,
        layers=raw.integer("num_hidden_layers", "n_layer"),
        heads=0,
        mlp_width=raw.integer("intermediate_size", default=raw.integer("expand", default=2) * width),
        context=raw.integer("max_position_embeddings", default=2048),  # the authors trained on 2048; the file is silent
        norm_eps=raw.number("layer_norm_epsilon", default=1e-5),
        tied_embeddings=raw.flag("tie_word_embeddings", default=True),
        init_std=raw.number("initializer_range", default=0.1),
        mixer="mamba",
        state_size=raw.integer("state_size", default=16),
        conv_width=raw.integer("conv_kernel", default=4),
        step_rank=-(-width // 16) if rank in (None, "auto") else raw.integer("time_step_rank"),
    )


def to_hf(config: ModelConfig) -> dict[str, Any]:
    return {
        "model_type": "mamba",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "intermediate_size": config.mlp_width,
        "expand": config.mlp_width // config.width,
        "state_size": config.state_size,
        "conv_kernel": config.conv_width,
        "time_step_rank": config.step_rank,
        "hidden_act": "silu",
        "use_bias": False,
        "use_conv_bias": True,
        "residual_in_fp32": True,
        "max_position_embeddings": config.context,
        "initializer_range": config.init_std,
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tied_embeddings,
        "use_cache": True,
    }


MAMBA = Family(
    name="mamba",
    architectures=("MambaForCausalLM",),
    from_hf=from_hf,
    to_hf=to_hf,
    weights=(
        Weight("backbone.embeddings.weight", "embed", "vocab width -> vocab width"),
        Weight(_LAYER + "norm.weight", "layers.mixer_norm", "width -> width"),
        Weight(_MIXER + "in_proj.weight", "layers.in_proj_x", "(0/2 inner) width -> width inner"),
        Weight(_MIXER + "in_proj.weight", "layers.in_proj_z", "(1/2 inner) width -> width inner"),
        Weight(_MIXER + "conv1d.weight", "layers.conv1d", "inner 1:one tokens -> (1:one tokens) inner"),
        Weight(_MIXER + "conv1d.bias", "layers.conv1d_bias", "inner -> inner"),
        Weight(_MIXER + "x_proj.weight", "layers.x_proj", "projected inner -> inner projected"),
        Weight(_MIXER + "dt_proj.weight", "layers.dt_proj", "inner rank -> rank inner"),
        Weight(_MIXER + "dt_proj.bias", "layers.dt_proj_bias", "inner -> inner"),
        Weight(_MIXER + "A_log", "layers.A_log", "inner state -> inner state"),
        Weight(_MIXER + "D", "layers.D", "inner -> inner"),
        Weight(_MIXER + "out_proj.weight", "layers.out_proj", "width inner -> inner width"),
        Weight("backbone.norm_f.weight", "norm", "width -> width"),
        Weight("lm_head.weight", "head", "vocab width -> width vocab"),
    ),
)
