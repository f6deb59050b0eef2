"""Checkpoints of MaxText: `checkpoints/STEP/items`, a training state that Orbax wrote; read only, Llamas alone.

Arrays are read in place, without the optimizer's and without JAX. Layers are stacked along `param_scan_axis` where they
were scanned. Queries hold the factor 1 / sqrt(head_dim); with the rotary embedding of Llama 3.1 features of a head
stand in pairs. config.yml is what `save_config_to_gcs` writes. Sources in MaxText: layers/{attentions,embeddings,
llama2}.py, utils/ckpt_scripts/llama_mistral_mixtral_orbax_to_hf.py; Orbax: _METADATA of PyTree checkpoints.
"""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fineline_jax.checkpoints.formats.lazy_tensor import ComputedTensor, Tensor, unstacked
from fineline_jax.checkpoints.formats.trainers.gguf import rotary_rows
from fineline_jax.checkpoints.formats.weight_format import WeightFormat
from fineline_jax.errors import UserError, reading
from fineline_jax.models.families.llama import LLAMA, LLAMA3_SCALING
from fineline_jax.models.families.name_map import Weight

_LAYER = "decoder.layers.{layer}."
MAXTEXT_LLAMA = dataclasses.replace(
    LLAMA,
    weights=(
        Weight("token_embedder.embedding", "embed", "vocab width -> vocab width"),
        Weight(_LAYER + "pre_self_attention_layer_norm.scale", "layers.attention_norm", "width -> width"),
        *(
            Weight(f"{_LAYER}self_attention.{name}.kernel", f"layers.{name[0]}", "width heads dim -> width heads dim")
            for name in ("query", "key", "value")
        ),
        Weight(_LAYER + "self_attention.out.kernel", "layers.o", "heads dim width -> heads dim width"),
        Weight(_LAYER + "post_self_attention_layer_norm.scale", "layers.mlp_norm", "width -> width"),
        Weight(_LAYER + "mlp.wi_0.kernel", "layers.gate", "width mlp -> width mlp"),
        Weight(_LAYER + "mlp.wi_1.kernel", "layers.up", "width mlp -> width mlp"),
        Weight(_LAYER + "mlp.wo.kernel", "layers.down", "mlp width -> mlp width"),
        Weight("decoder.decoder_norm.scale", "norm", "width -> width"),
        Weight("decoder.logits_dense.kernel", "head", "width vocab -> width vocab"),
    ),
    tied_copies=(),
)
KEY = "items/_METADATA"
ONLY = {
    "decoder_block": ("llama2",), "mlp_activations": (["silu", "linear"],), "num_experts": (1,), "fused_qkv": (False,),
    "fused_mlp": (False,), "attention_bias": (False,), "normalize_embedding_logits": (False,), "rope_type": ("default",
    "llama3.1"), "rope_linear_scaling_factor": (1, 1.0), "final_logits_soft_cap": (None, 0.0),
}  # fmt: skip
"""Settings of config.yml that change what is computed, and what is read."""
SIZES = {
    "hidden_size": "emb_dim", "intermediate_size": "mlp_dim", "num_hidden_layers": "num_decoder_layers",
    "num_attention_heads": "num_query_heads", "num_key_value_heads": "num_kv_heads", "head_dim": "head_dim",
    "vocab_size": "vocab_size", "max_position_embeddings": "max_target_length", "rope_theta": "rope_max_timescale",
    "rms_norm_eps": "normalization_layer_epsilon",
}  # fmt: skip


def read_maxtext(path: Path) -> dict[str, Tensor]:
    """The parameters of the training state beside `path`, by MaxText's names. Raises UserError naming the file."""
    import tensorstore

    with reading(path, what="not the metadata of an Orbax checkpoint"):
        about = json.loads(path.read_bytes())
        names = [".".join(one["key"] for one in leaf["key_metadata"]) for leaf in about["tree_metadata"].values()]
        base, opened = f"file://{path.parent.absolute()}/", {}
        for name in names:
            if name.startswith("params."):
                place = (
                    {"driver": "ocdbt", "base": base, "path": f"{name}/"} if about["use_ocdbt"] else f"{base}{name}/"
                )
                spec = {"driver": "zarr3" if about.get("use_zarr3") else "zarr", "kvstore": place}
                full = bool(about.get("store_array_data_equal_to_fill_value"))
                spec["fill_missing_data_reads"] = not full  # lost files are an error, not zeros
                opened[name] = tensorstore.open(spec, open=True, read=True)
    tensors: dict[str, Tensor] = {}
    for name, future in opened.items():
        with reading(path, what=f"tensor {name} beside it cannot be opened"):
            short = re.sub(r"(?<=decoder\.layers)_(?=\d)", ".", re.sub(r"^(params\.)+", "", name))
            tensors[short] = _stored(path, short, future.result())
    _, pairs, settings = _settings(path.parents[1])
    found = unstacked(tensors, settings.get("param_scan_axis", 1))
    return {name: _turned(tensor, pairs) if _TURNED.fullmatch(name) else tensor for name, tensor in found.items()}


