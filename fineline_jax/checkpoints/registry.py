"""Released series as data files: configs/series/*.yaml, or any YAML file of the same form.

An entry says where the checkpoints lie, what they are called, and how steps and tokens follow from a name
(docs/series.md). Adding a series is adding a file.
"""

import dataclasses
import itertools
import logging
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from fineline_jax.catalogue import config_folders
from fineline_jax.checkpoints.locations import PLACE, list_names
from fineline_jax.checkpoints.series import Options, Scoring
from fineline_jax.checkpoints.series_rules import bind, compiled, evaluate, expand, names_in
from fineline_jax.checkpoints.step_names import natural, parse_name
from fineline_jax.checkpoints.transfer import FetchError, offline
from fineline_jax.errors import UserError

SUFFIXES = (".yaml", ".yml")
MOST_SERIES = 10_000
"""Of one file; more are a mistake."""
_LOG = logging.getLogger(__name__)
_KEYS = {
    "name", "title", "location", "names", "pattern", "listing", "values", "step", "tokens", "tokenizer", "options",
    "scoring", "variants", "sources", "notes",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Entry:
    """One series as its file describes it."""

    file: Path
    name: str
    title: str
    location: str
    """Address of a checkpoint, with {name} for its name."""
    names: tuple[str, ...]
    """In training order; with `listing` those known when the file was written."""
    listing: bool
    """The names are read from the location, since they are too many or not all known."""
    patterns: tuple[str, ...]
    """Of names; {x} binds a number to x, * stands for anything."""
    values: Mapping[str, Mapping[str, float]]
    """Numbers of names that fit no pattern."""
    step: tuple[str, ...]
    tokens: tuple[str, ...]
    """Rules; the first whose numbers are all known is used, else what the name itself says."""
    tokenizer: str
    options: Options
    scoring: Scoring
    sources: tuple[str, ...]
    notes: tuple[str, ...]
    numbers: Mapping[str, float]
    """Of the variant; the rules may use them."""


@dataclasses.dataclass(frozen=True)
class Named:
    """A checkpoint of an entry."""

    name: str
    step: int | None
    tokens: int | None
    url: str


def entries(file: Path) -> list[Entry]:
    """The series of one file: one, or one per variant. Raises UserError naming file and key."""
    try:
        raw = yaml.safe_load(file.read_text())
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; give a registered series or the path of its YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{file}: not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(raw, dict):
        raise UserError(f"{file}: holds no mapping; write name: and location: (docs/series.md)")
    if unknown := set(raw) - _KEYS:
        raise UserError(f"{file}: unknown key {sorted(map(str, unknown))[0]!r}; known: {', '.join(sorted(_KEYS))}")
    try:
        return [_entry(file, raw, variant) for variant in _variants(raw.get("variants"))]
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def series_files() -> dict[str, Path]:
    """Registered files by stem: of the checkout's configs/series first, then the installed ones."""
    found: dict[str, Path] = {}
    for folder in config_folders():
        for file in sorted((folder / "series").glob("*.yaml")):
            found.setdefault(file.stem, file)
    return dict(sorted(found.items()))


def find(name: str) -> Entry | None:
    """The entry called `name`, or the only one of the file `name`; of a file with several FILE.yaml/NAME.

    None if there is no such series. Raises UserError for a file with several of which none is named.
    """
    file = file_of(name)
    if file is not None:
        found = entries(file)
        if len(found) > 1:
            one = found[0].name if file.stem == name else f"{name}/{found[0].name}"
            raise UserError(f"{name}: holds {len(found)} series; give one by name, such as {one}")
        return found[0]
    path, _, inside = name.rpartition("/")
    if path.endswith(SUFFIXES):
        found = {entry.name: entry for entry in entries(Path(path))}
        if inside not in found:
            raise UserError(f"{path}: holds no series {inside!r}; `fineline series {path}` lists them")
        return found[inside]
    return next((entry for entry in every_entry() if entry.name == name), None)


def file_of(name: str) -> Path | None:
    """The file that `name` means as a whole: a path that ends with .yaml, or a registered file."""
    return Path(name) if name.endswith(SUFFIXES) else series_files().get(name)


def every_entry() -> list[Entry]:
    """All registered series."""
    return [entry for file in series_files().values() for entry in entries(file)]


def checkpoints(entry: Entry, ask: bool = True) -> list[Named]:
    """The checkpoints of `entry` in training order.

    ask: whether a series that must be listed is (else its known names are returned, which may be incomplete).
    Raises FetchError if the listing cannot be had; with HF_HUB_OFFLINE set the known names are used, with a warning.
    """
    if not entry.listing or not ask:
        return [_named(entry, name) for name in entry.names]
    if offline() and entry.location.startswith("hf://") and entry.names:
        _LOG.warning("%s: offline, so only the %d known checkpoints", entry.name, len(entry.names))
        return [_named(entry, name) for name in entry.names]
    listed = [name for name in list_names(entry.location, entry.options) if _fits(entry, name)]
    if not listed:
        raise FetchError(f"{entry.name}: nothing at {entry.location} is named like {' or '.join(entry.patterns)}")
    return in_order([_named(entry, name) for name in listed])


def in_order(found: Sequence[Named]) -> list[Named]:
    """By tokens, else steps, else the numbers in their names."""

    def order(one: Named) -> tuple[float, float, list[Any]]:
        known = [math.inf if value is None else value for value in (one.tokens, one.step)]
        return known[0], known[1], natural(one.name)

    return sorted(found, key=order)


def _named(entry: Entry, name: str) -> Named:
    bound = dict(entry.values.get(name, {}))
    for pattern in () if bound else entry.patterns:
        if (found := bind(pattern, name)) is not None:
            bound = found
            break
    said_step, said_tokens = parse_name(name)
    numbers: dict[str, float] = {**entry.numbers, **bound}
    step = _first(entry, "step", numbers)
    if step is None:
        step = bound.get("step", said_step)
    if step is not None:
        numbers["step"] = step
    tokens = _first(entry, "tokens", numbers)
    if tokens is None:
        tokens = bound.get("tokens", said_tokens)
    url = entry.location.replace(PLACE, name)
    return Named(name, None if step is None else round(step), None if tokens is None else round(tokens), url)


def _fits(entry: Entry, name: str) -> bool:
    return (
        not entry.patterns or name in entry.values or any(bind(pattern, name) is not None for pattern in entry.patterns)
    )


def _first(entry: Entry, key: Literal["step", "tokens"], numbers: Mapping[str, float]) -> float | None:
    try:
        return next((found for rule in getattr(entry, key) if (found := evaluate(rule, numbers)) is not None), None)
    except UserError as error:
        raise UserError(f"{entry.file}: {key}: {error}") from error


def _entry(file: Path, raw: Mapping[str, Any], variant: Mapping[str, Any]) -> Entry:
    def text(key: str, default: str | None = None) -> str:
        found = raw.get(key, default)
        if not isinstance(found, str) or (default is None and not found):
            raise UserError(f"{key}: must be a text; see docs/series.md")
        return filled(found)

    def filled(found: str) -> str:
        for key, value in (*variant.items(), *variant.items()):  # twice: a value may name another
            found = found.replace(f"{{{key}}}", str(value))
        return found

    def texts(key: str, of: Mapping[str, Any] = raw, where: str = "") -> tuple[str, ...]:
        found = of.get(key) or []
        found = [found] if isinstance(found, (str, int)) else found
        if not isinstance(found, list) or not all(isinstance(one, (str, int)) for one in found):
            raise UserError(f"{where}{key}: must be a text or a list of texts")
        return tuple(filled(str(one)) for one in found)

    def table(key: str, of: Mapping[str, Any] = raw) -> dict[str, Any]:
        found = of.get(key)
        if found is not None and not (isinstance(found, dict) and all(isinstance(one, str) for one in found)):
            raise UserError(f"{key}: must be a mapping; see docs/series.md")
        return found or {}

    names = [name for one in texts("names") for part in one.split() for name in expand(part)]
    listing = raw.get("listing", False)
    location = text("location")
    if PLACE not in location:
        raise UserError(f"location: {location!r} has no {PLACE}, which stands for a checkpoint's name")
    if not isinstance(listing, bool) or (not names and not listing):
        raise UserError("give names:, or listing: true to read them from the location")
    if len(set(names)) < len(names):
        double = next(name for name in names if names.count(name) > 1)
        raise UserError(f"names: {double!r} is there twice")
    scoring = table("scoring")
    if set(scoring) - {"bos", "notes"} or scoring.get("bos", "auto") not in ("auto", "always", "never"):
        raise UserError("scoring: holds bos (auto, always or never) and notes")
    values = {name: table(name, table("values")) for name in table("values")}
    for name, found in values.items():
        if not all(isinstance(number, (int, float)) for number in found.values()):
            raise UserError(f"values: {name}: must hold numbers, as in {{{name}: {{step: 1000}}}}")
    options = table("options")
    if wrong := [key for key, value in options.items() if not isinstance(value, (str, int, float))]:
        raise UserError(f"options: {wrong[0]}: must be a text, a number, true or false")
    numbers = {key: value for key, value in variant.items() if isinstance(value, (int, float))}
    made = Entry(
        file,
        text("name", file.stem),
        text("title", ""),
        location,
        tuple(names),
        listing,
        texts("pattern"),
        values,
        texts("step"),
        texts("tokens"),
        text("tokenizer", ""),
        tuple(sorted(options.items())),
        Scoring(scoring.get("bos", "auto"), texts("notes", scoring, "scoring: ")),
        texts("sources"),
        texts("notes"),
        numbers,
    )
    _check(made)
    return made


def _check(entry: Entry) -> None:
    """Raise UserError naming the key for what would only be wrong later, or never be noticed."""
    for key in ("name", "title", "location", "tokenizer"):
        if left := re.search(r"\{(?!name\})\w*\}", getattr(entry, key)):
            raise UserError(f"{key}: {left[0]} is no key of variants; check its spelling")
    for key in ("location", "tokenizer"):
        if (address := getattr(entry, key)) and not re.match(r"[a-z][a-z0-9+.-]*://[^/]|file:///", address):
            raise UserError(f"{key}: {address!r} is no address; write hf://…, s3://… or file:///…")
    known = {"step", *entry.numbers, *(key for found in entry.values.values() for key in found)}
    for pattern in entry.patterns:
        try:
            known |= compiled(pattern).groupindex.keys()
        except UserError as error:
            raise UserError(f"pattern: {error}") from error
    for key, rules in (("step", entry.step), ("tokens", entry.tokens)):
        for rule in rules:
            try:
                unknown = names_in(rule) - known
            except UserError as error:
                raise UserError(f"{key}: {error}") from error
            if unknown:
                raise UserError(
                    f"{key}: {rule!r} uses {min(unknown)}, which no pattern, value or variant gives;"
                    f" known: {', '.join(sorted(known))}"
                )


def _variants(raw: Any) -> list[dict[str, Any]]:
    if raw is None:
        return [{}]
    groups = raw if isinstance(raw, list) else [raw]
    found = []
    for group in groups:
        if not isinstance(group, dict) or not group or not all(isinstance(key, str) for key in group):
            raise UserError("variants: must be a mapping of lists, or a list of mappings")
        if "name" in group:
            raise UserError("variants: {name} stands for a checkpoint's name; give the key another name")
        choices = [value if isinstance(value, list) else [value] for value in group.values()]
        if len(found) + math.prod(map(len, choices)) > MOST_SERIES:
            raise UserError(f"variants: are more than {MOST_SERIES:,} series; write shorter lists")
        for key, chosen in zip(group, choices):
            if not chosen or not all(isinstance(one, (str, int, float)) for one in chosen):
                raise UserError(f"variants: {key}: must be a text, a number, or a list of them")
        found += [dict(zip(group, chosen)) for chosen in itertools.product(*choices)]
    if not found:
        raise UserError("variants: is empty; leave it out for a single series")
    return found
