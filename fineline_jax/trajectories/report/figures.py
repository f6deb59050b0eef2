"""Figures for papers and slides, as PDF, SVG and PNG: the timeline, the curves of each domain, every statistic."""

import itertools
import math
import re
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure

from fineline_jax.atomic_files import atomic_file
from fineline_jax.facts.metrics import metric_of
from fineline_jax.trajectories.report.findings import Results
from fineline_jax.trajectories.report.style import (
    COLOURS,
    FigureStyle,
    Look,
    apart_from_zero,
    chance_lines,
    looks,
    order_by_size,
    position,
    token_axis,
)  # fmt: skip
from fineline_jax.trajectories.statistics.columns import Chart, Column, Statistic
from fineline_jax.trajectories.statistics.domains import normalised

FORMATS = ("pdf", "svg", "png")
_SHADES = LinearSegmentedColormap.from_list(
    "chance", ["#c96a1b", "#eda35a", "#fbd9a8", "#f4f2ec", "#8fc1e0", "#0f5f9e", "#08335c"]
)
_CROWDED = 8  # more tasks than this in a domain are drawn as thin lines under their mean
_MOST_ROWS = 40


def draw_figures(
    table: pd.DataFrame,
    results: Results,
    domains: pd.DataFrame,
    folder: Path,
    *,
    metric: str,
    title: str,
    style: FigureStyle = FigureStyle(),
) -> list[Path]:
    """Draw `overview`, a figure per domain and one per statistic for `metric` into `folder`; returns the paths.

    table: normalised tidy table; results: statistics with their frames, `dynamics` first; domains:
    `domain_curves(table)`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    table = table[table["metric"] == metric]
    summary = results[0][1]
    summary = summary[summary["metric"] == metric]
    domains = domains[domains["metric"] == metric]
    series, ordered = order_by_size(list(table["series"].unique()))
    tints = looks(series, ordered)
    shown = series[-1] if ordered else series[0]
    figures = {}
    with matplotlib.rc_context(style.settings):
        heading = title if len(series) == 1 else f"{title}: {shown}"
        figures["overview"] = _overview(table, summary, shown, heading, style)
        for domain in table["domain"].unique():
            name = re.sub(r"[^A-Za-z0-9]+", "_", domain).strip("_")[:80] or "domain"
            name = f"{name}_{len(figures)}" if name in figures else name
            parts = table[table["domain"] == domain], domains[domains["domain"] == domain]
            figures[name] = _domain(*parts, tints, domain, metric, style)
        for statistic, frame in results[1:]:
            figure = _statistic(statistic, frame, metric, style)
            if figure is not None:
                figures[statistic.name] = figure
        return [path for name, figure in figures.items() for path in _save(figure, folder / name)]


def _save(figure: Figure, path: Path) -> list[Path]:
    """Each format from its own canvas: `savefig` would draw everything twice."""
    FigureCanvasAgg(figure)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # the layout is the same in every format
    printers = {  # the vector formats change the resolution, so they come last
        "png": lambda to: FigureCanvasAgg(figure).print_png(to),
        "pdf": lambda to: FigureCanvasPdf(figure).print_pdf(to, metadata={"CreationDate": None}),
        "svg": lambda to: FigureCanvasSVG(figure).print_svg(to, metadata={"Date": None}),
    }
    for form, write in printers.items():
        with atomic_file(path.with_name(f"{path.name}.{form}")) as partial:
            write(partial)
    return [path.with_name(f"{path.name}.{form}") for form in FORMATS]


def _domain(
    table: pd.DataFrame, means: pd.DataFrame, tints: dict[str, Look], domain: str, metric: str, style: FigureStyle
) -> Figure:
    """One series: its tasks in one plot. Several: one plot per task with the series in it. Many tasks: their mean."""
    tasks = list(table["task"].unique())
    crowded = len(tasks) > _CROWDED
    apart = len(tints) > 1 and not crowded
    columns = min(style.columns, len(tasks)) if apart else 1
    rows, width = -(-len(tasks) // columns) if apart else 1, style.inches
    present = set(table["series"].unique())
    wanted = [name for name in tints if name in present]
    labels = wanted if len(tints) > 1 else tasks
    of_mean = f"mean of {len(tasks)} tasks" if crowded else ""
    labels = [of_mean] if of_mean and len(tints) == 1 else [f"{of_mean}{label}" for label in labels]
    beside, legend = _legend_size(labels, style)
    height = rows * (0.62 if columns == 1 else 0.95 / columns) * width + legend
    figure = Figure(figsize=(width, height), layout="constrained")
    plots = figure.subplots(rows, columns, squeeze=False).ravel()
    for spare in plots[len(tasks) if apart else 1 :]:
        spare.remove()
    handles = {}
    for i, axes in enumerate(plots[: len(tasks) if apart else 1]):
        shown = table[table["task"] == tasks[i]] if apart else table
        lowest = token_axis(axes, shown["tokens"].to_numpy(float), 0.75 * width / columns)
        chances = sorted(set(shown["chance"].dropna()))
        for series in wanted:
            look = tints[series]
            mean = means[means["series"] == series]
            averaged = crowded and len(chances) == 1 and len(mean) > 0
            if not (averaged and len(wanted) > 1):  # many series of many tasks: their means alone
                for task, curve in shown[shown["series"] == series].groupby("task", sort=False, observed=True):
                    one = look if len(tints) > 1 or crowded else (COLOURS[tasks.index(str(task)) % len(COLOURS)], "-")
                    label = "" if crowded else series if len(tints) > 1 else str(task)
                    _line(axes, curve, lowest, one, label, faint=crowded)
            if averaged:
                scale = 1 - chances[0]
                mean = mean.assign(value=chances[0] + mean["value"] * scale, stderr=mean["stderr"] * scale)
                label = of_mean + (f", {series}" if len(tints) > 1 else "")
                _line(axes, mean, lowest, look, label, faint=False)
        chance_lines(axes, chances, style.points)
        name = tasks[i] if apart else domain[:1].upper() + domain[1:]
        axes.set_title(style.wrapped(name, width / columns - 0.6))
        axes.set_ylabel(style.wrapped(metric_of(metric).label, height / rows) if i % columns == 0 else "")
        if apart and i + columns < len(tasks):
            axes.set_xlabel("")
        lines, labels = axes.get_legend_handles_labels()
        handles |= dict(zip(labels, lines, strict=True))
    _legend(figure, handles, beside)
    return figure


def _legend_size(labels: list[str], style: FigureStyle) -> tuple[int, float]:
    """(its columns, its height in inches)."""
    beside = int(style.inches * 72 / (0.9 * style.points * (0.6 * max(map(len, labels)) + 6)))
    beside = min(4, max(1, beside))
    return beside, -(-len(labels) // beside) * 1.7 * 0.9 * style.points / 72


def _legend(figure: Figure, handles: dict[str, Any], beside: int) -> None:
    if handles:
        layout: dict[str, Any] = {"loc": "outside lower center", "ncols": min(beside, len(handles))}
        figure.legend(list(handles.values()), list(handles), handlelength=2.6, **layout)


def _line(axes: Axes, curve: pd.DataFrame, lowest: float, look: Look, label: str, *, faint: bool) -> None:
    curve = curve.sort_values("tokens")
    tint, dash = look
    x, y = position(curve["tokens"].to_numpy(float), lowest), curve["value"].to_numpy(float)
    error = 1.96 * curve["stderr"].to_numpy(float)
    shape: dict[str, Any] = (
        {"linewidth": 0.7, "alpha": 0.3, "rasterized": True}
        if faint
        else {"linewidth": 1.5, "linestyle": dash, "marker": "o" if len(x) <= 40 else ""}
    )
    axes.plot(*apart_from_zero(x, y, lowest), color=tint, markersize=2.2, label=label or None, **shape)
    if not faint and np.isfinite(error).any():
        axes.fill_between(x, y - error, y + error, color=tint, alpha=0.1, linewidth=0)


def _overview(table: pd.DataFrame, summary: pd.DataFrame, series: str, title: str, style: FigureStyle) -> Figure:
    """Tasks x tokens of one series in the order of learning, coloured by the chance-normalised score."""
    table, summary = table[table["series"] == series], summary[summary["series"] == series]
    # tasks without chance are shown by the share of their own final gain
    rows = summary.sort_values("rank", kind="stable")
    high = style.points / 9
    figure = Figure(figsize=(style.inches, (1.6 + 0.27 * len(rows)) * high), layout="constrained")
    axes = figure.add_subplot()
    lowest = token_axis(axes, table["tokens"].to_numpy(float), 0.45 * style.inches)
    by_task = {str(task): curve.sort_values("tokens") for task, curve in table.groupby("task", observed=True)}
    records = rows.to_dict("records")
    scores = []
    for row in records:
        value, gain = by_task[row["task"]]["value"].to_numpy(float), row["level"] - row["baseline"]
        share = (value - row["baseline"]) / (gain or 1.0)
        scores.append(normalised(value, row["chance"]) if math.isfinite(row["chance"]) else share)
    peak = float(np.fmax.reduce(np.concatenate(scores), initial=0.1))
    norm = Normalize(-peak, peak)
    for i, (row, score) in enumerate(zip(records, scores, strict=True)):
        x = position(by_task[row["task"]]["tokens"].to_numpy(float), lowest)
        half = [(x[1] - x[0]) / 2, (x[-1] - x[-2]) / 2] if len(x) > 1 else [0.1, 0.1]
        edges = np.concatenate([[x[0] - half[0]], (x[1:] + x[:-1]) / 2, [x[-1] + half[1]]])
        cells: dict[str, Any] = {"cmap": _SHADES, "norm": norm, "edgecolors": "white", "linewidth": 0.3}
        axes.pcolormesh(edges, [i - 0.44, i + 0.44], score[None, :], **cells)
        final = {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": 0.9 * style.points}
        axes.annotate(f"{row['final']:.3f}", (1.01, i), **final)
    clock = "to_score" if rows["to_score"].notna().any() else "t50"
    ends = rows[[f"{clock}_low", f"{clock}_high"]].to_numpy(float)
    at = np.flatnonzero(rows[clock].notna() & rows[f"{clock}_low"].notna())
    ends = np.where(np.isfinite(ends), ends, table["tokens"].max())
    for colour, thick in (("white", 3.0), ("black", 1.2)):
        axes.hlines(at, *position(ends[at], lowest).T, colors=colour, linewidths=thick, zorder=3)
    for column, marker, face in (("onset", ">", "white"), (clock, "o", "black"), ("t90", "|", "black")):
        at = np.flatnonzero(rows[column].notna().to_numpy())
        x = position(rows[column].to_numpy(float)[at], lowest)
        edge, line = (None, 1.8) if marker == "|" else ("black" if face == "white" else "white", 0.9)
        shape: dict[str, Any] = {"marker": marker, "s": 30, "c": face, "edgecolors": edge, "linewidths": line}
        axes.scatter(x, at, zorder=4, label=column.replace("_", " "), **shape)
    axes.set_yticks(range(len(rows)), style.shortened(rows["task"], 0.4))
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    _heading(figure, title, style)
    figure.legend(loc="outside lower right", ncols=3)
    shade = ScalarMappable(norm=norm, cmap=_SHADES)
    below: dict[str, Any] = {"location": "bottom", "aspect": 40, "pad": 0.3 / (1.6 + 0.27 * len(rows))}
    bar = figure.colorbar(shade, ax=axes, label="score above chance", **below)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    return figure


def _statistic(statistic: Statistic, frame: pd.DataFrame, metric: str, style: FigureStyle) -> Figure | None:
    """A point per row at the statistic's number, with its interval; None where there is none of this metric."""
    chart = statistic.chart
    if chart is None:
        return None
    rows = frame[frame["metric"] == metric] if "metric" in frame else frame
    rows = rows[rows[chart.value].notna()]
    if rows.empty:
        return None
    if chart.over:
        return _courses(statistic, chart, rows, style)
    count, rows = len(rows), rows.sort_values(chart.value, kind="stable")
    rows = rows.iloc[np.unique(np.linspace(0, count - 1, min(count, _MOST_ROWS)).round().astype(int))]
    column = next(column for column in statistic.columns if column.name == chart.value)
    keys = [key for key in statistic.keys if key != "metric" and rows[key].nunique() > 1] or statistic.keys[:1]
    figure = Figure(figsize=(style.inches, (1.3 + 0.2 * len(rows)) * style.points / 9 + 0.2), layout="constrained")
    axes = figure.add_subplot()
    _points(axes, rows, column, chart.reference, 0.4 * style.inches)
    names = [" · ".join(filter(None, map(str, row))) for row in rows[keys].to_numpy()]
    axes.set_yticks(range(len(rows)), style.shortened(names, 0.55))
    axes.set_ylim(len(rows) - 0.4, -0.6)
    unit = "" if column.unit in ("1", "tokens") else f" ({column.unit})"
    axes.set_xlabel("")
    figure.supxlabel(style.wrapped(column.meaning + unit, style.inches * 0.9), size=style.points, color="#3c424b")
    part = f" ({len(rows)} of {count} rows)" if len(rows) < count else ""
    _heading(figure, statistic.title + part, style)
    return figure


