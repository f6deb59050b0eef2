"""`fineline score`, and lm-eval's own command with our engine in it."""

import dataclasses
import logging
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from fineline_jax import interface
from fineline_jax.commands.processes import Processes, joined
from fineline_jax.errors import UserError
from fineline_jax.recipe import MeshShape
from fineline_jax.scoring.options import PackOptions, ScoreOptions
from fineline_jax.text_table import counted

if TYPE_CHECKING:
    from fineline_jax.checkpoints.series import Series
    from fineline_jax.scoring.requests.pack import Pack


@dataclasses.dataclass(frozen=True)
class Requests:
    """What is asked: a pack, or a suite to make one of.

    Args:
        suite: Name in configs/suites, a YAML file, or lm-eval task names with commas between.
        pack: Request pack made by `fineline tasks prepare`, instead of a suite.
        tokenizer: Folder of the tokenizer; default: the one beside the checkpoints.
    """

    suite: str | None = None
    pack: Path | None = None
    tokenizer: Path | None = None
    options: Annotated[PackOptions, arg(name="")] = dataclasses.field(default_factory=PackOptions)

    def check(self) -> None:
        if (self.suite is None) == (self.pack is None):
            raise UserError("score: give either --suite or --pack")
        made_with = {**vars(self.options), "tokenizer": self.tokenizer}
        given = [f"--{name.replace('_', '-')}" for name, value in made_with.items() if value is not None]
        if self.pack is not None and given:
            raise UserError(
                f"score: {', '.join(given)} went into --pack when it was prepared; give that with --suite only"
            )

    def open(self, series: "list[Series]") -> "Pack":
        """The pack, with the tokenizer and the BOS policy of the series where none is given."""
        from fineline_jax.checkpoints.load import first_tokenizer
        from fineline_jax.checkpoints.series import scoring_policy
        from fineline_jax.scoring.requests.pack import load

        if self.pack is not None:
            return load(self.pack)
        from fineline_jax.scoring.requests.build import build

        assert self.suite is not None
        options = dataclasses.replace(self.options, bos=self.options.bos or scoring_policy(series))
        tokenizer = self.tokenizer or first_tokenizer(series[0])
        if tokenizer is None:
            raise UserError(f"{series[0].location}: no tokenizer beside the checkpoint; give --tokenizer")
        return build(self.suite, tokenizer, options)


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which checkpoints of a series, and what becomes of their downloads.

    Args:
        tokens: start:stop:spacing, the checkpoints nearest to such a grid of trained tokens: 0:100B:10B, 1T:, ::50B.
        every: Every n-th of the checkpoints that are left.
        downloads: Where remote checkpoints are fetched to; default: ~/.cache/fineline_jax.
        keep_downloads: no removes each download once it is scored; at most two are on disk.
    """

    tokens: str = ""
    every: int = 1
    downloads: Path | None = None
    keep_downloads: Literal["yes", "no"] = "yes"

    def open(self, name: str) -> "Series":
        return interface.open_series(name, **{**vars(self), "keep_downloads": self.keep_downloads == "yes"})


@dataclasses.dataclass(frozen=True)
class Watch:
    """Whether the run still trains.

    Args:
        watch: Score a run that is still training, until its last checkpoint is scored or its training is stopped.
        watch_timeout: End the watch after so many seconds without a new checkpoint; default: never.
    """

    watch: bool = False
    watch_timeout: float | None = None

    def check(self, series: tuple[str, ...], selection: Selection) -> None:
        if self.watch and len(series) != 1:
            raise UserError("score: --watch takes one run; start one command per run")
        if self.watch and (selection.tokens or selection.every != 1):
            raise UserError("score: --watch scores every kept checkpoint; leave out --tokens and --every")
        if self.watch_timeout is not None and not self.watch_timeout >= 0:
            raise UserError(f"score: --watch-timeout {self.watch_timeout} must not be negative")


def score(
    series: Annotated[Positional[tuple[str, ...]], arg(metavar="SERIES …", help_behavior_hint="(at least one)")],
    out: Path,
    requests: Annotated[Requests, arg(name="")] = Requests(),
    selection: Annotated[Selection, arg(name="")] = Selection(),
    how: Annotated[ScoreOptions, arg(name="")] = ScoreOptions(),
    mesh: MeshShape = MeshShape(),
    watch: Annotated[Watch, arg(name="")] = Watch(),
    processes: Annotated[Processes, arg(name="")] = Processes(),
) -> None:
    """Score every checkpoint of one or more series; what is already scored is kept.

    A checkpoint that cannot be fetched or opened is passed over; the others are scored, and the exit status is 1.

    Args:
        series: Run folders, checkpoint folders, Hugging Face folders; names of `fineline series`; org/name@revision;
            addresses (hf://, s3://, gs://, http://). @GLOB,… at the end chooses by name: amber@ckpt_3*, run@step1,step5
        out: Folder of the scores, one Parquet file per checkpoint; or gs://… or s3://….
        mesh: Devices per axis; default: a whole copy of the weights on each if that fits easily, else shards.
    """
    if not series:
        raise UserError("score: name at least one series, as in `fineline score runs/mine --suite core --out scores`")
    requests.check()
    watch.check(series, selection)
    with joined(how.distributed, processes):
        import jax

        from fineline_jax.scoring.metrics import latest
        from fineline_jax.scoring.series.auto_mesh import scoring_mesh
        from fineline_jax.scoring.series.score_series import SeriesScorer
        from fineline_jax.scoring.series.watch import wait_for_first, watch_run

        how.check()
        if watch.watch:
            wait_for_first(Path(series[0]), watch.watch_timeout)
        opened = [selection.open(name) for name in series]
        with interface.scores_at(out) as folder:
            score_all = SeriesScorer(requests.open(opened), folder, scoring_mesh(mesh, opened, how.dtype), how)
            until = watch.watch_timeout
            count = watch_run(Path(series[0]), score_all, until) if watch.watch else len(score_all(opened))
            if count and jax.process_index() == 0:
                print(latest.of_scores(folder, last=1, series=[one.name for one in opened]))
        # Without steps or tokens there are metrics and no curve; tokens of a step are given to `analyze`. Imported
        # weights of which nothing is known have step 0.
        known = any(one.tokens is not None or one.step for each in opened for one in each.checkpoints)
        then = "analyze" if known else "export-scores"
        print(f"{out}: {counted(count, 'checkpoint')} scored; see `fineline {then} {out}`")


def lm_eval_for_help() -> None:
    """lm-eval's own command with our engine as `--model fineline`: `fineline lm-eval --help`."""


def lm_eval(arguments: list[str]) -> int:
    """`fineline lm-eval …`: lm-eval's command line, in which --model fineline is known."""
    from unittest import mock

    from lm_eval.__main__ import cli_evaluate

    import fineline_jax.scoring.lm_eval.backend  # noqa: F401  registers the model

    unsaved = _Unsaved()
    logging.getLogger("lm_eval.loggers.evaluation_tracker").addHandler(unsaved)
    try:
        with mock.patch.object(sys, "argv", ["lm-eval", *arguments]):
            cli_evaluate()
    except (ValueError, OSError) as error:
        if not _is_of_options(error):
            raise
        message = " ".join(str(error).split()).rstrip(".")
        remedy = "see `fineline lm-eval ls tasks`" if "asks" in message else "see `fineline lm-eval -h`"
        raise UserError(f"lm-eval: {message}; {remedy}") from error
    if unsaved.said:
        raise UserError(f"lm-eval: {'; '.join(unsaved.said)}; see that --output_path can be written and run again")
    return 0


class _Unsaved(logging.Handler):
    """What lm-eval says where it cannot write its files; it goes on, and ends well."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = " ".join(record.getMessage().split())
        if record.levelno >= logging.WARNING and message.startswith("Could not save"):
            self.said.append(message)
        elif self.said and "Error(" in message:
            self.said[-1] += f" ({message})"


def _is_of_options(error: Exception) -> bool:
    """Whether lm-eval raised it where it reads and checks its options, and not where it computes."""
    raised = traceback.extract_tb(error.__traceback__)[-1]
    *_, package, folder, _ = Path(raised.filename).parts
    return raised.name == "simple_evaluate" or (package == "lm_eval" and folder in ("_cli", "config"))
