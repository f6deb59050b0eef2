"""The gradient-noise scale: below this batch size noise rules the gradient, above it more of a batch is wasted.

With |G|^2 the squared norm of the true gradient and S the trace of the covariance of one sequence's gradient, a batch
of B sequences has E|g_B|^2 = |G|^2 + S / B. From two batch sizes b < B (micro-batches of a step, and the step):

    |G|^2 = (B |g_B|^2 - b |g_b|^2) / (B - b),   S = (|g_b|^2 - |g_B|^2) / (1/b - 1/B),   scale = S / |G|^2

Both are noisy at each step and their quotient is biased, so it is taken of means over many steps (McCandlish et al.
2018, arXiv 1812.06162, appendix A.1), with Fieller's interval over blocks of consecutive steps.
"""

import math

import numpy as np
import pandas as pd
from scipy import stats

from fineline_jax.trajectories.ablation.arms import arms_of
from fineline_jax.trajectories.statistics.columns import Chart, Column, Statistic
from fineline_jax.trajectories.statistics.inference import LEVEL

BLOCKS = 20
"""Blocks of consecutive steps: steps of one block may depend on each other, blocks are taken as independent."""
FEWEST_STEPS = 2 * BLOCKS
WINDOWS = 8
"""Parts of a run, equal in log tokens, each with an estimate of its own."""


def noise_scale(log: pd.DataFrame, *, windows: int = WINDOWS) -> pd.DataFrame:
    """Of each run and part of it. See `NOISE_SCALE`.

    log: a row per logged step with columns series, tokens, sequences (of the step), micro_sequences (of a micro-batch),
    gradient_norm and micro_gradient_norm (root mean square over the step's micro-batches), tokens_per_sequence.
    """
    rows = []
    known = log.dropna(subset=["gradient_norm", "micro_gradient_norm"])
    for series, run in arms_of(known[known["tokens"] > 0]).groupby("series", sort=False, observed=True):
        run = run.sort_values("tokens")
        x = np.log(run["tokens"].to_numpy(float))
        part = np.minimum(((x - x[0]) / max(x[-1] - x[0], 1e-12) * windows).astype(int), windows - 1)
        settings = ["micro_sequences", "sequences", "tokens_per_sequence"]
        for _, steps in run.groupby([part, *settings], observed=True):
            small, large, length = (float(steps[name].iloc[0]) for name in settings)
            row = {"arm": steps["arm"].iloc[0], "series": series, "from_tokens": steps["tokens"].iloc[0]}
            row |= {"to_tokens": steps["tokens"].iloc[-1], "sequences": large, "micro_sequences": small}
            of_parts, of_whole = (steps[name].to_numpy(float) ** 2 for name in ("micro_gradient_norm", "gradient_norm"))
            found = estimate(of_parts, of_whole, small, large)
            rows.append(row | found | {"scale_tokens": found.get("scale", math.nan) * length})
    return NOISE_SCALE.frame(rows)


def estimate(small: np.ndarray, large: np.ndarray, small_batch: float, large_batch: float) -> dict:
    """Columns steps to reason of NOISE_SCALE from squared gradient norms [steps] at two batch sizes."""
    row: dict = {"steps": len(small)}
    if not small_batch < large_batch:
        return row | {"reason": "it takes two batch sizes: set batch.accumulation above 1"}
    if len(small) < FEWEST_STEPS:
        return row | {"reason": f"fewer than {FEWEST_STEPS} logged steps"}
    noise = (small - large) / (1 / small_batch - 1 / large_batch)
    signal = (large_batch * large - small_batch * small) / (large_batch - small_batch)
    blocks = np.array_split(np.arange(len(small)), BLOCKS)
    means = np.array([[noise[block].mean(), signal[block].mean()] for block in blocks])
    (above, below), cov = means.mean(axis=0), np.cov(means.T) / BLOCKS
    row |= {"noise": above, "signal": below}
    low, high = fieller(above, below, cov, float(stats.t.ppf(1 - LEVEL / 2, BLOCKS - 1)))
    if not math.isfinite(high):
        return row | {"reason": "the gradient is not told from its noise; log more steps"}
    return row | {"scale": above / below, "low": max(low, 0.0), "high": high, "reason": ""}


def fieller(above: float, below: float, cov: np.ndarray, t: float) -> tuple[float, float]:
    """Fieller's interval of above / below, cov [2, 2] of the two; (-inf, inf) where `below` is not told from 0."""
    a, b, c = below**2 - t**2 * cov[1, 1], above * below - t**2 * cov[0, 1], above**2 - t**2 * cov[0, 0]
    if below <= 0 or a <= 0:
        return -math.inf, math.inf
    root = math.sqrt(max(b**2 - a * c, 0.0))
    return (b - root) / a, (b + root) / a


NOISE_SCALE = Statistic(
    "noise_scale",
    "How large is the gradient-noise scale?",
    noise_scale,
    (
        *Column.texts(arm="the arm", series="the run"),
        Column("from_tokens", "tokens", "first step of the part"),
        Column("to_tokens", "tokens", "its last step"),
        Column("sequences", "1", "sequences of a step"),
        Column("micro_sequences", "1", "sequences of a micro-batch"),
        Column("steps", "1", "logged steps in the part"),
        Column("noise", "1", "trace of the covariance of one sequence's gradient", "with few steps"),
        Column("signal", "1", "squared norm of the true gradient", "with few steps"),
        *Column.estimate("scale", "sequences", "their quotient", "where the gradient is not told from noise"),
        Column("scale_tokens", "tokens", "the scale in tokens", "as scale"),
        Column("reason", "", "why there is no scale", "where there is one"),
    ),
    "McCandlish et al. 2018, arXiv 1812.06162, appendix A.1; interval: Fieller 1954",
    definition="Quotient of the means over steps of the unbiased estimates of noise and signal, from the gradient "
    "norms of micro-batches and of whole steps.",
    caveat="It is the critical batch only under strong assumptions (arXiv 2505.23971), which Adam does not meet. Under "
    "a quickly changing gradient the mean over a part of the run is a mean of different scales.",
    chart=Chart("scale", panel="series"),
    count="steps",
)
