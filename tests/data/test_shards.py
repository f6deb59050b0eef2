"""Documents to stored windows: each option has its effect, and what is stored is the stream that was given."""

import gzip
import hashlib
import json
import math
import os
import signal
import types
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from data_examples import BOS, EOS, amber, jsonl, letters, letters_tokenizer, stored
from hypothesis import given, settings
from hypothesis import strategies as st

from fineline_jax.data import corpora, long_lines, shards, storage
from fineline_jax.data import documents as document_files
from fineline_jax.data.corpora import Prepared, prepare_amber, prepare_text
from fineline_jax.data.shards import Shard, write_shard
from fineline_jax.data.storage import WindowWriter, merge_shards, open_data_set, write_metadata
from fineline_jax.data.windows import WindowCutter, with_markers
from fineline_jax.errors import UserError
from fineline_jax.tokenizers import words
from fineline_jax.tokenizers.identity import encode, identity
from fineline_jax.tokenizers.open import open_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return letters_tokenizer(tmp_path_factory.mktemp("letters"))


def metadata_of(folder: Path) -> dict:
    """Without the digests of the record and of TFDS's files."""
    record = json.loads((folder / "metadata.json").read_text())
    return {key: value for key, value in record.items() if not key.endswith("_sha256")}


def text_shard(folder: Path, files: list[tuple[str, Path]], tokenizer: Path, **changes) -> Shard:
    tokenizer_hash = identity(open_tokenizer(tokenizer)).tokenizer_hash
    settings = {
        "kind": "text", "sequence_length": 3, "vocab_size": 29, "tokenizer_hash": tokenizer_hash,
        "bos": False, "eos": True, "text_key": "text", "text_unit": "file", "validation_fraction": 0.0,
        "skip_bad_lines": 0.0,
    }  # fmt: skip
    return Shard(folder, tuple(files), settings | changes, tokenizer / "tokenizer.json")


# Windows


def test_markers_stand_before_and_after_where_there_is_an_id_0_too() -> None:
    for bos, eos, expected in ((None, None, [7, 8]), (0, None, [0, 7, 8]), (None, 0, [7, 8, 0]), (1, 2, [1, 7, 8, 2])):
        made = with_markers([7, 8], bos, eos)
        assert made.tolist() == expected and made.dtype == np.int32


def test_a_cutter_keeps_its_rest_and_not_the_whole_stream() -> None:
    cutter = WindowCutter(4)
    assert cutter.cut([]).shape == (0, 4)
    cut = cutter.cut([np.arange(10, dtype=np.int32)])
    assert cut.dtype == np.int32 and cutter._rest.base is None
    assert (cut.tolist(), cutter.dropped, cutter.tokens) == ([[0, 1, 2, 3], [4, 5, 6, 7]], 2, 10)
    assert (cutter.cut([cut[0, :1], cut[0, :1]]).tolist(), cutter.dropped, cutter.tokens) == ([[8, 9, 0, 0]], 0, 12)


@settings(max_examples=12, deadline=None)
@given(
    texts=st.lists(st.text(st.sampled_from("abzé東"), min_size=1, max_size=9), min_size=4, max_size=12),
    length=st.integers(1, 6),
    bos=st.booleans(),
    eos=st.booleans(),
)
def test_windows_are_the_concatenated_documents_cut(texts, length, bos, eos, tokenizer, tmp_path_factory) -> None:
    if not (bos or eos):
        bos = True
    folder = tmp_path_factory.mktemp("windows")
    files = [jsonl(folder / "b.jsonl", texts[:3]), jsonl(folder / "a.jsonl", texts[3:])]
    # Letters that the vocabulary lacks are <unk>, 0.
    ids = [[*[BOS] * bos, *(letters(c)[0] if c in "abz" else 0 for c in text), *[EOS] * eos] for text in texts]
    stream = [token for document in ids for token in document]
    full = len(stream) // (length + 1)
    if not full:
        return
    prepared = prepare_text(files, folder / "out", tokenizer=tokenizer, sequence_length=length, bos=bos, eos=eos)
    assert prepared == Prepared(folder / "out", {"train": full}, already_done=False)
    assert stored(folder / "out", "train").ravel().tolist() == stream[: full * (length + 1)]
    counts = {"documents": len(texts), "tokens": len(stream), "windows": full}
    assert metadata_of(folder / "out")["splits"]["train"] == {**counts, "dropped_tokens": len(stream) % (length + 1)}


