"""How figures look: widths, fonts, colours and line styles, and the axis of training tokens with a place for 0."""

import math
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from fineline_jax.errors import UserError
from fineline_jax.trajectories.statistics.columns import format_tokens, size_of

# Okabe & Ito's colours, safe for colour-blind readers; the yellow, too pale on white, replaced.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#6f4fa3", "#4d4d4d")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (3, 1, 1, 1, 1, 1)))
# For series that differ in size, in the order of size: viridis without its palest end.
_RAMP = LinearSegmentedColormap.from_list(
    "size", ["#c9a400", "#7fb13c", "#2f9c7c", "#21808d", "#31638d", "#43407f", "#440f54"]
)
Look = tuple[str, Any]
"""(colour, line style)"""
_STYLES = {"screen": (6.4, 9.0), "paper": (3.25, 7.0), "slides": (10.0, 16.0)}
"""Width in inches and size of letters in points."""


@dataclass(frozen=True)
class FigureStyle:
    """Width of a figure in inches and size of its letters in points."""

    inches: float = _STYLES["screen"][0]
    points: float = _STYLES["screen"][1]

    @property
    def settings(self) -> dict[Any, Any]:
        """For matplotlib's rc_context."""
        return {
            "font.family": "sans-serif", "font.size": self.points, "axes.spines.top": False,
            "axes.spines.right": False, "axes.edgecolor": "#8a8f98", "axes.labelcolor": "#3c424b",
            "xtick.color": "#5c6470", "ytick.color": "#5c6470", "axes.grid": True, "grid.color": "#ecebe6",
            "grid.linewidth": 0.8, "axes.axisbelow": True, "axes.titlelocation": "left", "axes.titleweight": "bold",
            "axes.titlesize": 1.1 * self.points, "legend.frameon": False, "legend.fontsize": 0.9 * self.points,
            "figure.dpi": 160, "svg.hashsalt": "fineline", "pdf.fonttype": 42, "svg.fonttype": "none",
        }  # fmt: skip

    @property
    def columns(self) -> int:
        """Plots beside each other: fifteen letters' height each at least, three at most."""
        return max(1, min(3, int(self.inches * 72 / (15 * self.points))))

    def wrapped(self, text: str, inches: float) -> str:
        """A bold title in lines that fit this width."""
        return "\n".join(textwrap.wrap(text, max(12, int(inches * 72 / (0.66 * 1.1 * self.points)))))

    def shortened(self, names: Iterable[str], share: float) -> list[str]:
        """Names without the middle of those that are longer than this share of the width."""
        most = max(12, int(share * self.inches * 72 / (0.6 * self.points)))
        return [name if len(name) <= most else f"{name[: most // 2]}…{name[-most // 2 :]}" for name in names]


def figure_style(text: str) -> FigureStyle:
    """The style that NAME or NAME:INCHES says. Raises UserError."""
    name, colon, width = text.partition(":")
    if name not in _STYLES:
        raise UserError(f"--figure-style {text}: write {', '.join(_STYLES)}, or with a width in inches: paper:3.25")
    inches, points = _STYLES[name]
    if colon:
        try:
            inches = float(width)
        except ValueError:
            inches = math.nan
        if not 1 <= inches <= 40:
            raise UserError(f"--figure-style {text}: the width must be from 1 to 40 inches, such as {name}:3.25")
    return FigureStyle(inches, points)


def order_by_size(names: list[str]) -> tuple[list[str], bool]:
    """Series by model size where every name states one (160m, 1.4B), of three sizes or more; else as they came.

    And whether so.
    """
    sizes = {name: size_of(name) for name in names}
    if len(set(sizes.values())) < 3 or any(math.isnan(size) for size in sizes.values()):
        return names, False
    return sorted(names, key=sizes.__getitem__), True


def looks(series: list[str], ordered: bool) -> dict[str, Look]:
    """Colour and line style of each series, no two alike up to 40 series: series of one size share their colour."""
    if not ordered:
        return {s: (COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)]) for i, s in enumerate(series)}
    sizes = sorted({size_of(name) for name in series})
    found, seen = {}, dict.fromkeys(sizes, 0)
    for name in series:
        size = size_of(name)
        shade = to_hex(_RAMP(sizes.index(size) / (len(sizes) - 1)))
        found[name] = shade, DASHES[seen[size] % len(DASHES)]
        seen[size] += 1
    return found


def position(tokens: np.ndarray, lowest: float) -> np.ndarray:
    """log10 of tokens; 0 tokens sit a third of a decade left of the first positive checkpoint."""
    return np.log10(np.where(tokens > 0, tokens, lowest / 2.0))


def apart_from_zero(x: np.ndarray, y: np.ndarray, lowest: float) -> tuple[np.ndarray, np.ndarray]:
    """x, y with a gap after the points at 0 tokens, which are not on the log axis."""
    at = int((x < math.log10(lowest) - 1e-9).sum())
    return (np.insert(x, at, np.nan), np.insert(y, at, np.nan)) if 0 < at < len(x) else (x, y)


def token_axis(axes: Axes, tokens: np.ndarray, wide: float) -> float:
    """Ticks for people on a log axis of tokens, `wide` inches, 0 apart by a break; the lowest positive tokens."""
    positive = tokens[tokens > 0]
    lowest = float(positive.min()) if len(positive) else 1.0
    low, high = math.log10(lowest), math.log10(float(positive.max()) if len(positive) else 10.0)
    multiples = (1, 2, 5) if high - low < 2.5 else (1,)
    ticks = [math.log10(m) + d for d in range(math.floor(low), math.ceil(high) + 1) for m in multiples]
    ticks = [t for t in ticks if low - 0.02 <= t <= high + 0.05]
    most = max(2, int(wide * 72 / (4.2 * rcParams["font.size"])))
    ticks = ticks[:: max(1, -(-len(ticks) // most))]
    zero_at = None
    if (tokens == 0).any():
        zero_at = math.log10(lowest / 2.0)
        ticks = [zero_at, *(t for t in ticks if t - zero_at > 0.6 * (high - zero_at) / most)]
        middle = (zero_at + low) / 2
        low_edge: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "clip_on": False, "linestyle": "none"}
        axes.plot([middle], [0], marker=[(-1, -2), (1, 2)], markersize=9, color="#8a8f98", zorder=5, **low_edge)
        axes.plot([middle], [0], marker="s", markersize=3, color="white", zorder=4, **low_edge)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: "0" if x == zero_at else format_tokens(10**x)))
    axes.set_xlabel("training tokens")
    return lowest


def chance_lines(axes: Axes, chances: list[float], points: float) -> None:
    """Dashed lines at the chance levels, with their name right of the plot, where no curve is."""
    for chance in chances:
        axes.axhline(chance, color="#5c6470", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    low, high = axes.get_ylim()
    named: list[float] = []
    for chance in sorted(chances):
        if not named or chance - named[-1] > 0.06 * (high - low):
            where: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "ha": "left", "va": "center"}
            axes.annotate("chance", (1.01, chance), fontsize=0.85 * points, color="#5c6470", **where)
            named.append(chance)
