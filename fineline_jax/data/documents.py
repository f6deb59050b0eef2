"""Text documents out of files, each with its location.

`.jsonl` (or `.json`): one object per line, the text under one key. `.txt`: the whole file is one document,
or each paragraph (blank lines between), or each line. Both also with `.gz`.
"""

import contextlib
import dataclasses
import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from fineline_jax.errors import UserError

SUFFIXES = (".jsonl", ".json", ".txt")
TextUnit = Literal["file", "paragraph", "line"]


@dataclasses.dataclass(frozen=True)
class Document:
    text: str
    location: str
    """`file:line` of its first line, for error messages."""


def input_files(inputs: Sequence[Path], suffixes: tuple[str, ...] = SUFFIXES) -> list[Path]:
    """The files meant by `inputs`: files as given, folders as their matching files sorted by name.

    Raises UserError for a path that is missing, of another kind, or a folder without such files.
    """
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            matching = sorted(file for file in path.rglob("*") if file.is_file() and suffix_of(file) in suffixes)
            if not matching:
                raise UserError(f"{path}: no {', '.join(suffixes)} file in this folder; give files or another folder")
            files += matching
        elif not path.is_file():
            raise UserError(f"{path}: no such file; give existing files")
        elif suffix_of(path) not in suffixes:
            raise UserError(f"{path}: unknown kind of file; give {', '.join(suffixes)}, plain or with .gz")
        else:
            files.append(path)
    if not files:
        raise UserError("no input files; give at least one")
    return files


def read_documents(
    file: Path, *, text_key: str, text_unit: TextUnit, progress: Callable[[int], None] = lambda size: None
) -> Iterator[Document]:
    """The documents of one file in order; blank ones are left out.

    `progress` is called with the number of bytes of the file (as it lies on disk) read since the last call.
    Raises UserError naming file and line for a malformed line or bytes that are not UTF-8.
    """
    if suffix_of(file) == ".txt":
        whole = text_unit == "file"
        yield from _whole_file(file, progress) if whole else _paragraphs_or_lines(file, text_unit, progress)
        return
    for number, line in read_lines(file, progress):
        location = f"{file}:{number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # brackets within brackets without end
            raise UserError(f"{location}: not JSON ({error}); fix or remove the line") from error
        text = record.get(text_key) if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise UserError(
                f"{location}: no text under the key {text_key!r}; fix the line or name the key by --text-key"
            )
        if not _is_encodable(text):
            raise UserError(f"{location}: half of a surrogate pair in the text is no character; fix or remove the line")
        if text.strip():
            yield Document(text, location)


def _is_encodable(text: str) -> bool:
    """JSON can write half of a surrogate pair, "\\ud800", which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_lines(file: Path, progress: Callable[[int], None]) -> Iterator[tuple[int, bytes]]:
    """(number from 1, bytes with the line end) of every line that is not blank."""
    with (
        file.open("rb") as raw,
        gzip.GzipFile(fileobj=raw) if file.suffix == ".gz" else contextlib.nullcontext(raw) as stream,
    ):
        done = number = 0
        while True:
            try:
                line = stream.readline()
            except (EOFError, OSError, zlib.error) as error:
                raise UserError(f"{file}:{number + 1}: cannot be read ({error}); fetch the file again") from error
            if not line:
                progress(raw.tell() - done)
                return
            number += 1
            # Of the file on disk: gzip reads it ahead in blocks.
            if raw.tell() - done >= 1 << 20:
                progress(raw.tell() - done)
                done = raw.tell()
            if line.strip():
                yield number, line


def _whole_file(file: Path, progress: Callable[[int], None]) -> Iterator[Document]:
    data = file.read_bytes()
    progress(len(data))
    try:
        text = (gzip.decompress(data) if file.suffix == ".gz" else data).decode()
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{file}:{line}: not UTF-8 ({error.reason}); convert the file") from error
    except (EOFError, OSError, zlib.error) as error:
        raise UserError(f"{file}: cannot be read ({error}); fetch the file again") from error
    if text.strip():
        yield Document(text, f"{file}:1")


def _paragraphs_or_lines(file: Path, unit: TextUnit, progress: Callable[[int], None]) -> Iterator[Document]:
    lines: list[str] = []
    first = last = 0
    for number, line in read_lines(file, progress):
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{file}:{number}: not UTF-8 ({error.reason}); convert the file") from error
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


def suffix_of(file: Path) -> str:
    """The suffix that names the kind of file, without .gz."""
    return Path(file.stem).suffix if file.suffix == ".gz" else file.suffix
