"""Where the packages lie: the recipes, sweeps, suites and series of configs/ are installed as fineline_jax.configs.

Everything else about the distribution is in pyproject.toml.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["fineline_jax", "fineline_jax.*"]), "fineline_jax.configs"],
    package_dir={"fineline_jax": "fineline_jax", "fineline_jax.configs": "configs"},
    package_data={
        "fineline_jax": ["world/tasks/*.yaml", "trajectories/report/page/*", "plan/hopper.txtpb", "py.typed"],
        "fineline_jax.configs": ["suites/*.yaml", "series/*.yaml", "sweeps/*.py", "reproduce/*.py"],
    },
)
