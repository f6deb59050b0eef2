"""Mamba, as transformers names it (state-spaces/mamba-130m-hf and its sisters)."""

from typing import Any

from fineline_jax.models.families.family import Family
from fineline_jax.models.families.hf_config import HfConfig
from fineline_jax.models.families.lines import lines
from fineline_jax.models.families.name_map import Weight

_LAYER = "backbone.layers.{layer}."
_MIXER = _LAYER + "mixer."


def _sizes(raw: HfConfig, fields: dict[str, Any]) -> dict[str, Any]:
    width, rank = fields["width"], raw.find("time_step_rank")
    return {
        "mlp_width": raw.integer("intermediate_size", default=raw.integer("expand", default=2) * width),
        "step_rank": -(-width // 16) if rank in (None, "auto") else raw.integer("time_step_rank"),
    }


MAMBA = Family(
    name="mamba",
    architectures=("MambaForCausalLM",),
    keys={
        "vocab_size": "vocab_size",
        "width": "hidden_size",
        "layers": ("num_hidden_layers", "n_layer", ...),
        "context": ("max_position_embeddings", 2048),  # the authors trained on 2048; the file is silent
        "norm_eps": ("layer_norm_epsilon", 1e-5),
        "tied_embeddings": ("tie_word_embeddings", True),
        "init_std": ("initializer_range", 0.1),
        "state_size": ("state_size", 16),
        "conv_width": ("conv_kernel", 4),
    },
    fixed={"mixer": "mamba", "heads": 0},
    only={"hidden_act": ("silu", "swish"), "use_bias": (False,), "use_conv_bias": (True,)},
    rope=None,
    read_more=_sizes,
    write_more=lambda config: {
        "intermediate_size": config.mlp_width,
        "expand": config.mlp_width // config.width,
        "time_step_rank": config.step_rank,
        "residual_in_fp32": True,
    },
    weights=(
        *lines("", "embed=backbone.embeddings norm=backbone.norm_f head=lm_head"),
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
    ),
)
