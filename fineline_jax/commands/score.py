"""`fineline score`, and lm-eval's own command with our engine in it."""

import functools
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from fineline_jax.commands.processes import join_processes
from fineline_jax.errors import UserError
from fineline_jax.recipe import MeshShape


def score(
    series: Annotated[Positional[tuple[str, ...]], arg(metavar="SERIES …", help_behavior_hint="(at least one)")],
    out: Path,
    suite: str | None = None,
    pack: Path | None = None,
    benchmarks: Path | None = None,
    tfds: Path | None = None,
    tokenizer: Path | None = None,
    bos: Literal["auto", "always", "never"] | None = None,
    max_context: int | None = None,
    limit: int | None = None,
    mode: Literal["lm-eval", "olmes", "opencompass-ppl"] | None = None,
    tokens: str = "",
    every: int = 1,
    downloads: Path | None = None,
    keep_downloads: Literal["yes", "no"] = "yes",
    dtype: Literal["float32", "bfloat16"] = "float32",
    batch_tokens: int | None = None,
    mesh: MeshShape = MeshShape(),
    part: str | None = None,
    watch: bool = False,
    watch_timeout: float | None = None,
    distributed: bool = False,
) -> None:
    """Score every checkpoint of one or more series; what is already scored is kept.

    A checkpoint that cannot be fetched or opened is passed over; the others are scored, and the exit status is 1.

    Args:
        series: Run folders, checkpoint folders, Hugging Face folders; names of `fineline series`; org/name@revision;
            addresses (hf://, s3://, gs://, http://). @GLOB at the end chooses by name: amber@ckpt_3*.
        out: Folder of the scores, one Parquet file per checkpoint.
        suite: Name in configs/suites, a YAML file, or lm-eval task names with commas between.
        pack: Request pack made by `fineline tasks prepare`, instead of a suite.
        benchmarks: Folder of data sets in Hugging Face layout; default: the hub.
        tfds: TFDS data folder, for data sets that TFDS has.
        tokenizer: Folder of the tokenizer; default: the one beside the checkpoints.
        bos: BOS before each context: as the tokenizer does by default (auto), always, or never; default: as the
            registered series says, else auto.
        max_context: Longest row in tokens, instead of the model's context (lm-eval's max_length).
        limit: Only the first documents of each task.
        mode: How requests are encoded and compared, instead of the suite's own mode; see docs/suites.md.
        tokens: start:stop:spacing, the checkpoints nearest to such a grid of trained tokens: 0:100B:10B, 1T:, ::50B.
        every: Every n-th of the checkpoints that are left.
        downloads: Where remote checkpoints are fetched to; default: ~/.cache/fineline_jax.
        keep_downloads: no removes each download once it is scored; at most two are on disk.
        dtype: Of the matrix products; the softmax is float32 always.
        batch_tokens: Tokens per step over all devices; default: by the kind of device.
        mesh: Devices per axis; default: a whole copy of the weights on each if that fits easily, else shards.
        part: I/N: only the I-th of N parts of the checkpoints, for N machines that do not talk to each other; auto or
            auto/N: from the job's variables (SLURM array, Kubernetes index, Google Batch, TPU worker).
        watch: Score a run that is still training, until all checkpoints of its recipe are scored.
        watch_timeout: End the watch after so many seconds without a new checkpoint; default: never.
        distributed: One of several processes: call jax.distributed.initialize first.
    """
    if not series:
        raise UserError("score: name at least one series, as in `fineline score runs/mine --suite core --out scores`")
    if (suite is None) == (pack is None):
        raise UserError("score: give either --suite or --pack")
    if watch and len(series) != 1:
        raise UserError("score: --watch takes one run; start one command per run")
    if watch and (tokens or every != 1):
        raise UserError("score: --watch scores every kept checkpoint; leave out --tokens and --every")
    if watch_timeout is not None and not watch_timeout >= 0:
        raise UserError(f"score: --watch-timeout {watch_timeout} must not be negative")
    if pack is not None:
        of_the_pack = {"benchmarks": benchmarks, "tfds": tfds, "tokenizer": tokenizer, "bos": bos, "mode": mode}
        of_the_pack |= {"max-context": max_context, "limit": limit}
        given = [f"--{name}" for name, value in of_the_pack.items() if value is not None]
        if given:
            raise UserError(
                f"score: {', '.join(given)} went into --pack when it was prepared; give that with --suite only"
            )
    if distributed:
        join_processes()
    from fineline_jax.checkpoints.series import first_tokenizer, open_series, scoring_policy
    from fineline_jax.progress import counted
    from fineline_jax.scoring.pack import load
    from fineline_jax.scoring.parts import job_shard
    from fineline_jax.scoring.placement import scoring_mesh
    from fineline_jax.scoring.scorer import score_parts
    from fineline_jax.scoring.watching import wait_for_first, watch_run

    chosen = job_shard(part, os.environ, distributed=distributed)
    if watch:
        wait_for_first(Path(series[0]), watch_timeout)
    keep = keep_downloads == "yes"
    opened = [open_series(name, tokens=tokens, every=every, downloads=downloads, keep=keep) for name in series]
    if pack is not None:
        requests = load(pack)
    else:
        from fineline_jax.scoring.build import build

        assert suite is not None
        bos = bos or scoring_policy(opened)
        folder = tokenizer or first_tokenizer(opened[0])
        if folder is None:
            raise UserError(f"{series[0]}: no tokenizer beside the checkpoint; give --tokenizer")
        requests = build(
            suite, folder, benchmarks=benchmarks, tfds=tfds, bos=bos, max_context=max_context, limit=limit, mode=mode
        )
    start = functools.partial(
        score_parts, pack=requests, out=out, mesh=scoring_mesh(mesh, opened), dtype=dtype, batch_tokens=batch_tokens
    )
    count = watch_run(Path(series[0]), start, chosen, watch_timeout) if watch else len(start(opened, part=chosen))
    # Without a place in the training there are metrics and no curve; tokens of a step are given to `analyze`.
    placed = any((one.step, one.tokens) != (None, None) for found in opened for one in found.checkpoints)
    then = "analyze" if placed else "export-scores"
    print(f"{out}: {counted(count, 'checkpoint')} scored; see `fineline {then} {out}`")


def lm_eval_for_help() -> None:
    """lm-eval's own command with our engine as `--model fineline`: `fineline lm-eval --help`."""


def lm_eval(arguments: list[str]) -> int:
    """`fineline lm-eval …`: lm-eval's command line, in which --model fineline is known."""
    from unittest import mock

    from lm_eval.__main__ import cli_evaluate

    import fineline_jax.scoring.lm_eval_backend  # noqa: F401  registers the model

    with mock.patch.object(sys, "argv", ["lm-eval", *arguments]):
        cli_evaluate()
    return 0
