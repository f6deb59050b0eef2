"""The fast engine: prefix-tree rows, in which no token is computed twice (see `prefix_tree`)."""

import dataclasses
from collections.abc import Callable, Iterator

import jax
import numpy as np

from fineline_jax.mesh import batch_shards
from fineline_jax.models.config import ModelConfig
from fineline_jax.models.tree_attention import dispatch
from fineline_jax.scoring.engine.dispatch import IN_FLIGHT, Scorer, put, results
from fineline_jax.scoring.engine.prefix_tree import Plan, of_requests, plan
from fineline_jax.scoring.engine.step import tree_step, vocabulary_step
from fineline_jax.scoring.engine.trie import ranges
from fineline_jax.scoring.requests.pack import RequestTokens


@dataclasses.dataclass(frozen=True)
class Shape:
    """How much is done at a time."""

    row: int
    """Tokens of the longest row: the longer, the fewer tokens are repeated at its borders"""
    rows: int
    """Rows of a device in one step"""
    multiple: int
    """Row lengths are a multiple of this: blocks of attention"""
    per_batch: int
    """Steps whose logits are computed together, in one vocabulary batch"""


SHAPES = {
    "cpu": Shape(row=8192, rows=1, multiple=64, per_batch=2),
    "gpu": Shape(row=8192, rows=4, multiple=256, per_batch=1),
    "tpu": Shape(row=8192, rows=4, multiple=512, per_batch=1),
}


