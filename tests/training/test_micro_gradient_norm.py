"""The gradient norm of micro-batches is that of steps on each of them alone."""

import dataclasses

import jax
import numpy as np
import pytest

from fineline_jax.mesh import make_mesh
from fineline_jax.models.config import ModelConfig
from fineline_jax.recipe import Batch, Compute, Data, MeshShape, Optimizer, Recipe, Schedule, Source
from fineline_jax.training.step import BATCH_SPEC, initial_state, make_train_step

RECIPE = Recipe(
    name="small",
    model=ModelConfig(vocab_size=64, width=16, layers=1, heads=2, mlp_width=32, context=16),
    data=Data((Source("random"),), sequence_length=16),
    batch=Batch(8),
    optimizer=Optimizer(Schedule(peak=1e-2, final=1e-3)),
    tokens=20 * 8 * 16,
    compute=Compute(dtype="float32", remat="none"),
)


def metrics_of(recipe: Recipe, windows: np.ndarray, mesh: jax.sharding.Mesh) -> dict[str, float]:
    with jax.set_mesh(mesh):
        state = jax.jit(lambda: initial_state(recipe))()
        placed = jax.device_put(windows, jax.NamedSharding(mesh, BATCH_SPEC))
        _, metrics = jax.jit(make_train_step(recipe, mesh))(state, placed, np.float32(0), np.float32(0))
        return {name: float(value) for name, value in metrics.items()}


@pytest.mark.slow
def test_it_is_the_root_mean_square_over_steps_on_the_parts():
    mesh = make_mesh(MeshShape(1, 1, 1), jax.devices()[:1])
    windows = np.random.default_rng(0).integers(0, 64, (8, 17), dtype=np.int32)
    measured = dataclasses.replace(
        RECIPE, batch=Batch(8, 2), compute=dataclasses.replace(RECIPE.compute, micro_gradient_norm=True)
    )
    parts = [metrics_of(dataclasses.replace(RECIPE, batch=Batch(4)), half, mesh) for half in np.split(windows, 2)]
    found = metrics_of(measured, windows, mesh)
    expected = np.sqrt(np.mean([part["gradient_norm"] ** 2 for part in parts]))
    assert found["micro_gradient_norm"] == pytest.approx(expected, rel=1e-5)
    plain = metrics_of(dataclasses.replace(RECIPE, batch=Batch(8, 2)), windows, mesh)
    assert "micro_gradient_norm" not in plain
    assert found["gradient_norm"] == pytest.approx(plain["gradient_norm"], rel=1e-6)
