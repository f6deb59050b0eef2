"""The YAML file of a series: its keys, checked by pydantic, are those of an `Entry` (docs/series.md)."""

import itertools
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from fineline_jax.checkpoints.registry.rules import compiled, expand, names_in
from fineline_jax.checkpoints.remote.listing import NAME_SLOT
from fineline_jax.checkpoints.series import DEFAULT_SCORING, Options, Scoring
from fineline_jax.errors import UserError
from fineline_jax.tokenizers.open import Bos

MOST_SERIES = 10_000
"""Of one file; more are a mistake."""
_NAMES = "give names:, or listing: true to read them from the location"
_MAPPING = "must be a mapping; see docs/series.md"


def _texts(value: Any) -> tuple[str, ...]:
    listed = [value] if isinstance(value, (str, int)) else value
    if not isinstance(listed, (list, tuple)) or not all(isinstance(one, (str, int)) for one in listed):
        raise ValueError("must be a text or a list of texts")
    return tuple(map(str, listed))


def _names(value: Any) -> tuple[str, ...]:
    names = [name for text in _texts(value) for part in text.split() for name in expand(part)]
    if len(set(names)) < len(names):
        double = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{double!r} is there twice")
    return tuple(names)


def _table(value: Any, kinds: tuple[type, ...] = (object,), remedy: str = "", where: str = "") -> dict[str, Any]:
    """The mapping `value`, if its keys are texts and its values of those kinds."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError(where + _MAPPING)
    if wrong := [key for key, one in value.items() if not isinstance(one, kinds)]:
        raise ValueError((where or f"{wrong[0]}: ") + remedy)
    return value


def _values(value: Any) -> dict[str, dict[str, float]]:
    for name, numbers in _table(value).items():
        _table(numbers, (int, float), f"must hold numbers, as in {{{name}: {{step: 1000}}}}", f"{name}: ")
    return value


def _count(value: Any) -> int | None:
    if value == "unknown":
        return None
    if not re.fullmatch(r"[1-9]\d{0,6}", str(value)):
        raise ValueError("must be a number of checkpoints, or unknown")
    return int(value)


def _stages(value: Any) -> tuple[tuple[str, str], ...]:
    rules = _table(value, (str, int, float), "must be a rule for the tokens at which it begins")
    return tuple((name, str(rule)) for name, rule in rules.items())


def _options(value: Any) -> Options:
    return tuple(sorted(_table(value, (str, int, float), "must be a text, a number, true or false").items()))


def _scoring(value: Any) -> Scoring:
    bos = _table(value).get("bos", "auto")
    if set(value) - {"bos", "notes"} or bos not in get_args(Bos):
        raise ValueError("holds bos (auto, always or never) and notes")
    try:
        return Scoring(bos, _texts(value.get("notes") or ()))
    except ValueError as error:
        raise ValueError(f"notes: {error}") from None


Texts = Annotated[tuple[str, ...], BeforeValidator(_texts)]


class Entry(BaseModel):
    """One series as its file describes it."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    file: Path
    name: str
    title: str = ""
    location: Annotated[str, Field(min_length=1)]
    """Address of a checkpoint, with {name} for its name."""
    names: Annotated[tuple[str, ...], BeforeValidator(_names)] = ()
    """In training order; with `listing` those known when the file was written."""
    listing: bool = False
    """The names are read from the location, since they are too many or not all known."""
    pattern: Texts = ()
    """Of names; {x} binds a number to x, * stands for anything."""
    values: Annotated[Mapping[str, Any], BeforeValidator(_values)] = {}
    """Numbers of names that fit no pattern: {name: {key: number}}."""
    step: Texts = ()
    tokens: Texts = ()
    """Rules; the first whose numbers are all known is used, else what the name itself says."""
    count: Annotated[int | None, BeforeValidator(_count)] = None
    """Of published checkpoints, as somebody has counted them."""
    stages: Annotated[tuple[tuple[str, str], ...], BeforeValidator(_stages)] = ()
    """The later stages of training: name, and a rule over the variant's numbers for the tokens at which it begins."""
    names_differ: Texts = ()
    """Why the tokens in the names are others than those of the rule; without it a difference is a mistake."""
    tokenizer: str = ""
    options: Annotated[Options, BeforeValidator(_options)] = ()
    scoring: Annotated[Scoring, BeforeValidator(_scoring)] = DEFAULT_SCORING
    sources: Texts = ()
    notes: Texts = ()
    numbers: Mapping[str, Any] = {}
    """Of the variant; the rules may use them."""


