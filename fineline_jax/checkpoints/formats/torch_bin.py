"""`pytorch_model*.bin` without torch: a zip of uncompressed entries, one a pickle of tensor shapes, the others data.

Nothing is unpacked and nothing in the file is executed (torch_pickle.py): the directory of the zip is checked, the
pickle is read, and the tensors stay in the file. Layout: torch/serialization.py; zip: PKWARE APPNOTE 4.3.
"""

import mmap
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from fineline_jax.checkpoints.formats.lazy_tensor import BFLOAT16, StoredTensor
from fineline_jax.checkpoints.formats.torch_pickle import LARGEST, Refused, View, read_pickle
from fineline_jax.checkpoints.formats.weight_format import WeightFormat
from fineline_jax.errors import UserError

STORAGE_DTYPES = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": BFLOAT16,
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}
UNTYPED_DTYPES = {"torch.uint16": np.dtype("<u2"), "torch.uint32": np.dtype("<u4"), "torch.uint64": np.dtype("<u8")}
"""Dtypes that the tensor names, not the storage. The float8 ones are not read."""
CONVERT = (
    'convert it where torch is: python -c "import torch; from safetensors.torch import save_file;'
    " save_file({k: v.contiguous() for k, v in torch.load('FILE', weights_only=True).items()}, 'model.safetensors')\""
)
_BLOCK = 1 << 24
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""torch.serialization.MAGIC_NUMBER as a pickle, with which a file of torch < 1.6 begins."""


def read_torch_bin(
    path: Path, records: str = "", chosen: Callable[[Any], Any] = lambda state: state
) -> dict[str, StoredTensor]:
    """The tensors of the file `path` by name; keeps nothing of the data in memory, but reads it once for its CRC-32.

    records: as of `torch_pickle.read_pickle`. chosen: the tensors by name in the value of the file; of others the data
    are not read.

    Raises UserError naming the file, and the tensor or the name in the pickle that is to blame.
    """
    state, entries, prefix = _opened(path, records=records)
    state = chosen(state)
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds a {type(state).__name__} instead of tensors by name; save the state dict alone")
    tensors = {}
    for name, view in state.items():
        if not isinstance(name, str) or not name.isprintable() or not isinstance(view, View):
            kind = "a dict" if isinstance(view, dict) else f"a {type(view).__name__}"
            raise UserError(
                f"{path}: {str(name)[:120]!r} is {kind}, not a tensor; save the state dict of the model alone"
            )
        tensors[name] = _stored(path, name, view, entries, prefix)
    used = {f"{prefix}data/{view.storage.key}" for view in state.values()}
    _check_crc32(path, {name: entry for name, entry in entries.items() if name in used or "/data/" not in name})
    return tensors


def torch_value(path: Path, records: str) -> Any:
    """All that the file `path` holds, tensors as `torch_pickle.View`. Raises UserError naming the file."""
    return _opened(path, records=records)[0]


def tensor_at(path: Path, name: str, begin: int, length: int) -> StoredTensor:
    """The one tensor that torch.save has put into `length` bytes of the file. Raises UserError naming both."""
    view, entries, prefix = _opened(path, begin, length)
    if not isinstance(view, View):
        raise _refused(path, f"at byte {begin} is no tensor {name}")
    return _stored(path, name, view, entries, prefix)


def _opened(
    path: Path, begin: int = 0, length: int | None = None, records: str = ""
) -> tuple[Any, dict[str, tuple[int, int, int]], str]:
    """The value in a file, or a part of it, that torch.save wrote; its entries, and what their names begin with."""
    entries = _entries(path, begin, length)
    pickles = [name for name in entries if name.rpartition("/")[2] == "data.pkl" and name.count("/") == 1]
    if len(pickles) != 1:
        raise _refused(path, f"it holds {len(pickles)} data.pkl instead of one")
    prefix = pickles[0].removesuffix("data.pkl")
    if prefix + "constants.pkl" in entries:
        raise UserError(f"{path}: a TorchScript program, not a checkpoint of weights; use the model's weight files")
    order = entries.get(prefix + "byteorder")
    if order is not None and _read(path, order, 16) != b"little":
        raise UserError(f"{path}: written by a big-endian machine, which is not read; {CONVERT}")
    try:
        return read_pickle(_read(path, entries[pickles[0]], LARGEST), records), entries, prefix
    except Refused as refused:
        raise UserError(
            f"{path}: holds {refused}; only tensors and containers are read, nothing is executed: use another file"
        ) from refused


TORCH_BIN = WeightFormat(
    "pytorch_model*.bin",
    r"pytorch_model(-\d+-of-\d+)?\.bin",
    read_torch_bin,
    single="pytorch_model.bin",
    suffixes=(".bin", ".pt"),
)


def _check_crc32(path: Path, entries: dict[str, tuple[int, int, int]]) -> None:
    """Raise UserError naming the first entry whose bytes do not have the CRC-32 of the directory; 0: none was computed
    (torch.serialization.config.save.compute_crc32)."""
    with path.open("rb") as file:
        for name, (begin, size, wanted) in entries.items():
            file.seek(begin)
            found, left = 0, size if wanted else 0
            while left and (block := file.read(min(left, _BLOCK))):
                found, left = zlib.crc32(block, found), left - len(block)
            if wanted and found != wanted:
                raise _refused(path, f"the bytes of {name[:120]!r} do not have the CRC-32 of the directory")


def _stored(path: Path, name: str, view: View, entries: dict[str, tuple[int, int, int]], prefix: str) -> StoredTensor:
    storage = view.storage
    dtype = UNTYPED_DTYPES.get(view.dtype or "") if view.dtype else STORAGE_DTYPES.get(storage.kind)
    if dtype is None:
        kind = view.dtype or storage.kind
        raise UserError(f"{path}: tensor {name} is {kind}, which is not read; use a checkpoint of 16 or 32-bit floats")
    entry = entries.get(f"{prefix}data/{storage.key}")
    if entry is None or not storage.key.isdecimal():
        raise _refused(path, f"the data of tensor {name} is missing")
    begin, size, _ = entry
    available = min(size // dtype.itemsize, storage.size // (dtype.itemsize if view.dtype else 1))
    if view.dtype is None and storage.size * dtype.itemsize > size:
        raise _refused(path, f"tensor {name} needs {storage.size * dtype.itemsize} bytes of data, there are {size}")
    if len(view.shape) != len(view.strides) or view.offset < 0 or min((0, *view.shape, *view.strides)) < 0:
        raise _refused(path, f"tensor {name} has impossible shape, strides or offset")
    last = view.offset + sum((size - 1) * stride for size, stride in zip(view.shape, view.strides))
    if 0 not in view.shape and last >= available:
        raise _refused(path, f"tensor {name} reaches element {last} of {available}")
    strides = tuple(stride * dtype.itemsize for stride in view.strides)
    return StoredTensor(name, path, dtype, view.shape, begin + view.offset * dtype.itemsize, strides)


def _entries(path: Path, begin: int = 0, length: int | None = None) -> dict[str, tuple[int, int, int]]:
    """(first byte, bytes, CRC-32) of the data of every entry of the zip, all of it inside the file and uncompressed.

    begin, length: of the zip in the file."""
    base = begin - begin % mmap.ALLOCATIONGRANULARITY
    try:
        with path.open("rb") as file:
            file.seek(begin)
            start = file.read(len(_LEGACY))
            if not start.startswith(b"PK\x03\x04"):
                if start == _LEGACY:
                    raise UserError(f"{path}: written by torch before 1.6 (not a zip), which is not read; {CONVERT}")
                raise _refused(path, "it is no zip")
            size = os.fstat(file.fileno()).st_size if length is None else begin + length
            with mmap.mmap(file.fileno(), size - base, access=mmap.ACCESS_READ, offset=base) as window:
                infos = zipfile.ZipFile(cast(BinaryIO, window)).infolist()
            entries: dict[str, tuple[int, int, int]] = {}
            for info in infos:
                label = info.orig_filename[:120]
                if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
                    raise _refused(path, f"entry {label!r} is compressed")
                if info.flag_bits & 0x1:
                    raise _refused(path, f"entry {label!r} is encrypted")
                if info.filename in entries:
                    raise _refused(path, f"entry {label!r} is there twice")
                file.seek(base + info.header_offset)
                header = file.read(_LOCAL_HEADER.size)
                if len(header) < _LOCAL_HEADER.size or not header.startswith(b"PK\x03\x04"):
                    raise _refused(path, f"entry {label!r} does not begin where the directory says")
                name_length, extra_length = _LOCAL_HEADER.unpack(header)[-2:]
                first = base + info.header_offset + _LOCAL_HEADER.size + name_length + extra_length
                if first + info.file_size > size:
                    raise _refused(path, f"entry {label!r} ends at byte {first + info.file_size}, the file has {size}")
                entries[info.filename] = first, info.file_size, info.CRC
            return entries
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; fetch it") from error
    except (zipfile.BadZipFile, struct.error, ValueError, NotImplementedError, EOFError, IndexError) as error:
        # What zipfile raises for broken directories; BadZipFile alone is documented.
        raise _refused(path, str(error)[:200] or type(error).__name__) from error


def _read(path: Path, entry: tuple[int, int, int], limit: int) -> bytes:
    begin, size, _ = entry
    if size > limit:
        raise _refused(path, f"an entry of {size} bytes is above the limit of {limit}")
    with path.open("rb") as file:
        file.seek(begin)
        return file.read(size)


def _refused(path: Path, why: str) -> UserError:
    return UserError(f"{path}: not a whole PyTorch checkpoint: {why}; fetch it again")
