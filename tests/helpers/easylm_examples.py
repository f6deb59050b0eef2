"""Streams as EasyLM writes them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.serialization
import msgpack
import numpy as np

PREFIX = ("params",)


def to_easylm(tensors: Mapping[str, np.ndarray], heads: int, kv_heads: int) -> dict[tuple[str, ...], np.ndarray]:
    """A Llama's tensors by Hugging Face name, in EasyLM's names and layout: the reverse of convert_easylm_to_hf.py."""

    def interleaved(weight: np.ndarray, count: int) -> np.ndarray:
        rows, width = weight.shape
        return weight.reshape(count, 2, rows // count // 2, width).swapaxes(1, 2).reshape(rows, width)

    inner = {
        "self_attn.q_proj": ("attention", "wq"),
        "self_attn.k_proj": ("attention", "wk"),
        "self_attn.v_proj": ("attention", "wv"),
        "self_attn.o_proj": ("attention", "wo"),
        "mlp.gate_proj": ("feed_forward", "w1"),
        "mlp.down_proj": ("feed_forward", "w2"),
        "mlp.up_proj": ("feed_forward", "w3"),
        "input_layernorm": ("attention_norm",),
        "post_attention_layernorm": ("ffn_norm",),
    }
    found = {}
    for name, weight in tensors.items():
        if name == "model.embed_tokens.weight":
            found["transformer", "wte", "embedding"] = weight
        elif name == "model.norm.weight":
            found["transformer", "ln_f", "kernel"] = weight
        elif name == "lm_head.weight":
            found["lm_head", "kernel"] = weight.T
        else:
            layer, part = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
            if part in ("self_attn.q_proj", "self_attn.k_proj"):
                weight = interleaved(weight, heads if "q_proj" in part else kv_heads)
            found["transformer", "h", layer, *inner[part], "kernel"] = weight.T
    return found


def write_stream(path: Path, arrays: Mapping[tuple[str, ...], Any], prefix: tuple[str, ...] = PREFIX) -> None:
    """As EasyLM's StreamingCheckpointer.save_checkpoint does."""
    packer = msgpack.Packer()
    with path.open("wb") as file:
        for key, value in arrays.items():
            file.write(packer.pack(((*prefix, *key), flax.serialization.to_bytes(value))))
