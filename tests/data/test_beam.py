"""Preparation on Apache Beam: the data set is that of the plain path, whatever the runner and its workers."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from data_examples import EOS, amber, jsonl, letters, letters_tokenizer, stored

from fineline_jax.data.corpora import prepare_amber, prepare_text
from fineline_jax.data.storage import open_data_set
from fineline_jax.errors import UserError

pytest.importorskip("apache_beam", reason="pip install -e '.[beam]'")

# DirectRunner would try to fetch a runner of another language from the network first.
HERE = "--runner=FnApiRunner"
TWO_PROCESSES = f"{HERE} --direct_num_workers=2 --direct_running_mode=multi_processing"
TEXTS = [["abc", "de", "fghi"], ["z"], ["klmno", "pqrst", "u"], ["vw", "xy"]]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return letters_tokenizer(tmp_path_factory.mktemp("letters"))


def assert_same_files(one: Path, two: Path) -> None:
    names = sorted(str(path.relative_to(one)) for path in one.rglob("*") if path.is_file())
    assert names == sorted(str(path.relative_to(two)) for path in two.rglob("*") if path.is_file())
    for name in names:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


@pytest.mark.parametrize("options", [HERE, TWO_PROCESSES])
def test_amber_chunks_are_byte_for_byte_those_of_the_plain_path(tmp_path: Path, options: str) -> None:
    files = [amber(tmp_path / f"train_{c}.jsonl", [[c, i, 7] for i in range(5 + c)]) for c in range(4)]
    held_out = [amber(tmp_path / f"held_{c}.jsonl", [[9, c, 9]]) for c in range(2)]
    prepare_amber(files, tmp_path / "plain", sequence_length=2, validation_inputs=held_out)
    made = prepare_amber(files, tmp_path / "beam", sequence_length=2, validation_inputs=held_out, beam_options=options)
    assert made.windows == {"chunk_000": 5, "chunk_001": 6, "chunk_002": 7, "chunk_003": 8, "validation": 2}
    assert_same_files(tmp_path / "plain", tmp_path / "beam")
    assert prepare_amber(files, tmp_path / "beam", sequence_length=2, validation_inputs=held_out).already_done
    assert not list(tmp_path.glob(".*"))


def test_text_is_each_file_prepared_alone_laid_end_to_end(tmp_path: Path, tokenizer: Path) -> None:
    files = [jsonl(tmp_path / f"{c}.jsonl", texts) for c, texts in enumerate(TEXTS)]
    settings = {"tokenizer": tokenizer, "sequence_length": 3}
    inputs = {"inputs": files[:3], "validation_inputs": files[3:]}
    made = prepare_text(out=tmp_path / "here", **inputs, **settings, beam_options=HERE)
    prepare_text(out=tmp_path / "two", **inputs, **settings, beam_options=TWO_PROCESSES)
    assert_same_files(tmp_path / "here", tmp_path / "two")

    # The second file ("z") does not fill a window, and cannot be prepared alone.
    for c in (0, 2, 3):
        prepare_text([files[c]], tmp_path / f"alone_{c}", **settings)
    alone = [stored(tmp_path / f"alone_{c}", "train") for c in (0, 2, 3)]
    np.testing.assert_array_equal(stored(tmp_path / "here", "train"), np.concatenate(alone[:2]))
    np.testing.assert_array_equal(stored(tmp_path / "here", "validation"), alone[2])
    assert made.windows == {"train": len(alone[0]) + len(alone[1]), "validation": len(alone[2])}

    metadata = json.loads((tmp_path / "here" / "metadata.json").read_text())
    assert metadata["packing"] == "file"
    assert metadata["splits"]["train"] == {"documents": 7, "tokens": 28, "windows": 6, "dropped_tokens": 4}
    assert [source["name"] for source in metadata["sources"]] == [file.name for file in files]
    opened = open_data_set(tmp_path / "here")
    np.testing.assert_array_equal(opened.read("train", range(6)), np.concatenate(alone[:2]))


def test_one_file_is_packed_as_without_beam_but_never_taken_for_it(tmp_path: Path, tokenizer: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", TEXTS[0])
    prepare_text([source], tmp_path / "plain", tokenizer=tokenizer, sequence_length=3)
    prepare_text([source], tmp_path / "beam", tokenizer=tokenizer, sequence_length=3, beam_options=HERE)
    np.testing.assert_array_equal(stored(tmp_path / "plain", "train"), stored(tmp_path / "beam", "train"))
    with pytest.raises(UserError, match="of another packing"):
        prepare_text([source], tmp_path / "beam", tokenizer=tokenizer, sequence_length=3)


def test_a_fraction_is_held_out_of_each_file(tmp_path: Path, tokenizer: Path) -> None:
    files = [jsonl(tmp_path / f"{letter}.jsonl", [letter * k for k in (1, 2, 3, 1, 2, 3)]) for letter in "ab"]
    prepare_text(
        files, tmp_path / "out", tokenizer=tokenizer, sequence_length=3, validation_fraction=1 / 3, beam_options=HERE
    )
    expected = [[*letters(letter * 3), EOS] for letter in "aabb"]
    np.testing.assert_array_equal(stored(tmp_path / "out", "validation"), expected)


@pytest.mark.parametrize("options", [HERE, TWO_PROCESSES])
def test_a_failing_line_is_named_and_the_other_files_are_kept(tmp_path: Path, options: str) -> None:
    files = [amber(tmp_path / f"train_{c}.jsonl", [[c, c, c]] * 2) for c in range(4)]
    good = files[0].read_text()
    for bad in (1, 2):
        files[bad].write_text(good + "oops\n")
    with pytest.raises(UserError, match=r"train_1\.jsonl:3: not JSON.* \(1 more files have errors\)$") as raised:
        prepare_amber(files, tmp_path / "out", sequence_length=2, beam_options=options)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()
    kept = {path.parent.name: path.stat().st_mtime_ns for path in tmp_path.glob(".out.incomplete/shards/*/shard.json")}
    assert sorted(kept) == ["chunk_000", "chunk_003"]
    for bad in (1, 2):
        files[bad].write_text(good)
    read = []
    with pytest.MonkeyPatch.context() as patch:
        from fineline_jax.data import shards

        convert = shards._amber_window
        patch.setattr(shards, "_amber_window", lambda *arguments: read.append(arguments[1]) or convert(*arguments))
        prepare_amber(files, tmp_path / "out", sequence_length=2, beam_options=HERE)
    assert sorted(read) == [f"{files[c]}:{line}" for c in (1, 2) for line in (1, 2)]
    np.testing.assert_array_equal(stored(tmp_path / "out", "chunk_003"), [[3, 3, 3]] * 2)


# One worker, so the files are written in some order; it hangs at the second it comes to.
SLOW_PREPARATION = """
import sys, time
from pathlib import Path
from fineline_jax.data import storage
from fineline_jax.data.corpora import prepare_text
folder = Path(sys.argv[1])
add = storage.WindowWriter.add
def slow(self, split, windows):
    add(self, split, windows)
    if list(folder.glob(".out.incomplete/shards/*/shard.json")):
        (folder / "started").touch()
        time.sleep(60)
