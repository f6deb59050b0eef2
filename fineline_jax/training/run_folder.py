"""The folder of a run before its first step: which recipe and which data its checkpoints belong to."""

import json
import shutil
from pathlib import Path

import jax

from fineline_jax.atomic_files import atomic_folder, write_atomic
from fineline_jax.checkpoints.runs.digest_record import check_path
from fineline_jax.errors import UserError
from fineline_jax.recipe import Recipe, differences, from_json, to_json

MAY_DIFFER = ("mesh.", "logging.", "name:")
"""Fields that change where a run computes and what it reports, never what it learns beyond rounding."""


def claim_folder(recipe: Recipe, run: Path, data_hashes: dict[str, str], accept_changes: bool) -> None:
    """Write the recipe, the hashes of its data sets (by path) and the tokenizer into `run`.

    Raises UserError where the folder holds checkpoints of another recipe or of other data, unless `accept_changes`.
    """
    check_path(run)
    recipe_file, data_file = run / "recipe.json", run / "data.json"
    if recipe_file.exists() and any((run / "checkpoints").glob("*")) and not accept_changes:
        changed = [line for line in differences(from_json(recipe_file), recipe) if not line.startswith(MAY_DIFFER)]
        if changed:
            raise UserError(
                f"{recipe_file}: the recipe has changed ({'; '.join(changed)}); train into another --run folder, or"
                " give --accept-changes to go on with the new one"
            )
        recorded = _recorded_data_hashes(data_file)
        for data_set, data_hash in data_hashes.items():
            if recorded.get(data_set, data_hash) != data_hash:
                raise UserError(
                    f"{data_set}: holds other data than {run} was trained on; restore it, train into another --run"
                    " folder, or give --accept-changes to go on with it"
                )
    if jax.process_index() != 0:
        return
    run.mkdir(parents=True, exist_ok=True)
    for file, text in ((data_file, json.dumps(data_hashes, indent=2) + "\n"), (recipe_file, to_json(recipe))):
        write_atomic(file, text, exclusive=True)
    tokenizer = recipe.data.sources[0].tokenizer
    if tokenizer.is_dir() and not (run / "tokenizer").exists():
        with atomic_folder(run / "tokenizer", exclusive=True) as copy:
            shutil.copytree(tokenizer, copy, dirs_exist_ok=True)


def _recorded_data_hashes(file: Path) -> dict[str, str]:
    """Hashes of data sets by path; none where the run was imported and never trained."""
    if not file.exists():
        return {}
    try:
        return dict(json.loads(file.read_bytes()))
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{file}: not the record of a run's data sets ({error}); restore it, or delete it if the data are the same"
        ) from error
