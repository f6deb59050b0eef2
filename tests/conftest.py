"""The whole suite runs on eight CPU devices; set before anything imports jax."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
)

from pathlib import Path

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes more than a few seconds")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with the models, benchmarks and tables the larger tests read."""
    folder = os.environ.get("FINELINE_SHARED_DATA")
    if not folder:
        pytest.skip("set FINELINE_SHARED_DATA to the folder of the shared test data")
    return Path(folder)
