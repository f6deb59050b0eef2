"""How many tokens an arm takes to reach a loss or a score, and how many times those of another arm.

Of every run the tokens are where the isotonic fit of its curve first reaches the target; arms are compared by the
mean over seeds of their logarithm, with the variance between runs pooled over the arms (`arms.run_variance`). Series
that are no arms are compared by their tokens to the fixed score of `DYNAMICS`, whose intervals are of the questions.
"""

import math
from collections.abc import Mapping

import numpy as np
import pandas as pd

from fineline_jax.facts.metrics import metric_of
from fineline_jax.trajectories.ablation.arms import arms_of, end_values, run_variance
from fineline_jax.trajectories.curves.isotonic import crossing
from fineline_jax.trajectories.statistics.columns import Chart, Column, Statistic
from fineline_jax.trajectories.statistics.comparison import pairs_with_first
from fineline_jax.trajectories.statistics.dynamics import BEFORE_FIRST, REACHED
from fineline_jax.trajectories.statistics.inference import interval, student


def tokens_to(
    table: pd.DataFrame, *, targets: Mapping[tuple[str, str], float] | None = None, reference: str | None = None
) -> pd.DataFrame:
    """Tokens of each (arm, metric, task) to its target. See `TOKENS_TO`.

    targets: by (metric, task); of others, the end of the worst run, which all runs reach. reference: an arm; None: the
    first.
    """
    table, ends = arms_of(table), end_values(table)
    reference = table["arm"].iloc[0] if reference is None else reference
    rows = []
    for (metric, task), part in table.groupby(["metric", "task"], sort=False, observed=True):
        better = metric_of(str(metric)).better
        levels = better * ends[(ends["metric"] == metric) & (ends["task"] == task)]["value"]
        given = None if targets is None else targets.get((str(metric), str(task)))
        if given is None and levels.empty:
            continue
        target = float(levels.min()) if given is None else better * given
        runs = run_tokens(part, target, better)
        reached = np.isfinite(runs["log2"])
        of_runs = (runs[name][reached].to_numpy() for name in ("log2", "arm", "seed"))
        variance, freedom, _ = run_variance(*of_runs) if reached.any() else (math.nan, 0.0, "")
        base = runs[runs["arm"] == reference]["log2"]
        for arm, of_arm in runs.groupby("arm", sort=False, observed=True):
            log2 = of_arm["log2"]
            row = {"arm": arm, "reference": reference, "metric": metric, "task": task, "target": better * target}
            row |= {"runs": len(log2), "reached": int(np.isfinite(log2).sum())}
            if not np.isfinite(log2).all():
                end = 2 ** float(of_arm["last"].min())
                row |= {"reason": f"not every run reached it; the shortest has {end:.3g} tokens"}
                rows.append(row)
                continue
            mean = float(log2.mean())
            low, high = interval(mean, math.sqrt(variance / len(log2)), freedom)
            row |= {"tokens": 2**mean, "low": 2**low, "high": 2**high}
            row |= {"reason": "one run had reached it at its first checkpoint" if of_arm["censored"].any() else ""}
            if arm != reference and np.isfinite(base).all() and len(base):
                gap, error = mean - float(base.mean()), math.sqrt(variance * (1 / len(log2) + 1 / len(base)))
                row["log2_ratio"], (row["ratio_low"], row["ratio_high"]) = gap, interval(gap, error, freedom)
                if freedom and error:
                    row["p"] = student(gap, error, freedom)["p"]
            rows.append(row)
    return TOKENS_TO.frame(rows)