def make_tree_scorer(
    requests: RequestTokens,
    config: ModelConfig,
    context: int,
    mesh: jax.sharding.Mesh,
    dtype: str,
    *,
    batch_tokens: int | None = None,
) -> Scorer:
    """The scorer of `requests` in prefix-tree rows.

    context: tokens of the longest request the model reads. batch_tokens: tokens per step over all devices, more
    where the longest request is longer; None: one row per device on CPU, four elsewhere. Other arguments as of
    `scorer.make_scorer`.
    """
    platform = mesh.devices.flat[0].platform
    steps = plan_steps(requests, context, batch_tokens, batch_shards(mesh), SHAPES[platform])
    hidden_of = tree_step(config, dtype, dispatch.pick(platform))
    score_targets = vocabulary_step(config)

    def score(params: dict, advance: Callable[[int], None] = lambda requests: None) -> tuple[np.ndarray, np.ndarray]:
        def vocabulary_batches() -> Iterator[tuple[int, jax.Array, jax.Array]]:
            for number in range(steps.vocabulary_batches):
                hidden = [hidden_of(params, *put(steps.rows(index), mesh)) for index in steps.of_batch(number)]
                hidden += hidden[-1:] * (steps.per_batch - len(hidden))
                yield number, *score_targets(params, hidden, *put(steps.targets(number), mesh))

        count = len(steps.plan.target_token)
        logp, greedy = np.zeros(count, np.float32), np.zeros(count, bool)
        for number, values, hits in results(vocabulary_batches(), mesh, max(1, IN_FLIGHT // steps.per_batch)):
            for shard, chosen in enumerate(steps.targets_of_batch(number)):
                logp[chosen], greedy[chosen] = values[shard, : len(chosen)], hits[shard, : len(chosen)]
            advance(steps.requests_of_batch(number))
        return of_requests(steps.plan, logp, greedy)

    return score


def plan_steps(requests: RequestTokens, context: int, batch_tokens: int | None, shards: int, shape: Shape) -> "Steps":
    """The plan of `requests` in steps of about `batch_tokens` tokens over `shards` devices."""
    of_device = batch_tokens // shards if batch_tokens else shape.row * shape.rows
    row_length = min(shape.row, of_device)
    group = shards * max(1, of_device // max(1, row_length))
    made = plan(requests, context, row_length=row_length, multiple=shape.multiple, group=group, shards=shards)
    return Steps(made, group, shards, shape.per_batch)


class Steps:
    """A plan cut into steps of `group` rows over `shards`, and these into vocabulary batches of `per_batch` steps. All
    steps have the same shapes, and so have all vocabulary batches: each is compiled once."""

    def __init__(self, plan: Plan, group: int, shards: int, per_batch: int):
        self.plan, self.group, self.shards, self.per_batch = plan, group, shards, per_batch
        rows, length = plan.tokens.shape
        self.steps = rows // group
        self.vocabulary_batches = -(-self.steps // per_batch)
        target_row = np.repeat(np.arange(rows), np.diff(plan.target_offsets))
        flat_index = target_row * length + plan.target_parent  # of each target's parent; ascending
        is_new = np.diff(flat_index, prepend=-1) != 0
        self.parent_of_target = np.cumsum(is_new) - 1
        self.parents = flat_index[is_new]
        # A shard step is what one shard does in one step; shard steps follow each other as their rows do.
        borders = np.arange(0, rows + 1, group // shards)
        self.first_row = borders
        self.first_parent = np.searchsorted(self.parents, borders * length)
        self.first_target = plan.target_offsets[borders]
        self.most_parents = int(np.diff(self.first_parent).max(initial=1))
        self.most_positions, self.most_targets = map(self._most_in_batch, (self.first_parent, self.first_target))
        self.requests_of_row = _requests_done(plan, target_row)

    def of_batch(self, number: int) -> range:
        """The steps of a vocabulary batch."""
        return range(number * self.per_batch, min((number + 1) * self.per_batch, self.steps))

    def rows(self, step: int) -> list[np.ndarray]:
        """The arguments of `step.tree_step` for a step."""
        rows, length = slice(step * self.group, (step + 1) * self.group), self.plan.tokens.shape[1]
        parents = np.zeros((self.shards, self.most_parents), np.int32)
        for shard in range(self.shards):
            shard_step = step * self.shards + shard
            own = self.parents[self.first_parent[shard_step] : self.first_parent[shard_step + 1]]
            parents[shard, : len(own)] = own - self.first_row[shard_step] * length
        return [self.plan.tokens[rows], self.plan.depth[rows], self.plan.end[rows], parents]

    def targets(self, number: int) -> list[np.ndarray]:
        """The arguments of `step.vocabulary_step` for a vocabulary batch."""
        positions = np.zeros((self.shards, self.most_positions), np.int32)
        used = np.zeros((self.shards, 1), np.int32)
        parents = np.zeros((self.shards, self.most_targets), np.int32)
        targets = np.full((self.shards, self.most_targets), -1, np.int32)
        for shard, chosen in enumerate(self.targets_of_batch(number)):
            own = self._shard_steps(number, shard)
            counts = self.first_parent[own + 1] - self.first_parent[own]
            used[shard] = total = counts.sum()
            positions[shard, :total] = ranges(np.arange(len(own)) * self.most_parents, counts)
            shift = np.cumsum(counts) - counts - self.first_parent[own]
            shift = np.repeat(shift, self.first_target[own + 1] - self.first_target[own])
            parents[shard, : len(chosen)] = self.parent_of_target[chosen] + shift
            targets[shard, : len(chosen)] = self.plan.target_token[chosen]
        return [positions, used, parents, targets]

    def targets_of_batch(self, number: int) -> list[np.ndarray]:
        """For each shard the targets of the plan that it scores in a vocabulary batch, ascending."""
        shard_steps = (self._shard_steps(number, shard) for shard in range(self.shards))
        first, counts = self.first_target, np.diff(self.first_target)
        return [ranges(first[own], counts[own]) for own in shard_steps]

    def _shard_steps(self, number: int, shard: int) -> np.ndarray:
        return np.array(self.of_batch(number)) * self.shards + shard

    def requests_of_batch(self, number: int) -> int:
        """How many requests have their last scored token in a vocabulary batch."""
        steps = self.of_batch(number)
        return int(self.requests_of_row[steps.start * self.group : steps.stop * self.group].sum())

    def _most_in_batch(self, first: np.ndarray) -> int:
        """The most that one shard has in one vocabulary batch; first: where each shard step begins."""
        counts = np.zeros((self.vocabulary_batches * self.per_batch, self.shards), np.int64)
        counts[: self.steps] = np.diff(first).reshape(self.steps, self.shards)
        by_batch = counts.reshape(self.vocabulary_batches, self.per_batch, self.shards).sum(axis=1)
        return max(1, int(by_batch.max(initial=0)))


def _requests_done(plan: Plan, target_row: np.ndarray) -> np.ndarray:
    """int [rows]: how many requests have their last scored token in each row."""
    lengths = np.diff(plan.token_offsets)
    request = np.repeat(np.arange(len(lengths)), lengths)
    last = np.zeros(len(lengths), np.int64)
    np.maximum.at(last, request, target_row[plan.token_target])
    return np.bincount(last, minlength=len(plan.tokens))
