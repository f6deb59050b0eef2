"""Named slices of TPUs and machines of GPUs, described to XLA where none is there.

Sizes and speeds are the vendors' (cloud.google.com/tpu/docs, nvidia.com data sheets).
"""

import contextlib
import dataclasses
import importlib
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fineline_jax.errors import UserError

GIB = 2**30
SHARE_OF_GPU = 0.75
"""Of its memory, what JAX reserves (XLA_PYTHON_CLIENT_MEM_FRACTION)."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of device, and what others trained 7B models at on it."""

    kind: str
    """As `jax.Device.device_kind` begins."""
    memory: float
    """Bytes that a program may use: what the TPU compiler allows, of a GPU what JAX reserves."""
    bandwidth: float
    """Bytes per second out of a chip to its neighbours, all links together."""
    mfu: tuple[float, float]
    """Lowest and highest published MFU of 7B and 8B models in bfloat16, attention counted causally."""
    source: str
    """Who published them."""
    generation: str = ""
    """TPU: its name in XLA."""
    chip_config: str = ""
    """TPU: the configuration that makes one device of a chip."""
    sides: int = 0
    """TPU: dimensions of the torus."""


_OF_H100 = (0.28, 0.51), "axlearn on 256 and JAX-Toolbox on 8 H100, Llama 7B"
CHIPS = {
    "v4": Chip("TPU v4", 30.75 * GIB, 300e9, (0.33, 0.41), "OpenLLaMA 7B (EasyLM), axlearn 7B", "v4", "megacore", 3),
    "v5p": Chip("TPU v5", 95.0 * GIB, 600e9, (0.52, 0.61), "axlearn 7B", "v5", "megacore", 3),
    "v5e": Chip("TPU v5 lite", 15.75 * GIB, 200e9, (0.35, 0.40), "axlearn 7B", "v5e", "default", 2),
    "v6e": Chip("TPU v6 lite", 31.25 * GIB, 448e9, (0.45, 0.47), "tpu-recipes, Mistral 7B", "v6e", "default", 2),
    "h100": Chip("NVIDIA H100", SHARE_OF_GPU * 79.11 * GIB, 450e9, *_OF_H100),
    "h200": Chip("NVIDIA H200", SHARE_OF_GPU * 139.8 * GIB, 450e9, _OF_H100[0], f"{_OF_H100[1]}; none for H200"),
}
GPUS_OF_A_HOST = 8
CORES_OF_A_CHIP = {"v4": 2, "v5p": 2}
"""By which the names of these slices count."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices by name: `v4-512`, `2xv5e-256` (two slices), `h100x8`."""

    name: str
    chip: Chip
    chips: int
    """Of one slice."""
    slices: int = 1

    @property
    def count(self) -> int:
        return self.chips * self.slices

    @property
    def is_gpu(self) -> bool:
        return not self.chip.sides

    def sides(self) -> tuple[int, ...]:
        """TPU: the torus of one slice, as even as powers of two can be."""
        if (self.chips, self.chip.sides) == (4, 3):
            return 2, 2, 1
        power, sides = self.chips.bit_length() - 1, self.chip.sides
        return tuple(2 ** ((power + i) // sides) for i in range(sides))


def topology(name: str) -> Topology:
    """The devices called `name`. Raises UserError, which says how they are called."""
    match = re.fullmatch(r"(?:(\d+)x)?(v4|v5p|v5e|v6e)-(\d+)|(h100|h200)x(\d+)", name)
    if match and match[4]:
        count = int(match[5])
        if count and (count <= GPUS_OF_A_HOST or count % GPUS_OF_A_HOST == 0):
            return Topology(name, CHIPS[match[4]], count)
    elif match:
        chips = int(match[3]) // CORES_OF_A_CHIP.get(match[2], 1)
        if chips >= 4 and chips.bit_count() == 1 and int(match[1] or 1):
            return Topology(name, CHIPS[match[2]], chips, int(match[1] or 1))
    raise UserError(
        f"--topology {name}: no such devices; name a slice of at least 4 TPU chips, a power of two (v4-512, v5p-128,"
        " v5e-256, v6e-256, 2xv5e-256), or GPUs of hosts of eight (h100x8, h200x64)"
    )


def environment(wanted: Topology) -> dict[str, str]:
    """Variables of a process that compiles for the topology on a CPU. Raises UserError naming the missing extra."""
    more = {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "1"}
    if not wanted.is_gpu:
        if importlib.util.find_spec("libtpu") is None:
            raise UserError(f"--topology {wanted.name} needs libtpu: pip install 'fineline_jax[plan]'")
        return more | {
            "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v4-8", "TPU_WORKER_HOSTNAMES": "localhost",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_LOG_DIR": "disabled", "TPU_STDERR_LOG_LEVEL": "1",
        }  # fmt: skip
    found = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.cuda_nvcc")
    nvcc = Path(next(iter(found.submodule_search_locations or ()), "")) if found else None
    if importlib.util.find_spec("jax_cuda12_plugin") is None or nvcc is None:
        raise UserError(f"--topology {wanted.name} needs JAX's CUDA plugin: pip install 'fineline_jax[cuda12]'")
    return more | {
        "PATH": f"{nvcc / 'bin'}:{os.environ.get('PATH', '')}",
        "CUDA_HOME": str(nvcc),
        "XLA_FLAGS": f"--xla_gpu_cuda_data_dir={nvcc} --xla_gpu_autotune_level=0",
    }


def devices(wanted: Topology) -> Sequence[Any]:
    """The absent devices; in a process with the variables of `environment`."""
    from jax.experimental import topologies

    if wanted.is_gpu:
        with contextlib.suppress(Exception):  # for lack of a device; the compiler is registered all the same
            importlib.import_module("jax_plugins.xla_cuda12").initialize()
        hosts, memory = max(1, wanted.count // GPUS_OF_A_HOST), str(math.ceil(wanted.chip.memory / SHARE_OF_GPU))
        described = Path(__file__).with_name("hopper.txtpb").read_text()
        return topologies.get_topology_desc(
            platform="cuda", topology_name="", topology=f"1x{hosts}x{wanted.count // hosts}",
            target_config=described.replace("@memory@", memory).replace("@name@", wanted.chip.kind),
        ).devices  # fmt: skip
    sides = wanted.sides()
    full = 16 if wanted.chip.sides == 2 else 4  # a side is closed to a ring from so many chips on
    wrap = [side >= full for side in sides] if wanted.chip.sides == 2 else [min(sides) >= full] * 3
    return topologies.get_topology_desc(
        platform="tpu",
        topology_name=f"{wanted.chip.generation}:{'x'.join(map(str, sides))}",
        chip_config_name=wanted.chip.chip_config,
        chips_per_host_bounds=(2, 2, 1),
        num_slices=wanted.slices,
        wrap=(*wrap, False, False)[:3],
    ).devices
