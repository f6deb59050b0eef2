"""A checkpoint series: an ordered list of (name, tokens, location) that can be opened one after another.

`open_series` finds it: a folder, a registered series, a repository of the hub, a bucket. It reads no weights; JAX is
imported only by `load`.
"""

import dataclasses
import difflib
import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fineline_jax.checkpoints import registry, remote
from fineline_jax.checkpoints.locations import PLACE, VOCABULARY, Options, parse_hub
from fineline_jax.checkpoints.record import damage, digests, read_record
from fineline_jax.checkpoints.registry import DEFAULT_SCORING, Bos, Entry, Named, Scoring
from fineline_jax.checkpoints.remote import Remote
from fineline_jax.checkpoints.step_names import common_start, parse_name
from fineline_jax.checkpoints.transfer import FetchError
from fineline_jax.checkpoints.weight_files import KNOWN, SAFETENSORS, SAFETENSORS_INDEX, TORCH_BIN, TORCH_BIN_INDEX
from fineline_jax.checkpoints.weight_files import weight_files as files_of_weights
from fineline_jax.errors import UserError
from fineline_jax.models.config import ModelConfig
from fineline_jax.recipe import from_json

if TYPE_CHECKING:
    import jax

HF_WEIGHTS = (SAFETENSORS, SAFETENSORS_INDEX, TORCH_BIN, TORCH_BIN_INDEX)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """One set of weights of a series."""

    series: str
    name: str
    """Unique in the series; fit for a file name."""
    step: int | None
    """Optimizer steps taken; None: not known."""
    tokens: int | None
    """Tokens trained on; None: not known."""
    location: Path
    """RUN/checkpoints/<step>, or the folder with config.json; where `remote` is fetched to."""
    kind: Literal["orbax", "hf"]
    remote: Remote | None = None
    """Where it has to be fetched from before it can be read; None: it is here."""


@dataclasses.dataclass(frozen=True)
class Series:
    """Checkpoints of one model, in the order of training."""

    name: str
    checkpoints: tuple[Checkpoint, ...]
    scoring: Scoring = DEFAULT_SCORING
    location: str = ""
    """The run, the folder or the address of all of them, {name} for a checkpoint's name; tells series of one name
    apart. "": not known."""


def open_series(
    spec: str, *, tokens: str = "", every: int = 1, downloads: Path | None = None, keep: bool = True
) -> Series:
    """The series that `spec` names:

    a run folder (recipe.json, checkpoints/): its kept steps, not the rolling latest;
    one checkpoint folder of a run: that one;
    a Hugging Face folder (config.json and weights): that one;
    a folder of Hugging Face folders: all of them, by the tokens or steps in their names;
    a registered series (`fineline series`), or a YAML file of the same form;
    hf://org/name@revision, org/name@revision, hf://org/name@revision/folder;
    s3://bucket/folder, gs://, http://, any address of fsspec: one checkpoint, or a folder of them.

    @GLOB at the end (amber@ckpt_3*, org/name@step*) chooses by name; then tokens (`selection.parse_grid`), then every.
    downloads: where remote checkpoints are fetched to, when they are read; default: `remote.default_downloads`.
    keep: whether they stay there. Raises UserError naming what was looked for.
    """
    from fineline_jax.checkpoints.selection import select

    path, names = split_spec(spec)
    if os.path.isdir(path):
        found = _open_folder(path)
    else:
        found, names = _open_remote(spec, path, names, downloads or remote.default_downloads(), keep)
    return select(found, names, tokens, every)


def split_spec(spec: str) -> tuple[str, str]:
    """What stands before and after the last @, if that is no part of an existing path; else * for the second."""
    path, at, names = spec.rpartition("@")
    if not at or not path or os.path.isdir(spec):
        return spec, "*"
    return path, names or "*"


def _open_folder(spec: str) -> Series:
    path = Path(os.path.abspath(spec))
    if (path / "recipe.json").is_file():
        return _run(path, spec)
    if path.name.isdigit() and (path.parent.parent / "recipe.json").is_file():
        return _one_of_run(path, spec)
    if _is_hf(path):
        step, tokens = parse_name(path.name)
        return Series(path.name, (Checkpoint(path.name, "main", step, tokens, path, "hf"),), location=_real(path))
    folders = sorted(child for child in path.iterdir() if child.is_dir() and _is_hf(child))
    if folders:
        return _folders(path, folders)
    raise UserError(
        f"{spec}: no series found; looked for recipe.json (a run), config.json with weights ({KNOWN}),"
        " and folders with those"
    )


_GLOB = re.compile(r"[*?\[]")


