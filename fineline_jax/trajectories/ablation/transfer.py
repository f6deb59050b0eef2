"""Does the order of arms at a small size hold at a larger one?"""

import functools
import itertools
import math

import numpy as np
import pandas as pd
from scipy import stats

from fineline_jax.errors import UserError
from fineline_jax.facts.metrics import metric_of
from fineline_jax.trajectories.ablation.arms import arms_of, end_values
from fineline_jax.trajectories.statistics.columns import Chart, Column, Statistic
from fineline_jax.trajectories.statistics.inference import fisher_z, kendall_interval

FEWEST_ARMS = 4
DRAWS = 1000


def transfer(table: pd.DataFrame, *, size: str = "size", seed: int = 0) -> pd.DataFrame:
    """Of each metric, task and pair of sizes: how arms are ordered at both. See `TRANSFER`.

    table: with column `size`, a number per series, and `arm`, which is the same at all sizes. Raises UserError without.
    """
    for name in (size, "arm"):
        if name not in table:
            raise UserError(f"column {name!r}: the table lacks it; group the runs by it")
    sizes = table[["series", size]].drop_duplicates("series")
    ends = pd.concat([end_values(arms_of(part)) for _, part in table.groupby(size, observed=True)])
    ends = ends.merge(sizes, on="series")
    rows = []
    for (metric, task), part in ends.groupby(["metric", "task"], sort=False, observed=True):
        better = metric_of(str(metric)).better
        seeds = better * part.pivot_table(index="arm", columns=[size, "seed"], values="value", observed=True)
        means = seeds.T.groupby(level=0).mean().T
        for small, large in itertools.combinations(sorted(means.columns), 2):
            both = means[[small, large]].dropna()
            row = {"metric": metric, "task": task, "small": small, "large": large, "arms": len(both)}
            if len(both) < FEWEST_ARMS:
                rows.append(row | {"reason": f"fewer than {FEWEST_ARMS} arms at both sizes"})
                continue
            row |= agreement(*both.to_numpy(float).T, seed=seed)
            of_large = seeds.loc[both.index, large].to_numpy(float)
            of_large = of_large[:, np.isfinite(of_large).all(axis=0)]
            pairs = [stats.kendalltau(*pair).statistic for pair in itertools.combinations(of_large.T, 2)]
            rows.append(row | {"seed_kendall": float(np.mean(pairs)) if pairs else math.nan, "reason": ""})
    return TRANSFER.frame(rows)


def agreement(small: np.ndarray, large: np.ndarray, seed: int = 0) -> dict:
    """Decision accuracy, Spearman's and Kendall's correlation of values of arms [arms] at two sizes, with intervals."""
    count = len(small)
    rho = float(stats.spearmanr(small, large).statistic)
    tau = float(stats.kendalltau(small, large).statistic)
    row = dict(zip(("accuracy", "accuracy_low", "accuracy_high"), decision_interval(small, large, seed), strict=True))
    of_rho = fisher_z(rho, math.sqrt((1 + rho**2 / 2) / (count - 3)))
    for name, value, (low, high) in (("spearman", rho, of_rho), ("kendall", tau, kendall_interval(tau, count))):
        row |= {name: value, f"{name}_low": low, f"{name}_high": high}
    return row


def decision_interval(small: np.ndarray, large: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """(share of pairs of arms that are in the same order at both sizes, ends of its 95 % interval), values [arms].

    Of pairs that differ at the large size; a tie at the small one counts half (DataDecide, arXiv 2504.11393). The
    interval is a bootstrap of arms. NaN without such a pair.
    """
    one, other = (np.sign(values[:, None] - values) for values in (small, large))
    differ = (other != 0).astype(float)
    agree = differ * (1 + one * other) / 2
    counts = _draws(len(small), seed)
    with np.errstate(invalid="ignore"):  # a draw of one arm alone has no pair
        shares = ((counts @ agree) * counts).sum(axis=1) / ((counts @ differ) * counts).sum(axis=1)
    if np.isnan(shares[0]):
        return math.nan, math.nan, math.nan
    low, high = np.nanquantile(shares[1:], [0.025, 0.975])
    return float(shares[0]), float(low), float(high)


@functools.lru_cache(maxsize=8)
def _draws(count: int, seed: int) -> np.ndarray:
    """How often each of `count` arms is in each draw, [1 + DRAWS, count]; all once first."""
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), DRAWS)
    return np.vstack([np.ones(count), drawn])


TRANSFER = Statistic(
    "transfer",
    "Does the order of arms at a small size hold at a larger one?",
    transfer,
    (
        *Column.texts(metric="the metric", task="the task or validation set"),
        Column("small", "1", "the small size"),
        Column("large", "1", "the large size"),
        Column("arms", "1", "arms with runs at both"),
        *(column for name, meaning, of in (
            ("accuracy", "decision accuracy: share of pairs of arms in the same order", "bootstrap of arms"),
            ("spearman", "rank correlation", "Fisher's z, Bonett and Wright"),
            ("kendall", "Kendall's tau-b", "Fisher's z, Fieller et al."),
        ) for column in Column.estimate(name, "1", meaning, "with few arms", of, prefix=f"{name}_")),
        Column("seed_kendall", "1", "mean tau of two seeds at the large size: the ceiling", "with one seed"),
        Column("reason", "", "why there is no value", "where there is one"),
    ),
    "DataDecide, arXiv 2504.11393; Bonett and Wright 2000; Fieller, Hartley and Pearson 1957",
    definition="Agreement of the order of arms by their means at the end of training at two sizes.",
    caveat="Where arms differ by less than seeds do, no order holds; the tau between two seeds shows how far.",
    chart=Chart("accuracy", panel="task", reference=0.5),
    count="arms",
)  # fmt: skip
