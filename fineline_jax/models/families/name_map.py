"""Name maps: which tensors of a checkpoint's files become which of our parameters, line by line, both ways.

A line is (tensor name, our parameter, axes). The axes read like einops: the left side is the tensor in the file, the
right side our parameter without its stacked axes; reading and writing both follow from the line. A reader only has to
give, for a tensor name, something that has a shape and that a tuple of slices makes an array of.

    width                  an axis
    (heads dim)            one axis of the file, the first named the slower one
    (0/3 heads dim)        the first third of that axis: the other two thirds are other lines' (fused projections)
    (heads@8-10/12 dim)    heads 8 and 9 of the file's 12 (projections of unequal parts)
    (2:pair half)          `pair` has size 2, whatever the model's sizes (needed where a side is regrouped)
"""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Weight:
    """One line of a name map."""

    hf: str
    """Tensor name; {layer} and {expert} stand for numbers, and each is one more axis at the front of our parameter."""
    ours: str
    """Dotted path in the parameter tree."""
    axes: str
    """Axes in the file -> axes of our parameter."""
    layers: Sequence[int] | None = None
    """The numbers in the files of our parameter's layers; None: from 0 on."""

    @property
    def stacked(self) -> int:
        """How many axes at the front of our parameter number tensors: layers, then experts."""
        return ("{layer}" in self.hf) + ("{expert}" in self.hf)


@dataclasses.dataclass(frozen=True)
class Axis:
    """One named axis; `size` where the line gives it; `part`: only this one of `size` equal parts is ours; `of`: ours
    are `size` of so many in the file, from `first` on."""

    name: str
    size: int | None = None
    part: int | None = None
    first: int = 0
    of: int | None = None

    def in_file(self, sizes: Mapping[str, int]) -> int:
        """Its size in the file."""
        return self.of or sizes[self.name]


Group = tuple[Axis, ...]
Spans = tuple[tuple[int, int], ...]
"""First and last + 1 index along each axis of a parameter."""