# Splits


@pytest.mark.parametrize("share", [Fraction(1, 4), Fraction(3, 10), Fraction(2, 3), Fraction(1, 8)])
def test_a_fraction_is_taken_evenly_over_all_files(tmp_path: Path, tokenizer: Path, share: Fraction) -> None:
    texts = [chr(97 + i) * 3 for i in range(26)]
    files = [jsonl(tmp_path / f"{name}.jsonl", shard) for name, shard in (("a", texts[:7]), ("b", texts[7:]))]
    prepare_text(files, tmp_path / "out", tokenizer=tokenizer, sequence_length=3, validation_fraction=float(share))
    held = [i for i in range(26) if math.floor((i + 1) * share) > math.floor(i * share)]
    for split, wanted in (("validation", held), ("train", [i for i in range(26) if i not in held])):
        np.testing.assert_array_equal(stored(tmp_path / "out", split), [[*letters(texts[i]), EOS] for i in wanted])
        assert metadata_of(tmp_path / "out")["splits"][split]["documents"] == len(wanted)


@pytest.mark.parametrize("fraction", [-0.01, 1.0])
def test_a_fraction_that_is_none_is_refused(tmp_path: Path, tokenizer: Path, fraction: float) -> None:
    source = jsonl(tmp_path / "a.jsonl", ["abc"])
    with pytest.raises(UserError, match="must be at least 0 and below 1"):
        prepare_text([source], tmp_path / "out", tokenizer=tokenizer, validation_fraction=fraction)
    with pytest.raises(UserError, match="exclude each other"):
        prepare_text(
            [source], tmp_path / "out", tokenizer=tokenizer, validation_fraction=0.5, validation_inputs=[source]
        )


# Options


def test_every_option_of_text_is_in_the_metadata_and_makes_another_data_set(tmp_path: Path, tokenizer: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "abcdefgh", "body": "hgfedcba"}\n' * 4)
    held = jsonl(tmp_path / "held.jsonl", ["abcdef"])
    out = tmp_path / "out"
    usual = {"tokenizer": tokenizer, "sequence_length": 3}
    assert prepare_text([source], out, **usual) == Prepared(out, {"train": 9}, already_done=False)
    metadata = metadata_of(out)
    assert {key: metadata[key] for key in ("sources", "splits")} == {
        "sources": [
            {
                "split": "train",
                "name": "a.jsonl",
                "bytes": source.stat().st_size,
                "sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
            }
        ],
        "splits": {"train": {"documents": 4, "tokens": 36, "windows": 9, "dropped_tokens": 0}},
    }
    settings_of = {key: value for key, value in metadata.items() if key not in ("sources", "splits")}
    assert settings_of == {
        "format": 3, "kind": "text", "packing": "stream", "sequence_length": 3, "vocab_size": 29,
        "tokenizer_hash": identity(open_tokenizer(tokenizer)).tokenizer_hash,
        "bos": False, "eos": True, "bos_id": BOS, "eos_id": EOS, "text_key": "text", "text_unit": "file",
        "validation_fraction": 0.0, "skip_bad_lines": 0.0,
    }  # fmt: skip
    assert (out / "tokenizer" / "tokenizer.json").read_bytes() == (tokenizer / "tokenizer.json").read_bytes()
    assert prepare_text([source], out, **usual) == Prepared(out, {"train": 9}, already_done=True)
    for change, named in (
        ({"sequence_length": 4}, "sequence_length"),
        ({"bos": True}, "bos"),
        ({"eos": False, "bos": True}, "bos"),
        ({"text_key": "body"}, "text_key"),
        ({"text_unit": "line"}, "text_unit"),
        ({"skip_bad_lines": 0.5}, "skip_bad_lines"),
        ({"vocab_size": 30}, "vocab_size"),
        ({"validation_fraction": 0.25}, "validation_fraction"),
        ({"validation_inputs": [held]}, "input"),
    ):
        with pytest.raises(UserError, match=f"out: holds a data set of another {named};"):
            prepare_text([source], out, **(usual | change))
    prepare_text([source], tmp_path / "body", **usual, text_key="body")
    assert stored(tmp_path / "body", "train").ravel().tolist()[:9] == [*letters("hgfedcba"), EOS]
    assert prepare_text.__kwdefaults__ == {
        "sequence_length": 2048, "bos": False, "eos": True, "validation_inputs": (), "validation_fraction": 0.0,
        "text_key": "text", "text_unit": "file", "skip_bad_lines": 0.0, "vocab_size": None, "beam_options": None,
    }  # fmt: skip


