"""The learning rate as a function of the tokens consumed. A new kind of decay is a name in `recipe.Schedule` and a
case here."""

import math
from typing import assert_never

import numpy as np

from fineline_jax.recipe import Recipe


def learning_rate(recipe: Recipe, tokens: int) -> float:
    """Learning rate of the update behind `tokens` trained tokens: that of the schedule, times the batch's factor."""
    return _scheduled(recipe, tokens) * recipe.batch.rate_factor(tokens)


def _scheduled(recipe: Recipe, tokens: int) -> float:
    """Linear warmup from 0, so the first step has rate 0 where there is a warmup (as amber-train's `get_cosine_lr`
    and optax's `warmup_cosine_decay_schedule`); the decay ends at `recipe.tokens`, warmup included. Computed on the
    host, in float64: the compiled step takes the rate as an argument and is the same for every schedule.
    """
    schedule, end = recipe.optimizer.schedule, recipe.tokens
    warmup, peak, final = schedule.warmup_tokens, schedule.peak, schedule.final
    if tokens < warmup:
        return peak * tokens / warmup
    share = min((tokens - warmup) / max(end - warmup, 1), 1.0)
    match schedule.kind:
        case "cosine":
            return final + 0.5 * (1.0 + math.cos(math.pi * share)) * (peak - final)
        case "linear":
            return peak + share * (final - peak)
        case "constant":
            return peak
        case "wsd":
            left = min(max(end - tokens, 0) / schedule.decay_tokens, 1.0)
            return final + left * (peak - final)
        case "multistep":
            passed = [factor for begin, factor in schedule.milestones if tokens >= begin * end]
            return peak * (passed[-1] if passed else 1.0)
        case kind:
            assert_never(kind)


def rates(recipe: Recipe, tokens: int) -> tuple[np.float32, np.float32]:
    """Learning rate and weight decay of the update behind `tokens` trained tokens: arguments of a training step."""
    return np.float32(learning_rate(recipe, tokens)), np.float32(recipe.optimizer.weight_decay)
