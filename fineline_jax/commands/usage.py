"""What the parser of the command line says in a box, as one line like every other error."""

import contextlib
import functools
import io
import re
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from fineline_jax.errors import UserError

Result = TypeVar("Result")


def deferred(command: Callable[..., Any]) -> Callable[..., Callable[[], Any]]:
    """A function with the parameters of `command` that returns the call, to be made when parsing is over."""

    @functools.wraps(command)
    def defer(*arguments: Any, **options: Any) -> Callable[[], Any]:
        return functools.partial(command, *arguments, **options)

    return defer


def parsed(typed: str, parse: Callable[[], Result]) -> Result:
    """`parse()`, tyro's, of the command line `typed`. What it complains of is raised as a UserError."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            result = parse()
    except SystemExit as end:
        if end.code:
            raise UserError(one_line(typed, said.getvalue())) from None
        raise  # help was asked for
    sys.stderr.write(said.getvalue())
    return result


def one_line(typed: str, box: str) -> str:
    """The message, the options of the command `typed` that were perhaps meant, and where to read on.

    box: a title, then sections between rules, framed by lines or, where the terminal has no UTF-8, by blanks.
    """
    framed = re.sub(r"\x1b\[[\d;]*m", "", box).splitlines()[1:]
    body = "\n".join(line[2:].rstrip("│ ") for line in framed if not line.startswith("╰"))
    said, meant, place = [], [], ""
    for section in re.split(r"(?m)^[─-]+$\n?", body):
        text = " ".join(section.split()).rstrip(". ")
        if text.startswith("For full helptext"):
            place = place or text[text.index("fineline") :]
        elif text.startswith("Perhaps you meant"):
            for option in re.split(r"(?m)^ {4}(?=-)", section)[1:]:
                where = re.search(r" in (fineline [\w -]+ --help)$", " ".join(option.split()))
                if where is None or typed.startswith(where[1].removesuffix("--help")):
                    meant.append(re.split(r"[\s,]", option, maxsplit=1)[0])
                    place = where[1] if where else ""
        elif text and not text.startswith("Argument helptext"):
            said.append(text)
    if meant:
        said.append(f"perhaps {' or '.join(meant)}")
    return f"{'; '.join(said)}; see `{place or 'fineline --help'}`"
