"""`fineline tasks`: request packs, and what the prefix tree saves on them."""

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from fineline_jax import interface
from fineline_jax.errors import UserError
from fineline_jax.scoring.options import PackOptions
from fineline_jax.text_table import counted


def prepare_tasks(
    suite: Annotated[Positional[str], arg(metavar="SUITE")],
    tokenizer: Path,
    out: Path,
    options: Annotated[PackOptions, arg(name="")] = PackOptions(),
) -> None:
    """Build and tokenize every request of a suite once; scoring then needs neither network nor lm-eval.

    Args:
        suite: Name in configs/suites, a YAML file, or lm-eval task names with commas between.
        tokenizer: Folder of the tokenizer.
        out: Folder of the request pack to write.
    """
    pack = interface.prepare_pack(suite, tokenizer, out, **vars(options))
    print(f"{out}: {counted(pack.requests.num_rows, 'request')} of {counted(len(pack.manifest['tasks']), 'task')}")


def plan_tasks(
    pack: Annotated[Positional[Path], arg(metavar="PACK")], context: int = 2048, row_length: int = 8192
) -> None:
    """What the prefix tree saves on each task: tokens fed, against distinct prefixes and one request at a time.

    Args:
        pack: Request pack made by `fineline tasks prepare`.
        context: Tokens the model reads.
        row_length: Longest row, in tokens.
    """
    for name, value in (("context", context), ("row-length", row_length)):
        if value < 1:
            raise UserError(f"--{name} {value} must be at least 1")
    from fineline_jax.scoring.engine.plan_table import HEADER, plan_table
    from fineline_jax.scoring.requests.pack import load
    from fineline_jax.text_table import text_table

    print(text_table([HEADER, *plan_table(load(pack), context, row_length)], right=range(1, len(HEADER))))
