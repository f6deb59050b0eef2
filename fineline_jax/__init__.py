"""How the abilities of a language model grow while it is pretrained.

The Python interface; nothing is loaded before it is used (PEP 562).
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fineline_jax.interface import ablate, analyze, export, open_series, prepare_pack, pretrain, score
    from fineline_jax.models.config import ModelConfig
    from fineline_jax.recipe import Recipe

__version__ = "0.1.0"
__all__ = ["ModelConfig", "Recipe", "ablate", "analyze", "export", "open_series", "prepare_pack", "pretrain", "score"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    homes = {"ModelConfig": "models.config", "Recipe": "recipe"}
    return getattr(importlib.import_module(f"{__name__}.{homes.get(name, 'interface')}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
