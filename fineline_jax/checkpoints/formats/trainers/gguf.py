"""GGUF files of llama.cpp, in floats and in the common block quantizations; read only.

A file is a header of typed keys, the names, shapes and offsets of the tensors, and their data, aligned. Names become
Hugging Face's, and rows of queries and keys of the llama architecture are put back from llama.cpp's rotary order.
Sources: ggml docs/gguf.md, ggml-common.h (blocks), ggml-quants.c (dequantize_row_*), convert_hf_to_gguf.py (permute).
"""

import dataclasses
import math
import mmap
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fineline_jax.checkpoints.formats.lazy_tensor import (
    BFLOAT16,
    ComputedTensor,
    StoredTensor,
    Tensor,
    permuted,
    row_major,
)
from fineline_jax.checkpoints.formats.weight_format import WeightFormat
from fineline_jax.errors import UserError

FLOAT_TYPES = {0: np.dtype("<f4"), 1: np.dtype("<f2"), 30: BFLOAT16}
_VALUES = "<BbHhIif?"  # of the kinds 0 to 7
_WIDE = {10: "<Q", 11: "<q", 12: "<d"}
_TEXT, _ARRAY = 8, 9
MOST = 1_000_000
"""Keys, tensors, elements of an array of keys, or bytes of a text."""
NAMES = {
    r"token_embd\.": "model.embed_tokens.",
    r"output_norm\.": "model.norm.",
    r"output\.": "lm_head.",
    r"blk\.(\d+)\.attn_([qkv])\.": r"model.layers.\1.self_attn.\2_proj.",
    r"blk\.(\d+)\.attn_output\.": r"model.layers.\1.self_attn.o_proj.",
    r"blk\.(\d+)\.attn_([qk]_norm)\.": r"model.layers.\1.self_attn.\2.",
    r"blk\.(\d+)\.attn_norm\.": r"model.layers.\1.input_layernorm.",
    r"blk\.(\d+)\.ffn_norm\.": r"model.layers.\1.post_attention_layernorm.",
    r"blk\.(\d+)\.ffn_(gate|up|down)\.": r"model.layers.\1.mlp.\2_proj.",
}
ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""Whose tensors are so named."""


def read_gguf(path: Path) -> dict[str, Tensor]:
    """The tensors of the file by Hugging Face's names; reads the header only.

    Raises UserError naming the file, and the tensor where one is to blame.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _index(path, _Reader(data))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; fetch it") from error
    except (struct.error, ValueError, IndexError) as error:
        raise UserError(f"{path}: not a whole GGUF file ({str(error)[:120]}); fetch it again") from error


GGUF = WeightFormat("GGUF", r".+\.gguf", read_gguf, suffixes=(".gguf",))


@dataclasses.dataclass
class _Reader:
    """Little-endian values, one after another."""

    data: mmap.mmap
    at: int = 0

    def take(self, form: str) -> Any:
        self.at += struct.calcsize(form)
        return struct.unpack_from(form, self.data, self.at - struct.calcsize(form))[0]

    def count(self) -> int:
        if (count := self.take("<Q")) > MOST:
            raise ValueError(f"{count} of what may be {MOST} at byte {self.at - 8}")
        return count

    def text(self) -> str:
        length = self.count()
        self.at += length
        return self.data[self.at - length : self.at].decode()

    def value(self, kind: int) -> Any:
        if kind == _TEXT:
            return self.text()
        if kind == _ARRAY:
            inner, count = self.take("<I"), self.count()
            return [self.value(inner) for _ in range(count)]
        return self.take(_WIDE[kind] if kind in _WIDE else f"<{_VALUES[1:][kind]}")


def _index(path: Path, reader: _Reader) -> dict[str, Tensor]:
    if reader.take("4s") != b"GGUF" or reader.take("<I") not in (2, 3):
        raise ValueError(f"it begins with {reader.data[:8]!r}")
    tensors, keys = reader.count(), reader.count()
    facts = {reader.text(): reader.value(reader.take("<I")) for _ in range(keys)}
    architecture = str(facts.get("general.architecture"))
    if architecture not in ARCHITECTURES:
        raise UserError(f"{path}: architecture {architecture!r} is not read, only {', '.join(ARCHITECTURES)}")
    listed = [
        (reader.text(), [reader.take("<Q") for _ in range(reader.take("<I"))], reader.take("<I"), reader.take("<Q"))
        for _ in range(tensors)
    ]
    alignment = int(facts.get("general.alignment", 32))
    begin = reader.at + -reader.at % alignment
    found: dict[str, Tensor] = {}
    for name, sizes, kind, offset in listed:
        tensor = _tensor(path, name, tuple(sizes[::-1]), kind, begin + offset, len(reader.data))
        heads = "head_count_kv" if ".attn_k." in name else "head_count"
        if architecture == "llama" and re.search(r"\.attn_[qk]\.", name):
            count = facts.get(f"llama.attention.{heads}") or facts.get("llama.attention.head_count")
            if not isinstance(count, int) or not 0 < count <= tensor.shape[0] or tensor.shape[0] % (2 * count):
                raise ValueError(f"it has {count} heads")
            tensor = permuted(tensor, rotary_rows(count, tensor.shape[0]))
        if name != "rope_freqs.weight":
            found[_renamed(path, name)] = tensor
    return found


