"""Finding a series: a run, Hugging Face folders, a registered series, a repository of the hub, a bucket.

No weights are read and JAX is not imported.
"""

import difflib
import fnmatch
import os
import re
from pathlib import Path
from typing import Any

from fineline_jax.checkpoints.formats.weight_files import KNOWN, holds_weights
from fineline_jax.checkpoints.registry import entries
from fineline_jax.checkpoints.registry.entries import Entry, Named
from fineline_jax.checkpoints.registry.step_names import common_start, parse_name
from fineline_jax.checkpoints.remote import cache
from fineline_jax.checkpoints.remote.listing import NAME_SLOT, list_names, parse_hub
from fineline_jax.checkpoints.runs.digest_record import damage, read_record
from fineline_jax.checkpoints.select import select
from fineline_jax.checkpoints.series import DEFAULT_SCORING, Checkpoint, Options, Remote, Scoring, Series
from fineline_jax.errors import UserError


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

    @GLOB at the end (amber@ckpt_3*, org/name@step*) chooses by name; then tokens (`select.parse_grid`), then every.
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
    entry = entries.find(base)
    if entry is not None:
        return series_of_entry(entry, downloads, keep), names
    if "@" in spec and re.fullmatch(r"[\w.-]+/[\w.-]+", base):
        return _open_address(f"hf://{spec}", downloads, keep), "*"
    names_known = {one.lower(): one for one in (*entries.series_files(), *(e.name for e in entries.every_entry()))}
    near = difflib.get_close_matches(base.lower(), names_known, n=1)
    hint = f"did you mean {names_known[near[0]]!r}? " if near else ""
    raise UserError(
        f"{spec}: no such folder and no registered series; {hint}give a run, Hugging Face folders, a name of"
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
    common = common_start([one.lower() for one in names]) if len(names) > 1 else ""
    named = [Named(one, *parse_name(one, common), template.replace(NAME_SLOT, one)) for one in names]
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


def _folders(path: Path, folders: list[Path]) -> Series:
    name = path.name
    common = common_start([folder.name.lower() for folder in folders]) if len(folders) > 1 else ""
    at = {folder.name: folder for folder in folders}
    named = entries.in_order([Named(folder.name, *parse_name(folder.name, common), "") for folder in folders])
    made = [Checkpoint(name, one.name, one.step, one.tokens, at[one.name], "hf") for one in named]
    return Series(name, tuple(made), location=_real(path))


def _run(run: Path, spec: str) -> Series:
    folder = run / "checkpoints"
    checkpoints = []
    for path in folder.iterdir() if folder.is_dir() else []:
        record = read_record(path) if path.name.isdigit() else None
        if record is not None and record["kept"]:
            checkpoints.append(_of_run(run, path, record))
    if not checkpoints:
        raise UserError(f"{spec}: the run has no kept checkpoint in {folder} yet; train it, or check the schedule")
    in_order = sorted(checkpoints, key=lambda checkpoint: checkpoint.step or 0)
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


def _is_hf(folder: Path) -> bool:
    return (folder / "config.json").is_file() and holds_weights(folder)
