"""Checkpoints from one layout into the other: released weights into a run, a run's weights into a released layout."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from fineline_jax.checkpoints import series
from fineline_jax.checkpoints.hub import copy_tokenizer, export_hf, load_hf
from fineline_jax.checkpoints.locations import VOCABULARY
from fineline_jax.checkpoints.record import read_record, write_record
from fineline_jax.checkpoints.series import Checkpoint
from fineline_jax.checkpoints.store import CheckpointStore, check_intact, load_items
from fineline_jax.errors import UserError
from fineline_jax.models.config import ModelConfig
from fineline_jax.models.decoder import abstract_params
from fineline_jax.recipe import Batch, Data, Optimizer, Recipe, Schedule, Source, from_json, to_json

NO_DATA = "imported weights: the data they were trained on are not known"


def import_checkpoint(
    weights: Path,
    run: Path,
    mesh: jax.sharding.Mesh,
    *,
    config: Path | ModelConfig | None = None,
    recipe: Recipe | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    step: int | None = None,
    tokens: int | None = None,
    tokenizer: Path | None = None,
    more_state: Callable[[Recipe, dict], Mapping[str, Any]] = lambda recipe, params: {},
) -> Path:
    """Store the weights of the folder (or file) `weights` as a kept checkpoint of `run`, new or of the same model.

    config: as of `hub.load_hf`. recipe: what the run goes on with, whose model must be that of the weights; default:
    one that names no data. dtype: None: as the files have it. step, tokens: where in training; default: what the
    folder's name says, else step 0 and tokens unknown. tokenizer: its folder; default: that of the weights. more_state:
    further items of the checkpoint. Returns the folder of the checkpoint.
    Raises UserError if the run has that step already, or another model.
    """
    named_step, named_tokens = series.parse_name(weights.name)
    step = named_step or 0 if step is None else step
    tokens = named_tokens if tokens is None else tokens
    for option, value in (("--step", step), ("--tokens", tokens)):
        if value is not None and value < 0:
            raise UserError(f"{option} {value}: must not be negative; leave it out if it is not known")
    target = run / "checkpoints" / str(step)
    found = read_record(target)
    if found is not None and found["kept"]:
        raise UserError(f"{run}: holds step {step} already; give another run, or another --step")
    config, params = load_hf(weights, mesh, dtype, config)
    _claim(run, recipe or _without_data(run.name, config, tokens), config)
    source = tokenizer or (weights.parent if weights.is_file() else weights)
    if tokenizer is not None or any((source / name).is_file() for name in VOCABULARY):
        (run / "tokenizer").mkdir(exist_ok=True)
        copy_tokenizer(source, run / "tokenizer")
    recipe = from_json(run / "recipe.json")
    with jax.set_mesh(mesh):
        state = {"params": params, **more_state(recipe, params)}
        # Kept only with the second record, which knows the tokens: what is killed before it is no part of the series.
        with CheckpointStore(run / "checkpoints", (), 0, tokens_per_step=0, recipe=recipe.name) as store:
            store.maybe_save(step, state, force=True)
    if jax.process_index() == 0:
        write_record(target, {"step": step, "tokens": tokens, "kept": True, "recipe": recipe.name})
    return target


def export_checkpoint(
    checkpoint: Checkpoint,
    out: Path,
    mesh: jax.sharding.Mesh,
    *,
    dtype: jax.typing.DTypeLike | None = None,
    family: str | None = None,
) -> None:
    """Write a checkpoint in Hugging Face layout, with its tokenizer if it has one.

    dtype: of the weights; None: as they are stored. family: as of `hub.export_hf`.
    Raises UserError if `out` is there already.
    """
    if out.exists():
        raise UserError(f"{out}: exists already; give a new folder")
    series.fetch(checkpoint)
    if checkpoint.kind == "hf":
        config, params = load_hf(checkpoint.location, mesh, dtype)
    else:
        config, params = _load_as_stored(checkpoint, mesh)
    export_hf(config, params, out, series.tokenizer_folder(checkpoint), dtype, family=family)


def _load_as_stored(checkpoint: Checkpoint, mesh: jax.sharding.Mesh) -> tuple[ModelConfig, dict[str, Any]]:
    config = from_json(checkpoint.location.parent.parent / "recipe.json").model
    check_intact(checkpoint.location, "params")
    stored = ocp.checkpointables_metadata(str(checkpoint.location)).metadata["params"]
    dtypes = {jax.tree_util.keystr(path): leaf.dtype for path, leaf in jax.tree_util.tree_leaves_with_path(stored)}
    targets = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf.update(dtype=dtypes.get(jax.tree_util.keystr(path), leaf.dtype)),
        abstract_params(config, mesh, jnp.dtype(np.float32)),
    )
    return config, load_items(checkpoint.location, {"params": targets})["params"]


def _claim(run: Path, recipe: Recipe, config: ModelConfig) -> None:
    """Make `run` the run of `recipe`, or make sure that it is one of the same model."""
    if recipe.model != config:
        raise UserError(f"the recipe {recipe.name} is of another model than the weights; give the recipe of this model")
    path = run / "recipe.json"
    if path.is_file():
        if from_json(path).model != config:
            raise UserError(f"{run}: is a run of another model; give another folder")
        return
    if run.exists() and any(run.iterdir()):
        raise UserError(f"{run}: is there and no run; give a new folder")
    run.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(to_json(recipe))
    temporary.replace(path)


def _without_data(name: str, config: ModelConfig, tokens: int | None) -> Recipe:
    """The recipe of a run of which only the model is known."""
    return Recipe(
        name=name,
        model=config,
        data=Data((Source(NO_DATA),), sequence_length=config.context),
        batch=Batch(1),
        optimizer=Optimizer(Schedule()),
        tokens=max(tokens or 0, config.context),
    )
