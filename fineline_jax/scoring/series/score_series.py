"""Scoring the checkpoints of series on a request pack, each once."""

import contextlib
import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fineline_jax import progress
from fineline_jax.checkpoints import load
from fineline_jax.checkpoints.series import Checkpoint, Series
from fineline_jax.errors import Incomplete, UserError
from fineline_jax.models.config import ModelConfig
from fineline_jax.multihost import broadcast_from_process_0, check_on_process_0, device_errors, writing_as_one
from fineline_jax.scoring import score_files
from fineline_jax.scoring.engine.dispatch import Scorer
from fineline_jax.scoring.engine.plan_table import chosen_requests
from fineline_jax.scoring.engine.rows import truncated
from fineline_jax.scoring.engine.scorer import ENGINE_VERSION, make_scorer, pick_engine
from fineline_jax.scoring.options import ScoreOptions
from fineline_jax.scoring.requests.pack import Pack
from fineline_jax.scoring.series.choice import Choice
from fineline_jax.scoring.series.compatibility import check_tokenizer, check_vocabulary, log_policy, model_context
from fineline_jax.scoring.series.prefetch import Failed, Opened, open_each
from fineline_jax.text_table import counted

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class SeriesScorer:
    """Scores series on one pack into the folder `out`, on one mesh; what it compiled for a config it keeps while the
    config is the same."""

    pack: Pack
    out: Path
    mesh: jax.sharding.Mesh
    options: ScoreOptions = dataclasses.field(default_factory=ScoreOptions)

    @device_errors("a smaller --batch-tokens, --dtype bfloat16, or a larger --mesh.fsdp or --mesh.tensor needs less")
    def __call__(self, series: Sequence[Series]) -> list[Path]:
        """Score every checkpoint of this process's part of each series that `out` has no scores of with the same key;
        returns all score files of the part, in the order of the series.

        The order is coarse to fine (`order`), so that the whole curve shows early; with `options.until == "resolved"`
        it ends where the curve does not change by more than its errors. The next checkpoint is opened while one is
        scored. One that cannot be opened is passed over; a `NotAllScored` at the end names it. Safe to interrupt and
        run again: finished checkpoints are recognised without reading their weights as long as the files have the same
        sizes and times. Raises UserError, with nothing written, if `out`
        holds scores of another pack or of another series of the same name, or an option cannot be; or if a
        checkpoint's tokenizer is not the pack's.
        """
        self.options.check()
        score_files.check_unique_names(series)
        series = merged(series)
        check_on_process_0(functools.partial(score_files.check_out, series, self.pack, self.out))
        shard = self.options.shard()
        files: list[Path] = []
        failed: list[Failed] = []
        broken: list[str] = []
        with contextlib.ExitStack() as stack:
            for one in series:
                folder = score_files.path_of(self.out, one.name, "").parent
                stack.enter_context(writing_as_one(folder, "--out", part=shard if shard.count > 1 else None))
            for position, one in enumerate(series):
                part = dataclasses.replace(one, checkpoints=tuple(shard.of(one.checkpoints, shift=position)))
                problems, left_out = _score_all(self, part)
                failed += problems
                broken += _without_metrics(self, part)
                names = [checkpoint.name for checkpoint in part.checkpoints if checkpoint not in left_out]
                files += [score_files.path_of(self.out, part.name, name) for name in names]
        if failed or broken:
            raise NotAllScored(failed, broken)
        return files

    @functools.cached_property
    def scorer_of(self) -> Callable[..., Scorer]:
        """The scorer for models of a config, of the requests that an earlier pack of this hash had not ("": of all).

        The last two are kept, so a series of one config makes each once."""
        return functools.lru_cache(maxsize=2)(self._make_scorer)

    def _make_scorer(self, config: ModelConfig, earlier: str = "") -> Scorer:
        options, context = self.options, model_context(self.pack, config)
        return make_scorer(
            chosen_requests(self.pack.request_tokens, self.new_rows(earlier)) if earlier else self.pack.request_tokens,
            config,
            self.mesh,
            options.dtype,
            context=context,
            batch_tokens=options.batch_tokens,
        )

    @functools.cached_property
    def new_rows(self) -> Callable[[str], np.ndarray]:
        """int [requests]: those that the earlier pack of this hash had not."""

        def rows(earlier: str) -> np.ndarray:
            known = score_files.earlier_rows(self.out, self.pack)[earlier].tolist() if _is_first() else None
            known = broadcast_from_process_0(known)
            return np.setdiff1d(np.arange(len(self.pack.request_tokens)), known)

        return functools.cache(rows)

    @functools.cached_property
    def keep_pack(self) -> Callable[[], None]:
        """Put the pack beside its scores, at the first call."""
        return functools.cache(functools.partial(score_files.keep_pack, self.out, self.pack))

    def key(self, weights_hash: str) -> score_files.Key:
        """The key of the scores that are made here of such weights."""
        return make_key(weights_hash, self.pack, self.options.dtype)


