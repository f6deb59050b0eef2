"""Weights of eight and four bits in Hugging Face folders, dequantized to float32 while they are read.

FP8 with a scale per tensor, row or block (DeepSeek, fbgemm, compressed-tensors), GPTQ, and AWQ in its gemm layout, as
`quantization_config` of config.json names them. Sources: transformers integrations/finegrained_fp8.py, AutoGPTQ
qlinear_cuda_old.py `pack`, AutoAWQ modules/linear/gemm.py `from_linear`.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from fineline_jax.checkpoints.formats.lazy_tensor import ComputedTensor, Tensor
from fineline_jax.errors import UserError

FLOAT8 = (np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2))
FP8 = ("fp8", "fbgemm_fp8", "compressed-tensors")
METHODS = (*FP8, "gptq", "awq")
AWQ_COLUMNS = np.argsort([0, 2, 4, 6, 1, 3, 5, 7])
"""Which four bits of a word each of its eight columns is."""
_SCALES = re.compile(
    r".*\.(weight_scale_inv|weight_scale|input_scale|activation_scale|input_scale_ub|weight_zero_point)"
)
_PACKED = ("qweight", "qzeros", "scales", "g_idx")


def check_method(how: Mapping[str, Any], where: Path) -> None:
    """Raise UserError naming the file where weights are quantized in a way that is not read."""
    method, version = how.get("quant_method"), how.get("version", "gemm")
    if method not in METHODS or (method == "awq" and version != "gemm"):
        raise UserError(
            f"{where}: quantization_config {method} {version if method == 'awq' else ''} is not read, only"
            f" {', '.join(METHODS)}; use a checkpoint that is not quantized"
        )


def dequantized(tensors: Mapping[str, Tensor], how: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors, those that are quantized as float32 under the name of the weight.

    how: `quantization_config`. Raises UserError naming the file and the tensor that has no scales.
    """
    method = how["quant_method"]
    if method in FP8:
        plain = {name: tensor for name, tensor in tensors.items() if not _SCALES.fullmatch(name)}
        return {
            name: _scaled(name, tensor, tensors, how) if tensor.dtype in FLOAT8 else tensor
            for name, tensor in plain.items()
        }
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        if part == "qweight":
            found[f"{module}.weight"] = _unpacked(module, tensors, how, method)
        elif part not in _PACKED:
            found[name] = tensor
    return found


def _scaled(name: str, tensor: Tensor, tensors: Mapping[str, Tensor], how: Mapping[str, Any]) -> Tensor:
    """value x scale of its block; the blocks are as many as there are scales."""
    scale = tensors.get(f"{name}_scale_inv") or tensors.get(f"{name}_scale")
    sizes = (*scale.shape, 1, 1)[:2] if scale is not None else (0, 0)
    given = how.get("weight_block_size") or [-(-size // max(count, 1)) for size, count in zip(tensor.shape, sizes)]
    if scale is None or len(tensor.shape) != 2 or sizes != tuple(-(-n // b) for n, b in zip(tensor.shape, given)):
        raise UserError(f"{tensor.file}: tensor {name} has no scales for its blocks; fetch all weight files again")

    def read(index: tuple[slice, ...]) -> np.ndarray:
        rows, columns = (np.arange(part.start, part.stop) // size for part, size in zip(index, given))
        factors = scale.whole().astype(np.float32).reshape(sizes)[rows[:, None], columns]
        return tensor[index].astype(np.float32) * factors

    return ComputedTensor(name, tensor.file, np.dtype(np.float32), tensor.shape, read)


def _unpacked(module: str, tensors: Mapping[str, Tensor], how: Mapping[str, Any], method: str) -> Tensor:
    """scale x (value - zero), of the packed matrix [in, out]; the weight of Hugging Face is its transpose."""
    words, zeros, scales = (tensors.get(f"{module}.{part}") for part in _PACKED[:3])
    order, bits = tensors.get(f"{module}.g_idx"), how.get("bits", how.get("w_bit"))
    known = (2, 4, 8) if method == "gptq" else (4,)
    if words is None or zeros is None or scales is None or bits not in known or words.dtype.itemsize != 4:
        file = words.file if words is not None else module
        raise UserError(f"{file}: {module} has {bits} bits, or no qzeros and scales; use one that is not quantized")
    per = 32 // bits
    inner, outer = (words.shape[0] * per, words.shape[1]) if method == "gptq" else (words.shape[0], words.shape[1] * 8)
    group = int(how.get("group_size", how.get("q_group_size", -1)))
    group = group if group > 0 else inner
    less = 1 if method == "gptq" and how.get("checkpoint_format") != "gptq_v2" else 0  # AutoGPTQ stores zero - 1
    if scales.shape != (-(-inner // group), outer) or zeros.shape[1] * per != outer:
        raise UserError(
            f"{scales.file}: the scales of {module} are for another group size than {group}; fetch it again"
        )

    def columns_of(packed: Tensor, rows: slice, columns: slice) -> np.ndarray:
        """float32, of values that lie in words along the columns."""
        found = _values(packed[(rows, slice(columns.start // per, -(-columns.stop // per)))], bits)
        found = found[..., AWQ_COLUMNS] if method == "awq" else found
        first = columns.start % per
        return found.reshape(len(found), -1)[:, first : first + columns.stop - columns.start]

    def read(index: tuple[slice, ...]) -> np.ndarray:
        out, into = index
        if method == "awq":
            values = columns_of(words, into, out)
        else:
            found = _values(words[(slice(into.start // per, -(-into.stop // per)), out)], bits).swapaxes(1, 2)
            values = found.reshape(-1, found.shape[2])[into.start % per :][: into.stop - into.start]
        groups = np.arange(into.start, into.stop) // group if order is None else order[(into,)].astype(np.int64)
        every = slice(0, scales.shape[0])
        shifted = values - ((columns_of(zeros, every, out) + less) % 2**bits)[groups]
        return (shifted * scales[(every, out)].astype(np.float32)[groups]).T

    return ComputedTensor(f"{module}.weight", words.file, np.dtype(np.float32), (outer, inner), read)


def _values(words: np.ndarray, bits: int) -> np.ndarray:
    """int32 [...] -> float32 [..., 32 / bits], the lowest bits first."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    return ((words.view(np.uint32)[..., None] >> shifts) & np.uint32((1 << bits) - 1)).astype(np.float32)
