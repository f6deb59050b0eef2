"""A series of checkpoints as values: what it is called, in which order it was trained, where each checkpoint lies.

Nothing is read here: `open.open_series` finds a series, `load.load` reads a checkpoint of it.
"""

import dataclasses
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from fineline_jax.errors import UserError
from fineline_jax.tokenizers.open import Bos

Options = tuple[tuple[str, Any], ...]
"""Of an fsspec file system: (key, value) pairs."""


@dataclasses.dataclass(frozen=True)
class Scoring:
    """How the checkpoints of a series are to be scored."""

    bos: Bos = "auto"
    """Used where --bos is not given: auto, always, never."""
    notes: tuple[str, ...] = ()
    """What a reader of the numbers must know."""


DEFAULT_SCORING = Scoring()


@dataclasses.dataclass(frozen=True)
class Remote:
    """Where a checkpoint comes from, and what becomes of its download."""

    url: str
    downloads: Path
    keep: bool = True
    """False: `discard` removes the download."""
    options: Options = ()
    """Of the fsspec file system."""
    tokenizer: str = ""
    """Address of the tokenizer's folder or file; "": beside the weights."""

    @property
    def folder(self) -> Path:
        """Where it is fetched to."""
        readable = re.sub(r"[^\w@.+-]+", "--", self.url.replace("://", "--"))[-120:]
        return self.downloads / f"{readable}-{hashlib.sha256(self.url.encode()).hexdigest()[:8]}"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """One set of weights of a series."""

    series: str
    name: str
    """Unique in the series; fit for a file name."""
    step: int | None
    """Optimizer steps taken; None: not known."""
    tokens: int | None
    """Tokens trained on; None: not known."""
    location: Path
    """RUN/checkpoints/<step>, or the folder with config.json; where `remote` is fetched to."""
    kind: Literal["orbax", "hf"]
    remote: Remote | None = None
    """Where it has to be fetched from before it can be read; None: it is here."""
    damage: str = ""
    """What is wrong with its record: nothing of it can be read. "": as far as is known, nothing."""


@dataclasses.dataclass(frozen=True)
class Series:
    """Checkpoints of one model, in the order of training."""

    name: str
    checkpoints: tuple[Checkpoint, ...]
    scoring: Scoring = DEFAULT_SCORING
    location: str = ""
    """The run, the folder or the address of all of them, {name} for a checkpoint's name; it distinguishes series of
    one name. "": not known."""


def scoring_policy(series: Sequence[Series]) -> Bos:
    """How BOS is put for all of them, as their registry entries say.

    Raises UserError if they disagree: they would need two packs.
    """
    wanted: dict[Bos, str] = {one.scoring.bos: one.name for one in series}
    if len(wanted) > 1:
        policies = ", ".join(f"{name} {bos}" for bos, name in wanted.items())
        raise UserError(f"--bos: the series want different ones ({policies}); give --bos, or score them one by one")
    return next(iter(wanted))
