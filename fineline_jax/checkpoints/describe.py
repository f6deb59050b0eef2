"""What `fineline series` prints."""

import collections
import os
import re
import textwrap
from collections.abc import Iterable

from fineline_jax.checkpoints.open import open_series, series_of_entry, split_spec
from fineline_jax.checkpoints.registry import entries
from fineline_jax.checkpoints.registry.entries import Entry
from fineline_jax.checkpoints.registry.step_names import parse_name
from fineline_jax.checkpoints.remote import cache
from fineline_jax.checkpoints.remote.download import FetchError
from fineline_jax.checkpoints.remote.listing import list_names
from fineline_jax.checkpoints.select import select
from fineline_jax.checkpoints.series import Series
from fineline_jax.errors import UserError
from fineline_jax.progress import short
from fineline_jax.text_table import text_table

MOST_SHOWN = 8
"""Names in one finding of a comparison."""


def overview() -> str:
    """One line per registered file."""
    rows = [("name", "checkpoints", "tokens", "what")]
    for file in entries.series_files().values():
        listed = entries.entries(file)
        first = listed[0]
        names = first.name if len(listed) == 1 else f"{file.stem} ({len(listed)} series)"
        title = first.title if len(listed) == 1 else f"such as {first.name}: {first.title}"
        known = len(first.names) or ""
        count = str(first.count or f"{known}+" if first.listing else known)
        rows.append((names, count, _span(first), title))
    note = (
        "+: more are listed where they lie. `fineline series NAME` prints the checkpoints of one, --check compares it."
    )
    return f"{text_table(rows)}\n\n{note}"


def checked(name: str) -> tuple[str, list[str]]:
    """What the listing of its location says of the entry `name`, or of all in the file `name`. Second: the mistakes,
    which are names of an entry that are not listed, tokens in names that its rule does not give, another number of
    checkpoints.

    Raises UserError for what is not registered, FetchError if a location cannot be listed.
    """
    file = entries.file_of(name)
    held = entries.entries(file) if file is not None else [one for one in [entries.find(name)] if one]
    if not held:
        raise UserError(f"{name}: --check: no registered series; give a name of `fineline series`, or a YAML file")
    found = [_compared(entry) for entry in held]
    return "\n".join(text for text, _ in found), [mistake for _, mistakes in found for mistake in mistakes]


def details(spec: str, tokens: str = "", every: int = 1) -> tuple[str, list[str]]:
    """Everything known of one series, and its checkpoints; of a file with many series their names. Second: the
    checkpoints that are damaged, and why.

    Raises UserError as `open_series`.
    """
    base, names = split_spec(spec)
    file = None if os.path.isdir(base) else entries.file_of(base)
    if file is not None and len(listed := entries.entries(file)) > 1:
        inside = "" if file.stem == base else f"{base}/"
        names_inside = "  ".join(inside + entry.name for entry in listed)
        lines = textwrap.wrap(names_inside, 110, break_on_hyphens=False, break_long_words=False)
        return "\n".join([f"{len(listed)} series:", *lines]), []
    entry = None if os.path.isdir(base) else entries.find(base)
    lines = []
    try:
        series = open_series(spec, tokens=tokens, every=every)
    except FetchError as error:
        if entry is None or not entry.names:
            raise
        lines = [f"The listing cannot be had ({error}).", f"Known without it, {len(entry.names)} checkpoints:", ""]
        series = select(series_of_entry(entry, cache.default_downloads(), ask=False), names, tokens, every)
    damaged = [f"{one.location} ({one.damage})" for one in series.checkpoints if one.damage]
    return "\n".join([*_head(entry), *lines, _checkpoints(series)]), damaged


