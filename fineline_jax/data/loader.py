"""The batch of a step as a pure function of (history of the run, step).

No state of a reader is saved to resume: the batch is computed from the step and the windows passed before a change. A
process reads only the rows its devices hold, so the batches are the same for any number of processes and any mesh.
"""

import bisect
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import jax
import numpy as np

from fineline_jax import recipe
from fineline_jax.atomic_files import address_of, check_local
from fineline_jax.checkpoints.remote.staging import fetch_data
from fineline_jax.data.order import Chunks, Mixed, Order, Position, Seeds
from fineline_jax.data.storage import DataSet, open_data_set
from fineline_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Batches:
    """An endless series of batches of windows."""

    pieces: tuple[tuple[int, int, Order], ...]
    """(step, windows per batch over all processes, order), ascending: what batches are from that step on."""
    window_tokens: int
    """Tokens per window: sequence_length + 1."""
    vocab_size: int
    """Ids of the model; every id read is checked against it."""
    splits: tuple[tuple[DataSet, str], ...]
    """What the order's split numbers mean: a data set and the name of its split (or of several: `a+b+c`)."""
    lengths: Mapping[str, int]
    """Windows of an epoch of each source, by data_hash."""

    def sequences(self, step: int) -> int:
        """Windows of the batch of `step` (from 0)."""
        return self._piece(step)[1]

    def positions(self, step: int, rows: range | slice = slice(None)) -> list[Position]:
        """Where rows of the batch of `step` are stored."""
        first, sequences, order = self._piece(step)
        wanted = range(*rows.indices(sequences)) if isinstance(rows, slice) else rows
        return order.positions(step - first, sequences, wanted)

    def rows(self, step: int, rows: range | slice = slice(None)) -> np.ndarray:
        """Rows of the batch of `step`, int32 [len(rows), window_tokens]; only they are read.

        Raises UserError naming data set, split and record where a token id is outside the vocabulary.
        """
        return read_windows(self.splits, self.positions(step, rows), self.window_tokens, self.vocab_size)

    def passed(self, step: int) -> dict[str, int]:
        """Windows that each source has passed before the batch of `step`, by data_hash."""
        first, sequences, order = self._piece(step)
        return dict(zip(self.lengths, order.passed(step - first, sequences), strict=True))

    def _piece(self, step: int) -> tuple[int, int, Order]:
        return self.pieces[bisect.bisect_right(self.pieces, step, key=lambda piece: piece[0]) - 1]


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


def open_batches(
    data: recipe.Data,
    *,
    sequences: int | Sequence[tuple[int, int]],
    vocab_size: int,
    seed: int,
    passed: Mapping[str, int] = MappingProxyType({}),
    seeds: Mapping[str, Seeds] = MappingProxyType({}),
) -> Batches:
    """The training batches of a recipe.

    A data set's training windows are its split `train`, or else all its splits chunk_<i>.

    Args:
      data: what is read, and in which order.
      sequences: windows per batch (`recipe.batch.sequences`); or (step, windows per batch from there on), ascending.
      vocab_size: ids of the model.
      seed: seeds the order; not negative.
      passed: windows that sources have passed before the first of those steps, by data_hash; others begin at 0.
      seeds: the seeds that ordered them, each from how many windows on, by data_hash.

    Raises UserError where a data set is missing or does not fit the recipe.
    """
    if seed < 0:
        raise UserError(f"seed={seed} must not be negative")
    data_sets = open_sources(data, vocab_size)
    hashes = [data_set.data_hash for data_set in data_sets]
    for position, data_hash in enumerate(hashes):
        if data_hash in hashes[:position]:
            raise UserError(
                f"{data_sets[position].path}: the same data set as {data_sets[hashes.index(data_hash)].path}; name it"
                f" once in data.sources, with the weight of both"
            )
    keys = tuple(int(data_hash[:16], 16) for data_hash in hashes)
    start = tuple(passed.get(data_hash, 0) for data_hash in hashes)
    seeded = tuple(seeds.get(data_hash, ((0, seed),)) for data_hash in hashes)
    changes = ((0, sequences),) if isinstance(sequences, int) else tuple(sequences)
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
        if (most := max(number for _, number in changes)) > max(lengths):
            raise UserError(
                f"{data_set.path}: no chunk holds a batch of {most} windows (the largest has {max(lengths)}); "
                "lower batch.sequences"
            )
        epochs = [sum(lengths)]
        make = lambda start: Chunks(lengths, keys[0], seeded[0], start[0])
    else:
        splits = tuple((data_set, _training_split(data_set)) for data_set in data_sets)
        lengths = tuple(sum(data_set.splits[name] for name in split.split("+")) for data_set, split in splits)
        weights, epochs = tuple(source.weight for source in data.sources), lengths
        make = lambda start: Mixed(lengths, weights, keys, seeded, start)
    pieces: list[tuple[int, int, Order]] = []
    for step, number in changes:
        if pieces:
            first, before, order = pieces[-1]
            start = order.passed(step - first, before)
        pieces.append((step, number, make(start)))
    epoch_of = dict(zip(hashes, epochs, strict=True))
    return Batches(tuple(pieces), data.sequence_length + 1, vocab_size, splits, epoch_of)


def global_batch(batches: Batches, step: int, sharding: jax.sharding.Sharding, rows: int | None = None) -> jax.Array:
    """The whole batch of `step` as one array over the mesh, int32 [rows, window_tokens]; behind its windows, where
    there are fewer than rows (default: none), -1.

    Every process calls it; each reads only the rows that its own devices hold, once.
    """
    read: dict[tuple[int, int, int], np.ndarray] = {}
    sequences = batches.sequences(step)
    total = rows or sequences

    def shard(index: tuple[slice, ...]) -> np.ndarray:
        held = index[0].indices(total)
        if held not in read:
            stored = range(*held)[: max(0, sequences - held[0])]
            filler = len(range(*held)) - len(stored)
            read[held] = np.pad(batches.rows(step, stored), ((0, filler), (0, 0)), constant_values=-1)
        return read[held][:, index[1]]

    return global_array((total, batches.window_tokens), sharding, shard)


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


def check_local_sources(data: recipe.Data, vocab_size: int) -> None:
    """Raise UserError as `open_sources`, but fetch nothing: data of which a part lies in a bucket are not looked at."""
    if not any(address_of(source.path) for source in data.sources):
        open_sources(data, vocab_size)


def open_fitting(path: Path, option: str, data: recipe.Data, vocab_size: int) -> DataSet:
    """A data set whose windows have the recipe's length, ids of its vocabulary and its end of documents; option: what
    named it.

    Raises UserError where it is missing or another.
    """
    check_local(path, option, or_bucket=True)
    data_set = open_data_set(fetch_data(path), option)
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
    end, eos_id = data.mask_documents_at, data_set.metadata.get("eos_id")
    if end is not None and not data_set.metadata.get("eos"):
        raise UserError(
            f"{data_set.path}: its documents have no token at their end; prepare it with --eos, or leave out "
            "data.mask_documents_at"
        )
    if end is not None and eos_id not in (None, end):  # None: token lines without a tokenizer
        raise UserError(
            f"{data_set.path}: its documents end with id {eos_id}, data.mask_documents_at is {end}; use {eos_id}"
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
