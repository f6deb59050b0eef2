"""`fineline show`: the last scores of each series, and the change from the checkpoint before, paired over documents."""

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from metric_examples import docs, packed, task

from fineline_jax.cli import main
from fineline_jax.errors import UserError
from fineline_jax.scoring import score_files
from fineline_jax.scoring.estimates import Value, change
from fineline_jax.scoring.metrics import documents, latest, resampled, tidy

GROUP = {"group": "both", "domain": "d", "metric": "acc", "chance": 0.25, "tasks": ["one", "two"],
         "weight_by_size": {"acc": True}, "weight_others_by_size": True}  # fmt: skip


@pytest.fixture(scope="module")
def made():
    asked = [
        (task("one"), docs(60, 1)),
        (task("two"), docs(90, 2)),
        (task("word", "loglikelihood"), docs(50, 3, choices=(1,))),
        (task("text", "loglikelihood_rolling", metric="bits_per_byte"), docs(40, 4, choices=(1,))),
    ]
    return packed(asked, groups=(GROUP,))


def scores(made, seed: int, name: str = "c", step: int | None = 1, tokens: int | None = 10) -> score_files.Scores:
    rng, count = np.random.default_rng(seed), made.requests.num_rows
    hard = np.random.default_rng(99).normal(size=count)  # the same questions are hard at every checkpoint
    header = score_files.Header("run", name, step, tokens, 64, score_files.Key("w", made.hash, "float32", "auto", "t"))
    return score_files.Scores(header, -20 - 6 * hard - 3 * rng.normal(size=count), rng.random(count) < 0.4)


def with_deviations(made, one: score_files.Scores) -> dict[str, dict[str, Value]]:
    values = tidy.of_tasks(made, one.loglikelihood, one.is_greedy, resample=False)
    return resampled.with_deviations(made, one, values)


def test_deviations_have_mean_zero_and_give_the_standard_error(made) -> None:
    """Of means exactly, of ratios of sums as `ratio_and_stderr`, of perplexity by the slope of exp."""
    checked = 0
    for name, metrics in with_deviations(made, scores(made, 0)).items():
        for metric, value in metrics.items():
            if value.deviations is None:
                continue
            assert value.deviations.mean() == pytest.approx(0, abs=1e-9 * max(1, abs(value.value))), (name, metric)
            error = value.deviations.std(ddof=1) / math.sqrt(len(value.deviations))
            if name != "both" and math.isfinite(value.stderr):
                assert error == pytest.approx(value.stderr, rel=1e-9), (name, metric)
                checked += 1
    assert checked >= 15


def test_a_change_has_the_error_of_the_differences_of_documents(made) -> None:
    one, two = scores(made, 0), scores(made, 1)
    before, after = with_deviations(made, one), with_deviations(made, two)
    each = [
        tidy.of_documents(made, s.loglikelihood, s.is_greedy).set_index(["task", "metric", "doc"]).sort_index()
        for s in (one, two)
    ]
    for name in ("one", "two", "word"):
        for metric in ("acc", "bits_per_byte"):
            a, b = (found.loc[name, metric]["value"].to_numpy(float) for found in each)
            found = change(before[name][metric], after[name][metric])
            assert found.value == pytest.approx((b - a).mean(), rel=1e-9)
            assert found.stderr == pytest.approx((b - a).std(ddof=1) / math.sqrt(len(a)), rel=1e-9)
    unpaired = math.hypot(before["one"]["margin"].stderr, after["one"]["margin"].stderr)
    assert change(before["one"]["margin"], after["one"]["margin"]).stderr < 0.8 * unpaired, (
        "the same questions are hard"
    )
    tables = {table.task["task"]: table for table in documents.tables(made)}
    weights = tables["text"].bytes * math.log(2)  # the ratio's change by the delta method, written out
    rows = [-s.loglikelihood[tables["text"].first] for s in (one, two)]
    parts = [(row - row.sum() / weights.sum() * weights) / weights.mean() for row in rows]
    expected = (parts[1] - parts[0]).std(ddof=1) / math.sqrt(40)
    found = change(before["text"]["bits_per_byte"], after["text"]["bits_per_byte"])
    assert found.stderr == pytest.approx(expected, rel=1e-9)
    together = math.hypot(*(
        size / 150 * change(before[name]["acc"], after[name]["acc"]).stderr * math.sqrt((size - 1) / size)
        for name, size in (("one", 60), ("two", 90))
    ))  # fmt: skip
    group = change(before["both"]["acc"], after["both"]["acc"])
    assert group.value == pytest.approx(after["both"]["acc"].value - before["both"]["acc"].value)
    assert group.stderr == pytest.approx(together * math.sqrt(150 / 149), rel=1e-9), "tasks are independent"


def test_a_change_of_values_without_documents_is_of_independent_ones() -> None:
    assert change(Value(0.5, 0.03, 10), Value(0.7, 0.04, 12)) == Value(pytest.approx(0.2), pytest.approx(0.05), 10)
    assert change(Value(0.5, 0.03, 10, np.zeros(10)), Value(0.7, 0.04, 12, np.zeros(12))).stderr == pytest.approx(0.05)
    assert math.isnan(change(Value(1.0, math.nan, 1), Value(2.0, 0.1, 1)).stderr)


