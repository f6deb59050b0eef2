"""A task that is added to scores: only what is new is asked, and what was there stays, bit by bit."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scoring_examples import score_series, write_benchmarks, write_tokenizer
from series_examples import make_series, one_device

from fineline_jax.checkpoints.open import open_series
from fineline_jax.errors import UserError
from fineline_jax.scoring import score_files
from fineline_jax.scoring.metrics import tidy
from fineline_jax.scoring.options import PackOptions
from fineline_jax.scoring.requests import build, pack
from fineline_jax.scoring.requests.pack import Pack
from fineline_jax.scoring.series import score_series as series_loop

STEPS = (1, 2, 3)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("added")
    write_tokenizer(folder / "tokenizer", adds_bos=False)
    make_series(folder / "run", folder / "tokenizer", STEPS)
    write_benchmarks(folder / "benchmarks", documents=6)
    return folder


def packed(place: Path, suite: str, **options: Any) -> Pack:
    return build.build(suite, place / "tokenizer", PackOptions(benchmarks=place / "benchmarks", **options))


def score(place: Path, made: Pack, out: Path, name: str = "run") -> list[Path]:
    return score_series(open_series(str(place / name)), made, out, one_device())


@pytest.fixture
def asked(monkeypatch) -> list[int]:
    """How many requests each scorer was made for."""
    counts: list[int] = []
    original = series_loop.make_scorer

    def make_scorer(requests, *arguments, **options):
        counts.append(len(requests))
        return original(requests, *arguments, **options)

    monkeypatch.setattr(series_loop, "make_scorer", make_scorer)
    return counts


def test_only_the_new_requests_are_asked_and_the_others_keep_every_bit(place, tmp_path, asked) -> None:
    one, two = packed(place, "piqa"), packed(place, "arc_easy,piqa,wikitext")
    first = {path.stem: score_files.read(path) for path in score(place, one, tmp_path / "out")}
    files = score(place, two, tmp_path / "out")
    assert asked == [12, two.requests.num_rows - 12], "one scorer for all checkpoints that lack the same"
    rows = one.rows_in(two)
    assert rows is not None and [two.requests["text"][int(row)] for row in rows] == list(one.requests["text"])
    whole = {path.stem: score_files.read(path) for path in score(place, two, tmp_path / "fresh")}
    for path in files:
        found = score_files.read(path)
        assert found.header == whole[path.stem].header
        assert found.loglikelihood[rows].tobytes() == first[path.stem].loglikelihood.tobytes()
        assert (found.is_greedy[rows] == first[path.stem].is_greedy).all()
        assert found.loglikelihood == pytest.approx(whole[path.stem].loglikelihood, abs=1e-4)
        assert (found.is_greedy == whole[path.stem].is_greedy).all()
    assert asked[2:] == [two.requests.num_rows]
    stamps = {path: path.stat().st_mtime_ns for path in files}
    score(place, two, tmp_path / "out")
    assert stamps == {path: path.stat().st_mtime_ns for path in files} and len(asked) == 3


def test_progress_counts_what_is_still_to_be_asked(place, tmp_path, monkeypatch) -> None:
    """Of three checkpoints of 12 requests each one has them, and the new task has 24; then nothing is left."""
    counts: list[list[int]] = []

    @contextlib.contextmanager
    def bar(name, total, unit, done=0):
        counts.append([total, done])
        yield lambda amount, note="": counts[-1].__setitem__(1, counts[-1][1] + amount)

    monkeypatch.setattr(series_loop.progress, "bar", bar)
    one, two = packed(place, "piqa"), packed(place, "arc_easy,piqa")
    assert (one.requests.num_rows, two.requests.num_rows) == (12, 36)
    score(place, one, tmp_path / "out", "run@step2")
    for _ in range(2):
        score(place, two, tmp_path / "out")
    assert counts == [[12, 12], [36 + 24 + 36, 36 + 24 + 36], [0, 0]]


def test_checkpoints_of_one_run_are_named_in_a_list_or_one_by_one(place, tmp_path) -> None:
    listed = open_series(f"{place}/run@step[12],step3,step1")
    assert [one.name for one in listed.checkpoints] == ["step1", "step2", "step3"]
    with pytest.raises(UserError, match="run@step7: no checkpoint has such a name; they run from step1 to step3"):
        open_series(f"{place}/run@step1,step7")
    apart = [open_series(f"{place}/run@{name}") for name in ("step3", "step1", "step3")]
    assert [one.checkpoints for one in series_loop.merged([*apart, dataclasses.replace(listed, name="other")])] == [
        (listed.checkpoints[0], listed.checkpoints[2]), listed.checkpoints,
    ]  # fmt: skip
    made = packed(place, "piqa")
    files = series_loop.SeriesScorer(made, tmp_path / "out", one_device())(apart)
    assert [path.stem for path in files] == ["step1", "step3"]


def test_the_rest_of_the_documents_is_asked_after_the_first_ones(place, tmp_path, asked) -> None:
    some, half, whole = (packed(place, "piqa@2,arc_easy", limit=limit) for limit in (0.1, 0.5, None))
    made = {}
    for one in (some, half, whole):
        score(place, one, tmp_path / "out", "run@step1")
        made[one.hash] = score_files.read(tmp_path / "out/run/step1.parquet")
    assert asked == [
        some.requests.num_rows, half.requests.num_rows - some.requests.num_rows,
        whole.requests.num_rows - half.requests.num_rows,
    ]  # fmt: skip
    for early in (some, half):
        rows = early.rows_in(whole)
        assert made[whole.hash].loglikelihood[rows].tobytes() == made[early.hash].loglikelihood.tobytes()


def test_metrics_in_between_are_of_what_each_checkpoint_was_asked(place, tmp_path, caplog) -> None:
    """And over two generations of packs; nothing is scored anew that has two of them."""
    one, two, three = (packed(place, suite) for suite in ("piqa", "arc_easy,piqa", "wikitext,arc_easy,piqa"))
    score(place, one, tmp_path / "out")
    before = tidy.tidy(tmp_path / "out")
    score(place, two, tmp_path / "out", "run@step2")
    score(place, three, tmp_path / "out", "run@step3")
    found = tidy.tidy(tmp_path / "out")
    has = {name: set(part["task"]) for name, part in found.groupby("checkpoint")}
    assert has == {"step1": {"piqa"}, "step2": {"piqa", "arc_easy"}, "step3": {"piqa", "arc_easy", "wikitext"}}
    assert "asked fewer questions than the others; score them again: run/step1, run/step2" in caplog.text
    old = found[found.task == "piqa"].reset_index(drop=True)
    assert old.equals(before)
    score(place, three, tmp_path / "out")
    assert set(tidy.tidy(tmp_path / "out").groupby("checkpoint")["task"].nunique()) == {3}


def test_requests_that_are_asked_otherwise_are_refused(place, tmp_path) -> None:
    one = packed(place, "piqa,arc_easy")
    score(place, one, tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    more = "piqa,arc_easy,wikitext"
    others = [packed(place, "piqa"), packed(place, "piqa@1,arc_easy"), packed(place, "piqa,arc_easy", limit=3)]
    others += [packed(place, more, bos="always"), packed(place, more, max_context=50)]
    for other in others:
        with pytest.raises(UserError, match=r"another request pack .*or ask what it holds as well.*\(piqa,arc_easy\)"):
            score(place, other, tmp_path / "out")
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}


def test_other_weights_or_another_dtype_are_scored_whole(place, tmp_path, asked) -> None:
    from fineline_jax.scoring.options import ScoreOptions

    one, two = packed(place, "piqa"), packed(place, "piqa,arc_easy")
    score(place, one, tmp_path / "out", "run@step1")
    path = tmp_path / "out/run/step1.parquet"
    kept = score_files.read(path)
    score_series(open_series(f"{place}/run@step1"), two, tmp_path / "out", one_device(), ScoreOptions("bfloat16"))
    assert asked == [12, two.requests.num_rows]
    rows = one.rows_in(two)
    assert rows is not None and (score_files.read(path).loglikelihood[rows] != kept.loglikelihood).any()
    loglikelihood = kept.loglikelihood.copy()
    loglikelihood[3] = np.nan  # no number to keep
    score_files.write(tmp_path / "nan", score_files.Scores(kept.header, loglikelihood, kept.is_greedy))
    score_files.keep_pack(tmp_path / "nan", one)
    score(place, two, tmp_path / "nan", "run@step1")
    assert np.isfinite(score_files.read(tmp_path / "nan/run/step1.parquet").loglikelihood).all()


MOMENTS = ("the pack half written", "before the pack has its name", "a file half written", "after a file", "")


@pytest.mark.slow
def test_killed_while_a_task_is_added_it_goes_on_and_repeats_nothing(place, tmp_path) -> None:
    for name, suite in (("one", "piqa"), ("two", "piqa,arc_easy")):
        pack.save(packed(place, suite), tmp_path / name)
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    environment["PYTHONPATH"] = os.pathsep.join(str(Path(__file__).parents[n] / more) for n, more in
                                                ((3, "."), (2, "helpers")))  # fmt: skip

    def run(out: str, which: str, moment: str) -> int:
        arguments = [str(place / "run"), str(tmp_path / which), str(tmp_path / out), moment]
        return subprocess.run([sys.executable, __file__, *arguments], env=environment, timeout=300).returncode

    assert run("out", "one", "") == run("whole", "one", "") == 0 == run("whole", "two", "")
    old = score_files.read(tmp_path / "out/run/step3.parquet").loglikelihood
    for moment in MOMENTS:
        assert run("out", "two", moment) == (-signal.SIGKILL if moment else 0)
        assert len(tidy.tidy(tmp_path / "out")["checkpoint"].unique()) == 3, "whatever is there can be read"
    for step in STEPS:
        found, whole = (score_files.read(tmp_path / out / f"run/step{step}.parquet") for out in ("out", "whole"))
        assert found.loglikelihood.tobytes() == whole.loglikelihood.tobytes() and found.header == whole.header
    rows = pack.load(tmp_path / "one").rows_in(pack.load(tmp_path / "two"))
    assert score_files.read(tmp_path / "out/run/step3.parquet").loglikelihood[rows].tobytes() == old.tobytes()
    lines = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    assert [line["requests"] for line in lines if line["requests"] == 12] == [12] * 3, "no old request again"


def killed(run: str, made: str, out: str, moment: str) -> None:
    """Score, and die at the moment."""

    def die(*arguments: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    write_files, write = pack.write_files, score_files.pq.write_table
    if moment.startswith("the pack"):
        pack.write_files = lambda made, partial: ((partial / "contexts.parquet").write_bytes(b"x"), die())
    elif moment.startswith("before the pack"):
        pack.write_files = lambda made, partial: (write_files(made, partial), die())
    elif moment:

        def write_table(table: Any, file: Path, **options: Any) -> None:
            write(table, file, **options)
            if "loglikelihood" in table.column_names:
                with contextlib.suppress(OSError):
                    os.truncate(file, file.stat().st_size // 2) if moment.startswith("a file") else None
                die() if moment.startswith("a file") else None

        score_files.pq.write_table = write_table
        if moment.startswith("after"):
            score_files.note = die
    score_series(open_series(run), pack.load(Path(made)), Path(out), one_device())


if __name__ == "__main__":
    killed(*sys.argv[1:])
