"""The demo: a 1 M Llama on the embedded world, about three minutes on two CPU cores (`fineline demo`).

Sizes and rate were found by trying: the easy domains are learned in the first minute, the hard ones late or never.
"""

from fineline_jax.models.config import ModelConfig
from fineline_jax.recipe import Batch, Checkpoints, Compute, Data, Logging, Optimizer, Recipe, Schedule, Source

BATCH, LENGTH = 16, 128
TOKENS_PER_STEP = BATCH * LENGTH  # 2,048: half of it makes two cores a third slower
STEPS = 1_000
KEPT_STEPS = (16, 32, 64, 128, 192, 256, 320, 400, 500, 600, 700, 800, 900)  # dense early, sparse late


def recipe() -> Recipe:
    return Recipe(
        name="demo",
        model=ModelConfig(
            vocab_size=1_024,
            width=128,
            layers=4,
            heads=4,
            mlp_width=320,
            context=LENGTH,
            init_std=0.08,  # about 1 / sqrt(width): so small a model starts sooner with it than with 0.02
        ),
        data=Data(sources=(Source("data/world"),), sequence_length=LENGTH),
        batch=Batch(sequences=BATCH),
        optimizer=Optimizer(schedule=Schedule(peak=3e-3, final=3e-4, warmup_tokens=50 * TOKENS_PER_STEP)),
        tokens=STEPS * TOKENS_PER_STEP,
        checkpoints=Checkpoints(
            initial=True,
            at_tokens=tuple(step * TOKENS_PER_STEP for step in KEPT_STEPS),
            latest_every_tokens=100 * TOKENS_PER_STEP,
        ),
        compute=Compute(dtype="float32", remat="none", scan_layers=False),
        logging=Logging(every_steps=10),
    )