def to_fixed_score(summary: pd.DataFrame) -> pd.DataFrame:
    """TOKENS_TO of every series, metric and task that has a fixed score; the reference is the first with as many shots.

    summary: a frame of `DYNAMICS`. Tasks whose score no series reached are left out. Ratios have the errors of both
    times, half the width of their intervals in log2 over 1.96, as if their questions were not the same.
    """
    scored = summary[summary["score"].notna()]
    scored = scored[scored.groupby(["metric", "task"], observed=True)["to_score"].transform("count") > 0]
    first, clocks, rows = dict(pairs_with_first(map(str, summary["series"].unique()))), {}, []
    for one in scored.to_dict("records"):
        of = one["metric"], one["task"], one["score"]
        ends = [math.log2(one[name]) for name in ("to_score_low", "to_score_high") if 0 < one[name] < math.inf]
        half = (ends[1] - ends[0]) / 2 if len(ends) == 2 else math.nan
        clocks[one["series"], *of] = math.log2(one["to_score"]) if one["to_score"] > 0 else math.nan, half
    for one in scored.to_dict("records"):
        series, of = one["series"], (one["metric"], one["task"], one["score"])
        row = {"arm": series, "reference": first.get(series, series)} | dict(zip(("metric", "task", "target"), of))
        row |= {"runs": 1, "reached": int(one["to_score_outcome"] in (REACHED, BEFORE_FIRST))}
        (log2, half), (base, base_half) = clocks[series, *of], clocks.get((row["reference"], *of), (math.nan, math.nan))
        if math.isnan(log2):
            rows.append(row | {"reason": one["to_score_outcome"]})
            continue
        row |= {"tokens": one["to_score"], "low": one["to_score_low"], "high": one["to_score_high"]}
        if row["reference"] != series:
            gap, error = log2 - base, math.hypot(half, base_half)
            row |= {"log2_ratio": gap, "ratio_low": gap - error, "ratio_high": gap + error}
        rows.append(row)
    return TOKENS_TO.frame(rows)


def run_tokens(part: pd.DataFrame, target: float, better: int) -> pd.DataFrame:
    """Columns series, arm, seed, log2 (of the tokens to `target`, NaN: never), last (log2), censored: reached at the
    first checkpoint; a row per series of one metric and task. Checkpoints without tokens are left out."""
    rows = []
    for series, curve in part[part["tokens"] > 0].groupby("series", sort=False, observed=True):
        curve = curve.sort_values("tokens")
        tokens, values = curve["tokens"].to_numpy(float), better * curve["value"].to_numpy(float)
        at = float(crossing(values, np.ones(len(values)), tokens, np.array([target]))[0])
        row = {
            "series": series,
            "arm": curve["arm"].iloc[0],
            "seed": curve["seed"].iloc[0],
            "last": math.log2(tokens[-1]),
        }
        rows.append(row | {"log2": math.log2(at) if at > 0 else math.nan, "censored": at == tokens[0]})
    return pd.DataFrame(rows, columns=["series", "arm", "seed", "log2", "last", "censored"])


TOKENS_TO = Statistic(
    "tokens_to",
    "How many tokens does an arm or run take to reach the same value?",
    tokens_to,
    (
        *Column.texts(arm="the arm, or the run", reference="what it is compared with"),
        *Column.texts(metric="the metric", task="the task or validation set"),
        Column("target", "score", "the value to reach: the end of the worst run, or as given; of runs the fixed score"),
        Column("runs", "1", "runs (seeds) of the arm"),
        Column("reached", "1", "of them, those that reached it"),
        Column("tokens", "tokens", "geometric mean over the runs", "where a run did not", interval=("low", "high")),
        *Column.ends("tokens", "with one seed per arm", "between seeds; without arms, of the questions"),
        Column(
            "log2_ratio", "doublings", "log2 of its tokens over the reference's: 1 is twice as many",
            "of the reference, or where a run of either did not reach it", ("ratio_low", "ratio_high"),
        ),
        *Column.ends("doublings", "with one seed per arm", "as of tokens", prefix="ratio_"),
        Column("p", "1", "two-sided, Student's t over seeds", "without seeds"),
        Column("reason", "", "what is missing", "where nothing is"),
    ),
    "isotonic regression: Barlow et al. 1972; Student's t of log2 tokens",
    definition="Tokens at which the isotonic fit of a run's curve first reaches the target, averaged over seeds as "
    "logarithms.",
    caveat="Under a decaying learning rate a run reaches its last values late for the sake of its schedule.",
    chart=Chart("log2_ratio", panel="metric", reference=0.0),
    count="reached",
)  # fmt: skip
