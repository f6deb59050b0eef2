"""Layers of several kinds, each with its own stack of parameters, computed in their order: patterns that repeat, so
that a program has the layers of one pattern only. The parameters of a stack have its layers as their first axis."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

Stacks = Mapping[str, Any]
LONGEST = 16
"""Layers of a pattern."""


def patterns(order: Sequence[str]) -> list[tuple[list[str], int]]:
    """The stacks of a pattern's layers, and how often it comes; at each place the pattern that covers most layers, of
    these the shortest. order: the stack of each layer."""
    found, rest = [], list(order)
    while rest:
        counts = {1: 1}
        for n in range(1, min(LONGEST, len(rest) // 2) + 1):
            while rest[n * counts.setdefault(n, 1) :][:n] == rest[:n]:
                counts[n] += 1
        length = max(counts, key=lambda n: (counts[n] > 1, n * counts[n], -n))
        length = length if counts[length] > 1 else 1
        found.append((rest[:length], counts[length]))
        rest = rest[length * counts[length] :]
    return found


def scan(
    layer: Callable[[Any, Any], tuple[Any, Any]], stream: Any, stacks: Stacks, order: Sequence[str], unroll: bool
) -> tuple[Any, Any]:
    """`jax.lax.scan` of `layer` over all layers. Beside the stream what the layers gave that were last of a pattern, of
    the last patterns alone."""
    taken, beside = Counter[str](), None
    for pattern, times in patterns(order):
        each = Counter(pattern)

        def once(stream: Any, blocks: Stacks, pattern: Any = pattern, each: Any = each) -> tuple[Any, Any]:
            for i, name in enumerate(pattern):
                part, at = blocks[name], pattern[:i].count(name)
                own = part if each[name] == 1 else jax.tree.map(lambda x, at=at: x[at], part)
                stream, beside = layer(stream, own)
            return stream, beside

        def cut(name: str, n: int, first: int, times: int = times) -> Any:
            """[times, n, ...], or [times, ...] for one layer of a pattern."""
            part = jax.tree.map(lambda x: x[first : first + times * n], stacks[name])
            return part if n == 1 else jax.tree.map(lambda x: x.reshape(times, n, *x.shape[1:]), part)

        blocks = {name: cut(name, n, taken[name]) for name, n in each.items()}
        stream, beside = jax.lax.scan(once, stream, blocks, unroll=unroll)
        taken.update(pattern * times)
    return stream, beside


def loop(layer: Callable[[Any, Any], Any], stream: Any, stacks: Stacks, order: Sequence[str]) -> Any:
    """The same without derivatives, and without a copy of the parameters where the layers are not whole stacks."""
    taken = Counter[str]()
    for pattern, times in patterns(order):

        def once(turn: jax.Array, stream: Any, pattern: Any = pattern, first: Any = taken.copy()) -> Any:
            for i, name in enumerate(pattern):
                index = first[name] + turn * pattern.count(name) + pattern[:i].count(name)
                stream = layer(stream, layer_of(stacks[name], index))
            return stream

        stream = jax.lax.fori_loop(0, times, once, stream)
        taken.update(pattern * times)
    return stream


def layer_of(stacked: Any, index: jax.typing.ArrayLike) -> Any:
    """One of the layers that are stacked along the first axis of every parameter."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(jax.numpy.asarray(x), index, keepdims=False), stacked)
