"""The weight files of a local folder, in whichever format they are; no JAX.

Looked for in this order: safetensors, PyTorch's pytorch_model*.bin, EasyLM's streamed msgpack.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from fineline_jax.checkpoints.easylm import is_easylm, read_easylm
from fineline_jax.checkpoints.safetensors_files import read_safetensors, unambiguous_json
from fineline_jax.checkpoints.stored import StoredTensor
from fineline_jax.checkpoints.torch_bin import read_torch_bin
from fineline_jax.errors import UserError

SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
TORCH_BIN, TORCH_BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
KNOWN = f"{SAFETENSORS}, {TORCH_BIN}, the index of either, an EasyLM stream"
_OTHER = (".json", ".model", ".txt", ".md", ".pkl", ".py", ".safetensors", ".bin", ".pt", ".jinja", ".h5", ".tiktoken")


@dataclasses.dataclass(frozen=True)
class Weights:
    """The tensors of a checkpoint, none of which is read yet."""

    place: Path
    """The folder, or the one file."""
    names: Literal["hf", "easylm"]
    """Whose names and layout the tensors have."""
    tensors: dict[str, StoredTensor]


def weight_files(folder: Path) -> list[Path]:
    """The weight files of `folder`, or the file `folder` itself; empty: there are none.

    Raises UserError if an index is damaged or names a file that is missing.
    """
    found = _found(folder)
    return found[0] if found else []


def open_weights(folder: Path) -> Weights:
    """The tensors of the weight files of `folder`, or of the one file `folder`.

    Raises UserError naming the file and the tensor if there are none, or a file is missing, cut short or broken.
    """
    found = _found(folder)
    if found is None:
        raise UserError(f"{folder}: holds no weights; looked for {KNOWN}")
    files, read, index = found
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in read(file).items():
            if name in tensors:
                raise UserError(f"{file}: tensor {name} is also in {tensors[name].file.name}; fetch both files again")
            tensors[name] = tensor
    for name, file in index.items():
        if name not in tensors or tensors[name].file != file:
            raise UserError(f"{file}: tensor {name} is not in it, although the index says so; fetch both again")
    return Weights(folder, "easylm" if read is read_easylm else "hf", tensors)


_Found = tuple[list[Path], Callable[[Path], dict[str, StoredTensor]], dict[str, Path]]


def _found(folder: Path) -> _Found | None:
    """The files, their reader, and the file of each tensor where an index says it."""
    if folder.is_file():
        readers = {".safetensors": read_safetensors, ".bin": read_torch_bin, ".pt": read_torch_bin}
        return [folder], readers.get(folder.suffix, read_easylm), {}
    for single, index, read in (
        (SAFETENSORS, SAFETENSORS_INDEX, read_safetensors),
        (TORCH_BIN, TORCH_BIN_INDEX, read_torch_bin),
    ):
        if (folder / single).is_file():
            return [folder / single], read, {}
        if (folder / index).is_file():
            of_tensor = _read_index(folder / index)
            return sorted(set(of_tensor.values())), read, of_tensor
    streams = _streams(folder)
    if len(streams) > 1:
        raise UserError(f"{folder}: holds several EasyLM streams ({streams[0].name}, {streams[1].name}); name one file")
    return (streams, read_easylm, {}) if streams else None


def _streams(folder: Path) -> list[Path]:
    files = (path for path in folder.glob("*") if path.is_file() and path.suffix not in _OTHER)
    return sorted(path for path in files if is_easylm(path))


def _read_index(path: Path) -> dict[str, Path]:
    """The file of each tensor, all of them beside the index."""
    try:
        found = unambiguous_json(path.read_bytes())["weight_map"]
        names = {str(tensor): str(name) for tensor, name in found.items()}
    except (OSError, ValueError, RecursionError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{path}: not an index of weight files ({str(error)[:200]!r}); fetch it again") from error
    for tensor, name in names.items():
        if not name or Path(name).name != name or name == "..":
            raise UserError(
                f"{path}: tensor {tensor} is in {name!r}, which is no file beside the index; fetch it again"
            )
        if not (path.parent / name).is_file():
            raise UserError(f"{path.parent / name}: missing; {path.name} says it holds tensor {tensor}; fetch it")
    return {tensor: path.parent / name for tensor, name in names.items()}
