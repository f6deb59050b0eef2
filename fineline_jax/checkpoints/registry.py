"""Released series as data files: configs/series/*.yaml, or any YAML file of the same form.

An entry says where the checkpoints lie, what they are called, and how steps and tokens follow from a name
(docs/series.md). Adding a series is adding a file.
"""

import ast
import dataclasses
import itertools
import logging
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from fineline_jax.catalogue import config_folders
from fineline_jax.checkpoints.locations import PLACE, Options, list_names
from fineline_jax.checkpoints.step_names import natural, parse_name
from fineline_jax.checkpoints.transfer import FetchError, offline
from fineline_jax.errors import UserError

Bos = Literal["auto", "always", "never"]
_LOG = logging.getLogger(__name__)
NUMBER = r"\d+(?:\.\d+)?"
_KEYS = {
    "name", "title", "location", "names", "pattern", "listing", "values", "step", "tokens", "tokenizer", "options",
    "scoring", "variants", "sources", "notes",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Scoring:
    """How the checkpoints of a series are to be scored."""

    bos: Bos = "auto"
    """Used where --bos is not given: auto, always, never."""
    notes: tuple[str, ...] = ()
    """What a reader of the numbers must know."""


DEFAULT_SCORING = Scoring()


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
    except yaml.YAMLError as error:
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
    """The entry called `name`, or the only one of the file `name`; None if there is no such series."""
    if name.endswith((".yaml", ".yml")):
        found = entries(Path(name))
        if len(found) > 1:
            raise UserError(f"{name}: holds {len(found)} series; give one by name, such as {found[0].name}")
        return found[0]
    for stem, file in series_files().items():
        of_file = entries(file)
        for entry in of_file:
            if entry.name == name or (stem == name and len(of_file) == 1):
                return entry
    return None


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


def expand(text: str) -> list[str]:
    """Braces as in a shell: step{0..6..2} -> step0 step2 step4 step6; {000..002} keeps the zeros; {a,b}."""
    found = re.search(r"\{([^{}]*)\}", text)
    if not found:
        return [text]
    span = re.fullmatch(r"(\d+)\.\.(\d+)(?:\.\.(\d+))?", found[1])
    if span:
        start, stop, by = int(span[1]), int(span[2]), int(span[3] or 1)
        if by < 1 or stop < start:
            raise UserError(f"{text}: {{{found[1]}}} is no range; write {{first..last}} or {{first..last..step}}")
        width = len(span[1]) if span[1].startswith("0") else 0
        parts = [f"{number:0{width}d}" for number in range(start, stop + 1, by)]
    elif "," in found[1]:
        parts = [part.strip() for part in found[1].split(",")]
    else:
        raise UserError(f"{text}: {{{found[1]}}} is neither a range nor a list")
    before, after = text[: found.start()], text[found.end() :]
    return [before + part + rest for part in parts for rest in expand(after)]


_OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}


def evaluate(rule: str, numbers: Mapping[str, float]) -> float | None:
    """The value of a rule such as "762 * (chunk + 1)"; None if it uses a number that is not known.

    Allowed: numbers, names, + - * / //, parentheses, round(). Raises UserError for anything else.
    """

    def value(node: ast.expr) -> float:
        match node:
            case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
                return number
            case ast.Name(id=name):
                return numbers[name]
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                return _OPERATORS[type(op)](value(left), value(right))
            case ast.Call(func=ast.Name(id="round"), args=[inner], keywords=[]):
                return round(value(inner))
        raise UserError(f"{rule!r} is no rule; allowed are numbers, names, + - * / //, parentheses and round()")

    try:
        return value(ast.parse(rule, mode="eval").body)
    except KeyError:
        return None
    except (SyntaxError, ZeroDivisionError, RecursionError) as error:
        raise UserError(f"{rule!r} is no rule: {error}") from error


def bind(pattern: str, name: str) -> dict[str, float] | None:
    """The numbers that `pattern` finds in `name`; None if it does not fit."""
    parts = re.split(r"(\{\w+\}|\*)", pattern)
    regex = "".join(
        ".*?" if part == "*" else f"(?P<{part[1:-1]}>{NUMBER})" if part.startswith("{") else re.escape(part)
        for part in parts
    )
    found = re.fullmatch(regex, name)
    return None if found is None else {key: _number(text) for key, text in found.groupdict().items()}


def _named(entry: Entry, name: str) -> Named:
    bound = dict(entry.values.get(name, {}))
    for pattern in () if bound else entry.patterns:
        if (found := bind(pattern, name)) is not None:
            bound = found
            break
    said_step, said_tokens = parse_name(name)
    numbers: dict[str, float] = {**entry.numbers, **bound}
    step = _first(entry.step, numbers)
    if step is None:
        step = bound.get("step", said_step)
    if step is not None:
        numbers["step"] = step
    tokens = _first(entry.tokens, numbers)
    if tokens is None:
        tokens = bound.get("tokens", said_tokens)
    url = entry.location.replace(PLACE, name)
    return Named(name, None if step is None else round(step), None if tokens is None else round(tokens), url)


def _fits(entry: Entry, name: str) -> bool:
    return (
        not entry.patterns or name in entry.values or any(bind(pattern, name) is not None for pattern in entry.patterns)
    )


def _first(rules: Sequence[str], numbers: Mapping[str, float]) -> float | None:
    return next((found for rule in rules if (found := evaluate(rule, numbers)) is not None), None)


def _number(text: str) -> float:
    return float(text) if "." in text else int(text)


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

    def texts(key: str) -> tuple[str, ...]:
        found = raw.get(key, [])
        found = [found] if isinstance(found, (str, int)) else found
        if not isinstance(found, list) or not all(isinstance(one, (str, int)) for one in found):
            raise UserError(f"{key}: must be a text or a list of texts")
        return tuple(filled(str(one)) for one in found)

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
    scoring = raw.get("scoring") or {}
    if set(scoring) - {"bos", "notes"} or scoring.get("bos", "auto") not in ("auto", "always", "never"):
        raise UserError("scoring: holds bos (auto, always or never) and notes")
    numbers = {key: value for key, value in variant.items() if isinstance(value, (int, float))}
    made = Entry(
        file,
        text("name", file.stem),
        text("title", ""),
        location,
        tuple(names),
        listing,
        texts("pattern"),
        raw.get("values") or {},
        texts("step"),
        texts("tokens"),
        text("tokenizer", ""),
        tuple(sorted((raw.get("options") or {}).items())),
        Scoring(scoring.get("bos", "auto"), tuple(scoring.get("notes") or ())),
        texts("sources"),
        texts("notes"),
        numbers,
    )
    for rule in (*made.step, *made.tokens):
        evaluate(rule, {})
    return made


def _variants(raw: Any) -> list[dict[str, Any]]:
    if raw is None:
        return [{}]
    groups = raw if isinstance(raw, list) else [raw]
    found = []
    for group in groups:
        if not isinstance(group, dict):
            raise UserError("variants: must be a mapping of lists, or a list of mappings")
        choices = [value if isinstance(value, list) else [value] for value in group.values()]
        found += [dict(zip(group, chosen)) for chosen in itertools.product(*choices)]
    return found
