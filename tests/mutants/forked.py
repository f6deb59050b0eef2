"""Reads [pytest's arguments, seconds, file of the output] per line, writes pytest's exit status per line (null: out of
time). The libraries are imported once; each run is a fork, which finds our own code as it is then."""

import contextlib
import ctypes
import gc
import importlib
import json
import os
import signal
import sys
import time

# What tests/conftest.py sets before anything imports jax.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

LIBRARIES = (
    *("numpy", "scipy.stats", "pandas", "pyarrow.parquet", "pytest", "yaml", "pydantic", "safetensors.numpy", "jax"),
    *("flax.nnx", "optax", "orbax.checkpoint", "tyro", "rich.progress", "requests", "fsspec", "tokenizers", "grain"),
    *("transformers", "datasets", "lm_eval.evaluator", "lm_eval.tasks", "tensorflow_datasets", "plotly.graph_objects"),
    *("matplotlib.pyplot", "jax.experimental.pallas", "torch", "transformers.models.llama.modeling_llama"),
)
for name in LIBRARIES:
    with contextlib.suppress(ImportError):
        importlib.import_module(name)


gc.collect()
gc.freeze()  # what is there before the fork stays shared


def run(arguments: list[str], seconds: float, output: str) -> int | None:
    child = os.fork()
    if child == 0:
        os.setsid()
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with its parent, however that ends
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        null = os.open(os.devnull, os.O_RDONLY)
        for target, source in ((0, null), (1, descriptor), (2, descriptor)):
            os.dup2(source, target)
        import pytest

        status = 3
        try:
            sys.path.insert(0, os.getcwd())
            status = int(pytest.main(arguments))
            sys.stdout.flush()
        finally:
            os._exit(status)
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            _end_group(child)
            # A crash (a signal) is noticed too: pytest's status for a failed test.
            return os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else 1
        time.sleep(0.02)
    _end_group(child)
    os.waitpid(child, 0)
    return None


def _end_group(child: int) -> None:
    """End what the run left running."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)


for line in sys.stdin:
    print(json.dumps(run(*json.loads(line))), flush=True)
