"""Every column of a table that is read."""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fineline_jax.errors import UserError
from fineline_jax.facts.score_table import COLUMNS
from fineline_jax.trajectories.report.style import order_by_size
from fineline_jax.trajectories.table import normalise, read_table, write_table

NAN = math.nan


@pytest.mark.parametrize(
    ("names", "ordered"),
    [
        (["pythia-1.4b", "pythia-70m", "pythia-410m"], ["pythia-70m", "pythia-410m", "pythia-1.4b"]),
        (["a-1000m-x", "a-7B", "a-0.5b"], ["a-0.5b", "a-1000m-x", "a-7B"]),
        (["a-7b", "a-1b", "b-1b", "a-2b"], ["a-1b", "b-1b", "a-2b", "a-7b"]),
        (["a-7b", "a-1b"], None),  # two need no order
        (["a-1b", "b-1b", "a-7b"], None),
        (["a-1b", "a-1000m", "a-7b"], None),
        (["a-1b", "a-3b", "last"], None),
        (["x-100bt", "y-200bt", "z-300bt"], None),  # tokens
    ],
)
def test_series_are_ordered_where_all_sizes_differ(names: list[str], ordered: list[str] | None) -> None:
    assert order_by_size(names) == (ordered or names, ordered is not None)


# ---- normalise


def rows(**columns: object) -> pd.DataFrame:
    count = max([2, *(len(v) for v in columns.values() if isinstance(v, list))])
    base = {"series": "s", "tokens": [1e6 * (i + 1) for i in range(count)], "task": "t", "metric": "acc", "value": 0.5}
    return pd.DataFrame(base | columns)


def test_columns_of_other_names_are_taken() -> None:
    frame = rows(acc_stderr=[0.1, 0.2], revision=["r1", "r2"], step=[3, 4], n=[7, 8], domain="d", chance=[0.5, 0.4])
    table = normalise(frame.rename(columns={"series": "model"}))
    assert tuple(table.columns) == COLUMNS
    assert table.to_dict("list") == {
        "series": ["s", "s"], "checkpoint": ["r1", "r2"], "step": [3.0, 4.0], "tokens": [1e6, 2e6], "domain": ["d"] * 2,
        "task": ["t"] * 2, "metric": ["acc"] * 2, "value": [0.5] * 2, "stderr": [0.1, 0.2], "n": [7.0, 8.0],
        "chance": [0.5, 0.4],
    }  # fmt: skip
    assert set(table[["step", "tokens", "value", "stderr", "n", "chance"]].dtypes) == {np.dtype("float64")}
    both = normalise(frame.assign(model="other", stderr=0.3))  # what has its own name is not replaced
    assert set(both.series) == {"s"} and set(both.stderr) == {0.3}


def test_shots_are_part_of_the_name_only_where_they_differ() -> None:
    assert set(normalise(rows(shots=[5, 5])).series) == {"s"}
    assert list(normalise(rows(shots=[0, 5])).series) == ["s (0-shot)", "s (5-shot)"]


def test_what_is_absent_is_filled_and_what_is_there_is_kept() -> None:
    table = normalise(rows(task=["piqa", "arc_easy", "x"], step=[7, NAN, NAN], domain=["mine", None, None]))
    assert list(table.checkpoint) == ["step_7", "tokens_2000000", "tokens_3000000"]
    assert list(table.domain) == ["mine", "exam", "other"]
    assert list(table.chance[:2]) == [0.5, 0.25] and math.isnan(table.chance[2])
    given = normalise(rows(task=["piqa", "arc_easy"], chance=[NAN, 0.1]))
    assert math.isnan(given.chance[0]) and given.chance[1] == 0.1  # an empty chance is not guessed


def test_rows_are_in_the_order_of_first_appearance_and_of_tokens() -> None:
    key = [("b", "y", "t2", "m2"), ("b", "y", "t2", "m1"), ("b", "x", "t1", "m2"), ("a", "y", "t3", "m2")]
    frame = pd.DataFrame(
        [(*k, tokens, step) for tokens, step in ((9, 1), (5, 3), (5, 2)) for k in key],
        columns=["series", "domain", "task", "metric", "tokens", "step"],
    )
    table = normalise(frame.assign(value=0.5, checkpoint=[f"c{i}" for i in range(len(frame))]))
    order = [("b", "y", "t2", "m2"), ("b", "y", "t2", "m1"), ("b", "x", "t1", "m2"), ("a", "y", "t3", "m2")]
    assert list(table[["series", "domain", "task", "metric"]].itertuples(index=False, name=None)) == [
        k for k in order for _ in range(3)
    ]
    assert list(table.tokens) == [5, 5, 9] * 4 and list(table.step) == [2, 3, 1] * 4


