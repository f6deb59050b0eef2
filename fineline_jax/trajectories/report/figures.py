"""The same curves as PNG pictures: an overview of all domains and one picture per domain, for papers and slides."""

import math
import re
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize, to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from fineline_jax.atomic_files import atomic_file
from fineline_jax.facts.metrics import metric_of
from fineline_jax.trajectories.statistics.columns import format_tokens, size_of
from fineline_jax.trajectories.statistics.dynamics import BEFORE_FIRST, normalised

# Okabe & Ito's colours, safe for colour-blind readers; the yellow, too pale on white, replaced.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#6f4fa3", "#4d4d4d")
# For series that differ in size, in the order of size: viridis without its palest end.
_RAMP = LinearSegmentedColormap.from_list(
    "size", ["#c9a400", "#7fb13c", "#2f9c7c", "#21808d", "#31638d", "#43407f", "#440f54"]
)
_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": "#8a8f98", "axes.labelcolor": "#3c424b", "xtick.color": "#5c6470", "ytick.color": "#5c6470",
    "axes.grid": True, "grid.color": "#ecebe6", "grid.linewidth": 0.8, "axes.axisbelow": True,
    "axes.titlelocation": "left", "axes.titleweight": "bold", "legend.frameon": False, "figure.dpi": 160,
}  # fmt: skip
_SHADES = LinearSegmentedColormap.from_list(
    "chance", ["#c96a1b", "#eda35a", "#fbd9a8", "#f4f2ec", "#8fc1e0", "#0f5f9e", "#08335c"]
)
_CROWDED = 8  # more tasks than this in a domain are drawn as thin lines under their mean


def order_by_size(names: list[str]) -> tuple[list[str], bool]:
    """Series by model size where every name states one (160m, 1.4B), of three sizes or more; else as they came.

    And whether so.
    """
    sizes = {name: size_of(name) for name in names}
    if len(set(sizes.values())) < 3 or any(math.isnan(size) for size in sizes.values()):
        return names, False
    return sorted(names, key=sizes.__getitem__), True


