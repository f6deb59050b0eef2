"""The findings in sentences: what was learned when, what still moves, what the comparisons say, what cannot be said."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from fineline_jax.facts.metrics import metric_of
from fineline_jax.text_table import counted
from fineline_jax.trajectories.report.findings import Results
from fineline_jax.trajectories.statistics.columns import Column, Statistic, format_tokens
from fineline_jax.trajectories.statistics.dynamics import ABOVE_CHANCE, DECLINED, SETTLED, STILL_RISING

ROSE = (SETTLED, STILL_RISING, ABOVE_CHANCE)
_NAMED = 5
"""Names listed before "and N more"."""
_LONGEST = 200
"""Letters of the rows named behind a verdict."""


def sentences(summary: pd.DataFrame, results: Results, metric: str) -> dict[str, list[str]]:
    """Heading -> sentences, plain text. summary: `dynamics.summarise`; metric: the one they speak of."""
    found = {
        "What was learned when": _learned(summary[summary["metric"] == metric], metric),
        "What still moves": _moving(summary[summary["metric"] == metric]),
        "What the comparisons say": [],
        "What cannot be said": _unsaid(summary[summary["metric"] == metric]),
    }
    for statistic, frame in results:
        if frame is summary or frame.empty or ("verdict" not in frame and "reason" not in frame):
            continue
        declined = frame[frame["reason"].fillna("").astype(bool)] if "reason" in frame else frame.iloc[:0]
        if "verdict" in frame:
            declined = frame[frame["verdict"].fillna("").isin(["", "declined"])]
        said = frame.drop(declined.index)
        if len(said):
            found["What the comparisons say"].append(f"{statistic.title} {_counts(statistic, said, metric)}")
        if len(declined):
            why, count = next(iter(declined["reason"].value_counts().items()))
            more = f", most often: {why}" if count < len(declined) else f": {why}"
            found["What cannot be said"].append(
                f"{statistic.title} No answer for {len(declined)} of {len(frame)}{more}."
            )
    return {heading: lines for heading, lines in found.items() if lines}


def _counts(statistic: Statistic, said: pd.DataFrame, metric: str) -> str:
    """Verdicts counted, of differences also between which they are, of predictions how wrong those kept are; without
    verdicts, the middle of what is drawn."""
    columns, chart = {column.name: column for column in statistic.columns}, statistic.chart
    if "verdict" in said:
        counts = said["verdict"].value_counts()
        told = [f"{verdict}: {count}{_which(statistic, said, verdict)}" for verdict, count in counts.items()]
        column = columns.get(
            "error" if "error" in said else chart.value if chart and chart.reference is not None else ""
        )
        text = f"{'; '.join(told)} (of {len(said)})."
        if column and "metric" in said:
            shown = said[(said["metric"] == metric) & (said["verdict"].eq("kept") | (column.name != "error"))]
            low, middle, high = (column.text(shown[column.name].quantile(q)) for q in (0, 0.5, 1))
            ends = f"{column.meaning}: median {middle}, from {low} to {high}"
            text += f" By {metric_of(metric).label}, {ends}." if len(shown) else ""
        return text
    assert chart is not None
    column = columns[chart.value]
    low, middle, high = said[column.name].quantile([0.1, 0.5, 0.9])
    of = f"{column.meaning}: median {column.text(middle)}"
    return f"{of}; from {column.text(low)} to {column.text(high)} for eight of ten (of {len(said)})."


def _which(statistic: Statistic, said: pd.DataFrame, verdict: object) -> str:
    """The few rows of a verdict that says something, by their keys: what all rows share is not said."""
    rows = said[said["verdict"] == verdict]
    if len(rows) > _NAMED or str(verdict).startswith("no"):
        return ""
    keys = [key for i, key in enumerate(statistic.keys) if i == 0 or key == "metric" or said[key].nunique() > 1]
    named = "; ".join(", ".join(map(str, row)) for row in rows[keys].itertuples(index=False, name=None))
    return f" ({named})" if len(named) <= _LONGEST else ""


def _learned(rows: pd.DataFrame, metric: str) -> list[str]:
    many = rows["series"].nunique() > 1
    things = "curves" if many else "tasks"
    rose = rows[rows["verdict"].isin(ROSE)]
    of = f"{counted(rows['task'].nunique(), 'task')} in {rows['series'].nunique()} series"
    said = "rose" if metric_of(metric).better == 1 else "fell"
    lines = [f"By {metric_of(metric).label}, {len(rose)} of {len(rows)} {things} ({of}) {said}."]
    clock = "to_score" if rows["to_score"].notna().any() else "t50"
    what = "The fixed score" if clock == "to_score" else "Half of the gain"
    timed = rose[rose[clock].notna()]
    if timed.empty:
        return lines
    by_task = timed.groupby("task", sort=False, observed=True)[clock].median().sort_values(kind="stable")
    middle = " (median over series)" if many else ""
    first, last = by_task.index[0], by_task.index[-1]
    line = f"{what}{middle} was reached first in {first}: {_time(timed, first, clock)}"
    lines.append(line + (f", and last in {last}: {_time(timed, last, clock)}." if len(by_task) > 1 else "."))
    if timed["domain"].nunique() > 1:
        domains = timed.groupby("domain", sort=False, observed=True)[clock].median().sort_values(kind="stable")
        order = ", ".join(f"{name} ({format_tokens(at)})" for name, at in domains.items())
        lines.append(f"Domains by the median of their tasks that reached it: {order} tokens.")
    return lines


def _time(timed: pd.DataFrame, task: object, clock: str) -> str:
    """The time of a task, with its interval where there is one series."""
    rows = timed[timed["task"] == task]
    text = f"{format_tokens(rows[clock].median())} tokens"
    ends = rows[[f"{clock}_low", f"{clock}_high"]].iloc[0]
    if len(rows) == 1 and np.isfinite(ends).all():
        text += f" (95 %: {format_tokens(ends.iloc[0])} to {format_tokens(ends.iloc[1])})"
    return text


def _moving(rows: pd.DataFrame) -> list[str]:
    lines = []
    rising = rows[rows["verdict"] == STILL_RISING]
    if len(rising):
        lines.append(f"Still rising at the last checkpoint: {_named(rising)}. Their final level is not known.")
    declined = rows[rows["verdict"] == DECLINED]
    if len(declined):
        lines.append(f"Declined since their peak: {_named(declined)}.")
    return lines


def _unsaid(rows: pd.DataFrame) -> list[str]:
    rest = rows[~rows["verdict"].isin(ROSE) & (rows["verdict"] != DECLINED)]
    return [
        f"{str(verdict)[:1].upper()}{str(verdict)[1:]}: {_named(part)}."
        for verdict, part in rest.groupby("verdict", sort=False)
    ]


def _named(rows: pd.DataFrame) -> str:
    """The tasks of these rows, in how many series each where there are several."""
    counts = rows["task"].value_counts(sort=rows["series"].nunique() > 1)
    several = rows["series"].nunique() > 1
    names = [f"{task} ({count} series)" if several else str(task) for task, count in counts.items()]
    more = [f"{len(names) - _NAMED} more tasks"] if len(names) > _NAMED + 1 else []
    shown = names[: _NAMED if more else None] + more
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"


def columns_table(columns: Sequence[Column]) -> list[tuple[str, str, str, str]]:
    """(name, unit, meaning, when empty) of each column, for pages."""
    return [(c.name, c.unit, c.meaning, c.empty or "never") for c in columns]