def merged(series: Sequence[Series]) -> list[Series]:
    """The series, those of one name as one with all their checkpoints, as of `run@step1 run@step5`."""
    together: dict[str, Series] = {}
    for one in series:
        first = together.setdefault(one.name, one)
        named = {each.name: each for each in (*first.checkpoints, *one.checkpoints)}
        if first is not one:
            ascending = sorted(named.values(), key=lambda each: (each.tokens or 0, each.step or 0))
            together[one.name] = dataclasses.replace(first, checkpoints=tuple(ascending))
    return list(together.values())


def make_key(weights_hash: str, pack: Pack, dtype: str) -> score_files.Key:
    """The key of scores that are made now."""
    return score_files.Key(weights_hash, pack.hash, dtype, pack.manifest["bos"], ENGINE_VERSION)


def make_header(
    series: Series, checkpoint: Checkpoint, config: ModelConfig, pack: Pack, key: score_files.Key, stat_signature: str
) -> score_files.Header:
    """The header of scores that are made now. series: that of `checkpoint`."""
    return score_files.Header(
        series.name,
        checkpoint.name,
        checkpoint.step,
        checkpoint.tokens,
        model_context(pack, config),
        key,
        stat_signature,
        *pick_engine(config),
        series.location,
    )


def is_scored(header: score_files.Header | None, checkpoint: Checkpoint, key: Callable[[str], score_files.Key]) -> bool:
    """Whether `header` is of this checkpoint's scores, as far as can be decided without reading its weights; key: of
    scores that would be made now of weights of such a hash."""
    if header is None or not header.stat_signature or header.key != key(header.key.weights_hash):
        return False
    try:
        return header.stat_signature == load.stat_signature(checkpoint)
    except (UserError, OSError):
        return False  # opening it will say why


def _score_all(job: SeriesScorer, series: Series) -> tuple[list[Failed], list[Checkpoint]]:
    """Score what is not scored yet; returns the checkpoints that could not be opened, and those that are left out
    because the curve does not change there."""
    if _is_first():
        log_policy(series, job.pack)
    finished, pending = _split(job, series)
    for checkpoint in finished:  # downloads that a killed run has left
        load.discard(checkpoint)
    asked = {one.name: len(job.pack.request_tokens) for one in series.checkpoints}
    if _is_first():
        headers = {one.name: score_files.header_of(job.out, series.name, one.name) for one in pending}
        asked |= {one.name: asked[one.name] - _asked_before(job, headers[one.name]) for one in pending}
    failed: list[Failed] = []
    clock = Clock()
    choice = Choice(series, finished, job.pack, job.out, job.options.until, job.options.shard())

    def is_new(checkpoint: Checkpoint, weights_hash: str) -> bool:
        header = score_files.header_of(job.out, series.name, checkpoint.name)
        return header is None or header.key != job.key(weights_hash)

    bar: contextlib.AbstractContextManager[progress.Advance] = contextlib.nullcontext(lambda amount, note="": None)
    if _is_first():
        total = sum(asked[one.name] for one in pending)
        bar = progress.bar(f"score {series.name}", total, "requests")
    with bar as advance:
        check = functools.partial(check_tokenizer, job.pack)
        opened_each = open_each(choice.next, job.mesh, job.options.dtype, is_new, check)
        for number, opened in enumerate(opened_each, start=1):
            note = (
                f"checkpoint {number} of {len(pending)}: {opened.checkpoint.name}{choice.fineness(opened.checkpoint)}"
            )
            if isinstance(opened, Failed):
                why = f": {opened.reason}" if len(failed) >= REASONS_SHOWN else ""  # the others are told at the end
                log.warning("%s/%s is passed over%s", series.name, opened.checkpoint.name, why)
                failed.append(opened)
                advance(asked[opened.checkpoint.name], note)
            elif opened.model is None:  # the same weights, elsewhere or with other times of change
                if _is_first():
                    scores = score_files.read(score_files.path_of(job.out, series.name, opened.checkpoint.name))
                    signature, location = opened.stat_signature, series.location
                    header = dataclasses.replace(scores.header, stat_signature=signature, location=location)
                    score_files.write(job.out, dataclasses.replace(scores, header=header))
                advance(asked[opened.checkpoint.name], note)
            else:
                _score_one(job, series, opened, opened.model, clock, advance, note)
            choice.add(opened.checkpoint, failed=opened.reason if isinstance(opened, Failed) else "")
        left_out = choice.left_out()
        advance(sum(asked[one.name] for one in left_out), "")
    if _is_first() and clock.score:
        log.info("%s: %s", series.name, clock)
    if _is_first() and left_out:
        log.info(
            "%s: %s not scored, where the scores on both sides differ by no more than their errors; --until all scores"
            " them",
            series.name,
            counted(len(left_out), "checkpoint"),
        )
    return failed, left_out


