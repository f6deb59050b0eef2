"""Every comparison that the arms of runs allow, whoever trained them."""

import pandas as pd

from fineline_jax.facts.score_table import COLUMNS
from fineline_jax.trajectories.ablation.arms import with_runs
from fineline_jax.trajectories.ablation.critical_batch import CRITICAL_BATCH
from fineline_jax.trajectories.ablation.differences import DIFFERENCES
from fineline_jax.trajectories.ablation.final_map import FACET_COST, FINAL_MAP
from fineline_jax.trajectories.ablation.instability import INSTABILITY
from fineline_jax.trajectories.ablation.noise_scale import NOISE_SCALE
from fineline_jax.trajectories.ablation.tokens_to import TOKENS_TO
from fineline_jax.trajectories.ablation.transfer import TRANSFER
from fineline_jax.trajectories.statistics.columns import Statistic

HELD = "validation_loss/"
STATISTICS = (DIFFERENCES, FINAL_MAP, FACET_COST, TOKENS_TO, CRITICAL_BATCH, TRANSFER, NOISE_SCALE, INSTABILITY)
"""In the order of the page."""


def compare_arms(
    table: pd.DataFrame,
    runs: pd.DataFrame,
    facets: list[str],
    *,
    logs: pd.DataFrame | None = None,
    documents: pd.DataFrame | None = None,
    batch: str | None = None,
) -> dict[Statistic, pd.DataFrame]:
    """Frame of each statistic that these runs have the arms for, in the order of the page.

    table: tidy, scores and validation losses (`loss_table`) of runs that did not diverge. runs: a row for each run in
    the order of the arms, of which the first is the reference: series, arm, seed, the facets; and where it is known
    branch (tokens at which it left another run), size and choice (the arm without its size: arms are compared at each
    size). facets: columns that are not the seed and take several values. logs: the training logs, with a column series.
    documents: see `differences`. batch: the facet that is the batch size.
    """
    order = {series: place for place, series in enumerate(runs["series"])}
    table = with_runs(table, runs)
    table = table.iloc[table["series"].map(order).argsort(kind="stable")]
    found = {}
    if table["arm"].nunique() > 1:
        parts = [part for _, part in table.groupby("size", sort=False)] if "choice" in runs else [table]
        found[DIFFERENCES] = pd.concat([DIFFERENCES.compute(part, documents=documents) for part in parts])
        found[TOKENS_TO] = TOKENS_TO.compute(table)
        if len(facets) == 2:
            found[FINAL_MAP] = FINAL_MAP.compute(table, *facets)
            found[FACET_COST] = pd.concat([FACET_COST.compute(table, *pair) for pair in (facets, facets[::-1])])
        if len(parts) > 1:
            found[TRANSFER] = TRANSFER.compute(table.assign(arm=table["choice"]))
    if "branch" in runs and batch is not None and facets == [batch]:
        found[CRITICAL_BATCH] = CRITICAL_BATCH.compute(table.assign(batch=table[batch]))
    if logs is not None:
        logs = with_runs(logs, runs)
        found[INSTABILITY] = INSTABILITY.compute(logs)
        if "micro_gradient_norm" in logs:
            found[NOISE_SCALE] = NOISE_SCALE.compute(logs[logs["micro_gradient_norm"].notna()])
    return {one: found[one] for one in STATISTICS if one in found}


def loss_table(logs: pd.DataFrame) -> pd.DataFrame:
    """The validation losses as a tidy table, of training logs with a column series.

    Checkpoints are called as those of a run folder, so that losses and scores of one step are one point.
    """
    held = [str(name) for name in logs if str(name).startswith(HELD)]
    long = logs.melt(["series", "step", "tokens"], held, "task").dropna(subset=["value"])
    long = long.assign(checkpoint="step" + long["step"].astype(int).astype(str), domain="loss", metric="loss")
    long["task"] = long["task"].str.removeprefix(HELD)
    return long.reindex(columns=list(COLUMNS))
