"""Do runs learn tasks in the same order, and which curves fall before they rise?

Two runs of different size, batch or data can differ by no more than two seeds do; so the agreement of two arms stands
beside that of two seeds of one arm, which no pair of arms can be expected to exceed.
"""

import itertools
import math
from collections.abc import Iterable

import numpy as np
import pandas as pd
from scipy import stats

from fineline_jax.facts.metrics import metric_of
from fineline_jax.trajectories.ablation.arms import arms_of
from fineline_jax.trajectories.curves import isotonic
from fineline_jax.trajectories.curves.smooth import end_level, mean_of_three
from fineline_jax.trajectories.curves.split import CURVE, Points, split
from fineline_jax.trajectories.statistics.columns import Chart, Column, Statistic, groups, shots_of
from fineline_jax.trajectories.statistics.comparison import DECLINED
from fineline_jax.trajectories.statistics.inference import LEVEL, false_discovery, kendall_interval

FEWEST_TASKS = 5
RISE_Z = 3.0
"""A task counts where the end of the worst run is above the baseline by so many standard errors."""
SHARE = 0.5
DRAWS = 200
FIRST_DRAWS, NO_DIP = 20, 0.3
"""A dip whose p is above NO_DIP by so many draws gets no more of them."""
CLEAR = 1.0
"""A dip of means of three that is less deep than a standard error of one checkpoint gets p = 1 without draws."""


def order_agreement(table: pd.DataFrame) -> pd.DataFrame:
    """Of each metric and pair of arms: agreement of the order in which tasks reached a fixed score.

    The score of a task is half-way from its baseline to the end of the worst run, so every run reaches it.
    See `ORDER_AGREEMENT`.
    """
    rows = []
    shots = {name: shots_of(str(name)) for name in table["series"].unique()}
    for key, part in groups(arms_of(table).assign(shots=table["series"].map(shots)), "metric", "shots"):
        times = fixed_score_times(part, metric_of(str(key["metric"])).better)
        runs_of = part.groupby("arm", sort=False, observed=True)["series"].unique()
        arms = {str(arm): [str(run) for run in runs] for arm, runs in runs_of.items()}
        within = [pair for runs in arms.values() for pair in itertools.combinations(runs, 2)]
        within = _taus(times, within) if len(times) >= FEWEST_TASKS else []
        for one, other in itertools.combinations(arms, 2):
            row = key | {"arm": one, "other": other, "tasks": len(times)}
            if len(times) < FEWEST_TASKS:
                rows.append(row | {"reason": f"fewer than {FEWEST_TASKS} tasks that rose in every run"})
                continue
            pairs = _taus(times, itertools.product(arms[one], arms[other]))
            tau = float(np.mean(pairs))
            low, high = kendall_interval(tau, len(times))
            row |= {"run_pairs": len(pairs), "kendall": tau, "low": low, "high": high, "seed_pairs": len(within)}
            rows.append(row | {"seed_kendall": float(np.mean(within)) if within else math.nan, "reason": ""})
    return ORDER_AGREEMENT.frame(rows)


def _taus(times: pd.DataFrame, pairs: Iterable[tuple[str, str]]) -> list[float]:
    return [stats.kendalltau(times[one], times[other]).statistic for one, other in pairs]


def fixed_score_times(part: pd.DataFrame, better: int) -> pd.DataFrame:
    """log2 tokens [tasks, series] at which each run of one metric reached the task's fixed score; the tasks that rose
    clearly in every series."""
    times, series = {}, part["series"].nunique()
    tasks: dict[str, dict[str, Points]] = {}
    for (task, name), curve in split(part[part["tokens"] > 0], ("task", "series")):
        tasks.setdefault(task, {})[name] = curve
    for task, curves in tasks.items():
        ends = {name: float(end_level(better * curve.value, curve.tokens)) for name, curve in curves.items()}
        errors = [curve.errors()[-1] for curve in curves.values()]
        chance = next(iter(curves.values())).chance
        firsts = [better * curve.value[0] for curve in curves.values()]
        baseline = better * chance if math.isfinite(chance) else float(np.mean(firsts))
        error = float(np.nanmax(errors)) if np.isfinite(errors).any() else math.nan
        if len(ends) < series or not min(ends.values()) - baseline > RISE_Z * error:
            continue
        target = np.array([baseline + SHARE * (min(ends.values()) - baseline)])
        times[task] = {
            name: math.log2(isotonic.crossing(better * c.value, np.ones(len(c.value)), c.tokens, target)[0])
            for name, c in curves.items()
        }
    return pd.DataFrame(times).T.dropna()


