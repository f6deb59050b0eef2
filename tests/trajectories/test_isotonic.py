"""Ranks of many crossings without all of them, against all of them sorted."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fineline_jax.trajectories.curves.isotonic import crossing, crossing_ranks


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 12), st.integers(1, 30), st.sampled_from([np.float32, np.float64]))
def test_ranks_are_those_of_all_crossings_sorted(seed, checkpoints, draws, dtype):
    rng = np.random.default_rng(seed)
    tokens = np.cumsum(rng.uniform(0, 3, checkpoints)) * 1e6 * rng.integers(0, 2)
    values = (np.linspace(0, 1, checkpoints) + rng.normal(0, 0.4, (draws, checkpoints))).astype(dtype)
    targets = rng.uniform(-0.5, 1.5, (draws, 3))
    weights = rng.uniform(0.5, 2, checkpoints)
    ranks = sorted({0, draws // 3, draws - 1})
    every = np.sort(crossing(values, weights, tokens, targets), axis=0)  # NaN, never, comes last
    expected = np.where(np.isnan(every), np.inf, every)[ranks]
    np.testing.assert_array_equal(crossing_ranks(values, weights, tokens, targets, ranks), expected)
