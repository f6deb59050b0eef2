"""What the pictures draw, read back from matplotlib's artists before they become pixels."""

import math
import re
import struct
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from trajectories_simulated import simulated_table

from fineline_jax.errors import UserError
from fineline_jax.trajectories.report import figures
from fineline_jax.trajectories.report.figures import draw_figures
from fineline_jax.trajectories.report.findings import compute
from fineline_jax.trajectories.report.style import COLOURS, FigureStyle, figure_style, looks, order_by_size
from fineline_jax.trajectories.sizes.gaps import SIZE_GAPS
from fineline_jax.trajectories.statistics.comparison import COMPARISON
from fineline_jax.trajectories.statistics.domains import domain_curves
from fineline_jax.trajectories.statistics.dynamics import DYNAMICS, summarise
from fineline_jax.trajectories.table import normalise

NAN = math.nan


def results_of(table: pd.DataFrame) -> list:
    return [(DYNAMICS, summarise(table))]


@pytest.fixture
def drawn(monkeypatch):
    """table, … -> {name of the file: figure}; nothing is rendered."""

    def draw(frame: pd.DataFrame, metric: str = "acc", title: str = "Title") -> dict:
        found = {}
        monkeypatch.setattr(figures, "_save", lambda figure, path: [found.setdefault(path.name, figure) and path])
        table = normalise(frame)
        paths = draw_figures(table, results_of(table), domain_curves(table), Path("/tmp"), metric=metric, title=title)
        assert [path.name for path in paths] == list(found)
        return found

    return draw


def rows(tasks: dict[str, float], series: tuple[str, ...] = ("s",), domain: str = "one") -> pd.DataFrame:
    """Of each task, rising from its chance at different times; checkpoints at 0 and from 1 M to 1 B tokens."""
    tokens = np.array([0, *np.geomspace(1e6, 1e9, 10)])
    parts = []
    for s, name in enumerate(series):
        for i, (task, chance) in enumerate(tasks.items()):
            low = 0.1 if math.isnan(chance) else chance
            value = low + (0.8 - low) * (np.arange(11) > 3 + 2 * i + s) + 1e-3 * s
            part = pd.DataFrame(
                {"series": name, "tokens": tokens, "task": task, "value": value, "stderr": 0.01 * (i + 1)}
            )
            parts.append(part.assign(metric="acc", domain=domain, chance=chance, n=500))
    return pd.concat(parts)


