"""torch.distributed.checkpoint (DCP): `.metadata` says which bytes of which `.distcp` file hold which box of a tensor.

OLMo-core, torchtitan and accelerate's FSDP write it. The metadata is a pickle, read by torch_pickle's machine and not
executed; each box is what torch.save writes. Tensors of optimizers are left out; the names of OLMo-core become those of
Hugging Face. Sources: torch/distributed/checkpoint/{metadata,filesystem}.py, OLMo-core src/olmo_core/nn/hf/convert.py.
"""

import functools
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fineline_jax.checkpoints.formats.lazy_tensor import ComputedTensor, Tensor, joined
from fineline_jax.checkpoints.formats.torch_bin import STORAGE_DTYPES, tensor_at
from fineline_jax.checkpoints.formats.torch_pickle import Name, Refused, read_pickle
from fineline_jax.checkpoints.formats.weight_format import WeightFormat
from fineline_jax.errors import UserError

METADATA = ".metadata"
_CLASSES = "Metadata TensorStorageMetadata BytesStorageMetadata ChunkStorageMetadata MetadataIndex TensorProperties"
_PACKAGE = "torch.distributed.checkpoint."
DTYPES = {f"torch.{dtype.name}": dtype for dtype in STORAGE_DTYPES.values()}
RECORDS = (
    *(f"{_PACKAGE}metadata.{name}" for name in (*_CLASSES.split(), "StorageMeta", "_MEM_FORMAT_ENCODING")),
    *(f"{_PACKAGE}filesystem.{name}" for name in ("_StorageInfo", "_StoragePrefix")),
    *("torch.serialization._get_layout", "pathlib.PosixPath", "pathlib._local.PosixPath", *DTYPES),
)
OPTIMIZER = re.compile(r"optim|state\.|param_groups|.*\b(exp_avg|exp_avg_sq|step)$")
"""Beginnings of the names of what is no part of the model."""
OLMO_CORE = {
    r"embeddings\.": "model.embed_tokens.",
    r"lm_head\.norm\.": "model.norm.",
    r"lm_head\.w_out\.": "lm_head.",
    r"blocks\.(\d+)\.attention\.w_([qkv])\.": r"model.layers.\1.self_attn.\2_proj.",
    r"blocks\.(\d+)\.attention\.w_out\.": r"model.layers.\1.self_attn.o_proj.",
    r"blocks\.(\d+)\.attention\.([qk]_norm)\.": r"model.layers.\1.self_attn.\2.",
    r"blocks\.(\d+)\.feed_forward\.w1\.": r"model.layers.\1.mlp.gate_proj.",
    r"blocks\.(\d+)\.feed_forward\.w2\.": r"model.layers.\1.mlp.down_proj.",
    r"blocks\.(\d+)\.feed_forward\.w3\.": r"model.layers.\1.mlp.up_proj.",
}
_NORMS_BEFORE = {
    r"blocks\.(\d+)\.attention_norm\.": r"model.layers.\1.input_layernorm.",
    r"blocks\.(\d+)\.feed_forward_norm\.": r"model.layers.\1.post_attention_layernorm.",
}
_NORMS_BEHIND = {
    r"blocks\.(\d+)\.attention_norm\.": r"model.layers.\1.post_attention_layernorm.",
    r"blocks\.(\d+)\.feed_forward_norm\.": r"model.layers.\1.post_feedforward_layernorm.",
}


def read_dcp(path: Path) -> dict[str, Tensor]:
    """The tensors of the model by name, of `.metadata`.

    Raises UserError naming the file for metadata that are damaged or hold more than tensors need.
    """
    try:
        found = _tensors(path.parent, read_pickle(path.read_bytes(), "|".join(map(re.escape, RECORDS))))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; fetch it") from error
    except Refused as refused:
        raise UserError(f"{path}: holds {refused}; only what describes tensors is read, nothing is executed") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: not the metadata of a distributed checkpoint ({error!r}); fetch it again") from error
    if all(name.startswith("model.") for name in found):
        found = {name.removeprefix("model."): tensor for name, tensor in found.items()}
    return {_renamed(name, found): tensor for name, tensor in found.items()}


DCP = WeightFormat("torch distributed checkpoints", r"\.metadata|__\d+_\d+\.distcp", read_dcp, key=METADATA)


def _tensors(folder: Path, metadata: Any) -> dict[str, Tensor]:
    stored = {
        (key.state["fqn"], key.state.get("offset")): info.state for key, info in metadata.state["storage_data"].items()
    }
    tensors: dict[str, Tensor] = {}
    for name, about in metadata.state["state_dict_metadata"].items():
        if about.kind.endswith("TensorStorageMetadata") and not OPTIMIZER.match(name):
            shape, boxes = about.state["size"], [box.state for box in about.state["chunks"]]
            kind = about.state["properties"].state[0]
            if not isinstance(kind, Name) or kind.text not in DTYPES:
                raise UserError(
                    f"{folder / METADATA}: tensor {name} is {getattr(kind, 'text', kind)}, which is not read"
                )
            if sum(math.prod(box["sizes"]) for box in boxes) != math.prod(shape):
                raise UserError(f"{folder / METADATA}: tensor {name} is not covered by its pieces; fetch it again")
            pieces = [
                (box["offsets"], _piece(folder, name, DTYPES[kind.text], box["sizes"], stored[name, box["offsets"]]))
                for box in boxes
            ]
            tensors[name] = joined(name, shape, pieces)
    return tensors


def _piece(folder: Path, name: str, dtype: Any, shape: tuple[int, ...], info: Mapping[str, Any]) -> ComputedTensor:
    """A box of a tensor; its file is opened when it is read."""
    file = folder / info["relative_path"]
    if file.parent != folder:
        raise UserError(f"{folder / METADATA}: tensor {name} is in {info['relative_path']!r}, not beside it")

    @functools.cache
    def opened() -> Tensor:
        tensor = tensor_at(file, name, info["offset"], info["length"])
        if (tensor.shape, tensor.dtype) != (shape, dtype):
            raise UserError(f"{file}: tensor {name} has another shape or dtype than {METADATA} says; fetch both again")
        return tensor

    return ComputedTensor(name, file, dtype, shape, lambda index: opened()[index])


def _renamed(name: str, tensors: Mapping[str, Tensor]) -> str:
    """The name that Hugging Face has for a tensor of OLMo-core; another name as it is."""
    q, norm = (tensors.get(f"blocks.0.attention.{one}.weight") for one in ("w_q", "q_norm"))
    behind = q is not None and norm is not None and norm.shape[0] == q.shape[0]  # OLMo 2 norms all heads at once
    for pattern, stands in (OLMO_CORE | (_NORMS_BEHIND if behind else _NORMS_BEFORE)).items():
        if re.match(pattern, name):
            return re.sub(pattern, stands, name, count=1)
    return name
