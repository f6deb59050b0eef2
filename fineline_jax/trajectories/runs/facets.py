"""What distinguishes runs, from their own recipes: columns such as size, batch and seed for every series."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from fineline_jax.errors import UserError

SEEDS = ("seed", "data_seed")
NOT_LEARNED = ("name", "checkpoints", "logging", "mesh", "compute", *SEEDS)
"""Fields of a recipe that make no arm of their own: they change nothing that is learned, or are the seed."""


def parse_group(text: str) -> dict[str, str]:
    """`size=model.width,batch=batch.sequences` as {facet: field}. Raises UserError."""
    group = {}
    for item in text.split(","):
        name, equals, field = (part.strip() for part in item.partition("="))
        if not (name and equals and field):
            raise UserError(f"--group {text}: {item!r} is no NAME=FIELD, such as size=model.width")
        if name in ("series", "arm") or name in group:
            raise UserError(f"--group {text}: the name {name!r} is taken; choose another")
        group[name] = field
    return group


def facets(recipes: Mapping[str, Mapping[str, Any]], group: Mapping[str, str] | None = None) -> pd.DataFrame:
    """Columns series, one per facet, arm, seed: a row per run.

    recipes: the content of recipe.json by series. group: facet -> dotted field; None: every field in which the runs
    differ, under its own name. arm: the values of all facets but `seed`; runs of one arm are its seeds.
    Raises UserError where a recipe lacks a field, or two runs are of one arm and seed.
    """
    flat = {series: _flat(recipe) for series, recipe in recipes.items()}
    if group is None:
        fields = {field: None for recipe in flat.values() for field in recipe}
        differing = [field for field in fields if len({_text(recipe.get(field)) for recipe in flat.values()}) > 1]
        group = {field: field for field in differing if field.partition(".")[0] not in NOT_LEARNED}
    rows = []
    for series, recipe in flat.items():
        row: dict[str, Any] = {"series": series}
        for name, field in group.items():
            if field not in recipe and field in {one for other in flat.values() for one in other}:
                recipe = recipe | {field: None}
            if field not in recipe:
                raise UserError(f"--group {name}={field}: the recipe of {series} has no such field")
            row[name] = recipe[field]
        seeds = [recipe[name] for name in SEEDS if recipe.get(name) is not None]
        row.setdefault("seed", "/".join(dict.fromkeys(map(str, seeds))) or "0")
        arms = [f"{name}={_text(row[name])}" for name in group if name != "seed"]
        rows.append(row | {"arm": ", ".join(arms) or "all"})
    frame = pd.DataFrame(rows)
    twice = frame[frame.duplicated(["arm", "seed"], keep=False)]
    if len(twice):
        names = " and ".join(twice[(twice["arm"] == twice.iloc[0]["arm"])]["series"].astype(str))
        raise UserError(f"{names}: runs of one arm ({twice.iloc[0]['arm']}) and seed; name what differs with --group")
    return frame


def _flat(recipe: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Dotted field -> value; lists stay as they are."""
    found: dict[str, Any] = {}
    for name, value in recipe.items():
        found |= _flat(value, f"{above}{name}.") if isinstance(value, Mapping) else {f"{above}{name}": value}
    return found


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
