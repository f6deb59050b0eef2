"""The process that compiles one step for absent devices: `python -m fineline_jax.plan.child FOLDER`.

Reads FOLDER/job.json, and writes FOLDER/lowered.json before it compiles and FOLDER/compiled.json or FOLDER/failed.json
behind it; XLA writes the module it is about to generate code for to FOLDER/dump (`compiled.py`, which stops the process
there).
"""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from pydantic import TypeAdapter

from fineline_jax.errors import UserError
from fineline_jax.mesh import BATCH, batch_shards, device_bytes, make_mesh
from fineline_jax.models import decoder
from fineline_jax.models.config import ModelConfig
from fineline_jax.models.tree_attention import dispatch
from fineline_jax.plan.topologies import devices, topology
from fineline_jax.recipe import MeshShape, Recipe, from_json
from fineline_jax.scoring.engine.step import tree_step, vocabulary_step
from fineline_jax.scoring.engine.tree_engine import SHAPES
from fineline_jax.training.step import BATCH_SPEC, abstract_state, make_train_step, padded_rows

PARENTS = 8192
"""Of a device in one scoring step: as many as a suite of multiple choice has in 4 rows of 8192 tokens."""


def main(folder: Path) -> None:
    job = json.loads((folder / "job.json").read_text())
    try:
        _compile(job, folder)
    except UserError as error:
        _write(folder / "failed.json", {"refused": str(error)})
    except jax.errors.JaxRuntimeError as error:
        _write(folder / "failed.json", {"compiler": str(error)})


def _compile(job: dict[str, Any], folder: Path) -> None:
    wanted = topology(job["topology"])
    mesh = make_mesh(MeshShape(*job["mesh"]), devices(wanted))
    if "recipe" in job:
        recipe = dataclasses.replace(from_json(folder / "recipe.json"), mesh=MeshShape(*job["mesh"]))
        function, arguments, kinds = _train_step(recipe, mesh)
    else:
        model = TypeAdapter(ModelConfig).validate_python(job["model"])
        function, arguments, kinds = _score_step(model, mesh, job["dtype"], job["step"])
    started = time.monotonic()
    with jax.set_mesh(mesh):
        traced = function.trace(*arguments)
        lowered = traced.lower()
        record = {"seconds": time.monotonic() - started, "mesh": list(mesh.devices.shape), "kinds": kinds}
        _write(folder / "lowered.json", record | {"products": products(traced.jaxpr.jaxpr, mesh.size)})
        compiled = lowered.compile(compiler_options=job["flags"] or None)
    # Its temp_size_in_bytes has on TPUs the room between arrays twice, and memory that is not the device's main one.
    _write(folder / "compiled.json", {"living": compiled.memory_analysis().peak_memory_in_bytes})


Step = tuple[Any, tuple[Any, ...], dict[str, int]]
"""A jitted function, its abstract arguments, and their bytes on a device by kind."""


def _train_step(recipe: Recipe, mesh: jax.sharding.Mesh) -> Step:
    state = abstract_state(recipe, mesh)
    rows = padded_rows(recipe.batch.sequences, recipe, mesh)
    sharding = jax.NamedSharding(mesh, BATCH_SPEC)
    windows = jax.ShapeDtypeStruct((rows, recipe.data.sequence_length + 1), jnp.int32, sharding=sharding)
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=jax.NamedSharding(mesh, jax.P()))
    kinds = {"parameters": state["params"], "moments": state["opt_state"], "batch": windows}
    step = jax.jit(make_train_step(recipe, mesh), donate_argnums=0)
    return step, (state, windows, scalar, scalar), {kind: device_bytes(tree) for kind, tree in kinds.items()}


def _score_step(config: ModelConfig, mesh: jax.sharding.Mesh, dtype: str, which: str) -> Step:
    """The step of the prefix tree's rows (which="rows"), or that of the vocabulary behind it."""
    platform, shards = mesh.devices.flat[0].platform, batch_shards(mesh)
    params, shape = decoder.abstract_params(config, mesh, jnp.dtype(dtype)), SHAPES[platform]
    kinds = {"parameters": device_bytes(params)}

    def spread(shape: tuple[int, ...], dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        partition = jax.P(BATCH, *[None] * (len(shape) - 1))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, partition))

    rows, parents = spread((shape.rows * shards, shape.row)), spread((shards, PARENTS))
    if which == "rows":
        return tree_step(config, dtype, dispatch.pick(platform)), (params, rows, rows, rows, parents), kinds
    hidden = [spread((shards, PARENTS, config.width), jnp.dtype(dtype))] * shape.per_batch
    targets = spread((shards, 2 * PARENTS))
    return vocabulary_step(config), (params, hidden, parents, spread((shards, 1)), targets, targets), kinds


def products(jaxpr: Any, devices: int, inside: bool = False) -> float:
    """FLOPs of all products of a step over all devices, loops counted as often as they go round; kernels are left out.

    XLA's own count (`cost_analysis`) has each loop's body once.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "dot_general":
            left, out = equation.invars[0].aval, equation.outvars[0].aval
            (contracted, _), _ = equation.params["dimension_numbers"]
            width = 1.0
            for axis in contracted:
                width *= left.shape[axis]
            total += 2.0 * out.size * width * (devices if inside else 1)
            continue
        times = {"scan": equation.params.get("length", 1)}.get(name, 1)
        if name in ("pallas_call", "custom_partitioning"):
            continue
        within = inside or name == "shard_map"
        found = [products(one, devices, within) for one in _inner(equation.params)]
        total += times * (max(found, default=0.0) if name == "cond" else sum(found))
    return total


def _inner(params: dict[str, Any]) -> list[Any]:
    values = [value for given in params.values() for value in (given if isinstance(given, tuple | list) else [given])]
    found = (getattr(value, "jaxpr", value) for value in values)
    return [one for one in found if hasattr(one, "eqns")]


def _write(path: Path, record: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record))
    partial.rename(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
