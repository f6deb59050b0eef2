"""Baichuan-7B and Baichuan2-7B: Llama with one tensor for queries, keys and values; Baichuan2 also with a head whose
rows have length 1 (its files hold them as trained; `decoder.head_weight` normalises)."""

import dataclasses
from typing import Any

from fineline_jax.errors import UserError
from fineline_jax.models.config import ModelConfig
from fineline_jax.models.families import llama
from fineline_jax.models.families.family import Family
from fineline_jax.models.families.hf_config import HfConfig
from fineline_jax.models.families.name_map import Weight

_ATTENTION = "model.layers.{layer}.self_attn."
_WEIGHTS = (
    *llama.OUTER,
    *llama.NORMS,
    Weight(_ATTENTION + "W_pack.weight", "layers.q", "(0/3 heads dim) width -> width heads dim"),
    Weight(_ATTENTION + "W_pack.weight", "layers.k", "(1/3 heads dim) width -> width heads dim"),
    Weight(_ATTENTION + "W_pack.weight", "layers.v", "(2/3 heads dim) width -> width heads dim"),
    Weight(_ATTENTION + "o_proj.weight", "layers.o", "width (heads dim) -> heads dim width"),
    *llama.MLP,
)


def from_hf(raw: HfConfig) -> ModelConfig:
    # The 13B models bear the same names, but have ALiBi instead of rotary positions, 40 heads and no such key.
    if raw.find("max_position_embeddings") is None or raw.find("num_attention_heads") == 40:
        raise UserError(
            f"{raw.where}: num_attention_heads={raw.find('num_attention_heads')!r} without rotary"
            " max_position_embeddings is Baichuan-13B, whose ALiBi positions are not computed; use a 7B model"
        )
    return dataclasses.replace(llama.from_hf(raw), kv_heads=raw.integer("num_attention_heads"))


def to_hf(config: ModelConfig) -> dict[str, Any]:
    return llama.to_hf(config) | {"model_type": "baichuan", "model_max_length": config.context}


BAICHUAN = Family(
    name="baichuan",
    architectures=("BaiChuanForCausalLM",),
    from_hf=from_hf,
    to_hf=to_hf,
    weights=_WEIGHTS,
    ignored=llama.ROTARY,
)

BAICHUAN2 = Family(
    name="baichuan2",
    architectures=("BaichuanForCausalLM",),
    from_hf=lambda raw: dataclasses.replace(from_hf(raw), head="normalised"),
    to_hf=to_hf,
    weights=_WEIGHTS,
    ignored=llama.ROTARY,
)