def test_the_text_unit_decides_where_end_markers_stand(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "a.txt").write_text("abc\n\nde\nf\n")
    settings = {"tokenizer": tokenizer, "sequence_length": 1}
    for unit, documents in (("file", 1), ("paragraph", 2), ("line", 3)):
        prepare_text([tmp_path / "a.txt"], tmp_path / unit, **settings, text_unit=unit)  # pyright: ignore
        assert metadata_of(tmp_path / unit)["splits"]["train"]["documents"] == documents
    lines = [*letters("abc"), EOS, *letters("de"), EOS, *letters("f"), EOS]
    assert stored(tmp_path / "line", "train").ravel().tolist() == lines[:8]


def test_a_tokenizer_without_the_marker_that_is_asked_for_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    text = (tokenizer / "tokenizer.json").read_text()
    source = jsonl(tmp_path / "a.jsonl", ["abc"])
    for name, token, other in (("bos", "<s>", {"eos_token": "</s>"}), ("eos", "</s>", {"bos_token": "<s>"})):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "tokenizer.json").write_text(text.replace(f'"{token}"', '"none"'))
        (folder / "special_tokens_map.json").write_text(json.dumps(other))
        for bos, eos in ((True, True), (True, False), (False, True)):
            options = {"tokenizer": folder, "sequence_length": 2, "bos": bos, "eos": eos}
            out = tmp_path / f"{name}{bos}{eos}"
            if options[name]:
                with pytest.raises(
                    UserError, match=f"no {name.upper()} token; name one .* or prepare with {name}=False"
                ):
                    prepare_text([source], out, **options)
            else:
                prepare_text([source], out, **options)
                assert metadata_of(out)[f"{name}_id"] is None


