"""Reports of anything's name: tables that a spreadsheet shows as text, files that stay in their folder."""

import csv
import dataclasses
import itertools
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fineline_jax.checkpoints.series import Checkpoint, Series
from fineline_jax.errors import UserError
from fineline_jax.scoring import score_files
from fineline_jax.trajectories.csv_cells import as_written, write_csv
from fineline_jax.trajectories.report.html_page import write_report
from fineline_jax.trajectories.table import normalise, read_table, write_table

FORMULAS = ["=cmd|' /C calc'!A0", "+1", "-2", "@SUM(A1)", "\tx", '=HYPERLINK("x")']
NAMES = [*FORMULAS, "../../up", "a/b\\c", "東京 Zürich", "..", "'quoted", "<script>", "a" * 300]


def tidy(names: list[str]) -> pd.DataFrame:
    rows = [
        {"series": name, "checkpoint": f"c{i}", "step": i, "tokens": i * 1e9, "task": name, "domain": name,
         "metric": "acc", "value": 0.3 + 0.01 * i, "stderr": 0.01, "n": 100, "chance": 0.25}
        for name, i in itertools.product(names, range(1, 6))
    ]  # fmt: skip
    return normalise(pd.DataFrame(rows))


def test_no_cell_of_a_table_is_a_formula_and_it_reads_back_the_same(tmp_path: Path) -> None:
    table = tidy([*FORMULAS, "-0.5 shots", "plain", "a\rb"])
    write_table(table, tmp_path)
    with (tmp_path / "tidy.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            for column in ("series", "task", "domain", "checkpoint"):
                assert row[column][0] not in "=+-@\t", row
            assert 0 < float(row["value"]) < 1, "numbers stay numbers"
    again = read_table(tmp_path / "tidy.csv")
    assert sorted(set(again["task"])) == sorted(name.replace("\r", " ") for name in set(table["task"]))


@settings(max_examples=50)
@given(texts=st.lists(st.text("=+-@'a1 \t", max_size=4), min_size=1, max_size=6))
def test_what_was_quoted_is_what_was_meant(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    frame = pd.DataFrame({"text": texts, "number": range(len(texts))})
    buffer = tmp_path_factory.getbasetemp() / "cells.csv"
    write_csv(frame, buffer)
    read = as_written(pd.read_csv(buffer, keep_default_na=False, dtype={"text": str}))
    assert [a for a, b in zip(read["text"], texts) if a != b and not b.startswith("'")] == []
    assert read["number"].tolist() == list(range(len(texts)))


@pytest.mark.slow
def test_a_report_of_any_names_stays_in_its_folder(tmp_path: Path) -> None:
    write_report(tidy(NAMES), tmp_path / "deep/out")
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]
    assert {path.name for path in (tmp_path / "deep").iterdir()} <= {"out", ".out.lock"}
    assert len(list((tmp_path / "deep/out").rglob("*.png"))) > 1
    page = (tmp_path / "deep/out/report.html").read_text()
    assert '<script>"' not in page and page.count("<script") == page.count("</script>")


@pytest.mark.parametrize("name", ["../up", "a/b", "..", "", "pack", "/etc"])
def test_a_series_whose_name_is_no_folder_has_no_scores(name: str) -> None:
    one = Series("x", (Checkpoint("x", "main", 1, None, Path("x"), "hf"),), location="mine.yaml")
    score_files.check_unique_names([one])
    with pytest.raises(UserError, match="no scores can be kept under the name"):
        score_files.check_unique_names([dataclasses.replace(one, name=name)])
