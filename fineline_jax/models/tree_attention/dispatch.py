"""Which attention over prefix-tree rows runs, on every device over its own rows and heads."""

import functools
from collections.abc import Callable
from typing import Literal

import jax
from jaxtyping import Array, Int32

from fineline_jax.models.attention import Attend, Scores
from fineline_jax.models.sharding import HEADS, TOKENS
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
    on_devices = functools.partial(jax.shard_map, out_specs=HEADS, check_vma=False)

    def attend(query: jax.Array, key: jax.Array, value: jax.Array, scores: Scores | None = None) -> jax.Array:
        specs = (HEADS, HEADS, HEADS, TOKENS)
        if scores is None:
            return on_devices(_function(implementation), in_specs=specs)(query, key, value, end)
        assert depth is not None, "a model that changes scores by distance needs the depths"

        def changed(query, key, value, end, depth, window, slopes):
            return blockwise(query, key, value, end, depth, change=Scores(window, slopes, scores.softcap))

        mapped = on_devices(changed, in_specs=(*specs, TOKENS, jax.P(), jax.P("tensor")))
        return mapped(query, key, value, end, depth, scores.window, scores.slopes)

    return attend


def _function(implementation: Implementation) -> Callable:
    if implementation == "tpu":
        from fineline_jax.models.tree_attention.tpu import kernel

        return kernel
    if implementation == "gpu":
        from fineline_jax.models.tree_attention.gpu import kernel

        return kernel
    return {"reference": reference, "blockwise": blockwise}[implementation]
