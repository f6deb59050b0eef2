"""Scoring the kept checkpoints of a run in memory, while it trains."""

import dataclasses
import functools
import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from fineline_jax.checkpoints.load import stat_signature, weights_hash
from fineline_jax.checkpoints.open import open_series
from fineline_jax.checkpoints.series import Series
from fineline_jax.errors import UserError
from fineline_jax.models.config import ModelConfig
from fineline_jax.multihost import broadcast_from_process_0
from fineline_jax.recipe import Recipe
from fineline_jax.scoring import score_files
from fineline_jax.scoring.engine.dispatch import Scorer
from fineline_jax.scoring.engine.scorer import make_scorer
from fineline_jax.scoring.requests.pack import Pack, load
from fineline_jax.scoring.requests.suite import Suite, open_suite
from fineline_jax.scoring.series.compatibility import check_tokenizer_folder, check_vocabulary, model_context
from fineline_jax.scoring.series.score_series import is_scored, make_header, make_key


@dataclasses.dataclass(frozen=True)
class ScoreInTraining:
    """For `training.observers.AtKeptCheckpoints`: the score files are those that `fineline score RUN` would write."""

    run: Path
    config: ModelConfig
    pack: Pack
    out: Path
    dtype: str = "float32"
    initial: dict[str, tuple[np.ndarray, np.ndarray]] = dataclasses.field(default_factory=dict)
    """SHA-256 of the weights at step 0 -> their scores, in all of `of_run`: runs of one seed begin with the same."""

    def __call__(self, step: int, params: dict, wait: Callable[[], None]) -> None:
        """Score the parameters where they are, unless that is done; written when `wait()` says that the checkpoint is
        complete."""
        if broadcast_from_process_0(self._is_scored(step)):
            return
        tokenizer = self.run / "tokenizer"
        if tokenizer.is_dir():
            check_tokenizer_folder(self.pack, tokenizer, str(self.run))
        mesh = jax.tree.leaves(params)[0].sharding.mesh
        start = time.perf_counter()
        digest = _digest(params) if step == 0 and jax.process_count() == 1 else ""
        if digest not in self.initial:
            with jax.set_mesh(mesh):
                cast = jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(self.dtype)), params)
            self.initial[digest] = self.scorer_on(mesh)(cast)
        loglikelihood, is_greedy = self.initial[digest] if digest else self.initial.pop(digest)
        seconds = time.perf_counter() - start
        wait()
        if jax.process_index() != 0:
            return
        opened = self._open(step)
        [checkpoint] = opened.checkpoints
        self._keep_pack()
        key = self._key(weights_hash(checkpoint))
        header = make_header(opened, checkpoint, self.config, self.pack, key, stat_signature(checkpoint))
        score_files.write(self.out, score_files.Scores(header, loglikelihood, is_greedy))
        line = {"series": checkpoint.series, "checkpoint": checkpoint.name, "requests": len(loglikelihood)}
        score_files.note(self.out, line | {"model_seconds": round(seconds, 3)})

    def of_run(self, run: Path) -> "ScoreInTraining":
        """The same for another run of this model, with the scorer that is compiled here."""
        other = dataclasses.replace(self, run=run)
        other.__dict__["scorer_on"] = self.scorer_on
        return other

    def _is_scored(self, step: int) -> bool:
        if not (self.run / "checkpoints" / str(step)).is_dir():
            return False
        try:
            [checkpoint] = self._open(step).checkpoints
        except UserError:
            return False  # being written
        return is_scored(score_files.header_of(self.out, checkpoint.series, checkpoint.name), checkpoint, self._key)

    def _open(self, step: int) -> Series:
        """The series of this one checkpoint."""
        return open_series(str(self.run / "checkpoints" / str(step)))

    @functools.cached_property
    def _keep_pack(self) -> Callable[[], None]:
        """Compares it with the one that is there, whose every byte is read, once for each run."""
        return functools.cache(functools.partial(score_files.keep_pack, self.out, self.pack))

    def _key(self, weights_hash: str) -> score_files.Key:
        return make_key(weights_hash, self.pack, self.dtype)

    @functools.cached_property
    def scorer_on(self) -> Callable[[jax.sharding.Mesh], Scorer]:
        """The scorer of the model on a mesh. The last one is kept: a run makes it once."""
        return functools.lru_cache(maxsize=1)(self._make_scorer)

    def _make_scorer(self, mesh: jax.sharding.Mesh) -> Scorer:
        context = model_context(self.pack, self.config)
        return make_scorer(self.pack.request_tokens, self.config, mesh, self.dtype, context=context)


def _digest(params: dict) -> str:
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(np.ascontiguousarray(jax.device_get(leaf)).tobytes())
    return digest.hexdigest()


def check_pack(pack: Pack, recipe: Recipe) -> None:
    """Raise UserError, before the first step, if a model of `recipe` cannot be asked the requests of `pack`."""
    source = recipe.data.sources[0]
    if source.tokenizer.is_dir():
        check_tokenizer_folder(pack, source.tokenizer, source.path)
    check_vocabulary(pack, recipe.model, f"recipe {recipe.name}")


def with_own_tasks(score: str, include_path: str | os.PathLike[str] | None) -> str | Suite:
    """The suite `score`, which may name the tasks of a folder. Raises UserError for a pack, which has its tasks."""
    if include_path is None:
        return score
    if _is_pack(score):
        raise UserError(f"--include-path went into --score {score} when that was prepared; give it with a suite only")
    suite = open_suite(score)
    return dataclasses.replace(suite, include_path=(*suite.include_path, Path(include_path)))


def _is_pack(score: str) -> bool:
    return (Path(score) / "manifest.json").is_file()


def open_pack(score: str | Suite, tokenizer: Path, benchmarks: Path | None) -> Pack:
    """The request pack in the folder `score`, or the suite of that name with this tokenizer."""
    if isinstance(score, str) and _is_pack(score):
        return load(Path(score))
    from fineline_jax.scoring.options import PackOptions
    from fineline_jax.scoring.requests.build import build  # lm-eval takes seconds to import

    if not tokenizer.is_dir():
        raise UserError(f"--score {score}: {tokenizer} is not there; give a pack made by `fineline tasks prepare`")
    return build(score, tokenizer, PackOptions(benchmarks))
