"""Which sizes of a family end below their peak, by task."""

import pandas as pd

from fineline_jax.trajectories.sizes.families import families
from fineline_jax.trajectories.statistics.columns import Column, Statistic, format_tokens, groups
from fineline_jax.trajectories.statistics.dynamics import DECLINED

NONE, ALL, SMALLER, LARGER, MIXED = "none", "all", "the smaller sizes", "the larger sizes", "some sizes"


def size_declines(summary: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """Of each (family, metric, task) of `dynamics.summarise`; table: that of the scores, for the sizes."""
    rows = []
    for family, sizes in families(table):
        size_of = {name: size for size, names in sizes.items() for name in names}
        for key, part in groups(summary[summary["series"].isin(list(size_of))], "metric", "task"):
            size, fell = part["series"].map(size_of), part["verdict"] == DECLINED
            fallen, rest = sorted(set(size[fell])), sorted(set(size[~fell]))
            verdict = NONE if not fallen else ALL if not rest else MIXED
            if fallen and rest:
                verdict = SMALLER if fallen[-1] < rest[0] else LARGER if fallen[0] > rest[-1] else MIXED
            row = {"family": family, "sizes": size.nunique(), "verdict": verdict}
            rows.append(key | row | {"declined": ", ".join(map(format_tokens, fallen))})
    return SIZE_DECLINES.frame(rows)


SIZE_DECLINES = Statistic(
    "size_declines",
    "Which sizes decline since their peak?",
    size_declines,
    (
        *Column.texts(family="series that differ in size alone", metric="the metric", task="the task"),
        Column("declined", "", "parameters of those called declined in `dynamics`", "where none is"),
        Column("sizes", "1", "sizes compared"),
        Column("verdict", "", "none, all, the smaller sizes, the larger sizes, some sizes"),
    ),
    "the verdict of dynamics, which controls false discoveries over the tasks of a series",
    definition="The sizes of a family of which a task's last three checkpoints are below its best three.",
    caveat="A size that is at chance does not decline, and says nothing of the larger ones.",
    count="sizes",
)
