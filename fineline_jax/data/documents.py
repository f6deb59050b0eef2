"""Text documents out of files, each with its location.

`.jsonl` (or `.json`): one object per line, the text under one key. `.parquet`: the same key is a column. `.txt`: the
whole file is one document, or each paragraph (blank lines between), or each line. All but `.parquet` also with `.gz`
or `.zst`. A byte-order mark at the start of a file is no part of its text.
"""

import codecs
import contextlib
import dataclasses
import functools
import gzip
import io
import itertools
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Literal

from fineline_jax.data.long_lines import LONG, shorten
from fineline_jax.errors import UserError, reading, refuse_lfs_pointer

SUFFIXES = (".jsonl", ".json", ".parquet", ".txt")
COMPRESSED = (".gz", ".zst")
TextUnit = Literal["file", "paragraph", "line"]
_ROWS, _BYTES = 1024, 1 << 26
"""Of a .parquet file in memory at a time, at most."""
_NAMED = 10
_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Document:
    text: str
    """Of a long one the beginning."""
    location: str
    """`file:line` (of .parquet `file:row`) of its first line, for error messages."""
    more: Iterable[str] = ()
    """What follows `text`, in pieces; read once, and before the next document is."""


def input_files(inputs: Sequence[Path], suffixes: tuple[str, ...] = SUFFIXES) -> list[Path]:
    """The files meant by `inputs`: files as given, folders as their matching files sorted by name.

    What else lies in a folder is named in the log. Raises UserError for a path that is missing, of another kind, or a
    folder without such files.
    """
    known = ", ".join(suffixes)
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            inside = _files_in(path)
            matching = [file for file in inside if _is_input(file, suffixes)]
            if not matching:
                raise UserError(f"{path}: no {known} file in this folder; give files or another folder")
            if left_out := [file.relative_to(path).as_posix() for file in inside if not _is_input(file, suffixes)]:
                more = f" and {len(left_out) - _NAMED} more" if len(left_out) > _NAMED else ""
                _LOG.warning("%s: not read, since it is no %s: %s%s", path, known, ", ".join(left_out[:_NAMED]), more)
            files += matching
        elif not path.is_file():
            raise UserError(f"{path}: no such file; give existing files")
        elif not _is_input(path, suffixes):
            raise UserError(f"{path}: unknown kind of file; give {known}, plain or with {' or '.join(COMPRESSED)}")
        else:
            files.append(path)
    if not files:
        raise UserError("no input files; give at least one")
    return files


def _files_in(folder: Path) -> list[Path]:
    """All files below `folder`, also those of linked folders, sorted; each folder once."""
    found, seen = [], set()
    for where, folders, names in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(where))
        folders[:] = [name for name in folders if os.path.realpath(os.path.join(where, name)) not in seen]
        found += [Path(where, name) for name in names]
    return sorted(found)


def _is_input(file: Path, suffixes: tuple[str, ...]) -> bool:
    return (
        file.is_file() and suffix_of(file) in suffixes and (suffix_of(file) != ".parquet" or file.suffix == ".parquet")
    )


def read_documents(
    file: Path,
    *,
    text_key: str,
    text_unit: TextUnit,
    progress: Callable[[int], None] = lambda size: None,
    skip: Callable[[UserError], None] | None = None,
    count: Callable[[], None] = lambda: None,
) -> Iterator[Document]:
    """The documents of one file in order; blank ones are left out.

    progress: called with the number of bytes of the file (as it lies on disk) read since the last call. skip: called
    with the error of a malformed line, which is then left out; None: it is raised. count: called for every
    line, malformed or not. Raises UserError naming file and line for bytes that are not UTF-8 or cannot be
    unpacked.
    """
    if suffix_of(file) == ".txt" and text_unit == "file":
        yield from _document(_pieces_of(file, progress), f"{file}:1")
        return
    if suffix_of(file) == ".txt":
        yield from _paragraphs_or_lines(file, text_unit, progress)
        return
    records = _rows_of(file, text_key, progress) if file.suffix == ".parquet" else _json_of(file, text_key, progress)
    for location, text in records:
        count()
        if isinstance(text, str) and not _is_encodable(text):
            text = UserError(
                f"{location}: half of a surrogate pair in the text is no character; fix or remove the line"
            )
        if isinstance(text, UserError):
            if skip is None:
                raise text
            skip(text)
        else:
            pieces = (text[i : i + LONG] for i in range(0, len(text), LONG)) if isinstance(text, str) else text
            yield from _document(pieces, location)


def _document(pieces: Iterator[str], location: str) -> Iterator[Document]:
    """That of a text; none of a blank one."""
    text = ""
    for piece in pieces:
        text += piece
        if piece.strip():
            yield Document(text, location, pieces)
            return


_Text = str | Iterator[str] | UserError
"""A text, one in pieces, or what is wrong with the line or row."""


def _json_of(file: Path, text_key: str, progress: Callable[[int], None]) -> Iterator[tuple[str, _Text]]:
    """(location, text) of every line."""
    texts: dict[str, Callable[[], Iterator[str]]] = {}
    for number, line in read_lines(file, progress, functools.partial(shorten, texts)):
        location, long = f"{file}:{number}", {name: texts.pop(name) for name in [*texts]}
        try:
            record = json.loads(line)
            for piece in itertools.chain.from_iterable(pieces() for pieces in long.values()):
                piece.encode()
        except (ValueError, RecursionError) as error:  # brackets within brackets without end
            yield location, UserError(f"{location}: not JSON ({error}); fix or remove the line")
            continue
        text = record.get(text_key) if isinstance(record, dict) else None
        if not isinstance(text, str):
            yield location, _without_text(location, text_key)
        else:
            yield location, long[text]() if text in long else text


