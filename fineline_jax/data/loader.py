"""The batch of a step as a pure function of (recipe, seed, step).

Nothing about data is saved to resume: the batch is computed from the step. A process reads only the rows its
devices hold, so the batches are the same for any number of processes and any mesh.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from fineline_jax import recipe
from fineline_jax.data.order import Chunks, Mixed, Order, Position
from fineline_jax.data.storage import DataSet, open_data_set
from fineline_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Batches:
    """An endless series of batches of windows."""

    sequences: int
    """Windows per batch, over all processes."""
    window_tokens: int
    """Tokens per window: sequence_length + 1."""
    vocab_size: int
    """Ids of the model; every id read is checked against it."""
    order: Order
    splits: tuple[tuple[DataSet, str], ...]
    """What the order's split numbers mean: a data set and the name of its split (or of several: `a+b+c`)."""

    @property
    def steps(self) -> int:
        """Batches per epoch: whole batches before a window comes a second time."""
        return self.order.steps

    def rows(self, step: int, rows: range | slice = slice(None)) -> np.ndarray:
        """Rows of the batch of `step` (from 0), int32 [len(rows), window_tokens]; only they are read.

        Raises UserError naming data set, split and record where a token id is outside the vocabulary.
        """
        wanted = range(*rows.indices(self.sequences)) if isinstance(rows, slice) else rows
        return read_windows(self.splits, self.order.positions(step, wanted), self.window_tokens, self.vocab_size)


def read_windows(
    splits: Sequence[tuple[DataSet, str]], positions: Sequence[Position], window_tokens: int, vocab_size: int
) -> np.ndarray:
    """The windows at those positions, int32 [len(positions), window_tokens].

    Raises UserError naming data set, split and record where a token id is outside the vocabulary.
    """
    windows = np.empty((len(positions), window_tokens), np.int32)
    for number in {position.split for position in positions}:
        selected = [row for row, position in enumerate(positions) if position.split == number]
        data_set, split = splits[number]
        windows[selected] = data_set.read(split, [positions[row].record for row in selected])
    bad = np.flatnonzero((windows.min(axis=1, initial=0) < 0) | (windows.max(axis=1, initial=0) >= vocab_size))
    if len(bad):
        number, record = positions[bad[0]]
        data_set, split = splits[number]
        raise UserError(
            f"{data_set.path}: record {record} of split {split} has a token id outside the model's "
            f"vocabulary of {vocab_size}; prepare the data again with the model's tokenizer"
        )
    return windows


def open_batches(data: recipe.Data, *, sequences: int, vocab_size: int, seed: int) -> Batches:
    """The training batches of a recipe.

    A data set's training windows are its split `train`, or else all its splits chunk_<i>.

    Args:
      data: what is read, and in which order.
      sequences: windows per batch (`recipe.batch.sequences`).
      vocab_size: ids of the model.
      seed: seeds the order; not negative.

    Raises UserError where a data set is missing or does not fit the recipe.
    """
    if seed < 0:
        raise UserError(f"seed={seed} must not be negative")
    data_sets = open_sources(data, vocab_size)
    if data.order == "chunks":
        (data_set,) = data_sets
        chunks = _chunk_splits(data_set)
        if not chunks:
            raise UserError(
                f"{data_set.path}: data.order='chunks' needs splits chunk_000, chunk_001, ... and it has "
                f"{', '.join(data_set.splits)}; use order='shuffle' or `fineline data prepare amber`"
            )
        splits = tuple((data_set, chunk) for chunk in chunks)
        lengths = tuple(data_set.splits[chunk] for chunk in chunks)
        order: Order = Chunks(lengths, sequences, seed)
    else:
        splits = tuple((data_set, _training_split(data_set)) for data_set in data_sets)
        lengths = tuple(sum(data_set.splits[name] for name in split.split("+")) for data_set, split in splits)
        order = Mixed(lengths, tuple(source.weight for source in data.sources), sequences, seed)
    if data.order == "chunks" and order.steps == 0:
        raise UserError(
            f"{data_sets[0].path}: no chunk holds a batch of {sequences} windows (the largest has {max(lengths)}); "
            "lower batch.sequences"
        )
    return Batches(sequences, data.sequence_length + 1, vocab_size, order, splits)


def global_batch(batches: Batches, step: int, sharding: jax.sharding.Sharding) -> jax.Array:
    """The whole batch of `step` as one array over the mesh, int32 [sequences, window_tokens].

    Every process calls it; each reads only the rows that its own devices hold, once.
    """
    read: dict[tuple[int, int, int], np.ndarray] = {}

    def shard(index: tuple[slice, ...]) -> np.ndarray:
        rows = index[0].indices(batches.sequences)
        if rows not in read:
            read[rows] = batches.rows(step, range(*rows))
        return read[rows][:, index[1]]

    return global_array((batches.sequences, batches.window_tokens), sharding, shard)


def global_array(
    shape: tuple[int, ...],
    sharding: jax.sharding.Sharding,
    shard: Callable[[tuple[slice, ...]], np.ndarray | np.generic],
) -> jax.Array:
    """An array over the mesh from `shard(index)`, the values of each shard on this process's devices.

    As `jax.make_array_from_callback`, but by explicit transfers, which `jax.transfer_guard("disallow")` lets pass.
    """
    indices = sharding.addressable_devices_indices_map(shape)
    shards = jax.device_put([shard(index or ()) for index in indices.values()], list(indices))
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def open_sources(data: recipe.Data, vocab_size: int) -> list[DataSet]:
    """The data sets of the recipe's sources. Raises UserError where one is missing or does not fit the recipe."""
    return [
        open_fitting(Path(source.path), f"--data.sources.{position}.path", data, vocab_size)
        for position, source in enumerate(data.sources)
    ]


def open_fitting(path: Path, option: str, data: recipe.Data, vocab_size: int) -> DataSet:
    """A data set whose windows have the recipe's length and ids of its vocabulary; option: what named it.

    Raises UserError where it is missing or another.
    """
    data_set = open_data_set(path.expanduser(), option)
    stored = data_set.metadata["sequence_length"]
    if stored != data.sequence_length:
        raise UserError(
            f"{data_set.path}: prepared with sequence_length={stored}, data.sequence_length is {data.sequence_length}; "
            "change the recipe or prepare the data again"
        )
    if data_set.metadata["vocab_size"] > vocab_size:
        raise UserError(
            f"{data_set.path}: prepared for a vocabulary of {data_set.metadata['vocab_size']}, the model has "
            f"{vocab_size}; change model.vocab_size or prepare the data again"
        )
    return data_set


def _chunk_splits(data_set: DataSet) -> list[str]:
    numbers = {name: int(name[6:]) for name in data_set.splits if re.fullmatch(r"chunk_\d+", name)}
    return sorted(numbers, key=numbers.__getitem__)


def _training_split(data_set: DataSet) -> str:
    split = "train" if "train" in data_set.splits else "+".join(_chunk_splits(data_set))
    if not split:
        raise UserError(
            f"{data_set.path}: no split train or chunk_000, ... but {', '.join(data_set.splits)}; prepare it again"
        )
    return split
