"""`fineline analyze --runs`: recipes as facets, seeds as replicates, events of schedules, documents that are picked."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from report_examples import page_of
from scoring_examples import write_benchmarks, write_tokenizer
from sweep_examples import small_recipe

from fineline_jax import prepare_pack
from fineline_jax.checkpoints.runs.digest_record import write_record
from fineline_jax.checkpoints.runs.history import History, Segment, to_text
from fineline_jax.cli import main
from fineline_jax.recipe import Batch, Schedule, to_json
from fineline_jax.scoring import score_files
from fineline_jax.trajectories.report import html_page
from fineline_jax.trajectories.table import read_table

STEPS = (0, 1, 2, 4, 8, 16, 32, 64, 96, 128)
TOKENS_PER_STEP = 1000
RUNS = {"narrow-0": (8, 0), "narrow-1": (8, 1), "wide-0": (16, 0), "wide-1": (16, 1)}
TASKS = ("piqa", "arc_easy")


@pytest.fixture(autouse=True, scope="module")
def without_pictures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(html_page, "draw_figures", lambda *tables, **options: [])
        yield


def right_answers(pack, step: int, width: int, seed: int) -> np.ndarray:
    """[requests] log-likelihoods whose gold choices gain with steps and width, and differ between seeds."""
    rng = np.random.default_rng([step, width, seed])
    scored = rng.normal(-5, 1, pack.requests.num_rows)
    for row in pack.documents.to_pylist():
        for gold in row["gold"]:
            scored[row["first_request"] + gold] += 0.05 * width * np.log2(1 + step) + 0.2 * seed - row["doc"] / 12
    return scored


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Four runs, two seeds of two widths, with scores at the same steps; the learning rate decays from step 48 on."""
    place = tmp_path_factory.mktemp("runs")
    tokenizer = write_tokenizer(place / "tokenizer", adds_bos=True)
    pack = prepare_pack(
        ",".join(TASKS), tokenizer, place / "pack", benchmarks=write_benchmarks(place / "b", documents=24)
    )
    score_files.keep_pack(place / "scores", pack)
    key = score_files.Key("w", pack.hash, "float32", "auto", "test")
    for name, (width, seed) in RUNS.items():
        for step in STEPS:
            header = score_files.Header(name, f"step{step}", step, step * TOKENS_PER_STEP, 64, key)
            scored = right_answers(pack, step, width, seed)
            score_files.write(place / "scores", score_files.Scores(header, scored, np.zeros(len(scored), bool)))
        base, end = small_recipe(Path("data")), 128 * TOKENS_PER_STEP
        schedule = Schedule(kind="wsd", decay_tokens=80 * TOKENS_PER_STEP)
        recipe = dataclasses.replace(
            base, name=name, seed=seed, model=dataclasses.replace(base.model, width=width), tokens=end,
            optimizer=dataclasses.replace(base.optimizer, schedule=schedule), batch=Batch(4, schedule=((90_000, 8),)),
        )  # fmt: skip
        run = place / "runs" / name
        (run / "checkpoints/1").mkdir(parents=True)
        write_record(run / "checkpoints/1", {"step": 1, "tokens": 1, "kept": True, "recipe": "r"})
        (run / "recipe.json").write_text(to_json(recipe))
        (run / "history.json").write_text(to_text(History((Segment(0, 0, {}, recipe, (), "start"),))))
        lines = [
            {"step": step, "tokens": step * TOKENS_PER_STEP, "loss": 3 - seed - step / 128,
             "validation_loss/held_out": 4 - seed - step / 128}
            for step in STEPS
        ]  # fmt: skip
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return place


@pytest.fixture(scope="module")
def report(made) -> Path:
    arguments = ["analyze", str(made / "scores"), "--out", str(made / "report"), "--runs"]
    arguments += [str(made / "runs" / name) for name in reversed(RUNS)]  # arms are ordered by their facets all the same
    arguments += ["--group", "size=model.width,seed=seed", "--event", "half=64K", "--pick", "5"]
    assert main(arguments) == 0
    return made / "report"


def test_facets_arms_and_seeds_are_columns_of_the_table(report):
    table = pd.read_csv(report / "tidy.csv")
    who = table.drop_duplicates("series").set_index("series")
    for name, (width, seed) in RUNS.items():
        assert (who["size"][name], who["arm"][name], who["seed"][name]) == (width, f"size={width}", seed)
    # by hand: tied tables, 1 layer of width w, MLP of 16, 32 tokens
    assert (who["parameters"] > 0).all() and who["parameters"].nunique() == 2
    again = read_table(report)
    assert set(again["arm"]) == {"size=8", "size=16"} and set(again["seed"]) == {"0", "1"}