def _open_remote(spec: str, base: str, names: str, downloads: Path, keep: bool) -> tuple[Series, str]:
    """The series, and the glob that is still to be applied."""
    if "://" in spec:
        return _open_address(spec, downloads, keep), "*"
    entry = registry.find(base)
    if entry is not None:
        return of_entry(entry, downloads, keep), names
    if "@" in spec and re.fullmatch(r"[\w.-]+/[\w.-]+", base):
        return _open_address(f"hf://{spec}", downloads, keep), "*"
    names_known = {one.lower(): one for one in (*registry.series_files(), *(e.name for e in registry.every_entry()))}
    near = difflib.get_close_matches(base.lower(), names_known, n=1)
    hint = f"did you mean {names_known[near[0]]!r}? " if near else ""
    raise UserError(
        f"{spec}: no such folder and no registered series; {hint}give a run, Hugging Face folders, a name of"
        " `fineline series`, org/name@revision, or an address such as hf://… or s3://…"
    )


def of_entry(entry: Entry, downloads: Path, keep: bool = True, ask: bool = True) -> Series:
    """The series of a registry entry. ask: as of `registry.checkpoints`."""
    found = registry.checkpoints(entry, ask)
    return _remote_series(
        entry.name, entry.location, found, downloads, keep, entry.options, entry.tokenizer, entry.scoring
    )


def _open_address(url: str, downloads: Path, keep: bool) -> Series:
    """One checkpoint, or where the address holds a glob, those that fit it."""
    before, after = url.partition("://")[::2]
    parts = after.rstrip("/").split("/")
    place = next((i for i, part in enumerate(parts) if _GLOB.search(part)), None)
    if not before or not parts[0] or (place == 0 and before == "hf"):
        raise UserError(f"{url}: expected an address such as hf://organisation/name@revision or s3://bucket/folder")
    if before == "hf" and place is None:
        parse_hub(url)
    if before == "hf" and place == 1:  # the revision, in name@glob, or the name of the repository
        repository, at, revision = parts[1].partition("@")
        if at and not _GLOB.search(repository):
            template = f"hf://{parts[0]}/{repository}@{'/'.join([PLACE, *parts[2:]])}"
            return _of_template(repository, template, revision, downloads, keep)
    if place is not None:
        template = f"{before}://{'/'.join([*parts[:place], PLACE, *parts[place + 1 :]])}"
        name = parts[max(0, place - 1)].replace("@", "-")
        return _of_template(name, template, parts[place], downloads, keep)
    repository, _, revision = parts[1].partition("@") if before == "hf" and len(parts) > 1 else ("", "", "")
    series, name = (repository, revision or "main") if len(parts) == 2 and repository else (parts[-1], "main")
    step, tokens = parse_name(name if name != "main" else series)
    template = f"hf://{parts[0]}/{repository}@{PLACE}" if repository and len(parts) == 2 else url.rstrip("/")
    return _remote_series(series, template, [Named(name, step, tokens, url)], downloads, keep)


def _of_template(name: str, template: str, glob: str, downloads: Path, keep: bool) -> Series:
    import fnmatch

    from fineline_jax.checkpoints.locations import list_names

    names = [one for one in list_names(template) if fnmatch.fnmatchcase(one, glob)]
    if not names:
        raise UserError(f"{template.replace(PLACE, glob)}: nothing there has such a name")
    common = common_start([one.lower() for one in names]) if len(names) > 1 else ""
    found = [Named(one, *parse_name(one, common), template.replace(PLACE, one)) for one in names]
    return _remote_series(name, template, registry.in_order(found), downloads, keep)


def _remote_series(
    series: str,
    template: str,
    found: list[Named],
    downloads: Path,
    keep: bool,
    options: Options = (),
    tokenizer: str = "",
    scoring: Scoring = DEFAULT_SCORING,
) -> Series:
    made = []
    for one in found:
        where = Remote(one.url, downloads, keep, options, tokenizer)
        name = one.name.replace("/", "-")  # of a file
        made.append(Checkpoint(series, name, one.step, one.tokens, where.folder, "hf", where))
    return Series(series, tuple(made), scoring, template)


def fetch(checkpoint: Checkpoint) -> None:
    """Download a remote checkpoint, if it is not here yet. Raises FetchError."""
    if checkpoint.remote is not None:
        remote.fetch(checkpoint.remote)


def discard(checkpoint: Checkpoint) -> None:
    """Remove what was downloaded of it, unless downloads are kept; call it when nothing reads it any more."""
    if checkpoint.remote is not None:
        remote.discard(checkpoint.remote)


def scoring_policy(series: Sequence[Series]) -> Bos:
    """How BOS is put for all of them, as their registry entries say.

    Raises UserError if they disagree: they would need two packs.
    """
    wanted: dict[Bos, str] = {one.scoring.bos: one.name for one in series}
    if len(wanted) > 1:
        said = ", ".join(f"{name} {bos}" for bos, name in wanted.items())
        raise UserError(f"--bos: the series want different ones ({said}); give --bos, or score them one by one")
    return next(iter(wanted))


