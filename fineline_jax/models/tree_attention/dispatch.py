"""Which attention over prefix-tree rows runs, on every device over its own rows and heads."""

from collections.abc import Callable
from typing import Literal

import jax
from jaxtyping import Array, Int32

from fineline_jax.models.attention import Attend
from fineline_jax.models.sharding import HEADS, TOKENS
from fineline_jax.models.tree_attention.blockwise import blockwise, reference

Implementation = Literal["reference", "blockwise", "tpu", "gpu"]


def pick(platform: str) -> Implementation:
    """The fastest implementation there is for `platform`."""
    kernels: dict[str, Implementation] = {"tpu": "tpu", "gpu": "gpu"}
    return kernels.get(platform, "blockwise")


def over_rows(implementation: Implementation, end: Int32[Array, "batch length"]) -> Attend:
    """Attention under the mask of `end`, for `decoder.hidden_states`; every device works on its rows and heads.

    end: batch spread over (replica, fsdp). Call it under `jax.set_mesh`.
    """
    specs = (HEADS, HEADS, HEADS, TOKENS)
    mapped = jax.shard_map(_function(implementation), in_specs=specs, out_specs=HEADS, check_vma=False)
    return lambda query, key, value: mapped(query, key, value, end)


def _function(implementation: Implementation) -> Callable:
    if implementation == "tpu":
        from fineline_jax.models.tree_attention.tpu import kernel

        return kernel
    if implementation == "gpu":
        from fineline_jax.models.tree_attention.gpu import kernel

        return kernel
    return {"reference": reference, "blockwise": blockwise}[implementation]
