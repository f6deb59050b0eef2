"""What may be chosen where requests are made and scored: plain values for the command line and for Python."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from fineline_jax.errors import UserError
from fineline_jax.scoring.job_shard import JobShard, job_shard
from fineline_jax.scoring.modes.names import ModeName
from fineline_jax.tokenizers.open import Bos


@dataclasses.dataclass(frozen=True)
class PackOptions:
    """How the requests of a suite are built, apart from the tokenizer that encodes them.

    Args:
        benchmarks: Folder of data sets in Hugging Face layout, one parquet file per split; default: the hub.
        tfds: TFDS data folder, for data sets that TFDS has.
        bos: BOS before each context: as the tokenizer does by default (auto), always, or never; default: as the
            registered series says, else auto.
        max_context: Longest row in tokens, instead of the model's context (lm-eval's max_length).
        limit: Only the first documents of each task.
        mode: How requests are encoded and compared, instead of the suite's own mode; see docs/suites.md.
    """

    benchmarks: Path | None = None
    tfds: Path | None = None
    bos: Bos | None = None
    max_context: int | None = None
    limit: int | None = None
    mode: ModeName | None = None


@dataclasses.dataclass(frozen=True)
class ScoreOptions:
    """How checkpoints are scored, and which of them this machine scores.

    Args:
        dtype: Of the matrix products; the softmax is float32 always.
        batch_tokens: Tokens per step over all devices; default: by the kind of device.
        part: I/N: only the I-th of N parts of the checkpoints, for N machines that do not talk to each other; auto or
            auto/N: from the job's variables (SLURM array, Kubernetes index, Google Batch, TPU worker).
        distributed: One of several processes: call jax.distributed.initialize first.
    """

    dtype: Literal["float32", "bfloat16"] = "float32"
    batch_tokens: int | None = None
    part: str | None = None
    distributed: bool = False

    def check(self) -> None:
        """Raise UserError if no step can have so few tokens, or the part cannot be determined."""
        check_batch_tokens(self.batch_tokens)
        self.shard()

    def shard(self, environment: Mapping[str, str] = os.environ) -> JobShard:
        """The checkpoints that this process scores. Raises UserError as `job_shard`."""
        return job_shard(self.part, environment, distributed=self.distributed)


def check_batch_tokens(batch_tokens: int | None) -> None:
    """Raise UserError if no step can have so few tokens."""
    if batch_tokens is not None and batch_tokens < 1:
        raise UserError(f"--batch-tokens {batch_tokens} must be at least 1; leave it out for one that fits the devices")
