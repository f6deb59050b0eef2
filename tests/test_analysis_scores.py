"""`fineline analyze` from stored log-likelihoods and a run's log to the numbers of the report."""

import json
import math
from pathlib import Path

import numpy as np
import pandas
import pytest
from report_examples import page_of
from scoring_examples import write_benchmarks, write_tokenizer

from fineline_jax import prepare_pack
from fineline_jax.catalogue import load_recipe
from fineline_jax.checkpoints.runs.digest_record import write_record
from fineline_jax.cli import main
from fineline_jax.recipe import to_json
from fineline_jax.scoring import score_files
from fineline_jax.scoring.requests import pack
from fineline_jax.trajectories.report import html_page
from fineline_jax.trajectories.table import read_table

DOCUMENTS = {"piqa": 7, "arc_easy": 7, "winogrande": 7, "lambada_openai": 7}
STEPS = (10, 20, 40, 80, 160, 320)


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch):
    monkeypatch.setattr(html_page, "draw_figures", lambda *tables, **options: [])


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> pack.Pack:
    """Four tasks of one domain; the first two are the group `both`."""
    place = tmp_path_factory.mktemp("pack")
    tokenizer = write_tokenizer(place / "tokenizer", adds_bos=True)
    plain = prepare_pack(
        ",".join(DOCUMENTS), tokenizer, place / "pack", benchmarks=write_benchmarks(place / "b", documents=7)
    )
    chances = {"piqa": 0.5, "arc_easy": 0.25, "winogrande": 0.5, "lambada_openai": 0.0}
    tasks = [task | {"domain": "all", "chance": chances[task["task"]]} for task in plain.tasks]
    group = {
        "group": "both", "domain": "all", "metric": "acc", "chance": 0.375, "tasks": ["piqa", "arc_easy"],
        "weight_by_size": {"acc": True}, "weight_others_by_size": True,
    }  # fmt: skip
    manifest = {**plain.manifest, "tasks": tasks, "groups": [group]}
    return pack.Pack(manifest, plain.contexts, plain.requests, plain.documents)


