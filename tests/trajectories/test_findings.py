"""findings.json, the tables beside it and the sentences, on frames made by hand."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from trajectories_simulated import simulated_table

from fineline_jax.trajectories.registry import STATISTICS
from fineline_jax.trajectories.report.findings import compute, write_results
from fineline_jax.trajectories.report.sentences import sentences
from fineline_jax.trajectories.statistics.columns import Chart, Column, Statistic, shots_of, size_of
from fineline_jax.trajectories.statistics.defects import DEFECTS
from fineline_jax.trajectories.statistics.dynamics import DYNAMICS
from fineline_jax.trajectories.statistics.growth import GROWTH
from fineline_jax.trajectories.table import normalise, read_table

NAN = float("nan")
GAIN = Statistic(
    "gain", "Is it better?", pd.DataFrame,
    (
        Column("series", "", "the run"), Column("gain", "score", "the gain", "with one", interval=("low", "high")),
        Column("low", "score", "lower end"), Column("high", "score", "upper end"), Column("tasks", "1", "how many"),
        Column("verdict", "", "yes, no, declined"), Column("reason", "", "why declined"),
    ),
    "a paper", definition="What is computed.", caveat="What it is not.", chart=Chart("gain"), count="tasks",
)  # fmt: skip
ROWS = pd.DataFrame(
    [("a", 0.1234567, 0.1, 0.2, 7, "yes", ""), ("b", 0.01, -np.inf, 0.3, 7, "no", ""),
     ("c", NAN, NAN, NAN, 1, "declined", "one task"), ("d", NAN, NAN, NAN, 1, "declined", "one task")],
    columns=[column.name for column in GAIN.columns],
)  # fmt: skip


def dynamics(*rows: tuple) -> pd.DataFrame:
    names = ("series", "domain", "task", "metric", "to_score", "to_score_low", "to_score_high", "t50", "verdict")
    frame = pd.DataFrame(rows, columns=names)
    return frame.reindex(columns=[column.name for column in DYNAMICS.columns])


def test_every_row_has_values_intervals_n_and_reason(tmp_path: Path) -> None:
    write_results([(GAIN, ROWS)], {"What": ["That."]}, tmp_path, title="T & U")
    found = json.loads((tmp_path / "findings.json").read_text())
    assert (found["format"], found["title"], found["sentences"]) == (1, "T & U", {"What": ["That."]})
    gain = found["statistics"]["gain"]
    assert gain["columns"]["gain.gain"] == {"unit": "score", "meaning": "the gain", "empty": "with one"}
    assert (gain["definition"], gain["caveat"], gain["source"]) == ("What is computed.", "What it is not.", "a paper")
    a, b, c, _ = gain["findings"]
    assert a == {
        "of": {"series": "a"}, "values": {"gain": 0.123457, "tasks": 7}, "intervals": {"gain": [0.1, 0.2]}, "n": 7,
        "verdict": "yes", "reason": "",
    }  # fmt: skip
    assert b["intervals"] == {"gain": [None, 0.3]}  # what bounds nothing is null
    assert c["values"]["gain"] is None and c["intervals"] == {} and c["reason"] == "one task"
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "gain.parquet"), ROWS, check_dtype=False)
    assert len(pd.read_csv(tmp_path / "gain.csv")) == 4


def test_sentences_say_what_rose_what_moves_and_what_cannot_be_said() -> None:
    summary = dynamics(
        ("s", "x", "piqa", "acc", 2e9, 1e9, 3e9, 1e9, "settled"),
        ("s", "x", "boolq", "acc", 8e9, 7e9, np.inf, NAN, "still rising"),
        ("s", "y", "lambada", "acc", 4e9, 3e9, 5e9, NAN, "declined since its peak"),
        ("s", "y", "wsc", "acc", NAN, NAN, NAN, NAN, "not distinguishable from chance"),
        ("s", "y", "piqa", "acc_norm", 1.0, 1.0, 1.0, 1.0, "settled"),
    )  # fmt: skip
    said = sentences(summary, [(DYNAMICS, summary), (GAIN, ROWS)], "acc")
    assert said["What was learned when"] == [
        "By accuracy, 2 of 4 tasks (4 tasks in 1 series) rose.",
        "The fixed score was reached first in piqa: 2 B tokens (95 %: 1 B to 3 B), and last in boolq: 8 B tokens.",
    ]
    assert said["What still moves"] == [
        "Still rising at the last checkpoint: boolq. Their final level is not known.",
        "Declined since their peak: lambada.",
    ]  # fmt: skip
    assert said["What the comparisons say"] == ["Is it better? yes: 1 (a); no: 1 (of 2)."]
    assert said["What cannot be said"] == [
        "Not distinguishable from chance: wsc.", "Is it better? No answer for 2 of 4: one task.",
    ]  # fmt: skip


def unexplained(findings: dict) -> list[str]:
    """Where a number or verdict of findings.json lacks its definition, its n or the reason why it is not there."""
    bad = []
    for name, statistic in findings["statistics"].items():
        bad += [f"{name}: no {part}" for part in ("title", "definition", "caveat", "source") if not statistic[part]]
        for row in statistic["findings"]:
            why = row.get("reason")
            if not why and not (row.get("n") or 0) > 0:
                bad.append(f"{name} {row['of']}: neither n nor reason")
            if row.get("verdict", "said") in ("", "declined") and not why:
                bad.append(f"{name} {row['of']}: declined without a reason")
            for number, value in row["values"].items():
                column = statistic["columns"].get(f"{name}.{number}")
                if column is None or not column["meaning"]:
                    bad.append(f"{name}: {number} is not defined")
                elif value is None and not why and not column["empty"]:
                    bad.append(f"{name} {row['of']}: no {number}, and nothing says why")
    return bad


def test_what_lacks_n_or_reason_is_found() -> None:
    row = {"of": {"a": "b"}, "values": {"x": 1.0}, "intervals": {}, "n": 3, "verdict": "yes", "reason": ""}
    column = {"s.x": {"meaning": "m", "empty": ""}}
    of = lambda **change: unexplained(
        {"statistics": {"s": dict.fromkeys(("title", "definition", "caveat", "source"), "t")
                        | {"columns": column, "findings": [row | change]}}}
    )  # fmt: skip
    assert of() == [] == of(n=None, values={"x": None}, reason="too few")
    for change in ({"n": None}, {"verdict": "declined"}, {"values": {"x": None}}, {"values": {"y": 1.0}}):
        assert len(of(**change)) == 1, change


@pytest.mark.slow
def test_every_finding_of_pythia_and_of_the_simulated_demo_has_n_or_reason(shared_data: Path, tmp_path: Path) -> None:
    pythia = read_table(shared_data / "trajectories" / "pythia" / "pythia_v1_tidy.csv.gz")
    for name, table in (("pythia", pythia), ("demo", normalise(simulated_table(checkpoints=12)))):
        results = [
            *compute(table),
            (GROWTH, GROWTH.compute(table[table["metric"] == table["metric"].iloc[0]].head(400))),
        ]
        (tmp_path / name).mkdir()
        write_results(results, {}, tmp_path / name, title=name)
        found = json.loads((tmp_path / name / "findings.json").read_text())
        assert set(found["statistics"]) >= {statistic.name for statistic in STATISTICS}
        assert unexplained(found) == []


def test_of_differences_and_predictions_the_sentence_says_how_large_they_are() -> None:
    run, metric, gain = (
        Column(name, unit, f"its {name}") for name, unit in (("run", ""), ("metric", ""), ("gain", "points"))
    )
    verdict, reason, error = Column("verdict", "", ""), Column("reason", "", ""), Column("error", "points", "its error")
    better = Statistic(
        "b", "Better?", pd.DataFrame, (run, metric, gain, verdict, reason), "", chart=Chart("gain", "", 0.0)
    )
    right = Statistic("r", "Right?", pd.DataFrame, (run, metric, error, verdict, reason), "", chart=Chart("gain"))
    rows = [("a", "acc", -1.0, "kept", ""), ("b", "acc", 3.0, "kept", ""), ("c", "acc", 7.0, "refused", ""),
            ("d", "bits_per_byte", 99.0, "kept", "")]  # fmt: skip
    frames = [pd.DataFrame(rows, columns=[column.name for column in one.columns]) for one in (better, right)]
    said = sentences(dynamics(), list(zip((better, right), frames, strict=True)), "acc")["What the comparisons say"]
    assert said == [  # the median of -1, 3, 7 of one metric; of predictions that of -1 and 3, which were kept
        "Better? kept: 3 (a, acc; b, acc; d, bits_per_byte); refused: 1 (c, acc) (of 4). "
        "By accuracy, its gain: median 3, from -1 to 7.",
        "Right? kept: 3 (a, acc; b, acc; d, bits_per_byte); refused: 1 (c, acc) (of 4). "
        "By accuracy, its error: median 1, from -1 to 3.",
    ]
    frames[1]["run"] = "r" * 99  # too long to be named
    assert sentences(dynamics(), [(right, frames[1])], "acc")["What the comparisons say"][0].startswith(
        "Right? kept: 3;"
    )


def test_series_are_counted_where_there_are_several() -> None:
    rows = [
        (f"s{i}", f"d{k % 2}", f"t{k}", "acc", 1e9 * (k + 1) * (i + 1), 1, 2, NAN, "settled")
        for i in range(3)
        for k in range(9)
    ]
    rows += [(f"s{i}", "d0", f"low{k}", "acc", NAN, NAN, NAN, NAN, "below chance") for i in range(2) for k in range(8)]
    said = sentences(dynamics(*rows), [], "acc")
    assert said["What was learned when"] == [
        "By accuracy, 27 of 43 curves (17 tasks in 3 series) rose.",
        "The fixed score (median over series) was reached first in t0: 2 B tokens, and last in t8: 18 B tokens.",
        "Domains by the median of their tasks that reached it: d1 (8 B), d0 (9 B) tokens.",
    ]
    names = ", ".join(f"low{k} (2 series)" for k in range(5))
    assert said["What cannot be said"] == [f"Below chance: {names} and 3 more tasks."]


def test_every_registered_statistic_returns_the_columns_that_it_describes() -> None:
    rng = np.random.default_rng(0)
    rows = [
        {"series": f"m-{size}m", "tokens": 1e9 * (k + 1), "step": k, "task": f"t{j}", "domain": f"d{j % 2}"}
        | {"value": 0.25 + 0.05 * k * (1 + j / 4) / 2 + 0.01 * rng.standard_normal(), "stderr": 0.01}
        | {"n": 500.0, "chance": 0.25, "metric": "acc"}
        for size in (70, 160, 410, 1000) for k in range(10) for j in range(4)
    ]  # fmt: skip
    table = pd.DataFrame(rows).assign(checkpoint=lambda t: "step_" + t["step"].astype(str))
    one = table[(table.series == "m-70m") & (table.tokens == 1e9)]
    for statistic in STATISTICS:
        for part in (table, one, one[one.task == "t0"]):
            frame = statistic.compute(part)
            assert list(frame.columns) == [column.name for column in statistic.columns], statistic.name
        assert len(statistic.compute(table)) or statistic is DEFECTS, statistic.name  # the table has no defect


def test_sizes_and_shots_are_read_from_names() -> None:
    names = {
        "pythia-1.4b-1MtokBS (5-shot)": (1.4e9, "5"),
        "a-160m": (1.6e8, ""),
        "olmo": (NAN, ""),
        "m-1b-7b": (NAN, ""),
    }
    for name, (size, shots) in names.items():
        assert (size_of(name) == size or np.isnan(size) == np.isnan(size_of(name))) and shots_of(name) == shots
