"""Planning: what a training or scoring step needs on devices that are not here."""

import functools
import sys
from typing import Annotated

import tyro
from tyro.conf import Positional, arg

from fineline_jax.commands.pretrain import call_with_recipe, recipe_first
from fineline_jax.commands.usage import deferred, parsed
from fineline_jax.errors import UserError
from fineline_jax.recipe import MeshShape, Recipe
from fineline_jax.scoring.options import Dtype


def plan_for_help(recipe: Annotated[Positional[str], arg(metavar="RECIPE")]) -> None:
    """Say what a recipe takes on a pod or on GPUs: memory, traffic, time and disk; no such device is needed.

    Args:
        recipe: Name in configs/, a Python or JSON file, or a run folder.
    """


def plan(arguments: list[str]) -> int:
    """`fineline plan RECIPE --topology NAME`, with the fields of the recipe as options, or with --score SERIES."""
    if any(argument.partition("=")[0] == "--score" for argument in arguments):
        program = "fineline plan"
        return parsed(program, lambda: tyro.cli(deferred(_plan_scoring), prog=program, args=arguments))()
    from fineline_jax.catalogue import load_recipe

    name, *arguments = recipe_first("plan", plan_for_help, arguments)
    default = load_recipe(name)

    def options(
        topology: tuple[str, ...],
        full: bool = False,
        search: bool = False,
        search_seconds: float = 300.0,
        mfu: float | None = None,
        flags: str = "",
        recipe: Annotated[Recipe, arg(name="")] = default,
    ) -> int:
        """Compile the recipe's training step for devices that are not here, and say what the run takes.

        Args:
            topology: Devices: v4-512, v5p-128, v5e-256, v6e-256, 2xv5e-256 (two slices), h100x8, h200x64.
            full: Compile to the end instead of stopping when the memory is planned.
            search: Try recomputation, meshes and micro-batches, and list what fits, the fastest first; what was tried
                is on standard error meanwhile.
            search_seconds: Of --search: begin no compilation after so many seconds.
            mfu: Model FLOPs utilisation for speed and time, 0.4 for 40 %; default: the middle of what was published.
            flags: Named groups of options of the compiler, with commas between; see docs/plan.md.
            recipe: Fields of the recipe.
        """
        from fineline_jax.plan.compiled import Job, compiled
        from fineline_jax.plan.costs import report
        from fineline_jax.plan.flags import flags_of
        from fineline_jax.plan.search import search as search_all
        from fineline_jax.plan.search import table
        from fineline_jax.plan.topologies import topology as described

        if mfu is not None and not 0 < mfu < 1:
            raise UserError(f"--mfu {mfu}: give a share between 0 and 1, such as 0.4")
        if not search_seconds >= 0:
            raise UserError(f"--search-seconds {search_seconds}: must be at least 0")
        say = functools.partial(print, file=sys.stderr, flush=True)
        for number, wanted in enumerate(map(described, topology)):
            job = Job(wanted, recipe.mesh, recipe, flags=flags_of(flags, wanted), full=full)
            text = table(search_all(job, search_seconds, say)) if search else report(compiled(job), mfu)
            print("\n" * bool(number) + text, flush=True)
        return 0

    return call_with_recipe(f"fineline plan {name}", options, default.model, arguments)


def _plan_scoring(
    score: str,
    topology: tuple[str, ...],
    dtype: Dtype = "bfloat16",
    mesh: MeshShape = MeshShape(),
    full: bool = False,
) -> int:
    """Compile the steps that score a series for devices that are not here.

    Args:
        score: The series, as `fineline score` takes it, or a recipe whose model is scored.
        topology: Devices: v4-8, v5p-8, v5e-8, h100x8 and others.
        dtype: Of the weights and the matrix products.
        mesh: Devices per axis; default: a whole copy of the weights on each device where that fits, else sharded.
        full: Compile to the end instead of stopping when the memory is planned.
    """
    from fineline_jax.plan.scoring import report_of_scoring
    from fineline_jax.plan.topologies import topology as described

    for number, wanted in enumerate(map(described, topology)):
        print("\n" * bool(number) + report_of_scoring(score, wanted, dtype, mesh, full), flush=True)
    return 0
