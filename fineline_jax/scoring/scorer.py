"""Scoring a checkpoint, and a series of them, on a request pack."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from fineline_jax import progress
from fineline_jax.checkpoints import series as checkpoint_series
from fineline_jax.checkpoints.series import Checkpoint, Series
from fineline_jax.errors import UserError
from fineline_jax.models import attention
from fineline_jax.models.config import ModelConfig
from fineline_jax.scoring import scores
from fineline_jax.scoring.pack import Pack
from fineline_jax.scoring.row_engine import score_rows
from fineline_jax.scoring.rows import truncated
from fineline_jax.scoring.tokenizer import identity, open_tokenizer
from fineline_jax.scoring.tree_engine import score_tree

ENGINE = "tree-1"
"""Changes when the numbers may change."""


def score_params(
    pack: Pack,
    config: ModelConfig,
    params: dict,
    mesh: jax.sharding.Mesh,
    dtype: str = "float32",
    *,
    engine: Literal["tree", "rows"] = "tree",
    batch_tokens: int | None = None,
    attend: attention.Implementation = "auto",
    advance: Callable[[int], None] = lambda requests: None,
) -> tuple[np.ndarray, np.ndarray]:
    """Log-likelihood (float64) and greediness (bool) of every request of `pack` under a model.

    params: of `config`, sharded over `mesh`. dtype: of the matrix products; the softmax is float32. engine: tree
    computes no token twice; rows is the plain one, with the attention `attend`. batch_tokens: tokens per step over all
    devices, None: chosen for the devices. advance: told the requests done.
    Raises UserError if the pack holds a token outside the vocabulary.
    """
    if pack.largest_token >= config.vocab_size:
        raise UserError(
            f"the pack holds token {pack.largest_token}, the model has {config.vocab_size};"
            " prepare the pack with the model's own tokenizer"
        )
    context = model_context(pack, config)
    if engine == "rows":
        return score_rows(
            pack, config, params, context, mesh, dtype, batch_tokens=batch_tokens, attend=attend, advance=advance
        )
    return score_tree(pack, config, params, context, mesh, dtype, batch_tokens=batch_tokens, advance=advance)


def score_series(
    series: Series,
    pack: Pack,
    out: Path,
    mesh: jax.sharding.Mesh,
    dtype: str = "float32",
    *,
    batch_tokens: int | None = None,
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
                pack, config, params, mesh, dtype, batch_tokens=batch_tokens, advance=advance
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
