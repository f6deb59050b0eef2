"""Rotary positions (2104.09864) and what stretches them for longer contexts, as transformers computes it."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fineline_jax.models.config import RopeScaling

Rotary = tuple[Float[Array, "batch length 1 rotary_dim"], Float[Array, "batch length 1 rotary_dim"]]
"""cos and signed sin of the angles, see `rotary_factors`."""
UNSCALED = RopeScaling()


def rotary_factors(
    positions: Int[Array, "batch length"],
    features: int,
    theta: float,
    dtype: jnp.dtype,
    scaling: RopeScaling = UNSCALED,
    interleaved: bool = False,
) -> Rotary:
    """cos and signed sin of the rotary angles, computed in float32. interleaved: for `rotate` of neighbours."""
    if scaling.kind in ("none", "dynamic"):
        frequencies = theta ** -(jnp.arange(0, features, 2, dtype=jnp.float32) / features)
    else:
        frequencies = jnp.asarray(scaled_frequencies(features, theta, scaling), jnp.float32)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    # As a product and not by concatenation, which XLA's CPU backend would compute again wherever the table is used.
    half = np.eye(features // 2, dtype=np.float32)

    def spread(table: jax.Array, first: int) -> jax.Array:
        both = np.stack([first * half, half], axis=-1 if interleaved else 1).reshape(features // 2, features)
        return jnp.einsum("bsuj,jk->bsuk", table, scaling.attention_factor * both, precision="highest").astype(dtype)

    return spread(jnp.cos(angles), 1), spread(jnp.sin(angles), -1)


def scaled_frequencies(features: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """Angles per token, float64 [features / 2]."""
    plain = theta ** -(np.arange(0, features, 2) / features)
    stretched = plain / scaling.factor
    if scaling.kind == "linear":
        return stretched
    if scaling.kind == "llama3":  # between the two bounds from one to the other, linearly in the frequency
        turns = scaling.original_context * plain / (2 * math.pi)
        share = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    else:  # yarn, 2309.00071: linearly in the number of the feature
        at = lambda turns: math.log(scaling.original_context / (turns * 2 * math.pi)) * features / (2 * math.log(theta))
        low, high = at(scaling.beta_fast), at(scaling.beta_slow)
        if scaling.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, features - 1)
        share = 1 - (np.arange(features // 2) - low) / (high - low if high != low else 0.001)
    share = np.clip(share, 0, 1)
    return share * plain + (1 - share) * stretched


def rotate(x: Float[Array, "batch length heads head_dim"], rotary: Rotary, interleaved: bool = False) -> jax.Array:
    """Rotary embedding of the first features: of n, feature j is paired with feature j + n / 2 (half-split layout), or
    interleaved 2j with 2j + 1."""
    cos, sin = rotary
    turned, kept = jnp.split(x, [cos.shape[-1]], axis=-1)
    pairs = turned.reshape(*turned.shape[:-1], *((-1, 2) if interleaved else (2, -1)))
    y = turned * cos + jnp.flip(pairs, axis=-1 if interleaved else -2).reshape(turned.shape) * sin
    return jnp.concatenate([y, kept], axis=-1) if kept.shape[-1] else y
