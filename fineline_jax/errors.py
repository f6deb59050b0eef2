"""Bad input, which the user can correct: the one exception for it, and what readers raise turned into it."""

import contextlib
import difflib
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path


class UserError(Exception):
    """Bad input. The message is one line that names the file, key or flag and the remedy.

    The command line prints it without a traceback and exits with `exit_status`. Characters that are not printable, as
    a damaged or hostile file may have them in its names, are written as their escapes.
    """

    exit_status = 2

    def __init__(self, message: str):
        super().__init__("".join(each if each.isprintable() else repr(each)[1:-1] for each in message))


class Incomplete(UserError):
    """What could be done is done and stays; the message names what was left out."""

    exit_status = 1


def near(name: str, known: Iterable[str], most: int = 1, shown: Callable[[str], str] = str) -> str:
    """A hint for a message, "; did you mean x?", of the known names that are like `name`; "" if none is. shown: how a
    known name is written."""
    close = difflib.get_close_matches(name, list(known), n=most)
    return f"; did you mean {', '.join(map(shown, close))}?" if close else ""


_OF_READERS = (OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
_POINTER_START = b"version https://git-lfs.github.com/spec/"
LFS_POINTER = "{}: a git LFS pointer, not the file itself; run `git lfs pull` in its repository"
"""The message for a path."""


@contextlib.contextmanager
def reading(path: Path, remedy: str = "fetch it again", what: str = "cannot be read") -> Iterator[None]:
    """What a reader raises for a file that is damaged, cut short or gone, as one UserError that names `path`.

    Of Python, NumPy, zlib and gzip, YAML, and Arrow with its zstd; an error of another kind is a fault of this program
    and passes. A git LFS pointer in place of the file is called one.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        known = isinstance(error, (*_OF_READERS, zlib.error, NotImplementedError, MemoryError))
        if not known and not type(error).__module__.startswith(("pyarrow", "yaml")):
            raise
        refuse_lfs_pointer(path)
        reason = (isinstance(error, OSError) and error.strerror) or f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: {what} ({' '.join(reason.split())[:200]}); {remedy}") from error


def is_lfs_pointer(path: Path) -> bool:
    """Whether `path` holds not a file's content but the few lines that git LFS keeps in its place."""
    try:
        with path.open("rb") as file:
            return file.read(len(_POINTER_START)) == _POINTER_START
    except OSError:
        return False


def refuse_lfs_pointer(path: Path) -> None:
    """Raise UserError if `path` is one."""
    if is_lfs_pointer(path):
        raise UserError(LFS_POINTER.format(path))
