"""Errors of the command line's parser, which it prints in a box, as one line like every other error."""

import contextlib
import functools
import io
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from fineline_jax.errors import UserError

Result = TypeVar("Result")

OF_LM_EVAL = {
    "tasks": "`fineline score` has --suite, which also takes task names with commas between: --suite piqa,arc_easy",
    "num_fewshot": "the number of shots stands behind a task's name, or in a suite: --suite piqa@5",
    "batch_size": "`fineline score` has --batch-tokens",
    "device": "JAX takes all devices there are; JAX_PLATFORMS=cpu before the command leaves it the CPU alone",
    "include_path": "tasks of your own are scored by `fineline lm-eval --model fineline --include_path FOLDER`",
    "model": "name the model first, as in `fineline score runs/mine` or `fineline score ORG/NAME@REVISION`",
    "model_args": "name the model first, as in `fineline score ORG/NAME@REVISION --dtype bfloat16`",
    "output_path": "`fineline score` has --out; `fineline export-scores` then writes lm-eval's files",
}
"""Options of lm-eval's command that ours lack: what to give instead."""


def check_options(arguments: Sequence[str]) -> None:
    """Raise UserError, which names ours, for an option of lm-eval's command."""
    for argument in arguments:
        option = argument.partition("=")[0]
        if option.startswith("--") and (ours := OF_LM_EVAL.get(option[2:].replace("-", "_"))):
            raise UserError(f"{option} is an option of lm-eval; {ours}")


def deferred(command: Callable[..., Any]) -> Callable[..., Callable[[], Any]]:
    """A function with the parameters of `command` that returns the call, to be made when parsing is over."""

    @functools.wraps(command)
    def defer(*arguments: Any, **options: Any) -> Callable[[], Any]:
        return functools.partial(command, *arguments, **options)

    return defer


def parsed(typed: str, parse: Callable[[], Result]) -> Result:
    """`parse()`, tyro's, of the command line `typed`. Its errors are raised as a UserError."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            result = parse()
    except SystemExit as end:
        if end.code:
            raise UserError(one_line(typed, printed.getvalue())) from None
        raise  # help was asked for
    sys.stderr.write(printed.getvalue())
    return result


def one_line(typed: str, box: str) -> str:
    """The message, the options of the command `typed` that were perhaps meant, and where to read on.

    box: a title, then sections between rules, framed by lines or, where the terminal has no UTF-8, by blanks.
    """
    framed = re.sub(r"\x1b\[[\d;]*m", "", box).splitlines()[1:]
    body = "\n".join(line[2:].rstrip("│ ") for line in framed if not line.startswith("╰"))
    messages, options, help_command = [], [], ""
    for section in re.split(r"(?m)^[─-]+$\n?", body):
        text = " ".join(section.split()).rstrip(". ")
        if text.startswith("For full helptext"):
            help_command = help_command or text[text.index("fineline") :]
        elif text.startswith("Perhaps you meant"):
            for option in re.split(r"(?m)^ {4}(?=-)", section)[1:]:
                where = re.search(r" in (fineline [\w -]+ --help)$", " ".join(option.split()))
                if where is None or typed.startswith(where[1].removesuffix("--help")):
                    options.append(re.split(r"[\s,]", option, maxsplit=1)[0])
                    help_command = where[1] if where else ""
        elif text and not text.startswith("Argument helptext"):
            messages.append(text)
    if options:
        messages.append(f"perhaps {' or '.join(options)}")
    return f"{'; '.join(messages)}; see `{help_command or 'fineline --help'}`"
