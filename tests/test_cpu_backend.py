"""What is set for JAX's CPU backend before it starts."""

import fnmatch
import os
import subprocess
import sys
import types

import jax
import pytest

from fineline_jax import cpu_backend
from fineline_jax.errors import UserError
from fineline_jax.mesh import make_mesh
from fineline_jax.recipe import MeshShape

SHOW = """
from fineline_jax.cpu_backend import prepare_cpu
prepare_cpu()
import jax
print(jax.device_count(), jax.numpy.arange(4).sum())
"""


def test_each_core_of_this_process_becomes_a_device():
    """In a process of its own, as a command starts."""
    free = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    program = f"import os; os.sched_getaffinity = lambda pid: set(range(6))\n{SHOW}"
    done = subprocess.run([sys.executable, "-c", program], env=free, check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["4", "6"]  # a power of two, so that batches divide


@pytest.fixture
def variables(monkeypatch) -> dict[str, str]:
    """The environment of a command that is about to start; JAX is not imported yet."""
    for name in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES", "JAX_PLATFORMS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delitem(sys.modules, "jax")
    return os.environ  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize(("cores", "devices"), [(1, 1), (2, 2), (3, 2), (4, 4), (7, 4), (8, 8), (96, 64)])
def test_devices_are_the_largest_power_of_two_of_the_cores(cores, devices, variables, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    cpu_backend.one_device_per_core()
    assert variables["JAX_NUM_CPU_DEVICES"] == str(devices)
    # With a device on each core, one operation is not divided over threads as well.
    assert variables.get("XLA_FLAGS") == ("--xla_cpu_multi_thread_eigen=false" if devices == cores else None)


def test_without_a_count_of_this_process_cores_all_of_the_machine_are_taken(variables, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    cpu_backend.one_device_per_core()
    assert variables["JAX_NUM_CPU_DEVICES"] == "4"


def test_what_the_user_has_set_is_left_alone(variables, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    for name, value in (
        ("JAX_NUM_CPU_DEVICES", "1"),
        ("XLA_FLAGS", "--xla_force_host_platform_device_count=3"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            before = dict(variables)
            cpu_backend.one_device_per_core()
            assert dict(variables) == before
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "jax", jax)  # too late
        before = dict(variables)
        cpu_backend.one_device_per_core()
        assert dict(variables) == before
    for flags, after in (
        ("--xla_dump_to=x", "--xla_dump_to=x --xla_cpu_multi_thread_eigen=false"),
        ("--xla_cpu_multi_thread_eigen=true", "--xla_cpu_multi_thread_eigen=true"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv("XLA_FLAGS", flags)
            cpu_backend.one_device_per_core()
            assert (variables.pop("JAX_NUM_CPU_DEVICES"), variables["XLA_FLAGS"]) == ("2", after)


def test_freed_memory_is_kept_by_glibcs_own_parameters(monkeypatch):
    """malloc.h: M_TRIM_THRESHOLD -1, M_TOP_PAD -2, M_MMAP_MAX -4, M_ARENA_MAX -8; a threshold of -1: never."""
    said: list = []

    def library(*names: str) -> types.SimpleNamespace:
        return types.SimpleNamespace(**dict.fromkeys(names, lambda *arguments: said.append(arguments)))

    glibc = library("mallopt", "gnu_get_libc_version")
    monkeypatch.setattr(cpu_backend.ctypes, "CDLL", lambda name: glibc if name is None else pytest.fail(f"{name}"))
    monkeypatch.setattr(sys, "platform", "linux")
    cpu_backend.keep_freed_memory()
    assert sorted(said) == [(-8, 1), (-4, 0), (-2, 64 * 2**20), (-1, -1)]
    said.clear()
    monkeypatch.setattr(cpu_backend.ctypes, "CDLL", lambda name: library("mallopt"))  # musl
    cpu_backend.keep_freed_memory()
    monkeypatch.setattr(cpu_backend.ctypes, "CDLL", lambda name: glibc)
    monkeypatch.setattr(sys, "platform", "darwin")
    cpu_backend.keep_freed_memory()
    assert said == []


@pytest.mark.parametrize(
    ("plugin", "device", "platforms", "prepared"),
    [
        (None, None, None, True),
        (None, "/dev/accel0", None, True),  # nothing that could use it
        ("libtpu", "/dev/accel0", None, False),
        ("libtpu", "/dev/vfio/0", None, False),
        ("libtpu", "/dev/vfio/vfio", None, True),  # the container of devices, there without any
        ("libtpu", "/dev/nvidia0", None, True),
        ("libtpu", None, None, True),  # installed to plan with
        ("libtpu", None, "tpu", False),
        ("libtpu", "/dev/accel0", "cpu", True),
        ("jax_cuda12_plugin", "/dev/nvidiactl", None, False),
        ("jax_cuda12_plugin", None, "cuda", False),
        ("jax_cuda13_plugin", "/dev/nvidia0", "cuda,cpu", False),
        ("jax_cuda13_plugin", "/dev/nvidia0", "cpu", True),
        ("jax_cuda13_plugin", None, None, True),
    ],
)
def test_nothing_is_set_where_an_accelerator_will_be_used(plugin, device, platforms, prepared, variables, monkeypatch):
    done: list[str] = []
    monkeypatch.setattr(cpu_backend.importlib.util, "find_spec", lambda name: name == plugin or None)
    here = lambda pattern: [device] if device and fnmatch.fnmatch(device, pattern) else []
    monkeypatch.setattr(cpu_backend.glob, "glob", here)
    for name in ("keep_freed_memory", "one_device_per_core"):
        monkeypatch.setattr(cpu_backend, name, lambda name=name: done.append(name))
    monkeypatch.setenv("JAX_PLATFORMS", platforms or "")
    cpu_backend.prepare_cpu()
    assert done == (["keep_freed_memory", "one_device_per_core"] if prepared else [])
    # JAX itself does not look for a device that is not here; what the user has set stays.
    assert variables["JAX_PLATFORMS"] == (platforms or ("cpu" if prepared and plugin else ""))


def test_a_tpu_that_jax_is_told_to_start_is_left_to_it(variables, monkeypatch):
    monkeypatch.setattr(cpu_backend.importlib.util, "find_spec", lambda name: name == "libtpu" or None)
    monkeypatch.setattr(cpu_backend.glob, "glob", lambda pattern: [])
    monkeypatch.setenv("JAX_FORCE_TPU_INIT", "1")
    before = dict(variables)
    cpu_backend.prepare_cpu()
    assert dict(variables) == before


def test_a_smaller_mesh_takes_the_first_cores_and_one_that_does_not_divide_them_is_refused():
    assert make_mesh(MeshShape(1, 2, 1)).devices.flatten().tolist() == jax.devices()[:2]
    assert make_mesh(MeshShape(1, 1, 1)).size == 1
    with pytest.raises(UserError, match=r"mesh\.fsdp=3"):
        make_mesh(MeshShape(1, 3, 1))
