"""The plain engine: every request in a row of its own. The reference that `tree_engine` is held against."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from fineline_jax.mesh import batch_shards
from fineline_jax.models import attention
from fineline_jax.models.config import ModelConfig
from fineline_jax.scoring.engine.dispatch import IN_FLIGHT, Scorer, put, results
from fineline_jax.scoring.engine.rows import RowBatch, batches, sequences
from fineline_jax.scoring.engine.step import score_step
from fineline_jax.scoring.requests.pack import RequestTokens


def make_row_scorer(
    requests: RequestTokens,
    config: ModelConfig,
    context: int,
    mesh: jax.sharding.Mesh,
    dtype: str,
    *,
    batch_tokens: int | None = None,
    attend: attention.Implementation = "auto",
) -> Scorer:
    """The scorer of `requests`, each in a row of its own.

    context: tokens a row may hold. batch_tokens: tokens per step over all devices, None: 4096 on CPU, else 32768 per
    device. Other arguments as of `scorer.make_scorer`.
    """
    platform = mesh.devices.flat[0].platform
    kernel = attention.pick(attend, jnp.dtype(dtype), platform, plain_scores=config.plain_scores)
    step = score_step(config, dtype, kernel)
    plan = plan_rows(requests, context, batch_tokens, mesh)
    row_request = np.concatenate([np.empty(0, np.int32), *(batch.requests for batch in plan)])
    rows_of_request = np.bincount(row_request, minlength=len(requests))

    def score(params: dict, advance: Callable[[int], None] = lambda requests: None) -> tuple[np.ndarray, np.ndarray]:
        loglikelihood, is_greedy = np.zeros(len(requests), np.float64), np.ones(len(requests), bool)
        rows_left = rows_of_request.copy()
        advance(int((rows_left == 0).sum()))  # empty texts
        arrays = lambda batch: put([batch.tokens, batch.positions, batch.targets], mesh)
        steps = ((batch, *step(params, *arrays(batch))) for batch in plan)
        for batch, logp, greedy in results(steps, mesh, IN_FLIGHT):
            used = len(batch.requests)
            # a long document is several rows
            np.add.at(loglikelihood, batch.requests, logp[:used].sum(axis=1, dtype=np.float64))
            np.logical_and.at(is_greedy, batch.requests, greedy[:used].all(axis=1))
            np.subtract.at(rows_left, batch.requests, 1)
            advance(int((rows_left[np.unique(batch.requests)] == 0).sum()))
        return loglikelihood, is_greedy

    return score


def plan_rows(
    requests: RequestTokens, context: int, batch_tokens: int | None, mesh: jax.sharding.Mesh
) -> list[RowBatch]:
    """The batches of all requests; arguments as of `make_row_scorer`."""
    accelerator = mesh.devices.flat[0].platform != "cpu"
    tokens = batch_tokens or (32768 * mesh.devices.size if accelerator else 4096)
    least = 128 if accelerator else 32  # kernels want whole tiles
    return batches(list(sequences(requests, context)), tokens, batch_shards(mesh), least)