@pytest.mark.parametrize(
    ("column", "good", "bad"),
    [
        ("tokens", [0, 1], [-1, 1]),
        ("tokens", [0, 1], [math.inf, 1]),
        ("stderr", [0, NAN], [-1e-9, 0]),
        ("stderr", [0, NAN], [math.inf, 0]),
        ("n", [0, NAN], [-1, 1]),
        ("chance", [0, 1], [1.0001, 0]),
        ("chance", [NAN, 1], [-0.0001, 0]),
        ("value", [-3, 1e9], [math.inf, 0]),
        ("step", [-1, NAN], ["x", 1]),
    ],
)
def test_limits_are_part_of_what_is_allowed(column: str, good: list, bad: list) -> None:
    table = normalise(rows(**{column: good}))
    assert table[column].tolist() == pytest.approx(good, nan_ok=True)
    with pytest.raises(UserError, match=f"^table: column '{column}' .* in line 2"):
        normalise(rows(**{column: bad}))


def test_contradictions_are_refused() -> None:
    with pytest.raises(UserError, match=r"\(s, c, t, acc\) occurs twice"):
        normalise(rows(checkpoint="c", tokens=[1, 1]))
    with pytest.raises(UserError, match="checkpoint 'c' of series 's' has several values of 'tokens'"):
        normalise(rows(checkpoint="c", task=["a", "b"]))
    with pytest.raises(UserError, match="task 't' is in several domains"):
        normalise(rows(domain=["a", "b"]))
    assert len(normalise(rows(checkpoint="c", series=["a", "b"]))) == 2  # of another series it is another checkpoint


# ---- files


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz", "T.CSV", "t.parquet"])
def test_names_of_digits_stay_as_they_are(name: str, tmp_path: Path) -> None:
    named = rows(checkpoint=["001", "002"], task="007", series="1.50")
    for frame in (named, named.rename(columns={"series": "model"})):
        frame.to_parquet(tmp_path / name) if "parquet" in name else frame.to_csv(tmp_path / name, index=False)
        table = read_table(tmp_path / name)
        assert list(table.checkpoint) == ["001", "002"] and set(table.task) == {"007"}
        assert set(table.series) == {"1.50"}
    assert list(table.tokens) == [1e6, 2e6]


def test_a_report_folder_is_read_by_its_parquet_file(tmp_path: Path) -> None:
    write_table(normalise(rows()), tmp_path)
    (tmp_path / "tidy.csv").write_text("other")
    assert len(read_table(str(tmp_path))) == 2
    (tmp_path / "tidy.parquet").unlink()
    with pytest.raises(UserError, match="column 'series' is missing"):
        read_table(tmp_path)


def test_tables_are_joined_and_what_they_share_is_there_once(tmp_path: Path) -> None:
    for name, series in (("one", ["a", "b"]), ("two", ["b", "c"])):
        rows(
            series=series, checkpoint=series, tokens=[ord(s) for s in series], value=[ord(s) / 200 for s in series]
        ).to_csv(tmp_path / f"{name}.csv", index=False)
    table = read_table([tmp_path / "two.csv", tmp_path / "one.csv"])
    assert tuple(table.columns) == COLUMNS
    assert list(table.series) == ["b", "c", "a"] and list(table.value) == [ord(s) / 200 for s in "bca"]
    rows(series="b", checkpoint="b", tokens=[98], value=[0.1])[:1].to_csv(tmp_path / "three.csv", index=False)
    with pytest.raises(UserError, match=r"one\.csv and .*three\.csv: \(b, b, t, acc\) is given with different values"):
        read_table([tmp_path / "one.csv", tmp_path / "three.csv"])
    with pytest.raises(UserError, match="no score table was given"):
        read_table([])


# ---- lm-eval's files


def result(path: Path, scores: dict, **more: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"results": scores} | more))
    return path


def model(name: str, revision: str = "") -> dict:
    return {"config": {"model_args": {"pretrained": name, "revision": revision}}}