KEYS = {*Entry.model_fields, "variants"} - {"file", "numbers"}
"""Of a series file."""


def read_entries(file: Path) -> list[Entry]:
    """The series of one file: one, or one per variant. Raises UserError naming file and key."""
    try:
        raw = yaml.safe_load(file.read_text())
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; give a registered series or the path of its YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{file}: not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(raw, dict):
        raise UserError(f"{file}: holds no mapping; write name: and location: (docs/series.md)")
    if unknown := set(raw) - KEYS:
        raise UserError(f"{file}: unknown key {min(map(str, unknown))!r}; known: {', '.join(sorted(KEYS))}")
    given = {key: value for key, value in raw.items() if value is not None}
    try:
        return [_entry(file, given, variant) for variant in _variants(given.pop("variants", {}))]
    except ValidationError as error:
        raise UserError(f"{file}: {_reason(error)}") from None
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def _reason(error: ValidationError) -> str:
    """The key and what is wrong with it, of the first of pydantic's errors."""
    first = error.errors(include_url=False)[0]
    key, kind = first["loc"][0], first["type"]
    if kind == "value_error":
        return f"{key}: {first['msg'].removeprefix('Value error, ')}"
    return _NAMES if kind == "bool_type" else f"{key}: must be a text; see docs/series.md"


def _entry(file: Path, given: Mapping[str, Any], variant: Mapping[str, Any]) -> Entry:
    def fill(value: Any) -> Any:
        if isinstance(value, list):
            return [fill(one) for one in value]
        if isinstance(value, dict):
            return {key: fill(one) for key, one in value.items()}
        if isinstance(value, str):
            for key, chosen in (*variant.items(), *variant.items()):  # twice: a value may name another
                value = value.replace(f"{{{key}}}", str(chosen))
        return value

    numbers = {key: value for key, value in variant.items() if isinstance(value, (int, float))}
    entry = Entry(**{"name": file.stem, **fill(given), "file": file, "numbers": numbers})
    _check(entry)
    return entry


def _check(entry: Entry) -> None:
    """Raise UserError naming the key for what would only be wrong later, or never be noticed."""
    if NAME_SLOT not in entry.location:
        raise UserError(f"location: {entry.location!r} has no {NAME_SLOT}, which stands for a checkpoint's name")
    if not entry.names and not entry.listing:
        raise UserError(_NAMES)
    for key in ("name", "title", "location", "tokenizer"):
        if unfilled := re.search(r"\{(?!name\})\w*\}", getattr(entry, key)):
            raise UserError(f"{key}: {unfilled[0]} is no key of variants; check its spelling")
    for key in ("location", "tokenizer"):
        if (address := getattr(entry, key)) and not re.match(r"[a-z][a-z0-9+.-]*://[^/]|file:///", address):
            raise UserError(f"{key}: {address!r} is no address; write hf://…, s3://… or file:///…")
    known = {"step", *entry.numbers, *(key for values in entry.values.values() for key in values)}
    for pattern in entry.pattern:
        try:
            known |= compiled(pattern).groupindex.keys()
        except UserError as error:
            raise UserError(f"pattern: {error}") from error
    rules_of = (("step", entry.step, known), ("tokens", entry.tokens, known))
    for key, rules, known in (*rules_of, ("stages", [rule for _, rule in entry.stages], {*entry.numbers})):
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
    """Every combination of the values of each group; one without values if there is no group."""
    if raw == {}:
        return [{}]
    variants: list[dict[str, Any]] = []
    for group in raw if isinstance(raw, list) else [raw]:
        if not isinstance(group, dict) or not group or not all(isinstance(key, str) for key in group):
            raise UserError("variants: must be a mapping of lists, or a list of mappings")
        if "name" in group:
            raise UserError("variants: {name} stands for a checkpoint's name; give the key another name")
        choices = [value if isinstance(value, list) else [value] for value in group.values()]
        if len(variants) + math.prod(map(len, choices)) > MOST_SERIES:
            raise UserError(f"variants: are more than {MOST_SERIES:,} series; write shorter lists")
        for key, chosen in zip(group, choices):
            if not chosen or not all(isinstance(one, (str, int, float)) for one in chosen):
                raise UserError(f"variants: {key}: must be a text, a number, or a list of them")
        variants += [dict(zip(group, chosen)) for chosen in itertools.product(*choices)]
    if not variants:
        raise UserError("variants: is empty; leave it out for a single series")
    return variants
