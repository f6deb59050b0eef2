"""A model that is played: what the loop asks of it is recorded."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from fineline_jax.models.config import ModelConfig
from fineline_jax.scoring.requests.pack import Pack, RequestTokens


@dataclasses.dataclass
class Model:
    """What was scored, with what."""

    asked: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    bars: list[list[Any]] = dataclasses.field(default_factory=list)
    """[name, total, unit, done, notes] of each progress bar; done grows"""
    wrong: int = 0
    """How many log-likelihoods are no numbers"""

    made: int = 0
    """How many scorers were made"""

    def make_scorer(
        self, requests: RequestTokens, config: ModelConfig, mesh: Any, dtype: str = "float32", **options: Any
    ):
        self.made += 1

        def score(params: dict, advance: Callable[[int], None] = lambda requests: None):
            count = len(requests)
            told = {"dtype": dtype, "stored": str(params["embed"].dtype), "mesh": mesh, "config": config}
            self.asked.append(told | options)
            for _ in range(count):
                advance(1)
            found = -np.arange(1, count + 1) * abs(float(np.asarray(params["embed"], np.float32)[0, 0])) / 3
            found[: self.wrong] = np.resize([np.nan, -np.inf], self.wrong)
            return found, np.arange(count) % 3 == 0

        return score

    def score(self, made: Pack, config: ModelConfig, params: dict) -> Any:
        return self.make_scorer(made.request_tokens, config, None)(params)

    def bar(self, name: str, total: int, unit: str, done: int = 0) -> Any:
        entry = [name, total, unit, done, []]
        self.bars.append(entry)

        def advance(amount: int, note: str = "") -> None:
            entry[3] += amount
            entry[4] += [note] if note and note not in entry[4] else []

        return contextlib.nullcontext(advance)
