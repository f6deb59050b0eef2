"""The numbers of the page against the tables they are made from, and what its own scripts make of them (with Node)."""

import html
import itertools
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from report_examples import page_of

from fineline_jax import __version__
from fineline_jax.facts.metrics import METRICS
from fineline_jax.trajectories.ablation.final_map import FINAL_MAP
from fineline_jax.trajectories.report import html_page, page_data
from fineline_jax.trajectories.report.findings import compute
from fineline_jax.trajectories.report.html_page import write_report
from fineline_jax.trajectories.report.page_data import _SUMMARY
from fineline_jax.trajectories.statistics.defects import NOT_SCORED
from fineline_jax.trajectories.statistics.domains import domain_curves
from fineline_jax.trajectories.statistics.dynamics import summarise
from fineline_jax.trajectories.table import normalise

NAN = math.nan
CHANCE = {"order": 0.5, "sums": 0.25, "facts": 0.0, "<i>odd</i>": NAN}
DOMAIN = {"order": "language", "sums": "a & b", "facts": "a & b", "<i>odd</i>": "language"}
# Middle of the rise, steepness, end. `order` is half learned before `odd` and nine tenths after it.
SHAPES = {"order": (1.3e6, 0.7, 0.9), "sums": (3e7, 3, 0.7), "facts": (3e8, 3, 0.3), "<i>odd</i>": (3e6, 6, 0.8)}


def scores() -> pd.DataFrame:
    """Two series on different checkpoints; `facts` rises to the end, `order` is lacking at one checkpoint."""
    rng = np.random.default_rng(2)
    rows = []
    for series, tokens in (("small", [0, *np.geomspace(1e6, 7.5e8, 12), 1e9]), ("big", np.geomspace(2e6, 5e8, 7))):
        for i, at in enumerate(tokens):
            for task, chance in CHANCE.items():
                if series == "small" and i == 4 and task == "order":
                    continue
                middle, steepness, end = SHAPES[task]
                low = 0.1 if math.isnan(chance) else chance
                acc = low + (end - low) / (1 + (middle / max(at, 1)) ** steepness) + 0.002 * rng.standard_normal()
                key = {
                    "series": series,
                    "checkpoint": f"c{i}",
                    "step": i * 1_234_567,
                    "tokens": round(at),
                    "task": task,
                }
                key |= {"domain": DOMAIN[task], "n": 2000 + i}
                rows.append(key | {"metric": "acc", "value": acc, "stderr": 0.0123456, "chance": chance})
                rows.append(key | {"metric": "alpha", "value": 3 * acc, "stderr": NAN, "chance": NAN})
                if task in ("sums", "facts"):
                    rows.append(key | {"metric": "bits_per_byte", "value": 9 - acc, "stderr": 0.1, "chance": NAN})
    return pd.DataFrame(rows)


def short(value: float, digits: int) -> float | None:
    return float(f"{value:.{digits - 1}e}") if math.isfinite(value) else None


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return normalise(scores())


@pytest.fixture(autouse=True, scope="module")
def without_pictures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(html_page, "draw_figures", lambda *tables, **options: [Path("a&b.pdf"), Path("a&b.svg")])
        yield


