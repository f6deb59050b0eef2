"""Shards written by an Apache Beam pipeline: one input file per work item, on any of Beam's runners.

The items are written by the same code as without Beam (`shards.write_shard`) and report through the folder they all
share, not through the runner: a bad line reads the same everywhere, no runner retries it, and the other files are
finished meanwhile and kept. Inputs, tokenizer and output must have the same paths on every machine, and the workers
need this package with its `beam` extra.
"""

import contextlib
import dataclasses
import io
import json
import shlex
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from fineline_jax.atomic_files import write_atomic
from fineline_jax.data.shards import Shard, Written, write_shard
from fineline_jax.errors import UserError
from fineline_jax.progress import periodically

try:
    import apache_beam as beam  # pyright: ignore[reportMissingImports]
    from apache_beam.options.pipeline_options import PipelineOptions  # pyright: ignore[reportMissingImports]
except ImportError as error:
    raise UserError("--beam-options needs Apache Beam: pip install 'fineline_jax[beam]'") from error

SECONDS_BETWEEN_COUNTS = 2.0


def write_shards(shards: Sequence[Shard], options: str, advance: Callable[[int], None]) -> list[Written]:
    """Write the shards on the runner that `options` name, as on Beam's command line; results in the order of `shards`.

    All shards' folders must have one parent, which exists. `advance` is called with the number of shards done since
    the last call. Raises UserError with the first error in the order of `shards`, after all others are written.
    """
    pipeline = _pipeline(options)
    # Named for this run: items of an earlier one that was killed may still be running on the workers.
    reports = shards[0].folder.absolute().parent / f"reports.{uuid.uuid4().hex}.incomplete"
    reports.mkdir()
    items = [(_absolute(shard), reports / f"{index:06d}.json") for index, shard in enumerate(shards)]
    try:
        # Without the reshuffle, runners fuse the steps and write every item on one worker.
        _ = pipeline | beam.Create(items) | beam.Reshuffle() | "Write" >> beam.Map(_write_and_report)
        with _counting(reports, advance):
            pipeline.run().wait_until_finish()
        outcomes = [_outcome(shard, report) for shard, report in items]
    finally:
        shutil.rmtree(reports, ignore_errors=True)
    errors = [outcome for outcome in outcomes if isinstance(outcome, str)]
    if errors:
        others = f" ({len(errors) - 1} more files have errors)" if len(errors) > 1 else ""
        raise UserError(errors[0] + others)
    return [outcome for outcome in outcomes if isinstance(outcome, Written)]


def _pipeline(options: str) -> "beam.Pipeline":
    usage = io.StringIO()
    try:
        flags = shlex.split(options)
        with contextlib.redirect_stderr(usage):
            parsed = PipelineOptions(flags)
            known = parsed.get_all_options()  # parses all; the constructor leaves it until each is used
        unknown = parsed.get_all_options(retain_unknown_options=True).keys() - known.keys()
        # Beam drops what it does not know, and runs here what was meant for a cluster. The server of another
        # runner may have options of its own, so with one of those it is left to Beam.
        if known["runner"] in (None, "DirectRunner") and (unknown or not all(flag[:2] == "--" for flag in flags[:1])):
            raise ValueError(f"unknown: {', '.join(f'--{name}' for name in sorted(unknown)) or flags[0]}")
        return beam.Pipeline(options=parsed)
    except (ValueError, SystemExit) as error:  # SystemExit: argparse, whose reason is on standard error
        lines = usage.getvalue().strip().splitlines()
        reason = lines[-1].partition("error: ")[2] if isinstance(error, SystemExit) and lines else error
        raise UserError(f"--beam-options={options!r}: {reason}; see the options of Beam's runner") from error


def _absolute(shard: Shard) -> Shard:
    return dataclasses.replace(
        shard,
        folder=shard.folder.absolute(),
        files=tuple((split, file.absolute()) for split, file in shard.files),
        tokenizer=shard.tokenizer and shard.tokenizer.absolute(),
    )


def _write_and_report(item: tuple[Shard, Path]) -> None:
    """One work item, on a worker: write the shard, then a report of it under the given name."""
    shard, report = item
    if not report.parent.is_dir():
        raise UserError(f"{report.parent}: not seen by a Beam worker; --out must be in a folder that all of them share")
    try:
        for _, file in shard.files:
            if not file.is_file():
                raise UserError(f"{file}: not seen by a Beam worker; inputs must be in a folder that all of them share")
        outcome = dataclasses.asdict(write_shard(shard))
    except UserError as error:
        outcome = {"error": str(error)}
    write_atomic(report, json.dumps(outcome))


def _outcome(shard: Shard, report: Path) -> Written | str:
    """The result of a work item, or its error."""
    try:
        outcome = json.loads(report.read_bytes())
    except FileNotFoundError:
        return f"{shard.files[0][1]}: Beam ended without writing it to {shard.folder}; look at the runner's log"
    return outcome["error"] if "error" in outcome else Written(**outcome)


@contextlib.contextmanager
def _counting(reports: Path, advance: Callable[[int], None]) -> Iterator[None]:
    """Context in which `advance` is called with the number of new reports; Beam's runners have no count in common."""
    before = 0

    def count() -> None:
        nonlocal before
        now = sum(1 for _ in reports.glob("*.json"))
        advance(now - before)
        before = now

    with periodically(SECONDS_BETWEEN_COUNTS, count, f"count of {reports}"):
        yield
