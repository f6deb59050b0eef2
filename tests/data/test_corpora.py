"""Preparation: documents become windows, once, exactly, or not at all."""

import importlib.util
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from data_examples import BOS, EOS, amber, jsonl, letters, letters_tokenizer, stored
from hypothesis import given
from hypothesis import strategies as st

from fineline_jax.data import shards
from fineline_jax.data.corpora import prepare_amber, prepare_text
from fineline_jax.data.storage import open_data_set
from fineline_jax.data.windows import WindowCutter
from fineline_jax.errors import UserError

SHARED = os.environ.get("FINELINE_SHARED_DATA")
needs_shared = pytest.mark.skipif(SHARED is None, reason="FINELINE_SHARED_DATA is not set")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return letters_tokenizer(tmp_path_factory.mktemp("letters"))


@pytest.mark.parametrize(
    ("bos", "eos", "stream"),
    [
        (False, True, [*letters("abc"), EOS, *letters("de"), EOS, *letters("fghi"), EOS]),
        (True, True, [BOS, *letters("abc"), EOS, BOS, *letters("de"), EOS, BOS, *letters("fghi"), EOS]),
        (True, False, [BOS, *letters("abc"), BOS, *letters("de"), BOS, *letters("fghi")]),
    ],
)
def test_windows_wrap_across_documents_with_the_marker_policy(
    tmp_path: Path, tokenizer: Path, bos: bool, eos: bool, stream: list[int]
) -> None:
    source = jsonl(tmp_path / "a.jsonl", ["abc", "de", "fghi"])
    prepared = prepare_text([source], tmp_path / "out", tokenizer=tokenizer, sequence_length=4, bos=bos, eos=eos)
    full = len(stream) // 5
    assert prepared.windows == {"train": full}
    np.testing.assert_array_equal(stored(tmp_path / "out", "train"), np.reshape(stream[: full * 5], (full, 5)))
    metadata = json.loads((tmp_path / "out" / "metadata.json").read_text())
    assert metadata["splits"]["train"] == {
        "documents": 3,
        "tokens": len(stream),
        "windows": full,
        "dropped_tokens": len(stream) % 5,
    }
    assert (metadata["bos"], metadata["eos"], metadata["bos_id"], metadata["eos_id"]) == (bos, eos, BOS, EOS)
    assert dict(tfds.builder_from_directory(tmp_path / "out").info.metadata)["sequence_length"] == 4  # pyright: ignore


@given(
    runs=st.lists(st.lists(st.integers(0, 99), max_size=20), max_size=20),
    window=st.integers(1, 9),
    group=st.integers(1, 5),
)
def test_cutting_loses_only_the_tail_however_the_runs_arrive(runs: list[list[int]], window: int, group: int) -> None:
    cutter = WindowCutter(window)
    arrays = [np.array(run, np.int32) for run in runs]
    windows = [cutter.cut(arrays[start : start + group]) for start in range(0, len(arrays), group)]
    stream = [token for run in runs for token in run]
    full = len(stream) // window * window
    assert [t for shard in windows for t in shard.ravel()] == stream[:full]
    assert (cutter.tokens, cutter.dropped) == (len(stream), len(stream) - full)


