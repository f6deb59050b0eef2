"""The fast engine: prefix-tree rows, in which no token is computed twice (see `prefix_tree`)."""

from collections.abc import Callable

import jax
import numpy as np

from fineline_jax.mesh import batch_shards
from fineline_jax.models import tree_attention
from fineline_jax.models.config import ModelConfig
from fineline_jax.scoring.forward import tree_step
from fineline_jax.scoring.pack import Pack
from fineline_jax.scoring.prefix_tree import Plan, of_requests, plan_pack
from fineline_jax.scoring.row_engine import run_steps

CPU_ROW, ACCELERATOR_ROW = 2048, 8192
"""Longest row, in tokens: longer ones repeat fewer tokens at their borders, shorter ones stay in a CPU's cache."""


def score_tree(
    pack: Pack,
    config: ModelConfig,
    params: dict,
    context: int,
    mesh: jax.sharding.Mesh,
    dtype: str,
    *,
    batch_tokens: int | None = None,
    advance: Callable[[int], None] = lambda requests: None,
) -> tuple[np.ndarray, np.ndarray]:
    """Log-likelihood (float64) and greediness (bool) of every request of `pack` under a model.

    context: tokens of the longest request the model reads. batch_tokens: tokens per step over all devices, None: two
    rows per device on CPU, four elsewhere. Other arguments as of `scorer.score_params`.
    """
    platform = mesh.devices.flat[0].platform
    row_length = CPU_ROW if platform == "cpu" else ACCELERATOR_ROW
    shards = batch_shards(mesh)
    default = row_length * shards * (2 if platform == "cpu" else 4)
    group = shards * max(1, (batch_tokens or default) // (row_length * shards))
    plan = _plan(pack.hash, lambda: plan_pack(pack, context, row_length=row_length, group=group), context, group)
    step = tree_step(config, mesh, dtype, tree_attention.pick(platform))
    logp, greedy = np.zeros(len(plan.pair_target), np.float32), np.zeros(len(plan.pair_target), bool)
    requests_of_row = _requests_done(plan)
    inputs = ((first, _inputs(plan, first, group)) for first in range(0, len(plan.tokens), group))
    for first, values, hits in run_steps(step, params, mesh, inputs):
        for row in range(first, first + group):
            pairs = slice(plan.pair_offsets[row], plan.pair_offsets[row + 1])
            count = pairs.stop - pairs.start
            logp[pairs], greedy[pairs] = values[row - first, :count], hits[row - first, :count]
        advance(int(requests_of_row[first : first + group].sum()))
    return of_requests(plan, logp, greedy)


def _inputs(plan: Plan, first: int, group: int) -> list[np.ndarray]:
    """Tokens, depths, ends [group, length], parents and targets [group, pairs] of some rows; target -1: nothing."""
    rows = slice(first, first + group)
    counts = np.diff(plan.pair_offsets[first : first + group + 1])
    # A power of two: few shapes, so few compilations.
    width = 1 << int(max(64, counts.max()) - 1).bit_length()
    parents = np.zeros((group, width), np.int32)
    targets = np.full((group, width), -1, np.int32)
    for i, count in enumerate(counts):
        pairs = slice(plan.pair_offsets[first + i], plan.pair_offsets[first + i + 1])
        parents[i, :count], targets[i, :count] = plan.pair_parent[pairs], plan.pair_target[pairs]
    return [plan.tokens[rows], plan.depth[rows], plan.end[rows], parents, targets]


def _requests_done(plan: Plan) -> np.ndarray:
    """int [rows]: how many requests have their last scored token in each row."""
    pair_row = np.searchsorted(plan.pair_offsets, np.arange(len(plan.pair_target)), "right") - 1
    lengths = np.diff(plan.token_offsets)
    request = np.repeat(np.arange(len(lengths)), lengths)
    last = np.zeros(len(lengths), np.int64)
    np.maximum.at(last, request, pair_row[plan.token_pair])
    return np.bincount(last, minlength=len(plan.tokens))


# The plan is the same for every checkpoint; one is kept so that a series does not make it again.
_kept: dict[tuple[str, int, int], Plan] = {}


def _plan(pack_hash: str, make: Callable[[], Plan], context: int, group: int) -> Plan:
    key = (pack_hash, context, group)
    if key not in _kept:
        _kept.clear()
        _kept[key] = make()
    return _kept[key]
