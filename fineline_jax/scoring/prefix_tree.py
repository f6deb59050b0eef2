"""Rows in which no token is computed twice: the plan of the prefix-tree engine.

What a model reads for the requests of a task (the tokens of context + continuation but the last one, cut on the left to
the model's context) are strings with long common prefixes. They form a tree: one node per distinct prefix. The plan
cuts the depth-first order of the trees into rows of one length. A row that starts inside a tree begins with the
ancestors of its first new node, so every row stands alone. In a row

    depth[k]   is the position of token k in its request,
    end[k]     is the first index after the subtree of token k, so that query q sees key k iff k <= q < end[k].

A row may be much longer than the model's context: positions are depths. Unused places of a row see only themselves.

A scored token is a pair (its parent's place, target). Requests that ask for the same pair share it.

Only numpy is needed here, and no loop runs over tokens: trees are made of segments, the part of a request that the
requests before it in lexicographic order do not have.
"""

import bisect
import dataclasses
from collections.abc import Iterator

import numpy as np

from fineline_jax.errors import UserError
from fineline_jax.scoring.pack import Pack, Ragged

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
    """int32 [rows]: places in use, the first ones of a row. 0 for rows added to complete a group."""
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


@dataclasses.dataclass(frozen=True)
class Tree:
    """The trees of all tasks in depth-first order, one after the other."""

    tokens: np.ndarray
    """int32 [nodes]"""
    depth: np.ndarray
    """int32 [nodes]: how many ancestors"""
    starts: np.ndarray
    """int64 [segments + 1]: nodes of each segment; a segment is a path downwards"""
    branch: np.ndarray
    """int64 [segments]: depth of the first node, which is the number of its ancestors"""
    parent: np.ndarray
    """int64 [segments]: the node above the first one, -1 for a root"""
    scored_node: np.ndarray
    """int64 [scored tokens]: the node that predicts each token of the continuations"""
    fed: int
    """Tokens of all requests"""
    longest: int
    """Tokens of the longest request"""


