"""What may be chosen where requests are made and scored: plain values for the command line and for Python."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from fineline_jax.errors import UserError
from fineline_jax.scoring.job_shard import JobShard, job_shard
from fineline_jax.scoring.modes.names import ModeName, check_mode
from fineline_jax.tokenizers.open import Bos

Dtype = Literal["float32", "bfloat16"]
Until = Literal["all", "resolved"]
Turns = Literal["single-turn", "multi-turn"]


@dataclasses.dataclass(frozen=True)
class PackOptions:
    """How the requests of a suite are built, apart from the tokenizer that encodes them.

    Args:
        benchmarks: Folder of data sets in Hugging Face layout, one parquet file per split; default: the hub.
        tfds: TFDS data folder, for data sets that TFDS has.
        bos: BOS before each context: as the tokenizer does by default (auto), always, or never; default: auto, and in
            `fineline score` what is registered for a series.
        max_context: Longest row in tokens, instead of the model's context (lm-eval's max_length).
        limit: Only the first documents of each task; below 1, this share of them.
        mode: How requests are encoded and compared, instead of the suite's own mode; see docs/suites.md.
        include_path: Folder of task files of your own (lm-eval's YAML), which a suite then names; !function in one runs
            the Python file beside it.
        shots: Solved examples in the prompt of every task, except those whose definition fixes them to none.
        fewshot_seed: Of the draws of solved examples; default: lm-eval's, 1234.
        pick: Table of columns task and document (.csv, .parquet), such as the picked ones of item response: only these
            documents; tasks that it does not name are asked whole.
        chat_template: Word prompts by the tokenizer's chat template: solved examples in one turn, or in turns of their
            own.
        system_instruction: Put before each prompt.
    """

    benchmarks: Path | None = None
    tfds: Path | None = None
    bos: Bos | None = None
    max_context: int | None = None
    limit: int | float | None = None
    mode: ModeName | None = None
    include_path: Path | None = None
    shots: int | None = None
    fewshot_seed: int | None = None
    pick: Path | None = None
    chat_template: Turns | None = None
    system_instruction: str | None = None

    def check(self) -> None:
        """Raise UserError for a value that is not one of its option, or two options that exclude each other."""
        if self.bos is not None and self.bos not in get_args(Bos):
            raise UserError(f"--bos {self.bos!r} must be auto, always or never")
        check_at_least_1(self.max_context, "--max-context")
        if not isinstance(self.limit, float) or not 0 < self.limit < 1:
            whole = isinstance(self.limit, float) and self.limit.is_integer()
            check_at_least_1(int(self.limit) if whole else self.limit, "--limit", ", or a share below 1")  # pyright: ignore
        for name in ("shots", "fewshot_seed"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
                raise UserError(f"--{name.replace('_', '-')} {value} must be a whole number from 0 on")
        if self.chat_template is not None and self.chat_template not in get_args(Turns):
            raise UserError(f"--chat-template {self.chat_template} must be {' or '.join(get_args(Turns))}")
        if self.mode is not None:
            check_mode(self.mode, "--mode")
        if self.benchmarks is not None and self.tfds is not None:
            raise UserError("--benchmarks and --tfds exclude each other; give one")


@dataclasses.dataclass(frozen=True)
class ScoreOptions:
    """How checkpoints are scored, and which of them this machine scores.

    Args:
        dtype: Of the matrix products; the softmax is float32 always.
        batch_tokens: Tokens per step over all devices; default: by the kind of device.
        until: resolved: leave out checkpoints between two whose scores differ by no more than their errors.
        part: I/N: only the I-th of N parts of the checkpoints, for N machines that do not talk to each other; auto or
            auto/N: from the job's variables (SLURM array, Kubernetes index, Google Batch, TPU worker).
        distributed: One of several processes: call jax.distributed.initialize first.
    """

    dtype: Dtype = "float32"
    batch_tokens: int | None = None
    until: Until = "all"
    part: str | None = None
    distributed: bool = False

    def check(self) -> None:
        """Raise UserError for another dtype, if no step can have so few tokens, or the part cannot be determined."""
        if self.dtype not in get_args(Dtype):
            raise UserError(f"--dtype {self.dtype} must be {' or '.join(get_args(Dtype))}")
        check_batch_tokens(self.batch_tokens)
        if self.until not in get_args(Until):
            raise UserError(f"--until {self.until} must be {' or '.join(get_args(Until))}")
        self.shard()

    def shard(self, environment: Mapping[str, str] = os.environ) -> JobShard:
        """The checkpoints that this process scores. Raises UserError as `job_shard`."""
        return job_shard(self.part, environment, distributed=self.distributed)


def check_batch_tokens(batch_tokens: int | None) -> None:
    """Raise UserError if no step can have so few tokens."""
    check_at_least_1(batch_tokens, "--batch-tokens", "; leave it out for one that fits the devices")


def check_at_least_1(value: Any, name: str, remedy: str = "") -> None:
    """Raise UserError, which begins with `name`, if `value` is given and no whole number from 1 on."""
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise UserError(f"{name} {value!r} must be a whole number{remedy}")
    if value is not None and value < 1:
        raise UserError(f"{name} {value} must be at least 1{remedy}")
