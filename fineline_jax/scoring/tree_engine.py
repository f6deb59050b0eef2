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
    steps = _steps(pack, context, row_length, group, shards)
    plan = steps.plan
    step = tree_step(config, mesh, dtype, tree_attention.pick(platform))
    logp, greedy = np.zeros(len(plan.pair_target), np.float32), np.zeros(len(plan.pair_target), bool)
    inputs = ((first, steps.inputs(first)) for first in range(0, len(plan.tokens), group))
    for first, values, hits in run_steps(step, params, mesh, inputs):
        for shard in range(shards):
            pairs = steps.pairs(first, shard)
            count = pairs.stop - pairs.start
            logp[pairs], greedy[pairs] = values[shard, :count], hits[shard, :count]
        advance(int(steps.requests_of_row[first : first + group].sum()))
    return of_requests(plan, logp, greedy)


class Steps:
    """A plan cut into steps of `group` rows over `shards`; every step has the same shapes, so one compilation."""

    def __init__(self, plan: Plan, group: int, shards: int):
        self.plan, self.group, self.shards = plan, group, shards
        self.rows_of_shard = group // shards
        rows, length = plan.tokens.shape
        pair_row = np.repeat(np.arange(rows), np.diff(plan.pair_offsets))
        home = pair_row * length + plan.pair_parent  # ascending
        is_new = np.diff(home, prepend=-1) != 0
        self.parent_of_pair = np.cumsum(is_new) - 1
        self.parents = home[is_new]
        self.parent_offsets = np.searchsorted(self.parents, np.arange(rows + 1) * length)
        starts = np.arange(0, rows, self.rows_of_shard)
        most = lambda offsets: int(np.diff(offsets[np.append(starts, rows)]).max(initial=1))
        self.most_parents, self.most_pairs = most(self.parent_offsets), most(plan.pair_offsets)
        self.requests_of_row = _requests_done(plan, pair_row)

    def pairs(self, first: int, shard: int) -> slice:
        """The pairs of a shard in the step that begins with row `first`."""
        return self._range(self.plan.pair_offsets, first, shard)

    def inputs(self, first: int) -> list[np.ndarray]:
        """What `forward.tree_step` wants of the step that begins with row `first`."""
        rows, length = slice(first, first + self.group), self.plan.tokens.shape[1]
        parents = np.zeros((self.shards, self.most_parents), np.int32)
        used = np.zeros((self.shards, 1), np.int32)
        pair_parent = np.zeros((self.shards, self.most_pairs), np.int32)
        targets = np.full((self.shards, self.most_pairs), -1, np.int32)
        for shard in range(self.shards):
            own, pairs = self._range(self.parent_offsets, first, shard), self.pairs(first, shard)
            used[shard] = count = own.stop - own.start
            parents[shard, :count] = self.parents[own] - (first + shard * self.rows_of_shard) * length
            pair_parent[shard, : pairs.stop - pairs.start] = self.parent_of_pair[pairs] - own.start
            targets[shard, : pairs.stop - pairs.start] = self.plan.pair_target[pairs]
        plan = self.plan
        return [plan.tokens[rows], plan.depth[rows], plan.end[rows], parents, used, pair_parent, targets]

    def _range(self, offsets: np.ndarray, first: int, shard: int) -> slice:
        row = first + shard * self.rows_of_shard
        return slice(int(offsets[row]), int(offsets[row + self.rows_of_shard]))


def _requests_done(plan: Plan, pair_row: np.ndarray) -> np.ndarray:
    """int [rows]: how many requests have their last scored token in each row."""
    lengths = np.diff(plan.token_offsets)
    request = np.repeat(np.arange(len(lengths)), lengths)
    last = np.zeros(len(lengths), np.int64)
    np.maximum.at(last, request, pair_row[plan.token_pair])
    return np.bincount(last, minlength=len(plan.tokens))


# The plan is the same for every checkpoint; one is kept so that a series does not make it again.
_kept: dict[tuple, Steps] = {}


def _steps(pack: Pack, context: int, row_length: int, group: int, shards: int) -> Steps:
    key = (pack.hash, context, row_length, group, shards)
    if key not in _kept:
        _kept.clear()
        _kept[key] = Steps(plan_pack(pack, context, row_length=row_length, group=group), group, shards)
    return _kept[key]