def _courses(statistic: Statistic, chart: Chart, rows: pd.DataFrame, style: FigureStyle) -> Figure:
    """Curves over tokens with intervals: a row of plots per panel, of the second key's value with the most rows."""
    line, whose = statistic.keys[:2]
    chosen = rows[whose].value_counts().index[0]
    more = f" (1 of {count})" if (count := rows[whose].nunique()) > 1 else ""
    rows = rows[rows[whose] == chosen]
    tints, panels = looks(*order_by_size(list(rows[line].unique()))), list(rows[chart.panel].unique())
    beside, legend = _legend_size(list(tints), style)
    height = 0.36 * style.inches * len(panels) + legend + 4 * style.points / 72
    figure, handles = Figure(figsize=(style.inches, height), layout="constrained"), dict[str, Any]()
    plots = figure.subplots(len(panels), 2, squeeze=False)
    ends = {column.name: column.interval for column in statistic.columns if column.interval}
    for i, (panel, name) in enumerate(itertools.product(panels, (chart.value, chart.ratio))):
        axes, part, nothing = plots[i // 2][i % 2], rows[rows[chart.panel] == panel], 1.0 if i % 2 else chart.reference
        lowest, (low, high) = token_axis(axes, part[chart.over].to_numpy(float), 0.37 * style.inches), ends[name]
        for series, (tint, dash) in tints.items():
            curve = part[part[line] == series]
            x = position(curve[chart.over].to_numpy(float), lowest)
            shape: dict[str, Any] = {"color": tint, "linestyle": dash, "linewidth": 1.3, "marker": "o", "markersize": 2}
            handles[series] = axes.plot(x, curve[name], **shape)[0]
            axes.fill_between(x, curve[low], curve[high], color=tint, alpha=0.1, linewidth=0)
        axes.axhline(nothing, color="#5c6470", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        seen = [*part[name].dropna(), nothing]  # the ends of a ratio near guessing are far away
        room = 0.3 * (max(seen) - min(seen)) or 1.0
        axes.set_ylim(min(seen) - room, max(seen) + room)
        axes.set_xlim(*position(part[chart.over].agg(["min", "max"]).to_numpy(float) * [0.7, 1.4], lowest))
        axes.set_title(style.wrapped(f"{panel}: {name}", 0.5 * style.inches - 0.3))
        axes.set_xlabel("training tokens" if i // 2 == len(panels) - 1 else "")
    _heading(figure, f"{statistic.title} {chosen}{more}", style)
    _legend(figure, handles, beside)
    return figure


def _heading(figure: Figure, text: str, style: FigureStyle) -> None:
    lines = style.wrapped(text, style.inches - 0.3)
    figure.suptitle(lines, x=0.01, ha="left", weight="bold", size=1.1 * style.points)


def _points(axes: Axes, rows: pd.DataFrame, column: Column, reference: float | None, wide: float) -> None:
    value, at = rows[column.name].to_numpy(float), np.arange(len(rows))
    turn = np.asarray
    if column.unit == "tokens":
        lowest = token_axis(axes, value, wide)
        turn = lambda tokens: position(np.asarray(tokens, float), lowest)
    if column.interval is not None:
        low, high = (rows[name].to_numpy(float) for name in column.interval)
        known = np.isfinite(low) & np.isfinite(high)
        axes.hlines(at[known], turn(low[known]), turn(high[known]), colors=COLOURS[0], linewidths=1.2)
    if reference is not None:
        axes.axvline(reference, color="#5c6470", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axes.scatter(turn(value), at, s=16, color=COLOURS[0], zorder=3)
    axes.grid(visible=False, axis="y")
