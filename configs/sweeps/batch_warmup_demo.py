"""Batch size times warmup on the demo's model: 18 runs of 0.8 M tokens (`fineline ablate batch_warmup_demo`).

The peak follows the square root of the batch size, the warmup is in tokens, and every run sees the same tokens.
"""

from fineline_jax.ablation import Sweep, changed, grid
from fineline_jax.catalogue import load_recipe

TOKENS = 32 * 128 * 200  # 819,200: whole steps of every batch size


def sweep() -> Sweep:
    base = changed(
        load_recipe("demo"),
        {
            "tokens": TOKENS,
            "optimizer.schedule.warmup_tokens": TOKENS // 8,
            "checkpoints.at_tokens": tuple(TOKENS * eighths // 8 for eighths in (1, 2, 4, 6, 7)),
            "logging.tensorboard": False,
        },
    )
    axes = {"batch.sequences": (8, 16, 32), "optimizer.schedule.warmup_tokens": (0, TOKENS // 16, TOKENS // 4)}
    return Sweep("batch_warmup_demo", base, grid(axes), seeds=(0, 1), learning_rate_rule="square_root")
