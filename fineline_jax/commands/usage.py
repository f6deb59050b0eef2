"""Errors of the command line's parser, which it prints in a box, as one line like every other error."""

import contextlib
import functools
import io
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from fineline_jax.atomic_files import check_local
from fineline_jax.errors import UserError, near

Result = TypeVar("Result")

_NO_SEED = "--fewshot-seed is that of the draws of solved examples, and nothing else is random; leave it out"
OF_LM_EVAL = {
    "tasks": "`fineline score` has --suite, which also takes task names with commas between: --suite piqa,arc_easy",
    "num_fewshot": "`fineline score` has --shots, and a task's own stand behind its name: --suite piqa@5",
    "batch_size": "`fineline score` has --batch-tokens",
    "max_length": "`fineline score` has --max-context",
    "device": "JAX takes all devices there are; JAX_PLATFORMS=cpu before the command leaves it the CPU alone",
    "model": "name the model first, as in `fineline score runs/mine` or `fineline score ORG/NAME@REVISION`",
    "model_args": "name the model first, as in `fineline score ORG/NAME@REVISION --dtype bfloat16`",
    "output_path": "`fineline score` has --out; `fineline export-scores` then writes lm-eval's files",
    "log_samples": "`fineline score` keeps every score; `fineline export-scores` then writes lm-eval's samples",
    "apply_chat_template": "`fineline score` has --chat-template single-turn, or multi-turn",
    "trust_remote_code": "no code of a repository is run here; leave it out",
}
"""Options of lm-eval's command that ours lack: what to give instead."""
OF_COMMAND = {
    "score": {"seed": _NO_SEED},
    "tasks": {"seed": _NO_SEED, "max_length": "`fineline tasks prepare` has --max-context"},
    "pretrain": {
        "tasks": "`fineline pretrain` has --score, which also takes task names with commas between",
        "num_fewshot": "the number of shots stands behind a task's name, or in a suite: --score piqa@5",
        "batch_size": "`fineline pretrain` has --batch.sequences",
        "max_length": "`fineline pretrain` has --data.sequence-length",
        "model": "name the recipe first, as in `fineline pretrain demo`",
        "model_args": "`fineline pretrain` has --model.layers and the other fields of the recipe's model",
        "output_path": "`fineline pretrain` has --run",
        "log_samples": "`fineline export-scores` writes lm-eval's samples of the scores in RUN/scores",
    },
}
"""The same where a command has another answer, or where only some commands lack the option."""


IN_BUCKETS = ("pretrain --run", "score --out", "data prepare text --out", "data prepare amber --out")
"""Options whose folder may be in a bucket."""


def check_options(arguments: Sequence[str]) -> None:
    """Raise UserError, which names ours, for lm-eval's command written with an underscore, and its options; and for a
    bucket where only folders can be written or trained on."""
    if arguments[:1] == ["lm_eval"]:
        raise UserError("no command is called lm_eval; did you mean lm-eval?")
    answers = OF_LM_EVAL | OF_COMMAND.get("".join(arguments[:1]), {})
    for argument, following in zip(arguments, [*arguments[1:], ""]):
        option = argument.partition("=")[0]
        is_data = re.fullmatch(r"--(data|logging)\..*path", option) is not None
        if option in ("--out", "--run") or is_data:
            command = " ".join([*arguments[:3], option]) if arguments[0] == "data" else f"{arguments[0]} {option}"
            or_bucket = is_data or command in IN_BUCKETS
            check_local(argument.partition("=")[2] or following, option, or_bucket=or_bucket)
        if option.startswith("--") and (ours := answers.get(option[2:].replace("-", "_"))):
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
    said = [_of_number(message) for message in messages]
    messages = _with_command_meant(said)
    if options and messages == said:
        messages.append(f"perhaps {' or '.join(options)}")
    return f"{'; '.join(messages)}; see `{help_command or 'fineline --help'}`"


def _of_number(message: str) -> str:
    """tyro's words for a value that is no number, in fewer."""
    match = re.match(
        r"Error parsing (--\S+): no type matching {None}\|INT(\|FLOAT)? could .* from \['(.*?)'\]", message
    )
    if match is None:
        return message
    return f"{match[1]} {match[3]} must be a {'number' if match[2] else 'whole number'}"


def _with_command_meant(messages: list[str]) -> list[str]:
    """The messages; of a mistyped command only which was meant, where one is close to it."""
    match = re.match(
        r"Unrecognized (?:or misplaced )?options: ([^\s,]+).*; Available subcommands: (.*)", "; ".join(messages)
    )
    hint = near(match[1], match[2].split(", ")) if match else ""
    return [f"no command is called {match[1]}{hint}"] if match and hint else messages
