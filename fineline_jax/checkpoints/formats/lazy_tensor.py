"""A tensor that lies in a file: where it begins, and how to read any part of it without reading the rest."""

import dataclasses
import math
import mmap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from fineline_jax.errors import UserError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
MOST_LAYERS = 10_000
"""No stack has as many: a damaged file may mean a thousand million."""


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in `file`; nothing of it is in memory.

    `tensor[slices]`, one slice of step 1 per axis, is an array over a memory map of the bytes from the first to the
    last element asked for. The map goes away with the array, so copy what is to stay.
    """

    name: str
    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    """Bytes of the file before the first element."""
    strides: tuple[int, ...]
    """Bytes from one element to the next along each axis."""
    chunk: int = 0
    """Bytes of each piece but the last, of a row-major tensor that goes on elsewhere in the file."""
    more_offsets: tuple[int, ...] = ()
    """Where the second and the further pieces begin."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, index: Sequence[slice]) -> np.ndarray:
        """The part that `index` names. Raises UserError if the file has become shorter since it was opened."""
        spans = [part.indices(size)[:2] for part, size in zip(index, self.shape, strict=True)]
        shape = [max(stop - start, 0) for start, stop in spans]
        if 0 in shape:
            return np.empty(shape, self.dtype)
        first = sum(start * stride for (start, _), stride in zip(spans, self.strides, strict=True))
        length = sum((size - 1) * stride for size, stride in zip(shape, self.strides)) + self.dtype.itemsize
        data, skipped = self._joined(first, length) if self.more_offsets else _map(self, self.offset + first, length)
        return np.ndarray(shape, self.dtype, data, skipped, self.strides)

    def whole(self) -> np.ndarray:
        """All of it, over a memory map."""
        return self[tuple(slice(None) for _ in self.shape)]

    def _joined(self, first: int, length: int) -> tuple[np.ndarray, int]:
        """`length` bytes from `first`, of all pieces they lie in, in memory: flax cuts an array above 1 GiB."""
        joined, at = np.empty(length, np.uint8), 0
        offsets = (self.offset, *self.more_offsets)
        while at < length:
            piece, inside = divmod(first + at, self.chunk)
            size = min(self.chunk - inside, length - at)
            source, skipped = _map(self, offsets[piece] + inside, size)
            joined[at : at + size] = np.frombuffer(source, np.uint8, size, skipped)
            at += size
        return joined, 0


@dataclasses.dataclass(frozen=True)
class ComputedTensor:
    """A tensor that is worked out from stored ones whenever a part of it is read: joined, merged, dequantized."""

    name: str
    file: Path
    """The first that it comes from, for messages."""
    dtype: np.dtype
    shape: tuple[int, ...]
    read: Callable[[tuple[slice, ...]], np.ndarray]
    """A part: one slice with a start and a stop per axis."""

    def __getitem__(self, index: Sequence[slice]) -> np.ndarray:
        return self.read(tuple(slice(*part.indices(size)[:2]) for part, size in zip(index, self.shape, strict=True)))

    def whole(self) -> np.ndarray:
        """All of it."""
        return self[tuple(slice(None) for _ in self.shape)]


Tensor = StoredTensor | ComputedTensor


def joined(name: str, shape: tuple[int, ...], pieces: Sequence[tuple[Sequence[int], Tensor]]) -> ComputedTensor:
    """A tensor of boxes: (first index along each axis, the box); they cover `shape` once."""

    def read(index: tuple[slice, ...]) -> np.ndarray:
        part = np.empty([span.stop - span.start for span in index], pieces[0][1].dtype)
        for starts, box in pieces:
            spans = [
                (max(span.start, start), min(span.stop, start + size))
                for span, start, size in zip(index, starts, box.shape, strict=True)
            ]
            if all(first < last for first, last in spans):
                into = tuple(slice(a - span.start, b - span.start) for (a, b), span in zip(spans, index))
                part[into] = box[[slice(a - start, b - start) for (a, b), start in zip(spans, starts)]]
        return part

    return ComputedTensor(name, pieces[0][1].file, pieces[0][1].dtype, shape, read)


def permuted(tensor: Tensor, order: np.ndarray) -> ComputedTensor:
    """The tensor with its rows in another order: row i of it is row order[i] of `tensor`."""

    def read(index: tuple[slice, ...]) -> np.ndarray:
        if (rows := order[index[0]]).size == 0:
            return tensor[(slice(0, 0), *index[1:])]
        return tensor[(slice(int(rows.min()), int(rows.max()) + 1), *index[1:])][rows - rows.min()]

    return ComputedTensor(tensor.name, tensor.file, tensor.dtype, tensor.shape, read)


def box(tensor: Tensor, starts: Sequence[int], shape: Sequence[int]) -> ComputedTensor:
    """The part of the tensor of that shape whose first index along each axis is in `starts`."""

    def read(index: tuple[slice, ...]) -> np.ndarray:
        return tensor[[slice(part.start + start, part.stop + start) for part, start in zip(index, starts, strict=True)]]

    return ComputedTensor(tensor.name, tensor.file, tensor.dtype, tuple(shape), read)


def unstacked(tensors: Mapping[str, Tensor], axis: int = 0) -> dict[str, Tensor]:
    """The tensors, a decoder.layers.NAME of all layers as decoder.layers.0.NAME and so on. axis: of the layers."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        before, stack, inner = name.partition("decoder.layers.")
        if not stack or inner[:1].isdigit() or not 0 < dict(enumerate(tensor.shape)).get(axis, 0) < MOST_LAYERS:
            found[name] = tensor
            continue
        shape = (*tensor.shape[:axis], *tensor.shape[axis + 1 :])
        for layer in range(tensor.shape[axis]):

            def read(index: tuple[slice, ...], of: Tensor = tensor, layer: int = layer) -> np.ndarray:
                return of[[*index[:axis], slice(layer, layer + 1), *index[axis:]]].squeeze(axis)

            one = f"{before}{stack}{layer}.{inner}"
            found[one] = ComputedTensor(one, tensor.file, tensor.dtype, shape, read)
    return found


def row_major(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """The strides, in bytes, of an array without gaps whose last axis is the fastest."""
    return tuple(itemsize * math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _map(tensor: StoredTensor, first: int, length: int) -> tuple[mmap.mmap, int]:
    """A read-only map that covers `length` bytes of the tensor's file from `first`; and where in it they begin."""
    begin = first - first % mmap.ALLOCATIONGRANULARITY
    try:
        with tensor.file.open("rb") as file:
            data = mmap.mmap(file.fileno(), first - begin + length, access=mmap.ACCESS_READ, offset=begin)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{tensor.file}: tensor {tensor.name} cannot be read ({error}); fetch the file again"
        ) from error
    return data, first - begin