def dips(table: pd.DataFrame, *, draws: int = DRAWS, seed: int = 0) -> pd.DataFrame:
    """Curves that fall and rise again by more than their errors explain. See `DIPS`."""
    rows, normals = [], dict[int, np.ndarray]()
    for key, curve in split(table, CURVE):
        better, tokens = metric_of(key[1]).better, curve.tokens
        values, error = better * curve.value, curve.stderr
        if len(values) < 5 or not error.all():
            continue
        depth, at = dip(values)
        row = dict(zip(CURVE, key, strict=True)) | {"checkpoints": len(values)}
        row |= {"depth": float(depth), "tokens": tokens[int(at)], "value": float(better * values[int(at)])}
        if not np.isfinite(error).all():  # scatter of late checkpoints is no error of early ones
            rows.append(row | {"p": math.nan, "verdict": DECLINED, "reason": "no standard errors"})
            continue
        if depth < CLEAR * float(np.median(error)):
            rows.append(row | {"p": 1.0})
            continue
        if len(values) not in normals:
            normals[len(values)] = np.random.default_rng(seed).standard_normal((draws, len(values)), np.float32)
        rising, noise = isotonic.fit(values, 1 / error**2).astype(np.float32), normals[len(values)]
        p = _dip_p(float(depth), rising + noise[:FIRST_DRAWS] * error.astype(np.float32))
        rows.append(row | {"p": p if p > NO_DIP else _dip_p(float(depth), rising + noise * error.astype(np.float32))})
    rates = false_discovery(np.array([row["p"] for row in rows], float))
    for row, rate in zip(rows, rates, strict=True):
        called = "falls and rises again" if rate <= LEVEL else "no dip resolved"
        row |= {"q": rate, "verdict": row.get("verdict", called), "reason": row.get("reason", "")}
    return DIPS.frame(rows)


def _dip_p(depth: float, drawn: np.ndarray) -> float:
    """Chance of a dip of this depth in curves like those drawn: depths are maxima, so by moments a Gumbel distribution,
    whose tail reaches further than the draws."""
    null = dip(drawn)[0].astype(float)
    scale = max(float(null.std(ddof=1)) * math.sqrt(6) / math.pi, 1e-300)
    return -math.expm1(-math.exp(min(700.0, -(depth - float(null.mean())) / scale - np.euler_gamma)))


def dip(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(depth, index) of the deepest dip of curves [..., checkpoints] that should rise: the largest over checkpoints of
    how far one lies below both the highest before it and the highest after it, of means of three."""
    smooth = mean_of_three(values)
    before = np.maximum.accumulate(smooth, axis=-1)
    after = np.flip(np.maximum.accumulate(np.flip(smooth, -1), axis=-1), -1)
    below = np.minimum(before, after) - smooth
    return below.max(axis=-1), below.argmax(axis=-1) + 1


ORDER_AGREEMENT = Statistic(
    "order_agreement",
    "Do runs learn tasks in the same order?",
    order_agreement,
    (
        *Column.texts(metric="the metric"),
        Column("shots", "", "shots that the names of the series state", "where they state none"),
        *Column.texts(arm="the arm", other="another"),
        Column("tasks", "1", "tasks that rose clearly in every run"),
        Column("run_pairs", "1", "pairs of runs, one of each arm", "with few tasks"),
        *Column.estimate("kendall", "1", "mean Kendall's tau of the order of tasks", "with few tasks", "over tasks"),
        Column("seed_pairs", "1", "pairs of seeds of one arm, of all arms", "with few tasks"),
        Column("seed_kendall", "1", "mean tau of two seeds of one arm: the ceiling", "with one seed per arm"),
        Column("reason", "", "why there is no value", "where there is one"),
    ),
    "Kendall 1938; interval: Fieller, Hartley and Pearson 1957",
    definition="Order of tasks by the tokens at which a run reached a fixed score: half-way from the baseline to "
    "the end of the worst run.",
    caveat="An agreement as low as that of two seeds says nothing about what differs between the arms.",
    chart=Chart("kendall", panel="metric"),
    count="tasks",
)

DIPS = Statistic(
    "dips",
    "Which curves fall before they rise again?",
    dips,
    (
        *Column.texts(series="the series", metric="the metric", task="the task"),
        Column("checkpoints", "1", "checkpoints of the curve"),
        Column("depth", "score", "of the deepest dip below what came before and after it, of means of three"),
        Column("tokens", "tokens", "where the dip is deepest"),
        Column("value", "score", "the score there"),
        Column("p", "1", "chance that a curve without a dip (the isotonic fit with this noise) dips as deep"),
        Column("q", "1", "p as false discovery rate over all curves (Benjamini-Hochberg)"),
        *Column.texts(verdict="falls and rises again (q at most 5 %), no dip resolved, declined"),
        Column("reason", "", "why there is no answer", "where there is one"),
    ),
    "parametric bootstrap under monotonicity, Gumbel's tail by moments; Benjamini and Hochberg 1995",
    definition="How far a mean of three checkpoints lies below the highest before and the highest after it, against "
    "curves drawn around the non-decreasing fit with the curve's errors.",
    caveat="Scatter from checkpoint to checkpoint beyond the standard errors also counts as a dip.",
    chart=Chart("depth", panel="metric"),
    count="checkpoints",
)