@dataclasses.dataclass(frozen=True)
class Axes:
    """A parsed `Weight.axes`."""

    file: tuple[Group, ...]
    ours: tuple[Group, ...]

    def sizes(self, shape: Sequence[int]) -> dict[str, int]:
        """Size of every axis, for our parameter of `shape` (without stacked axes)."""
        sizes = {axis.name: axis.size for group in self.file + self.ours for axis in group if axis.size is not None}
        for group, length in zip(self.ours, shape, strict=True):
            unknown = [axis.name for axis in group if axis.name not in sizes]
            known = math.prod(sizes[axis.name] for axis in group if axis.name in sizes)
            sizes |= dict.fromkeys(unknown, length // known)
        return sizes

    def file_shape(self, shape: Sequence[int]) -> list[int]:
        """Shape of the whole tensor in the file, for our parameter of `shape` (without stacked axes)."""
        sizes = self.sizes(shape)
        return [math.prod(axis.in_file(sizes) for axis in group) for group in self.file]

    @property
    def kept(self) -> list[str]:
        """The file's axes that our parameter has, in the file's order."""
        return [axis.name for group in self.file for axis in group if axis.part is None]

    @property
    def flat(self) -> list[str]:
        """Our axes, groups opened."""
        return [axis.name for group in self.ours for axis in group]


@functools.cache
def parse_axes(text: str) -> Axes:
    """ "(heads dim) width -> width heads dim" and the like."""
    left, right = text.split(" -> ")
    side = lambda part: tuple(
        tuple(_axis(word) for word in (group or single).split())
        for group, single in re.findall(r"\(([^)]*)\)|([\w:/@-]+)", part)
    )
    return Axes(side(left), side(right))


def _axis(word: str) -> Axis:
    if "@" in word:
        name, first, last, of = re.split("[@/-]", word)
        return Axis(name, int(last) - int(first), first=int(first), of=int(of))
    if "/" in word:
        part, count = map(int, word.split("/"))
        return Axis(f"/{count}", count, part)
    if ":" in word:
        size, name = word.split(":")
        return Axis(name, int(size))
    return Axis(word)


def read_part(tensor: Any, axes: Axes, shape: Sequence[int], index: Sequence[slice]) -> np.ndarray:
    """parameter[index] of one tensor's parameter of `shape`, reading one range of each axis of the file.

    shape, index: without stacked axes. The range is the smallest one that holds the part.
    """
    sizes: dict[str, int] = axes.sizes(shape)
    wanted: dict[str, tuple[int, int]] = {}
    for group, length, span in zip(axes.ours, shape, index, strict=True):  # a regrouped axis is read whole
        for axis in group:
            wanted[axis.name] = span.indices(length)[:2] if len(group) == 1 else (0, sizes[axis.name])
    ranges, split, rest = [], [], []
    for group in axes.file:
        start, inner = 0, math.prod(axis.in_file(sizes) for axis in group)
        narrow = True  # so far only one index of every slower axis is wanted
        stop = inner
        for axis in group:
            first, last = wanted[axis.name] if axis.part is None else (axis.part, axis.part + 1)
            first, last = first + axis.first, last + axis.first
            inner //= axis.in_file(sizes)
            if narrow:
                start, stop = start + first * inner, start + last * inner
                split.append(last - first)
                rest.append(slice(None) if axis.part is None else 0)
            else:
                split.append(axis.in_file(sizes))
                rest.append(slice(first, last) if axis.part is None else axis.part)
            narrow = narrow and last - first == 1
        ranges.append(slice(start, stop))
    part = np.asarray(tensor[tuple(ranges)]).reshape(split)[tuple(rest)]
    part = part.transpose([axes.kept.index(name) for name in axes.flat])
    lengths = iter(part.shape)
    part = part.reshape([math.prod(itertools.islice(lengths, len(group))) for group in axes.ours])
    whole = [len(group) > 1 for group in axes.ours]
    return part[(*(span if regrouped else slice(None) for span, regrouped in zip(index, whole)), ...)]


def cut(axes: Axes, shape: Sequence[int], spans: Spans, most: int) -> list[Spans]:
    """The part `spans` of one tensor's parameter of `shape`, in chunks that lie in `most` elements of the file each.

    shape, spans: without stacked axes. Only the slowest axis of the file is cut, so a chunk has at least one index
    of it; an axis that our parameter regroups is passed over for the next.
    """
    sizes, ours = axes.sizes(shape), [[axis.name for axis in group] for group in axes.ours]
    names = [axis.name for group in axes.file for axis in group]
    slowest = next((name for name in axes.kept if [name] in ours), None)
    if slowest is None:
        return [spans]
    axis = ours.index([slowest])
    start, stop = spans[axis]
    step = max(1, most // math.prod(sizes[name] for name in names[names.index(slowest) + 1 :]))
    step = math.ceil((stop - start) / math.ceil((stop - start) / step))  # chunks of equal size
    return [(*spans[:axis], (first, min(first + step, stop)), *spans[axis + 1 :]) for first in range(start, stop, step)]


def write_part(tensor: np.ndarray, axes: Axes, part: np.ndarray) -> None:
    """Put one tensor's parameter `part` (without stacked axes) where the line says, in a tensor of its file shape."""
    sizes = axes.sizes(part.shape)
    flat = part.reshape([sizes[name] for name in axes.flat])
    flat = flat.transpose([axes.flat.index(name) for name in axes.kept])
    file_axes = [axis for group in axes.file for axis in group]
    view = tensor.reshape([axis.in_file(sizes) for axis in file_axes])
    ours = lambda axis: slice(axis.first, axis.first + sizes[axis.name]) if axis.part is None else axis.part
    view[tuple(map(ours, file_axes))] = flat


def present(weights: Sequence[Weight], leaves: Mapping[str, Any]) -> list[Weight]:
    """The lines whose parameter the model has (biases, the untied head). leaves: by dotted path."""
    return [weight for weight in weights if weight.ours in leaves]


def tensor_name(weight: Weight, index: Sequence[int]) -> str:
    """The name of one tensor of a line, at `index` in the stacked axes."""
    keys = [key for key in ("layer", "expert") if f"{{{key}}}" in weight.hf]
    numbers = dict(zip(keys, index, strict=True))
    return weight.hf.format(**numbers | ({"layer": _layer(weight, index)} if "layer" in keys else {}))


def _layer(weight: Weight, index: Sequence[int]) -> int:
    """The number in the files of a layer of our parameter."""
    return index[0] if weight.layers is None else weight.layers[index[0]]


def all_tensors(
    weights: Sequence[Weight], shapes: Mapping[str, Sequence[int]]
) -> dict[str, list[tuple[Weight, tuple[int, ...]]]]:
    """Every tensor of the files, with the (line, index) pairs that fill it: the embedding, layer by layer, the rest.

    shapes: of our whole parameters, by dotted path.
    """

    def layer(pair: tuple[Weight, tuple[int, ...]]) -> float:
        weight, index = pair
        return _layer(weight, index) if index else -1 if weight.ours == "embed" else math.inf

    tensors: dict[str, list[tuple[Weight, tuple[int, ...]]]] = {}
    pairs = [(weight, index) for weight in weights for index in np.ndindex(*shapes[weight.ours][: weight.stacked])]
    for weight, index in sorted(pairs, key=layer):
        tensors.setdefault(tensor_name(weight, index), []).append((weight, index))
    return tensors