def draw_figures(
    table: pd.DataFrame, summary: pd.DataFrame, domains: pd.DataFrame, folder: Path, *, metric: str, title: str
) -> list[Path]:
    """Draw `overview.png` and one `<domain>.png` for `metric` into `folder`; returns their paths.

    table: normalised tidy table; summary: `summarise(table)`; domains: `domain_curves(table)`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    table = table[table["metric"] == metric]
    summary = summary[summary["metric"] == metric]
    domains = domains[domains["metric"] == metric]
    series, ordered = order_by_size(list(dict.fromkeys(table["series"])))
    shades = [
        to_hex(_RAMP(i / max(1, len(series) - 1))) if ordered else COLOURS[i % len(COLOURS)] for i in range(len(series))
    ]
    tints = dict(zip(series, shades, strict=True))
    shown = series[-1] if ordered else series[0]
    with matplotlib.rc_context(_STYLE):
        paths = [
            _save(
                _overview(table, summary, shown, title if len(series) == 1 else f"{title}: {shown}"),
                folder / "overview.png",
            )
        ]
        for domain in dict.fromkeys(table["domain"]):
            name = re.sub(r"[^A-Za-z0-9]+", "_", domain).strip("_") or "domain"
            path = folder / f"{name}.png"
            if path in paths:
                path = folder / f"{name}_{len(paths)}.png"
            figure = _domain(
                table[table["domain"] == domain], domains[domains["domain"] == domain], tints, domain, metric
            )
            paths.append(_save(figure, path))
    return paths


def _save(figure: Figure, path: Path) -> Path:
    with atomic_file(path) as partial:
        FigureCanvasAgg(figure).print_png(partial)
    return path


def _position(tokens: np.ndarray, lowest: float) -> np.ndarray:
    """log10 of tokens; 0 tokens sit a third of a decade left of the first positive checkpoint."""
    return np.log10(np.where(tokens > 0, tokens, lowest / 2.0))


def _token_axis(axes: Axes, tokens: np.ndarray) -> float:
    positive = tokens[tokens > 0]
    lowest = float(positive.min()) if len(positive) else 1.0
    low, high = math.log10(lowest), math.log10(float(positive.max()) if len(positive) else 10.0)
    multiples = (1, 2, 5) if high - low < 2.5 else (1,)
    ticks = [math.log10(m) + d for d in range(math.floor(low), math.ceil(high) + 1) for m in multiples]
    ticks = [t for t in ticks if low - 0.02 <= t <= high + 0.05]
    if (tokens == 0).any():
        zero = math.log10(lowest / 2.0)
        ticks = [zero, *(t for t in ticks if t - zero > 0.04 * (high - low) + 0.1)]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    zero_at = ticks[0] if (tokens == 0).any() and ticks else None
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: "0" if x == zero_at else format_tokens(10**x)))
    axes.set_xlabel("training tokens")
    return lowest


def _domain(table: pd.DataFrame, means: pd.DataFrame, tints: dict[str, str], domain: str, metric: str) -> Figure:
    """One series: its tasks in one plot. Several: one plot per task with the series in it. Many tasks: their mean."""
    tasks, crowded = list(dict.fromkeys(table["task"])), table["task"].nunique() > _CROWDED
    apart = len(tints) > 1 and not crowded
    columns = min(3, len(tasks)) if apart else 1
    rows = -(-len(tasks) // columns) if apart else 1
    figure = Figure(
        figsize=(6.4 if columns == 1 else 4.0 * columns, 4.0 if rows == 1 else 3.1 * rows), layout="constrained"
    )
    plots = figure.subplots(rows, columns, squeeze=False).ravel()
    for spare in plots[len(tasks) if apart else 1 :]:
        spare.remove()
    handles = {}
    for i, axes in enumerate(plots[: len(tasks) if apart else 1]):
        shown = table[table["task"] == tasks[i]] if apart else table
        lowest = _token_axis(axes, shown["tokens"].to_numpy(float))
        chances = sorted(set(shown["chance"].dropna()))
        for chance in chances:
            axes.axhline(chance, color="#5c6470", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
            where: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "top"}
            axes.annotate("chance", (0.995, chance), fontsize=7.5, color="#5c6470", **where)
        for series, tint in tints.items():
            for task, curve in shown[shown["series"] == series].groupby("task", sort=False, observed=True):
                one = tint if len(tints) > 1 or crowded else COLOURS[tasks.index(str(task)) % len(COLOURS)]
                label = "" if crowded else series if len(tints) > 1 else str(task)
                _line(axes, curve, lowest, one, label, faint=crowded)
            mean = means[means["series"] == series]
            if crowded and len(chances) == 1 and len(mean):
                scale = 1 - chances[0]
                mean = mean.assign(value=chances[0] + mean["value"] * scale, stderr=mean["stderr"] * scale)
                label = f"mean of {len(tasks)} tasks" + (f", {series}" if len(tints) > 1 else "")
                _line(axes, mean, lowest, tint, label, faint=False)
        axes.set_title(tasks[i] if apart else domain[:1].upper() + domain[1:])
        axes.set_ylabel(metric_of(metric).label if i % columns == 0 else "")
        lines, labels = axes.get_legend_handles_labels()
        handles |= dict(zip(labels, lines, strict=True))
    if handles:
        layout: dict[str, Any] = {"loc": "outside lower center", "ncols": min(4 if columns > 1 else 3, len(handles))}
        figure.legend(list(handles.values()), list(handles), fontsize=8, **layout)
    return figure


def _line(axes: Axes, curve: pd.DataFrame, lowest: float, colour: str, label: str, *, faint: bool) -> None:
    curve = curve.sort_values("tokens")
    x, y = _position(curve["tokens"].to_numpy(float), lowest), curve["value"].to_numpy(float)
    error = 1.96 * curve["stderr"].to_numpy(float)
    look: dict[str, Any] = (
        {"linewidth": 0.7, "alpha": 0.3} if faint else {"linewidth": 1.7, "marker": "o" if len(x) <= 40 else ""}
    )
    axes.plot(x, y, color=colour, markersize=2.6, label=label or None, **look)
    if not faint and np.isfinite(error).any():
        axes.fill_between(x, y - error, y + error, color=colour, alpha=0.1, linewidth=0)


def _overview(table: pd.DataFrame, summary: pd.DataFrame, series: str, title: str) -> Figure:
    """Tasks x tokens of one series in the order of t50, coloured by the chance-normalised score."""
    table, summary = table[table["series"] == series], summary[summary["series"] == series]
    # tasks without chance are shown by the share of their own final gain
    rank = summary["t50"].where(summary["t50_outcome"] != BEFORE_FIRST, -1.0)
    rows = summary.assign(rank=rank).sort_values(["rank", "onset"], na_position="last")
    figure = Figure(figsize=(7.6, 1.5 + 0.27 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    lowest = _token_axis(axes, table["tokens"].to_numpy(float))
    scores: list[np.ndarray] = []
    for row in rows.to_dict("records"):
        curve = table[table["task"] == row["task"]].sort_values("tokens")
        value, gain = curve["value"].to_numpy(float), row["level"] - row["baseline"]
        has_chance = math.isfinite(row["chance"])
        scores.append(
            normalised(value, np.full(len(value), row["chance"]))
            if has_chance
            else (value - row["baseline"]) / (gain or 1.0)
        )
    peak = max(0.1, float(np.nanmax(np.concatenate(scores))))
    norm = Normalize(-peak, peak)
    for i, (row, score) in enumerate(zip(rows.to_dict("records"), scores, strict=True)):
        x = _position(table[table["task"] == row["task"]].sort_values("tokens")["tokens"].to_numpy(float), lowest)
        middle = (x[1:] + x[:-1]) / 2
        half = (x[1] - x[0]) / 2 if len(x) > 1 else 0.1
        edges = np.concatenate([[x[0] - half], middle, [x[-1] + ((x[-1] - x[-2]) / 2 if len(x) > 1 else 0.1)]])
        axes.pcolormesh(
            edges, [i - 0.44, i + 0.44], score[None, :], cmap=_SHADES, norm=norm, edgecolors="white", linewidth=0.3
        )
    for column, marker, face in (("onset", ">", "white"), ("t50", "o", "black"), ("t90", "|", "black")):
        at = np.flatnonzero(rows[column].notna().to_numpy())
        x = _position(rows[column].to_numpy(float)[at], lowest)
        edge, width = (None, 1.8) if marker == "|" else ("black" if face == "white" else "white", 0.9)
        axes.scatter(x, at, marker=marker, s=30, c=face, zorder=3, label=column, edgecolors=edge, linewidths=width)
    axes.set_yticks(range(len(rows)), rows["task"])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_title(title if len(title) < 70 else title[:69] + "…")
    figure.legend(loc="outside lower right", ncols=3, fontsize=8)
    shade = ScalarMappable(norm=norm, cmap=_SHADES)
    bar = figure.colorbar(shade, ax=axes, fraction=0.03, pad=0.02, label="score above chance")
    bar.outline.set_visible(False)
    return figure
