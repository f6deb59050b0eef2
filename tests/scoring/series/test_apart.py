"""Scores of two models never come under one name, and a command that is refused writes nothing."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
from scoring_examples import score_series, write_benchmarks, write_tokenizer
from series_examples import make_series, one_device

from fineline_jax import prepare_pack
from fineline_jax.checkpoints.open import open_series
from fineline_jax.checkpoints.series import Checkpoint, Series
from fineline_jax.cli import main
from fineline_jax.errors import UserError
from fineline_jax.scoring import score_files
from fineline_jax.scoring.engine import scorer
from fineline_jax.scoring.options import ScoreOptions
from fineline_jax.scoring.requests import pack
from fineline_jax.scoring.series import score_series as series_loop


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A pack, and two models in folders of the same name: a/run with steps 1 to 3, b/run with steps 2 and 9."""
    folder = tmp_path_factory.mktemp("apart")
    tokenizer = write_tokenizer(folder / "tokenizer", adds_bos=True)
    benchmarks = write_benchmarks(folder / "benchmarks", documents=3)
    prepare_pack("piqa", tokenizer, folder / "pack", benchmarks=benchmarks)
    make_series(folder / "a" / "run", tokenizer, (1, 2, 3))
    make_series(folder / "b" / "run", tokenizer, (9,))
    shutil.copytree(folder / "b" / "run" / "step9", folder / "b" / "run" / "step2")
    return folder


def score(place: Path, out: Path, spec: Path | str, part: str | None = None) -> list[Path]:
    options = ScoreOptions(part=part)
    return score_series(open_series(str(spec)), pack.load(place / "pack"), out, one_device(), options)


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_model_of_the_same_name_is_refused_and_the_scores_stay(place, tmp_path, capsys):
    out = tmp_path / "out"
    score(place, out, place / "a/run")
    capsys.readouterr()
    before = files(out)
    command = ["score", str(place / "b/run"), "--pack", str(place / "pack"), "--out", str(out)]
    assert main(command) == 2
    [said] = capsys.readouterr().err.strip().splitlines()
    for part in (str(out / "run"), str(place / "a/run"), str(place / "b/run"), "rename its folder, or choose another"):
        assert part in said
    assert main([*command[:1], f"{place / 'b/run'}@step9", *command[2:]]) == 2, "nor a checkpoint of its own name"
    assert files(out) == before


def test_a_series_that_has_moved_goes_on(place, tmp_path, monkeypatch):
    """Also on a machine that sees it under another path, and scores other checkpoints of it."""
    out, moved = tmp_path / "out", tmp_path / "elsewhere" / "run"
    score(place, out, place / "a/run", "1/2")
    shutil.copytree(place / "a" / "run", moved)
    assert [path.stem for path in score(place, out, moved, "2/2")] == ["step2"]
    located = {header.checkpoint: header.location for header in score_files.headers_of(out, "run")}
    assert located == {"step1": str(place / "a/run"), "step2": str(moved), "step3": str(place / "a/run")}
    monkeypatch.setattr(series_loop, "make_scorer", lambda *_, **__: pytest.fail("scored again"))
    assert len(score(place, out, moved)) == 3


