"""The fast engine: prefix-tree rows, in which no token is computed twice (see `prefix_tree`)."""

import dataclasses
from collections.abc import Callable, Iterator

import jax
import numpy as np

from fineline_jax.mesh import batch_shards
from fineline_jax.models import tree_attention
from fineline_jax.models.config import ModelConfig
from fineline_jax.scoring.forward import pair_step, tree_step
from fineline_jax.scoring.pack import Pack
from fineline_jax.scoring.prefix_tree import Plan, of_requests, plan_pack
from fineline_jax.scoring.row_engine import IN_FLIGHT, put, results
from fineline_jax.scoring.trie import ranges


@dataclasses.dataclass(frozen=True)
class Shape:
    """How much is done at a time."""

    row: int
    """Tokens of the longest row: the longer, the fewer tokens are repeated at its borders"""
    rows: int
    """Rows of a device in one step"""
    multiple: int
    """Row lengths are a multiple of this: blocks of attention"""
    in_round: int
    """Steps whose parents meet the vocabulary together"""


SHAPES = {
    "cpu": Shape(row=8192, rows=1, multiple=64, in_round=2),
    "gpu": Shape(row=8192, rows=4, multiple=256, in_round=1),
    "tpu": Shape(row=8192, rows=4, multiple=512, in_round=1),
}


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

    context: tokens of the longest request the model reads. batch_tokens: tokens per step over all devices, more
    where the longest request is longer; None: one row per device on CPU, four elsewhere. Other arguments as of
    `scorer.score_params`.
    """
    platform, shards = mesh.devices.flat[0].platform, batch_shards(mesh)
    shape = SHAPES[platform]
    of_device = batch_tokens // shards if batch_tokens else shape.row * shape.rows
    row_length = min(shape.row, of_device)
    group = shards * max(1, of_device // max(1, row_length))
    steps = _steps(pack, context, row_length, group, shards, shape)
    step, meet_vocabulary = tree_step(config, mesh, dtype, tree_attention.pick(platform)), pair_step(config, mesh)

    def rounds() -> Iterator[tuple[int, jax.Array, jax.Array]]:
        for number in range(steps.rounds):
            hidden = [step(params, *put(steps.rows(index), mesh)) for index in steps.of_round(number)]
            hidden += hidden[-1:] * (shape.in_round - len(hidden))
            yield number, *meet_vocabulary(params, hidden, *put(steps.pairs(number), mesh))

    pairs = len(steps.plan.pair_target)
    logp, greedy = np.zeros(pairs, np.float32), np.zeros(pairs, bool)
    for number, values, hits in results(rounds(), mesh, max(1, IN_FLIGHT // shape.in_round)):
        for shard, chosen in enumerate(steps.pairs_of_round(number)):
            logp[chosen], greedy[chosen] = values[shard, : len(chosen)], hits[shard, : len(chosen)]
        advance(steps.requests_of_round(number))
    return of_requests(steps.plan, logp, greedy)


class Steps:
    """A plan cut into steps of `group` rows over `shards`, and these into rounds of `in_round` steps. All steps have
    the same shapes, and so have all rounds: each is compiled once."""

    def __init__(self, plan: Plan, group: int, shards: int, in_round: int):
        self.plan, self.group, self.shards, self.in_round = plan, group, shards, in_round
        rows, length = plan.tokens.shape
        self.steps = rows // group
        self.rounds = -(-self.steps // in_round)
        pair_row = np.repeat(np.arange(rows), np.diff(plan.pair_offsets))
        home = pair_row * length + plan.pair_parent  # ascending
        is_new = np.diff(home, prepend=-1) != 0
        self.parent_of_pair = np.cumsum(is_new) - 1
        self.parents = home[is_new]
        # A piece is what one shard does in one step; pieces follow each other as their rows do.
        borders = np.arange(0, rows + 1, group // shards)
        self.first_row = borders
        self.first_parent = np.searchsorted(self.parents, borders * length)
        self.first_pair = plan.pair_offsets[borders]
        self.most_parents = int(np.diff(self.first_parent).max(initial=1))
        self.most_places, self.most_pairs = map(self._most_in_round, (self.first_parent, self.first_pair))
        self.requests_of_row = _requests_done(plan, pair_row)

    def of_round(self, number: int) -> range:
        """The steps of a round."""
        return range(number * self.in_round, min((number + 1) * self.in_round, self.steps))

    def rows(self, step: int) -> list[np.ndarray]:
        """What `forward.tree_step` wants of a step."""
        rows, length = slice(step * self.group, (step + 1) * self.group), self.plan.tokens.shape[1]
        parents = np.zeros((self.shards, self.most_parents), np.int32)
        for shard in range(self.shards):
            piece = step * self.shards + shard
            own = self.parents[self.first_parent[piece] : self.first_parent[piece + 1]]
            parents[shard, : len(own)] = own - self.first_row[piece] * length
        return [self.plan.tokens[rows], self.plan.depth[rows], self.plan.end[rows], parents]

    def pairs(self, number: int) -> list[np.ndarray]:
        """What `forward.pair_step` wants of a round."""
        places = np.zeros((self.shards, self.most_places), np.int32)
        used = np.zeros((self.shards, 1), np.int32)
        pair_parent = np.zeros((self.shards, self.most_pairs), np.int32)
        targets = np.full((self.shards, self.most_pairs), -1, np.int32)
        for shard, chosen in enumerate(self.pairs_of_round(number)):
            pieces = self._pieces(number, shard)
            counts = self.first_parent[pieces + 1] - self.first_parent[pieces]
            used[shard] = total = counts.sum()
            places[shard, :total] = ranges(np.arange(len(pieces)) * self.most_parents, counts)
            shift = np.cumsum(counts) - counts - self.first_parent[pieces]
            shift = np.repeat(shift, self.first_pair[pieces + 1] - self.first_pair[pieces])
            pair_parent[shard, : len(chosen)] = self.parent_of_pair[chosen] + shift
            targets[shard, : len(chosen)] = self.plan.pair_target[chosen]
        return [places, used, pair_parent, targets]

    def pairs_of_round(self, number: int) -> list[np.ndarray]:
        """For each shard the pairs of the plan that it scores in a round, ascending."""
        pieces = (self._pieces(number, shard) for shard in range(self.shards))
        return [ranges(self.first_pair[own], self.first_pair[own + 1] - self.first_pair[own]) for own in pieces]

    def _pieces(self, number: int, shard: int) -> np.ndarray:
        return np.array(self.of_round(number)) * self.shards + shard

    def requests_of_round(self, number: int) -> int:
        """How many requests have their last scored token in a round."""
        steps = self.of_round(number)
        return int(self.requests_of_row[steps.start * self.group : steps.stop * self.group].sum())

    def _most_in_round(self, first: np.ndarray) -> int:
        """The most that one shard has in one round; first: where each piece begins."""
        counts = np.zeros((self.rounds * self.in_round, self.shards), np.int64)
        counts[: self.steps] = np.diff(first).reshape(self.steps, self.shards)
        return max(1, int(counts.reshape(self.rounds, self.in_round, self.shards).sum(axis=1).max(initial=0)))


def _requests_done(plan: Plan, pair_row: np.ndarray) -> np.ndarray:
    """int [rows]: how many requests have their last scored token in each row."""
    lengths = np.diff(plan.token_offsets)
    request = np.repeat(np.arange(len(lengths)), lengths)
    last = np.zeros(len(lengths), np.int64)
    np.maximum.at(last, request, pair_row[plan.token_pair])
    return np.bincount(last, minlength=len(plan.tokens))


# The plan is the same for every checkpoint; one is kept so that a series does not make it again.
_kept: dict[tuple, Steps] = {}


def _steps(pack: Pack, context: int, row_length: int, group: int, shards: int, shape: Shape) -> Steps:
    key = (pack.hash, context, row_length, group, shards, shape)
    if key not in _kept:
        _kept.clear()
        plan = plan_pack(pack, context, row_length=row_length, multiple=shape.multiple, group=group, shards=shards)
        _kept[key] = Steps(plan, group, shards, shape.in_round)
    return _kept[key]