def apart(frame: pd.DataFrame) -> pd.DataFrame:
    """Each curve of `rows` with a slope of its own, so that none is a constant answer or another's copy."""
    return frame.assign(value=frame["value"] + frame["stderr"] * np.tile(np.linspace(0, 1, 11), len(frame) // 11))


def data_of(axes) -> dict[str, np.ndarray]:
    """Label -> [points, 2] of the lines that are in the legend."""
    named = [line for line in axes.lines if not line.get_label().startswith("_")]
    return {line.get_label(): line.get_xydata()[np.isfinite(line.get_xydata()[:, 1])] for line in named}


def test_there_is_an_overview_and_a_picture_per_domain(drawn) -> None:
    frame = pd.concat([rows({"a": 0.5}, domain="a b"), rows({"b": 0.5}, domain="a_b"), rows({"c": 0.5}, domain="東京")])
    assert list(drawn(frame)) == ["overview", "a_b", "a_b_2", "domain"]
    only = drawn(pd.concat([rows({"a": 0.5}), rows({"b": 0.5}, domain="x").assign(metric="other")]))
    assert list(only) == ["overview", "one"]  # of the metric asked for


def test_one_series_is_a_line_per_task_with_its_band_and_the_chance(drawn) -> None:
    frame = rows({"a": 0.5, "b": 0.25})
    [axes] = drawn(frame)["one"].axes
    tokens = frame.tokens[frame.task == "a"].to_numpy()
    x = np.log10(np.where(tokens > 0, tokens, 0.5e6))  # 0 is half of the first step to the left
    lines = data_of(axes)
    assert list(lines) == ["a", "b"]
    for i, task in enumerate(("a", "b")):
        part = frame[frame.task == task]
        np.testing.assert_allclose(lines[task], np.stack([x, part.value], axis=1))
        band = axes.collections[i].get_paths()[0].vertices
        for j in range(len(x)):
            at = band[np.isclose(band[:, 0], x[j])][:, 1]
            assert (at.min(), at.max()) == pytest.approx(
                (part.value.iloc[j] - 1.96 * 0.01 * (i + 1), part.value.iloc[j] + 1.96 * 0.01 * (i + 1))
            )
    assert sorted({line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == "--"}) == [0.25, 0.5]
    assert [line.get_color() for line in axes.lines if line.get_label() in "ab"] == list(COLOURS[:2])
    assert axes.get_title(loc="left") == "One" and axes.get_ylabel() == "accuracy"
    assert axes.get_xlabel() == "training tokens"


def test_the_token_axis_has_ticks_for_people_and_one_for_zero(drawn) -> None:
    [axes] = drawn(rows({"a": 0.5}))["one"].axes
    locations = axes.xaxis.get_major_locator()()
    texts = [axes.xaxis.get_major_formatter()(x) for x in locations]
    assert locations == pytest.approx([math.log10(0.5e6), 6, 7, 8, 9])
    assert texts == ["0", "1 M", "10 M", "100 M", "1 B"]
    frame = rows({"a": 0.5})
    [axes] = drawn(frame.assign(tokens=frame.tokens * frame.tokens / 1e6))["one"].axes  # 6 decades: no room at 0
    assert list(axes.xaxis.get_major_locator()()) == pytest.approx([math.log10(0.5e6), 7, 8, 9, 10, 11, 12])
    [axes] = drawn(frame[(frame.tokens > 4e6) & (frame.tokens < 3e8)])["one"].axes
    assert [axes.xaxis.get_major_formatter()(x) for x in axes.xaxis.get_major_locator()()] == [
        "5 M", "10 M", "20 M", "50 M", "100 M", "200 M",
    ]  # fmt: skip


def test_several_series_are_lines_of_a_plot_per_task(drawn) -> None:
    frame = rows({"a": 0.5, "b": 0.25, "c": 0.5, "d": 0.5}, ("s", "r"))
    plots = drawn(frame)["one"].axes
    assert [axes.get_title(loc="left") for axes in plots] == ["a", "b", "c", "d"]
    for axes, task in zip(plots, "abcd"):
        lines = data_of(axes)
        assert list(lines) == ["s", "r"]
        for series in ("s", "r"):
            part = frame[(frame.task == task) & (frame.series == series)]
            np.testing.assert_allclose(lines[series][:, 1], part.value)
    assert [bool(axes.get_ylabel()) for axes in plots] == [True, False, False, True]


@pytest.mark.parametrize(("count", "crowded"), [(8, False), (9, True)])
def test_more_than_eight_tasks_are_faint_under_their_mean(drawn, count: int, crowded: bool) -> None:
    frame = apart(rows({f"t{i}": 0.5 for i in range(count)}))
    [axes] = drawn(frame)["one"].axes
    lines = data_of(axes)
    if not crowded:
        assert list(lines) == [f"t{i}" for i in range(count)]
        return
    assert list(lines) == ["mean of 9 tasks"]
    mean = frame.groupby("tokens")["value"].mean()
    np.testing.assert_allclose(lines["mean of 9 tasks"][:, 1], mean)
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    error = 1.96 * math.sqrt(sum((0.01 * (i + 1)) ** 2 for i in range(9))) / 9
    assert band.max() == pytest.approx(mean.max() + error) and len(axes.collections) == 1
    faint = [line for line in axes.lines if line.get_alpha() == 0.3]
    assert len(faint) == 9
    [two] = drawn(rows({f"t{i}": 0.5 if i else 0.25 for i in range(count)}))["one"].axes
    assert not data_of(two)  # of different chance levels: no mean on this axis


def test_the_overview_is_in_the_order_of_learning_and_shows_scores_above_chance(drawn) -> None:
    frame = pd.concat([rows({"late": 0.0, "mid": 0.0, "early": 0.25}), rows({"never": 0.5}).assign(value=0.5)])
    shift = {"late": 4, "mid": 2, "early": 0}
    frame["value"] = [
        row.value if row.task == "never" else (0.9 if row.tokens >= 10 ** (6.5 + shift[row.task] / 2) else row.chance)
        for row in frame.itertuples()
    ]
    frame = pd.concat([frame, rows({"free": NAN})])
    axes = drawn(frame)["overview"].axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    summary = summarise(normalise(frame)).set_index("task")
    assert list(summary["rank"][names]) == [1, 2, 3, 4, 5]
    meshes, marks = (
        axes.collections[: len(names)],
        axes.collections[len(names) + 2 :],
    )  # two: the intervals, with a halo
    for i, (task, mesh) in enumerate(zip(names, meshes)):
        row, values = summary.loc[task], frame.value[frame.task == task]
        chance = row.chance == row.chance
        expected = (
            (values - row.chance) / (1 - row.chance) if chance else (values - row.baseline) / (row.level - row.baseline)
        )
        np.testing.assert_allclose(np.ravel(mesh.get_array()), expected, atol=1e-12)
        corners = mesh.get_coordinates()
        assert list(corners[:, 0, 1]) == pytest.approx([i - 0.44, i + 0.44])
        x = np.log10([0.5e6, *np.geomspace(1e6, 1e9, 10)])
        middle = (x[1:] + x[:-1]) / 2
        assert list(corners[0, :, 0]) == pytest.approx([x[0] - 0.15051, *middle, x[-1] + (x[-1] - x[-2]) / 2], abs=1e-4)
        assert (mesh.norm.vmin, mesh.norm.vmax) == pytest.approx((-1.0, 1.0))  # `free` ends at its own level
    finals = [text.get_text() for text in axes.texts]
    assert finals == [f"{summary.final[task]:.3f}" for task in names]
    for column, mark in zip(("onset", "to_score", "t90"), marks):
        at = [
            (math.log10(summary.loc[task, column]), i) for i, task in enumerate(names) if summary.loc[task, column] > 0
        ]
        np.testing.assert_allclose(np.asarray(mark.get_offsets()), at)
        assert mark.get_label() == column.replace("_", " ")
    low, high = axes.get_ylim()
    assert low > high  # the first row at the top


def test_tasks_learned_before_the_first_checkpoint_come_first(drawn) -> None:
    frame = rows({"a": 0.25, "b": 0.25})
    frame.loc[frame.task == "b", "value"] = 0.9
    axes = drawn(frame)["overview"].axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["b", "a"]


def test_series_that_differ_in_size_are_coloured_in_order_and_the_largest_is_shown(drawn) -> None:
    names = ("m-1b", "m-70m", "m-7b")
    found = drawn(rows({"a": 0.5}, names))
    assert found["overview"].get_suptitle() == "Title: m-7b"
    [axes] = found["one"].axes
    colours = {line.get_label(): to_hex(line.get_color()) for line in axes.lines if line.get_label() in names}
    assert list(colours) == ["m-70m", "m-1b", "m-7b"]
    assert colours["m-70m"] == "#c9a400" and colours["m-7b"] == "#440f54"
    plain = drawn(rows({"a": 0.5}, ("z", "y")))
    assert plain["overview"].get_suptitle() == "Title: z"
    colours = [line.get_color() for line in plain["one"].axes[0].lines if line.get_label() in "zy"]
    assert colours == list(COLOURS[:2])
    alone = drawn(rows({"a": 0.5}), title="T" * 80)["overview"].get_suptitle()
    assert alone.replace("\n", "") == "T" * 80 and alone.count("\n") == 1


@pytest.mark.parametrize("tokens", [[1e6], [0.0]])
def test_one_checkpoint_is_drawn(drawn, tokens: list[float]) -> None:
    frame = rows({"a": 0.5}).iloc[:1].assign(tokens=tokens)
    axes = drawn(frame)["overview"].axes[0]
    corners = axes.collections[0].get_coordinates()[0, :, 0]
    assert corners[1] - corners[0] == pytest.approx(0.2)


def test_the_simulated_world_has_a_figure_per_domain_at_its_resolution(tmp_path: Path) -> None:
    table = normalise(simulated_table(checkpoints=5))
    table = table[table.domain == "facts"]
    style = FigureStyle(inches=4.0, points=8)
    paths = draw_figures(
        table, results_of(table), domain_curves(table), tmp_path / "new", metric="acc", title="T", style=style
    )
    kinds = ("pdf", "svg", "png")
    assert [path.name for path in paths] == [f"{name}.{kind}" for name in ("overview", "facts") for kind in kinds]
    assert [width_of(path) for path in paths] == pytest.approx([4.0] * 6, abs=1e-3)
    assert paths[3].read_bytes()[:5] == b"%PDF-" and "<svg" in paths[4].read_text()[:600]


@pytest.mark.slow
def test_every_figure_of_an_analysis_is_as_wide_as_asked(tmp_path: Path) -> None:
    """The files themselves say their width: PDF in its MediaBox, in points of 1/72 inch, SVG in its attribute."""
    tasks = {f"a task of a long name, number {i}": 0.25 for i in range(5)}
    names = ("m-70m", "m-1b", "m-7b")
    table = normalise(apart(pd.concat([rows(tasks, names), rows({f"t{i}": 0.5 for i in range(9)}, names, "many")])))
    results, style = compute(table), figure_style("paper:3.3")
    paths = draw_figures(table, results, domain_curves(table), tmp_path, metric="acc", title="T", style=style)
    drawn = {path.stem for path in paths}
    assert drawn > {"overview", "one", "many", "size_gaps", "comparison", "similarity"}
    widths = {path.name: width_of(path) for path in paths}
    assert widths == pytest.approx(dict.fromkeys(widths, 3.3), abs=1e-3)


def width_of(path: Path) -> float:
    """Inches. A PNG has 160 dots an inch."""
    if path.suffix == ".png":
        return struct.unpack(">I", path.read_bytes()[16:20])[0] / 160
    said = rb"/MediaBox \[ *0 +0 +([\d.]+) " if path.suffix == ".pdf" else rb'<svg[^>]* width="([\d.]+)pt"'
    found = re.search(said, path.read_bytes())
    assert found is not None, path
    return float(found[1]) / 72


def test_no_text_of_a_figure_is_outside_it(tmp_path: Path, monkeypatch) -> None:
    names = tuple(f"a-model-with-a-long-name-{size}m" for size in range(100, 116))
    tasks = {f"a task of a long name, number {i}": 0.25 for i in range(3)}
    table = normalise(rows(tasks, names, domain="a domain of a name that is longer than its figure is wide, by far"))
    kept = {}
    monkeypatch.setattr(figures, "_save", lambda figure, path: [kept.setdefault(path.name, figure) and path])
    title = "A title that is longer than the figure is wide, so that it takes two lines or even three of them"
    style = FigureStyle(inches=3.25, points=7)
    results = [*results_of(table), (COMPARISON, COMPARISON.compute(table))]
    draw_figures(table, results, domain_curves(table), tmp_path, metric="acc", title=title, style=style)
    assert len(kept) == 3
    for name, figure in kept.items():
        figures.FigureCanvasAgg(figure)
        figure.draw_without_rendering()
        ticks = [label for axes in figure.axes for label in axes.get_xticklabels()]  # some outside the axis, not drawn
        texts = [one for one in figure.findobj(lambda artist: hasattr(artist, "get_text")) if one.get_visible()]
        for text in texts:
            if text.get_text() and text not in ticks:
                box = text.get_window_extent()
                assert box.x0 >= -1 and box.x1 <= figure.bbox.x1 + 1, (name, text.get_text())
                assert box.y0 >= -1 and box.y1 <= figure.bbox.y1 + 1, (name, text.get_text())


def test_gap_and_ratio_are_curves_over_tokens_with_their_intervals(monkeypatch) -> None:
    names = ("m-70m", "m-1b", "m-7b")
    table = normalise(apart(pd.concat([rows({"a": 0.5}, names), rows({"b": 0.25}, names, "two")])))
    frame, found = SIZE_GAPS.compute(table), []
    monkeypatch.setattr(figures, "_save", lambda figure, path: [found.append(figure) or path])
    results = [*results_of(table), (SIZE_GAPS, frame)]
    draw_figures(table, results, domain_curves(table), Path("/tmp"), metric="acc", title="T")
    plots = found[-1].axes
    assert [axes.get_title(loc="left") for axes in plots] == ["one: gap", "one: ratio", "two: gap", "two: ratio"]
    assert found[-1].get_suptitle().replace("\n", " ").endswith("m-7b")
    for axes in plots:
        domain, _, column = axes.get_title(loc="left").partition(": ")
        assert {line.get_ydata()[0] for line in axes.lines if len(line.get_ydata()) == 2} == {float(column == "ratio")}
        curves = [line for line in axes.lines if line.get_marker() == "o"]
        assert len(curves) == 2
        for line, small, band in zip(curves, ("m-70m", "m-1b"), axes.collections, strict=True):
            part = frame[(frame.small == small) & (frame.domain == domain)]
            np.testing.assert_allclose(line.get_xdata(), np.log10(part.tokens))
            np.testing.assert_array_equal(line.get_ydata(), part[column])
            edges = band.get_paths()[0].vertices[:, 1]
            assert {part[f"{column}_low"].iloc[-1], part[f"{column}_high"].iloc[-1]} <= set(edges)


def test_no_two_of_sixteen_series_look_alike() -> None:
    for names in (
        [f"s{i}" for i in range(16)],
        [f"m-{size}m-{kind}" for size in (70, 160, 410, 999) for kind in "abcd"],
    ):
        found = looks(*order_by_size(names))
        assert len(set(found.values())) == 16
    colours = [found[f"m-{size}m-a"][0] for size in (70, 160, 410, 999)]
    assert [found[f"m-{size}m-d"][0] for size in (70, 160, 410, 999)] == colours and len(set(colours)) == 4


def test_zero_tokens_are_apart_from_the_log_axis(drawn) -> None:
    [axes] = drawn(rows({"a": 0.5}))["one"].axes
    [line] = [line for line in axes.lines if line.get_label() == "a"]
    assert list(np.isnan(line.get_ydata())) == [False, True] + [False] * 10
    marks = [line.get_xdata()[0] for line in axes.lines if len(line.get_xdata()) == 1]
    assert marks == [pytest.approx((math.log10(0.5e6) + 6) / 2)] * 2
    without = drawn(rows({"a": 0.5}).query("tokens > 0"))["one"].axes[0]
    assert not [line for line in without.lines if len(line.get_xdata()) == 1]


def test_the_name_of_chance_is_beside_the_plot_and_not_twice_at_one_place(drawn) -> None:
    [axes] = drawn(rows({"a": 0.25, "b": 0.26, "c": 0.5}))["one"].axes
    places = [(text.xy[0] > 1, text.xy[1]) for text in axes.texts]
    assert places == [(True, 0.25), (True, 0.5)]


@pytest.mark.parametrize("text", ["poster", "paper:wide", "paper:0.5", "paper:nan", "paper:"])
def test_a_style_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="--figure-style " + text):
        figure_style(text)


def test_styles_have_their_widths() -> None:
    assert [figure_style(name).inches for name in ("screen", "paper", "slides", "paper:6.75")] == [
        6.4,
        3.25,
        10.0,
        6.75,
    ]


def test_figures_are_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = normalise(rows({"a": 0.5}))
    draw = lambda: draw_figures(table, results_of(table), domain_curves(table), tmp_path, metric="acc", title="t")

    def torn(canvas, path, **options) -> None:
        Path(path).write_bytes(b"half of a")
        raise OSError(28, "no space left")

    old = {path: path.read_bytes() for path in draw()}
    monkeypatch.setattr(figures.FigureCanvasPdf, "print_pdf", torn)
    with pytest.raises(OSError, match="no space left"):
        draw()
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == old
