"""Scoring a run that is still training: from beside it (--watch), and in its memory (pretrain --score)."""

import json
import shutil
import subprocess
import sys
import time
import types
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import pytest
from scoring_examples import score_series, write_benchmarks, write_tokenizer
from series_examples import CONFIG, one_device

from fineline_jax import interface, prepare_pack
from fineline_jax.ablation import Arm, Sweep, ablate
from fineline_jax.checkpoints.open import open_series
from fineline_jax.checkpoints.series import Series
from fineline_jax.cli import main
from fineline_jax.data.corpora import prepare_amber
from fineline_jax.errors import UserError
from fineline_jax.recipe import (
    Batch,
    Checkpoints,
    Compute,
    Data,
    Every,
    Logging,
    MeshShape,
    Optimizer,
    Recipe,
    Schedule,
    Source,
    to_json,
)
from fineline_jax.scoring import score_files
from fineline_jax.scoring.requests import pack
from fineline_jax.scoring.series import in_training, watch
from fineline_jax.scoring.series import score_series as series_loop
from fineline_jax.training import loop
from fineline_jax.training.observers import AtKeptCheckpoints

STEPS, SEQUENCES, LENGTH = 6, 4, 8


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Data, tokenizer, benchmarks and pack."""
    place = tmp_path_factory.mktemp("training")
    tokenizer = write_tokenizer(place / "tokenizer", adds_bos=True)
    windows = np.random.default_rng(0).integers(0, 400, (40, LENGTH + 1)).tolist()
    lines = place / "train_0.jsonl"
    lines.write_text("".join(json.dumps({"token_ids": row, "source": "x"}) + "\n" for row in windows))
    prepare_amber([lines], place / "data", vocab_size=512, sequence_length=LENGTH, tokenizer=tokenizer)
    benchmarks = write_benchmarks(place / "benchmarks", documents=5)
    prepare_pack("piqa,arc_easy", tokenizer, place / "pack", benchmarks=benchmarks)
    return place


def recipe_of(place: Path) -> Recipe:
    step = SEQUENCES * LENGTH
    return Recipe(
        name="small",
        model=CONFIG,
        data=Data((Source(str(place / "data")),), sequence_length=LENGTH),
        batch=Batch(SEQUENCES),
        optimizer=Optimizer(Schedule(peak=1e-2, warmup_tokens=2 * step)),
        tokens=STEPS * step,
        checkpoints=Checkpoints(every=(Every(2 * step),), latest_every_tokens=step),
        mesh=MeshShape(fsdp=1),
        compute=Compute(dtype="float32", remat="none"),
        logging=Logging(tensorboard=False, validation=()),
    )


@pytest.fixture(autouse=True)
def on_one_device(monkeypatch):
    real = loop.make_mesh
    monkeypatch.setattr(loop, "make_mesh", lambda mesh: real(mesh, jax.devices()[:1]))


@pytest.fixture(scope="module")
def trained(place) -> Path:
    """A run scored in memory while it trained."""
    with pytest.MonkeyPatch.context() as patch:
        real = loop.make_mesh
        patch.setattr(loop, "make_mesh", lambda mesh: real(mesh, jax.devices()[:1]))
        loop.pretrain(recipe_of(place), place / "run", observers=[hook(place, place / "run")])
    return place / "run"


def hook(place: Path, run: Path) -> AtKeptCheckpoints:
    opened = in_training.open_pack(str(place / "pack"), place / "none", None)
    return AtKeptCheckpoints(in_training.ScoreInTraining(run, CONFIG, opened, run / "scores"))


def test_scores_made_in_memory_are_those_of_the_saved_checkpoints(place, trained, tmp_path):
    files = score_series(open_series(str(trained)), pack.load(place / "pack"), tmp_path / "out", one_device())
    assert [path.name for path in files] == [f"step{step}.parquet" for step in (0, 2, 4, 6)]
    for path in files:
        assert (trained / "scores/run" / path.name).read_bytes() == path.read_bytes()


def test_after_it_nothing_is_left_to_score(place, trained, monkeypatch):
    monkeypatch.setattr(series_loop, "make_scorer", lambda *_, **__: pytest.fail("scored again"))
    assert (
        len(score_series(open_series(str(trained)), pack.load(place / "pack"), trained / "scores", one_device())) == 4
    )
    loop.pretrain(recipe_of(place), trained, observers=[hook(place, trained)])


class Killed(Exception):
    pass


@pytest.mark.parametrize("moment", ["before the score is computed", "before it is written"])
def test_a_run_killed_beside_a_kept_checkpoint_scores_it_when_it_resumes_and_no_other(
    place, trained, tmp_path, monkeypatch, moment
):
    run = tmp_path / "run"
    steps: list[int] = []
    scored = hook(place, run)

    def dying(step, params, wait):
        steps.append(step)
        if step == 4 and moment.startswith("before the score"):
            raise Killed  # what is being saved is still completed
        scored.function(step, params, die if step == 4 else wait)

    def die():
        raise Killed

    with pytest.raises(Killed):
        loop.pretrain(recipe_of(place), run, observers=[AtKeptCheckpoints(dying)])
    assert sorted(path.name for path in (run / "scores/run").iterdir()) == ["step0.parquet", "step2.parquet"]
    computed: list[int] = []
    made, original = [], in_training.make_scorer

    def make_scorer(*arguments, **options):
        made.append(1)
        score = original(*arguments, **options)
        return lambda params: (computed.append(1), score(params))[1]

    monkeypatch.setattr(in_training, "make_scorer", make_scorer)
    scored = hook(place, run)
    loop.pretrain(recipe_of(place), run, observers=[scored])
    assert (len(computed), len(made)) == (2, 1), "steps 4 and 6, by one scorer"
    for path in (trained / "scores/run").iterdir():
        ours, whole = score_files.read(run / "scores/run" / path.name), score_files.read(path)
        np.testing.assert_array_equal(ours.loglikelihood, whole.loglikelihood)


def test_runs_of_a_sweep_that_begin_with_the_same_weights_are_scored_once_there(place, tmp_path, monkeypatch):
    """Two arms, two seeds, three kept checkpoints behind the first step: 4 * 3 + 2 scorings."""
    real, scored = in_training.make_scorer, []

    def counting(*arguments, **options):
        scorer = real(*arguments, **options)
        return lambda params: (scored.append(0), scorer(params))[1]

    monkeypatch.setattr(in_training, "make_scorer", counting)
    monkeypatch.setattr(ablate, "analyze_scores", lambda inputs, out, **_: out / "report.html")
    arms = (Arm("a"), Arm("b", {"optimizer.schedule.peak": 3e-2}))
    interface.ablate(Sweep("s", recipe_of(place), arms, (0, 1)), tmp_path, score=str(place / "pack"))
    assert len(scored) == 14
    of = lambda arm, seed, step: score_files.read(tmp_path / f"scores/{arm}_seed-{seed}/step{step}.parquet")
    assert of("a", 0, 0).loglikelihood.tolist() == of("b", 0, 0).loglikelihood.tolist()
    assert of("b", 0, 0).header.series == "b_seed-0" and of("b", 0, 0).header.checkpoint == "step0"
    assert of("a", 0, 0).loglikelihood.tolist() != of("a", 1, 0).loglikelihood.tolist()
    assert of("a", 0, 6).loglikelihood.tolist() != of("b", 0, 6).loglikelihood.tolist()


def test_a_pack_of_another_tokenizer_is_refused_before_anything_is_scored(place, trained, tmp_path):
    other = write_tokenizer(tmp_path / "other", adds_bos=False)
    packed = prepare_pack("piqa", other, tmp_path / "p", benchmarks=place / "benchmarks")
    with pytest.raises(UserError, match=r"does not add|adds BOS"):
        in_training.ScoreInTraining(trained, CONFIG, packed, tmp_path / "out")(2, {}, lambda: None)


def test_the_command_scores_a_suite_while_it_trains_and_leaves_nothing_to_score(place, tmp_path, monkeypatch):
    (tmp_path / "recipe.json").write_text(to_json(recipe_of(place)))
    run, suite = str(tmp_path / "run"), ["piqa,arc_easy", "--benchmarks", str(place / "benchmarks")]
    assert main(["pretrain", str(tmp_path / "recipe.json"), "--run", run, "--score", *suite]) == 0
    scored = {path.name: path.read_bytes() for path in (tmp_path / "run/scores/run").iterdir()}
    assert set(scored) == {f"step{step}.parquet" for step in (0, 2, 4, 6)}
    monkeypatch.setattr(series_loop, "make_scorer", lambda *_, **__: pytest.fail("scored again"))
    assert main(["score", run, "--suite", *suite, "--out", f"{run}/scores"]) == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "run/scores/run").iterdir()} == scored


# Watching


def unfinished(trained: Path, copy: Path) -> list[Path]:
    """A copy of the run whose checkpoints are all still being written; their records come with `complete`."""
    shutil.copytree(trained, copy, ignore=shutil.ignore_patterns("scores"))
    records = sorted(copy.glob("checkpoints/*/complete.json"), key=lambda path: int(path.parent.name))
    for path in records:
        path.rename(path.with_suffix(".later"))
        path.parent.with_suffix(".saving").touch()
    return records


def complete(record: Path) -> None:
    record.with_suffix(".later").rename(record)
    record.parent.with_suffix(".saving").unlink()


def test_checkpoints_are_scored_as_they_become_complete_until_the_last(trained, tmp_path):
    records = unfinished(trained, tmp_path / "run")
    seen: list[list[str]] = []

    def score(series: Sequence[Series]) -> list[Path]:
        seen.append([checkpoint.name for checkpoint in series[0].checkpoints])
        if len(seen) < len(records):
            complete(records[len(seen)])
        return [Path(name) for name in seen[-1]]

    complete(records[0])
    assert watch.watch_run(tmp_path / "run", score, poll_seconds=0.01) == 4
    assert seen == [["step0"], ["step0", "step2"], ["step0", "step2", "step4"], ["step0", "step2", "step4", "step6"]]


def test_the_command_watches_a_run_that_trains_until_its_last_checkpoint(place, trained, tmp_path, monkeypatch):
    records = unfinished(trained, tmp_path / "run")
    there: list[int] = []

    def look_again(seconds: float) -> None:
        """The run goes on while the command sleeps; it has scored what there was."""
        there.append(len(list((tmp_path / "out").glob("run/*.parquet"))))
        complete(records[len(there) - 1])

    monkeypatch.setattr(watch, "time", types.SimpleNamespace(sleep=look_again, monotonic=time.monotonic))
    arguments = ["--pack", str(place / "pack"), "--out", str(tmp_path / "out"), "--watch"]
    assert main(["score", str(tmp_path / "run"), *arguments]) == 0
    assert there == [0, 1, 2, 3]
    assert len(list((tmp_path / "out").glob("run/*.parquet"))) == 4


def test_a_watch_ends_when_nothing_comes_any_more(trained, tmp_path, caplog):
    records = unfinished(trained, tmp_path / "run")
    with pytest.raises(UserError, match="no kept checkpoint after 0s; is the run training"):
        watch.wait_for_first(tmp_path / "run", 0.05, poll_seconds=0.01)
    complete(records[0])
    watch.wait_for_first(tmp_path / "run", 0.05)
    score = lambda series: [Path("x")] * len(series[0].checkpoints)
    assert watch.watch_run(tmp_path / "run", score, 0.05, poll_seconds=0.01) == 1
    assert "no new checkpoint for 0s" in caplog.text


def test_a_watch_ends_when_the_training_is_stopped_and_counts_what_it_scored_in_all(trained, tmp_path, caplog):
    """The process that trains has the lock of the run; what it wrote last is scored."""
    records = unfinished(trained, tmp_path / "run")
    complete(records[0])
    code = "import sys, pathlib; from fineline_jax.folder_lock import writing\n"
    code += "with writing(pathlib.Path(sys.argv[1]), '--run'): print('held', flush=True); sys.stdin.readline()"
    pipe = subprocess.PIPE
    training = subprocess.Popen([sys.executable, "-c", code, tmp_path / "run"], stdin=pipe, stdout=pipe, text=True)
    assert training.stdout is not None and training.stdout.readline() == "held\n"
    calls: list[list[str]] = []

    def score(series: Sequence[Series]) -> list[Path]:
        calls.append([checkpoint.name for checkpoint in series[0].checkpoints])
        if len(calls) == 1:
            complete(records[1])
            training.kill()
            training.wait()
            return [Path("step0")]
        return [Path("step2")]  # of those that were not scored before

    assert watch.watch_run(tmp_path / "run", score, poll_seconds=0.01) == 2
    assert calls == [["step0"], ["step0", "step2"]]
    assert "run: its training was stopped; run the same command again to go on" in caplog.text


def test_only_a_run_can_be_watched(place):
    with pytest.raises(UserError, match=r"pack: holds no recipe\.json"):
        watch.wait_for_first(place / "pack", None)


def test_a_checkpoint_that_cannot_be_opened_does_not_end_the_watch(place, trained, tmp_path):
    records = unfinished(trained, tmp_path / "run")
    for record in records:
        complete(record)
    damaged = max((tmp_path / "run/checkpoints/2/params").rglob("*"), key=lambda path: path.stat().st_size)
    damaged.write_bytes(damaged.read_bytes()[:-1])
    made = pack.load(place / "pack")

    score = series_loop.SeriesScorer(made, tmp_path / "out", one_device())
    with pytest.raises(series_loop.NotAllScored, match="1 checkpoint could not be opened: run/step2"):
        watch.watch_run(tmp_path / "run", score, poll_seconds=0.01)
    assert sorted(path.stem for path in (tmp_path / "out/run").glob("*.parquet")) == ["step0", "step4", "step6"]
