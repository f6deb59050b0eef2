"""Training steps of a recipe that fit on named devices, the fastest first by a cost model (`costs.step_seconds`)."""

import dataclasses
import itertools
from collections.abc import Iterator

from fineline_jax.errors import UserError
from fineline_jax.plan.compiled import Compiled, Job, compiled
from fineline_jax.plan.costs import step_seconds
from fineline_jax.plan.topologies import GIB
from fineline_jax.progress import short
from fineline_jax.recipe import MeshShape
from fineline_jax.text_table import text_table

REMAT = ("none", "qkv_context", "context", "full", "offload")
"""The less is computed again the earlier; what is behind one that fits needs no try on the same mesh and batch."""
TENSOR = (1, 2, 4, 8)
MICRO_BATCHES = (1, 2, 4, 8)
SMALLEST_FSDP = 8
"""Fewer shards leave no room for the moments of a model worth planning; with more devices the rest are replicas."""


@dataclasses.dataclass(frozen=True)
class Tried:
    step: Compiled
    seconds: float


def candidates(job: Job) -> Iterator[Job]:
    """Meshes and micro-batches that divide the devices and the batch."""
    assert job.recipe is not None
    recipe, count = job.recipe, job.topology.count
    for tensor, micro in itertools.product(TENSOR, MICRO_BATCHES):
        shards = count // tensor
        fits = not count % tensor and not recipe.model.kv_heads % tensor and not recipe.model.mlp_width % tensor
        fsdp = {shards, *(size for size in (64,) if size < shards and shards % size == 0)}
        for size in sorted(fsdp) if fits and not recipe.batch.sequences % micro else ():
            if size >= min(SMALLEST_FSDP, shards) and recipe.batch.sequences // micro >= shards:
                mesh = MeshShape(shards // size, size, tensor)
                batch = dataclasses.replace(recipe.batch, accumulation=micro)
                yield dataclasses.replace(job, mesh=mesh, recipe=dataclasses.replace(recipe, batch=batch, mesh=mesh))


def search(job: Job) -> list[Tried]:
    """Every candidate with the policy that computes least again and fits, the fastest first. Raises UserError where
    none fits."""
    found: list[Tried] = []
    closest: Compiled | None = None
    for one in candidates(job):
        assert one.recipe is not None
        for remat in REMAT:
            compute = dataclasses.replace(one.recipe.compute, remat=remat)
            step = compiled(dataclasses.replace(one, recipe=dataclasses.replace(one.recipe, compute=compute)))
            if step.fits:
                found.append(Tried(step, step_seconds(step)))
                break
            closest = step if closest is None or step.peak < closest.peak else closest
    if not found:
        least = f"{closest.peak / GIB:.2f} GiB" if closest else "a mesh that divides its sizes"
        raise UserError(f"--topology {job.topology.name}: nothing fits; the least was {least}; take more devices")
    return sorted(found, key=lambda tried: tried.seconds)


def table(found: list[Tried]) -> str:
    """What was found, as text."""
    rows = [["remat", "mesh", "micro-batches", "GiB", "step, model of cost", "tokens/s per device"]]
    for tried in found:
        recipe = tried.step.job.recipe
        assert recipe is not None
        rate = recipe.tokens_per_step / tried.seconds / tried.step.job.topology.count
        mesh = ",".join(map(str, tried.step.mesh))
        peak = f"{tried.step.peak / GIB:.2f}"
        rows.append(
            [recipe.compute.remat, mesh, str(recipe.batch.accumulation), peak, f"{tried.seconds:.2f} s", short(rate)]
        )
    return text_table(rows, right=range(2, 6))
