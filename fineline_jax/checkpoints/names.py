"""Name maps: how each family's tensors in Hugging Face files become our parameters.

A family is a table of (tensor name, our parameter, axes). The axes read like einops: the left side is the
tensor in the file, the right side our parameter without its layer axis; both directions follow from the line.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Weight:
    """One line of a family's name map."""

    hf: str
    """Tensor name; {layer} stands for the layer's number."""
    ours: str
    """Path in the parameter tree; below "layers." the parameter has a leading layer axis."""
    axes: str
    """Axes in the file -> axes of our parameter; (a b) is one axis of the file with a the slower one."""


@dataclasses.dataclass(frozen=True)
class Family:
    """How one kind of model is named in Hugging Face folders."""

    architectures: tuple[str, ...]
    weights: tuple[Weight, ...]
    ignored: tuple[str, ...]
    """Patterns of tensor names that hold nothing the model needs."""


_LAYER = "model.layers.{layer}."
LLAMA = Family(
    architectures=("LlamaForCausalLM", "LLaMAForCausalLM"),
    weights=(
        Weight("model.embed_tokens.weight", "embed", "vocab width -> vocab width"),
        Weight(_LAYER + "input_layernorm.weight", "layers.attention_norm", "width -> width"),
        Weight(_LAYER + "self_attn.q_proj.weight", "layers.q", "(heads dim) width -> width heads dim"),
        Weight(_LAYER + "self_attn.k_proj.weight", "layers.k", "(heads dim) width -> width heads dim"),
        Weight(_LAYER + "self_attn.v_proj.weight", "layers.v", "(heads dim) width -> width heads dim"),
        Weight(_LAYER + "self_attn.o_proj.weight", "layers.o", "width (heads dim) -> heads dim width"),
        Weight(_LAYER + "self_attn.q_proj.bias", "layers.q_bias", "(heads dim) -> heads dim"),
        Weight(_LAYER + "self_attn.k_proj.bias", "layers.k_bias", "(heads dim) -> heads dim"),
        Weight(_LAYER + "self_attn.v_proj.bias", "layers.v_bias", "(heads dim) -> heads dim"),
        Weight(_LAYER + "self_attn.o_proj.bias", "layers.o_bias", "width -> width"),
        Weight(_LAYER + "post_attention_layernorm.weight", "layers.mlp_norm", "width -> width"),
        Weight(_LAYER + "mlp.gate_proj.weight", "layers.gate", "mlp width -> width mlp"),
        Weight(_LAYER + "mlp.up_proj.weight", "layers.up", "mlp width -> width mlp"),
        Weight(_LAYER + "mlp.down_proj.weight", "layers.down", "width mlp -> mlp width"),
        Weight(_LAYER + "mlp.gate_proj.bias", "layers.gate_bias", "mlp -> mlp"),
        Weight(_LAYER + "mlp.up_proj.bias", "layers.up_bias", "mlp -> mlp"),
        Weight(_LAYER + "mlp.down_proj.bias", "layers.down_bias", "width -> width"),
        Weight("model.norm.weight", "norm", "width -> width"),
        Weight("lm_head.weight", "head", "vocab width -> width vocab"),
    ),
    # Old files hold the rotary frequencies, which are computed.
    ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)


@dataclasses.dataclass(frozen=True)
class Axes:
    """A parsed `Weight.axes`."""

    file: tuple[tuple[str, ...], ...]
    ours: tuple[str, ...]

    @property
    def flat(self) -> tuple[str, ...]:
        return tuple(name for group in self.file for name in group)

    def to_ours(self) -> list[int]:
        return [self.flat.index(name) for name in self.ours]

    def to_file(self) -> list[int]:
        return [self.ours.index(name) for name in self.flat]


def parse_axes(text: str) -> Axes:
    """ "(heads dim) width -> width heads dim" and the like."""
    left, right = text.split(" -> ")
    groups = tuple(tuple((group or single).split()) for group, single in re.findall(r"\(([^)]*)\)|(\w+)", left))
    return Axes(groups, tuple(right.split()))


def read_part(tensor: Any, axes: Axes, shape: Sequence[int], index: Sequence[slice]) -> np.ndarray:
    """parameter[index] of one layer's parameter of `shape`, reading only the rows and columns it needs.

    tensor: what a tuple of slices makes an array of (a safetensors slice, a NumPy array).
    """
    sizes = dict(zip(axes.ours, shape))
    wanted = {name: slice(*part.indices(sizes[name])[:2]) for name, part in zip(axes.ours, index)}
    ranges, split, rest = [], [], []
    for first, *others in axes.file:
        inner = math.prod(sizes[name] for name in others)
        ranges.append(slice(wanted[first].start * inner, wanted[first].stop * inner))
        split += [wanted[first].stop - wanted[first].start, *(sizes[name] for name in others)]
        rest += [slice(None), *(wanted[name] for name in others)]
    return tensor[tuple(ranges)].reshape(split)[tuple(rest)].transpose(axes.to_ours())


def present(family: Family, leaves: Mapping[str, Any]) -> list[Weight]:
    """The lines of the map whose parameter the model has (biases, the untied head)."""
    return [weight for weight in family.weights if weight.ours in leaves]


def tensor_names(weight: Weight, layers: int) -> list[str]:
    """The names of one line of the map, written out for each layer."""
    return [weight.hf.format(layer=layer) for layer in (range(layers) if "{layer}" in weight.hf else [0])]


def all_tensors(layers: int, weights: Sequence[Weight]) -> Iterator[tuple[str, Weight, int]]:
    """(name, weight, layer) of every tensor: the embedding, layer after layer, the rest."""
    stacked = [weight for weight in weights if weight.ours.startswith("layers.")]
    before = [weight for weight in weights if weight.ours == "embed"]
    yield from ((weight.hf, weight, 0) for weight in before)
    for layer in range(layers):
        yield from ((weight.hf.format(layer=layer), weight, layer) for weight in stacked)
    yield from ((weight.hf, weight, 0) for weight in weights if weight not in stacked + before)
