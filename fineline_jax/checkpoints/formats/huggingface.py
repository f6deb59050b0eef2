"""Hugging Face folders: weights read straight into shards, and written back. No torch, no weight permuted."""

import dataclasses
import functools
import itertools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from fineline_jax.atomic_files import atomic_folder
from fineline_jax.checkpoints.formats.host_copy import PIECE, copy, in_threads, new_array
from fineline_jax.checkpoints.formats.lazy_tensor import BFLOAT16, Tensor, box
from fineline_jax.checkpoints.formats.safetensors_files import SAFETENSORS, write_safetensors
from fineline_jax.checkpoints.formats.trainers.quantized import check_method, dequantized
from fineline_jax.checkpoints.formats.weight_files import Weights, config_file, open_weights, trainer_format
from fineline_jax.checkpoints.formats.weight_format import WeightFormat
from fineline_jax.errors import UserError, reading
from fineline_jax.models import decoder, families
from fineline_jax.models.config import ModelConfig
from fineline_jax.models.families.family import Family
from fineline_jax.models.families.hf_config import HfConfig
from fineline_jax.models.families.name_map import (
    Spans,
    Weight,
    all_tensors,
    cut,
    parse_axes,
    present,
    read_part,
    tensor_name,
    write_part,
)
from fineline_jax.tokenizers.files import copy_tokenizer
from fineline_jax.tokenizers.open import open_tokenizer

AllTensors = Mapping[str, Sequence[tuple[Weight, tuple[int, ...]]]]
"""As `name_map.all_tensors` returns."""
FLOATS = (*map(np.dtype, (np.float16, np.float32, np.float64)), BFLOAT16)
TRANSPOSING = ("gpu", "tpu")
"""Platforms whose devices transpose and cast: the host moves the bytes to them as they are in the files."""
SHARD_BYTES = 5_000_000_000
"""Largest weight file that `export_hf` writes."""


def config_from_hf(path: Path) -> ModelConfig:
    """The model described by a `config.json`, as transformers 4 or 5 wrote it.

    Raises UserError naming the file and the key for anything the decoder does not compute.
    """
    return _read_config(path)[1]


def config_of_weights(folder: Path) -> ModelConfig:
    """The model of weight files: of their config.json, or as their format says. Raises UserError."""
    one = trainer_format(folder)
    return _read_config(config_file(folder), one and (one, folder))[1]


def _read_config(path: Path, of: tuple[WeightFormat, Path] | None = None) -> tuple[Family, ModelConfig, dict[str, Any]]:
    """And how the weights are quantized. of: the format of weights, which may know the family or all that the file
    would say, and where they lie."""
    with reading(path, "give a folder with a Hugging Face config.json, or fetch the file again", "not valid JSON"):
        made = of[0].config if of and not path.exists() else None
        raw = made(of[1]) if of and made else json.loads(path.read_bytes())
    if of and of[0].families and isinstance(raw, dict) and not raw.get("architectures"):
        raw["architectures"] = [of[0].families[0].architectures[0]]
    how: dict[str, Any] = {}
    if isinstance(raw, dict) and isinstance(raw.get("quantization_config"), dict):
        how = raw.pop("quantization_config")
        check_method(how, path)
    return *families.of_hf(HfConfig(str(path), raw)), how


