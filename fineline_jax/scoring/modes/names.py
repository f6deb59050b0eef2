"""The scoring modes by name. The prompts are lm-eval's in every mode; the mode is part of the hash of the pack.

Mode `a-b` is the value `MODE` of the module `a_b` beside this one, which says what the mode does and its source.
"""

import importlib
from typing import TYPE_CHECKING, Literal, get_args

from fineline_jax.errors import UserError

if TYPE_CHECKING:
    from fineline_jax.scoring.modes.mode import Mode

ModeName = Literal["lm-eval", "olmes", "opencompass-ppl"]
MODES: tuple[str, ...] = get_args(ModeName)
DEFAULT_MODE = MODES[0]


def check_mode(name: str, where: str) -> None:
    """Raise UserError, which begins with `where`, for a name that is no mode."""
    if name not in MODES:
        raise UserError(f"{where}: mode {name!r} must be one of {', '.join(MODES)}")


def find_mode(name: str, where: str = "pack") -> "Mode":
    """The mode called `name`. Raises UserError, which begins with `where`, if there is none."""
    check_mode(name, where)
    return importlib.import_module(f"{__package__}.{name.replace('-', '_')}").MODE
