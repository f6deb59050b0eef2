"""The compiled programs of training, shared by runs that differ only in what is an argument of them."""

import dataclasses
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import jax

from fineline_jax.recipe import Checkpoints, Logging, Recipe, Schedule, Source

Program = TypeVar("Program")


class Programs:
    """`programs(name, recipe, mesh, make)` is what `make()` gave for the first recipe of this shape on this mesh.

    A sweep passes one to all its runs, so that each program is compiled once for each shape.
    """

    def __init__(self) -> None:
        self._made: dict[Any, Any] = {}
        self._lock = threading.Lock()

    def __call__(self, name: str, recipe: Recipe, mesh: jax.sharding.Mesh, make: Callable[[], Program]) -> Program:
        key = name, shape_of(recipe), mesh
        with self._lock:
            if key not in self._made:
                self._made[key] = make()
            return self._made[key]


def shape_of(recipe: Recipe) -> Recipe:
    """The recipe with all that no compiled program depends on set to the same value: name, seeds, schedule, weight
    decay, tokens, data sets, checkpoints and logging."""
    return dataclasses.replace(
        recipe,
        name="shape",
        batch=dataclasses.replace(recipe.batch, schedule=(), learning_rate_rule="fixed"),
        data=dataclasses.replace(recipe.data, sources=(Source("-"),), order="shuffle"),
        optimizer=dataclasses.replace(recipe.optimizer, schedule=Schedule(), weight_decay=0.0),
        tokens=recipe.tokens_per_step,
        checkpoints=Checkpoints(),
        logging=Logging(),
        seed=0,
        data_seed=None,
    )
