"""Is one arm better than another at equal tokens, by how much, and how many seeds would it take to say so?

Runs differ by their seeds, and scores by the documents that were asked; a difference of two arms has both errors. For
y[a, s, d], arm a, seed s, document d, with runs inside arms and documents crossed with them, the variance of a
difference of arm means is

    v (1/S_a + 1/S_b)                                           v: variance of run means inside arms, pooled over arms
    + max(0, var_d(D) - e (1/S_a + 1/S_b)) / N                  D: difference of arm means per document, e: residual

with Satterthwaite's degrees of freedom. Without scores of single documents only the first line is there, which
holds for these documents. One seed per arm says nothing about arms: what two seeds differ by is not known.
"""

import math

import numpy as np
import pandas as pd
from scipy import stats

from fineline_jax.errors import UserError
from fineline_jax.facts.metrics import metric_of
from fineline_jax.trajectories.ablation.arms import arms_of, end_values, run_variance, seeds_to_resolve
from fineline_jax.trajectories.statistics.columns import Chart, Column, Statistic
from fineline_jax.trajectories.statistics.comparison import BETTER, DECLINED, UNRESOLVED, WORSE
from fineline_jax.trajectories.statistics.inference import LEVEL, false_discovery, holm, student

RESOLUTION = 0.01
UNEQUAL_LEVEL = 0.01
"""Levene's test (medians) of equal spread of arms; below it a difference rests on its own two arms (Welch)."""
ALL_TASKS = "all tasks"


def differences(
    table: pd.DataFrame,
    *,
    reference: str | None = None,
    documents: pd.DataFrame | None = None,
    resolution: float = RESOLUTION,
) -> pd.DataFrame:
    """Each arm minus `reference` (None: the first arm) at the end, per metric and task. See `DIFFERENCES`.

    documents: columns series, metric, task, document, value: scores of single documents at the end of each run, which
    then stand for the table's. resolution: the difference whose number of seeds is told.
    Raises UserError where the reference is no arm.
    """
    ends = end_values(table)
    arms = list(dict.fromkeys(arms_of(table)["arm"]))
    reference = str(arms[0]) if reference is None else reference
    if reference not in arms:
        raise UserError(f"reference arm {reference!r}: not there; it is one of {', '.join(map(str, arms))}")
    rows = []
    for metric, of_metric in ends.groupby("metric", sort=False, observed=True):
        better = metric_of(str(metric)).better
        cells = {str(task): part for task, part in of_metric.groupby("task", sort=False, observed=True)}
        matrices = {task: document_matrix(documents, part, str(metric), task) for task, part in cells.items()}
        for task, matrix in matrices.items():
            if matrix is not None:
                cells[task] = cells[task].assign(value=matrix.mean(axis=1))
        if len(cells) > 1:
            of_tasks = pd.concat([part.set_index("series")["value"] for part in cells.values()], axis=1, join="inner")
            runs = next(iter(cells.values())).drop(columns="value")
            cells[ALL_TASKS] = runs.merge(of_tasks.mean(axis=1).rename("value").reset_index(), on="series")
        family = []
        for arm in arms:
            if arm == reference:
                continue
            of_documents = []
            for task, part in cells.items():
                row = {"arm": arm, "reference": reference, "metric": metric, "task": task}
                who = part["arm"].to_numpy(), part["seed"].to_numpy()
                asked, matrix = (0.0, math.inf), matrices.get(task)
                if matrix is not None:
                    asked = document_variance(matrix, who[0], arm, reference)
                    of_documents.append(asked)
                elif task == ALL_TASKS and len(of_documents) == len(matrices):
                    variances, freedoms = zip(*of_documents, strict=True)
                    asked = sum(variances) / len(variances) ** 2, min(freedoms)
                values = better * part["value"].to_numpy(float)
                family.append(row | arm_difference(values, *who, arm, reference, asked, resolution))
        p = np.array([row.get("p", math.nan) for row in family], float)
        for row, of_all, rate in zip(family, holm(p), false_discovery(p), strict=True):
            rows.append(row | {"p_holm": of_all, "q": rate} | _verdict(row, of_all, resolution))
    return DIFFERENCES.frame(rows)


def arm_difference(
    values: np.ndarray,
    arms: np.ndarray,
    seeds: np.ndarray,
    arm: str,
    reference: str,
    asked: tuple[float, float] = (0.0, math.inf),
    resolution: float = RESOLUTION,
) -> dict:
    """Columns runs to p of DIFFERENCES for one value per run, [runs], higher is better.

    asked: (variance of the difference from the documents asked, its degrees of freedom).
    """
    one, other = values[arms == arm], values[arms == reference]
    row: dict = {"runs": len(one), "reference_runs": len(other)}
    if not len(one) or not len(other):
        return row | {"reason": "no run of one arm reached the end"}
    mean = float(one.mean() - other.mean())
    row |= {"difference": mean, "stderr_documents": math.sqrt(asked[0]) if np.isfinite(asked[1]) else math.nan}
    variance, freedom, design = run_variance(values, arms, seeds)
    if min(len(one), len(other)) < 2:
        return row | {"reason": "one run per arm: what two seeds of one arm differ by is not known"}
    of_runs = variance * (1 / len(one) + 1 / len(other))
    if _unequal(values, arms):
        parts = one.var(ddof=1) / len(one), other.var(ddof=1) / len(other)
        of_runs, design = float(sum(parts)), "two arms"
        freedom = of_runs**2 / sum(part**2 / (n - 1) for part, n in zip(parts, (len(one), len(other)), strict=True))
        variance = of_runs / (1 / len(one) + 1 / len(other))
    total = of_runs + asked[0]
    row |= {"stderr_runs": math.sqrt(of_runs), "stderr": math.sqrt(total), "design": design}
    if total == 0:
        return row | {"reason": "no run differs from another"}
    freedom = total**2 / (of_runs**2 / freedom + asked[0] ** 2 / asked[1])
    row |= {"freedom": freedom} | student(mean, math.sqrt(total), freedom)
    return row | {"seeds_needed": seeds_to_resolve(resolution, variance, asked[0])}