def rotary_rows(heads: int, rows: int) -> np.ndarray:
    """Which row of a matrix for interleaved rotary pairs (2j, 2j + 1) each row for halves (j, j + size / 2) is."""
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(rows)


def _renamed(path: Path, name: str) -> str:
    for pattern, stands in NAMES.items():
        if re.match(pattern, name):
            return re.sub(pattern, stands, name, count=1)
    raise UserError(f"{path}: tensor {name[:120]!r} is of no model that is read")


def _tensor(path: Path, name: str, shape: tuple[int, ...], kind: int, begin: int, end: int) -> Tensor:
    if not 1 <= len(shape) <= 4 or math.prod(shape) >= 1 << 48:
        raise ValueError(f"tensor {name[:120]!r} has an impossible shape")
    if kind in FLOAT_TYPES:
        dtype = FLOAT_TYPES[kind]
        if begin + math.prod(shape) * dtype.itemsize > end:
            raise ValueError(f"tensor {name} ends behind the {end} bytes of the file")
        return StoredTensor(name, path, dtype, shape, begin, row_major(shape, dtype.itemsize))
    if kind not in BLOCKS:
        raise UserError(f"{path}: tensor {name} has the quantization {kind} of ggml_type, which is not read")
    elements, size, values = BLOCKS[kind]
    rows, width = math.prod(shape[:-1]), shape[-1] // elements * size
    if shape[-1] % elements or begin + rows * width > end:
        raise ValueError(f"tensor {name} ends behind the {end} bytes of the file, or within a block")
    stored = StoredTensor(name, path, np.dtype("u1"), (rows, width), begin, (width, 1))

    def read(index: tuple[slice, ...]) -> np.ndarray:
        blocks = np.ascontiguousarray(stored[(index[0], slice(None))]).reshape(-1, size)
        return values(blocks).astype(np.float32).reshape(-1, shape[-1])[:, index[1]]

    if len(shape) != 2:
        raise ValueError(f"tensor {name} is quantized and no matrix")
    return ComputedTensor(name, path, np.dtype(np.float32), shape, read)


# Blocks: uint8 [blocks, bytes] -> float32 [blocks, elements]


def _half(blocks: np.ndarray, at: int) -> np.ndarray:
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """The low halves of all bytes, then the high ones."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1).astype(np.float32)


def _fifth_bits(blocks: np.ndarray, at: int) -> np.ndarray:
    return 16.0 * np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little")


def _q4_k(blocks: np.ndarray) -> np.ndarray:
    """Eight groups of 32 with 6-bit scales and minima, packed in twelve bytes."""
    low, high, mixed = (blocks[:, 4 + 4 * i : 8 + 4 * i] for i in range(3))
    scales = np.concatenate([low & 63, (mixed & 15) | (low >> 6 << 4)], axis=1) * _half(blocks, 0)
    minima = np.concatenate([high & 63, (mixed >> 4) | (high >> 6 << 4)], axis=1) * _half(blocks, 2)
    values = _nibbles(blocks[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    return values * scales[..., None] - minima[..., None]


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    """Sixteen groups of 16 with 8-bit scales; two bits of each value lie apart."""
    low = blocks[:, :128].reshape(-1, 2, 64)
    low = np.concatenate([low & 15, low >> 4], axis=-1).reshape(-1, 2, 4, 32)
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    values = (low | high << 4).astype(np.float32) - 32
    scales = blocks[:, 192:208].view(np.int8) * _half(blocks, 208)
    return values.reshape(-1, 16, 16) * scales[..., None]


BLOCKS: dict[int, tuple[int, int, Callable[[np.ndarray], np.ndarray]]] = {
    2: (32, 18, lambda b: (_nibbles(b[:, 2:]) - 8) * _half(b, 0)),
    3: (32, 20, lambda b: _nibbles(b[:, 4:]) * _half(b, 0) + _half(b, 2)),
    6: (32, 22, lambda b: (_nibbles(b[:, 6:]) + _fifth_bits(b, 2) - 16) * _half(b, 0)),
    7: (32, 24, lambda b: (_nibbles(b[:, 8:]) + _fifth_bits(b, 4)) * _half(b, 0) + _half(b, 2)),
    8: (32, 34, lambda b: b[:, 2:].view(np.int8) * _half(b, 0)),
    12: (256, 144, _q4_k),
    14: (256, 210, _q6_k),
}
"""By ggml_type, Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q4_K Q6_K: elements, bytes, and the values of blocks."""
