"""Checkpoints from one layout into the other: released weights into a run, a run's weights into a released layout."""

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from fineline_jax.atomic_files import atomic_folder, write_atomic
from fineline_jax.checkpoints import load
from fineline_jax.checkpoints.formats.huggingface import export_hf, load_hf
from fineline_jax.checkpoints.registry.step_names import step_and_tokens
from fineline_jax.checkpoints.runs.digest_record import check_path, read_record, write_record
from fineline_jax.checkpoints.runs.retention import remove
from fineline_jax.checkpoints.runs.store import CheckpointStore
from fineline_jax.checkpoints.series import Checkpoint
from fineline_jax.errors import UserError
from fineline_jax.models.config import ModelConfig
from fineline_jax.recipe import Batch, Data, Optimizer, Recipe, Schedule, Source, differences, from_json, to_json
from fineline_jax.tokenizers.files import copy_tokenizer, holds_tokenizer
from fineline_jax.tokenizers.identity import identity, vocabulary_size
from fineline_jax.tokenizers.open import open_tokenizer

NO_DATA = "imported weights: the data they were trained on are not known"
LARGEST_STEP, LARGEST_TOKENS = 2**31 - 1, 2**63 - 1
"""The trainer counts steps in 32 bits, the tables tokens in 64."""


_UNFINISHED = "unfinished import"
"""Key of the first record of an imported checkpoint, whose second says that it is kept."""


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

    config: as of `huggingface.load_hf`. recipe: of the further training, whose model must be that of the weights;
    default: one that names no data. dtype: None: as the files have it. step, tokens: where in training; default: as
    trainer_state.json or the folder's name has them, else step 0 and tokens unknown. tokenizer: its folder; default:
    that of the weights.
    more_state: further items of the checkpoint. Returns the folder of the checkpoint.
    What fails leaves `run` as it was. Raises UserError if the run has that step already, another model or another
    tokenizer, or if the tokenizer has ids beyond the embedding.
    """
    named_step, named_tokens = step_and_tokens(weights)
    step = named_step or 0 if step is None else step
    tokens = named_tokens if tokens is None else tokens
    for option, value, most in (("--step", step, LARGEST_STEP), ("--tokens", tokens, LARGEST_TOKENS)):
        if value is not None and not 0 <= value <= most:
            raise UserError(f"{option} {value}: must be from 0 to {most}; leave it out if it is not known")
    if run.exists() and not run.is_dir():
        raise UserError(f"{run}: is a file; give the folder of a run")
    check_path(run)
    target = run / "checkpoints" / str(step)
    record = read_record(target)
    if record is not None and record["kept"]:
        raise UserError(f"{run}: holds step {step} already; give another run, or another --step")
    if record is not None and not record.get(_UNFINISHED):
        raise UserError(f"{target}: is the latest of a run that trains; give another --step")
    config, params = load_hf(weights, mesh, dtype, config)
    source = tokenizer or (weights.parent if weights.is_file() else weights)
    brings_one = tokenizer is not None or holds_tokenizer(source)
    if brings_one:
        _check_tokenizer(source, config.vocab_size, run / "tokenizer")
    with _or_as_it_was(run):
        _claim(run, recipe or _without_data(run.name, config, tokens), config)
        if brings_one and not holds_tokenizer(run / "tokenizer"):  # it keeps its own, settings and all
            with atomic_folder(run / "tokenizer", exclusive=True, replace=True) as copy:
                copy_tokenizer(source, copy)
        recipe = from_json(run / "recipe.json")
        with jax.set_mesh(mesh):
            state = {"params": params, **more_state(recipe, params)}
            # Kept only with the second record, which knows the tokens: what is killed before it is not in the series.
            if record is not None and jax.process_index() == 0:
                remove(target)  # of an import that was killed
            first = {"tokens": None, "recipe": "", _UNFINISHED: True}
            with CheckpointStore(run / "checkpoints", (), record=lambda _: first) as store:
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

    dtype: of the weights; None: as they are stored. family: as of `huggingface.export_hf`.
    Raises UserError if `out` is there already.
    """
    if out.exists():
        raise UserError(f"{out}: exists already; give a new folder")
    load.fetch(checkpoint)
    config, params = load.load(checkpoint, mesh, dtype if checkpoint.kind == "hf" else None)
    export_hf(config, params, out, load.tokenizer_folder(checkpoint), dtype, family=family)


@contextlib.contextmanager
def _or_as_it_was(run: Path) -> Iterator[None]:
    """What fails meanwhile leaves nothing new in the folder `run`, nor the folder if it was not there."""
    before = set(run.iterdir()) if run.exists() else None
    try:
        yield
    except BaseException:
        if before is None:
            shutil.rmtree(run, ignore_errors=True)
        for path in set(run.iterdir()) - before if before is not None else ():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise


def _check_tokenizer(source: Path, rows: int, ours: Path) -> None:
    """Raise UserError if the tokenizer in `source` has more ids than the embedding has rows, or is another than that of
    the run, `ours`, whose checkpoints are scored with one."""
    tokenizer = open_tokenizer(source)
    if (count := vocabulary_size(tokenizer)) > rows:
        raise UserError(f"{source}: has {count} ids, the embedding {rows} rows; give the --tokenizer of this model")
    if holds_tokenizer(ours):
        hashes = {identity(one).tokenizer_hash for one in (tokenizer, open_tokenizer(ours))}
        if len(hashes) > 1:
            raise UserError(f"{source}: is not the tokenizer of the run, {ours}; import into another run")


def _claim(run: Path, recipe: Recipe, config: ModelConfig) -> None:
    """Make `run` the run of `recipe`, or make sure that it is one of the same model."""
    same = lambda model: dataclasses.replace(config, init_std=model.init_std)  # that is of fresh weights alone
    if other := [f"model.{line}" for line in differences(recipe.model, same(recipe.model))]:
        raise UserError(
            f"the recipe {recipe.name} is of another model than the weights; correct {'; '.join(other[:8])}"
        )
    path = run / "recipe.json"
    if path.is_file():
        if (model := from_json(path).model) != same(model):
            raise UserError(f"{run}: is a run of another model; give another folder")
        return
    left = f".{path.name}.*.partial"  # of an import that was killed
    if run.exists() and any(not entry.match(left) for entry in run.iterdir()):
        raise UserError(f"{run}: is there and no run; give a new folder")
    run.mkdir(parents=True, exist_ok=True)
    write_atomic(path, to_json(recipe), exclusive=True)


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