def document_matrix(documents: pd.DataFrame | None, runs: pd.DataFrame, metric: str, task: str) -> np.ndarray | None:
    """float [runs, documents] in the order of the runs; None where not all runs have at least two common documents."""
    if documents is None:
        return None
    part = documents[(documents["metric"] == metric) & (documents["task"] == task)]
    matrix = part.pivot(index="series", columns="document", values="value").reindex(runs["series"]).dropna(axis=1)
    return matrix.to_numpy(float) if matrix.shape[1] > 1 else None


def document_variance(matrix: np.ndarray, arms: np.ndarray, arm: str, reference: str) -> tuple[float, float]:
    """(variance of the difference of two arms from the documents asked, documents - 1); matrix [runs, documents].

    What is left of the variance over documents when the residual, which the variance of runs already counts, is taken
    off; with one run per arm nothing can be taken off.
    """
    groups = [matrix[arms == name] for name in (arm, reference)]
    count = matrix.shape[1]
    if not all(len(group) for group in groups):
        return 0.0, math.inf
    of_documents = float(np.var(groups[0].mean(axis=0) - groups[1].mean(axis=0), ddof=1))
    inside = [matrix[arms == name] for name in dict.fromkeys(arms)]
    freedom = sum(len(group) - 1 for group in inside) * (count - 1)
    if freedom:
        centred = [g - g.mean(axis=0) - g.mean(axis=1, keepdims=True) + g.mean() for g in inside]
        residual = sum(float((g**2).sum()) for g in centred) / freedom
        of_documents = max(0.0, of_documents - residual * sum(1 / len(group) for group in groups))
    return of_documents / count, float(count - 1)


def _unequal(values: np.ndarray, arms: np.ndarray) -> bool:
    groups = [values[arms == name] for name in dict.fromkeys(arms)]
    if min(map(len, groups)) < 3:
        return False
    with np.errstate(invalid="ignore"):
        return bool(stats.levene(*groups).pvalue < UNEQUAL_LEVEL)


def _verdict(row: dict, p: float, resolution: float) -> dict:
    if "p" not in row:
        return {"verdict": DECLINED, "reason": row["reason"]}
    if p <= LEVEL:
        return {"verdict": BETTER if row["difference"] > 0 else WORSE, "reason": ""}
    needed = row["seeds_needed"]
    needs = f"needs about {needed:.0f} seeds per arm" if needed < math.inf else "takes more documents, not more seeds"
    return {"verdict": UNRESOLVED, "reason": f"to resolve {resolution:g} {needs}"}


DIFFERENCES = Statistic(
    "arm_differences",
    "Which arm is better at the end?",
    differences,
    (
        *Column.texts(arm="the arm", reference="the arm it is compared with", metric="the metric"),
        Column("task", "", "the task or validation set; all tasks: the mean of every run over them"),
        Column("runs", "1", "runs (seeds) of the arm that reached the end"),
        Column("reference_runs", "1", "runs of the reference that reached the end"),
        Column("difference", "score", "of the ends, above 0 for the arm", "with no run that ended", ("low", "high")),
        Column("stderr", "score", "standard error from runs and, where known, documents", "with one run per arm"),
        Column("stderr_runs", "score", "the part from runs (seeds)", "as stderr"),
        Column("stderr_documents", "score", "the part from the documents asked", "without scores of documents"),
        Column("freedom", "1", "degrees of freedom (Satterthwaite)", "as stderr"),
        Column("design", "", "blocks: seeds are blocks; runs: independent runs; two arms: spreads differ", "as stderr"),
        *Column.ends("score", "as stderr"),
        Column("p", "1", "two-sided, Student's t", "as stderr"),
        Column("p_holm", "1", "p controlled over all comparisons of the metric (Holm)", "as stderr"),
        Column("q", "1", "p as false discovery rate over them (Benjamini-Hochberg)", "as stderr"),
        Column("seeds_needed", "1", "seeds per arm to find the resolution in 80 % at 5 %", "as stderr"),
        Column("verdict", "", "better, worse (p_holm at most 5 %), no difference resolved, declined"),
        Column("reason", "", "what it would take, or why it is declined", "where there is a verdict"),
    ),
    "crossed random effects: Clark 1973, Raaijmakers et al. 1999; Satterthwaite 1946; Holm 1979",
    definition="Difference of the means of two arms over their seeds at the end of training (the last quarter, at most "
    "five checkpoints, at equal tokens), with a standard error from seeds and, where known, from documents.",
    caveat="With one seed per arm nothing is said: two seeds of one arm differ too. Verdicts hold over all comparisons "
    "of the metric together.",
    chart=Chart("difference", panel="metric", reference=0.0),
    count="runs",
)
