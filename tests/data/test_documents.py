"""Files to documents: which files, which text, and the place of each."""

import codecs
import gzip
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fineline_jax.data import documents, long_lines
from fineline_jax.data.documents import input_files, read_documents, suffix_of
from fineline_jax.errors import UserError

# Line ends of Unicode that are none of a file's, a name in three scripts, and characters of 2, 3 and 4 bytes.
TEXT = "Zürich\u2028東京\u0085\x0c🙂 é"


def read(file: Path, key: str = "text", unit: str = "file") -> list[tuple[str, str]]:
    found = read_documents(file, text_key=key, text_unit=unit)  # pyright: ignore[reportArgumentType]
    return [(document.text, document.location.removeprefix(str(file))) for document in found]


def test_json_lines_have_the_text_of_their_key_whatever_it_holds_and_blank_ones_are_left_out(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.json", "a.jsonl.gz"):
        lines = [{"text": TEXT, "body": "b"}, {"text": " \n\t", "body": "c"}, {"body": "d", "text": "x\n\ny "}]
        written = [json.dumps(line, ensure_ascii=number != 1) for number, line in enumerate(lines)]
        data = written[0] + "\n" + written[1] + "\n\n" + written[2]
        (tmp_path / name).write_bytes(gzip.compress(data.encode()) if name.endswith("gz") else data.encode())
        assert read(tmp_path / name) == [(TEXT, ":1"), ("x\n\ny ", ":4")]
        assert read(tmp_path / name, key="body") == [("b", ":1"), ("c", ":2"), ("d", ":4")]


@given(text=st.text(st.sampled_from("ab é東\r\n\u2028 \x0c"), max_size=30))
@example(text="\r\n\r\na\r\nb\r\n\r\n \r\nc")
def test_the_units_of_plain_text(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.getbasetemp() / "units.txt"
    data = text.encode()
    file.write_bytes(data)
    lines = [(line, f":{number}") for number, line in enumerate(data.split(b"\n"), start=1)]
    assert read(file) == ([(text, ":1")] if text.strip() else [])
    # bytes.strip: a line with nothing but Unicode's own spaces is not blank.
    solid = [(line, place) for line, place in lines if line.strip()]
    assert read(file, unit="line") == [(line.decode().rstrip("\r"), place) for line, place in solid]
    paragraphs, open_one = [], False
    for line, place in lines:
        if line.strip() and open_one:
            paragraphs[-1] = paragraphs[-1][0] + b"\n" + line, paragraphs[-1][1]
        elif line.strip():
            paragraphs.append((line, place))
        open_one = bool(line.strip())
    assert read(file, unit="paragraph") == [(part.decode().rstrip("\r\n"), place) for part, place in paragraphs]


def test_the_bytes_read_are_told_as_they_lie_on_the_disk(tmp_path: Path) -> None:
    line = json.dumps({"text": "x" * 300_000}) + "\n"
    plain = tmp_path / "a.jsonl"
    plain.write_text(line * 8)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"abc" * 10_000))
    (tmp_path / "c.txt").write_text("word\n" * 3)
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress((line * 8).encode()))

    def told(name: str, unit: str) -> list[int]:
        sizes: list[int] = []
        file = tmp_path / name
        assert list(read_documents(file, text_key="text", text_unit=unit, progress=sizes.append))  # pyright: ignore
        assert sum(sizes) == file.stat().st_size
        return sizes

    for unit in ("file", "line", "paragraph"):
        sizes = told("a.jsonl", unit)
        assert len(sizes) == 3 and all(1 << 20 <= size < (1 << 20) + len(line) for size in sizes[:-1])
        told("b.txt.gz", unit)
        told("c.txt", unit)
        told("d.jsonl.gz", unit)


@pytest.mark.parametrize("unit", ["file", "line", "paragraph"])
def test_bytes_that_are_not_utf8_are_named_by_their_line(tmp_path: Path, unit: str) -> None:
    (tmp_path / "a.txt").write_bytes("é\n\nb\n".encode() + b"c\xffd\n")
    with pytest.raises(UserError, match=r"a\.txt:4: not UTF-8"):
        read(tmp_path / "a.txt", unit=unit)


