"""Rows in which no token is computed twice: the plan of the prefix-tree engine.

What a model reads for the requests of a task (the tokens of context + continuation but the last one, cut on the left to
the model's context) are strings with long common prefixes. They form a tree: one node per distinct prefix. The plan
cuts the depth-first order of the trees into rows of one length. A row that starts inside a tree begins with the
ancestors of its first new node, so every row stands alone. In a row

    depth[k]   is the position of token k in its request,
    end[k]     is the first index after the subtree of token k, so that query q sees key k iff k <= q < end[k].

A row may be much longer than the model's context: positions are depths. Unused positions of a row see only themselves.

A target is a token that is scored, below the position that predicts it (its parent). Requests with the same target at
the same parent share it.

Only numpy is needed here. `trie` makes the trees, `tree_packing` decides what goes into which row.
"""

import dataclasses
import heapq
from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float32, Float64

from fineline_jax.scoring.engine.tree_packing import Run, fit
from fineline_jax.scoring.engine.trie import Tree, build_tree, ranges, subtree_ends
from fineline_jax.scoring.requests.pack import RequestTokens

ROW_LENGTH = 8192
MULTIPLE = 256
"""Row lengths are a multiple of this: blocks of attention."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Rows, and how the log-probabilities of their targets make those of requests."""

    tokens: np.ndarray
    """int32 [rows, length], 0 where unused"""
    depth: np.ndarray
    """int32 [rows, length]: position of each token in its request, below the model's context"""
    end: np.ndarray
    """int32 [rows, length]: query q of the row sees key k iff k <= q < end[k]; q + 1 where unused"""
    used: np.ndarray
    """int32 [rows]: positions in use, the first ones of a row; 0 for rows added to complete a group"""
    target_offsets: np.ndarray
    """int64 [rows + 1]: targets target_offsets[r] to target_offsets[r + 1] are those of row r"""
    target_parent: np.ndarray
    """int32 [targets]: the position in its row whose output predicts the target; ascending in each row"""
    target_token: np.ndarray
    """int32 [targets]: the token to be predicted; ascending for one parent"""
    token_target: np.ndarray
    """int64 [scored tokens]: the target of each token of the continuations, in the order of the requests"""
    token_offsets: np.ndarray
    """int64 [requests + 1]: the scored tokens of each request"""
    unique_tokens: int
    """Nodes of the trees"""
    naive_tokens: int
    """Tokens that one request at a time would feed, without padding"""


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What a plan saves."""

    rows: int
    length: int
    unique_tokens: int
    fed_tokens: int
    """Rows x length: unused positions and tokens that a row repeats included"""
    overhead: float
    """fed_tokens / unique_tokens"""
    naive_tokens: int
    saving: float
    """naive_tokens / fed_tokens"""
    targets: int
    """Distinct (parent, token)"""
    parents: int
    """Positions of which logits are computed"""
    scored_tokens: int
    """Tokens of all continuations"""


def plan(
    requests: RequestTokens,
    context: int,
    *,
    row_length: int = ROW_LENGTH,
    multiple: int = MULTIPLE,
    group: int = 1,
    shards: int = 1,
) -> Plan:
    """Rows for all requests.

    context: tokens the model reads; longer requests are cut on the left, and continuations longer than it are scored
    in several windows (`rows.windows`). Requests of different tasks share nothing.
    row_length: the largest length of a row, in tokens; raised to the longest request. All rows have the same length, a
    multiple of `multiple` and the smallest one tried that needs no more rows than row_length does. group: the number
    of rows is a multiple of this, the rows of one step; shards: over how many parts of the batch these are spread,
    neighbouring rows to one. Equal arguments give equal plans. Raises UserError for an empty context.
    """
    tree = build_tree(requests, context)
    runs, length = fit(tree, row_length, multiple, group)
    rows = -(-len(runs) // group) * group
    runs = _evened(tree, [*runs, *[[]] * (rows - len(runs))], group, shards)

    # Each run as paths: the ancestors of its first node, which another row holds too, then its own nodes.
    paths = [
        (row, start, stop, own)
        for row, parts in enumerate(runs)
        for first, last in parts
        for start, stop, own in _entered(tree, first, last)
    ]
    path_row, start, stop, own = np.array(paths, np.int64).reshape(-1, 4).T
    node = ranges(start, stop - start)
    row, own = np.repeat(path_row, stop - start), np.repeat(own, stop - start).astype(bool)
    used = np.bincount(row, minlength=rows)
    position = np.arange(len(node)) - np.repeat(np.cumsum(used) - used, used)

    tokens, depth = np.zeros((rows, length), np.int32), np.zeros((rows, length), np.int32)
    end = np.tile(np.arange(1, length + 1, dtype=np.int32), (rows, 1))
    tokens[row, position] = tree.tokens[node]
    depth[row, position] = tree.depth[node]
    # A row begins at depth 0, which closes what the row before it left open.
    end[row, position] = position + subtree_ends(tree.depth[node]) - np.arange(len(node))

    flat_index = np.zeros(len(tree.tokens), np.int64)
    flat_index[node[own]] = row[own] * length + position[own]
    asked = flat_index[tree.scored_node] << 32 | requests.continuations.values.astype(np.int64)
    targets, token_target = np.unique(asked, return_inverse=True)
    target_index = targets >> 32
    return Plan(
        tokens=tokens,
        depth=depth,
        end=end,
        used=used.astype(np.int32),
        target_offsets=np.searchsorted(target_index, np.arange(rows + 1) * length),
        target_parent=(target_index % length).astype(np.int32),
        target_token=(targets & 0xFFFFFFFF).astype(np.int32),
        token_target=token_target,
        token_offsets=requests.continuations.offsets,
        unique_tokens=len(tree.tokens),
        naive_tokens=tree.fed,
    )


def statistics(plan: Plan) -> Statistics:
    """What `plan` costs and saves."""
    rows, length = plan.tokens.shape
    fed = rows * length
    row = np.repeat(np.arange(rows), np.diff(plan.target_offsets))
    return Statistics(
        rows=rows,
        length=length,
        unique_tokens=plan.unique_tokens,
        fed_tokens=fed,
        overhead=fed / max(1, plan.unique_tokens),
        naive_tokens=plan.naive_tokens,
        saving=plan.naive_tokens / max(1, fed),
        targets=len(plan.target_token),
        parents=len(np.unique(row * length + plan.target_parent)),
        scored_tokens=len(plan.token_target),
    )


def of_requests(
    plan: Plan, logp: Float32[np.ndarray, " targets"], greedy: Bool[np.ndarray, " targets"]
) -> tuple[Float64[np.ndarray, " requests"], Bool[np.ndarray, " requests"]]:
    """Log-likelihood (float64) and greediness (bool) of every request from those of the targets, [targets] each."""
    requests = len(plan.token_offsets) - 1
    request = np.repeat(np.arange(requests), np.diff(plan.token_offsets))
    total = np.bincount(request, logp[plan.token_target].astype(np.float64), minlength=requests)
    misses = np.bincount(request, ~greedy[plan.token_target], minlength=requests)
    return total, misses == 0


def _evened(tree: Tree, rows: list[list[Run]], group: int, shards: int) -> list[list[Run]]:
    """The rows in an order in which the shards of a step have about as many parents as each other, and all steps as
    many: what is computed at parents has the size of the largest, and devices wait for the last one."""
    before = np.append(0, np.cumsum(np.bincount(tree.scored_node, minlength=len(tree.tokens)) > 0))
    parents = [sum(int(before[tree.starts[b]] - before[tree.starts[a]]) for a, b in runs) for runs in rows]
    together = group // shards
    # A shard step is so many rows for one shard in one step: the fullest rows first, each to the emptiest one.
    shard_steps: list[list[int]] = [[] for _ in range(len(rows) // together)]
    unfilled = [(0, index) for index in range(len(shard_steps))]
    for row in sorted(range(len(rows)), key=lambda row: (-parents[row], row)):
        total, index = heapq.heappop(unfilled)
        shard_steps[index].append(row)
        if len(shard_steps[index]) < together:
            heapq.heappush(unfilled, (total + parents[row], index))
    shard_steps.sort(key=lambda members: (-sum(parents[row] for row in members), members))
    # Like shard steps in one step; the first shard has the fullest one of every other step.
    steps = [shard_steps[first : first + shards] for first in range(0, len(shard_steps), shards)]
    turned = [step[:: -1 if index % 2 else 1] for index, step in enumerate(steps)]
    return [rows[row] for step in turned for members in step for row in members]


def _entered(tree: Tree, first: int, last: int) -> Iterator[tuple[int, int, bool]]:
    """The nodes [start, stop) of the segments [first, last), preceded by the ancestors of the first one (not own)."""
    above = []
    node = int(tree.parent[first])
    while node >= 0:
        segment = int(np.searchsorted(tree.starts, node, "right")) - 1
        above.append((int(tree.starts[segment]), node + 1, False))
        node = int(tree.parent[segment])
    yield from reversed(above)
    yield int(tree.starts[first]), int(tree.starts[last]), True
