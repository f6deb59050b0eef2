"""Reading a checkpoint of a series: its parameters, the hashes of its weights, its tokenizer.

JAX is imported only by `load`.
"""

import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fineline_jax.checkpoints.formats.weight_files import weight_files as weight_files_of
from fineline_jax.checkpoints.remote import cache
from fineline_jax.checkpoints.remote.download import FetchError
from fineline_jax.checkpoints.remote.staging import fetch_item
from fineline_jax.checkpoints.runs.digest_record import digests, read_record
from fineline_jax.checkpoints.series import Checkpoint, Series
from fineline_jax.errors import UserError
from fineline_jax.models.config import ModelConfig
from fineline_jax.recipe import from_json
from fineline_jax.tokenizers.files import holds_tokenizer

if TYPE_CHECKING:
    import jax


def load(
    checkpoint: Checkpoint, mesh: "jax.sharding.Mesh", dtype: "jax.typing.DTypeLike | None" = "float32"
) -> tuple[ModelConfig, dict[str, Any]]:
    """The config and the parameters in `dtype` (None: as they are stored), sharded over `mesh` for the decoder.

    A remote checkpoint must be here already (`fetch`). Raises UserError naming the file if the checkpoint is damaged or
    does not fit its config.
    """
    if checkpoint.kind == "hf":
        from fineline_jax.checkpoints.formats.huggingface import load_hf

        return load_hf(checkpoint.location, mesh, dtype)
    import jax
    import jax.numpy as jnp

    from fineline_jax.checkpoints.runs.store import check_intact, load_items, stored_arrays
    from fineline_jax.models.decoder import abstract_params

    config = config_of(checkpoint)
    check_intact(checkpoint.location, "params")
    targets = abstract_params(config, mesh, jnp.dtype(dtype or "float32"))
    if dtype is None:
        stored = jax.tree_util.tree_leaves_with_path(stored_arrays(checkpoint.location, ["params"])["params"])
        dtypes = {jax.tree_util.keystr(path): leaf.dtype for path, leaf in stored}
        targets = jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf.update(dtype=dtypes.get(jax.tree_util.keystr(path), leaf.dtype)), targets
        )
    return config, load_items(checkpoint.location, {"params": targets})["params"]


def config_of(checkpoint: Checkpoint) -> ModelConfig:
    """The model, without its weights; of a remote checkpoint config.json alone is fetched. Raises UserError."""
    if checkpoint.kind == "orbax":
        return from_json(_run_folder(checkpoint) / "recipe.json").model
    from fineline_jax.checkpoints.formats.huggingface import config_from_hf, config_of_weights

    if checkpoint.remote is None:
        return config_of_weights(checkpoint.location)
    with tempfile.TemporaryDirectory() as folder:
        cache.fetch_config(checkpoint.remote, Path(folder))
        return config_from_hf(Path(folder) / "config.json")


def fetch(checkpoint: Checkpoint) -> None:
    """Download a remote checkpoint, if it is not here yet. Raises FetchError."""
    if checkpoint.remote is not None and checkpoint.kind == "orbax":
        fetch_item(f"{checkpoint.remote.url}/params", checkpoint.location / "params")
    elif checkpoint.remote is not None:
        cache.fetch(checkpoint.remote)


def discard(checkpoint: Checkpoint) -> None:
    """Remove what was downloaded of it, unless downloads are kept; call it when nothing reads it any more."""
    if checkpoint.remote is not None and checkpoint.kind == "hf":
        cache.discard(checkpoint.remote)
    elif checkpoint.remote is not None and not checkpoint.remote.keep:
        shutil.rmtree(checkpoint.location / "params", ignore_errors=True)


def weights_hash(checkpoint: Checkpoint) -> str:
    """SHA-256 over names, sizes and contents of the weight files: equal for equal files, wherever they lie.

    Reads all weights (not the optimizer state) unless this process has hashed the same files before. Of a remote
    checkpoint: over what its server lists (`cache.weights_hash`), so that it need not be fetched to be recognised.
    """
    if checkpoint.remote is not None and checkpoint.kind == "hf":
        return cache.weights_hash(checkpoint.remote)
    if checkpoint.remote is not None:
        record = read_record(checkpoint.location) or {"files": {}}
        hashed = [(name, *known) for name, known in sorted(record["files"].items()) if name.startswith("params/")]
    else:
        hashed = digests(checkpoint.location, weight_files(checkpoint))
    return hashlib.sha256(json.dumps(hashed).encode()).hexdigest()


def stat_signature(checkpoint: Checkpoint) -> str:
    """Hash of names, sizes and times of change of the weight files, by which they are known unread to be the same."""
    if checkpoint.remote is not None:
        return weights_hash(checkpoint)
    states = [(name, (checkpoint.location / name).stat()) for name in weight_files(checkpoint)]
    files = [(name, state.st_size, state.st_mtime_ns) for name, state in states]
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def weight_files(checkpoint: Checkpoint) -> list[str]:
    """Names of the files with the weights, relative to the checkpoint's location, sorted.

    Raises UserError if there are none, or the checkpoint is damaged.
    """
    folder = checkpoint.location
    if checkpoint.damage:
        raise UserError(f"{folder}: {checkpoint.damage}; use another checkpoint or restore it from a backup")
    if checkpoint.kind == "orbax":
        names = sorted(path.relative_to(folder).as_posix() for path in (folder / "params").rglob("*") if path.is_file())
    else:
        names = sorted(path.relative_to(folder).as_posix() for path in weight_files_of(folder))
    if not names:
        raise UserError(f"{folder}: holds no weight files; fetch the checkpoint again")
    return names


def first_tokenizer(series: Series) -> Path | None:
    """The tokenizer of the first checkpoint that can be asked; None if that one brings none.

    Raises FetchError if none can be asked.
    """
    failure = None
    for checkpoint in series.checkpoints[:10]:
        try:
            return tokenizer_folder(checkpoint)
        except FetchError as error:
            failure = failure or error
    assert failure is not None
    raise failure


def tokenizer_folder(checkpoint: Checkpoint) -> Path | None:
    """The folder with the checkpoint's own tokenizer, fetched if need be; None if it brings none."""
    if checkpoint.remote is not None and checkpoint.kind == "hf":
        return cache.tokenizer(checkpoint.remote)
    if checkpoint.kind == "orbax":
        candidates = [_run_folder(checkpoint) / "tokenizer"]
    else:
        folder = checkpoint.location
        candidates = [folder, folder / "tokenizer", folder.parent / "tokenizer"]
    return next((folder for folder in candidates if holds_tokenizer(folder)), None)


def _run_folder(checkpoint: Checkpoint) -> Path:
    return checkpoint.location.parent.parent