@pytest.mark.parametrize(
    ("name", "revision", "expected"),
    [
        ("org/m", "step1000-tokens4B", ("m", "step1000-tokens4B", 1000, 4e9)),
        ("org/m/", "tokens2.5M", ("m", "tokens2.5M", NAN, 2.5e6)),
        ("org/m", "7K-tok", ("m", "7K-tok", NAN, 7e3)),
        ("org/m-300btrained", "2B-tok", ("m-300btrained", "2B-tok", NAN, 2e9)),
        ("org/m", "stage1-step5-1.5T-tokens", ("m", "stage1-step5-1.5T-tokens", 5, 1.5e12)),
        ("org/m", "step0", ("m", "step0", 0, 0)),
        ("EleutherAI/pythia-1b", "step1000", ("pythia-1b", "step1000", 1000, 1000 * 2_097_152)),
        ("EleutherAI/pythia-1b-1MtokBS", "step10", ("pythia-1b-1MtokBS", "step10", 10, 10 * 1_048_576)),
        ("EleutherAI/pythia-1b-0.5MtokBS", "step10", ("pythia-1b-0.5MtokBS", "step10", 10, 10 * 524_288)),
        ("EleutherAI/pythia-1b-2MtokBS", "main", ("pythia-1b-2MtokBS", "results_step6-tokens6M", 6, 6e6)),  # of a batch
        ("runs/demo/step_20-tokens1M", "", ("demo", "step_20-tokens1M", 20, 1e6)),
        ("org/Amber-ckpt_3-tokens3B", "main", ("Amber", "Amber-ckpt_3-tokens3B", 3, 3e9)),
        ("org/plain", "main", ("plain", "results_step6-tokens6M", 6, 6e6)),
    ],
)
def test_a_checkpoint_is_told_by_revision_name_or_file(name, revision, expected, tmp_path: Path) -> None:
    path = result(tmp_path / "results_step6-tokens6M.json", {"piqa": {"acc,none": 0.5}}, **model(name, revision))
    [row] = read_table(path).itertuples(index=False)
    assert (row.series, row.checkpoint) == expected[:2]
    assert (row.step, row.tokens) == pytest.approx(expected[2:], nan_ok=True)
    assert read_table(path, tokens_per_step=3).tokens.item() == (
        expected[3] if "ok" in row.checkpoint else 3 * row.step
    )


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, ("folder", "results_step6-tokens6M")),
        ({"config": {"model": "m-tokens1B"}}, ("m", "m-tokens1B")),
        ({"config": {"model": "a-tokens1B"}, "model_name": "b-tokens1B"}, ("b", "b-tokens1B")),
        ({"model_name": "c-tokens1B", **model("d-tokens1B")}, ("d", "d-tokens1B")),
        ({"model_name": "tokens1B"}, ("folder", "tokens1B")),
    ],
)
def test_the_series_is_named_by_what_says_most(more: dict, expected: tuple, tmp_path: Path) -> None:
    path = result(tmp_path / "folder/results_step6-tokens6M.json", {"piqa": {"acc,none": 0.5}}, **more)
    [row] = read_table(path).itertuples()
    assert (row.series, row.checkpoint) == expected


def test_what_export_scores_writes_names_series_checkpoint_and_tokens(tmp_path: Path) -> None:
    arguments = "pretrained=runs/s/step7,revision=step7,tokens=1234,dtype=float32"
    path = result(tmp_path / "results_x.json", {"piqa": {"acc,none": 0.5}}, config={"model_args": arguments})
    [row] = read_table(path, tokens_per_step=9).itertuples(index=False)
    assert (row.series, row.checkpoint, row.step, row.tokens) == ("s", "step7", 7, 1234)


def test_every_score_of_a_result_file_is_a_row(tmp_path: Path) -> None:
    scores = {
        "group": {"acc,none": 0.1, "alias": "g"},
        "group2": {"acc,none": 0.2},
        "piqa": {
            "alias": "piqa", "sample_len": 3, "acc,none": 0.6, "acc_stderr,none": 0.01, "acc_norm,none": 1,
            "acc_norm_stderr,none": "N/A", "exact_match,strict-match": 0.3, "exact_match_stderr,strict-match": 0.02,
            "exact_match,flexible": 0.4, "flag,none": True, "word,none": "x",
        },
        "old": {"acc": 0.7, "acc_stderr": 0.03, "ppl": 5.0},
    }  # fmt: skip
    path = result(
        tmp_path / "results_1.json", scores, **model("m", "tokens1B"),
        group_subtasks={"group": ["absent", "piqa"], "group2": ["absent"]},
        **{"n-samples": {"piqa": {"original": 9, "effective": 4}}, "n-shot": {"group2": 3, "piqa": 0, "old": 5}},
    )  # fmt: skip
    found = {(row.task, row.metric): (row.value, row.stderr, row.n) for row in read_table(path).itertuples()}
    assert {key: pytest.approx(value, nan_ok=True) for key, value in found.items()} == {
        ("group2", "acc"): (0.2, NAN, NAN),  # its members are not there
        ("piqa", "acc"): (0.6, 0.01, 4), ("piqa", "acc_norm"): (1.0, NAN, 4),
        ("piqa", "exact_match (strict-match)"): (0.3, 0.02, 4), ("piqa", "exact_match (flexible)"): (0.4, NAN, 4),
        ("old", "acc"): (0.7, 0.03, NAN), ("old", "ppl"): (5.0, NAN, NAN),
    }  # fmt: skip
    assert set(read_table(path).series) == {"m"}  # each task with one number of shots


