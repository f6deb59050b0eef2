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
from fineline_jax.data.order import Chunks, Mixed, Order
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
        positions = self.order.positions(step, wanted)
        windows = np.empty((len(wanted), self.window_tokens), np.int32)
        for number in {position.split for position in positions}:
            selected = [row for row, position in enumerate(positions) if position.split == number]
            data_set, split = self.splits[number]
            windows[selected] = data_set.read(split, [positions[row].record for row in selected])
        bad = np.flatnonzero((windows.min(axis=1, initial=0) < 0) | (windows.max(axis=1, initial=0) >= self.vocab_size))
        if len(bad):
            number, record = positions[bad[0]]
            data_set, split = self.splits[number]
            raise UserError(
                f"{data_set.path}: record {record} of split {split} has a token id outside the model's "
                f"vocabulary of {self.vocab_size}; prepare the data again with the model's tokenizer"
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
    data_sets = _open_sources(data.sources, data.sequence_length, vocab_size)
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


def open_validation_batches(
    data: recipe.Data, *, windows: int, sequences: int, vocab_size: int
) -> tuple[Batches, int] | None:
    """The fixed batches of the validation loss, and how many of them to use.

    They hold the first windows of the split `data.validation_split` in stored order, of all sources that have it,
    by weight. The number of batches is `windows / sequences`, rounded down but at least one, or as many as there are
    without repeating a window.

    Args:
      windows: how many windows to use (`recipe.logging.validation_sequences`); 0: none.
      sequences: windows per batch.

    Returns None where `windows` is 0 or no source has the split. Raises UserError where the split has less than
    one batch.
    """
    if windows == 0:
        return None
    data_sets = _open_sources(data.sources, data.sequence_length, vocab_size)
    held = [
        (data_set, source.weight)
        for data_set, source in zip(data_sets, data.sources, strict=True)
        if data.validation_split in data_set.splits
    ]
    if not held:
        return None
    lengths = tuple(data_set.splits[data.validation_split] for data_set, _ in held)
    order = Mixed(lengths, tuple(weight for _, weight in held), sequences, seed=None)
    if order.steps == 0:
        raise UserError(
            f"{held[0][0].path}: split {data.validation_split} has too few windows ({min(lengths)}) for one batch of "
            f"{sequences}; prepare more validation text or set logging.validation_sequences=0"
        )
    splits = tuple((data_set, data.validation_split) for data_set, _ in held)
    batches = Batches(sequences, data.sequence_length + 1, vocab_size, order, splits)
    return batches, min(max(1, windows // sequences), order.steps)


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


def _open_sources(sources: Sequence[recipe.Source], sequence_length: int, vocab_size: int) -> list[DataSet]:
    data_sets = [
        open_data_set(Path(source.path).expanduser(), f"--data.sources.{position}.path")
        for position, source in enumerate(sources)
    ]
    for data_set in data_sets:
        stored = data_set.metadata["sequence_length"]
        if stored != sequence_length:
            raise UserError(
                f"{data_set.path}: prepared with sequence_length={stored}, data.sequence_length is {sequence_length}; "
                "change the recipe or prepare the data again"
            )
        if data_set.metadata["vocab_size"] > vocab_size:
            raise UserError(
                f"{data_set.path}: prepared for a vocabulary of {data_set.metadata['vocab_size']}, the model has "
                f"{vocab_size}; change model.vocab_size or prepare the data again"
            )
    return data_sets


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
