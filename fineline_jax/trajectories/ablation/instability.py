"""How calm a training was: spikes of loss and gradient norm by a stated rule, its gradient's tail, skipped updates."""

import numpy as np
import pandas as pd

from fineline_jax.trajectories.ablation.arms import arms_of
from fineline_jax.trajectories.statistics.columns import Chart, Column, Statistic

SIGMAS = 7.0
WINDOW = 1000
"""Logged steps before a step that it is compared with."""
FEWEST = 20
"""Logged steps that must lie before one that is judged."""
WARM_SHARE = 0.1
"""First part of a run that the gradient's tail leaves out: gradients are large there for another reason."""


def instability(log: pd.DataFrame, *, sigmas: float = SIGMAS, window: int = WINDOW) -> pd.DataFrame:
    """Of each run. See `INSTABILITY`.

    log: a row per logged step with columns series, step, loss, and where they were logged gradient_norm, skipped,
    arm, seed; rows without a step's loss and norm (validation) do not count, a last loss that is missing is not finite.
    """
    rows = []
    for series, run in arms_of(log).groupby("series", sort=False, observed=True):
        run = run.sort_values("step")
        row: dict = {"arm": run["arm"].iloc[0], "series": series, "seed": run["seed"].iloc[0]}
        norm = run["gradient_norm"] if "gradient_norm" in run else pd.Series(np.nan, index=run.index)
        trained = run["loss"].notna() | norm.notna()
        if "learning_rate" in run:
            trained |= run["learning_rate"].notna()
        run, norm = run[trained], norm[trained].to_numpy(float)
        loss = run["loss"].to_numpy(float)
        row |= {"steps": len(run)}
        if len(run) <= FEWEST:
            rows.append(row | {"reason": f"fewer than {FEWEST + 1} logged steps"})
            continue
        diverged = np.flatnonzero(~np.isfinite(loss))
        height = spikes(loss, sigmas, window)
        row |= {"spikes": int((height > sigmas).sum()), "spike_share": float((height > sigmas).mean())}
        row |= {
            "largest": float(np.nanmax(height)),
            "diverged": float(run["step"].iloc[diverged[0]]) if len(diverged) else np.nan,
        }
        if np.isfinite(norm).sum() > FEWEST:
            late = norm[int(WARM_SHARE * len(norm)) :]
            late = late[np.isfinite(late)]
            row |= {"norm_spikes": int((spikes(norm, sigmas, window) > sigmas).sum())}
            row |= {
                "norm_median": float(np.median(late)),
                "norm_tail": float(np.quantile(late, 0.99) / np.median(late)),
            }
        if "skipped" in run and run["skipped"].notna().any():
            row |= {"skipped": float(run["skipped"].max())}
        rows.append(row)
    return INSTABILITY.frame(rows)


def spikes(values: np.ndarray, sigmas: float = SIGMAS, window: int = WINDOW) -> np.ndarray:
    """How many standard deviations each value [steps] lies above the mean of the `window` values before it.

    -inf for the first FEWEST; a value that is itself a spike is not counted into what later ones are compared with.
    Values that are not finite are no spikes and are not compared with.
    """
    height = np.full(len(values), -np.inf)
    calm, count = np.empty(len(values)), 0
    for index, value in enumerate(values.tolist()):
        recent = calm[max(0, count - window) : count]
        if not np.isfinite(value):
            continue
        if len(recent) >= FEWEST:
            spread = max(float(recent.std(ddof=1)), 1e-12 * abs(float(recent.mean())))
            height[index] = (value - recent.mean()) / spread if spread else 0.0
        if height[index] <= sigmas:
            calm[count] = value
            count += 1
    return height


INSTABILITY = Statistic(
    "instability",
    "How calm was the training?",
    instability,
    (
        *Column.texts(arm="the arm", series="the run", seed="its seed"),
        Column("steps", "1", "logged steps"),
        Column("spikes", "1", "losses more than 7 SD above the mean of the 1000 logged before", "with few steps"),
        Column("spike_share", "1", "their share of all logged steps", "as spikes"),
        Column("largest", "SD", "the highest loss so measured", "as spikes"),
        Column("diverged", "steps", "first step whose loss is not finite", "where all are finite"),
        Column("norm_spikes", "1", "the same of the gradient norm", "where it was not logged"),
        Column("norm_median", "1", "median gradient norm behind the first tenth", "as norm_spikes"),
        Column("norm_tail", "1", "99th percentile of the gradient norm over its median there", "as norm_spikes"),
        Column("skipped", "1", "updates that the optimizer skipped", "where skipping was off"),
        Column("reason", "", "why there is no value", "where there is one"),
    ),
    "spike score: OLMo 2, arXiv 2501.00656",
    definition="A spike is a value more than seven standard deviations above the mean of the thousand logged values "
    "before it that were none themselves.",
    caveat="Losses of larger batches scatter less, so the same rule finds smaller spikes there.",
    chart=Chart("spike_share", panel=""),
    count="steps",
)
