"""Layers of several kinds, each with its own stack of parameters, computed in their order: groups that repeat, so that
a program has the layers of one group only. The parameters of a stack have the layers as their first axis."""

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

Stacks = Mapping[str, Any]


class Run(NamedTuple):
    """Layers one after the other from one stack."""

    stack: str
    first: int
    """Index in the stack's part of the group."""
    count: int


class Group(NamedTuple):
    """Runs one after the other, and again."""

    runs: tuple[Run, ...]
    times: int
    first: Counter[str]
    """Stack -> index of the group's first layer in it."""
    each: Counter[str]
    """Stack -> its layers in the group, each time."""


def groups(stacks: Sequence[str]) -> list[Group]:
    """stacks: of each layer, in order. The shortest group of runs that repeats up to the last run, then the rest."""
    runs = [(stack, len(list(same))) for stack, same in itertools.groupby(stacks)]
    period = next((n for n in range(1, len(runs)) if runs[n:-1] == runs[: len(runs) - 1 - n]), max(1, len(runs)))
    whole = len(runs) - (period < len(runs) and runs[-1] != runs[len(runs) - 1 - period])
    times = whole // period
    found: list[Group] = []
    taken: Counter[str] = Counter()
    for some, repeats in ((runs[:period], times), (runs[period * times :], 1)):
        each: Counter[str] = Counter()
        placed: list[Run] = []
        for stack, count in some:
            placed.append(Run(stack, each[stack], count))
            each[stack] += count
        if placed:
            found.append(Group(tuple(placed), repeats, taken.copy(), each))
        taken.update({stack: count * repeats for stack, count in each.items()})
    return found


def scan(
    layer: Callable[[Any, Any], tuple[Any, Any]], stream: Any, stacks: Stacks, order: Sequence[str], unroll: bool
) -> tuple[Any, Any]:
    """`jax.lax.scan` of `layer` over the layers; order: the stack of each. Beside the stream, of the last run alone,
    what its layers gave."""
    over = functools.partial(jax.lax.scan, unroll=unroll)
    beside = None
    for group in groups(order):

        def once(stream: Any, blocks: Stacks, runs: tuple[Run, ...] = group.runs) -> tuple[Any, Any]:
            for run in runs:
                stream, beside = over(layer, stream, _cut(blocks[run.stack], run.first, run.count))
            return stream, beside

        part = {name: _cut(stacks[name], group.first[name], n * group.times) for name, n in group.each.items()}
        if group.times == 1:
            stream, beside = once(stream, part)
        else:
            part = jax.tree.map(lambda x, times=group.times: x.reshape(times, -1, *x.shape[1:]), part)
            stream, beside = over(once, stream, part)
    return stream, beside


def loop(layer: Callable[[Any, Any], Any], stream: Any, stacks: Stacks, order: Sequence[str]) -> Any:
    """The same without derivatives, and without a copy of the parameters where the layers are not whole stacks."""
    stacks = {name: jax.tree.map(jax.numpy.asarray, stacks[name]) for name in {*order}}
    for group in groups(order):

        def once(turn: jax.typing.ArrayLike, stream: Any, group: Group = group) -> Any:
            for run in group.runs:
                first = group.first[run.stack] + turn * group.each[run.stack] + run.first
                one = lambda i, x, run=run, first=first: layer(x, layer_of(stacks[run.stack], first + i))
                stream = jax.lax.fori_loop(0, run.count, one, stream)
            return stream

        stream = once(0, stream) if group.times == 1 else jax.lax.fori_loop(0, group.times, once, stream)
    return stream


def layer_of(stacked: Any, index: jax.typing.ArrayLike) -> Any:
    """One of the layers that are stacked along the first axis of every parameter."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), stacked)


def _cut(stacked: Any, first: int, count: int) -> Any:
    return jax.tree.map(lambda x: x if len(x) == count else x[first : first + count], stacked)