@pytest.fixture(scope="module")
def made(table: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Path:
    facts = {"pack": "3f<2", "versions": {"lm_eval": "0.4", "jax": 1}, "runs": ["r1", "r2"], "made by": "me"}
    return write_report(table, tmp_path_factory.mktemp("page"), title="A & B", facts=facts)


@pytest.fixture(scope="module")
def data(made: Path) -> dict:
    return page_of(made)[1]


def test_series_tasks_and_metrics_are_those_of_the_table(data: dict, table: pd.DataFrame) -> None:
    assert [s["name"] for s in data["series"]] == ["small", "big"] and data["ordered"] is False
    for series in data["series"]:
        rows = table[table.series == series["name"]].drop_duplicates("checkpoint").sort_values("tokens")
        assert series["checkpoints"] == list(rows.checkpoint) and series["steps"] == list(rows.step)
        assert series["tokens"] == [short(tokens, 9) for tokens in rows.tokens]
    assert data["domains"] == ["language", "a & b"]
    assert [(t["name"], data["domains"][t["domain"]]) for t in data["tasks"]] == [
        (task, DOMAIN[task]) for task in ("order", "<i>odd</i>", "sums", "facts")
    ]
    assert [m["name"] for m in data["metrics"]] == ["acc", "bits_per_byte", "alpha"]  # ours in our order, then others
    for metric, better, chance, log in zip(data["metrics"], (1, -1, 1), ("task", "none", "task"), (False,) * 3):
        assert (metric["better"], metric["chance"], metric["log"]) == (better, chance, log)
    assert [m["label"] for m in data["metrics"]] == ["accuracy", "bits per byte", "alpha"]
    assert data["losses"] is None


@pytest.mark.parametrize("kind", ["curves", "domain_curves"])
def test_every_curve_of_the_page_is_the_one_of_its_table(kind: str, data: dict, table: pd.DataFrame) -> None:
    source = table if kind == "curves" else domain_curves(table)
    rows = summarise(source).set_index(["series", "task", "metric"])
    assert len(data[kind]) == len(rows) == {"curves": 2 * (4 + 4 + 2), "domain_curves": 2 * 2}[kind]
    for curve in data[kind]:
        series = data["series"][curve["series"]]
        task = data["tasks"][curve["task"]]["name"] if kind == "curves" else data["domains"][curve["domain"]]
        key = (series["name"], task, data["metrics"][curve["metric"]]["name"])
        part = source[(source.series == key[0]) & (source.task == key[1]) & (source.metric == key[2])]
        part = part.set_index("checkpoint")
        for column in ("value", "stderr"):
            expected = [short(part[column].get(name, NAN), 5) for name in series["checkpoints"]]
            assert curve[column] == expected, (key, column)
        assert curve["chance"] == short(part.chance.iloc[-1], 6)
        assert curve["n"] == (short(part.n.iloc[-1], 6) if kind == "curves" else None)
        assert curve.get("tasks") == (None if kind == "curves" else {"language": 1, "a & b": 2}[key[1]])
        place = {
            name: curve[name]
            for name in ("series", "metric", "task", "domain")
            if name in curve and (name != "task" or kind == "curves")
        }
        expected = {k: short(v, 6) if isinstance(v, float) else v for k, v in rows.loc[key][list(_SUMMARY)].items()}
        assert curve["summary"] == place | expected, key
    assert sum(v is None for c in data[kind] for v in c["value"]) == {"curves": 2, "domain_curves": 1}[kind]


def test_the_first_metric_is_the_one_that_most_tasks_have_a_chance_level_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def first(*rows: tuple[str, str, float]) -> str:
        frame = pd.DataFrame(rows, columns=["task", "metric", "chance"])
        page = write_report(frame.assign(series="s", tokens=1e6, value=0.5), tmp_path)
        data = page_of(page)[1]
        return data["metrics"][data["default_metric"]]["name"]

    drawn = []
    monkeypatch.setattr(html_page, "draw_figures", lambda *tables, metric, title, style: drawn.append(metric) or [])
    many = [(f"t{i}", "bits_per_byte", NAN) for i in range(4)]
    assert first(*many, ("t0", "acc", 0.5), ("t1", "acc_norm", 0.5), ("t2", "acc_norm", 0.5)) == "acc_norm"
    assert first(*many, ("t1", "acc_norm", 0.5), ("t2", "acc", 0.5)) == "acc"  # the order of known metrics
    assert first(*many, ("t0", "exact_match", NAN)) == "bits_per_byte"
    assert drawn == ["acc_norm", "acc", "bits_per_byte"]  # the pictures show it too
    assert list(METRICS)[:2] == ["acc", "acc_norm"]


def test_the_files_beside_the_page_hold_the_tables(made: Path, table: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(pd.read_parquet(made.parent / "tidy.parquet"), table)
    pd.testing.assert_frame_equal(pd.read_csv(made.parent / "tidy.csv"), table, check_dtype=False)
    dynamics = pd.read_csv(made.parent / "dynamics.csv").fillna({"interval_from": ""})
    pd.testing.assert_frame_equal(dynamics, summarise(table), check_dtype=False)


def test_the_page_says_where_it_comes_from(made: Path) -> None:
    text = made.read_text()
    facts = {
        "pack": "3f<2", "versions": "lm_eval: 0.4; jax: 1", "runs": "r1, r2",
        "series": "small (14 checkpoints), big (7 checkpoints)", "made by": f"fineline_jax {__version__}",
    }  # fmt: skip
    for name, value in facts.items():
        assert text.count(f"<dt>{name}</dt><dd>{html.escape(value)}</dd>") == 1
    assert text.count("<dd>me</dd>") == 0
    assert "<title>A &amp; B</title>" in text and "<h1>A &amp; B</h1>" in text
    assert '<a href="figures/a&amp;b.pdf">a&amp;b</a>.' in " ".join(text.split())


# ---- the training log


def smoothed(loss: np.ndarray) -> list[float]:
    """Of each step the mean with a twentieth of its number before and after it, or as many as there are behind it."""
    found = []
    for i in range(len(loss)):
        half = min(math.ceil(i * 0.05), len(loss) - 1 - i)
        found.append(sum(loss[i - half : i + half + 1]) / (2 * half + 1))
    return found


def losses_of(log: pd.DataFrame, folder: Path) -> list[dict]:
    frame = pd.DataFrame({"series": "s", "tokens": [1e6], "task": "t", "metric": "acc", "value": 0.5})
    return page_of(write_report(frame, folder, losses=log))[1]["losses"]


def test_losses_are_smoothed_over_a_twentieth_of_the_steps_before(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    step = np.arange(1_000_001, 1_002_501, 10)
    log = pd.DataFrame({"step": step, "tokens": step * 100, "loss": 3 + rng.normal(0, 1, 250)})
    log["learning_rate"] = 1e-3 / step
    [run] = losses_of(log.sample(frac=1, random_state=1), tmp_path)
    assert run.keys() == {"series", "tokens", "step", "loss", "raw_loss", "learning_rate", "validation"}
    assert run["series"] == ""
    assert run["step"] == list(step) and run["tokens"] == list(step * 100)
    assert run["raw_loss"] == [short(v, 5) for v in log["loss"]]
    assert run["learning_rate"] == [short(v, 5) for v in log["learning_rate"]]
    assert run["loss"] == pytest.approx(smoothed(log["loss"].to_numpy()), rel=1e-4)
    assert run["loss"][0] == run["raw_loss"][0] and run["loss"][-1] == run["raw_loss"][-1]


def test_a_long_log_is_thinned_alike_on_a_log_and_on_a_linear_axis(tmp_path: Path) -> None:
    count = 20_000
    log = pd.DataFrame({"tokens": np.arange(1, count + 1) * 1000, "loss": 2 + 1 / np.arange(1, count + 1)})
    [run] = losses_of(log, tmp_path)
    assert "learning_rate" not in run
    kept = np.array(run["step"])  # without steps they are counted
    assert list(kept[:100]) == list(range(100)) and kept[-1] == count - 1
    assert run["tokens"] == [short((i + 1) * 1000, 9) for i in kept] and len(kept) < 3000
    assert np.diff(kept).max() == 14  # 1,500 points: a stretch is 13.3 steps
    assert run["raw_loss"] == [short(2 + 1 / (i + 1), 5) for i in kept]
    assert run["loss"] == pytest.approx(np.array(smoothed(log["loss"].to_numpy()))[kept], rel=1e-4)


def test_several_runs_are_curves_of_their_own_with_validation_where_it_was_logged(tmp_path: Path) -> None:
    log = pd.DataFrame({
        "series": ["b", "b", "a", "a", "a", "none"], "step": [2, 1, 1, 2, 3, 1], "tokens": [200, 100, 10, 20, 30, 5],
        "loss": [2.0, 4.0, 7.0, 6.0, 5.0, NAN], "validation_loss/x": [NAN, 3.5, NAN, NAN, NAN, 9.0],
    })  # fmt: skip
    late = pd.DataFrame({"series": ["a", "a", "a", "b"], "step": [0, 2.5, 2, 0.5], "tokens": [0, 25, 21, 50]})
    late["validation_loss/x"], late["validation_loss/y"] = [9.0, 5.5, 5.6, 3.75], [NAN, 1.25, NAN, NAN]
    b, a = losses_of(pd.concat([log, late]), tmp_path)
    assert (b["series"], b["tokens"], b["raw_loss"]) == ("b", [100, 200], [4, 2])
    assert b["validation"] == [{"name": "x", "tokens": [50, 100], "step": [0.5, 1], "loss": [3.75, 3.5]}]
    assert (a["series"], a["step"], a["raw_loss"]) == ("a", [1, 2, 3], [7, 6, 5])
    [plain] = losses_of(
        pd.DataFrame({"tokens": [5, 1234567], "loss": [2.0, 1.0], "validation_loss/x": [NAN, 3.0]}), tmp_path
    )
    assert plain["step"] == [0, 1] and plain["validation"] == [{"name": "x", "tokens": [1234567], "loss": [3]}]
    of_x = {"name": "x", "tokens": [0, 21, 25], "step": [0, 2, 2.5], "loss": [9, 5.6, 5.5]}
    assert a["validation"] == [of_x, {"name": "y", "tokens": [25], "step": [2.5], "loss": [1.25]}]


# ---- the scripts of the page, in a browser that draws nothing

BROWSER = (Path(__file__).parents[1] / "helpers" / "trajectories_browser.js").read_text()


def test_all_of_fifteen_validation_losses_are_drawn_though_eight_are_beside_training_lines(tmp_path: Path) -> None:
    kept = np.arange(15) * 16
    log = pd.DataFrame({"step": kept, "tokens": kept * 100, "validation_loss/x": 5 - kept / 100})
    lines = pd.DataFrame({"step": np.arange(0, 240, 32), "tokens": np.arange(0, 240, 32) * 100, "loss": 4.0})
    assert len(set(lines["step"]) & set(log["step"])) == 8
    [run] = losses_of(pd.concat([log, lines]), tmp_path)
    [drawn] = run["validation"]
    assert drawn["tokens"] == list(kept * 100) and drawn["loss"] == [short(v, 5) for v in 5 - kept / 100]
    assert len(run["raw_loss"]) == 8


@pytest.fixture(scope="module")
def run_page(tmp_path_factory: pytest.TempPathFactory):
    """(report, JavaScript expression) -> its value after the page's scripts have run."""
    if not shutil.which("node"):
        pytest.skip("Node is not installed: the scripts of the page are not run")
    folder = tmp_path_factory.mktemp("node")

    def run(made: Path, expression: str, address: str = ""):
        page, _ = page_of(made)
        (folder / "data.json").write_text(page.data)
        script = BROWSER + page.scripts[-1] + f"\nconsole.log(JSON.stringify({expression}));\n"
        (folder / "page.js").write_text(script)
        command = ["node", str(folder / "page.js"), str(folder / "data.json"), address]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def cells(rows: str) -> list[list[str]]:
    """The text of each cell of a table's body."""
    return [
        [html.unescape(re.sub(r"\s*<small.*?</small>|<[^>]*>", "", cell)) for cell in re.split(r"</t[dh]>", row)[:-1]]
        for row in rows.split("<tr>")[1:]
    ]


def for_people(tokens: float) -> str:
    """Three digits and a unit, two below ten."""
    power = max(0, min(4, math.floor(math.log10(tokens) / 3 + 1e-12)))
    value = tokens / 1000**power
    return f"{float(f'{value:.{1 if value < 10 else 2}e}'):g}\u202f{' KMBT'[power]}"


def test_the_table_of_numbers_is_that_of_dynamics(run_page, made: Path, table: pd.DataFrame) -> None:
    body = run_page(made, "nodes.numbers.children[1].innerHTML")
    rows = summarise(table)
    rows = rows[rows.metric == "acc"].sort_values("rank", kind="stable")
    found = cells(body)
    assert len(found) == 8 and {(c[0], c[1]) for c in found} == set(zip(rows.task, rows.series))
    by = rows.set_index(["task", "series"])
    assert [by["rank"][cell[0], cell[1]] for cell in found] == sorted(rows["rank"])
    for cell in found:
        task, series, _, onset, to_score, t50, t90, final, chance, n, snr, rho, verdict = cell
        row = by.loc[(task, series)]
        assert verdict == row.verdict
        first = f"≤ {for_people(row.first_tokens)}" if row.first_tokens else "≤ 0"
        early = "before the first checkpoint"
        for text, name in ((onset, "onset"), (to_score, "to_score"), (t50, "t50"), (t90, "t90")):
            number, outcome = row[name], row[f"{name}_outcome"]
            if name == "onset" and outcome == early:
                assert text == first
            elif number == number:
                assert text == for_people(number)
            elif outcome == early:
                assert text == first
            elif name != "onset" and math.isfinite(low := row[f"{name}_low"]):
                assert text == f"> {for_people(low)}"
            else:
                assert text in ("–", "not saturated", f"> {for_people(row.last_tokens)}")
        assert final == f"{row.final:.3f}" and chance == (f"{row.chance:.3f}" if row.chance == row.chance else "–")
        assert n == f"{row.n:,.0f}".replace(",", "\u202f") and rho == f"{row.monotonicity:.2f}".replace("-", "−")
        assert snr == f"{row.snr:.{1 if abs(row.snr) < 10 else 0}f}"
    assert {"settled", "still rising"} <= {row[-1] for row in found}


def test_a_click_on_a_heading_sorts_and_what_has_no_number_stays_last(
    run_page, made: Path, table: pd.DataFrame
) -> None:
    click = "nodes.numbers.children[0].children[0].children.find((h) => texts(h) === '{0}').children[0].click()"
    body = "nodes.numbers.children[1].innerHTML"
    rows = summarise(table)
    rows = rows[rows.metric == "acc"].set_index(["task", "series"])
    for column, label, at in (("chance", "chance", 8), ("final", "final ± s.e.", 7), ("snr", "SNR", 10)):
        up, down = run_page(
            made, f"[{click.format(label)}, {body}, {click.format(label)}, {body}]".replace("[nodes", "[void nodes")
        )[1::2]
        for text, ascending in ((up, True), (down, False)):
            order = [rows.loc[(row[0], row[1]), column] for row in cells(text)]
            assert order == sorted(order, key=lambda v: (v != v, v if ascending else -v)), column
            assert cells(text)[0][at] != "–"
    names = cells(run_page(made, f"[void {click.format('verdict')}, {body}]")[1])
    assert [row[-1] for row in names] == sorted(row[-1] for row in names)


def test_the_timeline_shows_scores_above_chance_in_the_order_of_learning(
    run_page, made: Path, table: pd.DataFrame
) -> None:
    drawn = run_page(made, "drawn.timeline")
    heat, *marks = drawn["traces"]
    rows = summarise(table)
    rows = rows[(rows.metric == "acc") & (rows.series == "small")].set_index("task")
    order = list(rows["rank"].sort_values().index)
    assert [text.split(" <span")[0] for text in drawn["layout"]["yaxis"]["ticktext"]] == [html.escape(t) for t in order]
    for z, task in zip(heat["z"], order):
        part = table[(table.metric == "acc") & (table.series == "small") & (table.task == task)].set_index("checkpoint")
        chance = part.chance.iloc[0]
        expected = [(part.value.get(f"c{i}", NAN) - chance) / (1 - chance) for i in range(14)]
        assert z == pytest.approx([None if v != v else v for v in expected], abs=2e-4) or chance != chance
    by_name = {mark.get("name"): mark for mark in marks if mark.get("name") and mark.get("showlegend")}
    for name, column in (("onset", "onset"), ("tokens to the score", "to_score"), ("t90", "t90")):
        times = rows.loc[order, column].reset_index(drop=True).dropna()
        assert by_name[name]["y"] == list(times.index)
        assert by_name[name]["x"] == pytest.approx([math.log10(t) if t else 6 - 0.3 for t in times], abs=1e-4)
    finals = [a["text"] for a in drawn["layout"]["annotations"]][: len(order)]
    assert finals == [f"{rows.loc[task, 'final']:.3f}" for task in order]
    edges = heat["x"]
    assert (
        len(edges) == 15
        and edges == sorted(edges)
        and heat["zmax"] == pytest.approx(max(v for z in heat["z"] for v in z if v is not None))
    )


def test_the_share_of_its_own_gain_is_from_chance_to_level(run_page, made: Path, table: pd.DataFrame) -> None:
    drawn = run_page(made, "(state.shade = 'share', drawTimeline(), drawn.timeline)")
    rows = summarise(table[(table.metric == "acc") & (table.series == "small")]).set_index("task")
    names = [html.unescape(text.split(" <span")[0]) for text in drawn["layout"]["yaxis"]["ticktext"]]
    for z, task in zip(drawn["traces"][0]["z"], names):
        values = table[(table.metric == "acc") & (table.series == "small") & (table.task == task)].value
        expected = (values - rows.loc[task, "baseline"]) / (rows.loc[task, "level"] - rows.loc[task, "baseline"])
        assert [v for v in z if v is not None] == pytest.approx(list(expected), abs=1e-3)
    assert (drawn["traces"][0]["zmin"], drawn["traces"][0]["zmax"]) == (0, 1)


@pytest.mark.parametrize("scale", ["raw", "normal"])
def test_panels_draw_each_curve_with_its_band(scale: str, run_page, made: Path, table: pd.DataFrame) -> None:
    panels = run_page(made, f"(look(), state.scale = '{scale}', state.view = 'task', drawPanels(), look())")
    assert len(panels) == 4
    for panel, task in zip(panels, ("order", "<i>odd</i>", "sums", "facts")):
        chance = CHANCE[task]
        low, size = (chance, 1 - chance) if scale == "normal" and chance == chance else (0.0, 1.0)
        assert [s["y0"] for s in panel["layout"]["shapes"]] == (
            [] if chance != chance else [0 if scale == "normal" else chance]
        )
        for i, series in enumerate(("small", "big")):
            band, line = panel["traces"][2 * i : 2 * i + 2]
            part = table[(table.metric == "acc") & (table.series == series) & (table.task == task)].sort_values(
                "tokens"
            )
            y = (part.value.to_numpy() - low) / size
            error = 1.96 * part.stderr.to_numpy() / size
            assert line["meta"] == series and line["y"] == pytest.approx(y, abs=2e-4)
            assert band["y"] == pytest.approx([*(y + error), *(y - error)[::-1]], abs=3e-4)
            x = np.log10(part.tokens[part.tokens > 0])
            assert line["x"][-len(x) :] == pytest.approx(x, abs=1e-6) and band["x"][: len(y)] == line["x"]


def test_checkpoints_left_out_when_scoring_are_ticks_at_the_tokens_of_their_series(
    run_page, table: pd.DataFrame, tmp_path: Path
) -> None:
    """Only against tokens, only of series that are drawn, and none where the tokens are not known."""
    left = [("small", 2e9), ("small", 5e9), ("big", 7e9), ("small", math.nan), ("none of these", 3e9)]
    rows = [{"series": name, "checkpoint": "c", "tokens": tokens, "why": "resolved"} for name, tokens in left]
    made = write_report(table, tmp_path, more=[(NOT_SCORED, NOT_SCORED.compute(rows))])
    first = "look()[0].layout.shapes.filter((s) => s.x0 === s.x1).map((s) => [s.x0, s.yref, s.y0])"
    shown = run_page(made, f"(look(), state.view = 'task', drawPanels(), {first})")
    assert [mark[0] for mark in shown] == pytest.approx([math.log10(tokens) for _, tokens in left[:3]], abs=1e-4)
    assert all(mark[1:] == ["paper", 0] for mark in shown)
    hidden = f"(look(), state.view = 'task', state.hidden.add(1), drawPanels(), {first})"
    assert [mark[0] for mark in run_page(made, hidden)] == pytest.approx([math.log10(2e9), math.log10(5e9)], abs=1e-4)
    assert run_page(made, f"(look(), state.view = 'task', state.x = 'steps', drawPanels(), {first})") == []
    note = "(look(), state.view = 'task', drawPanels(), document.getElementById('curves-note').innerHTML)"
    assert "Ticks at the bottom: checkpoints that were left out" in run_page(made, note)


def test_panels_of_domains_are_means_above_chance(run_page, made: Path, table: pd.DataFrame) -> None:
    panels = run_page(made, "(look(), state.view = 'means', drawPanels(), look())")
    means = domain_curves(table)
    assert len(panels) == 2
    for panel, domain in zip(panels, ("language", "a & b")):
        lines = [trace for trace in panel["traces"] if "fill" not in trace]
        for line, series in zip(lines, ("small", "big")):
            part = means[(means.series == series) & (means.domain == domain)]
            assert line["y"] == pytest.approx(list(part.value), abs=1e-4)
        assert [shape["y0"] for shape in panel["layout"]["shapes"]] == [0]


def test_the_page_counts_what_it_shows(run_page, made: Path, table: pd.DataFrame) -> None:
    overview, lede = run_page(made, "[nodes.overview.innerHTML, nodes.lede.innerHTML]")
    numbers = ["2", "21", "4", "2", "0 – 1\u202fB"]
    assert [part.split("</dd>")[0] for part in overview.split("<dd>")[1:]] == numbers
    rows = summarise(table)
    rows = rows[(rows.metric == "acc") & (rows.series == "small")]
    timed = rows[rows.to_score.notna()].sort_values("rank")
    assert "<b>4 of 4</b> tasks rose above chance." in lede or "<b>3 of 4</b> tasks rose above chance." in lede
    first, last = timed.iloc[0], timed.iloc[-1]
    assert f"first for <b>{html.escape(first.task)}</b> ({for_people(first.to_score)} tokens)" in lede
    assert f"last for <b>{html.escape(last.task)}</b> ({for_people(last.to_score)})" in lede
    rising = (rows.verdict == "still rising").sum()
    assert rising >= 1 and f" {rising} {'was' if rising == 1 else 'were'} still rising" in lede


def test_numbers_are_written_for_people(run_page, made: Path) -> None:
    tokens = [0, 950, 999, 1000, 4096, 12_340_000, 99.4e6, 99.6e6, 999.4e6, 999.6e6, 1.04e12, 3.2e15]
    texts = ["0", "950", "999", "1 K", "4.1 K", "12.3 M", "99.4 M", "100 M", "999 M", "1 B", "1 T", "3200 T"]
    found = run_page(made, f"{tokens}.map(formatTokens)")
    assert [text.replace("\u202f", " ") for text in found] == texts
    values = [0, 0.5, 0.00999, 0.01, 0.0009, -0.25, 9.9996, 10, 12.3456, 99999, 1e5, 2.5e-7]
    texts = [
        "0.000",
        "0.500",
        "0.0100",
        "0.010",
        "9.0e−4",
        "−0.250",
        "10.000",
        "10.00",
        "12.35",
        "9.999e+4",
        "1.0e+5",
        "2.5e−7",
    ]
    texts[9] = "1.000e+5"  # four digits of 99,999
    assert run_page(made, f"{values}.map(formatValue)") == texts
    assert run_page(made, "[null, NaN, undefined].map((v) => formatTokens(v) + formatValue(v))") == ["––"] * 3
    assert run_page(made, "formatError(0.5, 0.01) + formatError(0.5, null)") == "0.500\u202f±\u202f0.0100.500"


def test_the_axis_is_log_tokens_with_a_place_for_zero_or_linear(run_page, made: Path) -> None:
    places = run_page(made, "[0, 1e6, 1e9].map(place).concat((state.axis = 'linear', [0, 1e6, 1e9].map(place)))")
    assert places == pytest.approx([6 - 0.3, 6, 9, 0, 1e6, 1e9])
    ticks = run_page(made, "tickTokens([6, 9.05], 300)")
    assert ticks == [0, 1e6, 1e7, 1e8, 1e9] or ticks == [1e6, 1e7, 1e8, 1e9]


def test_the_run_is_drawn_with_its_loss_and_validation(run_page, tmp_path: Path) -> None:
    log = pd.DataFrame(
        {"step": [1, 2, 3], "tokens": [1e5, 2e6, 3e6], "loss": [7.0, 5.0, 4.0], "learning_rate": [1e-3] * 3}
    )
    log = pd.concat([log, pd.DataFrame({"step": [3], "tokens": [3e6], "validation_loss/x": [4.25]})])
    log["validation_loss/<y>"] = [np.nan, 4.5, np.nan, np.nan]
    made = write_report(scores(), tmp_path, losses=log)
    hidden, traces = run_page(made, "[nodes['training-section'].hidden, drawn.training.traces]")
    raw, smooth, validation, other, rate = traces
    assert hidden is False and raw["y"] == [7, 5, 4] and smooth["y"] == [7, 5.3333, 4] and rate["y"] == [1e-3] * 3
    assert validation["y"] == [4.25] and validation["x"] == pytest.approx([math.log10(3e6)], abs=1e-6)
    assert validation["text"] == ["validation loss, x 4.25<br>3\u202fM tokens"]
    assert (other["name"], other["y"]) == ("validation loss, <y>", [4.5])
    assert other["text"] == ["validation loss, &lt;y&gt; 4.5<br>2\u202fM tokens"]
    assert validation["line"]["dash"] != other["line"]["dash"]
    assert smooth["x"] == pytest.approx([None, math.log10(2e6), math.log10(3e6)], abs=1e-6)


def test_the_run_is_drawn_against_steps_and_flops_with_rate_and_gradient_norm_beneath(run_page, tmp_path: Path) -> None:
    log = pd.DataFrame({"step": [1, 2], "tokens": [1e6, 2e6], "flops": [6e12, 12e12], "loss": [7.0, 5.0]})
    log = log.assign(learning_rate=1e-3, gradient_norm=[1.5, 0.5])
    log = pd.concat([log, pd.DataFrame({"step": [0, 2], "tokens": [0, 2e6], "validation_loss/x": [8.0, 4.25]})])
    made = write_report(scores(), tmp_path, losses=log)
    for key, along, held in (("step", [1, 2], [None, 2]), ("flops", [6e12, 12e12], [None, 12e12])):
        found, layout = run_page(made, "[drawn.training.traces, drawn.training.layout]", f"#against={key}")
        raw, smooth, validation, rate, norm = found
        assert raw["x"] == smooth["x"] == rate["x"] == along and validation["x"] == held and norm["y"] == [1.5, 0.5]
        assert layout["xaxis"]["type"] == "log" and (rate["yaxis"], norm["yaxis"]) == ("y2", "y3")
        bottoms = [layout[name]["domain"] for name in ("yaxis3", "yaxis2", "yaxis")]
        assert all(low < high <= above for (low, high), (above, _) in zip(bottoms, [*bottoms[1:], (1, 1)], strict=True))


def test_a_sweep_begins_with_what_it_found_and_draws_its_ends_as_a_map(run_page, tmp_path: Path) -> None:
    rows = [
        {"series": f"{x}-{y}-{s}", "arm": f"{x}-{y}", "seed": s, "batch": x, "warmup": y, "tokens": at, "step": at}
        | {"task": "held", "domain": "loss", "metric": "loss", "value": 3 + x / 8 + y + 0.01 * s + 1e6 / at}
        for x in (8, 16) for y in (0, 1) for s in (0, 1) for at in (5e5, 1e6)
    ]  # fmt: skip
    table = pd.DataFrame(rows).assign(checkpoint=lambda t: t["step"].astype(str))
    compared = [(FINAL_MAP, FINAL_MAP.compute(table, "batch", "warmup"))]
    made = write_report(table, tmp_path, compared=compared)
    found = r'class="wide" open><summary><h3>What the sweep found</h3></summary><p>(.*?)</p>'
    first = re.search(found, made.read_text())
    assert first is not None and "last checkpoints, is lowest, 5.005 (95 %: " in first[1]
    [plot] = run_page(made, "look().filter((p) => p.traces[0].type === 'heatmap')")
    [heat] = plot["traces"]
    assert (heat["x"], heat["y"]) == (["8", "16"], ["0", "1"])
    assert heat["z"] == [pytest.approx([5.005, 6.005]), pytest.approx([6.005, 7.005])]
    assert heat["text"][0][0].startswith("<b>5.005</b><br>4.9") and heat["text"][0][0].endswith("<br>2 runs")


# ---- a page of one series, with a crowded domain


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pd.DataFrame]:
    tokens = np.geomspace(1e6, 1e9, 4)
    tasks = [(f"t{i}", "many", 0.25) for i in range(9)] + [("one", "few", 0.5)]
    rows = [
        {"series": "s", "tokens": at, "task": task, "domain": domain, "chance": chance, "stderr": 0.01 * (i + 1)}
        | {"value": chance + (1 - chance) * k ** (2 if task == "one" else 1) * (i + 1) / 99, "metric": "acc"}
        for i, (task, domain, chance) in enumerate(tasks)
        for k, at in enumerate(tokens)
    ]
    ppl = pd.DataFrame({"series": "s", "tokens": tokens, "task": "p", "domain": "few", "metric": "ppl"})
    table = normalise(pd.concat([pd.DataFrame(rows), ppl.assign(value=[1e4, 1e3, 1e2, 1e1])]))
    return write_report(table, tmp_path_factory.mktemp("alone")), table


def test_a_crowded_domain_is_drawn_under_its_mean_and_all_domains_come_first(run_page, alone) -> None:
    made, table = alone
    means = domain_curves(table).set_index(["domain", "tokens"])
    overall, many, few = run_page(made, "look()")
    for panel, chance in ((overall, None), (many, 0.25)):
        value = means.value["many"] if chance is None else 0.25 + 0.75 * means.value["many"]
        error = means.stderr["many"] * (1.0 if chance is None else 0.75)
        line = panel["traces"][1] if chance is None else panel["traces"][-1]
        band = panel["traces"][0] if chance is None else panel["traces"][-2]
        assert line["y"] == pytest.approx(list(value), abs=1e-4)
        assert band["y"][:4] == pytest.approx(list(value + 1.96 * error), abs=1e-4)
    assert len(many["traces"]) == 9 + 2 and [t["opacity"] for t in many["traces"][:9]] == [0.28] * 9
    assert many["traces"][-1]["meta"] == "mean of 9 tasks" and few["traces"][1]["meta"] == "one"
    assert [t["y"] for t in many["traces"][:9]] == [
        pytest.approx(list(table[table.task == f"t{i}"].value), abs=1e-4) for i in range(9)
    ]


def test_perplexities_over_decades_get_a_log_axis_and_accuracies_none(run_page, alone) -> None:
    drawn = run_page(alone[0], "(look(), state.metric = 1, drawPanels(), look())")
    assert [panel["layout"]["yaxis"].get("type") for panel in drawn] == ["log"]
    assert drawn[0]["traces"][0]["y"] == [10_000, 1000, 100, 10] and drawn[0]["layout"]["shapes"] == []
    assert [p["layout"]["yaxis"].get("type") for p in run_page(alone[0], "look()")] == [None] * 3


def test_rows_of_the_timeline_can_be_domains(run_page, alone) -> None:
    made, table = alone
    drawn = run_page(made, "(state.rows = 'domains', drawTimelineAndLede(), drawn.timeline)")
    means = domain_curves(table)
    rows = summarise(means).set_index("domain")
    order = list(rows["rank"].sort_values().index)
    assert [text.split(" <span")[0] for text in drawn["layout"]["yaxis"]["ticktext"]] == order
    assert drawn["traces"][0]["z"] == [pytest.approx(list(means[means.domain == d].value), abs=1e-4) for d in order]


def test_cells_of_the_timeline_end_half_way_between_checkpoints(run_page, alone) -> None:
    log, linear = run_page(alone[0], "[cellEdges([1e6, 1e7, 1e9]), (state.axis = 'linear', cellEdges([0, 10, 30]))]")
    assert log == pytest.approx([5.5, 6.5, 8, 10]) and linear == pytest.approx([-5, 5, 20, 40])
    assert run_page(alone[0], "cellEdges([1e6])") == pytest.approx([5.9, 6.1])


def test_the_range_of_the_axis_is_that_of_the_checkpoints(run_page, alone) -> None:
    log, linear = run_page(alone[0], "[axisRange(), (state.axis = 'linear', axisRange())]")
    assert log == pytest.approx([6 - 0.06, 9 + 0.06])
    assert linear == pytest.approx([1e6 - 0.02 * 9.99e8, 1e9 + 0.02 * 9.99e8])
    assert run_page(alone[0], "[niceSteps(0, 1e9, 4), niceSteps(1e6, 7e6, 3)]") == [[0, 5e8, 1e9], [2e6, 4e6, 6e6]]


def test_files_are_replaced_whole(table: pd.DataFrame, made: Path, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("report.html", "tidy.csv", "tidy.parquet", "dynamics.csv")]
    before = [shutil.copy2(made.parent / file.name, file).stat().st_ino for file in files]
    write_report(table, tmp_path, title="A & B", facts={"pack": "3f<2"})
    assert all(file.stat().st_ino != inode for file, inode in zip(files, before))
    assert not list(tmp_path.glob(".*"))


def test_what_was_reached_before_the_first_checkpoint_comes_first(run_page, tmp_path: Path) -> None:
    rows = [("late", 1e6, 0.5), ("late", 1e9, 0.9), ("early", 1e6, 0.9), ("early", 1e9, 0.9)]
    frame = pd.DataFrame(rows, columns=["task", "tokens", "value"])
    made = write_report(frame.assign(series="s", metric="acc", stderr=0.01, chance=0.5, n=1000), tmp_path)
    ticks = run_page(made, "drawn.timeline.layout.yaxis.ticktext")
    assert [text.split(" <span")[0] for text in ticks] == ["early", "late"]


# ---- what the reader clicks, points at and compares


def test_the_legend_hides_a_series_everywhere_and_the_address_says_so(run_page, made: Path) -> None:
    chip = "nodes.legend.children[0]"  # `small`
    run = f"(look(), state.view = 'task', drawPanels(), look(), {chip}.click(), "
    panels = "look().map((p) => p.traces.filter((t) => !t.fill).map((t) => t.meta))"
    hidden, rows, address = run_page(
        made, run + f"[{panels}, nodes.numbers.children[1].innerHTML.split('<tr>').length - 1, location.hash])"
    )
    assert hidden == [["big"]] * 4 and rows == 4 and "hidden=small" in address
    shown = run_page(made, run + f"void {chip}.click(), {panels})")
    assert shown[-1] == ["small", "big"]


def test_a_line_of_one_series_is_hidden_in_its_own_panel_alone(run_page, alone) -> None:
    chip = "nodes.panels.children[2].children[0].children[2].children[0]"  # `one` in the panel of its domain
    _, [clicked] = run_page(alone[0], f"(look(), [{chip}.click(), look()])")
    assert {trace["visible"] for trace in clicked["traces"]} == {"legendonly"}


def test_the_view_is_read_from_the_address(run_page, made: Path) -> None:
    address = "#metric=bits_per_byte&axis=linear&series=big&search=sums&domain=a+%26+b&view=bad&hidden=nobody"
    state = run_page(made, "({...state, hidden: [...state.hidden]})", address)
    found = {name: state[name] for name in ("metric", "axis", "series", "search", "domain", "view", "hidden")}
    assert found == {
        "metric": 1, "axis": "linear", "series": 1, "search": "sums", "domain": "a & b", "view": "task", "hidden": []
    }  # fmt: skip
    again = run_page(made, "(remember(), location.hash)", address)
    assert again == "#axis=linear&search=sums&domain=a+%26+b&metric=bits_per_byte&series=big"


def test_search_and_filters_leave_the_curves_that_have_every_word(run_page, made: Path) -> None:
    names = "curvesOf(state.metric).map((c) => data.series[c.series].name + ' ' + data.tasks[c.task].name)"
    found = lambda change: run_page(made, f"({change}, {names})")
    assert found("state.search = 'SUMS big'") == ["big sums"]
    assert sorted(found("state.search = 'a &', state.domain = 'a & b'")) == [
        "big facts", "big sums", "small facts", "small sums",
    ]  # fmt: skip
    assert found("state.search = 'nothing of it'") == []


def test_gap_and_ratio_are_panels_of_curves_over_tokens(run_page, tmp_path: Path) -> None:
    at, slope = np.arange(6), {"m-70m": 0.02, "m-1b": 0.05, "m-7b": 0.09}
    parts = [
        pd.DataFrame({"tokens": 1e9 * (at + 1), "value": 0.25 + slope[name] * at + 0.002 * ((3 * at + j) % 4)})
        .assign(series=name, task=f"t{j}", domain=domain, metric="acc", stderr=0.01, chance=0.25, n=500)
        for name in slope for j, domain in enumerate(("x", "x", "y"))
    ]  # fmt: skip
    made = write_report(pd.concat(parts), tmp_path)
    frame = pd.read_csv(tmp_path / "size_gaps.csv")
    level = "look().filter((p) => p.layout.shapes.some((s) => s.y0 === s.y1))"
    draw = f"clearPlots(nodes.statistics), drawStatistics(), {level}"
    panels = run_page(made, f"(look(), {draw})")
    assert [p["layout"]["shapes"][0]["y0"] for p in panels] == [0, 1, 0, 1]  # where nothing would lie
    for panel, (domain, column) in zip(panels, itertools.product("xy", ("gap", "ratio")), strict=True):
        lines = {trace["name"]: trace for trace in panel["traces"] if "name" in trace}
        bands = [trace for trace in panel["traces"] if "fill" in trace]
        assert list(lines) == ["m-70m → m-7b", "m-1b → m-7b"] and len(bands) == 2
        for name, band in zip(lines, bands, strict=True):
            part = frame[(frame.small == name.split()[0]) & (frame.domain == domain)]
            assert lines[name]["x"] == pytest.approx(list(np.log10(part.tokens)))
            shown = [math.nan if v is None else v for v in lines[name]["y"]]
            assert shown == pytest.approx(list(part[column]), abs=1e-5, nan_ok=True)
            known = part[part[f"{column}_low"].notna()]
            ends = [*known[f"{column}_high"], *known[f"{column}_low"][::-1]]
            assert [v for v in band["y"] if v is not None] == pytest.approx(ends, abs=1e-4)
    hidden = run_page(made, f"(look(), state.hidden.add(data.series.findIndex((s) => s.name === 'm-1b')), {draw})")
    assert [[t["name"] for t in panel["traces"] if "name" in t] for panel in hidden] == [["m-70m → m-7b"]] * 4


def test_sections_of_statistics_show_their_rows_verdicts_and_caveats(run_page, tmp_path: Path) -> None:
    rows = [
        {"series": series, "tokens": 1e9 * (k + 1), "task": f"t{j}", "metric": "acc", "stderr": 0.01, "chance": 0.25}
        | {"value": 0.3 + 0.04 * k + (0.01 * (j + 1) if series == "b" else 0) + 0.003 * ((7 * k + 3 * j) % 5), "n": 500}
        for series in ("a", "b") for k in range(6) for j in range(3)
    ]  # fmt: skip
    made = write_report(pd.DataFrame(rows), tmp_path)
    text, points, layout, count = run_page(
        made, "(look(), [texts(nodes.statistics), drawn['p-comparison'].traces[0], drawn['p-comparison'].layout, "
        "nodes.statistics.children.length])"
    )  # fmt: skip
    results = compute(normalise(pd.DataFrame(rows)))[1:]
    found = {statistic.name: frame for statistic, frame in results}["comparison"].sort_values("difference")[::-1]
    assert points["x"] == pytest.approx(list(found.difference), rel=1e-4) and len(found) == 3
    assert points["error_x"]["array"] == pytest.approx(list(found.high - found.difference), rel=1e-3)
    assert points["error_x"]["arrayminus"] == pytest.approx(list(found.difference - found.low), rel=1e-3)
    assert [shape["x0"] for shape in layout["shapes"]] == [0]
    assert count == sum(len(frame) > 0 for _, frame in results)
    for statistic, frame in results:
        if len(frame):
            assert statistic.title in text and statistic.definition in text and statistic.caveat in text
    verdicts = found.verdict.value_counts()
    assert "; ".join(f"{name}: {n}" for name, n in verdicts.items()) in text


def test_a_large_table_is_thinned_on_the_page_and_its_ends_stay(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(page_data, "_MOST_SCORES", 60)
    table = normalise(scores())
    data = page_of(write_report(table, tmp_path))[1]
    for series in data["series"]:
        every = sorted(set(table[table.series == series["name"]].tokens))
        assert (series["tokens"][0], series["tokens"][-1]) == (short(every[0], 9), short(every[-1], 9))
        assert len(series["tokens"]) <= len(every)
    assert data["left_out"] > 0
    assert len(pd.read_csv(tmp_path / "tidy.csv")) == len(table)


def test_every_figure_is_drawn_for_print_and_light(run_page, made: Path) -> None:
    count, light, dark = run_page(
        made, "(look(), dark.matches = true, state.view = 'task', window.beforeprint(), "
        "[panels.length, colour(0), (window.afterprint(), colour(0))])"
    )  # fmt: skip
    assert (count, light, dark) == (4, "#0072b2", "#56b4e9")


def test_controls_choose_metric_axis_and_series(run_page, made: Path, table: pd.DataFrame) -> None:
    pick = "(({{children: [, s]}}) => {{ s.value = '{1}'; s.change(); }})(nodes.controls.children[{0}])"
    press = "(({{children: [, b]}}) => b.children[{1}].click({{currentTarget: b.children[{1}]}}))({0}.children[{2}])"
    names = "drawn.timeline.layout.yaxis.ticktext.map((t) => t.split(' <span')[0])"
    chosen, state, first = run_page(
        made, f"[(void {pick.format(0, 1)}, {names}), state, drawn.timeline.traces[0].text[0][0]]"
    )
    assert sorted(chosen) == ["facts", "sums"] and state["metric"] == 1  # those with bits per byte
    assert "bits per byte" in first
    edges = run_page(made, f"(void {pick.format(2, 1)}, drawn.timeline.traces[0].x)")
    assert len(edges) == 8  # of `big`
    buttons = "nodes.controls.children[1].children[1].children.map((b) => b.attributes['aria-pressed'])"
    axis, pressed, right = run_page(
        made,
        f"(void {press.format('nodes.controls', 1, 1)}, [state.axis, {buttons}, drawn.timeline.traces[0].x.at(-1)])",
    )
    assert (axis, pressed) == ("linear", ["false", "true"]) and right > 1e9
    shade = run_page(made, f"(void {press.format('nodes[`timeline-controls`]', 1, 1)}, drawn.timeline.traces[0].zmax)")
    assert shade == 1


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two series at the same tokens; of the second one only some checkpoints have an accuracy, of `once` only one."""
    rows = [
        {"series": series, "tokens": at, "step": k, "task": task, "metric": metric, "value": 0.5 + k / 10}
        | {"stderr": 0.02, "chance": 0.25 if metric == "acc" else NAN, "n": 500, "domain": "d"}
        for series in ("a", "b")
        for k, at in enumerate((1e6, 1e7, 1e8, 1e9))
        for task in ("often", "once")
        for metric in ("acc", "bits_per_byte")
        if metric != "acc" or (k == 3 if task == "once" else series == "a" or k % 2)
    ]
    return write_report(pd.DataFrame(rows), tmp_path_factory.mktemp("sparse"))


def test_texts_of_the_timeline_are_those_of_its_cells(run_page, sparse: Path) -> None:
    heat = run_page(sparse, "(state.series = 1, drawTimeline(), drawn.timeline.traces[0])")
    assert len(heat["x"]) == 3 and [len(row) for row in heat["z"]] == [2, 2]  # two checkpoints have a score
    assert [[text.split("<br>")[1].split(" ·")[0] for text in row] for row in heat["text"]] == [
        ["10\u202fM tokens", "1\u202fB tokens"]
    ] * 2
    scores = {row[1].split("</b>")[0][3:]: [text.split("<br>")[2] for text in row] for row in heat["text"]}
    assert scores == {
        "often": [f"accuracy {v}\u202f±\u202f0.020" for v in ("0.600", "0.800")],
        "once": ["accuracy –", "accuracy 0.800\u202f±\u202f0.020"],
    }


def test_checkpoints_of_every_series_count(run_page, sparse: Path) -> None:
    overview = run_page(sparse, "nodes.overview.innerHTML")
    assert re.findall("<dd>(.*?)</dd>", overview) == ["2", "8", "2", "1", "1\u202fM – 1\u202fB"]


def test_one_checkpoint_is_a_point_with_a_bar_of_95_percent(run_page, sparse: Path) -> None:
    panels = run_page(sparse, "(look(), state.view = 'task', drawPanels(), look())")
    once = panels[1]["traces"]
    assert [trace["x"] for trace in once] == [[9], [9]] and [trace["y"] for trace in once] == [[0.8], [0.8]]
    assert [trace["error_y"]["array"] for trace in once] == [[pytest.approx(1.96 * 0.02)]] * 2
    assert "error_y" not in panels[0]["traces"][1]


def test_an_interval_without_an_end_goes_on_to_the_last_checkpoint(run_page, made: Path) -> None:
    times = "{to_score: 1e7, to_score_low: 2e6, to_score_high: c.task ? null : 5e7}"
    change = f"data.curves.forEach((c) => Object.assign(c.summary, {times}))"
    drawn = run_page(made, f"({change}, drawTimeline(), drawn.timeline)")
    names = [text.split(" <span")[0] for text in drawn["layout"]["yaxis"]["ticktext"]]
    halo, bars = drawn["traces"][1:3]
    ends = [5e7 if name == "order" else 1e9 for name in names]
    assert (
        bars["x"]
        == halo["x"]
        == [pytest.approx(v, abs=1e-9) if v else None for end in ends for v in (math.log10(2e6), math.log10(end), None)]
    )
    assert bars["y"] == [v for i in range(4) for v in (i, i, None)]


def test_a_small_curve_has_a_point_for_each_score(run_page, sparse: Path) -> None:
    drawn = run_page(sparse, "data.curves.filter((c) => c.metric === 0).map(sparkline)")
    points = [[len(line.split()) for line in re.findall('points="(.*?)"', svg)] for svg in drawn]
    assert points == [[2, 4], [2], [2, 2], [2]]  # the line of chance, then the scores: of one score a circle
    assert ["<circle" in svg for svg in drawn] == [False, True, False, True]


def test_rows_are_in_the_order_of_their_ranks_and_what_never_rose_has_no_gain(run_page, made: Path) -> None:
    change = "Object.assign(c.summary, {rank: 5 - c.task % 3})"
    refuse = "c.summary.verdict = c.task === 1 ? 'no clear change' : 'settled'"
    drawn = run_page(
        made,
        f"(data.curves.forEach((c) => {{ {change}; {refuse}; }}), state.shade = 'share', drawTimeline(), "
        "drawn.timeline)",
    )
    names = [html.unescape(text.split(" <span")[0]) for text in drawn["layout"]["yaxis"]["ticktext"]]
    assert names == ["sums", "<i>odd</i>", "order", "facts"]
    assert [set(row) == {None} for row in drawn["traces"][0]["z"]] == [False, True, False, False]


def test_a_dark_page_has_lighter_colours(run_page, made: Path) -> None:
    light, dark = run_page(made, "[colour(0), (dark.matches = true, colour(0))]")
    assert (light, dark) == ("#0072b2", "#56b4e9")
