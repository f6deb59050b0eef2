"""The `fineline` command: which commands there are, and how their errors are shown.

Nothing heavy is imported at the top, here and in commands/, so that --help answers at once.
"""

import errno
import logging
import os
import sys
from collections.abc import Callable, Sequence

from tyro.extras import SubcommandApp

from fineline_jax import __version__
from fineline_jax.commands import ablate, data, plan, pretrain, publish, results, score, tasks, weights
from fineline_jax.commands.usage import check_options, deferred, parsed
from fineline_jax.cpu_backend import prepare_cpu
from fineline_jax.errors import UserError

DESCRIPTION = (
    "Pretrain a language model, keep its checkpoints, score every one of them, and read the curves."
    " `fineline --version` prints the version."
)


def command_line() -> SubcommandApp:
    """All commands, in the order in which a run needs them."""
    app, data_app, prepare, tasks_app = (SubcommandApp() for _ in range(4))

    def add(app: SubcommandApp, name: str, command: Callable) -> None:
        app.command(name=name)(deferred(command))

    add(app, "demo", pretrain.demo)
    app.command(data_app, name="data", help="Prepare text or token lines for training.")
    data_app.command(prepare, name="prepare", help="Write a data set of token windows.")
    add(prepare, "text", data.prepare_text)
    add(prepare, "amber", data.prepare_amber)
    add(prepare, "world", data.prepare_world)
    add(app, "plan", plan.plan_for_help)
    add(app, "pretrain", pretrain.pretrain_for_help)
    app.command(tasks_app, name="tasks", help="Prepare benchmark tasks for scoring.")
    add(tasks_app, "prepare", tasks.prepare_tasks)
    add(tasks_app, "plan", tasks.plan_tasks)
    add(app, "score", score.score)
    add(app, "show", results.show)
    add(app, "analyze", results.analyze)
    add(app, "ablate", ablate.ablate)
    add(app, "series", weights.list_series)
    add(app, "export", weights.export_checkpoint)
    add(app, "import", weights.import_weights)
    add(app, "export-scores", results.export_scores)
    add(app, "traces", publish.traces)
    add(app, "lm-eval", score.lm_eval_for_help)
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0, 1 if some checkpoints were left out (`Incomplete`), 2 for bad input, 130
    when interrupted, 143 where another process of the job has ended (`multihost`)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that torch is missing, which nothing here needs
    prepare_cpu()
    handler = logging.StreamHandler()
    handler.addFilter(_is_not_raised)
    logging.basicConfig(format="%(message)s", level=logging.ERROR, handlers=[handler])
    logging.getLogger("fineline_jax").setLevel(logging.INFO)
    sys.unraisablehook = _unraisable
    try:
        if arguments == ["--version"]:
            print(f"fineline {__version__}")
            return 0
        # The options of lm-eval and pretrain are not known before they are read: lm-eval's own, a recipe's fields.
        if arguments[:1] == ["lm-eval"]:
            return score.lm_eval(arguments[1:])
        check_options(arguments)
        if arguments[:1] in (["pretrain"], ["plan"]):
            return {"pretrain": pretrain.pretrain, "plan": plan.plan}[arguments[0]](arguments[1:])
        app = command_line()
        options = {"prog": "fineline", "description": DESCRIPTION, "args": arguments, "sort_subcommands": False}
        command = parsed(" ".join(["fineline", *arguments]), lambda: app.cli(**options))
        command()
    except UserError as error:
        print(f"fineline: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("fineline: interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    except OSError as error:
        if error.strerror is None:  # of a library, without a number
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "make room and run the same command again" if full else "check the path and its permissions"
        name = f"{error.filename}: " if error.filename else ""
        print(f"fineline: {name}{error.strerror}; {remedy}", file=sys.stderr)
        return 2
    return 0


def _unraisable(seen: "sys.UnraisableHookArgs") -> None:
    """As Python does, but for what tensorstore's own threads print after a save that failed, whose error is told."""
    if str(seen.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(seen)


def _is_not_raised(record: logging.LogRecord) -> bool:
    """False for the exceptions that Orbax logs with a traceback and raises as well: they are printed as one line."""
    return not (record.name == "absl" and record.exc_info)
