"""What is set for JAX's CPU backend before it starts."""

import os
import subprocess
import sys

import pytest

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
