"""A scorer: all requests planned and the model's steps compiled once, for any parameters of one config."""

from typing import Literal

import jax

from fineline_jax.errors import UserError
from fineline_jax.models import attention
from fineline_jax.models.config import ModelConfig
from fineline_jax.scoring.engine.dispatch import Scorer
from fineline_jax.scoring.engine.row_engine import make_row_scorer
from fineline_jax.scoring.engine.tree_engine import make_tree_scorer
from fineline_jax.scoring.options import check_batch_tokens
from fineline_jax.scoring.requests.pack import RequestTokens

ENGINE_VERSION = "tree-5"
"""Changes when the numbers may change."""


def make_scorer(
    requests: RequestTokens,
    config: ModelConfig,
    mesh: jax.sharding.Mesh,
    dtype: str = "float32",
    *,
    context: int | None = None,
    engine: Literal["auto", "tree", "rows"] = "auto",
    batch_tokens: int | None = None,
    attend: attention.Implementation = "auto",
) -> Scorer:
    """scorer(params) -> (loglikelihood float64 [requests], is_greedy bool [requests]), for parameters of `config` that
    are sharded over `mesh`.

    dtype: of the matrix products; the softmax is float32. context: tokens the model reads, None: those of `config`.
    engine: tree computes no token twice; rows is the plain one, with the attention `attend`; auto: see `pick_engine`.
    batch_tokens: tokens per step over all devices, None: chosen for the devices.
    Raises UserError if a request holds a token outside the vocabulary, or the engine cannot compute the model.
    """
    if requests.largest_token >= config.vocab_size:
        raise UserError(
            f"the pack holds token {requests.largest_token}, the model has {config.vocab_size};"
            " prepare the pack with the model's own tokenizer"
        )
    check_batch_tokens(batch_tokens)
    context = context or config.context
    if context > config.context and (config.positions == "learned" or config.rope_scaling.kind == "dynamic"):
        raise UserError(
            f"requests of up to {context} tokens: the positions of this model end at {config.context};"
            f" prepare the pack for a context of at most {config.context}"
        )
    best, why = pick_engine(config)
    if engine == "tree" and best == "rows":
        raise UserError(f"engine='tree' cannot compute this model: {why}; use 'auto'")
    if engine == "rows" or best == "rows":
        return make_row_scorer(requests, config, context, mesh, dtype, batch_tokens=batch_tokens, attend=attend)
    return make_tree_scorer(requests, config, context, mesh, dtype, batch_tokens=batch_tokens)


def pick_engine(config: ModelConfig) -> tuple[Literal["tree", "rows"], str]:
    """The fastest engine that computes the model, and why it is not the tree."""
    if config.mixer != "attention":
        return "rows", "a recurrent layer carries one state along a row, so a row can hold one request only"
    return "tree", ""
