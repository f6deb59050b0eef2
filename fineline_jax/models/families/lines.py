"""Lines of name maps in short: our names and the names of the modules in the files; the axes are known by ours."""

from collections.abc import Mapping

from fineline_jax.models.families.name_map import Weight

_NORM = "width -> width"
_OUTSIDE = {
    "embed": "vocab width -> vocab width",
    "position_embed": "vocab width -> vocab width",
    "head": "vocab width -> width vocab",
    "norm": _NORM,
    "embed_norm": _NORM,
}
_OF_LAYER = {
    **dict.fromkeys(("attention_norm", "mlp_norm", "attention_out_norm", "mlp_out_norm", "mixer_norm"), _NORM),
    **dict.fromkeys(("q", "k", "v", "g"), "(heads dim) width -> width heads dim"),
    **dict.fromkeys(("a", "b"), "heads width -> width heads"),
    **dict.fromkeys(("q_conv", "k_conv", "v_conv"), "(heads dim) 1:one tokens -> (1:one tokens) heads dim"),
    **dict.fromkeys(("q_norm", "k_norm", "inner_norm"), "dim -> dim"),
    "o": "width (heads dim) -> heads dim width",
    **dict.fromkeys(("gate", "up"), "mlp width -> width mlp"),
    "down": "width mlp -> mlp width",
    "router": "experts width -> width experts",
}
_BIASES = {
    **dict.fromkeys(("norm", "embed_norm", "attention_norm", "mlp_norm", "o", "down"), _NORM),
    **dict.fromkeys(("q", "k", "v"), "(heads dim) -> heads dim"),
    **dict.fromkeys(("gate", "up"), "mlp -> mlp"),
    "head": "vocab -> vocab",
}


def lines(layer: str, names: str, stack: str = "layers") -> tuple[Weight, ...]:
    """Weights and biases of models whose matrices are [out, in]: "our name=name in the file …", of a layer behind
    `layer`, of what is outside the layers in full. stack: where our parameters of the layers are."""
    found = []
    for ours, hf in (pair.split("=") for pair in names.split()):
        path, name = (ours, hf) if ours in _OUTSIDE else (f"{stack}.{ours}", layer + hf)
        found.append(Weight(f"{name}.weight", path, (_OUTSIDE | _OF_LAYER)[ours]))
        if ours in _BIASES:
            found.append(Weight(f"{name}.bias", f"{path}_bias", _BIASES[ours]))
    return tuple(found)


def fused(name: str, axes: Mapping[str, str], heads: str = "heads") -> tuple[Weight, ...]:
    """Lines of queries, keys and values in one tensor; axes: of each one's outputs in the file. heads: our axes of the
    query heads there."""
    return tuple(
        Weight(f"{name}.{kind}", f"layers.{ours}{suffix}", f"{outputs}{middle} {heads if ours == 'q' else 'heads'} dim")
        for ours, outputs in axes.items()
        for kind, suffix, middle in (("weight", "", " width -> width"), ("bias", "_bias", " ->"))
    )


def fused_mlp(name: str, parts: tuple[str, str] = ("gate", "up")) -> tuple[Weight, ...]:
    """Lines of the two projections into the MLP, one behind the other in one tensor."""
    axes = ("(0/2 mlp) width -> width mlp", "(1/2 mlp) width -> width mlp")
    return tuple(Weight(f"{name}.weight", f"layers.{ours}", part) for ours, part in zip(parts, axes))


BY_HEAD = {"q": "(heads 0/3 dim)", "k": "(heads 1/3 dim)", "v": "(heads 2/3 dim)"}
THIRDS = {"q": "(0/3 heads dim)", "k": "(1/3 heads dim)", "v": "(2/3 heads dim)"}
UNEQUAL = {"q": "(heads@0-{h}/{hkk} dim)", "k": "(heads@{h}-{hk}/{hkk} dim)", "v": "(heads@{hk}-{hkk}/{hkk} dim)"}
GROUPED = {"q": "(heads group@0-{g}/{g2} dim)", "k": "(heads {g}/{g2} dim)", "v": "(heads {g1}/{g2} dim)"}
"""Each key head with its queries in front."""