def test_a_text_token_may_be_the_last_of_the_vocabulary_and_not_one_more(tmp_path: Path, tokenizer: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", ["abc", "abz"])  # z is 28
    settings = {"tokenizer": tokenizer, "sequence_length": 3}
    prepare_text([source], tmp_path / "out", **settings, vocab_size=29)
    with pytest.raises(UserError, match=r"a\.jsonl:2: token id 28 is outside the vocabulary of 28"):
        prepare_text([source], tmp_path / "no", **settings, vocab_size=28)
    assert metadata_of(tmp_path / "out")["vocab_size"] == 29


def test_amber_lines_may_have_the_first_and_the_last_id_and_no_others(tmp_path: Path, tokenizer: Path) -> None:
    source = amber(tmp_path / "a.jsonl", [[0, 31_999, 0]])
    prepare_amber([source], tmp_path / "out", sequence_length=2)
    assert stored(tmp_path / "out", "chunk_000").tolist() == [[0, 31_999, 0]]
    with pytest.raises(UserError, match=r"a\.jsonl:1: token id 31999 is outside the vocabulary of 31999;"):
        prepare_amber([source], tmp_path / "no", sequence_length=2, vocab_size=31_999)
    metadata = metadata_of(tmp_path / "out")
    assert metadata["splits"] == {"chunk_000": {"windows": 1, "tokens": 3, "dropped_tokens": 0}}
    expected = {"format": 3, "kind": "amber", "sequence_length": 2, "vocab_size": 32_000, "tokenizer_hash": None}
    expected |= {"bos": False, "eos": True, "bos_id": None, "eos_id": None}
    assert {key: value for key, value in metadata.items() if key not in ("sources", "splits")} == expected
    with pytest.raises(UserError, match=rf"{tokenizer}: 29 tokens do not fit vocab_size=28; give its own"):
        prepare_amber([source], tmp_path / "no", sequence_length=2, vocab_size=28, tokenizer=tokenizer)
    small = amber(tmp_path / "b.jsonl", [[0, 28, 0]])
    prepare_amber([small], tmp_path / "with", sequence_length=2, vocab_size=29, tokenizer=tokenizer)
    metadata = metadata_of(tmp_path / "with")
    assert (metadata["bos_id"], metadata["eos_id"], len(metadata["tokenizer_hash"])) == (BOS, EOS, 64)
    assert (tmp_path / "with" / "tokenizer" / "tokenizer.json").exists()
    with pytest.raises(UserError, match="processes=0 must be at least 1"):
        prepare_amber([small], tmp_path / "no", sequence_length=2, processes=0)
    with pytest.raises(UserError, match="--processes and --beam-options exclude each other"):
        prepare_amber([small], tmp_path / "no", sequence_length=2, processes=2, beam_options="")
    assert prepare_amber.__kwdefaults__ == {
        "vocab_size": 32_000, "sequence_length": 2048, "tokenizer": None, "validation_inputs": (), "processes": 1,
        "beam_options": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("names", "refused"),
    [
        (["train_1", "train_2", "train_10"], False),
        (["train_10", "train_2"], True),
        (["train_1_2", "train_1_10", "train_2_1"], False),
        (["train_1_10", "train_1_2"], True),
        (["train_01", "train_1"], False),  # one number twice
        (["b_2", "a_1"], False),  # no series
        (["b", "a"], False),
    ],
)
def test_a_numbered_series_must_ascend(tmp_path: Path, names: list[str], refused: bool) -> None:
    files = [tmp_path / f"{name}.jsonl" for name in names]
    if refused:
        with pytest.raises(UserError, match="chunks are trained on in the order given"):
            corpora._check_ascending(files)
    else:
        corpora._check_ascending(files)


def test_validation_lines_of_several_files_are_one_split_in_their_order(tmp_path: Path) -> None:
    train = amber(tmp_path / "t.jsonl", [[1, 1, 1]])
    held = [amber(tmp_path / f"{name}.jsonl", [[i, i, i] for i in ids]) for name, ids in (("z", (5, 4)), ("a", (9, 3)))]
    prepare_amber([train], tmp_path / "out", sequence_length=2, validation_inputs=held)
    assert stored(tmp_path / "out", "validation")[:, 0].tolist() == [5, 4, 9, 3]
    assert [source["name"] for source in metadata_of(tmp_path / "out")["sources"]] == ["t.jsonl", "z.jsonl", "a.jsonl"]
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match=r"empty\.jsonl: no lines"):
        prepare_amber([tmp_path / "empty.jsonl"], tmp_path / "no", sequence_length=2)
    with pytest.raises(UserError, match=r"t\.txt: unknown kind"):
        (tmp_path / "t.txt").write_text("x")
        prepare_amber([tmp_path / "t.txt"], tmp_path / "no", sequence_length=2)


def test_a_split_without_a_window_is_refused_with_the_remedies(tmp_path: Path, tokenizer: Path) -> None:
    source, held = jsonl(tmp_path / "a.jsonl", ["abcdef"]), jsonl(tmp_path / "b.jsonl", ["ab"])
    usual = {"tokenizer": tokenizer, "sequence_length": 3, "validation_inputs": [held]}
    message = r"out: split validation has 1 documents with 3 tokens in all, less than one window of 4; give more text,"
    message += r" a shorter --sequence-length, a larger --validation-fraction or --validation-inputs$"
    with pytest.raises(UserError, match=message):
        prepare_text([source], tmp_path / "out", **usual)
    jsonl(held, ["abc"])
    assert prepare_text([source], tmp_path / "out", **usual).windows == {"train": 1, "validation": 1}


# Blocks and files


