"""Training steps of a recipe that fit on named devices, the fastest first by a cost model (`costs.step_seconds`)."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator

from fineline_jax.errors import UserError
from fineline_jax.plan.compiled import Compiled, Job, compiled
from fineline_jax.plan.costs import STATE_BYTES, least_bytes, least_seconds, saved_bytes, step_seconds
from fineline_jax.plan.topologies import GIB, environment
from fineline_jax.progress import short
from fineline_jax.recipe import MeshShape, Recipe
from fineline_jax.text_table import text_table

REMAT = ("none", "qkv_context", "context", "full", "offload")
"""The less is computed again, and the more memory is taken, the earlier."""
TENSOR = (1, 2, 4, 8)
MICRO_BATCHES = (1, 2, 4, 8)
SMALLEST_FSDP = 8
"""Fewer shards leave no room for the moments of a model worth planning; with more devices the rest are replicas."""
SECONDS = 300.0
"""After which a search begins no further compilation."""


@dataclasses.dataclass(frozen=True)
class Tried:
    step: Compiled
    seconds: float


def candidates(job: Job) -> Iterator[Job]:
    """Meshes and micro-batches that divide the devices and the batch, each with every policy of recomputation."""
    assert job.recipe is not None
    recipe, count = job.recipe, job.topology.count
    for tensor, micro in itertools.product(TENSOR, MICRO_BATCHES):
        shards = count // tensor
        fits = not count % tensor and not recipe.model.kv_heads % tensor and not recipe.model.mlp_width % tensor
        fsdp = {shards, *(size for size in (64,) if size < shards and shards % size == 0)}
        for size, remat in itertools.product(
            sorted(fsdp) if fits and not recipe.batch.sequences % micro else (), REMAT
        ):
            if size >= min(SMALLEST_FSDP, shards) and recipe.batch.sequences // micro >= shards:
                mesh = MeshShape(shards // size, size, tensor)
                batch = dataclasses.replace(recipe.batch, accumulation=micro)
                compute = dataclasses.replace(recipe.compute, remat=remat)
                one = dataclasses.replace(recipe, batch=batch, mesh=mesh, compute=compute)
                yield dataclasses.replace(job, mesh=mesh, recipe=one)


def search(job: Job, seconds: float = SECONDS, say: Callable[[str], None] = lambda line: None) -> list[Tried]:
    """What fits and may be the fastest on its mesh, the fastest first.

    Candidates are compiled in the order of their least time. Left out is what cannot fit or cannot be faster than the
    best so far by the estimates of `costs`, and by what was compiled on the same mesh: where one fits, what computes
    more again in as many micro-batches or more; where one does not fit, what takes more memory. seconds: no compilation
    is begun after these. say: called with a line for each that was compiled, and one about the rest. Raises UserError
    where none fits.
    """
    environment(job.topology)
    until = time.monotonic() + seconds
    found: list[Tried] = []
    too_large: list[Compiled] = []
    refused = ""
    tries = cannot_fit = slower = late = 0
    for one in sorted(candidates(job), key=lambda one: (sum(least_seconds(one)), _place(one)[1:])):
        if least_memory(one) > one.topology.chip.memory or any(_takes_more(one, other.job) for other in too_large):
            cannot_fit += 1
        elif any(_takes_more(other.step.job, one) for other in found) or (
            found and max(least_seconds(one)) >= min(other.seconds for other in found)
        ):
            slower += 1
        elif time.monotonic() > until:
            late += 1
        else:
            tries += 1
            try:
                step = compiled(one)
            except UserError as error:  # such as a mesh that the torus has no place for
                refused = str(error)
                say(f"{_name(one)}: {refused}")
                continue
            took = step_seconds(step)
            (found.append(Tried(step, took)) if step.fits else too_large.append(step))
            fits = f"fits, a step in {took:.3g} s by the cost model" if step.fits else "does not fit"
            say(f"{_name(one)}: {step.peak / GIB:.2f} GiB, {fits}")
    said = f"compiled {tries}; {cannot_fit} more cannot fit, {slower} cannot be faster"
    say(said + (f", {late} were not tried in {seconds:.0f} s (--search-seconds)" if late else ""))
    if not found:
        if late:
            raise UserError(f"--search-seconds {seconds:.0f}: nothing of {tries} that were tried fits; give more")
        if refused and not too_large:
            raise UserError(refused)
        least = min((step.peak for step in too_large), default=None)
        needs = f"{least / GIB:.2f} GiB" if least else "by the estimate more than there is"
        raise UserError(f"--topology {job.topology.name}: nothing fits; the least was {needs}; take more devices")
    return sorted(found, key=lambda tried: tried.seconds)


def _recipe(job: Job) -> Recipe:
    assert job.recipe is not None
    return job.recipe


def _place(job: Job) -> tuple[MeshShape, int, int]:
    """Mesh, micro-batches and policy."""
    return job.mesh, _recipe(job).batch.accumulation, REMAT.index(_recipe(job).compute.remat)


def _takes_more(one: Job, other: Job) -> bool:
    """Whether `one` has on the same mesh no more micro-batches and computes no more again: it takes no less memory and,
    by the cost model, no more time."""
    (mesh, micro, policy), (other_mesh, other_micro, other_policy) = _place(one), _place(other)
    return mesh == other_mesh and micro <= other_micro and policy <= other_policy


def least_memory(job: Job) -> int:
    """Bytes that a device needs by the estimate, which is less than what the compiler allots."""
    recipe, mesh = _recipe(job), job.mesh
    state = STATE_BYTES * recipe.model.parameters // (mesh.fsdp * mesh.tensor)
    rows = -(-recipe.batch.sequences // (recipe.batch.accumulation * mesh.replica * mesh.fsdp))
    least = least_bytes(recipe, state // 3, 2 * state // 3, rows)
    return least + saved_bytes(recipe, rows, mesh.tensor)


def _name(job: Job) -> str:
    mesh, micro, policy = _place(job)
    return f"mesh {mesh.replica},{mesh.fsdp},{mesh.tensor}, {micro} micro-batches, {REMAT[policy]}"


def table(found: list[Tried]) -> str:
    """What was found, as text."""
    rows = [["remat", "mesh", "micro-batches", "GiB", "step, model of cost", "tokens/s per device"]]
    for tried in found:
        recipe = _recipe(tried.step.job)
        rate = recipe.tokens_per_step / tried.seconds / tried.step.job.topology.count
        mesh = ",".join(map(str, tried.step.mesh))
        peak = f"{tried.step.peak / GIB:.2f}"
        rows.append(
            [recipe.compute.remat, mesh, str(recipe.batch.accumulation), peak, f"{tried.seconds:.3g} s", short(rate)]
        )
    return text_table(rows, right=range(2, 6))
