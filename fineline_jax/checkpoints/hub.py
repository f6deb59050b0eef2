"""Hugging Face folders: weights read straight into shards, and written back. No torch, no weight permuted."""

import json
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fineline_jax.checkpoints.names import (
    LLAMA,
    Axes,
    Weight,
    all_tensors,
    parse_axes,
    present,
    read_part,
    tensor_names,
)
from fineline_jax.errors import UserError
from fineline_jax.models import decoder
from fineline_jax.models.config import ModelConfig

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000
"""Largest weight file that `export_hf` writes."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def config_from_hf(path: Path) -> ModelConfig:
    """The model described by a `config.json` of the Llama family, as transformers 4 or 5 wrote it.

    Raises UserError naming the file and the key for anything the decoder does not compute.
    """
    try:
        raw = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a folder with a Hugging Face config.json") from error
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); fetch the file again") from error
    architectures = raw.get("architectures") or []
    if not any(name in LLAMA.architectures for name in architectures):
        named = ", ".join(architectures) or "none"
        raise UserError(f"{path}: architectures: {named} is not known; known: {', '.join(LLAMA.architectures)}")
    rope = raw.get("rope_parameters") or {}
    scaling = raw.get("rope_scaling") or {}
    unscaled = {"default", None}
    for key, values in (("rope_parameters", rope), ("rope_scaling", scaling)):
        kind = values.get("rope_type", values.get("type"))
        if kind not in unscaled or (key == "rope_scaling" and values and kind is None):
            raise UserError(f"{path}: {key}: {kind!r} rotary scaling is not computed; use a model without it")
    only = {
        "hidden_act": ("silu", "swish"),
        "partial_rotary_factor": (1, 1.0),
        "quantization_config": (),
        "sliding_window": (),
    }
    for key, allowed in only.items():
        value = rope.get(key, raw.get(key))
        if value is not None and value not in allowed:
            raise UserError(f"{path}: {key}={value!r} is not computed; use a model without it")

    def get(*keys: str, default: Any = None) -> Any:
        values = [raw[key] for key in keys if raw.get(key) is not None]
        if not values and default is None:
            raise UserError(f"{path}: {keys[0]} is missing; fetch the file again")
        return values[0] if values else default

    heads = get("num_attention_heads")
    return ModelConfig(
        vocab_size=get("vocab_size"),
        width=get("hidden_size"),
        layers=get("num_hidden_layers"),
        heads=heads,
        mlp_width=get("intermediate_size"),
        kv_heads=get("num_key_value_heads", default=heads),
        head_dim=get("head_dim", default=0),
        context=get("max_position_embeddings", "max_sequence_length", default=2048),
        rope_theta=float(rope.get("rope_theta") or get("rope_theta", default=10_000.0)),
        norm_eps=get("rms_norm_eps", default=1e-6),
        tied_embeddings=get("tie_word_embeddings", default=False),
        attention_bias=get("attention_bias", default=False),
        mlp_bias=get("mlp_bias", default=False),
        init_std=get("initializer_range", default=0.02),
    )


def load_hf(
    folder: Path, mesh: jax.sharding.Mesh, dtype: jnp.dtype = jnp.float32
) -> tuple[ModelConfig, decoder.Params]:
    """The model in a Hugging Face folder: its config, and its parameters in `dtype`, sharded for the decoder.

    Each process reads only the ranges of its own shards; beside the result, one parameter is in memory.
    Raises UserError naming the file and the tensor if one is missing, unexpected or of another shape.
    """
    config = config_from_hf(folder / "config.json")
    targets = decoder.abstract_params(config, mesh, dtype)
    tensors = _Tensors(folder)
    leaves = _leaves(targets)
    weights = present(LLAMA, leaves)
    _check_names(folder, config, weights, tensors)
    params: decoder.Params = {}
    for weight in weights:
        _put(params, weight.ours, _load(weight, leaves[weight.ours], tensors))
    return config, params


def export_hf(
    config: ModelConfig,
    params: decoder.Params,
    out: Path,
    tokenizer: Path | None = None,
    dtype: jnp.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write `params` as a folder that transformers opens as LlamaForCausalLM.

    dtype: of the written weights; default: as they are. tokenizer: folder whose tokenizer files are copied.
    Runs in one process. `out` appears when it is complete. Raises UserError if `out` is there already.
    """
    if out.exists():
        raise UserError(f"{out}: exists already; give a new folder")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        leaves = _leaves(params)
        written = np.dtype(dtype or leaves["embed"].dtype)
        _write_weights(config, leaves, partial, written, shard_bytes)
        special = {"bos_token_id": None, "eos_token_id": None}
        if tokenizer is not None:
            special = _copy_tokenizer(tokenizer, partial)
        (partial / "config.json").write_text(json.dumps(_hf_config(config, written) | special, indent=2) + "\n")
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


# Reading


class _Tensors:
    """The tensors of a folder's safetensors files, by name."""

    def __init__(self, folder: Path):
        self.folder = folder
        single, index = folder / "model.safetensors", folder / INDEX
        if index.exists():
            try:
                names = sorted({str(name) for name in json.loads(index.read_bytes())["weight_map"].values()})
            except (ValueError, KeyError, AttributeError) as error:
                raise UserError(f"{index}: not an index of weight files; fetch it again") from error
            files = [folder / Path(name).name for name in names]
        elif single.exists():
            files = [single]
        else:
            raise UserError(f"{folder}: holds neither model.safetensors nor {INDEX}; give a folder with safetensors")
        self.file_of: dict[str, Path] = {}
        self.open: dict[Path, Any] = {}
        for file in files:
            try:
                self.open[file] = safe_open(file, framework="np")
            except FileNotFoundError as error:
                raise UserError(f"{file}: named by {INDEX} but missing; fetch it") from error
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file}: not a whole safetensors file ({error}); fetch it again") from error
            self.file_of |= dict.fromkeys(self.open[file].keys(), file)

    def __getitem__(self, name: str) -> Any:
        return self.open[self.file_of[name]].get_slice(name)


