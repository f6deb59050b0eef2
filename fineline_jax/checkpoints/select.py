"""Choosing some of a series' checkpoints: a glob on their names, a grid of tokens, every n-th."""

import dataclasses
import fnmatch
import logging
import math
import re
from decimal import Decimal

from fineline_jax.checkpoints.series import Checkpoint, Series
from fineline_jax.errors import UserError

_LOG = logging.getLogger(__name__)
_UNITS = {"": 1, "k": 1_000, "m": 1_000_000, "b": 1_000_000_000, "t": 1_000_000_000_000}


@dataclasses.dataclass(frozen=True)
class TokenGrid:
    """start:stop:spacing in tokens, both ends included."""

    start: int
    stop: int | None
    """None: to the end of the series."""
    spacing: int | None
    """None: every checkpoint between start and stop."""


def select(series: Series, names: str = "*", tokens: str = "", every: int = 1) -> Series:
    """The checkpoints of `series` that pass all three, in its order.

    names: globs on the checkpoint's name, with commas between. tokens: `parse_grid`'s text; "": all. every: 1 keeps
    all, 3 keeps the first, fourth, … of what the others left. Raises UserError if nothing is left, a glob fits no
    checkpoint, or an option does not parse.
    """
    if every < 1:
        raise UserError(f"--every {every}: must be at least 1")
    fits: set[str] = set()
    for one in names.split(","):
        if not (found := {each.name for each in series.checkpoints if fnmatch.fnmatchcase(each.name, one)}):
            first, last = series.checkpoints[0].name, series.checkpoints[-1].name
            raise UserError(f"{series.name}@{one}: no checkpoint has such a name; they run from {first} to {last}")
        fits |= found
    left = [checkpoint for checkpoint in series.checkpoints if checkpoint.name in fits]
    if tokens:
        left = _on_grid(series.name, left, tokens)
    return dataclasses.replace(series, checkpoints=tuple(left[::every]))


def parse_grid(text: str) -> TokenGrid:
    """ "0:100B:10B" (every 10 B from 0 to 100 B), "100B:" (from 100 B on), ":1T", "::50B", "300B" (the one nearest).

    Raises UserError naming the text.
    """
    parts = text.split(":")
    if len(parts) > 3 or not any(part.strip() for part in parts):
        raise UserError(f"--tokens {text}: expected start:stop:spacing, as in 0:100B:10B")
    values = [parse_amount(part, text) if part.strip() else None for part in parts]
    if len(values) == 1:
        assert values[0] is not None
        return TokenGrid(values[0], values[0], max(1, 2 * values[0]))
    start, stop, spacing = [*values, None][:3]
    start = start or 0
    if stop is not None and stop < start:
        raise UserError(f"--tokens {text}: the stop lies before the start; give start:stop:spacing")
    if spacing == 0:
        raise UserError(f"--tokens {text}: the spacing must be more than 0; leave it out for every checkpoint")
    return TokenGrid(start, stop, spacing)


def parse_amount(text: str, option: str) -> int:
    """ "10B", "2.5T", "3e9", "500_000" as a number of tokens."""
    match = re.fullmatch(r"(\d[\d_]*(?:\.\d+)?(?:e\+?\d{1,2})?)\s*([kmbt]?)", text.strip().lower())
    if not match:
        raise UserError(f"--tokens {option}: {text!r} is no amount of tokens; write it as 10B, 2.5T or 4194304")
    return round(Decimal(match[1].replace("_", "")) * _UNITS[match[2]])


def nearest(tokens: list[int], grid: TokenGrid) -> list[int]:
    """Indices into ascending `tokens`: for each point of the grid the nearest value, if it lies within half a spacing
    (of two equally near the earlier); without a spacing all values from start to stop."""
    if grid.spacing is None:
        stop = math.inf if grid.stop is None else grid.stop
        return [i for i, value in enumerate(tokens) if grid.start <= value <= stop]
    best: dict[int, tuple[int, int]] = {}
    last = None if grid.stop is None else (grid.stop - grid.start) // grid.spacing
    for i, value in enumerate(tokens):
        # The point is half up, the second candidate the point below: a value half-way may serve either.
        point = max(0, (2 * (value - grid.start) + grid.spacing) // (2 * grid.spacing))
        for candidate in {point, max(0, point - 1)}:
            if last is not None:
                candidate = min(candidate, last)
            distance = abs(value - grid.start - candidate * grid.spacing)
            if 2 * distance <= grid.spacing and (candidate not in best or distance < best[candidate][0]):
                best[candidate] = (distance, i)
    return sorted({i for _, i in best.values()})


def _on_grid(name: str, checkpoints: list[Checkpoint], text: str) -> list[Checkpoint]:
    grid = parse_grid(text)
    known = sorted((c for c in checkpoints if c.tokens is not None), key=lambda c: c.tokens or 0)
    if not known:
        raise UserError(f"{name}: --tokens {text}: no checkpoint says how many tokens it saw; use a glob or --every")
    if len(known) < len(checkpoints):
        _LOG.info("%s: left out %d checkpoints of unknown tokens", name, len(checkpoints) - len(known))
    values = [c.tokens for c in known if c.tokens is not None]
    chosen = [known[i] for i in nearest(values, grid)]
    if not chosen:
        raise UserError(
            f"{name}: --tokens {text}: no checkpoint is near; they have {values[0] / 1e9:.6g}B to"
            f" {values[-1] / 1e9:.6g}B tokens"
        )
    return chosen
