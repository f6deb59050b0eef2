"""Scoring the kept checkpoints of a run in memory, while it trains."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from fineline_jax.checkpoints.load import stat_signature, weights_hash
from fineline_jax.checkpoints.open import open_series
from fineline_jax.checkpoints.series import Series
from fineline_jax.errors import UserError
from fineline_jax.models.config import ModelConfig
from fineline_jax.scoring import scores
from fineline_jax.scoring.agreement import from_first
from fineline_jax.scoring.pack import Pack, load
from fineline_jax.scoring.scorer import (
    ENGINE,
    check_tokenizer_folder,
    model_context,
    pick_engine,
    recognised,
    score_params,
)


@dataclasses.dataclass(frozen=True)
class ScoreKept:
    """An `on_kept` of `training.loop.pretrain`: the score files are those that `fineline score RUN` would write."""

    run: Path
    config: ModelConfig
    pack: Pack
    out: Path
    dtype: str = "float32"

    def __call__(self, step: int, params: dict) -> Callable[[], None] | None:
        """Score the parameters where they are; writes when called again. None: the checkpoint is scored already."""
        if from_first(self._is_scored(step)):
            return None
        tokenizer = self.run / "tokenizer"
        if tokenizer.is_dir():
            check_tokenizer_folder(self.pack, tokenizer, str(self.run))
        mesh = jax.tree.leaves(params)[0].sharding.mesh
        start = time.perf_counter()
        with jax.set_mesh(mesh):
            cast = jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(self.dtype)), params)
        loglikelihood, is_greedy = score_params(self.pack, self.config, cast, mesh, self.dtype)
        seconds = time.perf_counter() - start

        def write() -> None:
            if jax.process_index() != 0:
                return
            opened = self._open(step)
            [checkpoint] = opened.checkpoints
            scores.keep_pack(self.out, self.pack)
            header = scores.Header(
                checkpoint.series,
                checkpoint.name,
                checkpoint.step,
                checkpoint.tokens,
                model_context(self.pack, self.config),
                self._key(weights_hash(checkpoint)),
                stat_signature(checkpoint),
                *pick_engine(self.config),
                opened.location,
            )
            scores.write(self.out, scores.Scores(header, loglikelihood, is_greedy))
            line = {"series": checkpoint.series, "checkpoint": checkpoint.name, "requests": len(loglikelihood)}
            scores.note(self.out, line | {"model_seconds": round(seconds, 3)})

        return write

    def _is_scored(self, step: int) -> bool:
        try:
            [checkpoint] = self._open(step).checkpoints
        except UserError:
            return False  # being written
        return recognised(scores.header_of(self.out, checkpoint.series, checkpoint.name), checkpoint, self._key)

    def _open(self, step: int) -> Series:
        """The series of this one checkpoint."""
        return open_series(str(self.run / "checkpoints" / str(step)))

    def _key(self, weights: str) -> scores.Key:
        return scores.Key(weights, self.pack.hash, self.dtype, self.pack.manifest["bos"], ENGINE)


def open_pack(score: str, tokenizer: Path, benchmarks: Path | None) -> Pack:
    """The request pack in the folder `score`, or the suite of that name with this tokenizer."""
    if (Path(score) / "manifest.json").is_file():
        return load(Path(score))
    from fineline_jax.scoring.build import build  # lm-eval takes seconds to import
    from fineline_jax.scoring.options import PackOptions

    if not tokenizer.is_dir():
        raise UserError(f"--score {score}: {tokenizer} is not there; give a pack made by `fineline tasks prepare`")
    return build(score, tokenizer, PackOptions(benchmarks))
