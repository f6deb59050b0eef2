"""`fineline tasks`: request packs, and what the prefix tree saves on them."""

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from fineline_jax.errors import UserError


def prepare_tasks(
    suite: Annotated[Positional[str], arg(metavar="SUITE")],
    tokenizer: Path,
    out: Path,
    benchmarks: Path | None = None,
    tfds: Path | None = None,
    bos: Literal["auto", "always", "never"] = "auto",
    max_context: int | None = None,
    limit: int | None = None,
    mode: Literal["lm-eval", "olmes", "opencompass-ppl"] | None = None,
) -> None:
    """Build and tokenize every request of a suite once; scoring then needs neither network nor lm-eval.

    Args:
        suite: Name in configs/suites, a YAML file, or lm-eval task names with commas between.
        tokenizer: Folder of the tokenizer.
        out: Folder of the request pack to write.
        benchmarks: Folder of data sets in Hugging Face layout, one parquet file per split; default: the hub.
        tfds: TFDS data folder, for data sets that TFDS has.
        bos: BOS before each context: as the tokenizer does by default, always, or never.
        max_context: Cut requests to their last so many tokens even where the model could take more.
        limit: Only the first documents of each task.
        mode: How requests are encoded and compared, instead of the suite's own mode; see docs/suites.md.
    """
    options = dict(locals())
    from fineline_jax.scoring.pack import prepare as write

    pack = write(**options)
    print(f"{out}: {pack.requests.num_rows:,} requests of {len(pack.manifest['tasks'])} tasks")


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
    from fineline_jax.scoring.pack import load
    from fineline_jax.scoring.plan_table import HEADER, plan_table
    from fineline_jax.text_table import text_table

    print(text_table([HEADER, *plan_table(load(pack), context, row_length)], right=range(1, len(HEADER))))
