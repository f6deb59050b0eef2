"""The windows of the validation losses: fixed by the data sets and the recipe's `logging.validation`, whatever the
batch and the mesh."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from fineline_jax import recipe
from fineline_jax.data.loader import global_array, open_fitting, open_sources, read_windows
from fineline_jax.data.order import Position, in_stored_order
from fineline_jax.data.storage import DataSet
from fineline_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class ValidationWindows:
    """The windows of one validation set, in their order."""

    name: str
    window_tokens: int
    """Tokens per window: sequence_length + 1."""
    vocab_size: int
    splits: tuple[tuple[DataSet, str], ...]
    positions: tuple[Position, ...]
    """Where each window is stored: a number of `splits`, and a record there."""

    def batches(self, sequences: int, sharding: jax.NamedSharding) -> Iterator[tuple[jax.Array, jax.Array]]:
        """All windows, int32 [sequences, window_tokens], and the weight of each row, float32 [sequences]: 1.0, and 0.0
        for the rows that fill up the last batch.

        sharding: of the windows. Every process calls it; each reads only the rows that its own devices hold.
        """
        rows_only = jax.NamedSharding(sharding.mesh, jax.P(sharding.spec[0]))
        for start in range(0, len(self.positions), sequences):

            def windows(index: tuple[slice, ...], start: int = start) -> np.ndarray:
                first, stop, _ = index[0].indices(sequences)
                positions = self.positions[start + first : start + stop]
                read = read_windows(self.splits, positions, self.window_tokens, self.vocab_size)
                return np.pad(read, ((0, stop - first - len(read)), (0, 0)))[:, index[1]]

            def weights(index: tuple[slice, ...], start: int = start) -> np.ndarray:
                return (np.arange(start, start + sequences)[index[0]] < len(self.positions)).astype(np.float32)

            yield (
                global_array((sequences, self.window_tokens), sharding, windows),
                global_array((sequences,), rows_only, weights),
            )


def open_validation(data: recipe.Data, sets: tuple[recipe.Validation, ...], vocab_size: int) -> list[ValidationWindows]:
    """The windows of the validation sets: the first of the split in stored order; of a set without a path, those of
    all sources that have the split, by weight.

    They are as many as the set asks for, or as there are without repeating one. A set without a path is left out
    where no source has its split, and any set that asks for none. Raises UserError where a data set is missing or does
    not fit the recipe.
    """
    opened = []
    for position, wanted in enumerate(sets):
        if wanted.windows == 0:
            continue
        if wanted.path is None:
            sources = zip(open_sources(data, vocab_size), (source.weight for source in data.sources), strict=True)
            held = [(data_set, weight) for data_set, weight in sources if data_set.splits.get(wanted.split)]
            if not held:
                continue
        else:
            option = f"--logging.validation.{position}"
            data_set = open_fitting(Path(wanted.path), f"{option}.path", data, vocab_size)
            if not data_set.splits.get(wanted.split):
                raise UserError(
                    f"{data_set.path}: no windows in a split {wanted.split}, only in {', '.join(data_set.splits)};"
                    f" correct {option}.split"
                )
            held = [(data_set, 1.0)]
        splits = tuple((data_set, wanted.split) for data_set, _ in held)
        lengths = tuple(data_set.splits[split] for data_set, split in splits)
        positions = in_stored_order(lengths, tuple(weight for _, weight in held), wanted.windows)
        opened.append(ValidationWindows(wanted.name, data.sequence_length + 1, vocab_size, splits, tuple(positions)))
    return opened
