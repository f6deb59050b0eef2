"""The learning rate as a function of the step. A new kind of decay is a name in `recipe.Schedule` and a case here."""

from typing import assert_never

import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from fineline_jax.recipe import Recipe


def learning_rate(recipe: Recipe, step: Int32[Array, "*steps"] | int) -> Float32[Array, "*steps"]:
    """Learning rate of the update that step `step` (from 0) makes.

    Linear warmup from 0, so the first step has rate 0 where there is a warmup (as amber-train's `get_cosine_lr`
    and optax's `warmup_cosine_decay_schedule`); the decay ends at the last step, warmup included.
    """
    schedule, total = recipe.optimizer.schedule, float(recipe.steps)
    warmup = schedule.warmup_tokens / recipe.tokens_per_step
    step = jnp.asarray(step, jnp.float32)
    share = jnp.clip((step - warmup) / max(total - warmup, 1.0), 0.0, 1.0)
    match schedule.kind:
        case "cosine":
            rate = schedule.final + 0.5 * (1.0 + jnp.cos(jnp.pi * share)) * (schedule.peak - schedule.final)
        case "linear":
            rate = schedule.peak + share * (schedule.final - schedule.peak)
        case "constant":
            rate = jnp.full_like(step, schedule.peak)
        case "wsd":
            decay = schedule.decay_tokens / recipe.tokens_per_step
            left = jnp.clip((total - step) / decay, 0.0, 1.0)
            rate = schedule.final + left * (schedule.peak - schedule.final)
        case "multistep":
            factor = jnp.ones_like(step)
            for begin, value in schedule.milestones:
                factor = jnp.where(step >= begin * total, value, factor)
            rate = schedule.peak * factor
        case kind:
            assert_never(kind)
    return jnp.where(step < warmup, schedule.peak * step / max(warmup, 1.0), rate)