def test_the_page_has_the_mean_of_each_arm_with_its_interval_between_seeds(report):
    _, data = page_of(report / "report.html")
    roles = {series["name"]: series["role"] for series in data["series"]}
    means = ["size=8 (mean of 2 seeds)", "size=16 (mean of 2 seeds)"]
    assert roles == dict.fromkeys(RUNS, "seed") | dict.fromkeys(means, "mean")
    table = read_table(report)
    acc = table[(table["metric"] == "acc") & (table["task"] == "piqa")]
    for curve in data["curves"]:
        series, metric = data["series"][curve["series"]], data["metrics"][curve["metric"]]["name"]
        if series["role"] == "mean" and metric == "acc" and data["tasks"][curve["task"]]["name"] == "piqa":
            arm = series["name"].removesuffix(" (mean of 2 seeds)")
            expected = acc[acc["arm"] == arm].groupby("tokens")["value"].mean().to_numpy()
            assert curve["value"] == pytest.approx(expected, abs=1e-4)
            assert curve["summary"]["interval_from"] in ("seeds", "")
    by = {series["name"]: series for series in data["series"]}
    assert by["narrow-0"]["loss"] == pytest.approx([4 - step / 128 for step in STEPS], rel=1e-4)
    # linear in log tokens between measurements, which are at these very tokens; the mean of seeds 0 and 1
    assert by[means[0]]["loss"] == pytest.approx([3.5 - step / 128 for step in STEPS], rel=1e-4)
    assert by["wide-0"]["flops"] > by["narrow-0"]["flops"] > 0


def test_arms_are_compared(report):
    found = pd.read_csv(report / "arm_differences.csv")
    assert set(found["arm"]) == {"size=16"} and set(found["reference"]) == {"size=8"}
    assert set(pd.read_csv(report / "tokens_to.csv")["runs"]) == {2}
    # losses of both widths are alike; scores count the documents, as in a sweep
    ends = found.set_index(["metric", "task"])
    assert ends["difference"]["loss", "held_out"] == pytest.approx(0) and np.isnan(
        ends["stderr_documents"]["loss", "held_out"]
    )
    assert (ends["stderr_documents"]["acc_norm"].drop("all tasks") > 0).all()
    assert sorted(pd.read_csv(report / "instability.csv")["series"]) == sorted(RUNS)


def test_losses_alone_are_compared(made, tmp_path):
    """Without a score: the validation losses of the runs are the table."""
    runs = [str(made / "runs" / name) for name in RUNS]
    assert (
        main(["analyze", "--runs", *runs, "--group", "size=model.width,seed=seed", "--out", str(tmp_path / "r")]) == 0
    )
    found = pd.read_csv(tmp_path / "r/arm_differences.csv")
    assert found[["arm", "metric", "task"]].to_numpy().tolist() == [["size=16", "loss", "held_out"]]


def test_changes_at_events_of_schedule_and_command(report):
    found = pd.read_csv(report / "event_changes.csv")
    events = found.drop_duplicates("event").set_index("event")["tokens"].to_dict()
    assert events == {"half": 64_000, "decay of the learning rate begins": 48_000, "batch of 8 sequences": 90_000}
    assert set(found["series"]) == set(RUNS)


def test_picked_documents_say_the_ability_that_all_say(report):
    ability = pd.read_csv(report / "ability.csv")
    assert set(ability["picked"]) == {5} and set(ability["task"]) == set(TASKS)
    for _, part in ability.groupby("task"):
        assert np.corrcoef(part["ability"], part["picked_ability"])[0, 1] > 0.8
    assert (pd.read_csv(report / "informative_documents.csv")["place"].count()) == 5 * len(TASKS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--group", "size=model.width"],
            "--group size=model.width: the fields are those of recipes; name the folders",
        ),
        (["--event", "decay"], "--event decay: write NAME=TOKENS"),
        (["--event", "decay=soon"], "--event decay soon: is no number of tokens"),
        (["--pick", "-1"], "--pick -1: must be a number of documents"),
        (["--ceiling", "1.5"], "--ceiling 1.5: the highest score is above 0 and at most 1"),
        (["--ceiling", "0.2"], "ceiling 0.2 of piqa: must be above its chance level 0.5"),
    ],
)
def test_wrong_options_are_one_line(options, message, made, tmp_path, capsys):
    assert main(["analyze", str(made / "scores"), "--out", str(tmp_path / "r"), *options]) == 2
    captured = capsys.readouterr().err
    assert message in captured and captured.count("\n") == 1
    assert not (tmp_path / "r/report.html").exists()


def test_documents_are_picked_of_scores_only(tmp_path, capsys):
    pd.DataFrame({"series": "s", "tokens": [1, 2], "task": "t", "metric": "acc", "value": 0.5}).to_csv(
        tmp_path / "t.csv"
    )
    assert main(["analyze", str(tmp_path / "t.csv"), "--out", str(tmp_path / "r"), "--pick", "5"]) == 2
    assert "--pick 5: no input is a folder of `fineline score`" in capsys.readouterr().err
