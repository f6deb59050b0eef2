"""Lines of JSON that are too long for the memory: their long strings lie in temporary files and are read in pieces."""

import functools
import json
import mmap
import re
import tempfile
import uuid
from collections.abc import Callable, Iterator
from typing import IO

LONG = 1 << 20
"""Bytes of a line, of a string and of a piece."""
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_UNITS = re.compile(
    rb'(?:[^"\\]++|\\[^u]|\\u(?![dD][89abAB])[0-9a-fA-F]{4}'
    rb"|\\u[dD][89abAB][0-9a-fA-F]{2}(?=[^\\]|\\[^u]|\\u[0-9a-fA-F]{4}))*+",
    re.DOTALL,
)
"""Whole escapes and other bytes; what follows the first half of a surrogate pair is seen."""


def shorten(texts: dict[str, Callable[[], Iterator[str]]], line: bytes, stream: IO[bytes]) -> bytes:
    """The line that begins with `line` and goes on in `stream`, with a name in place of each long string: under it
    `texts` then has a function that gives the string in pieces. They raise ValueError where it is malformed.
    """
    with tempfile.TemporaryFile() as file:
        file.write(line)
        while len(line) == LONG and not line.endswith(b"\n"):
            file.write(line := stream.readline(LONG))
        file.flush()
        whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    kept, place = [], 0
    for start, end in (found.span() for found in _STRING.finditer(whole)):
        if end - start > LONG and whole[end - 1 : end] == b'"':
            name = uuid.uuid4().hex
            texts[name] = functools.partial(_pieces, whole, start + 1, end - 1)
            kept += [whole[place : start + 1], name.encode()]
            place = end - 1
    return b"".join([*kept, whole[place:]])


def _pieces(line: mmap.mmap, start: int, end: int) -> Iterator[str]:
    """Of the string whose content is line[start:end]."""
    while start < end:
        found = _UNITS.match(line, start, min(start + LONG, end + 1))
        stop = end if found is None else found.end()
        while stop < end and line[stop] & 0xC0 == 0x80:  # within a character
            stop -= 1
        if stop <= start:
            raise ValueError(f"Invalid escape: {line[start : start + 6]!r}")
        yield json.loads(b'"%b"' % line[start:stop])
        line.madvise(mmap.MADV_DONTNEED)
        start = stop