def test_shots_of_one_task_that_differ_are_series_of_their_own(tmp_path: Path) -> None:
    for i, shots in enumerate((0, 5)):
        result(
            tmp_path / f"results_{i}.json",
            {"piqa": {"acc,none": 0.5 + i / 10}},
            **model("m", "tokens1B"),
            **{"n-shot": {"piqa": shots}},
        )
    assert {row.series: row.value for row in read_table(tmp_path).itertuples()} == {
        "m (0-shot)": 0.5,
        "m (5-shot)": 0.6,
    }
    for i, shots in enumerate((0, 5)):  # the older files say it for all tasks
        config = {"num_fewshot": shots, "model_args": "pretrained=m,revision=tokens1B"}
        result(tmp_path / f"results_{i}.json", {"piqa": {"acc": 0.5 + i / 10}}, config=config)
    assert {row.series: row.value for row in read_table(tmp_path).itertuples()} == {
        "m (0-shot)": 0.5,
        "m (5-shot)": 0.6,
    }


def test_shots_that_are_not_known_of_all_tasks_name_a_series_of_their_own(tmp_path: Path) -> None:
    for i, shots in enumerate((0, 5)):
        scores = {"piqa": {"acc,none": 0.5 + i / 10}, "boolq": {"acc,none": 0.5}}
        result(tmp_path / f"results_{i}.json", scores, **model("m", "tokens1B"), **{"n-shot": {"piqa": shots}})
    assert {(row.series, row.task): row.value for row in read_table(tmp_path).itertuples()} == {
        ("m (0-shot)", "piqa"): 0.5, ("m (5-shot)", "piqa"): 0.6, ("m (shots unknown)", "boolq"): 0.5,
    }  # fmt: skip


def test_a_tree_is_its_result_files_or_else_all_its_json_files(tmp_path: Path) -> None:
    for name, tokens in (("a/m-tokens1B.json", "1B"), ("b/c/m-tokens2B.json", "2B")):
        result(tmp_path / name, {"piqa": {"acc": 0.5}}, **model("m", f"tokens{tokens}"))
    assert list(read_table(tmp_path).tokens) == [1e9, 2e9]
    for again in ("results_1", "results_2"):  # the same score twice is one
        result(tmp_path / f"a/{again}.json", {"piqa": {"acc": 0.5}}, **model("m", "tokens3B"))
    assert list(read_table(tmp_path).tokens) == [3e9]
    result(tmp_path / "a/results_2.json", {"piqa": {"acc": 0.6}}, **model("m", "tokens3B"))
    with pytest.raises(UserError, match="occurs twice"):
        read_table(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"results": {"piqa": {}}, "model_name": "m-tokens1B"}, "hold no scores"),
        ({"results": {"piqa": {"acc": 0.5}}}, "neither revision, model nor file name says which checkpoint"),
        ({"results": {"piqa": {"acc": 0.5}}, "model_name": "m-step3"}, "names a step but no tokens"),
        ({"results": {"piqa": {"acc": 0.5}}, "config": {"model_args": [1]}}, "neither text nor a table"),
    ],
)
def test_a_result_file_that_says_too_little_is_named(content: dict, message: str, tmp_path: Path) -> None:
    (tmp_path / "results_x.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        read_table(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: no .* result file"):
        read_table(tmp_path / "empty")


@pytest.mark.parametrize(
    ("inside", "what"),
    [
        ("recipe.json", "is the folder of a run"), ("m/recipe.json", "is a folder of runs"),
        ("10/complete.json", "is a run's checkpoints"), ("contexts.parquet", "is a request pack"),
    ],
)  # fmt: skip
def test_what_holds_no_scores_is_told_how_to_get_them(inside: str, what: str, tmp_path: Path) -> None:
    (tmp_path / inside).parent.mkdir(exist_ok=True)
    (tmp_path / inside).write_text("{}")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}')
    with pytest.raises(UserError, match=rf"{what}, no scores; make them with `fineline score`"):
        read_table(tmp_path)


def test_a_tidy_table_without_its_scores_or_series_is_told_so(tmp_path: Path, caplog) -> None:
    (tmp_path / "a.csv").write_text("series,tokens,task,metric,scores\nm,1,t,acc,0.5\n")
    with pytest.raises(
        UserError, match=r"a.csv: column 'value' is missing \(found: series, tokens, task, metric, scores\)"
    ):
        read_table(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_text("tokens,task,metric,value\n1,t,acc,0.5\n")
    assert list(read_table(tmp_path / "b.csv")["series"]) == ["b"]
    assert "b.csv: has no column 'series'; its series is called b" in caplog.text


def test_a_score_of_no_task_names_the_tasks(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("series,tokens,task,metric,value\nm,1,piqa,acc,0.5\n")
    with pytest.raises(UserError, match=r"--to-score piqua=0.6: .*; there are piqa, acc"):
        read_table(tmp_path / "a.csv", scores={"piqua": 0.6})
