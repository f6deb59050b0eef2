"""An entry of the registry held against what its location lists: `fineline series NAME --check`."""

import collections
import re
from collections.abc import Iterable

from fineline_jax.checkpoints.registry import entries
from fineline_jax.checkpoints.registry.series_file import Entry
from fineline_jax.checkpoints.registry.step_names import parse_name
from fineline_jax.checkpoints.remote.listing import list_names
from fineline_jax.progress import short

MOST_SHOWN = 8


def check(entry: Entry) -> tuple[str, list[str]]:
    """What the listing of the entry's location says of it, one per line; and those findings that are mistakes: names
    of the entry that are not listed, tokens in names that the rule does not give, another number of checkpoints.

    Raises FetchError if the location cannot be listed.
    """
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
        first, last = (f"{one.name} ({_tokens(one)})" for one in (named[0], named[-1]))
        lines.append(f"in order of training from {first} to {last}")
    return "\n".join([f"{entry.name}:", *(f"  {line}" for line in (*lines, *mistakes))]), mistakes


def _tokens(one: entries.Named) -> str:
    return "tokens unknown" if one.tokens is None else f"{short(one.tokens)} tokens"


def _kinds(names: Iterable[str]) -> str:
    """Names that differ in their numbers only, as one with how many they are."""
    kinds = collections.Counter(re.sub(r"\d+", "N", name) for name in names)
    return _shown(kind if count == 1 else f"{kind} ({count})" for kind, count in kinds.most_common())


def _shown(texts: Iterable[str]) -> str:
    every = list(texts)
    more = f", and {len(every) - MOST_SHOWN} more" if len(every) > MOST_SHOWN else ""
    return ", ".join(every[:MOST_SHOWN]) + more
