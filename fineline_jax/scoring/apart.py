"""Scores of different series stay apart, though both be called the same: a folder of scores has one folder per name."""

from collections.abc import Sequence
from pathlib import Path

from fineline_jax.checkpoints.load import weights_hash
from fineline_jax.checkpoints.series import Series
from fineline_jax.errors import UserError
from fineline_jax.scoring import scores
from fineline_jax.scoring.pack import Pack


def require_names_apart(series: Sequence[Series]) -> None:
    """Raise UserError if the scores of two of these series would lie in one folder."""
    places: dict[tuple[str, str], str] = {}
    for one in series:
        _check_names(one)
        for checkpoint in one.checkpoints:
            here = checkpoint.remote.url if checkpoint.remote is not None else str(checkpoint.location)
            first = places.setdefault((one.name, checkpoint.name), here)
            if first != here:
                raise UserError(
                    f"{first} and {here} are both called {one.name}/{checkpoint.name}, and their scores would be one"
                    " file; rename a folder, or score them with an --out each"
                )
    located: dict[str, str] = {}
    for one in series:
        first = located.setdefault(one.name, one.location)
        if first and one.location and first != one.location:
            raise UserError(
                f"{first} and {one.location} are both called {one.name}, and their scores would be one series;"
                " rename a folder, or score them with an --out each"
            )


def _check_names(series: Series) -> None:
    """Raise UserError if no scores are looked for under its name or one of its checkpoints'."""
    wrong = [checkpoint.name for checkpoint in series.checkpoints if checkpoint.name.startswith(".")]
    if series.name in ("", ".", "..", "pack"):
        wrong = [series.name]
    if wrong:
        place = series.location or series.name
        raise UserError(f"{place}: no scores can be kept under the name {wrong[0]!r}; rename it")


def check_out(series: Sequence[Series], pack: Pack, out: Path) -> None:
    """Raise UserError if `out` holds scores of another pack, or of another series of the same name."""
    scores.check_pack(out, pack)
    for one in series:
        headers = scores.headers_of(out, one.name)
        places = {header.location for header in headers} - {""}
        if places and one.location and one.location not in places and not _has_moved(one, headers):
            raise UserError(
                f"{out / one.name}: holds the scores of {min(places)}, and {one.location} is another series of that"
                " name; rename its folder, or choose another --out"
            )


def _has_moved(series: Series, headers: Sequence[scores.Header]) -> bool:
    """Whether the weights of one of its checkpoints are those that were scored elsewhere under its name."""
    scored = {header.checkpoint: header.key.weights for header in headers}
    known = (checkpoint for checkpoint in series.checkpoints if checkpoint.name in scored)
    for checkpoint in known:
        try:
            return weights_hash(checkpoint) == scored[checkpoint.name]
        except (UserError, OSError):
            continue  # damaged: the next one may tell
    return False