def _split(job: SeriesScorer, series: Series) -> tuple[list[Checkpoint], list[Checkpoint]]:
    """The checkpoints that are scored already, and the others: process 0 looks and all follow it."""
    names: list[str] = []
    if _is_first():
        headers = {one.name: score_files.header_of(job.out, series.name, one.name) for one in series.checkpoints}
        names = [one.name for one in series.checkpoints if is_scored(headers[one.name], one, job.key)]
    names = broadcast_from_process_0(names)
    finished = [checkpoint for checkpoint in series.checkpoints if checkpoint.name in names]
    return finished, [checkpoint for checkpoint in series.checkpoints if checkpoint.name not in names]


def _without_metrics(job: SeriesScorer, series: Series) -> list[str]:
    """The checkpoints of which some log-likelihood is not finite, also those scored before; process 0 looks."""
    names: list[str] = []
    if _is_first():
        headers = (score_files.header_of(job.out, series.name, one.name) for one in series.checkpoints)
        names = [f"{series.name}/{one.checkpoint}" for one in headers if one is not None and one.not_finite]
    return broadcast_from_process_0(names)


def _score_one(
    job: SeriesScorer,
    series: Series,
    opened: Opened,
    model: tuple[ModelConfig, dict[str, Any]],
    clock: "Clock",
    advance: progress.Advance,
    note: str,
) -> None:
    """Compute the scores of a checkpoint that is on the devices, and write them."""
    config, params = model
    name = f"{series.name}/{opened.checkpoint.name}"
    check_vocabulary(job.pack, config, name)
    context = model_context(job.pack, config)
    if cut := truncated(job.pack.request_tokens, context):
        note = f"{note}, {cut} requests cut to {context} tokens"
    advance(0, note)
    zeros = _zero_tensors(params, job.mesh)
    if zeros and _is_first():
        log.warning("%s: tensors of nothing but zeros: %s; see its weights", name, ", ".join(zeros))
    known = _scored_before(job, series, opened, context) if _is_first() else None
    earlier = broadcast_from_process_0("" if known is None else known.header.key.pack_hash)
    clock.start()
    begun = time.time()
    rows = job.new_rows(earlier) if earlier else np.arange(len(job.pack.request_tokens))
    found = job.scorer_of(config, earlier)(params, advance) if len(rows) else (np.zeros(0), np.zeros(0, bool))
    seconds = clock.stop()
    loglikelihood, is_greedy = found
    if known is not None:
        loglikelihood, is_greedy = known.loglikelihood, known.is_greedy
        loglikelihood[rows], is_greedy[rows] = found
    if wrong := int((~np.isfinite(loglikelihood)).sum()):
        log.warning("%s: %d log-likelihoods are no numbers; see its weights", name, wrong)
    if not _is_first():
        return
    key = job.key(opened.weights_hash)
    header = make_header(series, opened.checkpoint, config, job.pack, key, opened.stat_signature)
    job.keep_pack()  # with the first scores and not before: a command that fails leaves no folder
    score_files.write(job.out, score_files.Scores(header, loglikelihood, is_greedy))
    line = {"series": series.name, "checkpoint": opened.checkpoint.name, "requests": len(rows)}
    score_files.note(job.out, line | seconds | {"opened": opened.times, "scored": (begun, time.time())})


