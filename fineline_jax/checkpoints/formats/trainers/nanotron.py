"""Checkpoints of nanotron: checkpoint_metadata.json, and beneath model/ a safetensors file for each parameter and rank
of tensor parallelism, whose metadata say which box of the whole tensor it holds; read only, Llamas alone.

Queries, keys and values, and gate and up, are one tensor each. Where model_config.json has rope_interleaved, rows of
queries and keys are put back from pairs to halves. Sources in nanotron: src/nanotron/serialize/{weights,utils}.py,
src/nanotron/parallel/parameters.py, examples/llama/convert_weights.py.
"""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from fineline_jax.checkpoints.formats.lazy_tensor import Tensor, box, joined, permuted
from fineline_jax.checkpoints.formats.safetensors_files import read_safetensors
from fineline_jax.checkpoints.formats.trainers.gguf import rotary_rows
from fineline_jax.checkpoints.formats.weight_format import WeightFormat
from fineline_jax.errors import UserError, reading
from fineline_jax.models.families.lines import UNEQUAL, fused, fused_mlp, lines
from fineline_jax.models.families.llama import LLAMA

KEY, CONFIG = "checkpoint_metadata.json", "model_config.json"
_SHARD = re.compile(r"model_(weight|bias)(?:_pp-rank-\d+-of-\d+_tp-rank-\d+-of-\d+)?\.safetensors")
_BLOCK = "model.decoder.{layer}.pp_block."
NANOTRON_LLAMA = dataclasses.replace(
    LLAMA,
    weights=(
        *lines(
            _BLOCK,
            "embed=model.token_position_embeddings.pp_block.token_embedding norm=model.final_layer_norm.pp_block"
            " head=model.lm_head.pp_block attention_norm=input_layernorm mlp_norm=post_attention_layernorm"
            " o=attn.o_proj down=mlp.down_proj",
        ),
        *fused(_BLOCK + "attn.qkv_proj", UNEQUAL),
        *fused_mlp(_BLOCK + "mlp.gate_up_proj"),
    ),
    tied_copies=("model.lm_head.pp_block.weight",),
)


def read_nanotron(path: Path) -> dict[str, Tensor]:
    """The tensors of the folder of `path`, its metadata. Raises UserError naming the file and the tensor."""
    shards: dict[str, list[Path]] = {}
    root = path.parent / "model"
    for file in sorted(root.rglob("*.safetensors")):
        if (found := _SHARD.fullmatch(file.name)) is None:
            raise UserError(f"{file}: is no part of a dense model, and only those are read; export it with nanotron")
        name = ".".join([*file.parent.relative_to(root).parts, found[1]])
        shards.setdefault(name, []).append(file)
    raw = config_of(path.parent)
    tensors = {name: _whole(name, files) for name, files in shards.items()}
    with reading(path.parent / CONFIG, what="does not fit the weights"):
        for name in [name for name in tensors if raw.get("rope_interleaved") and ".qkv_proj." in name]:
            heads, size = raw["num_attention_heads"], tensors[name].shape[0]
            turned = heads + (raw.get("num_key_value_heads") or heads)
            rows = size // (2 * turned - heads) * turned
            tensors[name] = permuted(tensors[name], np.append(rotary_rows(turned, rows), np.arange(rows, size)))
    return tensors


def config_of(folder: Path) -> dict[str, Any]:
    """The config.json of the model: nanotron's model_config.json has the same keys for a Llama. Raises UserError."""
    path = folder / CONFIG
    with reading(path, "fetch it, it lies beside checkpoint_metadata.json", "not valid JSON"):
        raw = json.loads(path.read_bytes())
    if not isinstance(raw, dict) or not raw.get("is_llama_config"):
        raise UserError(f"{path}: is_llama_config is not true, and only Llamas are read; export it with nanotron")
    return raw | {"architectures": ["LlamaForCausalLM"]}


NANOTRON = WeightFormat(
    "nanotron",
    rf"{KEY}|{CONFIG}|model/.+\.safetensors",
    read_nanotron,
    key=KEY,
    config=config_of,
    families=(NANOTRON_LLAMA,),
)


def _whole(name: str, files: list[Path]) -> Tensor:
    """One parameter of all its ranks."""
    pieces: list[tuple[list[int], Tensor]] = []
    shape: tuple[int, ...] = ()
    for file in files:
        if (tensor := read_safetensors(file).get("data")) is None:
            raise UserError(f"{file}: holds no tensor 'data'; fetch it again")
        with reading(file, what=f"its metadata do not say which box of {name} it holds"), file.open("rb") as opened:
            about = json.loads(opened.read(int.from_bytes(opened.read(8), "little"))).get("__metadata__") or {}
            shape = tuple(map(int, re.findall(r"\d+", about.get("unsharded_shape", str(tensor.shape)))))
            whole = "|".join(["None,None,None"] * len(shape))
            for pair in about.get("local_global_slices_pairs", f"{whole}#{whole}").split(";"):
                (begins, sizes), (there, same) = map(_box, pair.split("#"), (tensor.shape, shape))
                if sizes != same:
                    raise ValueError(f"{pair} pairs boxes of two sizes")
                pieces.append((there, box(tensor, begins, sizes)))
    if sum(math.prod(box.shape) for _, box in pieces) != math.prod(shape):
        raise UserError(
            f"{files[0].parent}: tensor {name} is not covered once by its files; keep all of one run's ranks"
        )
    return joined(name, shape, pieces)


def _box(text: str, shape: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """The first index along each axis, and the sizes, of "0,8,None|None,None,None". Raises ValueError."""
    spans = []
    for part, size in zip(text.split("|"), shape, strict=True):
        first, last, step = slice(*(None if word == "None" else int(word) for word in part.split(","))).indices(size)
        if step != 1 or first >= last:
            raise ValueError(f"{text} is no box")
        spans.append((first, last - first))
    return [first for first, _ in spans], [size for _, size in spans]