def test_validation_inputs_are_packed_by_themselves(tmp_path: Path, tokenizer: Path) -> None:
    train, held = jsonl(tmp_path / "a.jsonl", ["abcd"] * 5), jsonl(tmp_path / "b.jsonl", ["zz", "y"])
    prepared = prepare_text([train], tmp_path / "out", tokenizer=tokenizer, sequence_length=4, validation_inputs=[held])
    assert prepared.windows == {"train": 5, "validation": 1}
    np.testing.assert_array_equal(stored(tmp_path / "out", "validation"), [[*letters("zz"), EOS, *letters("y"), EOS]])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": "ab"', "not JSON"),
        ('{"txt": "ab"}', "no text under the key 'text'"),
        ('{"text": 3}', "no text under the key 'text'"),
        ('["ab"]', "no text under the key 'text'"),
    ],
)
def test_a_malformed_text_line_is_named(tmp_path: Path, tokenizer: Path, line: str, words: str) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "abcdef"}\n\n' + line + "\n")
    with pytest.raises(UserError, match=r"a\.jsonl:3: .*" + words):
        prepare_text([source], tmp_path / "out", tokenizer=tokenizer, sequence_length=2)
    assert sorted(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sequence_length": 100}, "less than one window of 101"),
        ({"validation_fraction": 0.01}, "split validation has 0 documents"),
        ({"validation_fraction": 1.5}, "validation_fraction=1.5"),
        ({"bos": False, "eos": False}, "nothing between documents"),
        ({"sequence_length": 0}, "sequence_length=0"),
        ({"tokenizer": Path("nowhere")}, "nowhere: no tokenizer"),
        ({"inputs": [Path("nowhere.jsonl")]}, "nowhere.jsonl: no such file"),
    ],
)
def test_what_cannot_be_prepared_is_refused_and_leaves_nothing(
    tmp_path: Path, tokenizer: Path, change: dict, words: str
) -> None:
    source = jsonl(tmp_path / "a.jsonl", ["abc", "def"])
    arguments = {"inputs": [source], "tokenizer": tokenizer, "sequence_length": 3} | change
    with pytest.raises(UserError, match=words):
        prepare_text(out=tmp_path / "out", **arguments)
    assert sorted(tmp_path.iterdir()) == [source]


def test_a_finished_preparation_is_left_alone_and_another_refused(tmp_path: Path, tokenizer: Path) -> None:
    source, out = jsonl(tmp_path / "a.jsonl", ["abcdef"]), tmp_path / "out"
    out.mkdir()
    first = prepare_text([source], out, tokenizer=tokenizer, sequence_length=2)
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*")}
    again = prepare_text([source], out, tokenizer=tokenizer, sequence_length=2)
    assert (first.already_done, again.already_done) == (False, True)
    assert again.windows == first.windows
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*")} == before
    with pytest.raises(UserError, match="of another sequence_length"):
        prepare_text([source], out, tokenizer=tokenizer, sequence_length=3)
    jsonl(source, ["abcdeg"])
    with pytest.raises(UserError, match="of another input"):
        prepare_text([source], out, tokenizer=tokenizer, sequence_length=2)
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "thesis.tex").touch()
    with pytest.raises(UserError, match="occupied: exists and is not empty"):
        prepare_text([source], occupied, tokenizer=tokenizer, sequence_length=2)


SLOW_PREPARATION = """
import sys, time
from pathlib import Path
from fineline_jax.data import corpora, storage
cut = storage.WindowWriter.add
def slow(self, split, windows):
    cut(self, split, windows)
    Path(sys.argv[1], "started").touch()
    time.sleep(60)
storage.WindowWriter.add = slow
folder = Path(sys.argv[1])
corpora.prepare_text([folder / "a.jsonl"], folder / "out", tokenizer=Path(sys.argv[2]), sequence_length=2)
"""


def test_a_killed_preparation_leaves_nothing_that_opens_and_can_be_repeated(tmp_path: Path, tokenizer: Path) -> None:
    source, out = jsonl(tmp_path / "a.jsonl", ["abcdef"]), tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", SLOW_PREPARATION, str(tmp_path), str(tokenizer)])
    deadline = time.monotonic() + 60
    while not (tmp_path / "started").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with pytest.raises(UserError, match="no such data set"):
        open_data_set(out)
    prepare_text([source], out, tokenizer=tokenizer, sequence_length=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "out", "started"]
    np.testing.assert_array_equal(stored(out, "train"), [letters("abc"), letters("def")])


def test_each_amber_file_becomes_a_chunk_in_order(tmp_path: Path) -> None:
    chunks = [[[10 * c + i, c, i] for i in range(4)] for c in range(3)]
    files = [amber(tmp_path / f"train_{9 + c}.jsonl", chunk) for c, chunk in enumerate(chunks)]
    prepared = prepare_amber(files, tmp_path / "out", sequence_length=2, validation_inputs=[files[0]])
    assert prepared.windows == {"chunk_000": 4, "chunk_001": 4, "chunk_002": 4, "validation": 4}
    for c, chunk in enumerate(chunks):
        np.testing.assert_array_equal(stored(tmp_path / "out", f"chunk_{c:03d}"), chunk)
    assert prepare_amber(files, tmp_path / "out", sequence_length=2, validation_inputs=[files[0]]).already_done