def _asked_before(job: SeriesScorer, header: score_files.Header | None) -> int:
    """How many requests an earlier pack has asked of the checkpoint of a score file, in the same way."""
    if header is None or header.not_finite:
        return 0
    if dataclasses.replace(header.key, pack_hash=job.pack.hash) != job.key(header.key.weights_hash):
        return 0
    return len(score_files.earlier_rows(job.out, job.pack).get(header.key.pack_hash, ()))


def _scored_before(job: SeriesScorer, series: Series, opened: Opened, context: int) -> score_files.Scores | None:
    """What an earlier pack has asked of these weights, in the order of this one; None: nothing that counts."""
    header = score_files.header_of(job.out, series.name, opened.checkpoint.name)
    if header is None or header.context != context or header.key.weights_hash != opened.weights_hash:
        return None
    if not _asked_before(job, header):
        return None
    return score_files.read_for(score_files.path_of(job.out, series.name, opened.checkpoint.name), job.pack)


def _zero_tensors(params: dict[str, Any], mesh: jax.sharding.Mesh) -> list[str]:
    """Names of parameters that are 0 everywhere, of stacked layers as name[layer]: the checkpoint was saved wrongly or
    before it was filled. Biases, which begin as zeros, are not looked at. All processes call it."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    with jax.set_mesh(mesh):
        zero = _are_zero({name: leaf for name, leaf in named.items() if "bias" not in name})
    return [
        f"{name}[{layer}]" if _is_stacked(name) else name
        for name, values in zero.items()
        for layer in np.flatnonzero(np.atleast_1d(np.asarray(values)))
    ]


@jax.jit
def _are_zero(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: jnp.all(leaf == 0, axis=tuple(range(_is_stacked(name), leaf.ndim))) for name, leaf in leaves.items()}


def _is_stacked(name: str) -> bool:
    return name.partition(".")[0].endswith("layers")


def _is_first() -> bool:
    return jax.process_index() == 0


REASONS_SHOWN = 8
"""In the last line; the log has them all."""


class NotAllScored(Incomplete):
    """Some checkpoints could not be opened, or have no metrics (`broken`, their names); all others are scored."""

    def __init__(self, failed: Sequence[Failed], broken: Sequence[str] = ()):
        self.failed = tuple(failed)
        names = [f"{one.checkpoint.series}/{one.checkpoint.name}" for one in failed]
        reasons = [f" ({one.reason})" for one in failed[:REASONS_SHOWN]] + [""] * len(failed[REASONS_SHOWN:])
        parts = []
        if failed:
            listed = "; ".join(map(str.__add__, names, reasons))
            parts = [f"{counted(len(failed), 'checkpoint')} could not be opened: {listed}"]
        if broken:
            parts += [f"log-likelihoods are NaN or infinite, so there are no metrics: {', '.join(broken)}"]
        super().__init__(
            f"{'; '.join(parts)}; all others are scored, repair what is damaged and run the same command again"
        )


class Clock:
    """Time in the model against all other time, such as waiting for weights."""

    def __init__(self) -> None:
        self.score = self.other = 0.0
        self.checkpoints = 0
        self._mark = time.perf_counter()

    def start(self) -> None:
        """The model begins."""
        self._other, self._mark = self._lap()

    def stop(self) -> dict[str, float]:
        """The model has ended; what this checkpoint took: in the model, and all else since the one before it."""
        score, self._mark = self._lap()
        self.score, self.other, self.checkpoints = self.score + score, self.other + self._other, self.checkpoints + 1
        return {"model_seconds": round(score, 3), "other_seconds": round(self._other, 3)}

    def __str__(self) -> str:
        total = self.score + self.other
        outside = f"{self.other / total:.1%} of it outside the model"
        scored = counted(self.checkpoints, "checkpoint")
        return f"{scored} scored in {progress.duration(total)}, {outside}"

    def _lap(self) -> tuple[float, float]:
        now = time.perf_counter()
        return now - self._mark, now
