"""Prefix trees of token strings: one node per distinct prefix of what a model is fed.

A tree is kept as its depth-first order, made of segments: the part of a request that the requests before it in
lexicographic order do not have. No loop runs over tokens.
"""

import dataclasses

import numpy as np

from fineline_jax.errors import UserError
from fineline_jax.scoring.requests.pack import RequestTokens


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


def build_tree(requests: RequestTokens, context: int) -> Tree:
    """The prefix trees of all requests, for a model that reads `context` tokens.

    Sorted by their tokens, requests come in depth-first order, and what a request shares with all before it is what it
    shares with its neighbour.
    """
    request, low, high, slot = _windows(requests, context)
    scored_tokens = len(requests.continuations.values)
    scored = np.diff(np.append(slot, scored_tokens))
    window_task = requests.task[request]
    tokens: list[np.ndarray] = []
    segments: list[tuple[int, int, int]] = []  # first node, branch, parent
    asked: list[tuple[int, int, int]] = []  # slot, nodes, first node
    nodes = 0
    for task in dict.fromkeys(requests.task.tolist()):
        windows = np.flatnonzero(window_task == task)
        strings = _strings(requests, request[windows], low[windows], high[windows])
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
    scored_node = np.zeros(scored_tokens, np.int64)
    scored_node[ranges(at, count)] = ranges(node, count)
    starts = np.append(first, nodes)
    return Tree(
        tokens=np.concatenate([np.empty(0, np.int32), *tokens]),
        depth=ranges(branch, np.diff(starts)).astype(np.int32),
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
    ends[ranges(first, count)] = np.repeat(end, count)
    return ends


def _windows(requests: RequestTokens, context: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """What is fed, in the order of the requests: request, and the tokens [low, high) of its context + continuation.
    The last one: the first of the window's targets among all tokens of continuations.

    As `rows.windows`, without the last token of each window, which is only a target.
    """
    given, wanted = requests.contexts.lengths[requests.context_row], requests.continuations.lengths
    if np.any((given == 0) & (wanted > 0)):
        request = int(np.flatnonzero((given == 0) & (wanted > 0))[0])
        raise UserError(
            f"request {request} has an empty context: nothing predicts its first token; prepare the pack again"
        )
    windows = -(-wanted // context)
    request = np.repeat(np.arange(len(wanted)), windows)
    begin = ranges(np.zeros(len(wanted), np.int64), windows) * context  # targets before this window's
    high = given[request] + np.minimum(begin + context, wanted[request]) - 1
    return request, np.maximum(0, high - context), high, requests.continuations.offsets[:-1][request] + begin


def _strings(requests: RequestTokens, request: np.ndarray, low: np.ndarray, high: np.ndarray) -> list[bytes]:
    """The tokens of windows as int32 bytes, whose order is that of some order of the tokens. Neighbours with the same
    context and nothing of the continuation are one object."""
    result = []
    last_row, text = -1, b""
    rows = requests.context_row[request]
    for r, row, start, stop in zip(request.tolist(), rows.tolist(), (4 * low).tolist(), (4 * high).tolist()):
        if row != last_row:
            last_row, text = row, requests.contexts[row].astype(np.int32).tobytes()
        tail = requests.continuations[r].astype(np.int32).tobytes() if stop > len(text) else b""
        result.append(text[start:stop] + tail[max(0, start - len(text)) : max(0, stop - len(text))])
    return result


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """The length of the longest common prefix."""
    size = min(len(one), len(other))
    different = one[:size] != other[:size]
    at = int(different.argmax()) if size else 0
    return at if size and different[at] else size


def ranges(start: np.ndarray, count: np.ndarray) -> np.ndarray:
    """arange(start[0], start[0] + count[0]), arange(start[1], …), … in one array."""
    before = np.cumsum(count) - count
    return np.arange(int(count.sum())) + np.repeat(start - before, count)
