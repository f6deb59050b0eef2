"""Mamba, Falcon-Mamba and Mamba-2, as transformers names them (state-spaces/mamba-130m-hf and its sisters)."""

import dataclasses
import math
from typing import Any

from fineline_jax.models.families.family import Family, Turned
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


def _sizes_of_heads(raw: HfConfig, fields: dict[str, Any]) -> dict[str, Any]:
    inner = fields["state_heads"] * raw.integer("head_dim", default=64)
    raw.only("expand", inner / fields["width"], default=2)
    return {"mlp_width": inner}


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

FALCON_MAMBA = MAMBA.like(
    "falcon_mamba", "FalconMambaForCausalLM", keys={"state_norm_eps": Turned("mixer_rms_eps", 1e-6, float, float)}
)

_PARTS = {
    "z": "(inner@0-{i}/{all})",
    "x": "(inner@{i}-{ii}/{all})",
    "io": "(io@{ii}-{ic}/{all})",
    "dt": "(heads@{ic}-{all}/{all})",
}
MAMBA2 = dataclasses.replace(
    MAMBA,
    name="mamba2",
    architectures=("Mamba2ForCausalLM",),
    keys={key: value for key, value in MAMBA.keys.items() if key not in ("tied_embeddings", "state_size")}
    | {
        "tied_embeddings": ("tie_word_embeddings", False),
        "state_size": ("state_size", 128),
        "state_heads": ("num_heads", 128),
        "state_groups": ("n_groups", 8),
    },
    only={**MAMBA.only, "time_step_limit": ([0.0, {"__float__": "Infinity"}], [0.0, math.inf])},
    read_more=_sizes_of_heads,
    write_more=lambda config: {
        "expand": config.mlp_width // config.width,
        "head_dim": config.mlp_width // max(1, config.state_heads),
        "residual_in_fp32": True,
    },
    weights=(
        *lines("", "embed=backbone.embeddings norm=backbone.norm_f head=lm_head"),
        Weight(_LAYER + "norm.weight", "layers.mixer_norm", "width -> width"),
        *(
            Weight(
                _MIXER + "in_proj.weight", f"layers.in_proj_{ours}", f"{part} width -> width {part[1:].split('@')[0]}"
            )
            for ours, part in _PARTS.items()
        ),
        Weight(_MIXER + "conv1d.weight", "layers.conv1d", "(inner@0-{i}/{c}) 1:one tokens -> (1:one tokens) inner"),
        Weight(_MIXER + "conv1d.weight", "layers.conv1d_io", "(io@{i}-{c}/{c}) 1:one tokens -> (1:one tokens) io"),
        Weight(_MIXER + "conv1d.bias", "layers.conv1d_bias", "(inner@0-{i}/{c}) -> inner"),
        Weight(_MIXER + "conv1d.bias", "layers.conv1d_io_bias", "(io@{i}-{c}/{c}) -> io"),
        *(Weight(_MIXER + name, f"layers.{name}", "heads -> heads") for name in ("dt_bias", "A_log", "D")),
        Weight(_MIXER + "norm.weight", "layers.inner_norm", "inner -> inner"),
        Weight(_MIXER + "out_proj.weight", "layers.out_proj", "width inner -> inner width"),
    ),
)