def load(
    checkpoint: Checkpoint, mesh: "jax.sharding.Mesh", dtype: "jax.typing.DTypeLike | None" = None
) -> tuple[ModelConfig, dict[str, Any]]:
    """The config and the parameters in `dtype` (default float32), sharded over `mesh` for the decoder.

    A remote checkpoint is fetched first. Raises UserError naming the file if the checkpoint is damaged or does not fit
    its config.
    """
    import jax.numpy as jnp

    fetch(checkpoint)
    dtype = jnp.dtype(dtype or "float32")
    if checkpoint.kind == "hf":
        from fineline_jax.checkpoints.hub import load_hf

        return load_hf(checkpoint.location, mesh, dtype)
    from fineline_jax.checkpoints.store import check_intact, load_items
    from fineline_jax.models.decoder import abstract_params

    config = from_json(_run_folder(checkpoint) / "recipe.json").model
    check_intact(checkpoint.location, "params")
    return config, load_items(checkpoint.location, {"params": abstract_params(config, mesh, dtype)})["params"]


def identity(checkpoint: Checkpoint) -> str:
    """SHA-256 over names, sizes and contents of the weight files: equal for equal files, wherever they lie.

    Reads all weights (not the optimizer state) unless this process has hashed the same files before. Of a remote
    checkpoint: over what its server lists (`remote.identity`), so that it need not be fetched to be recognised.
    """
    if checkpoint.remote is not None:
        return remote.identity(checkpoint.remote)
    found = digests(checkpoint.location, weight_files(checkpoint))
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def version(checkpoint: Checkpoint) -> str:
    """What tells without reading them that the weight files are still the same: names, sizes and times of change."""
    if checkpoint.remote is not None:
        return remote.identity(checkpoint.remote)
    states = [(name, (checkpoint.location / name).stat()) for name in weight_files(checkpoint)]
    found = [(name, state.st_size, state.st_mtime_ns) for name, state in states]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def weight_files(checkpoint: Checkpoint) -> list[str]:
    """Names of the files with the weights, relative to the checkpoint's location, sorted.

    Raises UserError if there are none.
    """
    folder = checkpoint.location
    if checkpoint.kind == "orbax":
        names = sorted(path.relative_to(folder).as_posix() for path in (folder / "params").rglob("*") if path.is_file())
    else:
        names = sorted(path.relative_to(folder).as_posix() for path in files_of_weights(folder))
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
    if checkpoint.remote is not None:
        return remote.tokenizer(checkpoint.remote)
    if checkpoint.kind == "orbax":
        candidates = [_run_folder(checkpoint) / "tokenizer"]
    else:
        folder = checkpoint.location
        candidates = [folder, folder / "tokenizer", folder.parent / "tokenizer"]
    return next((folder for folder in candidates if any((folder / name).is_file() for name in VOCABULARY)), None)


def _folders(path: Path, folders: list[Path]) -> Series:
    name = path.name
    common = common_start([folder.name.lower() for folder in folders]) if len(folders) > 1 else ""
    at = {folder.name: folder for folder in folders}
    found = registry.in_order([Named(folder.name, *parse_name(folder.name, common), "") for folder in folders])
    made = [Checkpoint(name, one.name, one.step, one.tokens, at[one.name], "hf") for one in found]
    return Series(name, tuple(made), location=_real(path))


def _run(run: Path, spec: str) -> Series:
    folder = run / "checkpoints"
    found = []
    for path in folder.iterdir() if folder.is_dir() else []:
        record = read_record(path) if path.name.isdigit() else None
        if record is not None and record["kept"]:
            found.append(_of_run(run, path, record))
    if not found:
        raise UserError(f"{spec}: the run has no kept checkpoint in {folder} yet; train it, or check the schedule")
    in_order = sorted(found, key=lambda checkpoint: checkpoint.step or 0)
    return Series(run.name, tuple(in_order), location=_real(run))


def _one_of_run(path: Path, spec: str) -> Series:
    record = read_record(path)
    if record is None:
        raise UserError(f"{spec}: the checkpoint is damaged ({damage(path)}); give another one")
    run = path.parent.parent
    return Series(run.name, (_of_run(run, path, record),), location=_real(run))


def _of_run(run: Path, path: Path, record: dict[str, Any]) -> Checkpoint:
    return Checkpoint(run.name, f"step{record['step']}", record["step"], record["tokens"], path, "orbax")


def _real(folder: Path) -> str:
    """The same for the same folder, by whatever path it was named."""
    return os.path.realpath(folder)


def _run_folder(checkpoint: Checkpoint) -> Path:
    return checkpoint.location.parent.parent


def _is_hf(folder: Path) -> bool:
    if not (folder / "config.json").is_file():
        return False
    return any((folder / name).is_file() for name in HF_WEIGHTS) or bool(files_of_weights(folder))