def load_hf(
    folder: Path,
    mesh: jax.sharding.Mesh,
    dtype: jax.typing.DTypeLike | None = jnp.float32,
    config: Path | ModelConfig | None = None,
) -> tuple[ModelConfig, decoder.Params]:
    """The model in a folder of weight files: its config, and its parameters in `dtype`, sharded for the decoder.

    folder: with weight files of any format (`weight_files.FORMATS`), or one such file. dtype: None: each parameter as
    it is in the files. config: config.json, or the model itself; default: the config.json beside the weights.
    Each process reads only the ranges of its own shards. Beside the result, the part of one parameter that one device
    holds is in memory (on a CPU it is the result), and a piece of a tensor for each thread.
    Raises UserError naming the file and the tensor if one is missing, unexpected or of another shape.
    """
    weights = open_weights(folder)
    if isinstance(config, ModelConfig):
        family = families.of_config(config)
    else:
        family, config, how = _read_config(config or config_file(folder), (weights.format, folder))
        if how:
            weights = dataclasses.replace(weights, tensors=dequantized(weights.tensors, how))
    layout = _layout(weights, family)
    leaves: dict[str, Any] = flatten_dict(decoder.abstract_params(config, mesh, jnp.dtype(dtype or "float32")), sep=".")
    lines = present(layout.lines(config), leaves)
    if weights.format.padded_vocabulary:
        for name in {weight.hf for weight in lines if weight.ours in ("embed", "head")} & weights.tensors.keys():
            if len((tensor := weights.tensors[name]).shape) == 2 and tensor.shape[0] > config.vocab_size:
                weights.tensors[name] = box(tensor, (0, 0), (config.vocab_size, tensor.shape[1]))
    expected = _expected(weights, lines, leaves)
    weights = _by_expected_names(weights, layout, expected)
    _check_tensors(weights, layout, config, expected, leaves)
    params: dict[str, jax.Array] = {}
    for weight in lines:
        target = leaves[weight.ours]
        if dtype is None:
            target = target.update(dtype=_stored_dtype(weight, target.shape, weights.tensors))
        params[weight.ours] = _load(weight, target, weights.tensors)
    return config, unflatten_dict(params, sep=".")


