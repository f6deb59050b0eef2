"""Scoring a checkpoint, and a series of them, on a request pack.

The plain engine: every request in a row of its own. It is the reference for faster ones.
"""

import collections
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fineline_jax import progress
from fineline_jax.checkpoints import series as checkpoint_series
from fineline_jax.checkpoints.series import Checkpoint, Series
from fineline_jax.errors import UserError
from fineline_jax.mesh import BATCH, batch_shards
from fineline_jax.models import attention
from fineline_jax.models.config import ModelConfig
from fineline_jax.scoring import scores
from fineline_jax.scoring.forward import score_step
from fineline_jax.scoring.pack import Pack
from fineline_jax.scoring.rows import Batch, batches, sequences, truncated
from fineline_jax.scoring.tokenizer import identity, open_tokenizer

ENGINE = "rows-1"
"""Changes when the numbers may change."""
IN_FLIGHT = 4
"""Batches given to the device before the oldest result is read."""


def score_params(
    pack: Pack,
    config: ModelConfig,
    params: dict,
    mesh: jax.sharding.Mesh,
    dtype: str = "float32",
    *,
    batch_tokens: int | None = None,
    attend: attention.Implementation = "auto",
    advance: Callable[[int], None] = lambda requests: None,
) -> tuple[np.ndarray, np.ndarray]:
    """Log-likelihood (float64) and greediness (bool) of every request of `pack` under a model.

    params: of `config`, sharded over `mesh`. dtype: of the matrix products; the softmax is float32. batch_tokens:
    tokens per step over all devices, None: 4096 on CPU, else 32768 per device. advance: told the requests done.
    Raises UserError if the pack holds a token outside the vocabulary.
    """
    if pack.largest_token >= config.vocab_size:
        raise UserError(
            f"the pack holds token {pack.largest_token}, the model has {config.vocab_size};"
            " prepare the pack with the model's own tokenizer"
        )
    platform = mesh.devices.flat[0].platform
    step = score_step(config, mesh, dtype, attention.pick(attend, jnp.dtype(dtype), platform))
    loglikelihood = np.zeros(pack.requests.num_rows, np.float64)
    is_greedy = np.ones(pack.requests.num_rows, bool)
    waiting: collections.deque[tuple[Batch, jax.Array, jax.Array]] = collections.deque()
    plan = _plan(pack, model_context(pack, config), batch_tokens, mesh)
    rows_left = np.bincount(np.concatenate([batch.requests for batch in plan]), minlength=len(is_greedy))

    def collect() -> None:
        batch, logp, greedy = waiting.popleft()
        used = len(batch.requests)
        # a long document is several rows
        np.add.at(loglikelihood, batch.requests, np.asarray(logp)[:used].sum(axis=1, dtype=np.float64))
        np.logical_and.at(is_greedy, batch.requests, np.asarray(greedy)[:used].all(axis=1))
        np.subtract.at(rows_left, batch.requests, 1)
        advance(int((rows_left[np.unique(batch.requests)] == 0).sum()))

    with jax.set_mesh(mesh):
        sharding = jax.NamedSharding(mesh, jax.P(BATCH, None))
        for batch in plan:
            inputs = [_put(array, sharding) for array in (batch.tokens, batch.positions, batch.targets)]
            waiting.append((batch, *step(params, *inputs)))
            if len(waiting) > IN_FLIGHT:
                collect()
        while waiting:
            collect()
    return loglikelihood, is_greedy


def score_series(
    series: Series,
    pack: Pack,
    out: Path,
    mesh: jax.sharding.Mesh,
    dtype: str = "float32",
    *,
    batch_tokens: int | None = None,
    attend: attention.Implementation = "auto",
) -> list[Path]:
    """Score every checkpoint of `series` that `out` has no scores of with the same key; returns all score files.

    Safe to interrupt and run again. Raises UserError if `out` holds scores of another pack or a checkpoint's tokenizer
    is not the pack's.
    """
    if jax.process_index() == 0:
        scores.keep_pack(out, pack)
    keys = [scores.Key(weights, pack.hash, dtype, pack.manifest["bos"], ENGINE) for weights in _identities(series)]
    pending = [
        (checkpoint, key)
        for checkpoint, key in zip(series.checkpoints, keys, strict=True)
        if not scores.finished(out, series.name, checkpoint.name, key)
    ]
    requests = pack.requests.num_rows
    name = f"score {series.name}"
    total, kept = len(keys) * requests, (len(keys) - len(pending)) * requests
    with progress.bar(name, total, "requests", done=kept) as advance:
        for checkpoint, key in pending:
            check_tokenizer(pack, checkpoint)
            config, params = checkpoint_series.load(checkpoint, mesh, jnp.dtype(dtype))
            context = model_context(pack, config)
            cut = truncated(pack, context)
            note = f"{checkpoint.name}, {cut} requests cut to {context} tokens" if cut else checkpoint.name
            advance(0, note)
            loglikelihood, is_greedy = score_params(
                pack, config, params, mesh, dtype, batch_tokens=batch_tokens, attend=attend, advance=advance
            )
            header = scores.Header(series.name, checkpoint.name, checkpoint.step, checkpoint.tokens, context, key)
            if jax.process_index() == 0:
                scores.write(out, scores.Scores(header, loglikelihood, is_greedy))
    return [scores.path_of(out, series.name, checkpoint.name) for checkpoint in series.checkpoints]


def _identities(series: Series) -> list[str]:
    """The weights' hashes, with a bar, since all weights are read. Those never scored are hashed too: their hash is
    written beside their scores."""
    with progress.bar(f"compare weights of {series.name}", len(series.checkpoints), "checkpoints") as advance:
        found = []
        for checkpoint in series.checkpoints:
            found.append(checkpoint_series.identity(checkpoint))
            advance(1)
    return found


def model_context(pack: Pack, config: ModelConfig) -> int:
    """Tokens a row may hold: what the pack was prepared with, else the model's context."""
    return pack.manifest["max_context"] or config.context


def check_tokenizer(pack: Pack, checkpoint: Checkpoint) -> None:
    """Raise UserError if the checkpoint comes with another tokenizer than the pack was made with.

    A checkpoint without a tokenizer passes; its vocabulary size is checked when it is scored.
    """
    folder = checkpoint_series.tokenizer_folder(checkpoint)
    if folder is None:
        return
    theirs, ours = _identity(folder), pack.manifest["tokenizer"]
    name = f"{checkpoint.series}/{checkpoint.name}"
    if theirs.sha256 != ours["sha256"]:
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


# The plan is the same for every checkpoint; one is kept so that a series does not make it again.
_plans: dict[tuple[str, int, int, int, int], list[Batch]] = {}


def _plan(pack: Pack, context: int, batch_tokens: int | None, mesh: jax.sharding.Mesh) -> list[Batch]:
    accelerator = mesh.devices.flat[0].platform != "cpu"
    tokens = batch_tokens or (32768 * mesh.devices.size if accelerator else 4096)
    least = 128 if accelerator else 32  # kernels want whole tiles
    key = (pack.hash, context, tokens, batch_shards(mesh), least)
    if key not in _plans:
        _plans.clear()
        _plans[key] = batches(list(sequences(pack, context)), tokens, batch_shards(mesh), least)
    return _plans[key]


def _put(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """Every process holds the whole batch and gives its devices their rows."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
