"""What is set for JAX's CPU backend before it starts."""

import os
import subprocess
import sys

import jax
import pytest

from fineline_jax.errors import UserError
from fineline_jax.mesh import make_mesh
from fineline_jax.recipe import Mesh

SHOW = """
from fineline_jax.cpu import prepare_cpu
prepare_cpu()
import jax
print(jax.device_count(), jax.numpy.arange(4).sum())
"""


def devices(cores: int, **variables: str) -> int:
    free = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    program = f"import os; os.sched_getaffinity = lambda pid: set(range({cores}))\n{SHOW}"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=free | variables, check=True, capture_output=True, text=True)
    count, total = done.stdout.split()
    assert total == "6"
    return int(count)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="counts the cores of this process, a Linux call")
def test_every_core_is_a_device_unless_the_user_says_otherwise():
    assert devices(2) == 2
    assert devices(6) == 4  # a power of two, so that batches divide
    assert devices(2, JAX_NUM_CPU_DEVICES="1") == 1
    assert devices(2, XLA_FLAGS="--xla_force_host_platform_device_count=3") == 3


def test_a_smaller_mesh_takes_the_first_cores_and_one_that_does_not_divide_them_is_refused():
    assert make_mesh(Mesh(1, 2, 1)).devices.flatten().tolist() == jax.devices()[:2]
    assert make_mesh(Mesh(1, 1, 1)).size == 1
    with pytest.raises(UserError, match=r"mesh\.fsdp=3"):
        make_mesh(Mesh(1, 3, 1))
