"""The history of a run: which recipe trained from which step on, and what was trained before it.

    RUN/history.json    {"format": 1, "segments": [...]}, and the same segments in the record of every checkpoint

A run is a pure function of (history, step): tokens and windows are carried from each segment into the next.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from fineline_jax.errors import UserError
from fineline_jax.recipe import Clock, Recipe, differences

FORMAT = 1
HISTORY = "history.json"


@dataclasses.dataclass(frozen=True)
class Parent:
    """The checkpoint that a branch begins at."""

    run: str
    step: int
    digest: str
    """SHA-256 of its complete.json, which has those of its files."""
    optimizer_state: Literal["kept", "fresh"] = "kept"


@dataclasses.dataclass(frozen=True)
class Segment:
    """The steps of a run that one recipe trains."""

    step: int
    """Steps before it."""
    tokens: int
    """Tokens trained before it."""
    windows: Mapping[str, int]
    """Windows passed before it by every source so far, by data_hash (of `data.storage.DataSet`)."""
    recipe: Recipe
    sources: tuple[str, ...]
    """data_hash of each of recipe.data.sources."""
    why: Literal["start", "import", "accepted change", "branch", "skipped windows"]
    changes: tuple[str, ...] = ()
    """The fields that differ from the segment before, a line each."""
    parent: Parent | None = None
    skipped: tuple[int, int] | None = None
    """First and last window, + 1, that were to be skipped, numbered as passed by all sources of the run."""

    @functools.cached_property
    def clock(self) -> Clock:
        """Its steps against tokens."""
        return Clock(self.recipe, self.step, self.tokens)


@dataclasses.dataclass(frozen=True)
class History:
    """The segments of a run in time order; the first begins at its first step, a branch's with its parent's first."""

    segments: tuple[Segment, ...]

    def at(self, step: int) -> int:
        """Number of the segment that makes the update behind `step` steps."""
        begun = [number for number, segment in enumerate(self.segments) if segment.step <= step]
        return begun[-1] if begun else 0

    def until(self, step: int) -> "History":
        """What a checkpoint of that step was trained by: the segments that begin before it, and the first."""
        return History(tuple(s for number, s in enumerate(self.segments) if number == 0 or s.step < step))

    def tokens(self, step: int) -> int:
        """Tokens trained before `step`."""
        return self.until(step).segments[-1].clock.tokens_at(step)

    def seeds(self, number: int) -> dict[str, tuple[tuple[int, int], ...]]:
        """The seeds that ordered every source up to that segment, by data_hash: (windows passed before, seed)."""
        found: dict[str, tuple[tuple[int, int], ...]] = {}
        for segment in self.segments[: number + 1]:
            for source in segment.sources:
                before, seed = found.get(source, ()), segment.recipe.order_seed
                if not before or before[-1][1] != seed:
                    found[source] = *before, (segment.windows.get(source, 0) if before else 0, seed)
        return found

    def last_step(self) -> int:
        """The step at which the run is complete."""
        return self.segments[-1].clock.last_step

    def plain(self) -> list[dict[str, Any]]:
        """The segments as JSON can hold them."""
        return [dataclasses.asdict(segment) for segment in self.segments]


def from_plain(segments: Any, where: Path) -> History:
    """The history of which `plain` made these segments. Raises UserError that names `where` they were read."""
    import pydantic

    try:
        read = _segments_type().validate_json(json.dumps(segments))
    except (pydantic.ValidationError, UserError) as error:
        reason = str(error) if isinstance(error, UserError) else error.errors()[0]["msg"]
        raise UserError(f"{where}: not the history of a run ({reason}); restore it from a backup") from error
    if not read:
        raise UserError(f"{where}: the history has no segments; restore it from a backup")
    return History(read)


@functools.cache
def _segments_type() -> Any:
    import pydantic

    return pydantic.TypeAdapter(tuple[Segment, ...])  # slow to make


def to_text(history: History) -> str:
    return json.dumps({"format": FORMAT, "segments": history.plain()}, indent=1) + "\n"


def read_history(run: Path) -> History | None:
    """The history in RUN/history.json; None where there is none. Raises UserError for a damaged one."""
    path = run / HISTORY
    try:
        content = json.loads(path.read_bytes())
        if content["format"] != FORMAT:
            raise UserError(f"{path}: has format {content['format']}, not {FORMAT}; use the version that wrote it")
        return from_plain(content["segments"], path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not the history of a run ({type(error).__name__}: {error}); delete it: the newest checkpoint has"
            " the same"
        ) from error


def changes(old: Segment, new: Recipe, sources: tuple[str, ...], may_differ: tuple[str, ...]) -> tuple[str, ...]:
    """One line per field in which `new`, with data sets of those hashes, differs from the recipe of `old`.

    A data set is the same wherever it lies. may_differ: beginnings of the fields that do not count.
    """
    lines = [line for line in differences(old.recipe, new) if not line.startswith(may_differ)]
    for number, (before, after) in enumerate(zip(old.sources, sources)):
        field = f"data.sources.{number}.path"
        if before == after:
            lines = [line for line in lines if not line.startswith(f"{field}:")]
        elif not any(line.startswith(f"{field}:") for line in lines):
            lines.append(f"{field}: {new.data.sources[number].path} holds other data")
    return tuple(lines)
