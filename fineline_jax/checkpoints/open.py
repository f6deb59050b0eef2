"""Finding a series: a run, Hugging Face folders, a registered series, a repository of the hub, a bucket.

No weights are read and JAX is not imported.
"""

import dataclasses
import fnmatch
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fineline_jax.checkpoints.formats.trainers.lora import is_adapter
from fineline_jax.checkpoints.formats.weight_files import KNOWN, config_file, holds_weights, trainer_format
from fineline_jax.checkpoints.registry import entries
from fineline_jax.checkpoints.registry.entries import Entry, Named
from fineline_jax.checkpoints.registry.step_names import parse_name, step_and_tokens
from fineline_jax.checkpoints.remote import cache
from fineline_jax.checkpoints.remote.listing import NAME_SLOT, list_names, parse_hub
from fineline_jax.checkpoints.remote.staging import fetch_records
from fineline_jax.checkpoints.runs.digest_record import damage, lost_record, read_record
from fineline_jax.checkpoints.select import select
from fineline_jax.checkpoints.series import DEFAULT_SCORING, Checkpoint, Options, Remote, Scoring, Series
from fineline_jax.errors import UserError, near

_LOG = logging.getLogger(__name__)


def open_series(
    spec: str, *, tokens: str = "", every: int = 1, downloads: Path | None = None, keep: bool = True
) -> Series:
    """The series that `spec` names:

    a run folder (recipe.json, checkpoints/): its kept steps, not the rolling latest;
    one checkpoint folder of a run: that one;
    a Hugging Face folder (config.json and weights), or one of a trainer that says its model: that one;
    a folder of Hugging Face folders: all of them, by the tokens or steps in their names or trainer_state.json;
    what transformers' Trainer writes, a model and its checkpoint-N: these, and the model if it is of another step;
    huggingface_hub's cache of a repository (models--org--name): its snapshots;
    a registered series (`fineline series`), or a YAML file of the same form;
    hf://org/name@revision, org/name@revision, hf://org/name@revision/folder;
    s3://bucket/folder, gs://, http://, any address of fsspec: one checkpoint, or a folder of them; a run of
    `fineline pretrain --run gs://…`.

    @GLOB,… at the end (amber@ckpt_3*, org/name@step*, run@step1,step5) chooses by name; then tokens
    (`select.parse_grid`), then every.
    downloads: where remote checkpoints are fetched to, when they are read; default: `cache.default_downloads`.
    keep: whether they stay there. Raises UserError naming what was looked for.
    """
    path, names = split_spec(spec)
    if os.path.isdir(path):
        series = _open_folder(path)
    else:
        series, names = _open_remote(spec, path, names, downloads or cache.default_downloads(), keep)
    return select(series, names, tokens, every)


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
        if (record := read_record(path)) is None:
            raise UserError(f"{spec}: the checkpoint is damaged ({damage(path)}); give another one")
        run = path.parent.parent
        return Series(run.name, (_of_run(run, path, record),), location=os.path.realpath(run))
    for cache_folder in (path, *path.parents[1:2]):
        if cache_folder.name.startswith("models--") and (cache_folder / "snapshots").is_dir():
            return _hub_cache(cache_folder, spec, path)
    folders = sorted(child for child in path.iterdir() if child.is_dir() and _is_hf(child))
    if _is_hf(path):
        trained = {folder.name: folder for folder in folders if re.fullmatch(r"checkpoint-\d+", folder.name)}
        if trained:
            same = any(step_and_tokens(path)[0] == step_and_tokens(folder)[0] for folder in trained.values())
            return _folders(path, trained if same else trained | {"main": path})
        if folders:
            beneath = f"{folders[0].name} to {folders[-1].name}" if folders[1:] else folders[0].name
            _LOG.warning("%s: only the model in the folder itself; beneath it lie others (%s)", spec, beneath)
        return _folders(path, {"main": path})
    if folders:
        return _folders(path, {folder.name: folder for folder in folders})
    raise UserError(
        f"{spec}: no series found; looked for recipe.json (a run), config.json with weights ({KNOWN}),"
        " and folders with those"
    )


_GLOB = re.compile(r"[*?\[]")


def _open_remote(spec: str, base: str, names: str, downloads: Path, keep: bool) -> tuple[Series, str]:
    """The series, and the glob that is still to be applied."""
    if "://" in spec:
        return _open_address(spec, downloads, keep), "*"
    entry = entries.find(base)
    if entry is not None:
        return series_of_entry(entry, downloads, keep), names
    if "@" in spec and re.fullmatch(r"[\w.-]+/[\w.-]+", base):
        return _open_address(f"hf://{spec}", downloads, keep), "*"
    names_known = {one.lower(): one for one in (*entries.series_files(), *(e.name for e in entries.every_entry()))}
    hint = near(base.lower(), names_known, shown=lambda name: repr(names_known[name])) or ";"
    raise UserError(
        f"{spec}: no such folder and no registered series{hint} give a run, Hugging Face folders, a name of"
        " `fineline series`, org/name@revision, or an address such as hf://… or s3://…"
    )


def series_of_entry(entry: Entry, downloads: Path, keep: bool = True, ask: bool = True) -> Series:
    """The series of a registry entry. ask: as of `entries.checkpoints`."""
    named = entries.checkpoints(entry, ask)
    return _remote_series(
        entry.name, entry.location, named, downloads, keep, entry.options, entry.tokenizer, entry.scoring
    )


