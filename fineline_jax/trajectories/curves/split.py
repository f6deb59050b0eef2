"""The curves of a table one after another, with one sort of the whole instead of one per curve."""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from fineline_jax.trajectories.curves.smooth import checkpoint_noise

CURVE = ("series", "metric", "task")


class Points(NamedTuple):
    """One curve, ascending in tokens; of several checkpoints at one token count the last."""

    tokens: np.ndarray
    value: np.ndarray
    stderr: np.ndarray
    """NaN where not given."""
    chance: float
    """That of its last checkpoint; NaN where it has none."""
    row: int
    """Position of its last checkpoint in the table."""

    def errors(self) -> np.ndarray:
        """stderr, and where it is not given the scatter from checkpoint to checkpoint."""
        known = np.isfinite(self.stderr)
        return self.stderr if known.all() else np.where(known, self.stderr, checkpoint_noise(self.value, self.tokens))


def split(table: pd.DataFrame, by: Sequence[str]) -> Iterator[tuple[tuple[str, ...], Points]]:
    """(key, curve) for each value of the columns `by`, in the order of first appearance."""
    group = table.groupby(list(by), sort=False, observed=True).ngroup().to_numpy()
    tokens = table["tokens"].to_numpy(float)
    order = np.lexsort((np.arange(len(table)), tokens, group))
    group, tokens = group[order], tokens[order]
    kept = np.diff(group, append=-1) != 0
    kept[:-1] |= np.diff(tokens) != 0
    order, group, tokens = order[kept], group[kept], tokens[kept]
    none = np.full(len(table), np.nan)
    value, stderr, chance = (
        (table[name].to_numpy(float) if name in table else none)[order] for name in ("value", "stderr", "chance")
    )
    bounds = np.flatnonzero(np.diff(group, prepend=-1, append=-1))
    rows = order[bounds[1:] - 1]
    keys = zip(*(table[name].iloc[rows].astype(str) for name in by), strict=True)
    for key, row, (start, end) in zip(keys, rows.tolist(), itertools.pairwise(bounds), strict=True):
        inside = slice(start, end)
        yield key, Points(tokens[inside], value[inside], stderr[inside], float(chance[end - 1]), row)
