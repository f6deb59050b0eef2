"""What changes at an event of the schedule, such as the start of the decay or a larger batch, against the drift before.

Scores rise anyway, so the change is counted from the line in log tokens through the checkpoints before the event,
continued behind it.
"""

import numpy as np
import pandas as pd

from fineline_jax.facts.metrics import metric_of
from fineline_jax.trajectories.curves.split import CURVE, split
from fineline_jax.trajectories.statistics.columns import Chart, Column, Statistic
from fineline_jax.trajectories.statistics.comparison import over_tasks
from fineline_jax.trajectories.statistics.inference import student

BEFORE, AFTER = 6, 3
"""At most so many checkpoints on each side; the line takes at least FEWEST."""
FEWEST = 4


def event_changes(table: pd.DataFrame, events: pd.DataFrame) -> pd.DataFrame:
    """Each event of each series, per metric and task, and over all tasks. See `EVENT_CHANGES`.

    events: columns series ("": of every series), event, tokens.
    """
    curves: dict[tuple[str, str], dict] = {}
    for (series, metric, task), curve in split(table[table["tokens"] > 0], CURVE):
        curves.setdefault((series, metric), {})[task] = curve
    rows = []
    for (series, metric), tasks in curves.items():
        better, borders = metric_of(metric).better, np.sort(events["tokens"].unique())
        for event in events[events["series"].isin(["", series])].itertuples():
            key = {"series": series, "metric": metric, "event": event.event, "tokens": event.tokens}
            # the next event ends what is seen of this one
            until = min([at for at in borders if at > event.tokens], default=np.inf)
            family = [
                key | {"task": task} | _change(curve.tokens, better * curve.value, float(event.tokens), until)  # pyright: ignore
                for task, curve in tasks.items()
            ]
            rows += [key | row for row in over_tasks(family, "change")]
    return EVENT_CHANGES.frame(rows)


def _change(tokens: np.ndarray, values: np.ndarray, at: float, until: float) -> dict:
    """Columns before to reason of EVENT_CHANGES for one curve, higher is better."""
    before = np.flatnonzero(tokens <= at)[-BEFORE:]
    after = np.flatnonzero((tokens > at) & (tokens <= until))[:AFTER]
    row: dict = {"before": len(before), "after": len(after)}
    if len(before) < FEWEST or not len(after):
        return row | {"reason": f"fewer than {FEWEST} checkpoints before the event, or none behind it"}
    x = np.log(tokens)
    slope, intercept = np.polyfit(x[before], values[before], 1)
    gap = float((values[after] - intercept - slope * x[after]).mean())
    freedom = len(before) - 2
    residual = values[before] - intercept - slope * x[before]
    spread = ((x[before] - x[before].mean()) ** 2).sum()
    leverage = 1 / len(after) + 1 / len(before) + (x[after].mean() - x[before].mean()) ** 2 / spread
    error = float(np.sqrt((residual**2).sum() / freedom * leverage))
    row |= {"drift": float(slope * np.log(2)), "change": gap}
    if not error > 0:
        return row | {"reason": "the checkpoints before the event lie on a line, so nothing says how much they scatter"}
    return row | {"stderr": error, "reason": ""} | student(gap, error, freedom)


EVENT_CHANGES = Statistic(
    "event_changes",
    "What changed at an event of the schedule?",
    event_changes,
    (
        *Column.texts(series="the series", event="what happened", metric="the metric"),
        *Column.texts(task="the task; all tasks: the mean over them, with tasks as replicates"),
        Column("tokens", "tokens", "when it happened"),
        Column("before", "1", f"checkpoints up to it that the line is through, at most {BEFORE}", "of all tasks"),
        Column("after", "1", f"checkpoints behind it and up to the next event, at most {AFTER}", "of all tasks"),
        Column("drift", "score", "slope of the line per doubling of tokens, positive: improving", "where declined"),
        Column(
            "change", "score", "mean distance from the line continued, above 0: better", "declined", ("low", "high")
        ),
        Column("stderr", "score", "its standard error: scatter around the line, and the line's own", "where declined"),
        *Column.ends("score", "where declined"),
        Column("p", "1", "two-sided, Student's t", "where declined"),
        Column("p_holm", "1", "p controlled over the tasks of series, metric and event (Holm)", "of all tasks"),
        Column("verdict", "", "better, worse, no difference resolved, declined"),
        Column("reason", "", "what is missing", "where nothing is"),
    ),
    "prediction from a line: Draper, Smith 1998, Applied Regression Analysis, ch. 3; tasks as replicates: Miller 2024",
    definition="Mean of the checkpoints behind an event minus the line in log tokens through those before it.",
    caveat="A curve that bends leaves its line without any event; the change over all tasks has this error too.",
    chart=Chart("change", panel="metric", reference=0.0),
    count="before",
)
