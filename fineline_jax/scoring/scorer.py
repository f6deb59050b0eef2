"""Scoring a checkpoint, and a series of them, on a request pack."""

import contextlib
import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from fineline_jax import progress
from fineline_jax.checkpoints import series as checkpoint_series
from fineline_jax.checkpoints.series import Checkpoint, Series
from fineline_jax.errors import UserError
from fineline_jax.models import attention
from fineline_jax.models.config import ModelConfig
from fineline_jax.scoring import scores
from fineline_jax.scoring.agreement import from_first
from fineline_jax.scoring.apart import check_out, require_names_apart
from fineline_jax.scoring.opening import Failed, open_each
from fineline_jax.scoring.pack import Pack
from fineline_jax.scoring.parts import WHOLE, JobShard
from fineline_jax.scoring.row_engine import score_rows
from fineline_jax.scoring.rows import truncated
from fineline_jax.tokenizers.identity import identity
from fineline_jax.tokenizers.open import open_tokenizer
from fineline_jax.scoring.tree_engine import score_tree

log = logging.getLogger(__name__)

ENGINE = "tree-5"
"""Changes when the numbers may change."""


def score_params(
    pack: Pack,
    config: ModelConfig,
    params: dict,
    mesh: jax.sharding.Mesh,
    dtype: str = "float32",
    *,
    engine: Literal["auto", "tree", "rows"] = "auto",
    batch_tokens: int | None = None,
    attend: attention.Implementation = "auto",
    advance: Callable[[int], None] = lambda requests: None,
) -> tuple[np.ndarray, np.ndarray]:
    """Log-likelihood (float64) and greediness (bool) of every request of `pack` under a model.

    params: of `config`, sharded over `mesh`. dtype: of the matrix products; the softmax is float32. engine: tree
    computes no token twice; rows is the plain one, with the attention `attend`; auto: see `pick_engine`. batch_tokens:
    tokens per step over all devices, None: chosen for the devices. advance: told the requests done.
    Raises UserError if the pack holds a token outside the vocabulary, or the engine cannot compute the model.
    """
    if pack.largest_token >= config.vocab_size:
        raise UserError(
            f"the pack holds token {pack.largest_token}, the model has {config.vocab_size};"
            " prepare the pack with the model's own tokenizer"
        )
    check_batch_tokens(batch_tokens)
    context = model_context(pack, config)
    best, why = pick_engine(config)
    if engine == "tree" and best == "rows":
        raise UserError(f"engine='tree' cannot compute this model: {why}; use 'auto'")
    if engine == "rows" or best == "rows":
        return score_rows(
            pack, config, params, context, mesh, dtype, batch_tokens=batch_tokens, attend=attend, advance=advance
        )
    return score_tree(pack, config, params, context, mesh, dtype, batch_tokens=batch_tokens, advance=advance)


def pick_engine(config: ModelConfig) -> tuple[Literal["tree", "rows"], str]:
    """The fastest engine that computes the model, and why it is not the tree."""
    if config.mixer == "mamba":
        return "rows", "a state-space layer carries one state along a row, so a row can hold one request only"
    return "tree", ""


def score_series(
    series: Series,
    pack: Pack,
    out: Path,
    mesh: jax.sharding.Mesh,
    dtype: str = "float32",
    *,
    batch_tokens: int | None = None,
) -> list[Path]:
    """`score_parts` of one whole series."""
    return score_parts([series], pack, out, mesh, dtype, batch_tokens=batch_tokens)


def score_parts(
    series: Sequence[Series],
    pack: Pack,
    out: Path,
    mesh: jax.sharding.Mesh,
    dtype: str = "float32",
    *,
    part: JobShard = WHOLE,
    batch_tokens: int | None = None,
) -> list[Path]:
    """Score every checkpoint of this part of each series that `out` has no scores of with the same key; returns all
    score files of the part.

    The next checkpoint is opened while one is scored. One that cannot be opened is passed over; a `NotAllScored` at the
    end names it. Safe to interrupt and run again: finished checkpoints are recognised without reading their weights
    as long as the files have the same sizes and times. Raises UserError, with nothing written, if `out` holds scores of
    another pack or of another series of the same name, or an option cannot be; or if a checkpoint's tokenizer is not
    the pack's.
    """
    check_batch_tokens(batch_tokens)
    require_names_apart(series)
    _on_first(functools.partial(check_out, series, pack, out))
    found: list[Path] = []
    failed: list[Failed] = []
    for place, one in enumerate(series):
        mine = dataclasses.replace(one, checkpoints=tuple(part.of(one.checkpoints, shift=place)))
        try:
            found += _score_series(mine, pack, out, mesh, dtype, batch_tokens)
        except NotAllScored as error:
            failed += error.failed
    if failed:
        raise NotAllScored(failed)
    return found


