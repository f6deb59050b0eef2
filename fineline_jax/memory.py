"""Keeping freed memory: what makes a training step on CPU a third faster."""

import ctypes
import importlib.util
import os
import sys

# Parameters of glibc's mallopt (malloc.h).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8

ACCELERATOR_PLUGINS = ("libtpu", "jax_cuda12_plugin", "jax_cuda13_plugin")


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory in the process and hand it out again; does nothing with another C library.

    XLA's CPU backend allocates the temporaries of every step anew. By default glibc maps such blocks from the kernel
    and gives them back, and the page faults of each step cost as much as a third of it. Call it before the first
    thread starts. For the CPU backend only, so nothing is done where a plugin for an accelerator is installed and
    JAX_PLATFORMS does not name cpu: there the single arena would make many threads wait for each other.
    """
    accelerator = any(importlib.util.find_spec(name) for name in ACCELERATOR_PLUGINS)
    if not sys.platform.startswith("linux") or (accelerator and os.environ.get("JAX_PLATFORMS") != "cpu"):
        return
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return
    library.mallopt(_M_ARENA_MAX, 1)
    library.mallopt(_M_MMAP_MAX, 0)
    library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    library.mallopt(_M_TOP_PAD, 1 << 26)