_TURNED = re.compile(r".*\.self_attention\.(query|key)\.kernel")


def _stored(path: Path, name: str, store: Any) -> ComputedTensor:
    def read(index: tuple[slice, ...]) -> np.ndarray:
        with reading(path, what=f"tensor {name} beside it cannot be read"):
            return store[index].read().result()

    return ComputedTensor(name, path, store.dtype.numpy_dtype, tuple(store.shape), read)


def _turned(tensor: Tensor, pairs: bool) -> ComputedTensor:
    """Queries without their factor, in a dtype that holds them, and queries and keys in halves."""
    size = tensor.shape[-1]
    factor = math.sqrt(size) if ".query." in tensor.name else 1.0
    dtype = tensor.dtype if math.frexp(factor)[0] == 0.5 else np.dtype(np.float32)  # powers of two are exact
    order = rotary_rows(1, size) if pairs and size % 2 == 0 else np.arange(size)

    def read(index: tuple[slice, ...]) -> np.ndarray:
        values = tensor[(*index[:-1], slice(0, size))][..., order[index[-1]]]
        return (values.astype(np.float32) * np.float32(factor)).astype(dtype)

    return ComputedTensor(tensor.name, tensor.file, dtype, tensor.shape, read)


def config_of(folder: Path) -> dict[str, Any]:
    """The config.json of the model, from config.yml. Raises UserError naming what is missing or not read there."""
    path, pairs, raw = _settings(folder)
    if lost := [name for name in SIZES.values() if not isinstance(raw.get(name), int | float)]:
        raise UserError(f"{path}: has no number {lost[0]}; use the config.yml of save_config_to_gcs, or a config.json")
    return {hf: raw[name] for hf, name in SIZES.items()} | {
        "architectures": ["LlamaForCausalLM"],
        "rope_scaling": LLAMA3_SCALING if pairs and raw.get("rope_use_scale", True) else None,
        "tie_word_embeddings": bool(raw.get("logits_via_embedding")),
    }


def _settings(folder: Path) -> tuple[Path, bool, dict[str, Any]]:
    """The file that says what model it is, whether its rotary features stand in pairs, and what it holds.

    Raises UserError if there is none, or naming a setting that is not read.
    """
    places = [(folder, "config.yml"), (folder.parent, "config.yml"), (folder.parent.parent, "config.yml")]
    places += [(folder, "config.json"), (folder.parent, "config.json")]
    path = next((place / name for place, name in places if (place / name).is_file()), None)
    if path is None:
        raise UserError(f"{folder}: does not say what model it is; put MaxText's config.yml or a config.json there")
    with reading(path, "repair it", "not valid settings"):
        raw = dict(yaml.load(path.read_text(), _Plain))
        if path.name == "config.json":
            rotary = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
            return path, rotary.get("rope_type", rotary.get("type")) == "llama3", {}
    for name, read in ONLY.items():
        if raw.get(name, read[0]) not in read and (
            name != "normalize_embedding_logits" or raw.get("logits_via_embedding")
        ):
            raise UserError(f"{path}: {name}: {raw[name]!r} is not read, only {read[0]!r}; give a Llama")
    pairs = str(raw.get("model_name", "")).startswith("llama3.1") or str(raw.get("rope_type")).startswith("llama3.1")
    return path, pairs, raw


class _Plain(yaml.SafeLoader):
    """Objects of Python are what they hold: nothing is made or called."""


def _plain(loader: yaml.SafeLoader, tag: str, node: yaml.Node) -> Any:
    held = loader.construct_sequence(node, True) if isinstance(node, yaml.SequenceNode) else [str(node.value)]
    return held[0] if len(held) == 1 else held


_Plain.add_multi_constructor("tag:yaml.org,2002:python/", _plain)

MAXTEXT = WeightFormat("MaxText", r"items/.+", read_maxtext, key=KEY, config=config_of, families=(MAXTEXT_LLAMA,))