def test_what_is_written_does_not_depend_on_the_blocks_it_passes_through(
    tmp_path: Path, tokenizer, monkeypatch
) -> None:
    texts = [chr(97 + i % 26) * (1 + i % 5) for i in range(40)]
    text, lines = jsonl(tmp_path / "a.jsonl", texts), amber(tmp_path / "t.jsonl", [[i, 2 * i, 7] for i in range(23)])
    expected = [token for t in texts for token in [*letters(t), EOS]]
    for name in ("usual", "small"):
        prepare_text([text], tmp_path / f"{name} text", tokenizer=tokenizer, sequence_length=3)
        prepare_amber([lines], tmp_path / f"{name} amber", sequence_length=2)
        made = stored(tmp_path / f"{name} text", "train")
        assert made.ravel().tolist() == expected[: made.size] and len(expected) - made.size < 4
        assert stored(tmp_path / f"{name} amber", "chunk_000")[:, 0].tolist() == list(range(23))
        monkeypatch.setattr(storage, "WINDOWS_PER_FILE", 5)
        monkeypatch.setattr(storage, "WINDOWS_PER_WRITE", 3)
        monkeypatch.setattr(shards, "WINDOWS_PER_WRITE", 3)
        monkeypatch.setattr(words, "BATCH", 40)
    for kind in ("text", "amber"):
        assert metadata_of(tmp_path / f"small {kind}") == metadata_of(tmp_path / f"usual {kind}")
        assert len(list((tmp_path / f"usual {kind}").glob("*.array_record*"))) == 1
    assert len(list((tmp_path / "small amber").glob("*.array_record*"))) == 5  # 5 of 23 in each, at most
    opened = open_data_set(tmp_path / "small amber")
    assert opened.read("chunk_000", [22, 4, 5, 4, 0])[:, 0].tolist() == [22, 4, 5, 4, 0]


def test_documents_are_given_to_the_tokenizer_in_runs_of_about_so_many_characters(monkeypatch, tokenizer) -> None:
    monkeypatch.setattr(words, "BATCH", 5)
    items = [(text, iter([text])) for text in ("ab", "cde", "f", "ghijklm", "n")]
    runs = [[name for name, *_ in batch] for batch in words.word_encoder(open_tokenizer(tokenizer))(iter(items))]
    assert runs == [["ab", "cde"], ["f", "ghijklm"], ["n"]]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl", "a.jsonl.gz"])
def test_a_long_document_that_comes_in_pieces_has_its_markers_once(name: str, tmp_path, tokenizer, monkeypatch) -> None:
    """Also one of which a piece ends within a character or an escape, and one that only begins with blanks."""
    for module in (document_files, long_lines):
        monkeypatch.setattr(module, "LONG", 13)
    texts = (
        ["  " * 20 + "aé東" * 30 + "🙂z" * 20, "b", 'c"\\\n' * 30] if "json" in name else ["\n" * 30 + "aé東🙂z" * 30]
    )
    lines = [json.dumps({"n": [1] * 9, "text": text, "more": "y" * 40}, ensure_ascii=number > 0)
             for number, text in enumerate(["🙂é" * 20, *texts, " " * 50])]  # fmt: skip
    data = ("\n".join(lines) if "json" in name else texts[0]).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    texts = ["🙂é" * 20, *texts] if "json" in name else texts
    prepare_text([tmp_path / name], tmp_path / "out", tokenizer=tokenizer, sequence_length=1, bos=True)
    whole = encode(open_tokenizer(tokenizer), texts)
    ids = [token for each in whole for token in (BOS, *each, EOS)]
    assert stored(tmp_path / "out", "train").ravel().tolist() == ids[: len(ids) // 2 * 2]
    assert metadata_of(tmp_path / "out")["splits"]["train"]["documents"] == len(texts)


def test_the_stated_sizes() -> None:
    assert pytest.approx(2**30, rel=1e-3) == storage.WINDOWS_PER_FILE * 2049 * 2  # 1 GB of windows of 2,049 uint16
    assert (storage.WINDOWS_PER_WRITE, words.BATCH) == (1024, 2**20)


# Shards


def test_a_shard_is_written_once_and_again_when_its_input_or_settings_change(tmp_path, tokenizer, monkeypatch) -> None:
    source = jsonl(tmp_path / "a.jsonl", ["abc", "de", "f"])
    shard, told = text_shard(tmp_path / "shard", [("train", source)], tokenizer), []
    first = write_shard(shard, told.append)
    assert first.counts == {"train": {"documents": 3, "tokens": 9, "windows": 2, "dropped_tokens": 1}}
    assert sum(told) == source.stat().st_size
    before = {path: path.stat().st_mtime_ns for path in shard.folder.iterdir()}
    told.clear()
    with monkeypatch.context() as patch:
        patch.setattr(shards, "_write_text", None)
        assert write_shard(shard, told.append) == first and told == [source.stat().st_size]
    assert {path: path.stat().st_mtime_ns for path in shard.folder.iterdir()} == before
    assert (
        write_shard(text_shard(shard.folder, [("train", source)], tokenizer, bos=True)).counts["train"]["tokens"] == 12
    )
    assert write_shard(shard) == first
    size = source.stat().st_size
    jsonl(source, ["abc", "de", "g"])  # as long as it was
    assert source.stat().st_size == size
    write_shard(shard)
    assert stored(shard.folder, "train").ravel().tolist() == [*letters("abc"), EOS, *letters("de"), EOS, *letters("g")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "shard"]


def test_of_two_that_write_the_same_shard_the_first_one_gives_it_its_name(tmp_path, tokenizer, monkeypatch) -> None:
    source = jsonl(tmp_path / "a.jsonl", ["abc", "de", "f"])
    shard = text_shard(tmp_path / "shard", [("train", source)], tokenizer)
    write = shards._write_text

    def overtaken(mine: Shard, folder: Path, advance):
        monkeypatch.setattr(shards, "_write_text", write)
        counts = write(mine, folder, advance)
        write_shard(shard)
        (shard.folder / "first").touch()
        return counts

    monkeypatch.setattr(shards, "_write_text", overtaken)
    assert write_shard(shard).counts["train"]["windows"] == 2
    assert (shard.folder / "first").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "shard"]