@pytest.mark.slow
def test_amber_chunks_converted_by_two_processes_are_the_same(tmp_path: Path) -> None:
    files = [amber(tmp_path / f"train_{c}.jsonl", [[c, i, 7] for i in range(50)]) for c in range(3)]
    prepare_amber(files, tmp_path / "one", sequence_length=2)
    prepare_amber(files, tmp_path / "two", sequence_length=2, processes=2)
    for name in sorted(file.name for file in (tmp_path / "one").iterdir()):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


@pytest.mark.slow
def test_ctrl_c_ends_a_preparation_in_several_processes_at_once_and_without_a_traceback(tmp_path: Path) -> None:
    files = [amber(tmp_path / f"train_{c}.jsonl", [[c, 1, 7]] * 400_000) for c in range(4)]
    command = ["data", "prepare", "amber", *map(str, files), "--out", str(tmp_path / "out"), "--processes", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fineline_jax", *command, "--sequence-length", "2"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not list(tmp_path.glob(".out.incomplete/shards/*.incomplete")):
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "interrupted; run the same command again" in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "out").exists()


def test_files_too_few_for_a_validation_split_are_told_of_text_units(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "a.txt").write_text("abcdef")
    with pytest.raises(UserError, match=r"out: split validation has 0 documents .* --text-unit paragraph or line"):
        prepare_text([tmp_path], tmp_path / "out", tokenizer=tokenizer, sequence_length=2, validation_fraction=0.01)


def test_finished_chunks_survive_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fineline_jax.data import shards

    files = [amber(tmp_path / f"train_{c}.jsonl", [[c, c, c]] * 2) for c in range(2)]
    good = files[1].read_text()
    files[1].write_text(good + "oops\n")
    with pytest.raises(UserError, match=r"train_1\.jsonl:3: not JSON"):
        prepare_amber(files, tmp_path / "out", sequence_length=2)
    files[1].write_text(good)
    read = []
    convert = shards._amber_window
    monkeypatch.setattr(shards, "_amber_window", lambda *arguments: read.append(arguments[1]) or convert(*arguments))
    prepare_amber(files, tmp_path / "out", sequence_length=2)
    assert read == [f"{files[1]}:1", f"{files[1]}:2"]
    np.testing.assert_array_equal(stored(tmp_path / "out", "chunk_000"), [[0, 0, 0]] * 2)


def test_a_merge_of_chunks_that_was_interrupted_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fineline_jax.data import corpora

    files = [amber(tmp_path / f"train_{c}.jsonl", [[c, c, c]] * 2) for c in range(3)]

    def stop(shards: list[Path], folder: Path) -> None:
        corpora_merge(shards[:2], folder)
        raise KeyboardInterrupt

    corpora_merge = corpora.merge_shards
    monkeypatch.setattr(corpora, "merge_shards", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare_amber(files, tmp_path / "out", sequence_length=2)
    monkeypatch.setattr(corpora, "merge_shards", corpora_merge)
    prepare_amber(files, tmp_path / "out", sequence_length=2)
    for c in range(3):
        np.testing.assert_array_equal(stored(tmp_path / "out", f"chunk_{c:03d}"), [[c, c, c]] * 2)
    assert not list(tmp_path.glob(".*"))


def test_a_merge_that_was_interrupted_does_not_leak_into_one_of_other_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fineline_jax.data import corpora

    files = [amber(tmp_path / f"train_{c}.jsonl", [[c, c, c]] * 2) for c in range(3)]

    def stop(shards: list[Path], folder: Path) -> None:
        corpora_merge(shards, folder)
        raise KeyboardInterrupt

    corpora_merge = corpora.merge_shards
    monkeypatch.setattr(corpora, "merge_shards", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare_amber(files, tmp_path / "out", sequence_length=2)
    with pytest.raises(KeyboardInterrupt):
        prepare_amber(files[:2], tmp_path / "out", sequence_length=2)  # takes the third's records away
    monkeypatch.setattr(corpora, "merge_shards", corpora_merge)
    amber(files[0], [[9, 9, 9]])
    assert prepare_amber(files, tmp_path / "out", sequence_length=2).windows["chunk_002"] == 2
    np.testing.assert_array_equal(stored(tmp_path / "out", "chunk_000"), [[9, 9, 9]])
    np.testing.assert_array_equal(stored(tmp_path / "out", "chunk_002"), [[2, 2, 2]] * 2)


def test_beam_options_without_beam_name_the_extra(tmp_path: Path, tokenizer: Path) -> None:
    if importlib.util.find_spec("apache_beam"):
        pytest.skip("apache_beam is installed")
    tokens, text = amber(tmp_path / "a.jsonl", [[1, 2, 3]]), jsonl(tmp_path / "b.jsonl", ["abc"])
    for prepare in (
        lambda: prepare_amber([tokens], tmp_path / "out", sequence_length=2, beam_options=""),
        lambda: prepare_text([text], tmp_path / "out", tokenizer=tokenizer, sequence_length=2, beam_options=""),
    ):
        with pytest.raises(UserError, match=r"--beam-options .*pip install 'fineline_jax\[beam\]'"):
            prepare()
        assert sorted(tmp_path.iterdir()) == [tokens, text]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"token_ids": [1, 2', "not JSON"),
        ('{"ids": [1, 2, 3]}', "no list under the key 'token_ids'"),
        ("[1, 2, 3]", "no list under the key 'token_ids'"),
        ('{"token_ids": [1, 2, 3, 4]}', "4 token ids instead of 3"),
        ('{"token_ids": [1, 2.0, 3]}', "not an integer"),
        ('{"token_ids": [1, true, 3]}', "not an integer"),
        ('{"token_ids": [1, 2, 32000]}', "token id 32000 is outside the vocabulary of 32000"),
        ('{"token_ids": [1, -2, 3]}', "token id -2 is outside"),
        ('{"token_ids": [1, 99999999999999999999, 3]}', "token id 99999999999999999999 is outside"),
    ],
)
def test_a_malformed_amber_line_is_named(tmp_path: Path, line: str, words: str) -> None:
    source = amber(tmp_path / "train_0.jsonl", [[1, 2, 3]])
    source.write_text(source.read_text() + line + "\n")
    with pytest.raises(UserError, match=r"train_0\.jsonl:2: .*" + words):
        prepare_amber([source], tmp_path / "out", sequence_length=2)
    assert not (tmp_path / "out").exists()


def test_chunks_in_the_order_of_a_shell_glob_are_refused(tmp_path: Path) -> None:
    files = sorted(amber(tmp_path / f"train_{c}.jsonl", [[1, 2, 3]]) for c in (1, 2, 10))
    with pytest.raises(UserError, match=r"train_2\.jsonl comes after .*train_10\.jsonl"):
        prepare_amber(files, tmp_path / "out", sequence_length=2)


@needs_shared
def test_the_amber_sample_comes_back_token_for_token(tmp_path: Path) -> None:
    sample = Path(SHARED or "") / "amber" / "good_sample.jsonl"
    prepare_amber([sample], tmp_path / "out")
    original = [json.loads(line)["token_ids"] for line in sample.read_text().splitlines()]
    np.testing.assert_array_equal(stored(tmp_path / "out", "chunk_000"), original)


@needs_shared
def test_shakespeare_has_the_ids_of_sentencepiece(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    shared = Path(SHARED or "")
    text = shared / "text" / "tinyshakespeare.txt"
    model = shared / "tokenizers" / "llama" / "tokenizer.model"
    prepare_text([text], tmp_path / "out", tokenizer=model.parent, sequence_length=256, text_unit="paragraph")
    oracle = sentencepiece.SentencePieceProcessor(str(model))
    paragraphs = re.split(r"\n\n+", text.read_text().rstrip("\n"))
    stream = [token for paragraph in paragraphs for token in [*oracle.encode(paragraph), EOS]]
    windows = stored(tmp_path / "out", "train")
    assert windows.ravel().tolist() == stream[: windows.size]
    assert len(stream) - windows.size < 257


@needs_shared
def test_the_amber_sample_is_text_in_our_packing(tmp_path: Path) -> None:
    """Decode the complete documents of the sample, prepare them as Amber did, and get Amber's tokens back."""
    sentencepiece = pytest.importorskip("sentencepiece")
    shared = Path(SHARED or "")
    model = shared / "tokenizers" / "llama" / "tokenizer.model"
    lines = [json.loads(line)["token_ids"] for line in (shared / "amber" / "good_sample.jsonl").open()]
    stream = [token for line in lines for token in line]
    ends = [position for position, token in enumerate(stream) if token == EOS]
    inside = [stream[start + 1 : end] for start, end in itertools.pairwise(ends)]
    decode = sentencepiece.SentencePieceProcessor(str(model)).decode
    source = jsonl(tmp_path / "a.jsonl", [decode(ids) for ids in inside])
    prepare_text([source], tmp_path / "out", tokenizer=model, sequence_length=2048)
    expected = stream[ends[0] + 1 : ends[-1] + 1]
    windows = stored(tmp_path / "out", "train")
    assert windows.ravel().tolist() == expected[: windows.size]
    assert windows.size > 4 * 2049


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from fineline_jax.data.storage import WindowWriter
from fineline_jax.errors import UserError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    writer = WindowWriter(Path(sys.argv[1]), ["train"], window_tokens=2049, vocab_size=32_000)
    writer.add("train", np.random.default_rng(0).integers(0, 32_000, (1000, 2049)))
    writer.close()
except UserError as error:
    print(error)
"""


def test_a_full_disk_is_said_in_one_line(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "out")], capture_output=True, text=True, check=True
    )
    assert "out: cannot be written" in run.stdout and "free space and run again" in run.stdout
    assert run.stdout.count("\n") == 1


def test_bad_lines_are_left_out_up_to_a_share_and_counted(tmp_path, caplog):
    """12 of 100 lines are bad; the 88 others are prepared as if they stood alone."""
    good, bad = [f'{{"text": "{"abcdefgh"[: 1 + i % 8]}"}}\n' for i in range(88)], ["[1]\n", '{"text": 3}\n', "{\n"] * 4
    (tmp_path / "mixed.jsonl").write_text("".join(good[:40] + bad + good[40:]))
    (tmp_path / "good.jsonl").write_text("".join(good))
    letters_tokenizer(tmp_path)
    options = {"tokenizer": tmp_path, "sequence_length": 4}
    prepare_text([tmp_path / "good.jsonl"], tmp_path / "a", **options)
    prepare_text([tmp_path / "mixed.jsonl"], tmp_path / "b", **options, skip_bad_lines=0.12)
    assert (stored(tmp_path / "a", "train") == stored(tmp_path / "b", "train")).all()
    counts = json.loads((tmp_path / "b/metadata.json").read_text())["splits"]["train"]
    assert counts["skipped_lines"] == 12 and counts["documents"] == 88
    [said] = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert said.startswith("left out 12 of 100 lines: ") and said.count("mixed.jsonl:") == 10 and said.endswith("; …")
    assert "mixed.jsonl:41: no text under the key 'text'" in said and "mixed.jsonl:43: not JSON" in said
    with pytest.raises(UserError, match=r"12 of 100 lines have no text, more than --skip-bad-lines 0\.11:"):
        prepare_text([tmp_path / "mixed.jsonl"], tmp_path / "c", **options, skip_bad_lines=0.11)
    with pytest.raises(UserError, match=r"mixed\.jsonl:41: no text"):
        prepare_text([tmp_path / "mixed.jsonl"], tmp_path / "c", **options)
    assert not (tmp_path / "c").exists()
    with pytest.raises(UserError, match=r"skip_bad_lines=1.*below 1"):
        prepare_text([tmp_path / "mixed.jsonl"], tmp_path / "c", **options, skip_bad_lines=1)


def test_a_corpus_of_another_kind_ends_early(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "EARLY", 5)
    (tmp_path / "all.jsonl").write_text('{"text": "a"}\n' * 3 + "[]\n" * 1000)
    letters_tokenizer(tmp_path)
    with pytest.raises(UserError, match=r"2 of 5 lines have no text"):
        prepare_text(
            [tmp_path / "all.jsonl"], tmp_path / "x", tokenizer=tmp_path, sequence_length=4, skip_bad_lines=0.1
        )
