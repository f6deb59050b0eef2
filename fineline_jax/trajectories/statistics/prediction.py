"""Task dynamic prediction: do tasks of one domain move together, more than tasks of different domains do?

Curves of anything that grows correlate, and a hold-out on levels says yes to a quarter of nulls; so the verdict rests
on first differences alone. The statistic is the mean correlation of differences inside domains minus that across; its
null is the exchange of domain labels between tasks, which keeps every curve, every correlation and the number of pairs
as they are (a common trend or a global factor moves both means alike).
"""

import functools
import itertools
import math
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pandas as pd

from fineline_jax.trajectories.statistics.columns import Chart, Column, Statistic, groups, wide
from fineline_jax.trajectories.statistics.inference import LEVEL

DRAWS = 4999
"""Random exchanges where there are more different ones than that."""
FEWEST_DIFFERENCES = 8
JUMPS = 2
"""Steps of all curves at once, such as those of the first checkpoints, that a correlation is also given without."""
JUMP_SHARE = 0.3
"""A correlation that falls by more than this without them is said to come from them."""

YES, NO, DECLINED = "yes", "no", "declined"


def verdicts(table: pd.DataFrame, *, level: float = LEVEL, seed: int = 0) -> pd.DataFrame:
    """Of each (series, metric): do differences correlate more inside domains than across? See `VERDICTS`."""
    curves = groups(table, "series", "metric")
    return VERDICTS.frame(key | _verdict(*_matrix(part), level=level, seed=seed) for key, part in curves)


def effects(table: pd.DataFrame) -> pd.DataFrame:
    """Of each (series, metric, task): errors of predictions of its second half. See `EFFECTS`."""
    rows = []
    for key, part in groups(table, "series", "metric"):
        tokens, tasks, domains, values = _matrix(part)
        if len(tokens) < 4 or len(tasks) < 2:
            continue
        errors = holdout_errors(values, domains, tokens)
        for index, task in enumerate(tasks):
            row = key | {"task": task, "domain": domains[index], "checkpoints": len(tokens)}
            rows.append(row | {name: float(error[index]) for name, error in errors.items()})
    return EFFECTS.frame(rows)


