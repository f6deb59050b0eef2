"""Cross-domain promotion: which domain is learned before which, and is the order of tasks the same in all series?

The clock of a task is log2 of the tokens at half of its rise. No lagged correlations: 12 to 27 checkpoints hold none.
"""

import itertools
import math

import numpy as np
import pandas as pd
from scipy import special, stats

from fineline_jax.trajectories.runs.clock import clocks
from fineline_jax.trajectories.statistics.columns import Chart, Column, Statistic, shots_of
from fineline_jax.trajectories.statistics.inference import LEVEL, holm

EARLIER, LATER, UNRESOLVED = "earlier", "later", "no order resolved"
ONE_TASK = "a domain with one task"


def task_order(table: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """When each task of each (series, metric) was learned, and its place in the order. See `TASK_ORDER`."""
    rows = []
    for (series, metric), unordered in clocks(table, seed=seed).items():
        found = sorted(unordered, key=lambda clock: clock.log2)
        if not found:
            continue
        ranks = stats.rankdata(np.array([clock.drawn for clock in found]), axis=0)
        for place, (clock, of_task) in enumerate(zip(found, ranks, strict=True), start=1):
            low, high = 2 ** np.quantile(clock.drawn, [0.025, 0.975])
            row = {"series": series, "metric": metric, "task": clock.task, "domain": clock.domain, "place": place}
            row |= {"tokens": 2**clock.log2, "low": min(low, 2**clock.log2), "high": max(high, 2**clock.log2)}
            first, last = np.quantile(of_task, [0.025, 0.975])
            rows.append(row | {"first_place": min(first, place), "last_place": max(last, place), "tasks": len(found)})
    return TASK_ORDER.frame(rows)


def precedence(table: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """Of each (series, metric) and pair of domains: which was learned first? See `PRECEDENCE`."""
    rows = []
    for (series, metric), found in clocks(table, seed=seed).items():
        domains = {}  # -> log2 tokens of each clock, the mean over clocks of each draw
        for domain in dict.fromkeys(clock.domain for clock in found):
            times, drawn = zip(*((clock.log2, clock.drawn) for clock in found if clock.domain == domain), strict=True)
            domains[domain] = np.array(times), np.mean(drawn, axis=0)
        earliest_first = sorted(domains, key=lambda domain: domains[domain][0].mean())
        family = []
        for one, other in itertools.combinations(earliest_first, 2):
            row = {"series": series, "metric": metric, "domain": one, "other": other}
            family.append(row | _gap(domains[one], domains[other]))
        # a domain is more than the tasks at hand: both kinds of error have to leave no doubt, and one task says nothing
        doubts = np.array([np.maximum(row["p"], row.get("p_tasks", math.nan)) for row in family], float)
        for row, p in zip(family, holm(doubts), strict=True):
            verdict = UNRESOLVED if not p <= LEVEL else EARLIER if row["doublings"] < 0 else LATER
            rows.append(row | {"p_holm": p, "verdict": verdict})
    return PRECEDENCE.frame(rows)


def _gap(one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]) -> dict:
    """Columns tasks to p_tasks of PRECEDENCE for the clocks of two domains."""
    times, drawn = (one[0], other[0]), one[1] - other[1]
    gap = float(times[0].mean() - times[1].mean())
    # the spread of the draws around their own middle, so that a bias of the drawn curves is not taken for a gap
    spread = float(drawn.std(ddof=1))
    p = float(2 * special.ndtr(-abs(gap) / spread)) if spread else 1.0
    low, high = gap + np.array([-1.96, 1.96]) * spread
    row = {
        "tasks": len(times[0]),
        "other_tasks": len(times[1]),
        "doublings": gap,
        "low": float(low),
        "high": float(high),
    }
    if min(map(len, times)) > 1:
        row["p_tasks"] = float(stats.ttest_ind(*times, equal_var=False).pvalue)
    one_task = ONE_TASK if min(map(len, times)) < 2 else ""
    return row | {"p": p, "reason": one_task}


def concordance(table: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """Of each metric: do series agree in the order in which tasks were learned? See `CONCORDANCE`."""
    rows, times = [], dict[tuple[str, str], dict[str, dict[str, float]]]()
    for (series, metric), found in clocks(table, draws=0, seed=seed).items():
        times.setdefault((metric, shots_of(series)), {})[series] = {clock.task: clock.log2 for clock in found}
    for (metric, shots), of_series in times.items():
        matrix = pd.DataFrame(of_series).dropna()
        row = {"metric": metric, "shots": shots, "series": matrix.shape[1], "tasks": len(matrix)}
        if min(matrix.shape) < 2 or len(matrix) < 3:
            rows.append(row | {"reason": "it takes two series and three tasks that were learned in all of them"})
            continue
        row["w"], row["chi2"], row["p"] = kendall_w(matrix.to_numpy(float))
        rows.append(row | {"reason": ""})
    return CONCORDANCE.frame(rows)


def kendall_w(times: np.ndarray) -> tuple[float, float, float]:
    """(Kendall's W, its chi-square, its p) of times [tasks, series], corrected for ties."""
    tasks, series = times.shape
    ranks = stats.rankdata(times, axis=0)
    sums = ranks.sum(axis=1)
    ties = sum(float((count**3 - count).sum()) for count in (np.unique(r, return_counts=True)[1] for r in ranks.T))
    below = series**2 * (tasks**3 - tasks) - series * ties
    w = 12 * float(((sums - sums.mean()) ** 2).sum()) / below if below else float("nan")
    chi2 = series * (tasks - 1) * w
    return w, chi2, float(stats.chi2.sf(chi2, tasks - 1))


_KEY = Column.texts(series="the series", metric="the metric")

TASK_ORDER = Statistic(
    "task_order",
    "In which order were tasks learned?",
    task_order,
    (
        *_KEY,
        *Column.texts(task="the task", domain="its domain"),
        Column("place", "1", "its place in the order, 1 is first"),
        *Column.estimate("tokens", "tokens", "at half of its rise"),
        Column("first_place", "1", "lower end of the 95 % interval of its place"),
        Column("last_place", "1", "upper end"),
        Column("tasks", "1", "tasks of the series that rose"),
    ),
    "arXiv 2404.01204, Cross-domain Promotion; isotonic regression: Barlow et al. 1972",
    definition="Tokens at which the isotonic fit reaches half of the rise from chance to the level at the end; the "
    "intervals are a bootstrap of the errors around the fit.",
    caveat="Of a task that still rises the half is that of the rise so far; a longer run would put it later.",
    chart=Chart("tokens", panel="metric"),
    count="tasks",
)

PRECEDENCE = Statistic(
    "domain_precedence",
    "Which domain was learned before which?",
    precedence,
    (
        *_KEY,
        *Column.texts(domain="the domain", other="another"),
        Column("tasks", "1", "tasks of the domain that rose"),
        Column("other_tasks", "1", "tasks of the other"),
        *Column.estimate(
            "doublings", "doublings", "mean log2 tokens of the one minus the other's", of="of these tasks"
        ),
        Column("p", "1", "two-sided, of these tasks: bootstrap of the curves' errors"),
        Column("p_tasks", "1", "two-sided, of tasks like these: Welch's t over tasks", "with one task in a domain"),
        Column("p_holm", "1", "larger of p and p_tasks, over pairs of series and metric (Holm)", "if one has one task"),
        Column("verdict", "", "earlier, later (p_holm at most 5 %), no order resolved"),
        Column("reason", "", "why an order cannot be resolved", "where it could be"),
    ),
    "arXiv 2404.01204, Cross-domain Promotion; Efron and Tibshirani 1993; Welch 1947",
    definition="Difference of the mean log2 tokens at half of the rise between tasks of two domains.",
    caveat="It says what was learned first, not that the one helped the other. A domain with one task has no order.",
    chart=Chart("doublings", panel="metric", reference=0.0),
    count="tasks",
)

CONCORDANCE = Statistic(
    "order_concordance",
    "Do series agree in the order of learning?",
    concordance,
    (
        Column("metric", "", "the metric"),
        Column("shots", "", "shots that the names of the series state", "where they state none"),
        Column("series", "1", "series compared"),
        Column("tasks", "1", "tasks that rose in all of them"),
        Column("w", "1", "Kendall's W: 1 is the same order in all, 0 none", "with few series or tasks"),
        Column("chi2", "1", "its chi-square statistic (Friedman)", "as w"),
        Column("p", "1", "that orders without agreement give as much", "as w"),
        Column("reason", "", "why there is no value", "where there is one"),
    ),
    "Kendall and Babington Smith 1939; Friedman 1937",
    definition="Agreement of the ranks of tasks by tokens at half of the rise over series.",
    caveat="Series that share data and tokenizer agree for that reason too.",
    chart=Chart("w"),
    count="tasks",
)
