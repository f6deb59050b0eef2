"""LoRA adapters of peft, merged into the weights they were trained on when these are opened.

W + scale x B A, in float32, rounded to the dtype of W. Sources: peft src/peft/tuners/lora/layer.py (get_delta_weight),
config.py.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fineline_jax.checkpoints.formats.lazy_tensor import ComputedTensor, Tensor
from fineline_jax.errors import UserError, reading

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
REFUSED = ("use_dora", "fan_in_fan_out", "layer_replication", "trainable_token_indices", "megatron_config")
"""Settings under which the sum is another one."""


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def adapter_of(folder: Path) -> dict[str, Any] | None:
    """The adapter_config.json of the folder; None if it holds no adapter.

    Raises UserError naming the file for what is no LoRA, or one that is not merged here.
    """
    path = folder / CONFIG
    if not is_adapter(folder):
        return None
    with reading(path, "fetch it again", "not an adapter's config"):
        how = dict(json.loads(path.read_bytes()))
        kind, rank, alpha = how["peft_type"], int(how["r"]), float(how["lora_alpha"])
    if kind != "LORA" or rank < 1 or not math.isfinite(alpha):
        raise UserError(f"{path}: is a {kind} of rank {rank}; only LoRA is merged here: merge it with peft")
    if given := [key for key in REFUSED if how.get(key)]:
        raise UserError(f"{path}: {given[0]} is set, which is not merged here; merge it with peft (merge_and_unload)")
    return how


def base_of(folder: Path, how: Mapping[str, Any]) -> Path:
    """The folder of the weights that the adapter changes. Raises UserError if it is not here."""
    base = Path(str(how.get("base_model_name_or_path") or ""))
    for candidate in (base, folder / base):
        if (candidate / "config.json").is_file():
            return candidate
    raise UserError(
        f"{folder / CONFIG}: base_model_name_or_path {str(base)!r} is no folder with config.json; fetch that model and"
        " write its folder there"
    )


def merged(base: Mapping[str, Tensor], adapter: Mapping[str, Tensor], how: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of the base, changed as the adapter says. Raises UserError naming a tensor that changes none."""
    tensors = dict(base)
    for name, given in adapter.items():
        inner = name.removeprefix("base_model.model.")
        module, lora, part = inner.partition(".lora_")
        changed = f"{module}.weight" if lora else inner
        if changed not in base or (lora and part not in ("A.weight", "B.weight")):
            raise UserError(
                f"{given.file}: tensor {name} changes no tensor of the base; use the base it was trained on"
            )
        if not lora:
            tensors[changed] = given  # modules_to_save, and biases
        elif part == "A.weight":
            other = adapter.get(name.replace(".lora_A.", ".lora_B."))
            whole = base[changed]
            if other is None or (other.shape[0], given.shape[1]) != whole.shape or other.shape[1] != given.shape[0]:
                raise UserError(f"{given.file}: tensor {name} and its lora_B do not fit {changed} {list(whole.shape)}")
            tensors[changed] = _sum(whole, given, other, _scale(module, given.shape[0], how))
    return tensors


def _scale(module: str, rank: int, how: Mapping[str, Any]) -> float:
    """alpha / rank, or alpha / sqrt(rank); alpha_pattern names modules by the ends of their names."""
    patterns = dict(how.get("alpha_pattern") or {})
    alpha = next(
        (a for pattern, a in patterns.items() if re.fullmatch(rf"(.*\.)?({pattern})", module)), how["lora_alpha"]
    )
    return float(alpha) / (math.sqrt(rank) if how.get("use_rslora") else rank)


def _sum(whole: Tensor, down: Tensor, up: Tensor, scale: float) -> ComputedTensor:
    def read(index: tuple[slice, ...]) -> np.ndarray:
        rows, columns = index
        change = up[(rows, slice(None))].astype(np.float32) @ down[(slice(None), columns)].astype(np.float32)
        return (whole[index].astype(np.float32) + scale * change).astype(whole.dtype)

    return ComputedTensor(whole.name, down.file, whole.dtype, whole.shape, read)
