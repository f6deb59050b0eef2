"""The end of training over two facets, such as batch and warmup, and what a level of one facet costs."""

import math

import pandas as pd

from fineline_jax.errors import UserError
from fineline_jax.facts.metrics import metric_of
from fineline_jax.trajectories.ablation.arms import arms_of, end_values, run_variance
from fineline_jax.trajectories.statistics.columns import Chart, Column, Statistic
from fineline_jax.trajectories.statistics.comparison import BETTER, DECLINED, UNRESOLVED, WORSE
from fineline_jax.trajectories.statistics.inference import LEVEL, holm, interval, student


def final_map(table: pd.DataFrame, x: str, y: str) -> pd.DataFrame:
    """The value at the end of each cell of columns x and y of the table, with an interval. See `FINAL_MAP`."""
    ends = _with_facets(table, x, y)
    rows = []
    for (metric, task), part in ends.groupby(["metric", "task"], sort=False, observed=True):
        variance, freedom, _ = run_variance(*(part[name].to_numpy() for name in ("value", "arm", "seed")))
        better = metric_of(str(metric)).better
        cells = part.groupby([x, y], observed=True)["value"].agg(["mean", "size"]).reset_index()
        best = cells["mean"].max() if better == 1 else cells["mean"].min()
        for cell in cells.to_dict("records"):
            row = {"metric": metric, "task": task, "x": x, "x_value": cell[x], "y": y, "y_value": cell[y]}
            error = math.sqrt(variance / cell["size"])
            low, high = interval(cell["mean"], error, freedom)
            row |= {"runs": cell["size"], "value": cell["mean"], "stderr": error, "low": low, "high": high}
            rows.append(row | {"behind": better * (best - cell["mean"])})
    return FINAL_MAP.frame(rows)


def facet_cost(table: pd.DataFrame, facet: str, *others: str) -> pd.DataFrame:
    """What each level of `facet` gains or costs at the end against its lowest one, the other facets equal.

    others: the facets held equal; a row for each of their cells, and one over all cells that hold both levels.
    See `FACET_COST`.
    """
    ends = _with_facets(table, facet, *others)
    rows = []
    for (metric, task), part in ends.groupby(["metric", "task"], sort=False, observed=True):
        better = metric_of(str(metric)).better
        variance, freedom, _ = run_variance(*(part[name].to_numpy() for name in ("value", "arm", "seed")))
        levels = sorted(part[facet].unique())
        cells = part.groupby(list(others), observed=True) if others else [((), part)]
        family = []
        for level in levels[1:]:
            gaps: list[tuple[str, float, float, int]] = []
            for key, cell in cells:
                one, base = (cell[cell[facet] == at]["value"] for at in (level, levels[0]))
                if len(one) and len(base):
                    name = ", ".join(f"{other}={at}" for other, at in zip(others, key, strict=True))
                    gap = better * float(one.mean() - base.mean())
                    gaps.append((name, gap, 1 / len(one) + 1 / len(base), len(one) + len(base)))
            if len(gaps) != 1:
                whole = sum(gap for _, gap, _, _ in gaps) / max(len(gaps), 1)
                weight = sum(of for _, _, of, _ in gaps) / max(len(gaps), 1) ** 2
                gaps.append(("all", whole, weight, sum(runs for *_, runs in gaps)))
            for name, gap, weight, runs in gaps:
                row = {"metric": metric, "task": task, "facet": facet, "level": level, "reference": levels[0]}
                row |= {"at": name or "all", "runs": runs}
                if not runs or not freedom:
                    why = "no cell holds both levels" if not runs else "one seed per arm"
                    family.append(row | {"verdict": DECLINED, "reason": why})
                    continue
                error = math.sqrt(variance * weight)
                tested = student(gap, error, freedom) if error else {"p": math.nan, "low": gap, "high": gap}
                family.append(row | {"gain": gap, "stderr": error, "reason": ""} | tested)
        adjusted = holm(pd.Series([row.get("p", math.nan) for row in family], dtype=float).to_numpy())
        for row, p in zip(family, adjusted, strict=True):
            called = BETTER if row.get("gain", 0) > 0 else WORSE
            rows.append({"verdict": called if p <= LEVEL else UNRESOLVED} | row | {"p_holm": p})
    return FACET_COST.frame(rows)


def _with_facets(table: pd.DataFrame, *facets: str) -> pd.DataFrame:
    """`end_values` with the facets. Raises UserError where the table lacks one."""
    for facet in facets:
        if facet not in table:
            raise UserError(f"facet {facet!r}: the runs have none of that name; group them by a field of their recipes")
    arms = arms_of(table)
    if "arm" not in table:
        arms["arm"] = arms[list(facets)].astype(str).agg(", ".join, axis=1)
    of_series = arms[["series", *facets]].drop_duplicates("series")
    return end_values(arms).merge(of_series, on="series")


_END = Column.texts(metric="the metric", task="the task or validation set")

FINAL_MAP = Statistic(
    "final_map",
    "Where does training end, over two facets?",
    final_map,
    (
        *_END,
        *Column.texts(x="the first facet", x_value="its value", y="the second facet", y_value="its value"),
        Column("runs", "1", "runs (seeds) in the cell"),
        Column("value", "score", "mean at the end of training", interval=("low", "high")),
        Column("stderr", "score", "between seeds, pooled over cells", "with one seed per cell"),
        *Column.ends("score", "as stderr"),
        Column("behind", "score", "how far the mean is behind that of the best cell"),
    ),
    "one-way analysis of variance: Fisher 1925",
    definition="Mean over seeds at the end of training; the variance between runs is pooled over all cells.",
    caveat="The best of many cells looks better than it is; whether it is told from another, the differences say.",
    chart=Chart("value", panel="metric"),
    count="runs",
)

FACET_COST = Statistic(
    "facet_cost",
    "What does a level of one facet gain or cost at the end?",
    facet_cost,
    (
        *_END,
        *Column.texts(facet="the facet, such as warmup", level="its level", reference="the lowest level"),
        Column("at", "", "the other facets at which; all: the mean over those that have both levels"),
        Column("runs", "1", "runs of both levels"),
        Column("gain", "score", "at the end, above 0 in favour of the level", "where declined", ("low", "high")),
        Column("stderr", "score", "between seeds, pooled over all arms", "where declined"),
        *Column.ends("score", "where declined"),
        Column("p", "1", "two-sided, Student's t", "where declined"),
        Column("p_holm", "1", "p controlled over all rows of the metric and task (Holm)", "where declined"),
        Column("verdict", "", "better, worse (p_holm at most 5 %), no difference resolved, declined"),
        Column("reason", "", "why it is declined", "where it is not"),
    ),
    "contrasts of an analysis of variance: Fisher 1925; Holm 1979",
    definition="Difference of a level from the lowest one at equal other facets, averaged over them.",
    caveat="An average over batches may hide that the sign changes with the batch; the rows of each batch show it.",
    chart=Chart("gain", panel="metric", reference=0.0),
    count="runs",
)
