"""Splitting series over machines that do not talk to each other: every one takes its part by position."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

from fineline_jax.errors import UserError

T = TypeVar("T")


class JobShard(NamedTuple):
    """Part `index` (from 0) of `count`."""

    index: int
    count: int

    def of(self, items: Sequence[T], shift: int = 0) -> list[T]:
        """This part's items: every `count`-th one, so that parts grow evenly when items are added at the end.

        shift: the position of the series on the command line, so that many short series are spread too. Over all
        parts, every item is in exactly one of them.
        """
        return [item for position, item in enumerate(items) if (position + shift) % self.count == self.index]


WHOLE = JobShard(0, 1)


def job_shard(text: str | None, environment: Mapping[str, str], *, distributed: bool = False) -> JobShard:
    """The part that `--part` names: "2/8" is the second of eight; "auto" and "auto/8" take it from the job.

    auto reads, in this order: SLURM_ARRAY_TASK_*, JOB_COMPLETION_INDEX (Kubernetes; the number from JOB_COMPLETIONS or
    auto/N), BATCH_TASK_* (Google Batch), CLOUD_RUN_TASK_*; and where the processes of one job work alone (not
    distributed): TPU_WORKER_ID or CLOUD_TPU_TASK_ID of TPU_WORKER_HOSTNAMES, SLURM_PROCID of SLURM_NTASKS.
    Raises UserError if the part cannot be determined.
    """
    if text is None:
        return WHOLE
    if match := re.fullmatch(r"(\d+)/(\d+)", text):
        index, count = int(match[1]) - 1, int(match[2])
        if not 0 <= index < count:
            raise UserError(f"--part {text}: the first number must be from 1 to the second")
        return JobShard(index, count)
    match = re.fullmatch(r"auto(?:/(\d+))?", text)
    if match is None:
        raise UserError(f"--part {text}: give I/N such as 2/8, or auto, or auto/N")
    asked = int(match[1]) if match[1] else None
    name, index, count = _from_job(environment, distributed)
    if asked is not None and count is not None and asked != count:
        raise UserError(f"--part {text}: {name} says that there are {count} parts; give --part auto")
    count = asked or count
    if count is None:
        raise UserError(f"--part auto: {name} does not say of how many; give --part auto/N or set JOB_COMPLETIONS")
    if not 0 <= index < count:
        raise UserError(f"--part {text}: {name} gives part {index + 1} of {count}; give --part I/N")
    return JobShard(index, count)


def _from_job(environment: Mapping[str, str], distributed: bool) -> tuple[str, int, int | None]:
    """(variable, index from 0, count or None) of this task of the job."""

    def number(name: str) -> int | None:
        value = environment.get(name, "")
        return int(value) if re.fullmatch(r"\d+", value) else None

    if (task := number("SLURM_ARRAY_TASK_ID")) is not None:
        first, step = number("SLURM_ARRAY_TASK_MIN") or 0, number("SLURM_ARRAY_TASK_STEP") or 1
        index, rest = divmod(task - first, step)
        count = number("SLURM_ARRAY_TASK_COUNT")
        if rest or (count is not None and index >= count):
            raise UserError("--part auto: the SLURM array has gaps; submit it as --array=1-N, or give --part I/N")
        return "SLURM_ARRAY_TASK_ID", index, count
    for name, of in (
        ("JOB_COMPLETION_INDEX", "JOB_COMPLETIONS"),
        ("BATCH_TASK_INDEX", "BATCH_TASK_COUNT"),
        ("CLOUD_RUN_TASK_INDEX", "CLOUD_RUN_TASK_COUNT"),
    ):
        if (index := number(name)) is not None:
            return name, index, number(of)
    if not distributed:
        hosts = [host for host in environment.get("TPU_WORKER_HOSTNAMES", "").split(",") if host]
        for name in ("TPU_WORKER_ID", "CLOUD_TPU_TASK_ID"):
            if (index := number(name)) is not None:
                return name, index, len(hosts) or None
        if (index := number("SLURM_PROCID")) is not None:
            return "SLURM_PROCID", index, number("SLURM_NTASKS")
    raise UserError(
        "--part auto: no job index in the environment (SLURM_ARRAY_TASK_ID, JOB_COMPLETION_INDEX, TPU_WORKER_ID, …);"
        " give --part I/N"
    )
