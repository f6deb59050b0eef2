"""Settings of the process that JAX's CPU backend needs to be fast; nothing here touches an accelerator."""

import ctypes
import glob
import importlib.util
import os
import sys

# Parameters of glibc's mallopt (malloc.h).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8
_NEVER = -1

_NVIDIA = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg")
DEVICE_FILES = {
    "libtpu": ("/dev/accel*", "/dev/vfio/[0-9]*"),
    "jax_cuda12_plugin": _NVIDIA,
    "jax_cuda13_plugin": _NVIDIA,
}
"""Of each plugin the files of its devices: Cloud TPU's documentation (v4 and older, v5e and newer), and
jax/_src/hardware_utils.py."""


def prepare_cpu() -> None:
    """Keep freed memory, and let every core be a device of its own; call it before anything imports JAX.

    Does nothing where a plugin for an accelerator is installed and its devices are here, or JAX_PLATFORMS (for a TPU
    also JAX_FORCE_TPU_INIT) asks for them. With a plugin but no device (libtpu to plan with), JAX_PLATFORMS becomes
    cpu: JAX would look for the device first.
    """
    installed = [name for name in DEVICE_FILES if importlib.util.find_spec(name)]
    platforms = os.environ.get("JAX_PLATFORMS")
    if installed and platforms != "cpu":
        present = any(glob.glob(pattern) for name in installed for pattern in DEVICE_FILES[name])
        if platforms or present or "JAX_FORCE_TPU_INIT" in os.environ:
            return
        os.environ["JAX_PLATFORMS"] = "cpu"
    keep_freed_memory()
    one_device_per_core()


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory in the process and hand it out again; does nothing with another C library.

    XLA's CPU backend allocates the temporaries of every step anew. By default glibc maps such blocks from the kernel
    and gives them back, and the page faults of each step cost as much as a third of it. Call it before the first
    thread starts: the one arena it leaves is for a process whose threads seldom allocate.
    """
    if not sys.platform.startswith("linux"):
        return
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return
    library.mallopt(_M_ARENA_MAX, 1)
    library.mallopt(_M_MMAP_MAX, 0)
    library.mallopt(_M_TRIM_THRESHOLD, _NEVER)
    library.mallopt(_M_TOP_PAD, 1 << 26)


def one_device_per_core() -> None:
    """Split the CPU into as many JAX devices as it has cores (a power of two of them).

    XLA's CPU backend divides one operation over threads poorly: small products and most of what is not a product run
    on one core. Devices run side by side and meet only in collectives, though their products share one pool of as many
    threads. JAX_NUM_CPU_DEVICES, or a device count in XLA_FLAGS, is the user's word and left alone.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if "JAX_NUM_CPU_DEVICES" in os.environ or "device_count" in flags or "jax" in sys.modules:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    devices = 1 << (cores.bit_length() - 1)
    os.environ["JAX_NUM_CPU_DEVICES"] = str(devices)
    if devices == cores and "multi_thread_eigen" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false".strip()
