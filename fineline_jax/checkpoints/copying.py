"""Copying a part of a file's tensor to its place in a parameter: transposed, cast, by several threads.

Most weights are stored as the transpose of what the decoder multiplies with. NumPy copies a transposed matrix element
by element across the cache; block by block, each cast first, is three times as fast, and two threads can do it.
"""

import concurrent.futures
import itertools
import math
import mmap
import os
from collections.abc import Iterator, Sequence

import numpy as np

BLOCK = 128
"""Columns of a transposed copy done at a time: rows of the source that fit the cache."""
LEAST = 1 << 18
"""Elements below which a copy is not worth dividing."""
LARGE = 1 << 22
"""Bytes from which on an array has pages of its own."""

_POOL = concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="copy")


def new_array(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Zeros at an address that is a multiple of 64, so that JAX on a CPU takes the memory instead of a copy of it.

    Large arrays are pages of their own: fresh ones need no clearing, and they go back to the system when freed. Huge
    pages are not asked for: where memory is fragmented, making them takes longer than the copy.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < LARGE:
        memory = np.zeros(size + 64, np.uint8)
        start = -memory.ctypes.data % 64
        memory = memory[start : start + size]
    else:
        memory = np.frombuffer(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
    return memory.view(dtype).reshape(shape)


def copy(target: np.ndarray, source: np.ndarray) -> None:
    """target[...] = source, of equal shape, rounding to nearest even; fast for a transposed source."""
    blocks = list(_blocks(target.shape, source)) if target.size > LEAST else [()]
    if len(blocks) == 1:
        _copy_block(target, source, blocks[0])
    else:
        list(_POOL.map(_copy_block, itertools.repeat(target), itertools.repeat(source), blocks))


def _copy_block(target: np.ndarray, source: np.ndarray, block: tuple[slice, ...]) -> None:
    into, part = target[block], source[block]
    if into.dtype != part.dtype:
        with np.errstate(over="ignore", invalid="ignore"):
            part = part.astype(into.dtype)
    if into.dtype.itemsize == 2:  # as integers: NumPy copies those faster than a dtype from outside
        into, part = into.view(np.uint16), part.view(np.uint16)
    into[...] = part


def _blocks(shape: tuple[int, ...], source: np.ndarray) -> Iterator[tuple[slice, ...]]:
    """Index tuples that cover `shape`, in an order and of a size that suits how the source lies in memory."""
    fastest = min(range(source.ndim), key=lambda axis: (source.shape[axis] == 1, source.strides[axis], -axis))
    if fastest == source.ndim - 1:
        axis, step = 0, max(1, LEAST * shape[0] // source.size)
    elif source.ndim > 2 and shape[-1] < BLOCK and fastest != source.ndim - 2:
        axis, step = source.ndim - 2, BLOCK // shape[-1]
    else:
        axis, step = source.ndim - 1, BLOCK
    before = (slice(None),) * axis
    for start in range(0, shape[axis], step):
        yield (*before, slice(start, start + step))