def test_the_bytes_of_token_lines_are_told(tmp_path: Path) -> None:
    source, told = amber(tmp_path / "t.jsonl", [[1, 2, 3]] * 5), []
    settings = {"kind": "amber", "sequence_length": 2, "vocab_size": 9}
    write_shard(Shard(tmp_path / "shard", (("chunk_000", source),), settings), told.append)
    assert sum(told) == source.stat().st_size


def test_a_shard_with_a_bad_line_leaves_nothing(tmp_path: Path, tokenizer: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", ["abc"])
    source.write_text(source.read_text() + "{\n")
    with pytest.raises(UserError, match=r"a\.jsonl:2"):
        write_shard(text_shard(tmp_path / "shard", [("train", source)], tokenizer))
    assert sorted(tmp_path.iterdir()) == [source]


def test_another_tokenizer_at_the_same_place_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", ["abc"])
    shard = text_shard(tmp_path / "shard", [("train", source)], tokenizer, tokenizer_hash="0" * 64)
    with pytest.raises(UserError, match=r"tokenizer\.json: not the tokenizer that the preparation began with"):
        write_shard(shard)


def test_shards_are_laid_end_to_end_split_by_split(tmp_path: Path, tokenizer: Path, monkeypatch) -> None:
    monkeypatch.setattr(storage, "WINDOWS_PER_FILE", 2)
    files = [jsonl(tmp_path / f"{i}.jsonl", [chr(97 + 10 * i + k) * 3 for k in range(5 - i)]) for i in range(2)]
    held = jsonl(tmp_path / "held.jsonl", ["zzz"])
    groups = [[("train", files[0])], [("train", files[1]), ("validation", held)]]
    made = [text_shard(tmp_path / f"shard {i}", group, tokenizer) for i, group in enumerate(groups)]
    for shard in made:
        write_shard(shard)
    merged = tmp_path / "merged"
    merged.mkdir()
    (merged / "windows-train.array_record-00000-of-00009").touch()  # of a merge of other shards
    bytes_before = sum(tfds.builder_from_directory(shard.folder).info.dataset_size for shard in made)  # pyright: ignore
    for _ in range(2):  # doing it again changes nothing
        merge_shards([shard.folder for shard in made], merged)
        texts = [*(letters("abcde"[k] * 3) for k in range(5)), *(letters("klmn"[k] * 3) for k in range(4))]
        np.testing.assert_array_equal(stored(merged, "train"), [[*ids, EOS] for ids in texts])
        np.testing.assert_array_equal(stored(merged, "validation"), [[*letters("zzz"), EOS]])
        assert tfds.builder_from_directory(merged).info.dataset_size == bytes_before  # pyright: ignore
        assert len(list(merged.glob("*.array_record*"))) == 6
    for file in merged.glob("*validation*"):
        file.unlink()
    with pytest.raises(UserError, match=r"is gone; remove .* and run again"):
        merge_shards([shard.folder for shard in made], merged)


def test_chunks_written_by_several_processes_are_merged_in_their_order(tmp_path: Path, monkeypatch) -> None:
    pools: list = []

    def pool(*arguments):
        pools.append(arguments)
        return ThreadPoolExecutor(arguments[0])

    monkeypatch.setattr(corpora, "ProcessPoolExecutor", pool)
    files = [amber(tmp_path / f"train_{c}.jsonl", [[c, i, 7] for i in range(2 + c)]) for c in range(4)]
    prepare_amber(files, tmp_path / "one", sequence_length=2)
    assert not pools
    prepare_amber(files, tmp_path / "three", sequence_length=2, processes=3)
    assert pools[0][0] == 3 and pools[0][1].get_start_method() == "spawn"
    assert pools[0][2:] == (signal.signal, (signal.SIGINT, signal.SIG_IGN))  # Ctrl-C is answered here alone
    for name in sorted(file.name for file in (tmp_path / "one").iterdir()):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "three" / name).read_bytes(), name