def _head(entry: Entry | None) -> list[str]:
    if entry is None:
        return []
    lines = [entry.title, ""]
    if entry.scoring.bos != "auto":
        lines.append(f"scored with --bos {entry.scoring.bos} unless you say otherwise")
    if entry.tokenizer:
        lines.append(f"tokenizer: {entry.tokenizer}")
    if entry.tokens:
        rule = f"tokens: {', else '.join(entry.tokens)}"
        numbers = ", ".join(f"{key} = {value}" for key, value in entry.numbers.items() if key in rule)
        lines.append(f"{rule}{f' ({numbers})' if numbers else ''}")
    lines += [f"{stage} begins at {start:,} tokens" for stage, start in entries.stage_starts(entry).items()]
    lines += [*entry.scoring.notes, *entry.names_differ, *entry.notes]
    lines += [f"source: {source}" for source in entry.sources]
    return [*lines, ""]


def _checkpoints(series: Series) -> str:
    rows = [("name", "step", "tokens", "location")]
    for one in series.checkpoints:
        step = "" if one.step is None else f"{one.step:,}"
        tokens = "" if one.tokens is None else f"{one.tokens:,}"
        rows.append((one.name, step, tokens, one.remote.url if one.remote else str(one.location)))
    return text_table(rows, right=(1, 2))


def _span(entry: Entry) -> str:
    tokens = [one.tokens for one in entries.checkpoints(entry, ask=False) if one.tokens is not None]
    if not tokens:
        return ""
    return short(max(tokens)) if len(tokens) == 1 else f"{short(min(tokens))} to {short(max(tokens))}"


def _compared(entry: Entry) -> tuple[str, list[str]]:
    """What the listing of the entry's location says of it, one per line; and those findings that are mistakes."""
    listed = entries.matching(entry, given := list_names(entry.location, entry.options))
    named = entries.in_order([entries.named(entry, name) for name in listed])
    lines = [f"{len(given)} names at {entry.location}, {len(named)} of them checkpoints of {entry.name}"]
    rest = [name for name in given if name not in set(listed)]
    for other in [one for one in entries.every_entry() if one.location == entry.location and one.name != entry.name]:
        if theirs := set(entries.matching(other, rest)):
            lines.append(f"of another series: {len(theirs)}, {other.name}")
            rest = [name for name in rest if name not in theirs]
    if rest:
        lines.append(f"of no series: {len(rest)}, {_kinds(rest)}")
    mistakes = []
    if missing := [name for name in entry.names if name not in set(listed)]:
        mistakes.append(f"not listed: {len(missing)}, {_shown(missing)}")
    if entry.count is not None and entry.count != len(named):
        mistakes.append(f"count: {entry.count} in the entry, {len(named)} listed")
    said = [one for one in named if one.tokens is not None and parse_name(one.name)[1] is not None]
    if said and entry.names_differ:
        lines.append(f"tokens in {len(said)} names are not compared: {entry.names_differ[0]}")
    elif said:
        wrong = entries.disagreements(entry, listed)
        largest = max(abs((one.tokens or 0) - (parse_name(one.name)[1] or 0)) for one in said)
        lines.append(f"tokens in {len(said)} names, by the rule at most {short(largest)} others")
        mistakes += [f"tokens: {len(wrong)} names say others, {_shown(wrong.values())}"] if wrong else []
    if named:
        ends = [
            f"{one.name} ({'tokens unknown' if one.tokens is None else f'{short(one.tokens)} tokens'})"
            for one in (named[0], named[-1])
        ]
        lines.append(f"in order of training from {ends[0]} to {ends[1]}")
    return "\n".join([f"{entry.name}:", *(f"  {line}" for line in (*lines, *mistakes))]), mistakes


def _kinds(names: Iterable[str]) -> str:
    """Names that differ in their numbers only, as one with how many they are."""
    kinds = collections.Counter(re.sub(r"\d+", "N", name) for name in names)
    return _shown(kind if count == 1 else f"{kind} ({count})" for kind, count in kinds.most_common())


def _shown(texts: Iterable[str]) -> str:
    every = list(texts)
    more = f", and {len(every) - MOST_SHOWN} more" if len(every) > MOST_SHOWN else ""
    return ", ".join(every[:MOST_SHOWN]) + more
