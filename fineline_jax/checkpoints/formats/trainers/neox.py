"""Checkpoints of GPT-NeoX in layers of DeepSpeed, `layer_LL-model_RR-model_states.pt`: of one rank of tensor
parallelism each; read only.

Layer 0 is the embedding, those of the model begin at 2. Ranks are joined as GPT-NeoX's own converter does: outputs and
inputs of matrices one behind the other, norms averaged, biases behind split inputs added. Names become Hugging Face's.
Source: gpt-neox, tools/ckpts/convert_neox_to_hf.py.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fineline_jax.checkpoints.formats.lazy_tensor import ComputedTensor, Tensor, joined
from fineline_jax.checkpoints.formats.torch_bin import read_torch_bin
from fineline_jax.checkpoints.formats.weight_format import WeightFormat
from fineline_jax.errors import UserError

KEY = "layer_00-model_00-model_states.pt"
_FILE = r"layer_(\d+)-model_(\d+)-model_states\.pt"
_BY_ROWS = r"(word_embeddings|final_linear)\.weight|(attention\.query_key_value|mlp\.dense_h_to_4h)\.(weight|bias)"
_BY_COLUMNS = r"(attention\.dense|mlp\.dense_4h_to_h)\.weight"
_ADDED = r"(attention\.dense|mlp\.dense_4h_to_h)\.bias"
_AVERAGED = r"(norm|input_layernorm|post_attention_layernorm)\.(weight|bias)"
_SAME = r"attention\.rotary_emb\.inv_freq"
OUTSIDE = {
    "word_embeddings.weight": "gpt_neox.embed_in.weight",
    "final_linear.weight": "embed_out.weight",
    "norm.weight": "gpt_neox.final_layer_norm.weight",
    "norm.bias": "gpt_neox.final_layer_norm.bias",
}


def read_neox(path: Path) -> dict[str, Tensor]:
    """The tensors of the folder of `path`, its layer 0 of rank 0. Raises UserError naming the file and the tensor."""
    files: dict[int, dict[int, Path]] = {}
    for file in path.parent.iterdir():
        if found := re.fullmatch(_FILE, file.name):
            files.setdefault(int(found[1]), {})[int(found[2])] = file
    ranks = range(1 + max(rank for layer in files.values() for rank in layer))
    tensors: dict[str, Tensor] = {}
    for layer, of_rank in sorted(files.items()):
        if lost := [rank for rank in ranks if rank not in of_rank]:
            name = f"layer_{layer:02}-model_{lost[0]:02}-model_states.pt"
            raise UserError(f"{path.parent / name}: missing; other layers have {len(ranks)} ranks: fetch it")
        states = [read_torch_bin(of_rank[rank]) for rank in ranks]
        for name in states[0]:
            parts = [state.get(name) for state in states]
            if any(part is None for part in parts):
                raise UserError(f"{path.parent}: tensor {name} of layer {layer} is not in all ranks; fetch them again")
            meant = OUTSIDE.get(name, f"gpt_neox.layers.{layer - 2}.{name}")
            tensors[meant] = _joined(meant, name, [part for part in parts if part is not None])
    return tensors


NEOX = WeightFormat("GPT-NeoX layers", _FILE, read_neox, key=KEY)


def _joined(meant: str, name: str, parts: Sequence[Tensor]) -> Tensor:
    """One tensor of all ranks."""
    first = parts[0]
    axis = 0 if re.fullmatch(_BY_ROWS, name) else 1 if re.fullmatch(_BY_COLUMNS, name) else None
    scale = 1 if re.fullmatch(_ADDED, name) else 1 / len(parts) if re.fullmatch(_AVERAGED, name) else None
    same = [tensor.shape == first.shape and tensor.dtype == first.dtype for tensor in parts]
    if not all(same) or len(first.shape) <= (axis or 0):
        raise UserError(f"{parts[same.index(False)].file}: tensor {name} has another shape or dtype than in rank 0")
    if re.fullmatch(_SAME, name):
        return first
    if axis is None and scale is None:
        raise UserError(f"{first.file}: tensor {name} is of no GPT-NeoX model that is read; convert it to Hugging Face")
    if axis is not None:
        size = first.shape[axis]
        starts = [[size * rank if at == axis else 0 for at in range(len(first.shape))] for rank in range(len(parts))]
        shape = tuple(length * len(parts) if at == axis else length for at, length in enumerate(first.shape))
        return joined(meant, shape, list(zip(starts, parts, strict=True)))

    def combined(index: tuple[slice, ...]) -> np.ndarray:
        return (sum(part[index].astype(np.float32) for part in parts) * np.float32(scale)).astype(first.dtype)

    return ComputedTensor(meant, first.file, first.dtype, first.shape, combined)
