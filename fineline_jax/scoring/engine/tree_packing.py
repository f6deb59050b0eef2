"""Which pieces of prefix trees go into which row, so that few tokens are repeated and few positions stay unused.

Everything here works on the segments of a `trie.Tree`. A run of segments in a row costs their nodes and the ancestors
of the first one, which the row repeats.
"""

import bisect

import numpy as np

from fineline_jax.scoring.engine.trie import Tree

Run = tuple[int, int]
"""Segments [first, last) in one row."""
STRIPES = 8
"""From how many parts of the forest a row is filled up with small subtrees."""


def fit(tree: Tree, row_length: int, multiple: int, group: int) -> tuple[list[list[Run]], int]:
    """Runs per row, and the length of the rows: of the multiples up to row_length the one that feeds least."""
    shortest = -(-max(1, tree.longest) // multiple)
    longest = max(shortest, row_length // multiple)
    # Shorter than half only if one group of rows then holds all.
    shortest = max(shortest, min(longest // 2, len(tree.tokens) // (group * multiple)))
    best: tuple[float, int, list[list[Run]]] = (np.inf, 0, [])
    for length in range(longest * multiple, (shortest - 1) * multiple, -multiple):
        if _ceil(len(tree.tokens) / length, group) * length < best[0]:
            rows = _fill(tree, length)
            best = min(best, (_ceil(len(rows), group) * length, length, rows), key=lambda one: one[0])
    _, length, rows = best
    return _dissolve(tree, rows, length), length


def _ceil(value: float, step: int) -> int:
    return -int(-value // step) * step


def _fill(tree: Tree, length: int) -> list[list[Run]]:
    """Runs for rows of `length` positions.

    A tree is cut where few ancestors must be repeated. Subtrees that hang on a shallow node and are large go into the
    rows as a whole, the largest first, each where it leaves least room; those larger than a row are cut into runs
    first. The small ones are mixed and poured into the room that is left.
    """
    starts, branch = tree.starts, tree.branch
    shallow, large = length // 512, length // 16
    bounds = np.append(np.flatnonzero(branch <= shallow), len(branch))
    items: list[Run] = []
    small: list[Run] = []
    for first, last in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        if starts[last] - starts[first] < large:
            small.append((first, last))
        else:
            while first < last:
                cut = _cut(tree, first, last, length)
                items.append((first, cut))
                first = cut

    rows: list[list[Run]] = []
    room: list[tuple[int, int]] = []  # ascending: free positions, row
    for run in sorted(items, key=lambda run: (-_positions(tree, run), run)):
        at = bisect.bisect_left(room, (_positions(tree, run), -1))
        free, row = room.pop(at) if at < len(room) else (length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(run)
        bisect.insort(room, (free - _positions(tree, run), row))

    placed, small = _pour(tree, _mixed(tree, small, length), {row: free for free, row in room})
    for row, run in placed:
        rows[row].append(run)
    while small:
        placed, small = _pour(tree, small, {0: length})
        rows.append([run for _, run in placed])
    return rows


def _dissolve(tree: Tree, rows: list[list[Run]], length: int) -> list[list[Run]]:
    """Fewer rows where the runs of one fit into the room of the others, cut once more. Rows and runs in order."""
    free = {row: length - sum(_positions(tree, run) for run in runs) for row, runs in enumerate(rows)}
    kept = {row: list(runs) for row, runs in enumerate(rows)}
    for row in sorted(free, key=lambda row: (-free[row], row)):
        others = {other: positions for other, positions in free.items() if other != row and positions > length // 64}
        if length - free[row] > sum(others.values()):
            continue
        placed, left = _pour(tree, kept[row], others)
        if not left:
            del free[row], kept[row]
            for other, run in placed:
                kept[other].append(run)
                free[other] -= _positions(tree, run)
    return sorted(_joined(sorted(runs)) for runs in kept.values())


def _mixed(tree: Tree, runs: list[Run], length: int) -> list[Run]:
    """Runs in an order in which each row gets some of every part of the forest, since some tasks score many of their
    tokens and others few: what is computed for scored positions then is about the same in all rows."""
    if not runs:
        return []
    first, last = np.array(runs).T
    sizes = tree.starts[last] - tree.starts[first]
    rows = -(-int(sizes.sum()) // length)
    stripe = (np.cumsum(sizes) - sizes) * rows * STRIPES // int(sizes.sum())
    return _joined([runs[index] for index in np.argsort(stripe % rows, kind="stable").tolist()])


def _joined(runs: list[Run]) -> list[Run]:
    """Neighbouring runs that follow each other as one."""
    result: list[Run] = []
    for first, last in runs:
        follows = bool(result) and result[-1][1] == first
        result.append((result.pop()[0] if follows else first, last))
    return result


def _pour(tree: Tree, runs: list[Run], free: dict[int, int]) -> tuple[list[tuple[int, Run]], list[Run]]:
    """`runs` in order into the `free` positions of rows, the emptiest row first: (row, run) each, and what is left."""
    left = runs[::-1]
    placed = []
    for row in sorted(free, key=lambda row: (-free[row], row)):
        positions = free[row]
        while left:
            first, last = left.pop()
            cut = _cut(tree, first, last, positions)
            if cut < last:
                left.append((cut, last))
            if cut == first:
                break
            placed.append((row, (first, cut)))
            positions -= _positions(tree, (first, cut))
    return placed, left[::-1]


def _positions(tree: Tree, run: Run) -> int:
    """What a run takes of a row, its repeated ancestors included."""
    return int(tree.branch[run[0]] + tree.starts[run[1]] - tree.starts[run[0]])


def _cut(tree: Tree, first: int, last: int, free: int) -> int:
    """Where a row with `free` positions that begins with segment `first` stops: before the first segment that does not
    fit. The next row repeats the ancestors of its first node, and reaches the farther the later it begins: a segment
    hangs above the last node of the one before it, so it has fewer ancestors more than that one has nodes."""
    stop = int(np.searchsorted(tree.starts, tree.starts[first] - tree.branch[first] + free, "right")) - 1
    return max(first, min(stop, last))
