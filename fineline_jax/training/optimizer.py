"""AdamW as the recipes state it, and the skipping of bad steps."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float32, Int32

from fineline_jax.recipe import Optimizer
from fineline_jax.training.loss import Scalar

SPIKE_WINDOW = 128
"""Steps the running mean and deviation of loss and gradient norm look back (OLMo-core's SkipStepOptimizer)."""


def make_optimizer(
    optimizer: Optimizer, weight_decay: Scalar | float | None = None
) -> optax.GradientTransformationExtraArgs:
    """Clipping, Adam moments and decoupled weight decay; the caller multiplies by -learning_rate.

    The rate stays outside so that it depends on the tokens alone, also after skipped updates. `update` takes
    `loss` and `gradient_norm` (float32 scalars) as extra arguments. weight_decay: in place of the optimizer's own, as
    the argument of a compiled step; the state does not depend on it.
    """
    decay = optimizer.weight_decay if weight_decay is None else weight_decay

    def decayed(params: dict) -> dict:
        """Matrices only: neither norm scales nor biases, nor Mamba's A_log and D (its authors' no_weight_decay)."""

        def is_matrix(path: tuple, _: jax.Array) -> bool:
            name = str(path[-1].key)
            return not name.endswith(("norm", "bias")) and name not in ("A_log", "D")

        return jax.tree_util.tree_map_with_path(is_matrix, params)

    inner = optax.chain(
        optax.clip_by_global_norm(optimizer.clip_norm),
        optax.scale_by_adam(optimizer.beta1, optimizer.beta2, optimizer.eps),
        optax.add_decayed_weights(decay, mask=decayed if optimizer.decay == "matrices" else None),
    )
    if not optimizer.skip_nonfinite and not optimizer.skip_spike_sigmas:
        return optax.with_extra_args_support(inner)
    return skip_outliers(inner, optimizer.skip_spike_sigmas)


class SkipState(NamedTuple):
    """Rolling windows of loss and gradient norm, and how many steps were skipped."""

    inner: optax.OptState
    losses: Float32[Array, " spike_window"]
    norms: Float32[Array, " spike_window"]
    seen: Int32[Array, ""]
    skipped: Int32[Array, ""]


def skip_outliers(inner: optax.GradientTransformation, sigmas: float) -> optax.GradientTransformationExtraArgs:
    """`inner`, left alone at a step whose loss or gradient norm is not finite or, for sigmas > 0 and a full window,
    more than `sigmas` standard deviations above its mean over the last SPIKE_WINDOW accepted steps."""

    def init(params: dict) -> SkipState:
        window = jnp.zeros(SPIKE_WINDOW, jnp.float32)
        return SkipState(inner.init(params), window, window, jnp.int32(0), jnp.int32(0))

    def update(updates, state: SkipState, params=None, *, loss: Scalar, gradient_norm: Scalar, **_):
        accept = jnp.isfinite(loss) & jnp.isfinite(gradient_norm)
        if sigmas:
            full = state.seen >= SPIKE_WINDOW
            for value, window in ((loss, state.losses), (gradient_norm, state.norms)):
                accept &= ~full | (value <= jnp.mean(window) + sigmas * jnp.std(window))
        directions, inner_state = inner.update(updates, state.inner, params)
        choose = lambda new, old: jax.tree.map(lambda a, b: jnp.where(accept, a, b), new, old)
        slot = state.seen % SPIKE_WINDOW
        new = SkipState(
            choose(inner_state, state.inner),
            jnp.where(accept, state.losses.at[slot].set(loss), state.losses),
            jnp.where(accept, state.norms.at[slot].set(gradient_norm), state.norms),
            state.seen + accept,
            state.skipped + ~accept,
        )
        return jax.tree.map(lambda d: jnp.where(accept, d, jnp.zeros_like(d)), directions), new

    # optax types its init and update for any pytree; ours take the trees of this module.
    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]
