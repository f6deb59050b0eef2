"""Families: series that differ in the size of the model alone, or in the seed."""

import re
from collections.abc import Iterator

import numpy as np
import pandas as pd

from fineline_jax.trajectories.statistics.columns import parameters_of, shots_of

_APART = re.compile(
    r"(?<![\d.])\d+(?:\.\d+)?[mb](?![a-z])|[-_. ]?(?:seed|rerun)[-_= ]?\d*|[-_](?:bf16|fp16|fp32)\b", re.I
)
"""What names of one family may differ in."""


def families(table: pd.DataFrame) -> Iterator[tuple[str, dict[float, list[str]]]]:
    """(name, parameters -> series, ascending) of each family with two sizes or more.

    Sizes are those of the column `parameters`, else those that names state (m-160m, m-1.4b); the name of a family is
    theirs with * for the size. Series whose names state none are one family per number of shots.
    """
    found: dict[str, dict[float, list[str]]] = {}
    for name, size in parameters_of(table).items():
        family = _APART.sub(lambda part: "*" if part[0][0].isdigit() else "", name)
        if np.isfinite(size):
            key = family if "*" in family else f"runs {shots_of(name)}".strip()
            found.setdefault(key, {}).setdefault(size, []).append(name)
    yield from ((name, dict(sorted(of.items()))) for name, of in found.items() if len(of) > 1)
