"""The `fineline` command: which commands there are, and what becomes of their errors.

Nothing heavy is imported at the top, here and in commands/, so that --help answers at once.
"""

import errno
import logging
import os
import sys
from collections.abc import Sequence

from tyro.extras import SubcommandApp

from fineline_jax.commands import data, pretrain, results, score, tasks, weights
from fineline_jax.cpu import prepare_cpu
from fineline_jax.errors import UserError

DESCRIPTION = "Pretrain a language model, keep its checkpoints, score every one of them, and read the curves."


def command_line() -> SubcommandApp:
    """All commands, in the order in which a run needs them."""
    app, data_app, prepare, tasks_app = (SubcommandApp() for _ in range(4))
    app.command(pretrain.demo)
    app.command(data_app, name="data", help="Prepare text or token lines for training.")
    data_app.command(prepare, name="prepare", help="Write a data set of token windows.")
    prepare.command(name="text")(data.prepare_text)
    prepare.command(name="amber")(data.prepare_amber)
    prepare.command(name="world")(data.prepare_world)
    app.command(name="pretrain")(pretrain.pretrain_for_help)
    app.command(tasks_app, name="tasks", help="Prepare benchmark tasks for scoring.")
    tasks_app.command(name="prepare")(tasks.prepare_tasks)
    tasks_app.command(name="plan")(tasks.plan_tasks)
    app.command(score.score)
    app.command(results.analyze)
    app.command(name="series")(weights.list_series)
    app.command(name="export")(weights.export_checkpoint)
    app.command(name="import")(weights.import_weights)
    app.command(name="export-scores")(results.export_scores)
    app.command(name="lm-eval")(score.lm_eval_for_help)
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0, 1 if some checkpoints could not be opened (all others are scored), 2 for
    bad input, 130 when interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    prepare_cpu()
    handler = logging.StreamHandler()
    handler.addFilter(_is_not_raised_too)
    logging.basicConfig(format="%(message)s", level=logging.ERROR, handlers=[handler])
    logging.getLogger("fineline_jax").setLevel(logging.INFO)
    try:
        # The options of these two are not known before they are read: a recipe's fields, lm-eval's own.
        if arguments[:1] == ["pretrain"]:
            return pretrain.pretrain(arguments[1:])
        if arguments[:1] == ["lm-eval"]:
            return score.lm_eval(arguments[1:])
        command_line().cli(prog="fineline", description=DESCRIPTION, args=arguments, sort_subcommands=False)
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
        place = f"{error.filename}: " if error.filename else ""
        print(f"fineline: {place}{error.strerror}; {remedy}", file=sys.stderr)
        return 2
    return 0


def _is_not_raised_too(record: logging.LogRecord) -> bool:
    """Orbax logs the exceptions of its threads, with a traceback each, and raises them: one line says them here."""
    return not (record.name == "absl" and record.exc_info)


if __name__ == "__main__":
    sys.exit(main())