storage.WindowWriter.add = slow
files = [folder / name for name in sys.argv[3:]]
prepare_text(files, folder / "out", tokenizer=Path(sys.argv[2]), sequence_length=3, beam_options="--runner=FnApiRunner")
"""


def test_after_a_kill_the_same_command_goes_on(tmp_path: Path, tokenizer: Path) -> None:
    files = [jsonl(tmp_path / f"{c}.jsonl", texts) for c, texts in enumerate(TEXTS)]
    names = [file.name for file in files]
    process = subprocess.Popen([sys.executable, "-c", SLOW_PREPARATION, str(tmp_path), str(tokenizer), *names])
    deadline = time.monotonic() + 60
    while not (tmp_path / "started").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.glob(".out.incomplete/shards/*.incomplete"))
    prepare_text(files, tmp_path / "out", tokenizer=tokenizer, sequence_length=3, beam_options=HERE)
    prepare_text(files, tmp_path / "undisturbed", tokenizer=tokenizer, sequence_length=3, beam_options=HERE)
    assert_same_files(tmp_path / "undisturbed", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == [*names, "out", "started", "undisturbed"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--runer=FlinkRunner", "unknown: --runer"),
        ("runner=FlinkRunner", "unknown: runner=FlinkRunner"),
        ("--runner=Nowhere", "Unexpected pipeline runner: Nowhere"),
        ("--direct_num_workers=two", "invalid int value: 'two'"),
        ("--runner='", "No closing quotation"),
    ],
)
def test_options_that_beam_does_not_know_are_refused(tmp_path: Path, options: str, words: str) -> None:
    source = amber(tmp_path / "train_0.jsonl", [[1, 2, 3]])
    with pytest.raises(UserError, match="--beam-options=.*" + words):
        prepare_amber([source], tmp_path / "out", sequence_length=2, beam_options=options)
    assert sorted(tmp_path.iterdir()) == [source]


def test_what_beam_cannot_keep_apart_is_refused_at_once(tmp_path: Path, tokenizer: Path) -> None:
    tokens = amber(tmp_path / "train_0.jsonl", [[1, 2, 3]])
    with pytest.raises(UserError, match="--processes and --beam-options exclude each other"):
        prepare_amber([tokens], tmp_path / "out", sequence_length=2, processes=2, beam_options=HERE)
    text = tmp_path / "a.txt"
    text.write_text("abc")
    with pytest.raises(UserError, match="each of these is one document; give validation_inputs"):
        prepare_text([text], tmp_path / "out", tokenizer=tokenizer, validation_fraction=0.1, beam_options=HERE)
