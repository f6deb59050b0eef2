"""`fineline traces`: what a folder tells of its maker, and the copy without it."""

import getpass
import json
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest

from fineline_jax.atomic_files import sealed, unsealed
from fineline_jax.cli import main
from fineline_jax.commands.publish import _without, found_in
from fineline_jax.scoring import score_files


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with scores of ada's on the machine lovelace."""
    monkeypatch.setattr(getpass, "getuser", lambda: "ada")
    monkeypatch.setattr(socket, "gethostname", lambda: "lovelace.example")
    run = tmp_path / "run"
    (run / "checkpoints/10/params").mkdir(parents=True)
    (run / "recipe.json").write_text(json.dumps({"path": "/home/ada/corpus", "inside": f"{run}/tokenizer", "n": 1}))
    record = {"step": 10, "recipe": {"path": "/home/ada/corpus"}, "files": {"params/d": [3, "x"]}}
    (run / "checkpoints/10/complete.json").write_text(json.dumps(sealed(record)))
    (run / "checkpoints/10/params/d.json").write_text('"/checkpointed/by/orbax"')
    (run / "tensorboard").mkdir()
    (run / "tensorboard/events.out.tfevents.1700000000.lovelace.example.123.0.v2").write_bytes(b"\x00lovelaces")
    (run / "report.html").write_text("<p>see https://a.example/b/c and a/b/c, by ada</p></script><a href='/x'>")
    (run / ".run.lock").write_text("lovelace.example")
    key = score_files.Key("w", "p", "float32", "auto", "1")
    header = score_files.Header("s", "step1", 1, 2, 3, key, location="/home/ada/runs/s")
    scores = score_files.Scores(header, np.array([-1.0, -2.5]), np.array([True, False]))
    score_files.write(run / "scores", scores)
    return run


def test_every_trace_is_listed_and_nothing_else(folder: Path, capsys) -> None:
    found = set(found_in(folder))
    assert found == {
        ("recipe.json", "path", "/home/ada/corpus"), ("recipe.json", "path", f"{folder}/tokenizer"),
        ("recipe.json", "user", "ada"),
        ("checkpoints/10/complete.json", "path", "/home/ada/corpus"), ("checkpoints/10/complete.json", "user", "ada"),
        ("checkpoints/10/params/d.json", "path", "/checkpointed/by/orbax"),
        ("tensorboard/events.out.tfevents.1700000000.lovelace.example.123.0.v2", "host",
         "lovelace.example (name of the file)"),
        ("tensorboard/events.out.tfevents.1700000000.lovelace.example.123.0.v2", "host", "lovelace (name of the file)"),
        ("report.html", "user", "ada"), ("scores/s/step1.parquet", "user", "ada"),
    }  # fmt: skip
    assert main(["traces", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "recipe.json" in said and "10 traces; `fineline traces" in said


def test_the_copy_has_none_and_is_whole(folder: Path, tmp_path: Path, capsys) -> None:
    shutil.rmtree(folder / "checkpoints/10/params")
    out = tmp_path / "copy"
    assert main(["traces", str(folder), "--relative", str(out)]) == 0
    assert "written without" in capsys.readouterr().out
    assert not list(found_in(out))
    assert json.loads((out / "recipe.json").read_text()) == {"path": "corpus", "inside": "tokenizer", "n": 1}
    record = unsealed((out / "checkpoints/10/complete.json").read_text())
    assert record == {"step": 10, "recipe": {"path": "corpus"}, "files": {"params/d": [3, "x"]}}
    scores = score_files.read(out / "scores/s/step1.parquet")
    assert scores.header.location == "s" and scores.loglikelihood.tolist() == [-1.0, -2.5]
    names = sorted(path.name for path in out.rglob("*") if path.is_file())
    assert names == [
        "complete.json", "events.out.tfevents.1700000000.host.123.0.v2", "recipe.json", "report.html", "step1.parquet"
    ]  # fmt: skip
    assert "see https://a.example/b/c and a/b/c, by user<" in (out / "report.html").read_text()
    assert json.loads((folder / "recipe.json").read_text())["path"] == "/home/ada/corpus", "the original is unchanged"


def test_what_cannot_be_rewritten_is_named(folder: Path, tmp_path: Path, capsys) -> None:
    """The files of a checkpoint are known by their digests."""
    assert main(["traces", str(folder), "--relative", str(tmp_path / "copy")]) == 1
    assert "/checkpointed/by/orbax in checkpoints/10/params/d.json" in capsys.readouterr().err
    assert main(["traces", str(folder), "--relative", str(tmp_path / "copy")]) == 2
    assert main(["traces", str(folder), "--relative", str(folder / "inside")]) == 2
    assert main(["traces", str(tmp_path / "nowhere")]) == 2


def test_a_damaged_record_is_not_sealed_again(folder: Path, tmp_path: Path, capsys) -> None:
    file = folder / "checkpoints/10/complete.json"
    file.write_text(file.read_text().replace('"step": 10', '"step": 20'))
    assert main(["traces", str(folder), "--relative", str(tmp_path / "copy")]) == 2
    assert "complete.json: a damaged record" in capsys.readouterr().err and not (tmp_path / "copy").exists()


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("/a/b", "b"), ('"/a/b c/d.txt"', '"d.txt"'), ("https://h/a/b", "https://h/a/b"), ("x/y/z", "x/y/z"),
        ("</a/b>", "</a/b>"),
        ("hf://org/name", "hf://org/name"), ("/single", "/single"), ("~/a/b", "~/a/b"), ("${HOME}/a/b", "${HOME}/a/b"),
    ],
)  # fmt: skip
def test_what_is_a_path(text: str, left: str, tmp_path: Path) -> None:
    assert _without(tmp_path, text) == left
