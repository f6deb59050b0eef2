"""The blocks of the GPU's tree kernel: a table for every dtype and head, and what ptxas makes of the kernel with it."""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from fineline_jax.errors import UserError
from fineline_jax.models.tree_attention import gpu
from fineline_jax.plan.topologies import environment, topology

COMPILE = """
import sys
import jax, jax.numpy as jnp, numpy as np
from fineline_jax.models.tree_attention.gpu import kernel
from fineline_jax.plan.topologies import devices, topology
mesh = jax.sharding.Mesh(np.array(devices(topology("h100x1"))), ("x",))
def shape(*dims, dtype):
    return jax.ShapeDtypeStruct(dims, dtype, sharding=jax.NamedSharding(mesh, jax.P()))
q = shape(1, 2048, 4, int(sys.argv[2]), dtype=jnp.dtype(sys.argv[1]))
jax.jit(kernel).lower(q, q, q, shape(1, 2048, dtype=jnp.int32)).compile()
"""


@pytest.mark.parametrize(
    ("dtype", "head_dim"), list(itertools.product((jnp.bfloat16, jnp.float32), (16, 64, 80, 96, 128, 256)))
)
def test_every_dtype_and_head_has_blocks_that_divide_a_row(dtype: jnp.dtype, head_dim: int) -> None:
    """Rows of the engine are multiples of 256."""
    query = jax.ShapeDtypeStruct((1, 512, 2, head_dim), dtype)
    end = jax.ShapeDtypeStruct((1, 512), jnp.int32)
    kernel = str(jax.make_jaxpr(gpu.kernel)(query, query, query, end))
    padded = {16: 16, 80: 128, 96: 128}.get(head_dim, head_dim)
    queries, keys = gpu.BLOCKS[jnp.dtype(dtype).name, max(64, padded)]
    assert f"[{queries},{keys}]" in kernel, "the scores of a block"
    assert all(size & (size - 1) == 0 and 256 % size == 0 and size >= 16 for size in (queries, keys))


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "head_dim"), list(itertools.product(("bfloat16", "float32"), (64, 96, 128, 256))))
def test_with_the_blocks_of_the_table_nothing_is_spilled_on_hopper(dtype: str, head_dim: int, tmp_path: Path) -> None:
    try:
        variables = environment(topology("h100x1"))
    except UserError as error:
        pytest.skip(str(error))
    variables["XLA_FLAGS"] += f" --xla_dump_to={tmp_path}"
    command = [sys.executable, "-c", COMPILE, dtype, str(head_dim)]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=600)
    kernels = [path for path in tmp_path.glob("*.ptx") if "tree_attention" in path.read_text()]
    assert kernels, done.stderr[-2000:]
    assembler = Path(variables["CUDA_HOME"]) / "bin/ptxas"
    for path in kernels:
        assembled = [assembler, "-v", "-arch=sm_90a", path, "-o", os.devnull]
        said = subprocess.run(assembled, capture_output=True, text=True, check=True).stderr
        assert re.search(r"\b0 bytes spill stores, 0 bytes spill loads", said), said