@pytest.mark.parametrize(
    ("raised", "expected", "ended"),
    [(KeyboardInterrupt(), KeyboardInterrupt, [1]), (BrokenProcessPool(), UserError, [])],
)
def test_what_ends_several_processes_early(raised, expected, ended, tmp_path: Path, monkeypatch) -> None:
    terminated: list[int] = []

    class Pool(ThreadPoolExecutor):
        def __init__(self, processes: int, *arguments):
            super().__init__(processes)

        def map(self, *arguments):
            raise raised

    monkeypatch.setattr(corpora, "ProcessPoolExecutor", Pool)
    child = types.SimpleNamespace(terminate=lambda: terminated.append(1))
    monkeypatch.setattr(corpora.multiprocessing, "active_children", lambda: [child])
    source = amber(tmp_path / "t.jsonl", [[1, 2, 3]])
    with pytest.raises(expected) as error:
        prepare_amber([source], tmp_path / "out", sequence_length=2, processes=2)
    assert terminated == ended
    assert expected is KeyboardInterrupt or "--processes 2: one was killed" in str(error.value)
    assert sorted(tmp_path.iterdir()) == [source]


def test_chunks_are_kept_when_only_the_tokenizer_beside_them_is_another(tmp_path: Path, tokenizer, monkeypatch) -> None:
    """It is copied, and no text is tokenized."""
    source = amber(tmp_path / "t.jsonl", [[1, 2, 3]])
    merge = corpora.merge_shards

    def stop(*arguments) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(corpora, "merge_shards", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare_amber([source], tmp_path / "out", sequence_length=2)
    left = tmp_path / ".out.incomplete" / "shards" / "x.incomplete"
    left.mkdir()
    monkeypatch.setattr(corpora, "merge_shards", merge)
    monkeypatch.setattr(shards, "_write_amber", None)
    prepare_amber([source], tmp_path / "out", sequence_length=2, tokenizer=tokenizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "t.jsonl"]


def test_chunks_of_another_format_are_converted_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that an older version of the program left."""
    source, out, read = amber(tmp_path / "t.jsonl", [[1, 2, 3]]), tmp_path / "out", []
    with monkeypatch.context() as interrupted:
        interrupted.setattr(corpora, "merge_shards", None)
        with pytest.raises(TypeError):
            prepare_amber([source], out, sequence_length=2)
    convert = shards._amber_window
    monkeypatch.setattr(shards, "_amber_window", lambda *arguments: read.append(arguments[1]) or convert(*arguments))
    monkeypatch.setattr(corpora, "FORMAT", corpora.FORMAT + 1)
    prepare_amber([source], out, sequence_length=2)
    assert read == [f"{source}:1"]
    np.testing.assert_array_equal(stored(out, "chunk_000"), [[1, 2, 3]])


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch) -> None:
    """What a machine that stops at any moment leaves is whole: the shard, the plan of the merge, the data set."""
    source, out = amber(tmp_path / "t.jsonl", [[1, 2, 3]]), tmp_path / "out"
    synced: set[str] = set()
    fsync, rename = os.fsync, os.rename

    def synced_names(descriptor: int) -> None:
        synced.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def checked(old: Path, new: Path) -> None:
        if Path(old).parent.name not in (out.name, "chunk_000"):  # a record file that moves into the merged folder
            below = [path for path in [Path(old), *Path(old).rglob("*")]]
            assert {str(path) for path in below} <= synced, new
        rename(old, new)

    monkeypatch.setattr(os, "fsync", synced_names)
    monkeypatch.setattr(os, "rename", checked)
    prepare_amber([source], out, sequence_length=2)
    assert str(tmp_path) in synced, "the new name"
    np.testing.assert_array_equal(stored(out, "chunk_000"), [[1, 2, 3]])


def test_the_same_files_in_another_order_are_another_data_set(tmp_path: Path, tokenizer) -> None:
    files, out = [jsonl(tmp_path / f"{name}.jsonl", [name * 9]) for name in "ab"], tmp_path / "out"
    prepare = lambda files: prepare_text(files, out, tokenizer=tokenizer, sequence_length=2)
    assert not prepare(files).already_done and prepare(files).already_done
    assert tfds.builder_from_directory(out).info.disable_shuffling  # so that TFDS itself reads them in their order
    with pytest.raises(UserError, match="of another input"):
        prepare(files[::-1])


def test_what_killed_workers_left_is_removed_at_the_next_start(tmp_path: Path) -> None:
    source = amber(tmp_path / "t.jsonl", [[1, 2]])
    work = tmp_path / ".out.incomplete" / "shards"
    (work / "chunk_000.1234.incomplete").mkdir(parents=True)
    (work / "chunk_001").mkdir()
    (work / "chunk_001" / "shard.json").touch()
    files = [source, amber(tmp_path / "u.jsonl", [[1]])]
    with pytest.raises(UserError, match=r"t\.jsonl:1: 2 token ids instead of 3"):
        prepare_amber(files, tmp_path / "out", sequence_length=2)
    assert [path.name for path in work.iterdir()] == ["chunk_001"]


# A data set, opened


def test_the_data_hash_is_the_digest_of_the_metadata_whatever_the_order_of_its_keys(tmp_path: Path) -> None:
    def opened(name: str, **metadata) -> str:
        writer = WindowWriter(tmp_path / name, ["train"], window_tokens=2, vocab_size=9)
        writer.add("train", np.array([[1, 2]]))
        writer.close()
        write_metadata(tmp_path / name, metadata)
        return open_data_set(tmp_path / name).data_hash

    first = opened("a", sequence_length=1, vocab_size=9)
    assert first == hashlib.sha256(b'{"sequence_length": 1, "vocab_size": 9}').hexdigest()
    assert opened("b", vocab_size=9, sequence_length=1) == first != opened("c", vocab_size=10, sequence_length=1)


def test_a_folder_that_is_no_data_set_is_refused(tmp_path: Path) -> None:
    source = amber(tmp_path / "t.jsonl", [[1, 2, 3], [4, 5, 6]])
    prepare_amber([source], tmp_path / "out", sequence_length=2)
    good = metadata_of(tmp_path / "out")
    opened = open_data_set(tmp_path / "out")
    assert (opened.splits, opened.window_tokens, opened.path) == ({"chunk_000": 2}, 3, tmp_path / "out")
    for change in ({"sequence_length": "2"}, {"vocab_size": True}, {"vocab_size": None}):
        write_metadata(tmp_path / "out", good | change)
        with pytest.raises(UserError, match="out: not a prepared data set"):
            open_data_set(tmp_path / "out")
    write_metadata(tmp_path / "out", good)
    for file in (tmp_path / "out").glob("*.array_record*"):
        file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"out: split chunk_000 cannot be read .* restore its files"):
        open_data_set(tmp_path / "out").read("chunk_000", [1])


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files as Linux shows them")
def test_few_of_many_splits_are_open_at_a_time(tmp_path: Path) -> None:
    files = [amber(tmp_path / f"train_{c}.jsonl", [[c, c, c]]) for c in range(9)]
    prepare_amber(files, tmp_path / "out", sequence_length=2)
    opened = open_data_set(tmp_path / "out")
    before = len(os.listdir("/proc/self/fd"))
    for c in range(9):
        assert opened.read(f"chunk_{c:03d}", [0]).tolist() == [[c, c, c]]
    assert len(os.listdir("/proc/self/fd")) <= before + 4


def test_what_holds_something_else_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "empty").mkdir()
    for name in ("file", "full"):
        with pytest.raises(UserError, match=f"{name}: exists and is not empty"):
            corpora.refuse_occupied(tmp_path / name)
    for name in ("empty", "absent"):
        corpora.refuse_occupied(tmp_path / name)
