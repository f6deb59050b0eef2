"""The whole suite runs on eight CPU devices and compiles each program once; set before anything imports jax."""

import atexit
import os
import shutil
import signal
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
# Runs of the same recipe, here and in processes that tests start, share their compiled steps.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="fineline-compiled-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# A script's background jobs, and what they start, ignore Ctrl-C, which some tests send to processes of their own.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

from pathlib import Path

import pytest

MEDIUM = frozenset((Path(__file__).parent / "medium.txt").read_text().split())
"""Tests that took over a second on two cores when the list was made; `make test-quick` leaves them out."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.nodeid.removeprefix("tests/").partition("[")[0] in MEDIUM:
            item.add_marker("medium")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with the models, benchmarks and tables the larger tests read."""
    folder = os.environ.get("FINELINE_SHARED_DATA")
    if not folder:
        pytest.skip("set FINELINE_SHARED_DATA to the folder of the shared test data")
    return Path(folder)
