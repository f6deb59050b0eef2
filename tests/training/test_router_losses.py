"""The losses of routers, as a recipe weighs them (in whole steps, against transformers: test_training_oracle)."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from fineline_jax.errors import UserError
from fineline_jax.models import moe
from fineline_jax.models.config import ModelConfig
from fineline_jax.recipe import Batch, Data, Loss, Optimizer, Recipe, Schedule, Source
from fineline_jax.training.step import router_losses

MODEL = ModelConfig(vocab_size=64, width=16, layers=2, heads=2, mlp_width=16, experts=8, experts_per_token=2)


def recipe_of(model: ModelConfig, **loss: Any) -> Recipe:
    return Recipe(
        name="small",
        model=model,
        data=Data((Source("random"),), sequence_length=24),
        batch=Batch(8),
        optimizer=Optimizer(Schedule(peak=1e-2)),
        tokens=8 * 24 * 40,
        loss=Loss(**loss),
    )


@pytest.mark.parametrize(("balance", "router_z"), [(0.0, 0.0), (0.3, 0.0), (0.0, 0.05), (0.3, 0.05)])
def test_each_loss_of_the_routers_counts_with_its_weight(balance, router_z):
    """Two layers, ten tokens, each sent to two of three experts: 3 * sum(share sent * mean probability) (2101.03961),
    and the mean squared log-normaliser (2202.08906)."""
    sent, probability = np.array([[10, 6, 4], [8, 8, 4]]), np.array([[5, 3, 2], [4, 4.5, 1.5]])
    squares, places = np.array([7.0, 2.0]), 2 * 10
    expected = balance * 3 * sum(sent.sum(0) / places * probability.sum(0) / places) + router_z * squares.sum() / places
    loss = Loss(load_balance=balance, router_z_loss=router_z)
    routing = moe.Routing(*(jnp.asarray(x, jnp.float32) for x in (sent, probability, squares)))
    assert float(router_losses(loss, routing, 10)) == pytest.approx(expected)
    assert float(router_losses(loss, None, 10)) == 0, "a model without experts has none"


def test_losses_of_routers_need_experts() -> None:
    dense = dataclasses.replace(MODEL, experts=0, experts_per_token=0)
    with pytest.raises(UserError, match=r"loss\.load_balance=0\.01 is a loss of experts; set model\.experts"):
        recipe_of(dense, load_balance=0.01)
    with pytest.raises(UserError, match=r"loss\.router_z_loss"):
        recipe_of(MODEL, router_z_loss=-1.0)
    recipe_of(MODEL, load_balance=0.01, router_z_loss=0.001)
