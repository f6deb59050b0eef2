"""Rows in which no token is computed twice: the plan of the prefix-tree engine.

What a model reads for the requests of a task (the tokens of context + continuation but the last one, cut on the left to
the model's context) are strings with long common prefixes. They form a tree: one node per distinct prefix. The plan
cuts the depth-first order of the trees into rows of one length. A row that starts inside a tree begins with the
ancestors of its first new node, so every row stands alone. In a row

    depth[k]   is the position of token k in its request,
    end[k]     is the first index after the subtree of token k, so that query q sees key k iff k <= q < end[k].

A row may be much longer than the model's context: positions are depths. Unused places of a row see only themselves.

A scored token is a pair (its parent's place, target). Requests that ask for the same pair share it.

Only numpy is needed here. `trie` makes the trees, `tree_packing` decides what goes into which row.
"""

import dataclasses
import heapq
from collections.abc import Iterator

import numpy as np

from fineline_jax.scoring.pack import Pack, Ragged
from fineline_jax.scoring.tree_packing import Run, fit
from fineline_jax.scoring.trie import Tree, build_tree, ranges, subtree_ends

ROW_LENGTH = 8192
MULTIPLE = 256
"""Row lengths are a multiple of this: blocks of attention."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Rows, and how the log-probabilities of their pairs make those of requests."""

    tokens: np.ndarray
    """int32 [rows, length], 0 where unused"""
    depth: np.ndarray
    """int32 [rows, length]: position of each token in its request, below the model's context"""
    end: np.ndarray
    """int32 [rows, length]: query q of the row sees key k iff k <= q < end[k]; q + 1 where unused"""
    used: np.ndarray
    """int32 [rows]: places in use, the first ones of a row; 0 for rows added to complete a group"""
    pair_offsets: np.ndarray
    """int64 [rows + 1]: pairs pair_offsets[r] to pair_offsets[r + 1] are those of row r"""
    pair_parent: np.ndarray
    """int32 [pairs]: the place in its row whose output predicts the target; ascending in each row"""
    pair_target: np.ndarray
    """int32 [pairs]: the token to be predicted; ascending for one parent"""
    token_pair: np.ndarray
    """int64 [scored tokens]: the pair of each token of the continuations, in the pack's order"""
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
    """Rows x length: unused places and tokens that a row repeats included"""
    overhead: float
    """fed_tokens / unique_tokens"""
    naive_tokens: int
    saving: float
    """naive_tokens / fed_tokens"""
    pairs: int
    """Distinct (parent, target)"""
    parents: int
    """Places whose output meets the vocabulary"""
    scored_tokens: int
    """Targets of all requests"""


def plan_pack(
    pack: Pack,
    context: int,
    *,
    row_length: int = ROW_LENGTH,
    multiple: int = MULTIPLE,
    group: int = 1,
    shards: int = 1,
) -> Plan:
    """The plan of all requests of `pack`, a tree per task, for a model that reads `context` tokens (see `plan`)."""
    contexts, rows, trees, _ = request_sources(pack)
    return plan(
        contexts,
        pack.continuation_tokens,
        rows,
        trees,
        context,
        row_length=row_length,
        multiple=multiple,
        group=group,
        shards=shards,
    )


def request_sources(pack: Pack) -> tuple[Ragged, np.ndarray, np.ndarray, list[str]]:
    """Of all requests: the contexts, the row of `contexts` and the tree of each, and the name of each tree's task."""
    contexts = pack.context_tokens
    values = np.append(contexts.values, np.int32(pack.manifest["prefix_token"]))
    contexts = Ragged(values, np.append(contexts.offsets, len(values)))
    # Texts that are scored as a whole follow the prefix token.
    rows = np.where(pack.request_context < 0, len(contexts) - 1, pack.request_context)
    tasks = pack.requests["task"].combine_chunks()
    tasks = tasks if hasattr(tasks, "indices") else tasks.dictionary_encode()
    return contexts, rows, np.asarray(tasks.indices), tasks.dictionary.to_pylist()