def export_hf(
    config: ModelConfig,
    params: decoder.Params,
    out: Path,
    tokenizer: Path | None = None,
    dtype: jax.typing.DTypeLike | None = None,
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
    with atomic_folder(out, exclusive=True) as partial:
        leaves: dict[str, Any] = flatten_dict(params, sep=".")
        _write_weights(layout.lines(config), leaves, partial, np.dtype(dtype) if dtype else None, shard_bytes)
        written = np.dtype(dtype or leaves["embed"].dtype)
        special: dict[str, int | None] = {"bos_token_id": None, "eos_token_id": None}
        if tokenizer is not None:
            opened = open_tokenizer(tokenizer)
            special = {"bos_token_id": opened.bos_token_id, "eos_token_id": opened.eos_token_id}
            copy_tokenizer(tokenizer, partial)
        (partial / "config.json").write_text(json.dumps(_hf_config(layout, config, written) | special, indent=2) + "\n")


# Reading


def _layout(weights: Weights, family: Family) -> Family:
    """The family with the names that the files have for its tensors."""
    known = {one.name: one for one in weights.format.families} or {family.name: family}
    if family.name not in known:
        raise UserError(
            f"{weights.location}: {weights.format.label} hold models of family {', '.join(known)}, config.json means"
            f" {family.name}; check it"
        )
    return known[family.name]


WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""What DistributedDataParallel, torch.compile, FSDP and activation checkpointing put into the names of tensors."""
HEADS = ("lm_head.weight", "embed_out.weight", "output.weight", "head.weight")
"""Names of the head in some family's files, or in a model's own state dict."""


def _expected(weights: Weights, lines: Sequence[Weight], leaves: Mapping[str, Any]) -> AllTensors:
    """The tensors that config.json means. Raises UserError if they are many more than there are."""
    for weight in lines:  # before their names are listed: a damaged config.json may mean a thousand million layers
        count = math.prod(leaves[weight.ours].shape[: weight.stacked])
        if count > len(weights.tensors):
            raise UserError(
                f"{weights.location}: holds {len(weights.tensors)} tensors, config.json means {count} like {weight.hf};"
                " check config.json"
            )
    return all_tensors(lines, _shapes(leaves))


def _by_expected_names(weights: Weights, family: Family, expected: AllTensors) -> Weights:
    """The weights under the names that the family has for them, where they differ by what is no part of the model: a
    wrapper, the prefix of the model without its head (transformers' LlamaModel), another name of the head or of a part.

    Raises UserError if two tensors then have one name.
    """
    base = next(weight.hf for weight in family.weights if weight.ours == "embed").partition(".")[0]
    heads = [weight.hf for weight in family.weights if weight.ours == "head"] + list(family.tied_copies)

    def known(name: str) -> bool:
        return name in expected or name in family.tied_copies or any(re.fullmatch(p, name) for p in family.ignored)

    def name_of(name: str) -> str:
        inner = WRAPPERS.sub("", name)
        for other, ours in family.other_names.items():
            inner = inner.replace(other, ours)
        candidates = [name, inner, f"{base}.{inner}", *(heads if inner in HEADS else ())]
        return next(filter(known, candidates), name)

    renamed: dict[str, Tensor] = {}
    for name, tensor in weights.tensors.items():
        if (meant := name_of(name)) in renamed:
            raise UserError(
                f"{tensor.file}: tensors {renamed[meant].name} and {name} are both {meant}; keep one of them"
            )
        renamed[meant] = tensor
    return dataclasses.replace(weights, tensors=renamed)


def _stored_dtype(weight: Weight, shape: Sequence[int], tensors: Mapping[str, Tensor]) -> np.dtype:
    """The dtype of a line's tensors if all have the same and it is bfloat16 or float16; else float32."""
    names = (tensor_name(weight, index) for index in np.ndindex(*shape[: weight.stacked]))
    first, *others = {tensors[name].dtype for name in names}
    return first if not others and first.name in ("bfloat16", "float16") else np.dtype(np.float32)


def _load(weight: Weight, target: jax.ShapeDtypeStruct, tensors: Mapping[str, Tensor]) -> jax.Array:
    """One parameter. A part of it is put together on the host, moved to its devices, and forgotten before the next."""
    devices_of: dict[Spans, list[Any]] = {}
    for device, index in target.sharding.addressable_devices_indices_map(target.shape).items():
        spans = tuple(span.indices(size)[:2] for span, size in zip(index or (), target.shape))
        devices_of.setdefault(spans, []).append(device)  # replicas hold the same part
    order, dtype, sharding = tuple(range(len(target.shape))), np.dtype(target.dtype), target.sharding
    if next(iter(sharding.device_set)).platform in TRANSPOSING:
        order, stored = _file_order(weight, order), _stored_dtype(weight, target.shape, tensors)
        dtype = stored if stored.itemsize == 2 else dtype  # float32 is rounded here: fewer bytes move
        spec = (*sharding.spec, *(None,) * len(order))
        sharding = jax.sharding.NamedSharding(sharding.mesh, jax.P(*(spec[axis] for axis in order)))
    back = tuple(map(int, np.argsort(order)))
    arrays = []
    for spans, devices in devices_of.items():
        part = new_array([spans[axis][1] - spans[axis][0] for axis in order], dtype)
        _fill(part.transpose(back), spans, weight, target.shape, tensors)
        arrays += jax.block_until_ready([jax.device_put(part, device) for device in devices])
        del part
    array = jax.make_array_from_single_device_arrays(tuple(target.shape[axis] for axis in order), sharding, arrays)
    if back == tuple(sorted(order)) and dtype == target.dtype:
        return array
    return _placing(back, np.dtype(target.dtype), target.sharding)(array)


@functools.cache
def _placing(order: tuple[int, ...], dtype: np.dtype, sharding: jax.sharding.Sharding) -> Callable[..., jax.Array]:
    return jax.jit(lambda array: array.transpose(order).astype(dtype), out_shardings=sharding)


def _file_order(weight: Weight, axes: tuple[int, ...]) -> tuple[int, ...]:
    """Our axes in the order in which they lie in the file; as they are where the line regroups them."""
    parsed, stacked = parse_axes(weight.axes), weight.stacked
    if any(len(group) > 1 for group in parsed.ours):
        return axes
    return (*axes[:stacked], *(stacked + parsed.flat.index(name) for name in parsed.kept))


def _fill(
    part: np.ndarray, spans: Spans, weight: Weight, shape: tuple[int, ...], tensors: Mapping[str, Tensor]
) -> None:
    """Put parameter[spans] into `part`, piece by piece of every tensor."""
    axes, stacked = parse_axes(weight.axes), weight.stacked
    inner, within = shape[stacked:], spans[stacked:]

    def fill(index: tuple[int, ...], piece: Spans) -> None:
        name = tensor_name(weight, [start + offset for (start, _), offset in zip(spans, index)])
        inside = (slice(a - start, b - start) for (a, b), (start, _) in zip(piece, within))
        target = part[(*index, *inside, ...)]
        copy(target, read_part(tensors[name], axes, inner, [slice(*span) for span in piece]))

    pieces = itertools.product(np.ndindex(*part.shape[:stacked]), cut(axes, inner, within, PIECE))
    in_threads(fill, *zip(*pieces))


def _check_tensors(
    weights: Weights, family: Family, config: ModelConfig, expected: AllTensors, leaves: Mapping[str, Any]
) -> None:
    """Raise UserError naming the first tensor that is missing, unexpected, or not of the shape the config means."""
    stored = {name for name in weights.tensors if not any(re.fullmatch(p, name) for p in family.ignored)}
    if config.tied_embeddings:
        stored -= set(family.tied_copies)
    missing, unexpected = expected.keys() - stored, stored - expected.keys()
    for names, verb, remedy in (
        (unexpected, "is not part of the model that config.json describes", "check config.json"),
        (missing, "is missing", "fetch all weight files again"),
    ):
        if names:
            others = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            also = f", {min(missing)} is missing" if missing and names is unexpected else ""
            raise UserError(f"{weights.location}: tensor {min(names)}{others} {verb}{also}; {remedy}")
    for name, [(weight, _), *_] in expected.items():
        tensor = weights.tensors[name]
        shape = parse_axes(weight.axes).file_shape(leaves[weight.ours].shape[weight.stacked :])
        if tensor.dtype not in FLOATS:
            raise UserError(f"{tensor.file}: tensor {name} is {tensor.dtype}; use a checkpoint that is not quantized")
        if list(tensor.shape) != shape:
            raise UserError(
                f"{tensor.file}: tensor {name} has shape {list(tensor.shape)}, config.json means {shape};"
                " check config.json"
            )


# Writing


def _write_weights(
    lines: Sequence[Weight], leaves: Mapping[str, jax.Array], folder: Path, dtype: np.dtype | None, shard_bytes: int
) -> None:
    tensors = all_tensors(present(lines, leaves), _shapes(leaves))
    files: list[list[tuple[str, np.dtype, tuple[int, ...]]]] = [[]]
    filled = total = 0
    for name, [(weight, _), *_] in tensors.items():
        shape = tuple(parse_axes(weight.axes).file_shape(leaves[weight.ours].shape[weight.stacked :]))
        entry = name, np.dtype(dtype or leaves[weight.ours].dtype), shape
        size = math.prod(shape) * entry[1].itemsize
        if filled and filled + size > shard_bytes:
            files.append([])
            filled = 0
        files[-1].append(entry)
        filled, total = filled + size, total + size
    weight_map = {}
    for number, entries in enumerate(files, start=1):
        file = SAFETENSORS.shard(number, len(files))
        read = lambda name, dtype, shape: _to_file(leaves, name, tensors[name], dtype, shape)
        write_safetensors(folder / file, entries, read, {"format": "pt"})
        weight_map |= {name: file for name, *_ in entries}
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / SAFETENSORS.index).write_text(json.dumps(index, indent=2) + "\n")


def _to_file(
    leaves: Mapping[str, jax.Array],
    name: str,
    lines: Sequence[tuple[Weight, tuple[int, ...]]],
    dtype: np.dtype,
    shape: tuple[int, ...],
) -> np.ndarray:
    """One tensor, put together from the lines that fill it."""
    tensor = np.empty(shape, dtype)
    for weight, index in lines:
        part = np.asarray(leaves[weight.ours][index])
        with np.errstate(over="ignore"):
            rounded = part.astype(dtype)
        if dtype == np.float16 and np.isinf(rounded).any() and not np.isinf(part).any():
            raise UserError(f"tensor {name} has values beyond the range of {dtype}; choose --dtype bfloat16 or float32")
        write_part(tensor, parse_axes(weight.axes), rounded)
    return tensor


def _hf_config(family: Family, config: ModelConfig, dtype: np.dtype) -> dict[str, Any]:
    return {"architectures": [family.architectures[0]], **family.to_hf(config), "torch_dtype": str(dtype)}


def _shapes(leaves: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {path: leaf.shape for path, leaf in leaves.items()}
