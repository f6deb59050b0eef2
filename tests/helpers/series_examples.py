"""Tiny models and a tiny pack, for the tests of scoring series."""

from pathlib import Path

import jax

from fineline_jax.checkpoints.formats.huggingface import export_hf
from fineline_jax.mesh import make_mesh
from fineline_jax.models import decoder
from fineline_jax.models.config import ModelConfig
from fineline_jax.recipe import MeshShape

CONFIG = ModelConfig(vocab_size=512, width=32, layers=2, heads=4, mlp_width=64, context=96)

fresh_params = jax.jit(lambda seed: decoder.init_params(CONFIG, jax.random.key(seed)))


def one_device() -> jax.sharding.Mesh:
    return make_mesh(MeshShape(), jax.devices()[:1])


def make_series(folder: Path, tokenizer: Path, steps: tuple[int, ...]) -> Path:
    """FOLDER/step<n> for each step, with weights of their own."""
    for step in steps:
        with jax.set_mesh(one_device()):
            export_hf(CONFIG, fresh_params(step), folder / f"step{step}", tokenizer)
    return folder
