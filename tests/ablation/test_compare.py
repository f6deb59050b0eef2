"""What the comparison of a sweep takes from its recipes."""

import pandas as pd

from fineline_jax.ablation.compare import with_batches
from fineline_jax.models.config import ModelConfig
from fineline_jax.recipe import Batch, Data, Optimizer, Recipe, Schedule, Source


def test_the_batch_of_each_step_follows_the_recipes_schedule():
    """Steps of 4, then from 80 tokens on of 8 windows of 10 tokens: they end at 40, 80, 160, 240."""
    recipe = Recipe(
        name="r",
        model=ModelConfig(vocab_size=64, width=16, layers=1, heads=2, mlp_width=32, context=16),
        data=Data((Source("x"),), sequence_length=10),
        batch=Batch(4, accumulation=2, schedule=((80, 8),)),
        optimizer=Optimizer(Schedule()),
        tokens=240,
    )
    found = with_batches(pd.DataFrame({"tokens": [40, 80, 160, 240]}), recipe)
    assert found["sequences"].tolist() == [4, 4, 8, 8] and found["micro_sequences"].tolist() == [2, 2, 4, 4]
    assert set(found["tokens_per_sequence"]) == {10}