def _open_address(url: str, downloads: Path, keep: bool) -> Series:
    """One checkpoint, or where the address holds a glob, those that fit it."""
    before, after = url.partition("://")[::2]
    parts = after.rstrip("/").split("/")
    glob_part = next((i for i, part in enumerate(parts) if _GLOB.search(part)), None)
    if not before or not parts[0] or (glob_part == 0 and before == "hf"):
        raise UserError(f"{url}: expected an address such as hf://organisation/name@revision or s3://bucket/folder")
    if before == "hf" and glob_part is None:
        parse_hub(url)
    place = Remote(url, downloads).folder / parts[-1]
    if before in ("gs", "s3") and glob_part is None and fetch_records(url, place):
        series = _run(place, url)
        remote = [Remote(f"{url}/checkpoints/{one.step}", downloads, keep) for one in series.checkpoints]
        there = tuple(dataclasses.replace(one, remote=at) for one, at in zip(series.checkpoints, remote, strict=True))
        return Series(series.name, there, location=url)
    if before == "hf" and glob_part == 1:  # the revision, in name@glob, or the name of the repository
        repository, at, revision = parts[1].partition("@")
        if at and not _GLOB.search(repository):
            template = f"hf://{parts[0]}/{repository}@{'/'.join([NAME_SLOT, *parts[2:]])}"
            return _of_template(repository, template, revision, downloads, keep)
    if glob_part is not None:
        template = f"{before}://{'/'.join([*parts[:glob_part], NAME_SLOT, *parts[glob_part + 1 :]])}"
        name = parts[max(0, glob_part - 1)].replace("@", "-")
        return _of_template(name, template, parts[glob_part], downloads, keep)
    repository, _, revision = parts[1].partition("@") if before == "hf" and len(parts) > 1 else ("", "", "")
    series, name = (repository, revision or "main") if len(parts) == 2 and repository else (parts[-1], "main")
    step, tokens = parse_name(name if name != "main" else series)
    template = f"hf://{parts[0]}/{repository}@{NAME_SLOT}" if repository and len(parts) == 2 else url.rstrip("/")
    return _remote_series(series, template, [Named(name, step, tokens, url)], downloads, keep)


def _of_template(name: str, template: str, glob: str, downloads: Path, keep: bool) -> Series:
    names = [one for one in list_names(template) if fnmatch.fnmatchcase(one, glob)]
    if not names:
        raise UserError(f"{template.replace(NAME_SLOT, glob)}: nothing there has such a name")
    named = [Named(one, *parse_name(one), template.replace(NAME_SLOT, one)) for one in names]
    return _remote_series(name, template, entries.in_order(named), downloads, keep)


def _remote_series(
    series: str,
    template: str,
    named: list[Named],
    downloads: Path,
    keep: bool,
    options: Options = (),
    tokenizer: str = "",
    scoring: Scoring = DEFAULT_SCORING,
) -> Series:
    made = []
    for one in named:
        where = Remote(one.url, downloads, keep, options, tokenizer)
        name = one.name.replace("/", "-")  # of a file
        made.append(Checkpoint(series, name, one.step, one.tokens, where.folder, "hf", where))
    return Series(series, tuple(made), scoring, template)


def _folders(path: Path, folders: Mapping[str, Path], series: str = "") -> Series:
    """Folders with weights by the checkpoint's name. series: its name, where the folders are called by commits and
    the names say how far each is; default: the name of `path`."""
    steps = {name: parse_name(name) if series else step_and_tokens(folder) for name, folder in folders.items()}
    named = entries.in_order([Named(name, *known, "") for name, known in steps.items()])
    series = series or path.name
    made = [Checkpoint(series, one.name, one.step, one.tokens, folders[one.name], "hf") for one in named]
    return Series(series, tuple(made), location=os.path.realpath(path))


def _hub_cache(cache_folder: Path, spec: str, asked: Path) -> Series:
    """huggingface_hub's cache of a repository: refs/<revision> holds a commit, snapshots/<commit> its files.

    asked: the folder of the cache, or one snapshot.
    """
    revisions = {
        file.read_text().strip(): file for file in sorted((cache_folder / "refs").rglob("*")) if file.is_file()
    }
    found = {}
    for folder in sorted((cache_folder / "snapshots").iterdir()):
        if asked in (cache_folder, folder) and _is_hf(folder):
            revision = revisions.get(folder.name)
            name = revision.relative_to(cache_folder / "refs").as_posix() if revision else folder.name[:12]
            name = name.replace("/", "-")
            if name in found:
                raise UserError(f"{spec}: two snapshots of this cache are called {name}; give the folder of one")
            found[name] = folder
    if not found:
        raise UserError(f"{spec}: no snapshot of this cache holds config.json and weights ({KNOWN}); download them")
    return _folders(asked, found, cache_folder.name.split("--", 2)[-1])


def _run(run: Path, spec: str) -> Series:
    folder = run / "checkpoints"
    checkpoints = []
    for path in folder.iterdir() if folder.is_dir() else []:
        record = read_record(path) if path.name.isdigit() else None
        if record is not None and record["kept"]:
            checkpoints.append(_of_run(run, path, record))
        elif path.name.isdigit() and (wrong := lost_record(path)):
            step = int(path.name)
            checkpoints.append(Checkpoint(run.name, f"step{step}", step, None, path, "orbax", damage=wrong))
    if not checkpoints:
        raise UserError(f"{spec}: the run has no kept checkpoint in {folder} yet; train it, or check the schedule")
    in_order = sorted(checkpoints, key=lambda checkpoint: checkpoint.step or 0)
    return Series(run.name, tuple(in_order), location=os.path.realpath(run))


def _of_run(run: Path, path: Path, record: dict[str, Any]) -> Checkpoint:
    return Checkpoint(run.name, f"step{record['step']}", record["step"], record["tokens"], path, "orbax")


def _is_hf(folder: Path) -> bool:
    if is_adapter(folder) or ((one := trainer_format(folder)) and one.config):
        return True
    return config_file(folder).is_file() and holds_weights(folder)
