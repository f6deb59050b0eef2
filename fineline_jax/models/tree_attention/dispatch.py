"""Which attention over prefix-tree rows runs, on every device over its own rows and heads."""

import importlib
from collections.abc import Callable
from typing import Literal

import jax
from jaxtyping import Array, Int32

from fineline_jax.models.attention import Attend, Scores, on_each_device
from fineline_jax.models.tree_attention.blockwise import blockwise, reference

Implementation = Literal["reference", "blockwise", "tpu", "gpu"]


def pick(platform: str) -> Implementation:
    """The fastest implementation there is for `platform`."""
    kernels: dict[str, Implementation] = {"tpu": "tpu", "gpu": "gpu"}
    return kernels.get(platform, "blockwise")


def over_rows(
    implementation: Implementation, end: Int32[Array, "batch length"], depth: Int32[Array, "batch length"] | None = None
) -> Attend:
    """Attention under the mask of `end`, for `decoder.hidden_states`; every device works on its rows and heads.

    end, depth: batch spread over (replica, fsdp); depth, the position of each token in its request, is needed where
    the model changes scores by distance: then `blockwise` runs on every platform. Call it under `jax.set_mesh`.
    """
    local = _function(implementation)

    def changed(query, key, value, end, depth, scores: Scores) -> jax.Array:
        assert depth is not None, "a model that changes scores by distance needs the depths"
        return blockwise(query, key, value, end, depth, change=scores)

    return on_each_device(lambda query, key, value, end, depth: local(query, key, value, end), changed, end, depth)


def _function(implementation: Implementation) -> Callable:
    if implementation in ("tpu", "gpu"):
        return importlib.import_module(f"fineline_jax.models.tree_attention.{implementation}").kernel
    return {"reference": reference, "blockwise": blockwise}[implementation]
