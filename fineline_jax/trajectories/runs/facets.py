"""What distinguishes runs, from their own recipes: columns such as size, batch and seed for every series."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from fineline_jax.errors import UserError
from fineline_jax.trajectories.ablation.arms import SLACK

SEEDS = ("seed", "data_seed")
BETWEEN_SEEDS = "seeds"
"""What the intervals of the mean of an arm hold."""
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
    differ, under its own name. arm: the values of all facets but `seed`; runs of one arm are its seeds. Rows are in the
    order of the facets' values, so that the first arm has the smallest.
    Raises UserError where a recipe lacks a field, or two runs are of one arm and seed.
    """
    flat = {series: _flat(recipe) for series, recipe in recipes.items()}
    if group is None:
        fields = {field: None for recipe in flat.values() for field in recipe}
        differing = [field for field in fields if len({_text(recipe.get(field)) for recipe in flat.values()}) > 1]
        group = {field: field for field in differing if field.partition(".")[0] not in NOT_LEARNED}
    rows = list[dict[str, Any]]()
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
    rows.sort(key=lambda row: [_rank(row[name]) for name in group if name != "seed"])
    frame = pd.DataFrame(rows)
    twice = frame[frame.duplicated(["arm", "seed"], keep=False)]
    if len(twice):
        names = " and ".join(twice[(twice["arm"] == twice.iloc[0]["arm"])]["series"].astype(str))
        raise UserError(f"{names}: runs of one arm ({twice.iloc[0]['arm']}) and seed; name what differs with --group")
    return frame


def arm_means(table: pd.DataFrame) -> pd.DataFrame:
    """The mean over its seeds as a curve of its own, of each arm that has several, with an interval between seeds.

    table: tidy, with columns arm and seed. Returns a tidy table whose series are the arms,
    at the tokens that all runs of the arm have. 1.96 times its `stderr` is half of the 95 % interval of the mean:
    Student's t with the variance between runs of one arm, pooled over the arms that were scored at these tokens.
    """
    key = ["arm", "domain", "task", "metric", "tokens"]
    alike = [str(name) for name in table if name not in (*key, "series", "seed", "value", "stderr", "resampled")]
    made: dict[str, Any] = {name: (name, "first") for name in alike}
    made |= {"value": ("value", "mean"), "variance": ("value", "var"), "seeds": ("value", "size")}
    cells = table.groupby(key, sort=False, observed=True).agg(**made).reset_index()
    of_arm = cells["arm"].map(table.groupby("arm", observed=True)["series"].nunique())
    cells = cells[(cells["seeds"] == of_arm) & (of_arm > 1)]
    # tokens of one moment differ by whole steps between batch sizes
    moment = (np.log1p(cells["tokens"]) / np.log(SLACK)).round()
    freedom, squares = cells["seeds"] - 1, cells["variance"] * (cells["seeds"] - 1)
    by = [cells["domain"], cells["task"], cells["metric"], moment]
    freedom, squares = (one.groupby(by, sort=False).transform("sum") for one in (freedom, squares))
    half = stats.t.ppf(0.975, freedom) * np.sqrt(squares / freedom / cells["seeds"])
    names = cells["arm"] + " (mean of " + cells["seeds"].astype(str) + " seeds)"
    cells = cells.assign(series=names, stderr=half / 1.96)
    return cells[[name for name in table if name in cells]]


def _flat(recipe: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Dotted field -> value; lists stay as they are."""
    found: dict[str, Any] = {}
    for name, value in recipe.items():
        found |= _flat(value, f"{above}{name}.") if isinstance(value, Mapping) else {f"{above}{name}": value}
    return found


def _rank(value: Any) -> tuple[bool, float, str]:
    """Numbers by size, before all else by its text."""
    return (False, value, "") if isinstance(value, int | float) else (True, 0.0, str(value))


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
