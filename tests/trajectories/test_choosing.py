"""`fineline analyze --series, --task, --reference, --live`: which series and tasks count, and against what."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fineline_jax.cli import main
from fineline_jax.errors import UserError
from fineline_jax.trajectories.report import html_page
from fineline_jax.trajectories.table import read_table

SERIES = ("m-a", "m-b", "other", "odd [x]")
TASKS = ("piqa", "arc_easy", "sciq")


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(html_page, "draw_figures", lambda *tables, **options: [])


@pytest.fixture(scope="module")
def scores(tmp_path_factory) -> Path:
    """m-b ends at half of the tokens of the others, .1 above them in every task."""
    rng, rows = np.random.default_rng(0), []
    for number, name in enumerate(SERIES):
        for task in TASKS:
            for i in range(6 if name == "m-b" else 12):
                value = 0.3 + 0.03 * i + 0.1 * (name == "m-b") + 0.002 * number + rng.normal(0, 0.002)
                rows.append((name, 1000 * (i + 1), task, "acc", value, 0.01))
    path = tmp_path_factory.mktemp("choosing") / "scores.csv"
    pd.DataFrame(rows, columns=["series", "tokens", "task", "metric", "value", "stderr"]).to_csv(path, index=False)
    return path


def test_patterns_and_exact_names_keep_series_and_tasks(scores):
    assert set(read_table(scores, series=["m-*"])["series"]) == {"m-a", "m-b"}
    assert set(read_table(scores, series=["odd [x]", "other"])["series"]) == {"odd [x]", "other"}
    table = read_table(scores, series=["m-?"], tasks=["*i*q*"])
    assert set(table["task"]) == {"piqa", "sciq"} and set(table["series"]) == {"m-a", "m-b"}
    assert len(read_table(scores)) == len(pd.read_csv(scores))


def test_the_reference_is_what_others_are_compared_with(scores, tmp_path):
    arguments = ["analyze", str(scores), "--out", str(tmp_path / "r"), "--reference", "other", "--task", *TASKS]
    assert main(arguments) == 0
    for name in ("comparison", "early_slopes", "tokens_to"):
        found = pd.read_csv(tmp_path / "r" / f"{name}.csv")
        assert set(found["reference"]) == {"other"}, name
    runs = pd.read_csv(tmp_path / "r" / "comparison.csv")["run"]
    assert list(runs.unique()) == ["m-a", "m-b", "odd [x]"]


def test_the_state_of_a_live_run_is_in_findings_page_and_table(scores, tmp_path):
    assert main(["analyze", str(scores), "--out", str(tmp_path / "r"), "--live", "m-b"]) == 0
    found = pd.read_csv(tmp_path / "r" / "live_state.csv").set_index("task")
    assert set(found["run"]) == {"m-b"} and set(found["verdict"]) == {"ahead"}
    assert found["references"]["piqa"] == 3 and found["tokens"]["piqa"] == 6000
    assert found["difference"]["all tasks"] == pytest.approx(0.1, abs=0.01)  # what it was made with
    said = json.loads((tmp_path / "r" / "findings.json").read_text())
    assert len(said["statistics"]["live_state"]["findings"]) == 4
    assert any("ahead: 4 (m-b, acc, piqa;" in line for line in said["sentences"]["What the comparisons say"])
    assert "Is the run ahead of or behind its references?" in (tmp_path / "r" / "report.html").read_text()
    alone = ["analyze", str(scores), "--out", str(tmp_path / "s"), "--live", "m-b", "--reference", "other"]
    assert main(alone) == 0
    one = pd.read_csv(tmp_path / "s" / "live_state.csv").set_index("task")
    assert one["references"]["piqa"] == 1 and "one reference" in one["reason"]["piqa"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--series", "none*"], "--series none*: there is none of that name; there are m-a, m-b, other, odd [x]"),
        (["--task", "mmlu"], "--task mmlu: there is none of that name; there are piqa, arc_easy, sciq"),
        (["--reference", "m"], "--reference m: there is no series of that name; there are m-a, m-b, other, odd [x]"),
        (["--series", "m-*", "--reference", "other"], "other: there is no series of that name; there are m-a"),
        (["--live", "m"], "live run or reference 'm': there is no series of that name; there are m-a, m-b"),
        (["--series", "m-a", "--live", "m-a"], "live run 'm-a': there is no other series to compare it with"),
    ],
)  # fmt: skip
def test_a_name_that_is_not_there_is_one_line_that_lists_what_is(scores, tmp_path, capsys, options, message):
    assert main(["analyze", str(scores), "--out", str(tmp_path / "r"), *options]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and message in error[0]
    assert not (tmp_path / "r").exists()


def test_tasks_are_those_of_the_series_that_are_kept(tmp_path):
    rows = [("a", 1, "piqa", "acc", 0.5), ("b", 1, "sciq", "acc", 0.5)]
    pd.DataFrame(rows, columns=["series", "tokens", "task", "metric", "value"]).to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(UserError, match="--task sciq: there is none of that name; there are piqa"):
        read_table(tmp_path / "t.csv", series=["a"], tasks=["sciq"])


def test_of_many_names_those_most_like_the_one_asked_for_are_told(tmp_path):
    rows = [f"m-{size}b (5-shot),{tokens},piqa,acc,.3" for size in range(30) for tokens in (1, 2)]
    path = tmp_path / "t.csv"
    path.write_text("series,tokens,task,metric,value\n" + "\n".join(rows) + "\n")
    with pytest.raises(UserError, match=r"there are m-17b \(5-shot\), .* and 22 more$"):
        read_table(path, series=("m-17b",))