def _score_series(
    series: Series, pack: Pack, out: Path, mesh: jax.sharding.Mesh, dtype: str, batch_tokens: int | None
) -> list[Path]:
    first = jax.process_index() == 0
    if first:
        tell_policy(series, pack)
    named = {checkpoint.name: checkpoint for checkpoint in series.checkpoints}
    header_of = functools.partial(scores.header_of, out, series.name)
    key = functools.partial(scores.Key, pack=pack.hash, dtype=dtype, bos=pack.manifest["bos"], engine=ENGINE)
    done = [name for name, checkpoint in named.items() if first and recognised(header_of(name), checkpoint, key)]
    done = set(from_first(done))
    pending = [checkpoint for name, checkpoint in named.items() if name not in done]
    for name in done:  # what a run that was killed has left
        checkpoint_series.discard(named[name])

    def is_new(checkpoint: Checkpoint, weights: str) -> bool:
        header = header_of(checkpoint.name)
        return header is None or header.key != key(weights=weights)

    requests = pack.requests.num_rows
    failed: list[Failed] = []
    keep_pack = functools.cache(functools.partial(scores.keep_pack, out, pack))
    clock = Clock()
    with _bar(f"score {series.name}", len(named) * requests, done=len(done) * requests) as advance:
        check = functools.partial(check_tokenizer, pack)
        for place, opened in enumerate(open_each(pending, mesh, dtype, is_new, check), start=1):
            checkpoint = opened.checkpoint
            note = f"checkpoint {place} of {len(pending)}: {checkpoint.name}"
            if isinstance(opened, Failed):
                log.warning("%s/%s is passed over: %s", series.name, checkpoint.name, opened.reason)
                failed.append(opened)
                advance(requests, note)
                continue
            if opened.model is None:  # the same weights, with other times of change
                if first:
                    _renew_version(out, series, checkpoint.name, opened.version)
                advance(requests, note)
                continue
            config, params = opened.model
            check_vocabulary(pack, config, f"{series.name}/{checkpoint.name}")
            context = model_context(pack, config)
            if cut := truncated(pack, context):
                note = f"{note}, {cut} requests cut to {context} tokens"
            advance(0, note)
            clock.start()
            found = score_params(pack, config, params, mesh, dtype, batch_tokens=batch_tokens, advance=advance)
            seconds = clock.stop()
            if wrong := int((~np.isfinite(found[0])).sum()):
                log.warning(
                    "%s/%s: %d log-likelihoods are no numbers; see its weights", series.name, checkpoint.name, wrong
                )
            if first:
                identity = (series.name, checkpoint.name, checkpoint.step, checkpoint.tokens)
                header = scores.Header(
                    *identity,
                    context,
                    key(weights=opened.weights),
                    opened.version,
                    *pick_engine(config),
                    series.location,
                )
                keep_pack()  # with the first scores and not before: a command that fails leaves no folder
                scores.write(out, scores.Scores(header, *found))
                scores.note(
                    out, {"series": series.name, "checkpoint": checkpoint.name, "requests": requests, **seconds}
                )
    if first and clock.score:
        log.info("%s: %s", series.name, clock)
    if failed:
        raise NotAllScored(failed)
    return [scores.path_of(out, series.name, name) for name in named]


def check_batch_tokens(batch_tokens: int | None) -> None:
    """Raise UserError if no step can have so few tokens."""
    if batch_tokens is not None and batch_tokens < 1:
        raise UserError(f"--batch-tokens {batch_tokens} must be at least 1; leave it out for one that fits the devices")


def _on_first(check: Callable[[], None]) -> None:
    """Run `check` on process 0; a UserError of it is raised by all."""
    said = ""
    if jax.process_index() == 0:
        try:
            check()
        except UserError as error:
            said = str(error)
    said = from_first(said)
    if said:
        raise UserError(said)


REASONS_TOLD = 8
"""In the last line; the log has them all."""