def _rows_of(file: Path, text_key: str, progress: Callable[[int], None]) -> Iterator[tuple[str, _Text]]:
    """(location, text) of every row of a .parquet file."""
    import pyarrow.parquet as pq  # takes a while: not for --help

    with reading(file), pq.ParquetFile(file, page_checksum_verification=True) as table:
        if text_key not in table.schema_arrow.names:
            raise UserError(
                f"{file}: no column {text_key!r}, only {', '.join(table.schema_arrow.names)}; name it by --text-key"
            )
        size, row = file.stat().st_size, 0
        groups = [table.metadata.row_group(i) for i in range(table.num_row_groups)]
        longest = max((group.total_byte_size // max(group.num_rows, 1) for group in groups), default=0)
        for batch in table.iter_batches(max(1, min(_ROWS, _BYTES // (longest + 1))), columns=[text_key]):
            for text in batch.column(0).to_pylist():
                row += 1
                location = f"{file}:{row}"
                yield location, text if isinstance(text, str) else _without_text(location, text_key)
            progress(size * row // table.metadata.num_rows - size * (row - len(batch)) // table.metadata.num_rows)
        if not row:
            progress(size)


def _without_text(location: str, text_key: str) -> UserError:
    return UserError(f"{location}: no text under the key {text_key!r}; fix the line or name the key by --text-key")


def _is_encodable(text: str) -> bool:
    """JSON can write half of a surrogate pair, "\\ud800", which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[tuple[IO[bytes], Any]]:
    """The file as it lies on disk, and its content."""
    refuse_lfs_pointer(file)
    with file.open("rb") as raw:
        if file.suffix in COMPRESSED and not os.fstat(raw.fileno()).st_size:
            raise UserError(f"{file}: is empty, which no {file.suffix} file is; fetch the file again")
        if file.suffix == ".gz":
            yield raw, gzip.GzipFile(fileobj=raw)
        elif file.suffix == ".zst":
            import pyarrow as pa

            yield raw, io.BufferedReader(pa.CompressedInputStream(raw, "zstd"), 1 << 16)
        else:
            yield raw, raw


def read_lines(
    file: Path, progress: Callable[[int], None], shorter: Callable[[bytes, IO[bytes]], bytes] | None = None
) -> Iterator[tuple[int, bytes]]:
    """(number from 1, bytes with the line end) of every line that is not blank.

    shorter: what to give for a long line, of its first LONG bytes and the stream that it goes on in.
    Raises UserError naming file and line for what cannot be unpacked.
    """
    with _opened(file) as (raw, stream):
        done = number = 0
        while True:
            with reading(Path(f"{file}:{number + 1}"), "fetch the file again"):
                line = stream.readline(LONG if shorter else -1)
                if shorter and len(line) == LONG:
                    line = shorter(line.removeprefix(codecs.BOM_UTF8), stream)
            if not line:
                progress(raw.tell() - done)
                return
            number += 1
            # Of the file on disk: packed files are read ahead in blocks.
            if raw.tell() - done >= 1 << 20:
                progress(raw.tell() - done)
                done = raw.tell()
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield number, line


def _pieces_of(file: Path, progress: Callable[[int], None]) -> Iterator[str]:
    """The text of a file."""
    decoder, number, done, block = codecs.getincrementaldecoder("utf-8-sig")(), 1, 0, b"\n"
    with _opened(file) as (raw, stream):
        while block:
            with reading(file, "fetch the file again"):
                block = stream.read(LONG)
            progress(raw.tell() - done)
            done = raw.tell()
            yield _decoded(block, file, number, lambda data: decoder.decode(data, not data))
            number += block.count(b"\n")


def _paragraphs_or_lines(file: Path, unit: TextUnit, progress: Callable[[int], None]) -> Iterator[Document]:
    lines: list[str] = []
    first = last = 0
    for number, line in read_lines(file, progress):
        text = _decoded(line, file, number)
        # read_lines leaves blank lines out, so a jump in the numbers is the end of a paragraph.
        if lines and (unit == "line" or number > last + 1):
            yield Document("".join(lines).rstrip("\r\n"), f"{file}:{first}")
            lines = []
        if not lines:
            first = number
        lines.append(text)
        last = number
    if lines:
        yield Document("".join(lines).rstrip("\r\n"), f"{file}:{first}")


def _decoded(data: bytes, file: Path, number: int, decode: Callable[[bytes], str] = bytes.decode) -> str:
    """number: of the first line in `data`."""
    try:
        return decode(data)
    except UnicodeDecodeError as error:
        line = number + error.object.count(b"\n", 0, error.start)
        raise UserError(f"{file}:{line}: not UTF-8 ({error.reason}); convert the file") from error


def suffix_of(file: Path) -> str:
    """The suffix that names the kind of file, without .gz or .zst."""
    return Path(file.stem).suffix if file.suffix in COMPRESSED else file.suffix
