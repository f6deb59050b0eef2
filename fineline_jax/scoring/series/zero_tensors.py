"""Parameters that are 0 everywhere, which a checkpoint has that was saved wrongly or before it was filled."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def zero_tensors(params: dict[str, Any], mesh: jax.sharding.Mesh) -> list[str]:
    """Their names, of stacked layers as name[layer]. Biases are not looked at: they begin as zeros.

    All processes call it.
    """
    named = {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    with jax.set_mesh(mesh):
        zero = _are_zero({name: leaf for name, leaf in named.items() if "bias" not in name})
    return [
        f"{name}[{layer}]" if _is_stacked(name) else name
        for name, values in zero.items()
        for layer in np.flatnonzero(np.atleast_1d(np.asarray(values)))
    ]


@jax.jit
def _are_zero(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: jnp.all(leaf == 0, axis=tuple(range(_is_stacked(name), leaf.ndim))) for name, leaf in leaves.items()}


def _is_stacked(name: str) -> bool:
    return name.startswith(("layers.", "dense_layers."))