class NotAllScored(UserError):
    """Some checkpoints could not be opened; all others are scored."""

    exit_status = 1

    def __init__(self, failed: Sequence[Failed]):
        self.failed = tuple(failed)
        names = [f"{found.checkpoint.series}/{found.checkpoint.name}" for found in failed]
        places = [f"{name} ({found.reason})" for name, found in zip(names[:REASONS_TOLD], failed)] + names[
            REASONS_TOLD:
        ]
        super().__init__(
            f"{'1 checkpoint' if len(failed) == 1 else f'{len(failed)} checkpoints'} could not be opened:"
            f" {'; '.join(places)}; all others are scored, mend what is damaged and"
            " run the same command again"
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
        scored = progress.counted(self.checkpoints, "checkpoint")
        return f"{scored} scored in {progress.duration(total)}, {outside}"

    def _lap(self) -> tuple[float, float]:
        now = time.perf_counter()
        return now - self._mark, now


def recognised(header: scores.Header | None, checkpoint: Checkpoint, key: Callable[..., scores.Key]) -> bool:
    """Whether these are the checkpoint's scores, as far as can be told without reading its weights."""
    if header is None or not header.version or header.key != key(weights=header.key.weights):
        return False
    try:
        return header.version == checkpoint_series.version(checkpoint)
    except (UserError, OSError):
        return False  # opening it will tell why


def _renew_version(out: Path, series: Series, checkpoint: str, version: str) -> None:
    found = scores.read(scores.path_of(out, series.name, checkpoint))
    header = dataclasses.replace(found.header, version=version, location=series.location)
    scores.write(out, dataclasses.replace(found, header=header))


def _bar(name: str, total: int, done: int) -> contextlib.AbstractContextManager[progress.Advance]:
    """On process 0 only."""
    if jax.process_index() != 0:
        return contextlib.nullcontext(lambda amount, note="": None)
    return progress.bar(name, total, "requests", done=done)


def tell_policy(series: Series, pack: Pack) -> None:
    """Log what a reader of the numbers must know, and where the pack is not what the registry entry wants."""
    for note in series.scoring.notes:
        log.info("%s: %s", series.name, note)
    wanted, asked = series.scoring.bos, pack.manifest["bos"]
    if asked == "auto":
        asked = "always" if pack.manifest["tokenizer"]["adds_bos"] else "never"
    if wanted not in ("auto", asked):
        log.warning("%s: its entry wants --bos %s, the pack has --bos %s", series.name, wanted, asked)


def model_context(pack: Pack, config: ModelConfig) -> int:
    """Tokens the model reads: what the pack was prepared with, else the model's context.

    OLMES cuts at 2048, so there the smaller of the two; elsewhere it is the user's word, as lm-eval's max_length.
    """
    asked = pack.manifest["max_context"]
    if pack.manifest["mode"] == "olmes":
        return min(asked, config.context)
    return asked or config.context


def check_vocabulary(pack: Pack, config: ModelConfig, name: str) -> None:
    """Raise UserError if the pack's tokenizer has ids that the embedding of the model `name` has no row for."""
    size = pack.manifest["tokenizer"]["size"]
    if size > config.vocab_size:
        raise UserError(
            f"{name}: the tokenizer has {size} ids, the embedding {config.vocab_size} rows; prepare the pack with the"
            " tokenizer the model was trained with"
        )


def check_tokenizer(pack: Pack, checkpoint: Checkpoint) -> None:
    """Raise UserError if the checkpoint comes with another tokenizer than the pack was made with.

    A checkpoint without a tokenizer passes; its vocabulary size is checked when it is scored.
    """
    folder = checkpoint_series.tokenizer_folder(checkpoint)
    if folder is not None:
        check_tokenizer_folder(pack, folder, f"{checkpoint.series}/{checkpoint.name}")


def check_tokenizer_folder(pack: Pack, folder: Path, name: str) -> None:
    """Raise UserError if the tokenizer in `folder`, which `name` uses, is another than the pack was made with."""
    theirs, ours = _identity(folder), pack.manifest["tokenizer"]
    if theirs.tokenizer_hash != ours["tokenizer_hash"]:
        raise UserError(
            f"the tokenizer of {name} ({folder}) is not the one the pack was prepared with;"
            f" run `fineline tasks prepare {pack.manifest['suite']} --tokenizer {folder}`"
        )
    if pack.manifest["bos"] == "auto" and theirs.adds_bos != ours["adds_bos"]:
        raise UserError(
            f"the tokenizer of {name} {'adds' if theirs.adds_bos else 'does not add'} BOS by default, that of the pack"
            f" {'does' if ours['adds_bos'] else 'does not'}; prepare the pack with --bos always or --bos never"
        )


@functools.lru_cache(maxsize=8)
def _identity(folder: Path) -> Any:
    return identity(open_tokenizer(folder))
