"""The plan of scoring a series."""

import dataclasses

from fineline_jax.catalogue import config_names, load_recipe
from fineline_jax.checkpoints.load import config_of
from fineline_jax.checkpoints.open import open_series
from fineline_jax.errors import UserError
from fineline_jax.plan.compiled import Job, compiled
from fineline_jax.plan.costs import report
from fineline_jax.plan.topologies import GIB, Topology
from fineline_jax.recipe import MeshShape
from fineline_jax.scoring.series.auto_mesh import placement


def report_of_scoring(spec: str, topology: Topology, dtype: str, mesh: MeshShape, full: bool) -> str:
    """Both steps of the engine, the rows and the vocabulary behind them, as text; where the rows do not fit in float32,
    what bfloat16 would need."""
    is_recipe = spec in config_names("{}.py") or spec.endswith((".py", ".json"))
    model = load_recipe(spec).model if is_recipe else config_of(open_series(spec).checkpoints[0])
    if model.mixer != "attention":
        raise UserError(
            f"--score {spec}: only the prefix tree's steps are planned, and it cannot score recurrent layers"
        )
    if mesh == MeshShape():
        mesh = placement(model.parameters, dtype, topology.count, topology.chip.memory)
    job = Job(topology, mesh, model=model, dtype=dtype, full=full)
    rows = compiled(job)
    text = report(rows)
    if rows.fits:
        return f"{text}\n\n{report(compiled(dataclasses.replace(job, step='vocabulary')))}"
    if dtype == "float32":
        less = compiled(dataclasses.replace(job, dtype="bfloat16"))
        text += (
            f"\nadvice    bfloat16 needs {less.peak / GIB:.1f} GiB: {'it fits' if less.fits else 'too much as well'}"
        )
    return text
