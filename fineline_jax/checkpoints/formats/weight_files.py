"""The weight files of a local folder, in any of the formats, and the tensors in them. No JAX."""

import dataclasses
import re
from collections.abc import Collection
from pathlib import Path

from fineline_jax.checkpoints.formats.easylm import EASYLM
from fineline_jax.checkpoints.formats.lazy_tensor import Tensor
from fineline_jax.checkpoints.formats.safetensors_files import SAFETENSORS, unambiguous_json
from fineline_jax.checkpoints.formats.torch_bin import TORCH_BIN
from fineline_jax.checkpoints.formats.trainers import lora
from fineline_jax.checkpoints.formats.trainers.gguf import GGUF
from fineline_jax.checkpoints.formats.trainers.llama2c import LLAMA2C
from fineline_jax.checkpoints.formats.trainers.maxtext import MAXTEXT
from fineline_jax.checkpoints.formats.trainers.megatron import MEGATRON
from fineline_jax.checkpoints.formats.trainers.nanotron import NANOTRON
from fineline_jax.checkpoints.formats.trainers.neox import NEOX
from fineline_jax.checkpoints.formats.trainers.torch_distributed import DCP
from fineline_jax.checkpoints.formats.weight_format import WeightFormat
from fineline_jax.errors import UserError, reading, refuse_lfs_pointer

FORMATS = (SAFETENSORS, TORCH_BIN, *MEGATRON, MAXTEXT, DCP, NEOX, NANOTRON, GGUF, LLAMA2C, EASYLM)
"""In the order in which they are preferred. A file of unknown suffix is read as the last."""
FIXED_NAMES = tuple(name for one in FORMATS if one.single for name in (one.single, one.index))
"""Names that a folder of weights is recognised by, and that can be asked for where nothing is listed."""
KNOWN = ", ".join(dict.fromkeys(one.label for one in FORMATS))


@dataclasses.dataclass(frozen=True)
class Weights:
    """The tensors of a checkpoint, none of which is read yet."""

    location: Path
    """The folder, or the one file."""
    format: WeightFormat
    tensors: dict[str, Tensor]


def preferred_names(names: Collection[str]) -> set[str]:
    """Of the names in a listing those of the weight files, with their index, in the preferred format; empty: none."""
    for one in FORMATS:
        if chosen := {name for name in names if re.fullmatch(one.pattern, name)}:
            return chosen | ({one.index} & set(names))
    return set()


def holds_weights(folder: Path) -> bool:
    """Whether `folder` holds weight files, or an index of some, which need not be whole."""
    return any((folder / name).is_file() for name in FIXED_NAMES) or bool(weight_files(folder))


def weight_files(folder: Path) -> list[Path]:
    """The weight files of `folder`, or the file `folder` itself; empty: there are none.

    Raises UserError if an index is damaged or names a file that is missing.
    """
    located = _locate(folder)
    return located[0] if located else []


def trainer_format(folder: Path) -> WeightFormat | None:
    """The format of `folder` where that needs several files, as a trainer writes them."""
    return next((one for one in FORMATS if one.key and (folder / one.key).is_file()), None)


def config_file(folder: Path) -> Path:
    """The config.json of the weights of `folder`, or of the file `folder`; of an adapter that of its base. Of a folder
    of a trainer it may lie above, for all checkpoints."""
    if (how := lora.adapter_of(folder)) is not None:
        return config_file(lora.base_of(folder, how))
    here = (folder.parent if folder.is_file() else folder) / "config.json"
    above = folder.parent / "config.json"
    return above if not here.is_file() and above.is_file() and trainer_format(folder) else here


def open_weights(folder: Path) -> Weights:
    """The tensors of the weight files of `folder`, or of the one file `folder`.

    Raises UserError naming the file and the tensor if there are none, or a file is missing, cut short or broken.
    """
    if (how := lora.adapter_of(folder)) is not None:
        base = open_weights(lora.base_of(folder, how))
        changes = SAFETENSORS.read(folder / lora.WEIGHTS)
        return dataclasses.replace(base, location=folder, tensors=lora.merged(base.tensors, changes, how))
    located = _locate(folder)
    if located is None:
        raise UserError(f"{folder}: holds no weights; looked for {KNOWN}")
    files, weight_format, index = located
    tensors: dict[str, Tensor] = {}
    for file in files[:1] if weight_format.key else files:
        refuse_lfs_pointer(file)
        for name, tensor in weight_format.read(file).items():
            if name in tensors:
                raise UserError(f"{file}: tensor {name} is also in {tensors[name].file.name}; fetch both files again")
            tensors[name] = tensor
    for name, file in index.items():
        if name not in tensors or tensors[name].file != file:
            raise UserError(f"{file}: tensor {name} is not in it, although the index says so; fetch both again")
    return Weights(folder, weight_format, tensors)


def _locate(folder: Path) -> tuple[list[Path], WeightFormat, dict[str, Path]] | None:
    """The files, their format, and the file of each tensor where an index names it."""
    if lora.is_adapter(folder):
        return [folder / lora.CONFIG, folder / lora.WEIGHTS], SAFETENSORS, {}
    if folder.is_file():
        known = [one for one in FORMATS if folder.suffix in one.suffixes]
        sure = [one for one in known if one.recognises and one.recognises(folder)]
        return [folder], [*sure, *(one for one in known if not one.recognises), FORMATS[-1]][0], {}
    for one in FORMATS:
        if one.single and (folder / one.single).is_file():
            return [folder / one.single], one, {}
        if one.index and (folder / one.index).is_file():
            file_of_tensor = _read_index(folder / one.index)
            return sorted(set(file_of_tensor.values())), one, file_of_tensor
        files = [] if one.single else one.files(folder)
        if len(files) > 1 and one.one_file and not one.key:
            raise UserError(f"{folder}: holds several {one.label} ({files[0].name}, {files[1].name}); name one file")
        if files:
            return files, one, {}
    return None


def _read_index(path: Path) -> dict[str, Path]:
    """The file of each tensor, all of them beside the index."""
    with reading(path, what="not an index of weight files"):
        weight_map = unambiguous_json(path.read_bytes())["weight_map"]
        names = {str(tensor): str(name) for tensor, name in weight_map.items()}
    for tensor, name in names.items():
        if not name or Path(name).name != name or name == "..":
            raise UserError(
                f"{path}: tensor {tensor} is in {name!r}, which is no file beside the index; fetch it again"
            )
        if not (path.parent / name).is_file():
            raise UserError(f"{path.parent / name}: missing; {path.name} says it holds tensor {tensor}; fetch it")
    return {tensor: path.parent / name for tensor, name in names.items()}