def holdout_errors(values: np.ndarray, domains: np.ndarray, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Mean absolute error on the second half of each column of values [T, tasks], by predictor -> [tasks].

    A predictor x is fitted as a + b x on the first half. in_domain and out_of_domain: the mean of the other tasks, each
    in units of its first half; log_tokens: the trend; last: the first half's last value stays. NaN without such tasks.
    """
    half = len(values) // 2
    first, second = values[:half], values[half:]
    spread = first.std(axis=0)
    scaled = (values - first.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
    trend = np.log(np.maximum(tokens, tokens[tokens > 0].min() / 2 if (tokens > 0).any() else 1.0))
    errors = {name: np.full(values.shape[1], np.nan) for name in ("in_domain", "out_of_domain", "log_tokens", "last")}
    for task in range(values.shape[1]):
        inside = domains == domains[task]
        inside[task] = False
        predictors = {"log_tokens": trend}
        for name, others in (("in_domain", inside), ("out_of_domain", domains != domains[task])):
            if others.any():
                predictors[name] = scaled[:, others].mean(axis=1)
        for name, x in predictors.items():
            slope = np.cov(x[:half], first[:, task], bias=True)[0, 1] / (x[:half].var() or 1.0)
            predicted = first[:, task].mean() + slope * (x[half:] - x[:half].mean())
            errors[name][task] = np.abs(predicted - second[:, task]).mean()
        errors["last"][task] = np.abs(first[-1, task] - second[:, task]).mean()
    return errors


def exchanges(domains: np.ndarray, seed: int = 0, draws: int = DRAWS) -> tuple[np.ndarray, float]:
    """Labels [n, tasks] to compare with, the observed ones first, and the smallest p that an exact test could give.

    All different divisions of the tasks into domains of these sizes, or `draws` random ones where there are more.
    """
    _, labels = np.unique(domains, return_inverse=True)
    sizes = np.bincount(labels)
    # Labels of two domains of one size can be swapped without dividing the tasks otherwise.
    same = math.prod(math.factorial(count) for count in Counter(sizes.tolist()).values())
    count = math.factorial(len(labels)) // math.prod(math.factorial(int(size)) for size in sizes) // same
    if count <= draws:
        members = [tuple(np.flatnonzero(labels == label).tolist()) for label in range(len(sizes))]
        others = _divisions(tuple(range(len(labels))), sizes.tolist())
        divisions = [members, *(one for one in others if set(one) != set(members))]
        return np.array([_labels(one) for one in divisions]), 1 / count
    rng = np.random.default_rng(seed)
    return np.stack([labels, *(rng.permutation(labels) for _ in range(draws))]), 1 / count


def _divisions(tasks: tuple[int, ...], sizes: list[int]) -> Iterator[list[tuple[int, ...]]]:
    """Every division of the tasks into groups of these sizes, once."""
    if not tasks:
        yield []
    for size in set(sizes):
        for others in itertools.combinations(tasks[1:], size - 1):  # the group of the first task
            group, rest = (tasks[0], *others), sizes.copy()
            rest.remove(size)
            for groups_left in _divisions(tuple(task for task in tasks if task not in group), rest):
                yield [group, *groups_left]


def _labels(division: list[tuple[int, ...]]) -> list[int]:
    """The number of each task's group."""
    return [number for _, number in sorted((task, number) for number, group in enumerate(division) for task in group)]


def exchange_test(correlations: np.ndarray, domains: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """(mean inside - mean across of correlations [tasks, tasks], its one-sided p, the smallest p possible)."""
    labels, smallest = _exchanges_once(tuple(domains.tolist()), seed)
    gap = _gap_of(correlations, domains)
    apart = (correlations - np.diag(np.diag(correlations))).astype(np.float32)  # half the time of float64
    sizes = np.bincount(labels[0]).astype(float)
    inside, pairs = (sizes * (sizes - 1)).sum(), len(domains) * (len(domains) - 1.0)
    total = np.zeros(len(labels))  # over ordered pairs of one domain: members @ apart @ members
    for domain in range(len(sizes)):
        members = (labels == domain).astype(np.float32)
        total += np.einsum("ij,ij->i", members @ apart, members)
    gaps = total / inside - (apart.sum() - total) / (pairs - inside)
    return gap, float((gaps >= gaps[0] - 1e-6).mean()), smallest


def _gap_of(correlations: np.ndarray, domains: np.ndarray) -> float:
    """Mean of the correlations inside domains minus that across."""
    upper = np.triu_indices(len(domains), 1)
    same = domains[upper[0]] == domains[upper[1]]
    return float(correlations[upper][same].mean() - correlations[upper][~same].mean())


@functools.lru_cache(maxsize=8)
def _exchanges_once(domains: tuple[str, ...], seed: int) -> tuple[np.ndarray, float]:
    """`exchanges`; series of one suite have the same domains."""
    return exchanges(np.array(domains), seed)


def inside_correlation(differences: np.ndarray, domains: np.ndarray) -> float:
    """Mean correlation of columns of one domain, differences [T, tasks]; NaN without two such columns that vary."""
    upper = np.triu_indices(len(domains), 1)
    same = domains[upper[0]] == domains[upper[1]]
    if not same.any() or (differences.std(axis=0) == 0).any():
        return float("nan")
    return float(np.corrcoef(differences.T)[upper][same].mean())


def _verdict(
    tokens: np.ndarray, tasks: list[str], domains: np.ndarray, values: np.ndarray, *, level: float, seed: int
) -> dict:
    moving = np.ptp(np.diff(values, axis=0), axis=0) > 0 if len(values) > 2 else np.zeros(len(tasks), bool)
    values, domains = values[:, moving], domains[moving]
    differences = np.diff(values, axis=0)
    row: dict = {"checkpoints": len(tokens), "tasks": len(domains), "domains": len(set(domains))}
    decline = lambda why: row | {"verdict": DECLINED, "reason": why}
    if len(differences) < FEWEST_DIFFERENCES:
        return decline(f"fewer than {FEWEST_DIFFERENCES + 1} checkpoints at which every task was scored")
    largest = np.argsort(-np.abs(differences / differences.std(axis=0)).sum(axis=1), kind="stable")[:JUMPS]
    inside = inside_correlation(differences, domains)
    calm = inside_correlation(np.delete(differences, largest, axis=0), domains)
    row |= {"inside": inside, "inside_without_jumps": calm}
    if len(set(domains)) < 2 or max(Counter(domains).values()) < 2:
        why = "it takes two domains, one of them with two tasks"
        if inside - calm > JUMP_SHARE:
            why += f"; the correlation of {inside:.2f} comes from the {JUMPS} largest jumps, without them {calm:.2f}"
        return decline(why)
    gap, p, smallest = exchange_test(np.corrcoef(differences.T), domains, seed)
    row |= {"gap": gap, "gap_of_levels": _gap_of(np.corrcoef(values.T), domains), "p": p, "smallest_p": smallest}
    if smallest > level:
        return decline(f"with these domains no result could have a p below {smallest:.2g}")
    return row | {"verdict": YES if p <= level else NO, "reason": ""}


def _matrix(part: pd.DataFrame) -> tuple[np.ndarray, list[str], np.ndarray, np.ndarray]:
    """(tokens [T], tasks, their domains, values [T, tasks]) of one series and metric."""
    curves = wide(part, by="task")
    domain = part.drop_duplicates("task").set_index("task")["domain"]
    tasks = [str(task) for task in curves.columns]
    return curves.index.to_numpy(float), tasks, domain[tasks].to_numpy(str), curves.to_numpy(float)


_KEY = Column.texts(series="the series", metric="the metric")

VERDICTS = Statistic(
    "task_prediction",
    "Do tasks of one domain move together?",
    verdicts,
    (
        *_KEY,
        Column("checkpoints", "1", "checkpoints at which every task was scored"),
        Column("tasks", "1", "tasks whose score changes at all"),
        Column("domains", "1", "domains of those tasks"),
        Column("inside", "1", "mean correlation of first differences inside domains", "with fewer than 9 checkpoints"),
        Column("inside_without_jumps", "1", "the same without the two largest jumps of all curves", "as inside"),
        Column("gap", "1", "inside minus the same across domains", "with too few checkpoints or domains"),
        Column("gap_of_levels", "1", "the same of the scores themselves: large for any curves that grow", "as gap"),
        Column("p", "1", "share of exchanges of the domain labels with at least this gap", "as gap"),
        Column("smallest_p", "1", "the least p that these numbers of tasks allow", "as gap"),
        Column("verdict", "", "yes: p at most 5 %; no; declined"),
        Column("reason", "", "why it is declined", "where it is not"),
    ),
    "exchange of labels: Good 2005, Permutation, Parametric and Bootstrap Tests of Hypotheses, ch. 3",
    definition="Mean correlation of first differences between checkpoints of two tasks of one domain, minus that of "
    "two tasks of different domains; p is the share of exchanges of the domain labels with at least this gap.",
    caveat="Scores that grow correlate whatever their domains are, so the gap of levels is no evidence. A yes says "
    "that tasks of a domain move together from checkpoint to checkpoint, not that one causes the other.",
    chart=Chart("gap", panel="metric", reference=0.0),
    count="tasks",
)

EFFECTS = Statistic(
    "task_prediction_errors",
    "How well do other tasks predict the second half of a curve?",
    effects,
    (
        *_KEY,
        *Column.texts(task="the task whose second half is predicted", domain="its domain"),
        Column("checkpoints", "1", "at which all tasks were scored"),
        Column("in_domain", "score", "mean absolute error with the other tasks of its domain", "where it has none"),
        Column("out_of_domain", "score", "with the tasks of all other domains", "where there are none"),
        Column("log_tokens", "score", "with the trend in log tokens of its first half"),
        Column("last", "score", "with the last value of its first half"),
    ),
    "arXiv 2404.01204, Task Dynamic Prediction; the definition is ours",
    definition="Mean absolute error on the second half of a curve, predicted from its first half by a line on the mean "
    "of the other tasks of its domain, on that of other domains, on log tokens, or by its last value.",
    caveat="An error without an interval: the verdict is in the section on tasks that move together.",
    chart=Chart("in_domain", panel="metric"),
    count="checkpoints",
)
