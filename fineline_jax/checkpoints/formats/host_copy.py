"""Copying parts of files' tensors to their places in a parameter: transposed, cast, by several threads.

Most weights are stored as the transpose of what the decoder multiplies with, and copied element by element every one
of them would miss the cache. So a tile is first copied as it lies in the file into memory that fits the cache, and from
there into place. As much time again goes into giving pages to the process: the kernel is asked for many at once, which
costs half of what touching them one by one does.
"""

import collections
import concurrent.futures
import ctypes
import itertools
import math
import mmap
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from fineline_jax.checkpoints.formats.lazy_tensor import BFLOAT16

PIECE = 1 << 23
"""Elements of a file, or of new memory, that are one thread's at a time."""
RUN, ROWS = 240, 512
"""A tile: elements of one run in the file, and such runs. It fits the L2 cache, and one element of each of its runs the
L1 cache, which runs of 256 elements would not: a power of two apart, they share a few of its sets."""
LARGE = 1 << 22
"""Bytes from which on an array has pages of its own."""

_POPULATE_READ, _POPULATE_WRITE = 22, 23  # asm-generic/mman-common.h
_POOL = concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="copy")


def in_threads(function: Callable[..., None], *arguments: Iterable[Any]) -> None:
    """function(*first of all arguments), function(*second …), …; raises what the first to fail raises."""
    collections.deque(_POOL.map(function, *arguments), maxlen=0)


def new_array(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Zeros at an address that is a multiple of 64, so that JAX on a CPU takes the memory instead of a copy of it.

    Large arrays are pages of their own: fresh ones need no clearing, and they go back to the system when freed. Huge
    pages are not asked for: a virtual machine whose host takes back free memory may have to get each of them from the
    host again, which takes several times as long as the whole load.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < LARGE:
        memory = np.zeros(size + 64, np.uint8)
        start = -memory.ctypes.data % 64
        memory = memory[start : start + size]
    else:
        memory = np.frombuffer(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
        step = PIECE * dtype.itemsize
        pieces = [memory[start : start + step] for start in range(0, size, step)]
        in_threads(_populate, pieces, itertools.repeat(_POPULATE_WRITE))
    return memory.view(dtype).reshape(shape)


def copy(target: np.ndarray, source: np.ndarray) -> None:
    """target[...] = source, of equal shape, rounding to nearest even; fast for a transposed source.

    target: zeros, of at least one axis, the last one without gaps.
    """
    if source.dtype == BFLOAT16 and target.dtype in (BFLOAT16, np.float32):
        # As integers: casts to and from bfloat16 would hold Python's lock. In float32 its bits are the upper half.
        source = source.view(np.uint16)
        target = target.view(np.uint16)[..., target.itemsize // 2 - 1 :: target.itemsize // 2]
    _populate(source, _POPULATE_READ)
    with np.errstate(over="ignore", invalid="ignore"):
        for index in _tiles(source.shape, source.strides):
            target[index] = source[index].astype(target.dtype, order="K")


def _tiles(shape: Sequence[int], strides: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """Index tuples that cover `shape` in tiles: RUN elements as the source lies, ROWS as the target does.

    strides: of the source; the target is row-major.
    """
    axes = range(len(shape))
    run = _lengths(shape, sorted(axes, key=lambda axis: strides[axis]), RUN)
    rows = _lengths(shape, [axis for axis in reversed(axes) if run[axis] == 1], ROWS)
    lengths = list(map(max, run, rows))
    for starts in itertools.product(*(range(0, size, length) for size, length in zip(shape, lengths))):
        yield tuple(slice(start, start + length) for start, length in zip(starts, lengths))


def _lengths(shape: Sequence[int], axes: Sequence[int], room: int) -> list[int]:
    """Lengths of a block of up to `room` elements: as long as can be along the first of `axes`, then the second, …"""
    lengths = [1] * len(shape)
    for axis in axes:
        lengths[axis] = max(1, min(shape[axis], room))
        if lengths[axis] < shape[axis]:
            break
        room //= lengths[axis]
    return lengths


def _populate(array: np.ndarray, advice: int) -> None:
    """Have Linux map all pages of `array` now. Before 5.14 it refuses, and maps each when it is used, as others do."""
    if _madvise is not None and array.size:
        length = sum((size - 1) * stride for size, stride in zip(array.shape, array.strides)) + array.itemsize
        before = array.ctypes.data % mmap.PAGESIZE
        _madvise(array.ctypes.data - before, before + length, advice)


_madvise = ctypes.CDLL(None).madvise if sys.platform.startswith("linux") else None
if _madvise is not None:
    _madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