def _load(weight: Weight, target: jax.ShapeDtypeStruct, tensors: _Tensors) -> jax.Array:
    axes, stacked = parse_axes(weight.axes), weight.ours.startswith("layers.")
    shape = target.shape[1:] if stacked else target.shape
    for layer in range(target.shape[0]) if stacked else [0]:
        _check_shape(weight.hf.format(layer=layer), axes, shape, tensors)
    parts: dict[Any, np.ndarray] = {}  # replicas ask for the same part again

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        index = index or ()
        spans = tuple(span.indices(size)[:2] for span, size in zip(index, target.shape))
        if spans not in parts:
            lengths = [stop - start for start, stop in spans]
            out = np.empty(lengths, target.dtype)
            if stacked:
                for row, layer in enumerate(range(*spans[0])):
                    out[row] = read_part(tensors[weight.hf.format(layer=layer)], axes, shape, index[1:])
            else:
                out[...] = read_part(tensors[weight.hf], axes, shape, index)
            parts[spans] = out
        return parts[spans]

    return jax.make_array_from_callback(target.shape, target.sharding, part)


def _check_names(folder: Path, config: ModelConfig, weights: Sequence[Weight], tensors: _Tensors) -> None:
    expected = {name for weight in weights for name in tensor_names(weight, config.layers)}
    found = {name for name in tensors.file_of if not any(re.fullmatch(p, name) for p in LLAMA.ignored)}
    if config.tied_embeddings:
        found.discard("lm_head.weight")  # some files hold the embedding twice
    for missing, verb, remedy in (
        (expected - found, "is missing", "fetch all weight files again"),
        (found - expected, "is not part of the model that config.json describes", "check config.json"),
    ):
        if missing:
            first, more = min(missing), len(missing) - 1
            others = f" (and {more} more)" if more else ""
            raise UserError(f"{folder}: tensor {first}{others} {verb}; {remedy}")


def _check_shape(name: str, axes: Axes, shape: Sequence[int], tensors: _Tensors) -> None:
    sizes = dict(zip(axes.ours, shape))
    expected = [math.prod(sizes[axis] for axis in group) for group in axes.file]
    found = list(tensors[name].get_shape())
    if found != expected:
        raise UserError(
            f"{tensors.file_of[name]}: tensor {name} has shape {found}, config.json means {expected}; check config.json"
        )


# Writing


def _write_weights(
    config: ModelConfig, leaves: Mapping[str, jax.Array], folder: Path, dtype: np.dtype, shard_bytes: int
) -> None:
    files: list[list[tuple[str, Weight, int]]] = [[]]
    filled = total = 0
    for name, weight, layer in all_tensors(config.layers, present(LLAMA, leaves)):
        leaf = leaves[weight.ours]
        size = leaf.size * dtype.itemsize // (config.layers if weight.ours.startswith("layers.") else 1)
        if filled and filled + size > shard_bytes:
            files.append([])
            filled = 0
        files[-1].append((name, weight, layer))
        filled, total = filled + size, total + size
    weight_map = {}
    for number, names in enumerate(files, start=1):
        single = len(files) == 1
        file = "model.safetensors" if single else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        tensors = {name: _to_file(leaves[weight.ours], weight, layer, dtype) for name, weight, layer in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _to_file(leaf: jax.Array, weight: Weight, layer: int, dtype: np.dtype) -> np.ndarray:
    axes = parse_axes(weight.axes)
    array = np.asarray(leaf[layer] if weight.ours.startswith("layers.") else leaf)
    sizes = dict(zip(axes.ours, array.shape))
    shape = [math.prod(sizes[name] for name in group) for group in axes.file]
    return np.ascontiguousarray(array.transpose(axes.to_file()).reshape(shape).astype(dtype))


def _hf_config(config: ModelConfig, dtype: np.dtype) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.context,
        "initializer_range": config.init_std,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,  # transformers 4
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},  # transformers 5
        "tie_word_embeddings": config.tied_embeddings,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "torch_dtype": str(dtype),
        "use_cache": True,
    }


def _copy_tokenizer(source: Path, target: Path) -> dict[str, int | None]:
    """Copy the tokenizer's files; the ids of its BOS and EOS for config.json."""
    found = [source / name for name in TOKENIZER_FILES if (source / name).is_file()]
    if not found:
        raise UserError(f"{source}: holds no tokenizer ({', '.join(TOKENIZER_FILES[:3])}); give its folder")
    for file in found:
        shutil.copyfile(file, target / file.name)
    ids: dict[str, int | None] = {"bos_token_id": None, "eos_token_id": None}
    if (source / "tokenizer.json").exists() and (source / "tokenizer_config.json").exists():
        from tokenizers import Tokenizer

        vocabulary = Tokenizer.from_file(str(source / "tokenizer.json"))
        settings = json.loads((source / "tokenizer_config.json").read_bytes())
        for key in ids:
            token = settings.get(key.removesuffix("_id"))
            token = token.get("content") if isinstance(token, dict) else token
            ids[key] = vocabulary.token_to_id(token) if token else None
    return ids


# Parameter trees


def _leaves(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves of a nested dict by dotted path."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        below = {f"{key}.{path}": leaf for path, leaf in _leaves(value).items()} if isinstance(value, Mapping) else None
        found |= {key: value} if below is None else below
    return found


def _put(tree: dict[str, Any], path: str, leaf: Any) -> None:
    *parents, last = path.split(".")
    for name in parents:
        tree = tree.setdefault(name, {})
    tree[last] = leaf