def test_changed_weights_in_the_same_place_are_scored_anew(place, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(place / "a" / "run", run)
    [first] = score(place, tmp_path / "out", f"{run}@step1")
    before = score_files.read(first).loglikelihood
    shutil.copy(run / "step3/model.safetensors", run / "step1/model.safetensors")
    score(place, tmp_path / "out", f"{run}@step1")
    assert (score_files.read(first).loglikelihood != before).any()


def test_a_link_is_the_folder_it_names(place, tmp_path):
    (tmp_path / "run").symlink_to(place / "a" / "run")
    score(place, tmp_path / "out", place / "a/run")
    score(place, tmp_path / "out", tmp_path / "run")
    (tmp_path / "run").unlink()
    (tmp_path / "run").symlink_to(place / "b" / "run")
    with pytest.raises(UserError, match="is another series of that name"):
        score(place, tmp_path / "out", tmp_path / "run")


def test_a_series_that_was_scored_in_several_places_is_known_in_each(place, tmp_path):
    made = pack.load(place / "pack")
    key = score_files.Key("w", made.hash, "float32", "auto", scorer.ENGINE_VERSION)
    for name, location in (("step1", "/one/run"), ("step2", "/two/run")):
        header = score_files.Header("run", name, None, None, 8, key, location=location)
        score_files.write(tmp_path, score_files.Scores(header, np.zeros(1), np.zeros(1, bool)))
    for location in ("/one/run", "/two/run"):
        score_files.check_out([Series("run", (), location=location)], made, tmp_path)
    with pytest.raises(UserError, match="/three/run is another series of that name"):
        score_files.check_out([Series("run", (), location="/three/run")], made, tmp_path)


def test_scores_of_before_locations_were_noted_are_no_reason_to_refuse(place, tmp_path):
    [path] = score(place, tmp_path / "out", f"{place / 'a/run'}@step1")
    found = score_files.read(path)
    score_files.write(
        tmp_path / "out", dataclasses.replace(found, header=dataclasses.replace(found.header, location=""))
    )
    assert len(score(place, tmp_path / "out", place / "b/run")) == 2


def test_two_models_of_one_name_are_refused_in_one_command_too(place, tmp_path):
    found = [open_series(f"{place / 'a/run'}@step1"), open_series(f"{place / 'b/run'}@step9")]
    with pytest.raises(UserError, match=r"a/run and .*b/run are both called run, and their scores would be one series"):
        series_loop.SeriesScorer(pack.load(place / "pack"), tmp_path / "out", one_device())(found)
    assert not (tmp_path / "out").exists()
    score_files.check_unique_names([open_series(f"{place / 'a/run'}@step{n}") for n in (1, 2)])  # parts of one


def test_the_address_of_a_series_is_the_same_for_one_and_for_many_of_its_checkpoints(tmp_path):
    of = lambda spec: open_series(spec, downloads=tmp_path).location
    assert of("hf://org/tiny@step1") == of("org/tiny@step2") == "hf://org/tiny@{name}"
    assert of("amber@ckpt_00*") == "hf://IFM/Amber@{name}"
    assert of("IFM/Amber@ckpt_001") == of("amber")
    assert of("hf://org/tiny@main/folder") == "hf://org/tiny@main/folder"
    assert of("s3://bucket/run/step1/") == "s3://bucket/run/step1"


@pytest.mark.parametrize("series, checkpoint", [("pack", "a"), ("..", "a"), ("", "a"), ("run", ".."), ("run", ".a")])
def test_names_under_which_no_scores_are_looked_for_are_refused(series, checkpoint):
    made = Series(series, (Checkpoint(series, checkpoint, None, None, Path("x"), "hf"),))
    with pytest.raises(UserError, match="no scores can be kept under the name"):
        score_files.check_unique_names([made])


def refused(place: Path, tmp_path: Path) -> dict[str, list[str]]:
    run, prepared, out = str(place / "a/run"), str(place / "pack"), str(tmp_path / "out")
    damaged = tmp_path / "damaged"
    shutil.copytree(place / "a/run/step1", damaged)
    (damaged / "model.safetensors").write_bytes(b"nothing")
    other = tmp_path / "other"
    shutil.copytree(place / "a/run/step1", other)
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"use_regex": true', '"use_regex": false'))
    (tmp_path / "file").write_text("mine")
    return {
        "--batch-tokens 0 must be at least 1": ["score", run, "--pack", prepared, "--out", out, "--batch-tokens", "0"],
        "1 checkpoint could not be opened": ["score", str(damaged), "--pack", prepared, "--out", out],
        "is not the one the pack was prepared with": ["score", str(other), "--pack", prepared, "--out", out],
        "are both called": ["score", run, str(place / "b/run"), "--pack", prepared, "--out", out],
        "not a request pack": ["score", run, "--pack", str(tmp_path), "--out", out],
        "no checkpoint says how many tokens": ["score", run, "--pack", prepared, "--out", out, "--tokens", "1B:"],
        "is no writable folder": ["score", run, "--pack", prepared, "--out", str(tmp_path / "file" / "out")],
        f"({tmp_path / 'file'} is no": ["score", run, "--pack", prepared, "--out", str(tmp_path / "file")],
    }


def test_what_is_refused_leaves_no_folder_of_scores(place, tmp_path, capsys):
    commands = refused(place, tmp_path)
    before = files(tmp_path)
    for said, command in commands.items():
        assert main(command) in (1, 2)
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last.startswith("fineline: ") and said in last
        assert not (tmp_path / "out").exists(), said
    assert files(tmp_path) == before