@pytest.mark.parametrize("unit", ["file", "line"])
def test_a_damaged_archive_is_named(tmp_path: Path, unit: str) -> None:
    data = gzip.compress(b"word\n" * 10_000)
    for broken in (data[:-30], b"no archive", data[:20] + b"\xff" * 9 + data[29:]):
        (tmp_path / "a.txt.gz").write_bytes(broken)
        with pytest.raises(UserError, match=r"a\.txt\.gz.*: cannot be read \(.*; fetch the file again"):
            read(tmp_path / "a.txt.gz", unit=unit)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"txt": "a"}', "no text under the key 'text'"),
        ('["text"]', "no text under the key 'text'"),
        ('{"text": null}', "no text under the key 'text'"),
        ('{"text": "\\ud800"}', "half of a surrogate pair"),
    ],
)
def test_a_line_without_text_is_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud83d\\ude42"}\n\n' + line + "\n")
    with pytest.raises(UserError, match=rf"a\.jsonl:3: {message}"):
        read(tmp_path / "a.jsonl")


TEXTS = st.text(st.one_of(st.sampled_from('"\\/\n\t\u2028 '), st.characters(exclude_categories=["Cs"])), max_size=60)


@given(
    records=st.lists(st.dictionaries(st.sampled_from(["text", "b", '"\\']), TEXTS, min_size=1), max_size=4),
    ascii=st.booleans(),
)
@example(records=[{"b": "x" * 30, "text": "\U0001f600" * 20}, {"text": "\\" * 20 + '"' * 20}], ascii=True)
def test_long_lines_are_read_in_pieces_as_json_reads_them(
    records: list[dict[str, str]], ascii: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.getbasetemp() / "long.jsonl"
    file.write_text("".join(json.dumps(record, ensure_ascii=ascii) + "\n" for record in records), newline="\n")
    with pytest.MonkeyPatch.context() as patch:
        for module in (documents, long_lines):
            patch.setattr(module, "LONG", 13)
        records = [{**record, "text": record.get("text", "x")} for record in records]
        file.write_text("".join(json.dumps(record, ensure_ascii=ascii) + "\n" for record in records), newline="\n")
        found = read_documents(file, text_key="text", text_unit="file")
        texts = ["".join([document.text, *document.more]) for document in found]
    assert texts == [record["text"] for record in records if record["text"].strip()]


A = "a" * 40


@pytest.mark.parametrize(
    "bad",
    [
        f'"text": "{A}', f'"text": "{A}\\u12g4"}}', f'"text": "{A}\\x"}}', f'"b": "{A}\t{A}"}}',
        f'"text": "{A}\\ud83d"}}', f'"text": "{A}\\ude42bbbbbb"}}', f'"text": "{A}" 1}}', f'"text": "{A}\\"}}',
        f'"txt": "{A}"}}', f'"text": "{A}"}}, 1',
    ],
)  # fmt: skip
def test_a_long_line_that_is_malformed_is_named_and_the_next_one_is_read(tmp_path: Path, bad: str, monkeypatch) -> None:
    for module in (documents, long_lines):
        monkeypatch.setattr(module, "LONG", 13)
    (tmp_path / "a.jsonl").write_text(f'{{"text": "{"good " * 9}"}}\n{{{bad}\n{{"text": "last"}}\n')
    errors: list[UserError] = []
    found = read_documents(tmp_path / "a.jsonl", text_key="text", text_unit="file", skip=errors.append)
    assert ["".join([document.text, *document.more]) for document in found] == ["good " * 9, "last"]
    assert (
        re.match(rf"{re.escape(str(tmp_path))}/a.jsonl:2: (not JSON|no text|half)", str(errors[0])) and len(errors) == 1
    )


def test_files_come_as_given_and_those_of_a_folder_by_name(tmp_path: Path) -> None:
    for name in (
        "z/b.jsonl",
        "z/a.txt",
        "z/c.md",
        "z/sub/d.json.gz",
        "z/gz",
        "y.txt.gz",
        "x.jsonl",
        "w.csv",
        "v/n.csv",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "z" / "folder.txt").mkdir()
    given_paths = [tmp_path / "y.txt.gz", tmp_path / "z", tmp_path / "x.jsonl"]
    found = [str(file.relative_to(tmp_path)) for file in input_files(given_paths)]
    assert found == ["y.txt.gz", "z/a.txt", "z/b.jsonl", "z/sub/d.json.gz", "x.jsonl"]
    assert input_files([tmp_path / "z"], (".txt",)) == [tmp_path / "z" / "a.txt"]
    for wanted, message in (
        ([tmp_path / "w.csv"], "w.csv: unknown kind of file"),
        ([tmp_path / "u.txt"], "u.txt: no such file"),
        ([tmp_path / "v"], "v: no .jsonl, .json, .parquet, .txt file in this folder"),
        ([], "no input files"),
    ):
        with pytest.raises(UserError, match=message):
            input_files(wanted)
    assert [suffix_of(Path(name)) for name in ("a.txt", "a.b.jsonl.gz", "a.gz", "a")] == [".txt", ".jsonl", "", ""]
    assert documents.SUFFIXES == (".jsonl", ".json", ".parquet", ".txt")


def test_parquet_and_zstandard_are_read_like_lines(tmp_path: Path) -> None:
    texts = ["one", TEXT, " ", "four\n\nlines"]
    expected = [("one", ":1"), (TEXT, ":2"), ("four\n\nlines", ":4")]
    pq.write_table(pa.table({"id": [1, 2, 3, 4], "text": texts}), tmp_path / "a.parquet", row_group_size=2)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    with pa.CompressedOutputStream(tmp_path / "a.jsonl.zst", "zstd") as out:
        out.write(lines)
    with pa.CompressedOutputStream(tmp_path / "a.txt.zst", "zstd") as out:
        out.write(TEXT.encode())
    assert read(tmp_path / "a.parquet") == expected
    assert read(tmp_path / "a.jsonl.zst") == expected
    assert read(tmp_path / "a.txt.zst") == [(TEXT, ":1")]
    sizes: list[int] = []
    assert list(read_documents(tmp_path / "a.parquet", text_key="text", text_unit="file", progress=sizes.append))
    assert sum(sizes) == (tmp_path / "a.parquet").stat().st_size


def test_columns_of_a_parquet_file_that_are_no_text_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": ["a", None]}), file)
    with pytest.raises(UserError, match=r"a\.parquet: no column 'text', only body; name it by --text-key"):
        read(file)
    with pytest.raises(UserError, match=r"a\.parquet:2: no text under the key 'body'"):
        read(file, key="body")


@pytest.mark.parametrize("unit", ["file", "line", "paragraph"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, unit: str) -> None:
    (tmp_path / "a.txt").write_bytes(codecs.BOM_UTF8 + "é".encode())
    (tmp_path / "a.jsonl").write_bytes(codecs.BOM_UTF8 + b'{"text": "b"}\n')
    (tmp_path / "b.txt").write_bytes(codecs.BOM_UTF16_LE + "é".encode("utf-16-le"))
    assert read(tmp_path / "a.txt", unit=unit) == [("é", ":1")]
    assert read(tmp_path / "a.jsonl") == [("b", ":1")]
    with pytest.raises(UserError, match=r"b\.txt:1: not UTF-8"):
        read(tmp_path / "b.txt", unit=unit)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.gz", "a.jsonl.zst", "a.txt.zst"])
def test_a_packed_file_that_is_cut_short_is_one_line(tmp_path: Path, name: str) -> None:
    lines = json.dumps({"text": TEXT}).encode() * 50
    with pa.CompressedOutputStream(tmp_path / "whole", "zstd" if name.endswith("zst") else "gzip") as out:
        out.write(lines)
    whole = (tmp_path / "whole").read_bytes()
    for size in (0, 5, len(whole) // 2, len(whole) - 1):
        (tmp_path / name).write_bytes(whole[:size])
        with pytest.raises(
            UserError, match=rf"{re.escape(name)}(:1)?: (cannot be read \(|is empty).*fetch the file again"
        ):
            read(tmp_path / name)


def test_nothing_of_a_folder_is_dropped_without_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    elsewhere = tmp_path / "elsewhere"
    for path in (tmp_path / "corpus/a.jsonl", elsewhere / "b.jsonl"):
        path.parent.mkdir()
        path.write_text('{"text": "x"}\n')
    (tmp_path / "corpus/linked").symlink_to(elsewhere)
    (elsewhere / "round").symlink_to(tmp_path / "corpus")  # a folder within itself
    others = ["README.md", "c.jsonl.bz2", "d.parquet.gz", "e.csv"]
    for name in others:
        (tmp_path / "corpus" / name).touch()
    found = input_files([tmp_path / "corpus"])
    assert [file.relative_to(tmp_path / "corpus").as_posix() for file in found] == ["a.jsonl", "linked/b.jsonl"]
    assert f"not read, since it is no .jsonl, .json, .parquet, .txt: {', '.join(others)}" in caplog.text
    for number in range(20):
        (tmp_path / f"corpus/x{number:02d}.csv").touch()
    caplog.clear()
    input_files([tmp_path / "corpus"])
    assert "x05.csv and 14 more" in caplog.text


def test_a_pointer_of_git_lfs_is_called_one(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.parquet", "a.txt"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
        with pytest.raises(UserError, match=rf"{name}: a git LFS pointer, not the file itself; run `git lfs pull`"):
            read(tmp_path / name)
