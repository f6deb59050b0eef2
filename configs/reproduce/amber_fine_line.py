"""Amber 7B as the authors of The Fine Line trained it again: m-a-p/Amber-Reproduce-*, arXiv 2404.01204.

Published are the names, whose tokens are multiples of 1000 steps of 2048 x 2048 tokens, and the files' sizes, which fit
4 key-value heads. The schedule is not: it is Amber's own here, over the tokens up to the last published checkpoint,
which is past one epoch of Amber's data (1.26 T), so the first chunks are read a second time.
"""

import dataclasses

from fineline_jax.checkpoints.registry.entries import checkpoints, find
from fineline_jax.configs.amber_7b import recipe as amber  # pyright: ignore[reportMissingImports]
from fineline_jax.recipe import Batch, Checkpoints, Recipe

TOKENS_PER_STEP = 2_048 * 2_048


def recipe() -> Recipe:
    entry = find("amber-reproduce")
    assert entry is not None
    kept = tuple(int(one.tokens or 0) for one in checkpoints(entry, ask=False))
    made = amber()
    schedule = dataclasses.replace(made.optimizer.schedule, warmup_tokens=2_000 * TOKENS_PER_STEP)
    return dataclasses.replace(
        made,
        name="amber_fine_line",
        model=dataclasses.replace(made.model, kv_heads=4),  # inferred: 5.799 B parameters are 11.60 GB in bfloat16
        batch=Batch(sequences=2_048),
        optimizer=dataclasses.replace(made.optimizer, schedule=schedule),
        tokens=max(kept),
        checkpoints=Checkpoints(at_tokens=kept, latest_every_tokens=100 * TOKENS_PER_STEP),
    )
