"""Hugging Face folders: weights read straight into shards, and written back. No torch, no weight permuted."""

import json
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

from fineline_jax.errors import UserError
from fineline_jax.models import decoder, families
from fineline_jax.models.config import ModelConfig
from fineline_jax.models.families.family import Family
from fineline_jax.models.families.hf_config import HfConfig
from fineline_jax.models.families.name_map import (
    Weight,
    all_tensors,
    parse_axes,
    present,
    read_part,
    tensor_name,
    tensors_of,
    write_part,
)

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
    """The model described by a `config.json`, as transformers 4 or 5 wrote it.

    Raises UserError naming the file and the key for anything the decoder does not compute.
    """
    return _family_and_config(path)[1]


def _family_and_config(path: Path) -> tuple[Family, ModelConfig]:
    try:
        raw = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a folder with a Hugging Face config.json") from error
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); fetch the file again") from error
    return families.of_hf(HfConfig(str(path), raw))


def load_hf(
    folder: Path, mesh: jax.sharding.Mesh, dtype: jnp.dtype = jnp.float32
) -> tuple[ModelConfig, decoder.Params]:
    """The model in a Hugging Face folder: its config, and its parameters in `dtype`, sharded for the decoder.

    Each process reads only the ranges of its own shards; beside the result, one parameter is in memory.
    Raises UserError naming the file and the tensor if one is missing, unexpected or of another shape.
    """
    family, config = _family_and_config(folder / "config.json")
    targets = decoder.abstract_params(config, mesh, dtype)
    tensors = _Tensors(folder)
    leaves = _leaves(targets)
    weights = present(family.weights, leaves)
    _check_names(folder, family, config, all_tensors(weights, _shapes(leaves)), tensors)
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
    family: str | None = None,
) -> None:
    """Write `params` as a folder that transformers opens.

    dtype: of the written weights; default: as they are. tokenizer: folder whose tokenizer files are copied. family:
    the layout of the files; default: the first that can hold the model.
    Runs in one process. `out` appears when it is complete. Raises UserError if `out` is there already.
    """
    layout = families.of_config(config, family)
    if out.exists():
        raise UserError(f"{out}: exists already; give a new folder")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        leaves = _leaves(params)
        written = np.dtype(dtype or leaves["embed"].dtype)
        _write_weights(layout, leaves, partial, written, shard_bytes)
        special = {"bos_token_id": None, "eos_token_id": None}
        if tokenizer is not None:
            special = _copy_tokenizer(tokenizer, partial)
        (partial / "config.json").write_text(json.dumps(_hf_config(layout, config, written) | special, indent=2) + "\n")
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
    axes, stacked = parse_axes(weight.axes), weight.stacked
    shape = target.shape[stacked:]
    for _, name in tensors_of(weight, target.shape):
        _check_shape(name, axes.file_shape(shape), tensors)
    parts: dict[Any, np.ndarray] = {}  # replicas ask for the same part again

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        index = index or ()
        spans = tuple(span.indices(size)[:2] for span, size in zip(index, target.shape))
        if spans not in parts:
            out = np.empty([stop - start for start, stop in spans], target.dtype)
            for place in np.ndindex(*out.shape[:stacked]):
                name = tensor_name(weight, [start + offset for (start, _), offset in zip(spans, place)])
                out[place] = read_part(tensors[name], axes, shape, index[stacked:])
            parts[spans] = out
        return parts[spans]

    return jax.make_array_from_callback(target.shape, target.sharding, part)


def _check_names(
    folder: Path, family: Family, config: ModelConfig, expected: Mapping[str, Any], tensors: _Tensors
) -> None:
    found = {name for name in tensors.file_of if not any(re.fullmatch(p, name) for p in family.ignored)}
    if config.tied_embeddings:
        found -= set(family.tied_copies)
    for missing, verb, remedy in (
        (expected.keys() - found, "is missing", "fetch all weight files again"),
        (found - expected.keys(), "is not part of the model that config.json describes", "check config.json"),
    ):
        if missing:
            first, more = min(missing), len(missing) - 1
            others = f" (and {more} more)" if more else ""
            raise UserError(f"{folder}: tensor {first}{others} {verb}; {remedy}")


def _check_shape(name: str, expected: Sequence[int], tensors: _Tensors) -> None:
    found = list(tensors[name].get_shape())
    if found != expected:
        raise UserError(
            f"{tensors.file_of[name]}: tensor {name} has shape {found}, config.json means {expected}; check config.json"
        )


# Writing


def _write_weights(
    family: Family, leaves: Mapping[str, jax.Array], folder: Path, dtype: np.dtype, shard_bytes: int
) -> None:
    files: list[list[str]] = [[]]
    filled = total = 0
    tensors = all_tensors(present(family.weights, leaves), _shapes(leaves))
    for name, lines in tensors.items():
        weight, _ = lines[0]
        shape = parse_axes(weight.axes).file_shape(leaves[weight.ours].shape[weight.stacked :])
        size = int(np.prod(shape)) * dtype.itemsize
        if filled and filled + size > shard_bytes:
            files.append([])
            filled = 0
        files[-1].append(name)
        filled, total = filled + size, total + size
    weight_map = {}
    for number, names in enumerate(files, start=1):
        single = len(files) == 1
        file = "model.safetensors" if single else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        save_file(
            {name: _to_file(leaves, tensors[name], dtype) for name in names}, folder / file, metadata={"format": "pt"}
        )
        weight_map |= dict.fromkeys(names, file)
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _to_file(
    leaves: Mapping[str, jax.Array], lines: Sequence[tuple[Weight, tuple[int, ...]]], dtype: np.dtype
) -> np.ndarray:
    """One tensor, put together from the lines that fill it."""
    weight, _ = lines[0]
    shape = leaves[weight.ours].shape[weight.stacked :]
    tensor = np.empty(parse_axes(weight.axes).file_shape(shape), dtype)
    for weight, place in lines:
        write_part(tensor, parse_axes(weight.axes), np.asarray(leaves[weight.ours][place]).astype(dtype))
    return tensor


def _hf_config(family: Family, config: ModelConfig, dtype: np.dtype) -> dict[str, Any]:
    return {"architectures": [family.architectures[0]], **family.to_hf(config), "torch_dtype": str(dtype)}


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


def _shapes(leaves: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {path: leaf.shape for path, leaf in leaves.items()}


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
