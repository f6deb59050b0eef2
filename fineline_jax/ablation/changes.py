"""A recipe with some of its fields changed, by their dotted names."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from fineline_jax.errors import UserError, near
from fineline_jax.models.config import following
from fineline_jax.recipe import Recipe


def changed(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """`recipe` with each named field replaced: {"batch.sequences": 32, "optimizer.schedule.peak": 1e-3}.

    A name is what `fineline pretrain` has as an option, or a whole part of a recipe ("model", "optimizer.schedule").
    model.kv_heads and model.head_dim follow model.heads and model.width as they do there. Raises UserError naming the
    field that is not one, or whose value cannot be.
    """
    import pydantic

    values = dataclasses.asdict(recipe)
    for name, value in {**changes, **following(recipe.model, set(changes))}.items():
        *parents, last = name.split(".")
        part: Any = values
        for step in parents:
            part = _entry(part, step, name, recipe)
        _entry(part, last, name, recipe)
        key = int(last) if isinstance(part, list) else last
        part[key] = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value  # pyright: ignore
    try:
        return _reader().validate_python(values)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise UserError(f"recipe {recipe.name}: {field}: {first['msg']}, not {first['input']!r}; correct it") from error


@functools.cache
def _reader() -> Any:
    """What checks the types of a recipe's fields; made once, which takes longer than a hundred recipes."""
    import pydantic

    return pydantic.TypeAdapter(Recipe)


def _entry(part: Any, key: str, name: str, recipe: Recipe) -> Any:
    """`part[key]`, where `part` is a dict of fields or a list of them."""
    if isinstance(part, tuple | list) and key.isdigit() and int(key) < len(part):
        return part[int(key)]
    if isinstance(part, dict) and key in part:
        return part[key]
    names = list(part) if isinstance(part, dict) else []
    hint = near(key, names, shown=lambda known: name.replace(key, known)) or "; see `fineline pretrain RECIPE --help`"
    raise UserError(f"recipe {recipe.name} has no field {name}{hint}")