def likelihoods(made: pack.Pack, step: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(step)
    return -rng.exponential(3.0, made.requests.num_rows), rng.random(made.requests.num_rows) < 0.4


def accuracies(made: pack.Pack, step: int) -> dict[str, float]:
    """Of each task, straight from the documents."""
    ll, greedy = likelihoods(made, step)
    right: dict[str, list[bool]] = {}
    for row in made.documents.to_pylist():
        first, count = row["first_request"], row["requests"]
        won = greedy[first] if count == 1 else int(np.argmax(ll[first : first + count])) in row["gold"]
        right.setdefault(row["task"], []).append(bool(won))
    return {task: sum(found) / len(found) for task, found in right.items()}


def guessed(made: pack.Pack) -> dict[str, float]:
    """What guessing gets: the chance level of the pack, of LAMBADA the most frequent of its answers."""
    answers = [row["text"].strip() for row in made.requests.to_pylist() if row["task"] == "lambada_openai"]
    return {"both": 0.375, "winogrande": 0.5, "lambada_openai": max(map(answers.count, answers)) / len(answers)}


def score(
    made: pack.Pack, folder: Path, steps=STEPS, *, tokens_per_step: int | None = 1000, series: str = "run"
) -> Path:
    score_files.keep_pack(folder, made)
    key = score_files.Key("w", made.hash, "float32", "auto", "test")
    for step in steps:
        tokens = None if tokens_per_step is None else step * tokens_per_step
        header = score_files.Header(series, f"step{step}", step, tokens, 64, key)
        score_files.write(folder, score_files.Scores(header, *likelihoods(made, step)))
    return folder


def run_folder(folder: Path, lines: list[dict]) -> Path:
    (folder / "checkpoints/1").mkdir(parents=True)
    write_record(folder / "checkpoints/1", {"step": 1, "tokens": 1, "kept": True, "recipe": "r"})
    (folder / "recipe.json").write_text(to_json(load_recipe("demo")))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_group_stands_for_its_members_and_is_counted_once(made, tmp_path, capsys):
    score(made, tmp_path / "scores")
    assert main(["analyze", str(tmp_path / "scores"), "--out", str(tmp_path / "report")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report/report.html")
    table = read_table(tmp_path / "report")
    assert set(table.task) == {"both", "winogrande", "lambada_openai"}
    acc = table[table.metric == "acc"].set_index(["checkpoint", "task"])
    _, data = page_of(tmp_path / "report/report.html")
    [mean] = [c for c in data["domain_curves"] if data["metrics"][c["metric"]]["name"] == "acc"]
    assert mean["tasks"] == 3
    for i, step in enumerate(STEPS):
        expected = accuracies(made, step)
        both = (expected["piqa"] + expected["arc_easy"]) / 2  # as many documents each
        assert acc.value[f"step{step}", "both"] == pytest.approx(both)
        for task in ("winogrande", "lambada_openai"):
            assert acc.value[f"step{step}", task] == expected[task]
        chance = guessed(made)
        above = [
            (value - chance[task]) / (1 - chance[task]) for task, value in (expected | {"both": both}).items()
            if task in chance
        ]  # fmt: skip
        assert mean["value"][i] == pytest.approx(sum(above) / 3, abs=1e-5)
        assert acc.tokens[f"step{step}", "both"] == 1000 * step
    assert set(acc.n) == {14.0, 7.0} and set(acc.domain) == {"all"}
    assert acc.chance["step10"].to_dict() == pytest.approx(guessed(made))


def test_the_report_says_what_was_scored_and_has_the_title_given(made, tmp_path):
    score(made, tmp_path / "mine")
    arguments = ["analyze", str(tmp_path / "mine"), "--out", str(tmp_path / "report"), "--title", "Mine & yours"]
    assert main(arguments) == 0
    text = (tmp_path / "report/report.html").read_text()
    manifest = made.manifest
    said = f"suite: {manifest['suite']}; pack: {made.hash[:12]}; BOS: {manifest['bos']}; lm-eval: {manifest['lm_eval']}"
    assert f"<dt>scores mine</dt><dd>{said}</dd>" in text and "<h1>Mine &amp; yours</h1>" in text
    assert main(arguments[:-2]) == 0
    assert "<h1>Learning trajectories</h1>" in (tmp_path / "report/report.html").read_text()


def test_tokens_of_a_step_count_for_scores_and_trees_of_which_only_the_step_is_known(made, tmp_path):
    score(made, tmp_path / "a", tokens_per_step=None, series="a")
    score(made, tmp_path / "b", (7,), tokens_per_step=30, series="b")
    (tmp_path / "tree").mkdir()
    content = {"results": {"piqa": {"acc": 0.5}}, "model_name": "m-step6"}
    (tmp_path / "tree/results_1.json").write_text(json.dumps(content))
    folders = [str(tmp_path / name) for name in ("a", "b", "tree")]
    assert main(["analyze", *folders, "--out", str(tmp_path / "report"), "--tokens-per-step", "2.5"]) == 0
    table = read_table(tmp_path / "report")
    found = {series: sorted(set(part.tokens)) for series, part in table.groupby("series")}
    assert found == {"a": [25, 50, 100, 200, 400, 800], "b": [210], "m": [15]}


def test_fractions_of_tokens_are_rounded(made, tmp_path):
    score(made, tmp_path / "a", (7, 8), tokens_per_step=None)
    folders = [str(tmp_path / "a"), "--out", str(tmp_path / "report")]
    assert main(["analyze", *folders, "--tokens-per-step", "2.4"]) == 0
    assert sorted(set(read_table(tmp_path / "report").tokens)) == [17, 19]  # 16.8 and 19.2


@pytest.mark.parametrize("value", ["0", "-1", "inf", "nan"])
def test_tokens_of_a_step_are_a_positive_number(value, tmp_path, capsys):
    assert main(["analyze", "x", "--out", str(tmp_path / "report"), "--tokens-per-step", value]) == 2
    assert "must be a positive number" in capsys.readouterr().err
    assert main(["analyze", "--out", str(tmp_path / "report")]) == 2
    assert "name at least one folder" in capsys.readouterr().err


def test_losses_of_the_runs_are_drawn_with_every_validation_loss(made, tmp_path):
    """Validation is logged at kept checkpoints, which need not be logged steps."""
    lines = [
        {"step": 0, "tokens": 0, "validation_loss/held_out": 7.0},
        {"step": 10, "tokens": 320, "loss": 5.0, "learning_rate": 0.1, "mfu": 0.5},
        {"step": 16, "tokens": 512, "validation_loss/held_out": 4.5, "validation_loss/code": 3.5},
        {"step": 20, "tokens": 640, "loss": 4.0, "learning_rate": 0.2},
        {"step": 20, "tokens": 640, "validation_loss/held_out": 4.25},
        {"step": 24, "tokens": 768, "validation_loss/held_out": 4.1},
    ]
    first = run_folder(tmp_path / "one", lines)
    second = run_folder(tmp_path / "two", [{"step": 3, "tokens": 9, "loss": 1.0}])
    score(made, tmp_path / "scores")
    arguments = [
        "analyze",
        str(tmp_path / "scores"),
        "--out",
        str(tmp_path / "report"),
        "--runs",
        str(first),
        str(second),
    ]
    assert main(arguments) == 0
    one, two = page_of(tmp_path / "report/report.html")[1]["losses"]
    assert (one["series"], one["step"], one["tokens"], one["raw_loss"]) == ("one", [10, 20], [320, 640], [5, 4])
    assert one["learning_rate"] == [0.1, 0.2]
    assert one["validation"] == [
        {"name": "held_out", "tokens": [0, 512, 640, 768], "step": [0, 16, 20, 24], "loss": [7, 4.5, 4.25, 4.1]},
        {"name": "code", "tokens": [512], "step": [16], "loss": [3.5]},
    ]
    assert (two["series"], two["tokens"], two["raw_loss"], two["validation"]) == ("two", [9], [1], [])


def test_runs_of_one_name_are_curves_of_their_own(made, tmp_path):
    runs = [
        run_folder(tmp_path / place / "run", [{"step": 1, "tokens": 9, "loss": loss}])
        for place, loss in (("a", 1.0), ("b", 2.0))
    ]
    score(made, tmp_path / "scores", (10,))
    folders = [str(tmp_path / "scores"), "--out", str(tmp_path / "report"), "--runs", *map(str, runs)]
    assert main(["analyze", *folders]) == 0
    losses = page_of(tmp_path / "report/report.html")[1]["losses"]
    assert [(run["series"], run["raw_loss"]) for run in losses] == [(str(runs[0]), [1]), (str(runs[1]), [2])]


def test_a_run_without_a_loss_yet_is_named(made, tmp_path, capsys):
    score(made, tmp_path / "scores")
    run = run_folder(tmp_path / "run", [{"step": 0, "tokens": 0, "validation_loss/held_out": 7.0}])
    assert main(["analyze", str(tmp_path / "scores"), "--out", str(tmp_path / "report"), "--runs", str(run)]) == 2
    assert (
        capsys.readouterr().err
        == f"fineline: {run}/metrics.jsonl: holds no loss yet; analyze the run when it has trained\n"
    )
    assert not (tmp_path / "report").exists()


def test_a_checkpoint_with_log_likelihoods_that_are_not_finite_is_left_out_and_named(made, tmp_path, capsys, caplog):
    """export-scores ends with status 1; analyze draws the others."""
    plain = pack.Pack({**made.manifest, "groups": []}, made.contexts, made.requests, made.documents)
    folder = score(plain, tmp_path / "scores")
    file = folder / "run" / "step80.parquet"
    broken = score_files.read(file)
    ll = broken.loglikelihood.copy()
    ll[3] = math.nan
    score_files.write(folder, score_files.Scores(broken.header, ll, broken.is_greedy))
    assert main(["export-scores", str(folder), "--out", str(tmp_path / "out"), "--no-samples"]) == 1
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fineline: ")]
    assert line == (
        f"fineline: {tmp_path}/out: 5 of 6 checkpoints exported; not those whose log-likelihoods are NaN or infinite:"
        " run/step80; see their weights"
    )
    assert len(list((tmp_path / "out").iterdir())) == 5 and not (tmp_path / "out" / "run__step80").exists()
    with caplog.at_level("WARNING", "fineline_jax"):
        assert main(["analyze", str(folder), "--out", str(tmp_path / "report")]) == 0
    assert "run/step80" in caplog.text and "NaN or infinite" in caplog.text
    assert set(read_table(tmp_path / "report")["step"]) == set(STEPS) - {80}


def test_exported_scores_are_lm_evals_files_of_the_folder(made, tmp_path, capsys):
    """Groups of lm-eval's own only: here the pack without one."""
    plain = pack.Pack({**made.manifest, "groups": []}, made.contexts, made.requests, made.documents)
    score(plain, tmp_path / "scores", (10, 20))
    assert main(["export-scores", str(tmp_path / "scores"), "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/out: 2 checkpoints in lm-eval's layout\n"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["run__step10", "run__step20"]
    for step in (10, 20):
        [results] = (tmp_path / f"out/run__step{step}").glob("results_*.json")
        found = json.loads(results.read_text())["results"]
        assert {task: values["acc,none"] for task, values in found.items()} == pytest.approx(accuracies(made, step))
        assert len(list(results.parent.glob("samples_*.jsonl"))) == 4
    table = read_table(tmp_path / "out")
    assert sorted(set(table.tokens)) == [10_000, 20_000]
    other = tmp_path / "elsewhere"
    pack.save(plain, other)
    arguments = ["export-scores", str(tmp_path / "scores"), "--out", str(tmp_path / "out"), "--no-samples", "--pack"]
    assert main([*arguments, str(other)]) == 0
    assert not list((tmp_path / "out").glob("*/samples_*")) and len(list((tmp_path / "out").glob("*/results_*"))) == 2
    assert main([*arguments, str(tmp_path / "nowhere")]) == 2
    assert "nowhere: not a request pack" in capsys.readouterr().err


def test_the_standard_error_of_the_domain_is_that_of_its_tasks(made, tmp_path):
    score(made, tmp_path / "scores")
    assert main(["analyze", str(tmp_path / "scores"), "--out", str(tmp_path / "report")]) == 0
    table = read_table(tmp_path / "report")
    _, data = page_of(tmp_path / "report/report.html")
    [mean] = [c for c in data["domain_curves"] if data["metrics"][c["metric"]]["name"] == "acc"]
    scale = {task: 1 - chance for task, chance in guessed(made).items()}
    for i, step in enumerate(STEPS):
        rows = table[(table.metric == "acc") & (table.checkpoint == f"step{step}")]
        pooled = math.sqrt(sum((row.stderr / scale[row.task]) ** 2 for row in rows.itertuples())) / 3
        assert mean["stderr"][i] == pytest.approx(pooled, abs=1e-5)


def test_what_is_exported_as_lm_evals_results_has_the_verdicts_of_the_scores(made, tmp_path):
    """Chance levels and domains that only the suite and the documents know go with the results."""
    plain = pack.Pack({**made.manifest, "groups": []}, made.contexts, made.requests, made.documents)
    scores = score(plain, tmp_path / "scores")
    assert main(["export-scores", str(scores), "--out", str(tmp_path / "exported"), "--no-samples"]) == 0
    tables = {}
    for name in ("scores", "exported"):
        main(["analyze", str(tmp_path / name), "--out", str(tmp_path / f"report_{name}")])
        tables[name] = read_table(tmp_path / f"report_{name}").set_index(["series", "checkpoint", "task", "metric"])
    own, again = tables["scores"], tables["exported"]
    shared = own.index.intersection(again.index)
    assert set(DOCUMENTS) == set(shared.get_level_values("task")) and len(shared) > 20
    for column in ("domain", "chance", "value", "tokens"):
        pandas.testing.assert_series_equal(own.loc[shared, column], again.loc[shared, column])
    verdicts = {
        name: pandas.read_csv(tmp_path / f"report_{name}" / "dynamics.csv").set_index(["task", "metric"])
        for name in tables
    }
    kept = verdicts["scores"].index.intersection(verdicts["exported"].index)
    for column in ("verdict", "baseline", "baseline_from", "onset_outcome"):
        assert list(verdicts["scores"].loc[kept, column]) == list(verdicts["exported"].loc[kept, column])


def test_intervals_of_our_scores_are_over_documents_and_guessing_is_as_the_documents_say(made, tmp_path):
    main(["analyze", str(score(made, tmp_path / "scores")), "--out", str(tmp_path / "report")])
    rows = pandas.read_csv(tmp_path / "report" / "dynamics.csv").set_index(["task", "metric"])
    row = rows.loc["lambada_openai", "acc"]
    assert row["chance"] == pytest.approx(guessed(made)["lambada_openai"])
    assert row["baseline_from"] == "always the same answer"
    assert set(rows["interval_from"].dropna()) <= {"documents", "standard errors"}
    table = read_table(tmp_path / "report")
    assert set(table["task"]) == {"both", "winogrande", "lambada_openai"}
