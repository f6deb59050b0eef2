"""Scores that measure nothing: checkpoints of two series with the same results, tasks stuck at a constant answer."""

import numpy as np
import pandas as pd

from fineline_jax.trajectories.codes import codes_of
from fineline_jax.trajectories.curves.curve import stuck
from fineline_jax.trajectories.statistics.columns import Column, Statistic

DUPLICATE, DEGENERATE = "same results", "constant answer"
FEWEST_SCORES = 3
"""Scores that two checkpoints must share before they are called the same: few documents give equal values by chance."""


def defects(table: pd.DataFrame) -> pd.DataFrame:
    """See `DEFECTS`."""
    twice = duplicates(table).rename(columns={"checkpoint": "where", "others": "also"}).assign(kind=DUPLICATE)
    constant = degenerate(table).rename(columns={"task": "where", "checkpoints": "scores"}).assign(kind=DEGENERATE)
    return DEFECTS.frame([*twice.to_dict("records"), *constant.to_dict("records")])


def duplicates(table: pd.DataFrame) -> pd.DataFrame:
    """Columns series, checkpoint, tokens, others, scores: checkpoints whose every score is that of another series at
    the same tokens, with the names of those series.

    An untrained checkpoint, and one that still scores exactly as it, may be shared by right (one initialisation).
    """
    curves = codes_of(table, ["task", "metric"]).astype(np.uint64)
    # A sum over scores of a hash of each: equal for equal sets of scores in any order.
    hashes = pd.util.hash_array(table["value"].to_numpy(float)) ^ pd.util.hash_array(curves)
    places = pd.DataFrame({"place": codes_of(table, ["series", "checkpoint"]), "hash": pd.util.hash_array(hashes)})
    sums = places.groupby("place", sort=False)["hash"].agg(["sum", "size"])
    first = places["place"].drop_duplicates().index
    found = table.iloc[first][["series", "checkpoint", "tokens"]].reset_index(drop=True)
    found = found.assign(scores=sums["size"].to_numpy(), all=sums["sum"].to_numpy())
    untrained = found[found["tokens"] == 0].drop_duplicates("series").set_index("series")["all"]
    found = found[(found["scores"] >= FEWEST_SCORES) & (found["all"] != found["series"].map(untrained))]
    same = found.groupby(["tokens", "all"], sort=False)["series"]
    found = found[same.transform("nunique") > 1]
    names = found.groupby(["tokens", "all"], sort=False)["series"].agg(tuple).to_dict()
    others = [
        ", ".join(name for name in names[tokens, total] if name != series)
        for series, tokens, total in zip(found["series"], found["tokens"], found["all"], strict=True)
    ]
    return found.drop(columns="all").assign(others=others).reset_index(drop=True)


def degenerate(table: pd.DataFrame) -> pd.DataFrame:
    """Columns series, task, metric, checkpoints: curves most of whose checkpoints have the value of one answer."""
    key = ["series", "task", "metric"]
    if table.empty:
        return table[key].assign(checkpoints=0)
    codes = codes_of(table, key)
    order = np.argsort(codes, kind="stable")
    starts = np.flatnonzero(np.diff(codes[order], prepend=-1))
    values = np.split(table["value"].to_numpy(float)[order], starts[1:])
    sizes = np.split(table["n"].to_numpy(float)[order], starts[1:])
    bad = [i for i, (one, n) in enumerate(zip(values, sizes, strict=True)) if stuck(one, np.fmax.reduce(n))]
    rows = table.iloc[order[starts[bad]]][key].reset_index(drop=True)
    return rows.assign(checkpoints=[len(values[i]) for i in bad])


def without_defects(table: pd.DataFrame) -> pd.DataFrame:
    """The table without the checkpoints that have another series' results, and without the tasks that are degenerate in
    at least half of the series: means over tasks stay means over the same tasks in every series."""
    twice = duplicates(table)
    stuck_curves = degenerate(table)
    kept = np.ones(len(table), bool)
    if len(twice):
        places = pd.MultiIndex.from_frame(table[["series", "checkpoint"]])
        kept &= ~places.isin(pd.MultiIndex.from_frame(twice[["series", "checkpoint"]]))
    if len(stuck_curves):
        curves = table[["series", "task", "metric"]].drop_duplicates()
        share = stuck_curves.groupby(["task", "metric"]).size() / curves.groupby(["task", "metric"]).size()
        left_out = share.index[share >= 0.5]
        kept &= ~pd.MultiIndex.from_frame(table[["task", "metric"]]).isin(left_out)
    return table if kept.all() else table[kept]


NOT_SCORED = Statistic(
    "not_scored",
    "Which checkpoints were left out when scoring?",
    lambda rows: NOT_SCORED.frame(rows),
    (
        *Column.texts(series="the series", checkpoint="the checkpoint"),
        Column("tokens", "tokens", "its training tokens", "where not known"),
        Column("why", "", "why it has no scores"),
    ),
    "order.json beside the scores, by `fineline score`",
    definition="Checkpoints that the series has and that no curve here has: what lies between two scored ones was "
    "judged to be resolved, or scoring was ended.",
    caveat="A curve is drawn straight over them.",
)

DEFECTS = Statistic(
    "defects",
    "Which scores measure nothing?",
    defects,
    (
        *Column.texts(series="the series"),
        Column("kind", "", "same results: as another series at the same tokens; constant answer: stuck at its value"),
        *Column.texts(where="the checkpoint, or the task"),
        Column("metric", "", "the metric of the task", "of checkpoints"),
        Column("also", "", "the series with the same results", "of tasks"),
        Column("tokens", "tokens", "tokens of the checkpoint", "of tasks"),
        Column("scores", "1", "scores that are the same, or checkpoints of the curve"),
    ),
    "definitions are ours",
    definition="Checkpoints whose every score is that of another series at the same tokens: one model was evaluated "
    "twice. Curves most of whose checkpoints have one value, or one minus it: always the same answer. Both are left "
    "out of the means over domains, a task where at least half of the series are stuck.",
    caveat="Which of two equal checkpoints is the right one is not known, so both are left out.",
    count="scores",
)
