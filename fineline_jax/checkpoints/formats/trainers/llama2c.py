"""Checkpoints of llama2.c in float32: `.bin` files whose header has the sizes of a Llama; read only.

The first kind begins with seven sizes, version 1 with 256 bytes, of which the first are a magic number. Tensors stand
in a fixed order without names, each kind for all layers one behind the other; rows of queries and keys are in Meta's
rotary order. Source: llama2.c, export.py (legacy_export, version1_export) and run.c.
"""

import math
import struct
from pathlib import Path
from typing import Any

import numpy as np

from fineline_jax.checkpoints.formats.lazy_tensor import StoredTensor, Tensor, permuted, row_major
from fineline_jax.checkpoints.formats.trainers.gguf import rotary_rows
from fineline_jax.checkpoints.formats.weight_format import WeightFormat
from fineline_jax.errors import UserError, reading

_SIZES = struct.Struct("<7i")
_MAGIC = 0x616B3432
_HEADER = 256
MOST = 1 << 24
"""No size of such a model is larger."""


def read_llama2c(path: Path) -> dict[str, Tensor]:
    """The tensors of the file by Hugging Face's names; reads the header only. Raises UserError naming the file."""
    version, sizes, tied = _opened(path)
    *spans, (_, _, end) = _spans(version, sizes, tied)
    if (size := path.stat().st_size) != end:
        raise UserError(f"{path}: has {size} bytes, its header means {end}; fetch it again")
    found: dict[str, Tensor] = {}
    for name, shape, offset in spans:
        tensor: Tensor = StoredTensor(name, path, np.dtype("<f4"), shape, offset, row_major(shape, 4))
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = permuted(tensor, rotary_rows(sizes[4] if "k_proj" in name else sizes[3], shape[0]))
        found[name] = tensor
    return {name: tensor for name, tensor in found.items() if name}


def config_of(path: Path) -> dict[str, Any]:
    """The config.json of the model in the file. Raises UserError naming it."""
    _, sizes, tied = _opened(path)
    keys = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size"
    named = dict(zip(f"{keys} max_position_embeddings".split(), sizes, strict=True))
    fixed = {"architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5, "rope_theta": 10_000.0}
    return fixed | named | {"tie_word_embeddings": tied}


def is_llama2c(path: Path) -> bool:
    """Whether the file begins as such a checkpoint."""
    try:
        return path.suffix == ".bin" and _header(path)[0] >= 0
    except (OSError, ValueError):
        return False


LLAMA2C = WeightFormat(
    "llama2.c", r"stories\w+\.bin", read_llama2c, suffixes=(".bin",), recognises=is_llama2c, config=config_of
)


def _header(path: Path) -> tuple[int, tuple[int, ...], bool]:
    """The version (0: the first kind), the sizes, and whether the embedding is the head. Raises ValueError."""
    with path.open("rb") as file:
        start = file.read(_HEADER)
    version, sizes = 0, _SIZES.unpack_from(start.ljust(_SIZES.size, b"\0"))
    tied = sizes[5] > 0
    if sizes[0] == _MAGIC:
        version, sizes = sizes[1], _SIZES.unpack_from(start.ljust(_HEADER, b"\0"), 8)
        tied = start[8 + _SIZES.size] == 1
    sizes = (*sizes[:5], abs(sizes[5]), sizes[6])
    whole = all(0 < size < MOST for size in sizes)
    if not whole or sizes[0] % (2 * sizes[3]) or sizes[3] % sizes[4]:
        raise ValueError(f"it begins with {start[:28].hex(' ', 4)}")
    return version, sizes, tied


def _opened(path: Path) -> tuple[int, tuple[int, ...], bool]:
    with reading(path, what="not a checkpoint of llama2.c"):
        version, sizes, tied = _header(path)
    if version > 1:
        raise UserError(f"{path}: version {version} of llama2.c's format is quantized and not read; export version 1")
    return version, sizes, tied


def _spans(version: int, sizes: tuple[int, ...], tied: bool) -> list[tuple[str, tuple[int, ...], int]]:
    """Name, shape and first byte of each tensor in the order of the file ("": the first kind's table of angles), then
    the end of the file."""
    width, hidden, layers, heads, kv_heads, vocabulary, context = sizes
    narrow = width // heads * kv_heads
    matrices = [("self_attn.q_proj", width, width), ("self_attn.k_proj", narrow, width)]
    matrices += [("self_attn.v_proj", narrow, width), ("self_attn.o_proj", width, width)]
    mlp = [("mlp.gate_proj", hidden, width), ("mlp.down_proj", width, hidden), ("mlp.up_proj", hidden, width)]
    first, second = [("input_layernorm", width)], [("post_attention_layernorm", width)]
    embed, norm = ("model.embed_tokens.weight", (vocabulary, width)), ("model.norm.weight", (width,))

    def of_layers(kinds: list[Any]) -> list[tuple[str, tuple[int, ...]]]:
        return [(f"model.layers.{i}.{name}.weight", tuple(shape)) for name, *shape in kinds for i in range(layers)]

    if version == 0:
        angles = ("", (context, width // heads))
        order = [embed, *of_layers([*first, *matrices, *second, *mlp]), norm, angles]
    else:
        order = [*of_layers([*first, *second]), norm, embed, *of_layers([*matrices, *mlp])]
    order += [] if tied else [("lm_head.weight", (vocabulary, width))]
    at, spans = (_HEADER if version else _SIZES.size), []
    for name, shape in order:
        spans.append((name, shape, at))
        at += 4 * math.prod(shape)
    return [*spans, ("", (), at)]
