"""safetensors files: the header read and checked here, the data left where it is; and a writer that streams.

The format: 8 bytes little-endian length of the header, a JSON header {name: {dtype, shape, data_offsets}}, the data
without gaps (github.com/huggingface/safetensors, README "Format").
"""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from fineline_jax.checkpoints.formats.lazy_tensor import BFLOAT16, StoredTensor, row_major
from fineline_jax.checkpoints.formats.weight_format import WeightFormat
from fineline_jax.errors import UserError

DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": BFLOAT16,
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
LARGEST_HEADER = 100_000_000
"""The limit of the reference implementation."""


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of the file `path` by name; reads the header only.

    Raises UserError naming the file, and the tensor where one is to blame, for anything but a whole valid file.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > size - 8:
                raise _refused(path, f"the header ends behind the {size} bytes of the file")
            if length > LARGEST_HEADER:
                raise _refused(path, f"a header of {length} bytes is above the limit of {LARGEST_HEADER}")
            header = unambiguous_json(file.read(length))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; fetch it") from error
    except (ValueError, RecursionError) as error:
        raise _refused(path, f"its header is no valid JSON: {str(error)[:200]!r}") from error
    if not isinstance(header, dict):
        raise _refused(path, "its header is not a JSON object")
    tensors, spans = {}, []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype, shape, begin, end = _entry(path, name, entry)
        if end > size - 8 - length:
            at = 8 + length + end
            raise _refused(path, f"tensor {name} ends at byte {at}, the file has {size}: it is cut short")
        tensors[name] = StoredTensor(name, path, dtype, shape, 8 + length + begin, row_major(shape, dtype.itemsize))
        spans.append((begin, end, name))
    at = 0
    for begin, end, name in sorted(spans):
        if begin != at:
            raise _refused(path, f"tensor {name} begins at {begin} instead of {at} in the data")
        at = end
    if at != size - 8 - length:
        raise _refused(path, f"{size - 8 - length - at} bytes behind its last tensor belong to none")
    return tensors


SAFETENSORS = WeightFormat(
    "safetensors",
    r"model(-\d+-of-\d+)?\.safetensors",
    read_safetensors,
    single="model.safetensors",
    suffixes=(".safetensors",),
)


def write_safetensors(
    path: Path,
    tensors: Sequence[tuple[str, np.dtype, tuple[int, ...]]],
    read: Callable[[str, np.dtype, tuple[int, ...]], np.ndarray],
    metadata: Mapping[str, str],
) -> None:
    """Write a file of `tensors` (name, dtype, shape); `read` gives each array when its turn comes."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    # The wide dtypes first: every tensor is then aligned to its own width.
    ordered = sorted(tensors, key=lambda tensor: -tensor[1].itemsize)
    for name, dtype, shape in ordered:
        size = math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)
        for name, dtype, shape in ordered:
            array = read(name, dtype, shape)
            assert array.dtype == dtype and array.shape == shape, name
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def unambiguous_json(text: bytes) -> Any:
    """`json.loads`; raises ValueError if an object has a key twice."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        mapping = dict(items)
        if len(mapping) < len(items):
            names = [name for name, _ in items]
            raise ValueError(f"{next(name for name in names if names.count(name) > 1)} is there twice")
        return mapping

    return json.loads(text.decode("utf-8"), object_pairs_hook=pairs)


def _entry(path: Path, name: str, entry: Any) -> tuple[np.dtype, tuple[int, ...], int, int]:
    """dtype, shape, first and last byte of one entry of the header."""
    if not name.isprintable():
        raise _refused(path, f"a tensor is called {name[:120]!r}")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _refused(path, f"tensor {name} has no dtype, shape and data_offsets")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not (_sizes(shape) and _sizes(offsets) and len(offsets) == 2 and offsets[0] <= offsets[1]):
        raise _refused(path, f"tensor {name} has an impossible shape or data_offsets")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        kind = str(entry["dtype"])[:40]
        raise UserError(
            f"{path}: tensor {name} is {kind!r}, which is not read; use a checkpoint of 16 or 32-bit floats"
        )
    begin, end = offsets
    if math.prod(shape) * dtype.itemsize != end - begin:
        raise _refused(path, f"tensor {name} has {end - begin} bytes, its shape {shape} means others")
    return dtype, tuple(shape), begin, end


def _sizes(value: Any) -> bool:
    """Whether it is a list of sizes: few enough and small enough that no product of them takes long."""
    return (
        isinstance(value, list)
        and len(value) <= 32
        and all(type(item) is int and 0 <= item < 1 << 63 for item in value)
    )


def _refused(path: Path, why: str) -> UserError:
    return UserError(f"{path}: not a whole safetensors file: {why}; fetch it again")