def rows_of(text: str) -> dict[str, list[str]]:
    return {line[0]: line for line in (re.split(r" {2,}", line) for line in text.splitlines()) if line[0]}


def test_the_last_two_are_shown_and_what_changed(made, tmp_path: Path, capsys) -> None:
    score_files.keep_pack(tmp_path, made)
    stored = [scores(made, 0, "old", 1, 10), scores(made, 1, "mid", 2, 20), scores(made, 2, "last", 3, 30)]
    for one in reversed(stored):
        score_files.write(tmp_path, one)
    assert main(["show", str(tmp_path)]) == 0
    found = rows_of(capsys.readouterr().out)
    assert found["run"] == ["run", "metric", "n", "mid", "last", "change"]
    assert list(found) == ["run", "word", "text", "both"], "a group stands for its tasks"
    before, after = (with_deviations(made, one) for one in stored[1:])
    for name, metric, size in (("both", "acc", "150"), ("word", "acc", "50"), ("text", "bits_per_byte", "40")):
        a, b = before[name][metric], after[name][metric]
        changed = change(a, b)
        cells = [f"{a.value:.4f} ±{a.stderr:.4f}", f"{b.value:.4f} ±{b.stderr:.4f}"]
        assert found[name] == [name, metric, size, *cells, f"{changed.value:+.4f} ±{changed.stderr:.4f}"]
    assert main(["show", str(tmp_path), "--task", "on*", "--last", "3"]) == 0
    out = capsys.readouterr().out
    assert re.split(r" {2,}", out.splitlines()[0])[3:] == ["old", "mid", "last", "change"]
    assert len(out.splitlines()) > 8 and all(line.startswith(("run ", "one ")) for line in out.splitlines())
    assert main(["show", str(tmp_path), "--last", "1"]) == 0
    assert rows_of(capsys.readouterr().out)["run"] == ["run", "metric", "n", "last", "change"], (
        "the change all the same"
    )
    assert main(["show", str(tmp_path), "--task", "three"]) == 2
    assert "--task three: no such task here; there are one, two, word, text, both" in capsys.readouterr().err
    assert main(["show", str(tmp_path), "--last", "0"]) == 2


def test_a_model_without_tokens_is_shown(made, tmp_path: Path, capsys) -> None:
    score_files.keep_pack(tmp_path, made)
    score_files.write(tmp_path, scores(made, 0, "main", None, None))
    assert main(["show", str(tmp_path)]) == 0
    found = rows_of(capsys.readouterr().out)
    assert found["run"] == ["run", "metric", "n", "main"] and len(found) == 4


def results(folder: Path, model: str, acc: float) -> None:
    folder.mkdir(parents=True)
    values = {"acc,none": acc, "acc_stderr,none": 0.01, "acc_norm,none": acc + 0.1, "acc_norm_stderr,none": 0.02}
    content = {"results": {"piqa": values, "own": {"acc,none": 0.25, "acc_stderr,none": "N/A"}},
               "config": {"model_args": {"pretrained": model}}, "n-samples": {"piqa": {"effective": 1838}},
               "n-shot": {"piqa": 0, "own": 0}}  # fmt: skip
    (folder / "results_2026-01-01T00-00-00.json").write_text(json.dumps(content))


def test_results_of_other_tools_are_shown_also_without_tokens(tmp_path: Path, capsys) -> None:
    results(tmp_path / "one/a", "my/model", 0.5)
    assert main(["show", str(tmp_path / "one")]) == 0
    found = rows_of(capsys.readouterr().out)
    assert found["model"] == ["model", "metric", "n", "main"]
    assert found["piqa"] == ["piqa", "acc_norm", "1,838", "0.6000 ±0.0200"], "first is what facts say"
    assert found["own"] == ["own", "acc", "0.2500"], "neither error nor number of documents is known"
    for step, acc in ((2000, 0.7), (1000, 0.6)):
        results(tmp_path / f"two/{step}", f"my/model/step{step}", acc)
    assert main(["show", str(tmp_path / "two"), "--task", "piqa"]) == 0
    out = capsys.readouterr().out
    assert re.split(r" {2,}", out.splitlines()[0]) == ["model", "metric", "n", "step1000", "step2000", "change"]
    assert "0.6000 ±0.0100  0.7000 ±0.0100  +0.1000 ±0.0141" in out and "acc_norm" in out
    file = tmp_path / "tidy.csv"
    file.write_text("series,tokens,task,metric,value\nm,2e9,t,acc,0.25\nm,1e9,t,acc,0.5\n")
    assert main(["show", str(file)]) == 0
    assert "0.5000" in (out := capsys.readouterr().out) and "-0.2500" in out
    file.write_text("series,tokens,task,value\nm,2e9,t,0.25\n")
    assert main(["show", str(file)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_series_are_chosen_by_name(made, tmp_path: Path) -> None:
    score_files.keep_pack(tmp_path, made)
    one = scores(made, 0)
    for name in ("run", "other"):
        score_files.write(tmp_path, dataclasses.replace(one, header=dataclasses.replace(one.header, series=name)))
    assert "other" not in latest.of_scores(tmp_path, series=["run"]) and "other" in latest.of_scores(tmp_path)
    with pytest.raises(UserError, match="no such task here"):
        latest.of_scores(tmp_path, ["nothing"])