def plan_pack(
    pack: Pack, context: int, *, row_length: int = ROW_LENGTH, multiple: int = MULTIPLE, group: int = 1
) -> Plan:
    """The plan of all requests of `pack`, a tree per task, for a model that reads `context` tokens (see `plan`)."""
    contexts = pack.context_tokens
    values = np.append(contexts.values, np.int32(pack.manifest["prefix_token"]))
    contexts = Ragged(values, np.append(contexts.offsets, len(values)))
    # Texts that are scored as a whole follow the prefix token.
    rows = np.where(pack.request_context < 0, len(contexts) - 1, pack.request_context)
    tasks = pack.requests["task"].combine_chunks()
    codes = np.asarray(tasks.indices if hasattr(tasks, "indices") else tasks.dictionary_encode().indices)
    return plan(
        contexts, pack.continuation_tokens, rows, codes, context, row_length=row_length, multiple=multiple, group=group
    )


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
) -> Plan:
    """Rows for all requests.

    contexts, continuations: int32 tokens, the latter per request. request_context [requests]: rows of contexts.
    request_tree [requests]: requests of different values share nothing. context: tokens the model reads; longer
    requests are cut on the left, and continuations longer than it are scored in several windows (`rows.windows`).
    row_length: the largest length of a row, in tokens; raised to the longest request. All rows have the same length, a
    multiple of `multiple` and the smallest one (found) that needs no more rows than row_length does. group: the number
    of rows is a multiple of this. Equal arguments give equal plans. Raises UserError for an empty context.
    """
    tree = build_tree(contexts, continuations, request_context, request_tree, context)
    runs, length = _fit(tree, row_length, multiple, group)
    rows = -(-len(runs) // group) * group

    # Each run as paths: the ancestors of its first node, which another row holds too, then its own nodes.
    paths = [
        (row, start, stop, own)
        for row, parts in enumerate(runs)
        for first, last in parts
        for start, stop, own in _entered(tree, first, last)
    ]
    path_row, start, stop, own = np.array(paths, np.int64).reshape(-1, 4).T
    node = _ranges(start, stop - start)
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


def build_tree(
    contexts: Ragged, continuations: Ragged, request_context: np.ndarray, request_tree: np.ndarray, context: int
) -> Tree:
    """The prefix trees of all requests (arguments as for `plan`).

    Sorted by their tokens, requests come in depth-first order, and what a request shares with all before it is what it
    shares with its neighbour.
    """
    request, low, high, slot = _windows(contexts, continuations, request_context, context)
    scored = np.diff(np.append(slot, len(continuations.values)))
    window_tree = np.asarray(request_tree)[request]
    tokens: list[np.ndarray] = []
    segments: list[tuple[int, int, int]] = []  # first node, branch, parent
    asked: list[tuple[int, int, int]] = []  # slot, nodes, first node
    nodes = 0
    for code in dict.fromkeys(np.asarray(request_tree).tolist()):
        windows = np.flatnonzero(window_tree == code)
        strings = _strings(contexts, continuations, request_context, request, low, high, windows)
        before, previous = b"", np.empty(0, np.int32)
        # The path to the last node, as pieces of segments: depth of a piece's first node, and that node.
        depths: list[int] = []
        firsts: list[int] = []
        for w in sorted(range(len(windows)), key=strings.__getitem__):
            string = strings[w]
            current = previous if string is before else np.frombuffer(string, np.int32)
            shared = len(current) if string is before else _common(previous, current)
            while depths and depths[-1] >= shared:
                depths.pop()
                firsts.pop()
            if len(current) > shared:
                parent = firsts[-1] + shared - 1 - depths[-1] if shared else -1
                if not shared or parent != nodes - 1:  # else it prolongs the segment before
                    segments.append((nodes, shared, parent))
                    depths.append(shared)
                    firsts.append(nodes)
                tokens.append(current[shared:])
                nodes += len(current) - shared
            here, count = int(slot[windows[w]]), int(scored[windows[w]])
            bottom, piece, top = len(current), len(depths) - 1, len(current) - count
            while bottom > top:
                start = max(depths[piece], top)
                asked.append((here + start - top, bottom - start, firsts[piece] + start - depths[piece]))
                bottom, piece = start, piece - 1
            before, previous = string, current
    first, branch, parent = np.array(segments, np.int64).reshape(-1, 3).T
    at, count, node = np.array(asked, np.int64).reshape(-1, 3).T
    scored_node = np.zeros(len(continuations.values), np.int64)
    scored_node[_ranges(at, count)] = _ranges(node, count)
    starts = np.append(first, nodes)
    return Tree(
        tokens=np.concatenate([np.empty(0, np.int32), *tokens]),
        depth=_ranges(branch, np.diff(starts)).astype(np.int32),
        starts=starts,
        branch=branch,
        parent=parent,
        scored_node=scored_node,
        fed=int((high - low).sum()),
        longest=int((high - low).max(initial=0)),
    )


def subtree_ends(depth: np.ndarray) -> np.ndarray:
    """int64 [nodes]: for each node of a depth-first order, the first later one that is not deeper.

    depth [nodes] begins with 0; the order may hold several trees.
    """
    size = len(depth)
    starts = np.flatnonzero(np.diff(depth, prepend=-2) != 1)
    paths: list[tuple[int, int, int]] = []  # first node, nodes, end
    # What is open: for each path downwards its first node, that node's depth, and the depth it is open to.
    open_: list[tuple[int, int, int]] = []
    tops, bottoms = depth[starts].tolist(), (depth[np.append(starts[1:], size) - 1] + 1).tolist() if size else []
    for node, top, bottom in [*zip(starts.tolist(), tops, bottoms, strict=True), (size, 0, 0)]:
        while open_ and open_[-1][2] > top:
            first, depth_of_first, last = open_.pop()
            kept = max(0, top - depth_of_first)
            paths.append((first + kept, last - depth_of_first - kept, node))
            if kept:
                open_.append((first, depth_of_first, top))
        open_.append((node, top, bottom))
    first, count, end = np.array(paths, np.int64).reshape(-1, 3).T
    ends = np.zeros(size, np.int64)
    ends[_ranges(first, count)] = np.repeat(end, count)
    return ends


def _windows(
    contexts: Ragged, continuations: Ragged, request_context: np.ndarray, context: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """What is fed, in the order of the requests: request, and the tokens [low, high) of its context + continuation.
    The last one: the first of the window's targets among all tokens of continuations.

    As `rows.windows`, without the last token of each window, which is only a target.
    """
    given, wanted = contexts.lengths[request_context], continuations.lengths
    if np.any((given == 0) & (wanted > 0)):
        request = int(np.flatnonzero((given == 0) & (wanted > 0))[0])
        raise UserError(f"request {request} has an empty context: nothing predicts its first token; prepare the pack again")
    windows = -(-wanted // context)
    request = np.repeat(np.arange(len(wanted)), windows)
    begin = _ranges(np.zeros(len(wanted), np.int64), windows) * context  # targets before this window's
    high = given[request] + np.minimum(begin + context, wanted[request]) - 1
    return request, np.maximum(0, high - context), high, continuations.offsets[:-1][request] + begin


def _strings(
    contexts: Ragged,
    continuations: Ragged,
    request_context: np.ndarray,
    request: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    windows: np.ndarray,
) -> list[bytes]:
    """The tokens of `windows` as int32 bytes, whose order is that of some order of the tokens. Neighbours with the
    same context and nothing of the continuation are one object."""
    result = []
    row, text = -1, b""
    for w in windows.tolist():
        r, start, stop = int(request[w]), 4 * int(low[w]), 4 * int(high[w])
        if row != request_context[r]:
            row = int(request_context[r])
            text = contexts[row].astype(np.int32).tobytes()
        tail = continuations[r].astype(np.int32).tobytes() if stop > len(text) else b""
        result.append(text[start:stop] + tail[max(0, start - len(text)) : max(0, stop - len(text))])
    return result


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """The length of the longest common prefix."""
    size = min(len(one), len(other))
    different = one[:size] != other[:size]
    at = int(different.argmax()) if size else 0
    return at if size and different[at] else size


def _ranges(start: np.ndarray, count: np.ndarray) -> np.ndarray:
    """arange(start[0], start[0] + count[0]), arange(start[1], …), … in one array."""
    before = np.cumsum(count) - count
    return np.arange(int(count.sum())) + np.repeat(start - before, count)


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


Run = tuple[int, int]
"""Segments [first, last) in one row."""


def _fit(tree: Tree, row_length: int, multiple: int, group: int) -> tuple[list[list[Run]], int]:
    """Runs per row, and the length of the rows: of the multiples up to row_length the one that feeds least."""
    shortest = -(-max(1, tree.longest) // multiple)
    longest = max(shortest, row_length // multiple)
    # Shorter than half only if one group of rows then holds all.
    shortest = max(shortest, min(longest // 2, len(tree.tokens) // (group * multiple)))
    best: tuple[float, int, list[list[Run]]] = (np.inf, 0, [])
    for length in range(longest * multiple, (shortest - 1) * multiple, -multiple):
        if _ceil(len(tree.tokens) / length, group) * length < best[0]:
            rows = _fill(tree, length)
            best = min(best, (_ceil(len(rows), group) * length, length, rows), key=lambda found: found[0])
    _, length, rows = best
    return _dissolve(tree, rows, length), length


def _ceil(value: float, step: int) -> int:
    return -int(-value // step) * step


def _fill(tree: Tree, length: int) -> list[list[Run]]:
    """Runs for rows of `length` places.

    A tree is cut where few ancestors must be repeated. Subtrees that hang on a shallow node and are large go into the
    rows as a whole, the largest first, each where it leaves least room; those larger than a row are cut into runs
    first. The small ones are poured in order into the room that is left.
    """
    starts, branch = tree.starts, tree.branch
    shallow, large = length // 512, length // 16
    bounds = np.append(np.flatnonzero(branch <= shallow), len(branch))
    items: list[Run] = []
    small: list[Run] = []
    for first, last in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        if starts[last] - starts[first] < large:
            joined = bool(small) and small[-1][1] == first
            small.append((small.pop()[0] if joined else first, last))
        else:
            while first < last:
                cut = _cut(tree, first, last, length)
                items.append((first, cut))
                first = cut

    rows: list[list[Run]] = []
    room: list[tuple[int, int]] = []  # ascending: free places, row
    for run in sorted(items, key=lambda run: (-_places(tree, run), run)):
        at = bisect.bisect_left(room, (_places(tree, run), -1))
        free, row = room.pop(at) if at < len(room) else (length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(run)
        bisect.insort(room, (free - _places(tree, run), row))

    placed, small = _pour(tree, small, {row: free for free, row in room})
    for row, run in placed:
        rows[row].append(run)
    while small:
        placed, small = _pour(tree, small, {0: length})
        rows.append([run for _, run in placed])
    return rows


def _dissolve(tree: Tree, rows: list[list[Run]], length: int) -> list[list[Run]]:
    """Fewer rows where the runs of one fit into the room of the others, cut once more. Rows and runs in order."""
    free = {row: length - sum(_places(tree, run) for run in runs) for row, runs in enumerate(rows)}
    kept = {row: list(runs) for row, runs in enumerate(rows)}
    for row in sorted(free, key=lambda row: (-free[row], row)):
        others = {other: places for other, places in free.items() if other != row and places > length // 64}
        if length - free[row] > sum(others.values()):
            continue
        placed, left = _pour(tree, kept[row], others)
        if not left:
            del free[row], kept[row]
            for other, run in placed:
                kept[other].append(run)
                free[other] -= _places(tree, run)
    return sorted(_joined(runs) for runs in kept.values())


def _joined(runs: list[Run]) -> list[Run]:
    """Runs of a row in order, those that follow each other as one."""
    result: list[Run] = []
    for first, last in sorted(runs):
        follows = bool(result) and result[-1][1] == first
        result.append((result.pop()[0] if follows else first, last))
    return result


def _pour(tree: Tree, runs: list[Run], free: dict[int, int]) -> tuple[list[tuple[int, Run]], list[Run]]:
    """`runs` in order into the `free` places of rows, the emptiest row first: (row, run) each, and what is left."""
    left = runs[::-1]
    placed = []
    for row in sorted(free, key=lambda row: (-free[row], row)):
        places = free[row]
        while left:
            first, last = left.pop()
            cut = _cut(tree, first, last, places)
            if cut < last:
                left.append((cut, last))
            if cut == first:
                break
            placed.append((row, (first, cut)))
            places -= _places(tree, (first, cut))
    return placed, left[::-1]


def _places(tree: Tree, run: Run) -> int:
    """What a run takes of a row, its repeated ancestors included."""
    return int(tree.branch[run[0]] + tree.starts[run[1]] - tree.starts[run[0]])


def _cut(tree: Tree, first: int, last: int, free: int) -> int:
    """Where a row with `free` places that begins with segment `first` stops: `last` if all fits, `first` if it is not
    worth while, else the segment from which the next row reaches farthest."""
    starts, branch = tree.starts, tree.branch
    reach = int(starts[first] - branch[first])
    if starts[last] <= reach + free:
        return last
    stop = int(np.searchsorted(starts, reach + free, "right"))
    if stop <= first + 1:
        return first
    gain = starts[first + 1 : stop] - branch[first + 1 : stop] - reach
    best = len(gain) - 1 - int(gain[::-1].argmax())
    return first + 1 + best if gain[best] > 0 else first
