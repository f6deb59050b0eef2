"""Package metadata. The recipes and suites of configs/ are installed as fineline_jax.configs."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
CHECK = ["pytest", "pytest-xdist", "hypothesis", "ruff", "pyright", "pandas-stubs", "scipy-stubs"]

setup(
    name="fineline_jax",
    version=re.findall(r'__version__ = "(.*)"', (HERE / "fineline_jax/__init__.py").read_text())[0],
    description="Pretrain, keep the checkpoints, score every one, read the curves: training dynamics in JAX",
    long_description=(HERE / "README.md").read_text() if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["fineline_jax", "fineline_jax.*"]), "fineline_jax.configs"],
    package_dir={"fineline_jax": "fineline_jax", "fineline_jax.configs": "configs"},
    package_data={
        "fineline_jax": ["world/tasks/*.yaml", "trajectories/page/*", "py.typed"],
        "fineline_jax.configs": ["suites/*.yaml", "series/*.yaml"],
    },
    entry_points={
        "console_scripts": ["fineline = fineline_jax.cli:main"],
    },
    install_requires=[
        "jax>=0.10.2",
        "flax>=0.12.8",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "transformers>=5.0",
        "tensorflow-datasets>=4.9.10",
        "grain>=0.2.18",
        "numpy>=2.2",
        "datasets>=4.0",
        "evaluate>=0.4",
        "fsspec>=2025.1",
        "huggingface-hub>=1.0",
        "lm-eval>=0.4.13",
        "matplotlib>=3.9",
        "ml-dtypes>=0.5",
        "pandas>=2.2",
        "plotly>=6.0",
        "pyarrow>=18.0",
        "pydantic>=2.10",
        "pyyaml>=6.0",
        "requests>=2.32",
        "rich>=13.9",
        "safetensors>=0.6",
        "scipy>=1.15",
        "sentencepiece>=0.2",
        "tensorboardX>=2.6",
        "tokenizers>=0.21",
        "tyro>=1.0",
    ],
    extras_require={
        "tpu": ["jax[tpu]"],
        "cuda12": ["jax[cuda12]"],
        "cuda13": ["jax[cuda13]"],
        "plan": ["libtpu"],
        "beam": ["apache-beam"],
        "wandb": ["wandb"],
        "s3": ["s3fs"],
        "gs": ["gcsfs"],
        "check": CHECK,
        # The oracles of the parity tests, buckets to fetch from, and Weights & Biases offline.
        "test": [*CHECK, "torch==2.13.0", "accelerate", "s3fs", "moto[server]", "gcsfs", "wandb"],
    },
)
