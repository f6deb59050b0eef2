"""What is in the report: every curve with its values, nothing from outside, nothing that a task name could break."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from report_examples import page_of
from trajectories_simulated import simulated_losses, simulated_table

from fineline_jax.errors import UserError
from fineline_jax.trajectories.registry import STATISTICS
from fineline_jax.trajectories.report.html_page import write_report
from fineline_jax.trajectories.statistics.columns import format_tokens
from fineline_jax.trajectories.statistics.dynamics import summarise
from fineline_jax.trajectories.table import normalise, read_table


@pytest.fixture(scope="module")
def two_series() -> pd.DataFrame:
    return pd.concat([simulated_table(), simulated_table(1, "faster", checkpoints=10, speed=3.0)])


@pytest.fixture(scope="module")
def report(two_series: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report")
    facts = {"pack hash": "3f2a91", "versions": {"lm_eval": "0.4.13"}, "note": "<b>a & b</b>"}
    return write_report(two_series, out, title="A & B <small>", facts=facts, losses=simulated_losses())


def test_every_curve_is_in_the_page_with_its_values(report: Path, two_series: pd.DataFrame) -> None:
    _, data = page_of(report)
    seen = {}
    for curve in data["curves"]:
        series = data["series"][curve["series"]]
        key = (series["name"], data["tasks"][curve["task"]]["name"], data["metrics"][curve["metric"]]["name"])
        seen[key] = dict(zip(series["tokens"], zip(curve["value"], curve["stderr"], strict=True), strict=True))
    assert len(seen) == 2 * 10 * 3
    for row in two_series.to_dict("records"):
        value, stderr = seen[row["series"], row["task"], row["metric"]][row["tokens"]]
        assert value == pytest.approx(row["value"], rel=1e-4, abs=1e-9)
        assert stderr == pytest.approx(row["stderr"], rel=1e-4)


def test_the_page_says_what_the_statistics_say(report: Path, two_series: pd.DataFrame) -> None:
    _, data = page_of(report)
    summary = summarise(normalise(two_series)).set_index(["series", "task", "metric"])
    for curve in data["curves"]:
        row = curve["summary"]
        key = (data["series"][curve["series"]]["name"], data["tasks"][curve["task"]]["name"])
        expected = summary.loc[(*key, data["metrics"][curve["metric"]]["name"])]
        assert row["verdict"] == expected["verdict"]
        for name in ("onset", "t50", "t90", "to_score", "final", "snr"):
            if np.isfinite(expected[name]):
                assert row[name] == pytest.approx(expected[name], rel=1e-4)
            else:
                assert row[name] is None
    assert {len(d["value"]) for d in data["domain_curves"]} == {16, 10}


def test_the_training_log_is_in_the_page(report: Path) -> None:
    _, data = page_of(report)
    (run,) = data["losses"]
    log = simulated_losses()
    assert run["tokens"][0] == log["tokens"].iloc[0] and run["tokens"][-1] == log["tokens"].iloc[-1]
    assert len(run["tokens"]) == len(run["loss"]) == len(run["learning_rate"]) <= 3000
    assert run["loss"][0] == pytest.approx(log["loss"].iloc[0], rel=1e-4)
    [validation] = run["validation"]
    assert validation["name"] == "held_out"
    assert len(validation["loss"]) == log["validation_loss/held_out"].notna().sum()


def test_nothing_is_loaded_from_outside(report: Path) -> None:
    page, _ = page_of(report)
    for tag, attributes in page.elements:
        assert "src" not in attributes, tag
        assert tag not in ("link", "iframe", "img", "object", "embed")
        if "href" in attributes:
            assert tag == "a" and not re.match(r"[a-z]+:|//", attributes["href"] or "")
    policy = next(
        a["content"] for t, a in page.elements if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None and policy.startswith("default-src 'none'") and "http" not in policy
    ours = [s for s in page.scripts if "plotly.js v" not in s[:400]]
    assert ours and not any(re.search(r"https?://|fetch\(|XMLHttpRequest|import\(", s) for s in ours)
    style = re.search(r"<style>(.*?)</style>", report.read_text(encoding="utf-8"), re.DOTALL)
    assert style and "url(" not in style[1] and "@import" not in style[1]


def test_the_plotly_is_whole_and_the_page_small(report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    assert "plotly.js v" in text and len(text.encode()) < 6e6
    # Plotly's own set of buttons would offer to send the chart to a server
    assert "modeBarButtons:" in text and 'plotlyServerURL: ""' in text


def test_text_of_users_cannot_break_the_page(tmp_path: Path) -> None:
    table = simulated_table()
    evil = '</script><script>alert("x")</script>'
    table["task"] = table["task"].replace("addition", evil)
    report = write_report(table, tmp_path, title="<i>{{data}}</i>", facts={"<u>": "{{js}}"})
    page, data = page_of(report)
    assert evil in [t["name"] for t in data["tasks"]]
    text = report.read_text(encoding="utf-8")
    assert evil not in text and "<i>" not in text and "<u>" not in text
    assert "<h1>&lt;i&gt;{{data}}&lt;/i&gt;</h1>" in text and "<dd>{{js}}</dd>" in text  # not filled in a second time
    assert sum(tag == "script" for tag, _ in page.elements) == 3


def test_files_beside_the_page(report: Path, two_series: pd.DataFrame) -> None:
    names = {str(p.relative_to(report.parent)) for p in report.parent.rglob("*") if p.is_file()}
    pictures = {"overview", "word_order", "facts", "common_sense", "arithmetic", "two_hop"}
    pictures |= {"task_prediction", "task_prediction_errors", "comparison"}
    drawn = {f"figures/{name}.{kind}" for name in pictures for kind in ("pdf", "svg", "png")}
    tables = {"tidy", *(statistic.name for statistic in STATISTICS)}
    assert names >= drawn | {f"{name}.{kind}" for name in tables for kind in ("csv", "parquet")}
    assert names >= {"report.html", "findings.json"}
    for path in (report.parent / "figures").glob("*.png"):
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 10_000
    assert len(read_table(report.parent)) == len(two_series)
    assert len(pd.read_csv(report.parent / "dynamics.csv")) == 60
    page, _ = page_of(report)
    links = {a["href"] for t, a in page.elements if t == "a"}
    assert links <= names


def _one_checkpoint(t: pd.DataFrame) -> pd.DataFrame:
    return t[t["checkpoint"] == "step_3000"]


@pytest.mark.parametrize(
    "change",
    [
        _one_checkpoint,
        lambda t: _one_checkpoint(t).assign(tokens=0, step=0),
        lambda t: t[(t["task"] == "addition") & (t["metric"] == "acc")],
        lambda t: t.assign(stderr=np.nan),
        lambda t: t.assign(chance=np.nan),
        lambda t: t.assign(n=np.nan, step=np.nan),
        lambda t: t[t["metric"] == "bits_per_byte"],
        lambda t: t.assign(domain="everything"),
        lambda t: t[~((t["task"] == "addition") & (t["step"] > 100))],
        lambda t: t.assign(value=0.5, stderr=0.0),
        lambda t: t.assign(metric=t["metric"].replace("acc", "my_metric")),
    ],
    ids=[
        "one",
        "zero",
        "task",
        "no-stderr",
        "no-chance",
        "no-n",
        "bpb",
        "one-domain",
        "partial",
        "constant",
        "own-metric",
    ],
)
def test_thin_tables_give_a_report_too(change, tmp_path: Path) -> None:
    table = simulated_table(checkpoints=7)
    table = change(table[table["domain"].isin(["arithmetic", "two-hop"])])
    _, data = page_of(write_report(table, tmp_path))
    measured = sum(v is not None for c in data["curves"] for v in c["value"])
    assert measured == len(table)


def test_series_are_ordered_by_model_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fineline_jax.trajectories.report.html_page.draw_figures", lambda *tables, **options: [])
    names = ["pythia-1.4b", "pythia-70m", "pythia-12b"]
    table = pd.concat([simulated_table(i, name, checkpoints=6) for i, name in enumerate(names)])
    _, data = page_of(write_report(table, tmp_path))
    assert data["ordered"] and [s["name"] for s in data["series"]] == ["pythia-70m", "pythia-1.4b", "pythia-12b"]


def test_a_training_log_without_loss_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'loss' is missing"):
        write_report(simulated_table(checkpoints=6), tmp_path, losses=pd.DataFrame({"tokens": [1]}))
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        (0, "0"),
        (950, "950"),
        (4096, "4.1 K"),
        (1.2e6, "1.2 M"),
        (12.34e6, "12.3 M"),
        (3.5e9, "3.5 B"),
        (999.7e6, "1 B"),
        (1.04e12, "1 T"),
    ],
)
def test_tokens_for_people(tokens: float, text: str) -> None:
    assert format_tokens(tokens) == text