def plan(
    contexts: Ragged,
    continuations: Ragged,
    request_context: np.ndarray,
    request_tree: np.ndarray,
    context: int,
    *,
    row_length: int = ROW_LENGTH,
    multiple: int = MULTIPLE,
    group: int = 1,
    shards: int = 1,
) -> Plan:
    """Rows for all requests.

    contexts, continuations: int32 tokens, the latter per request. request_context [requests]: rows of contexts.
    request_tree [requests]: requests of different values share nothing. context: tokens the model reads; longer
    requests are cut on the left, and continuations longer than it are scored in several windows (`rows.windows`).
    row_length: the largest length of a row, in tokens; raised to the longest request. All rows have the same length, a
    multiple of `multiple` and the smallest one (found) that needs no more rows than row_length does. group: the number
    of rows is a multiple of this, the rows of one step; shards: over how many parts of the batch these are spread,
    neighbouring rows to one. Equal arguments give equal plans. Raises UserError for an empty context.
    """
    tree = build_tree(contexts, continuations, request_context, request_tree, context)
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
    place = np.arange(len(node)) - np.repeat(np.cumsum(used) - used, used)

    tokens, depth = np.zeros((rows, length), np.int32), np.zeros((rows, length), np.int32)
    end = np.tile(np.arange(1, length + 1, dtype=np.int32), (rows, 1))
    tokens[row, place] = tree.tokens[node]
    depth[row, place] = tree.depth[node]
    # A row begins at depth 0, which closes what the row before it left open.
    end[row, place] = place + subtree_ends(tree.depth[node]) - np.arange(len(node))

    home = np.zeros(len(tree.tokens), np.int64)
    home[node[own]] = row[own] * length + place[own]
    asked = home[tree.scored_node] << 32 | continuations.values.astype(np.int64)
    pairs, token_pair = np.unique(asked, return_inverse=True)
    pair_home = pairs >> 32
    return Plan(
        tokens=tokens,
        depth=depth,
        end=end,
        used=used.astype(np.int32),
        pair_offsets=np.searchsorted(pair_home, np.arange(rows + 1) * length),
        pair_parent=(pair_home % length).astype(np.int32),
        pair_target=(pairs & 0xFFFFFFFF).astype(np.int32),
        token_pair=token_pair,
        token_offsets=continuations.offsets,
        unique_tokens=len(tree.tokens),
        naive_tokens=tree.fed,
    )


def statistics(plan: Plan) -> Statistics:
    """What `plan` costs and saves."""
    rows, length = plan.tokens.shape
    fed = rows * length
    row = np.repeat(np.arange(rows), np.diff(plan.pair_offsets))
    return Statistics(
        rows=rows,
        length=length,
        unique_tokens=plan.unique_tokens,
        fed_tokens=fed,
        overhead=fed / max(1, plan.unique_tokens),
        naive_tokens=plan.naive_tokens,
        saving=plan.naive_tokens / max(1, fed),
        pairs=len(plan.pair_target),
        parents=len(np.unique(row * length + plan.pair_parent)),
        scored_tokens=len(plan.token_pair),
    )


def of_requests(plan: Plan, logp: np.ndarray, greedy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log-likelihood (float64) and greediness (bool) of every request from those of the pairs, [pairs] each."""
    requests = len(plan.token_offsets) - 1
    request = np.repeat(np.arange(requests), np.diff(plan.token_offsets))
    total = np.bincount(request, logp[plan.token_pair].astype(np.float64), minlength=requests)
    misses = np.bincount(request, ~greedy[plan.token_pair], minlength=requests)
    return total, misses == 0


def _evened(tree: Tree, rows: list[list[Run]], group: int, shards: int) -> list[list[Run]]:
    """The rows in an order in which the shards of a step have about as many parents as each other, and all steps as
    many: what is computed at parents has the size of the largest, and devices wait for the last one."""
    before = np.append(0, np.cumsum(np.bincount(tree.scored_node, minlength=len(tree.tokens)) > 0))
    parents = [sum(int(before[tree.starts[b]] - before[tree.starts[a]]) for a, b in runs) for runs in rows]
    together = group // shards
    # Pieces of so many rows for one shard in one step: the fullest rows first, each to the emptiest piece.
    pieces: list[list[int]] = [[] for _ in range(len(rows) // together)]
    open_pieces = [(0, index) for index in range(len(pieces))]
    for row in sorted(range(len(rows)), key=lambda row: (-parents[row], row)):
        total, index = heapq.heappop(open_pieces)
        pieces[index].append(row)
        if len(pieces[index]) < together:
            heapq.heappush(open_pieces, (total + parents[row], index))
    pieces.sort(key=lambda piece: (-sum(parents[row] for row in piece), piece))
    # Like pieces in one step; the first shard has the fullest one of every other step.
    steps = [pieces[first : first + shards] for first in range(0, len(pieces), shards)]
    turned = [step[:: -1 if index % 2 else 1] for index, step in enumerate(steps)]
    return [rows[row] for step in turned for piece in step for row in piece]


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
