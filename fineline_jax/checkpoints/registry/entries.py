"""Released series as data files: configs/series/*.yaml, or any YAML file of the same form.

An entry says where the checkpoints lie, what they are called, and how steps and tokens follow from a name
(docs/series.md). Adding a series is adding a file.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from fineline_jax.catalogue import config_files, find_config
from fineline_jax.checkpoints.registry.rules import bind, evaluate
from fineline_jax.checkpoints.registry.series_file import Entry, read_entries
from fineline_jax.checkpoints.registry.step_names import natural, parse_name
from fineline_jax.checkpoints.remote.download import FetchError, offline
from fineline_jax.checkpoints.remote.listing import NAME_SLOT, list_names
from fineline_jax.errors import UserError

SUFFIXES = (".yaml", ".yml")
_PATTERN = "series/{}.yaml"
TOLERANCE = 5e-3
"""Relative; of the tokens in a name (step-1195k-token-2.5T x 2,097,152 is 2506.1B)."""
_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Named:
    """A checkpoint of an entry."""

    name: str
    step: int | None
    tokens: int | None
    url: str


def series_files() -> dict[str, Path]:
    """Registered files by stem: the shipped ones, then those of ./configs/series that have other names."""
    return config_files(_PATTERN)


def find(name: str) -> Entry | None:
    """The entry called `name`, or the only one of the file `name`; of a file with several FILE.yaml/NAME.

    None if there is no such series. Raises UserError for a file with several of which none is named.
    """
    file = file_of(name)
    if file is not None:
        candidates = entries(file)
        if len(candidates) > 1:
            one = candidates[0].name if file.stem == name else f"{name}/{candidates[0].name}"
            raise UserError(f"{name}: holds {len(candidates)} series; give one by name, such as {one}")
        return candidates[0]
    path, _, inside = name.rpartition("/")
    if path.endswith(SUFFIXES):
        candidates = {entry.name: entry for entry in entries(Path(path))}
        if inside not in candidates:
            raise UserError(f"{path}: holds no series {inside!r}; `fineline series {path}` lists them")
        return candidates[inside]
    return next((entry for entry in every_entry() if entry.name == name), None)


def file_of(name: str) -> Path | None:
    """The file that `name` means as a whole: a path that ends with .yaml, or a registered file."""
    if name.endswith(SUFFIXES):
        return Path(name)
    return find_config(name, _PATTERN, "series") if name in series_files() else None


def every_entry() -> list[Entry]:
    """All registered series."""
    return [entry for file in series_files().values() for entry in entries(file)]


def checkpoints(entry: Entry, ask: bool = True) -> list[Named]:
    """The checkpoints of `entry` in training order.

    ask: whether a series that must be listed is (else its known names are returned, which may be incomplete).
    Raises FetchError if the listing cannot be had; with HF_HUB_OFFLINE set the known names are used, with a warning.
    """
    if not entry.listing or not ask:
        return [named(entry, name) for name in entry.names]
    if offline() and entry.location.startswith("hf://") and entry.names:
        _LOG.warning("%s: offline, so only the %d known checkpoints", entry.name, len(entry.names))
        return [named(entry, name) for name in entry.names]
    listed = matching(entry, list_names(entry.location, entry.options))
    if not listed:
        raise FetchError(f"{entry.name}: nothing at {entry.location} is named like {' or '.join(entry.pattern)}")
    if wrong := disagreements(entry, listed):
        _LOG.warning("%s: %s; their tokens are left unknown", entry.name, "; ".join(wrong.values()))
    found = [named(entry, name) for name in listed]
    return in_order([dataclasses.replace(one, tokens=None) if one.name in wrong else one for one in found])


def stage_starts(entry: Entry) -> dict[str, int]:
    """Tokens at which each later stage of training begins, where the stage before it ended, in their order."""
    starts = {stage: evaluate(rule, entry.numbers) for stage, rule in entry.stages}
    return {stage: round(start) for stage, start in starts.items() if start is not None}


def placed(repository: str, revision: str = "") -> tuple[Entry, Named] | None:
    """The registered series and its checkpoint that a repository of the hub is, at a revision; None: no series has it.

    repository: with or without its organisation, in any case of letters; where each checkpoint has a repository of its
    own, it alone says which one.
    """
    base = repository.rpartition("/")[2]
    for entry in [one for one in every_entry() if one.location.startswith("hf://")]:
        whole, at, _ = (place := entry.location.rpartition("/")[2]).partition("@")
        start = place.partition(NAME_SLOT)[0]
        if at:
            name = revision if whole.lower() == base.lower() else ""
        else:
            name = base[len(start) :] if start and base.lower().startswith(start.lower()) else ""
        if name and entry.pattern and _fits(entry, name):
            return entry, named(entry, name)
    return None


def entries(file: Path) -> list[Entry]:
    """The series of one file: one, or one per variant.

    Raises UserError naming file and key; also if a name in it says other tokens than the rule, and the file does not
    state why (`names_differ`).
    """
    state = file.stat() if file.is_file() else None
    return list(_entries(file, (state.st_ino, state.st_mtime_ns, state.st_size) if state else None))


@functools.lru_cache(maxsize=256)
def _entries(file: Path, state: tuple[int, ...] | None) -> tuple[Entry, ...]:
    """state: of the file, by whose change it is known that it must be read again."""
    listed = tuple(read_entries(file))
    for entry in listed:
        if wrong := disagreements(entry, entry.names):
            raise UserError(
                f"{file}: tokens: {next(iter(wrong.values()))}; correct the rule, or state why under names_differ"
            )
    return listed


def disagreements(entry: Entry, names: Sequence[str]) -> dict[str, str]:
    """What is to be said of the names in which the tokens are others than by the rule."""
    wrong: dict[str, str] = {}
    for name in names if entry.tokens and not entry.names_differ else ():
        said = parse_name(name)[1]
        tokens = None if said is None else named(entry, name).tokens
        # Names are rounded up or down to 10^9; a few batches may have been lost.
        if said is not None and tokens is not None and abs(tokens - said) > max(1e9, TOLERANCE * said):
            wrong[name] = f"{name} has {tokens / 1e9:.6g}B by the rule"
    return wrong


def in_order(listed: Sequence[Named]) -> list[Named]:
    """By tokens, else steps, else the numbers in their names."""

    def order(one: Named) -> tuple[float, float, list[Any]]:
        known = [math.inf if value is None else value for value in (one.tokens, one.step)]
        return known[0], known[1], natural(one.name)

    return sorted(listed, key=order)


def named(entry: Entry, name: str) -> Named:
    """The checkpoint `name` with its step and tokens, by the rules of the entry."""
    bound = dict(entry.values.get(name, {}))
    for pattern in () if bound else entry.pattern:
        if (match := bind(pattern, name)) is not None:
            bound = match
            break
    step_in_name, tokens_in_name = parse_name(name)
    numbers: dict[str, float] = {**entry.numbers, **bound}
    step = _first(entry, "step", numbers)
    if step is None:
        step = bound.get("step", step_in_name)
    if step is not None:
        numbers["step"] = step
    tokens = _first(entry, "tokens", numbers)
    if tokens is None:
        tokens = bound.get("tokens", tokens_in_name)
    url = entry.location.replace(NAME_SLOT, name)
    return Named(name, None if step is None else round(step), None if tokens is None else round(tokens), url)


def matching(entry: Entry, names: Sequence[str]) -> list[str]:
    """Those of the names that are checkpoints of the entry."""
    return [name for name in names if _fits(entry, name)]


def _fits(entry: Entry, name: str) -> bool:
    known = name in entry.values or name in entry.names or not entry.pattern
    return known or any(bind(pattern, name) is not None for pattern in entry.pattern)


def _first(entry: Entry, key: Literal["step", "tokens"], numbers: Mapping[str, float]) -> float | None:
    try:
        return next((value for rule in getattr(entry, key) if (value := evaluate(rule, numbers)) is not None), None)
    except UserError as error:
        raise UserError(f"{entry.file}: {key}: {error}") from error
