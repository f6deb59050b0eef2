"""A run as a function of its history: what is read when, and what a change, a branch and a kill leave of it."""

import dataclasses
import functools
import math
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from data_examples import numbered
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fineline_jax.checkpoints.runs.history import History, Segment, from_plain
from fineline_jax.data import loader
from fineline_jax.data import order as order_module
from fineline_jax.data.loader import Batches, open_batches
from fineline_jax.mesh import AXES
from fineline_jax.models.config import ModelConfig
from fineline_jax.recipe import Batch, Data, Optimizer, Recipe, Schedule, Source
from fineline_jax.training import run_folder
from fineline_jax.training.step import BATCH_SPEC

LENGTH = 4
LENGTHS = {
    "a": {"train": 23},
    "b": {"train": 40},
    "c": {"train": 7},
    "chunks": {"chunk_0": 9, "chunk_1": 4, "chunk_2": 12},
}


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Iterator[dict[str, str]]:
    """Four data sets, each opened once."""
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "global_array", held_rows)
        patch.setattr(loader, "open_data_set", functools.cache(loader.open_data_set))
        patch.setattr(order_module, "record", functools.cache(order_module.record))  # slow for so few windows
        yield {name: numbered(folder / name, splits, LENGTH, 1000) for name, splits in LENGTHS.items()}


def recipe_of(sources: dict[str, float], places: dict[str, str], order="shuffle", **given) -> Recipe:
    values = {
        "name": "history",
        "model": ModelConfig(vocab_size=1000, width=8, layers=1, heads=2, mlp_width=16, context=LENGTH),
        "data": Data(tuple(Source(places[name], weight) for name, weight in sources.items()), LENGTH, order),
        "batch": Batch(3),
        "optimizer": Optimizer(Schedule()),
        "tokens": 10**6,
    }
    return Recipe(**(values | given))


@dataclasses.dataclass(frozen=True)
class Change:
    """What a run goes on with."""

    steps: int
    """Updates until the next change."""
    sequences: int
    mixture: dict[str, float]
    seed: int


MIXTURES = st.dictionaries(st.sampled_from("abc"), st.sampled_from([0.3, 1.0, 1.5, 7.0]), min_size=1)
CHANGES = st.lists(
    st.builds(Change, st.integers(0, 12), st.integers(1, 11), MIXTURES, st.integers(0, 2)), min_size=1, max_size=5
)


def begun(history: History | None, step: int, recipe: Recipe, batches: Batches | None) -> History:
    """The history with a segment for `recipe` from `step` on, as `run_folder.going_on` makes it from a record."""
    sources = tuple(open_batches(recipe.data, sequences=1, vocab_size=1000, seed=0).lengths)
    if history is None or batches is None:
        return run_folder.beginning(None, recipe, sources)
    last = history.segments[-1]
    windows = {**last.windows, **batches.passed(step)}
    segment = Segment(step, last.clock.tokens_at(step), windows, recipe, sources, "accepted change")
    return from_plain([*history.plain(), dataclasses.asdict(segment)], "record")  # pyright: ignore[reportArgumentType]


@dataclasses.dataclass(frozen=True)
class Layout:
    """The devices that a run is trained on."""

    mesh: tuple[int, int, int] = (1, 1, 1)
    processes: int = 1
    """Each has as many of the devices, in their order."""


LAYOUTS = [
    Layout(mesh, processes)
    for mesh in ((1, 1, 1), (1, 2, 1), (2, 1, 1), (1, 1, 2), (2, 2, 1), (1, 4, 1), (2, 1, 2), (2, 2, 2), (1, 8, 1))
    for processes in (1, 2, 4)
    if processes <= math.prod(mesh)
]


class Held(NamedTuple):
    """In place of a sharding: that of a whole mesh, and which process's devices are asked for."""

    sharding: jax.NamedSharding
    layout: Layout
    process: int


def held_rows(shape: tuple[int, int], held: Held, shard: Callable) -> list[tuple[int, np.ndarray]]:
    """In place of `loader.global_array`: (first row, rows) of each device of the process."""
    each = math.prod(held.layout.mesh) // held.layout.processes
    indices = held.sharding.devices_indices_map(shape)
    return [
        (index[0].indices(shape[0])[0], shard(index))
        for device, index in indices.items()
        if device.id // each == held.process
    ]


def read(batches: Batches, step: int, layout: Layout) -> list[tuple[str, int, int]]:
    """The windows of a step, (data set, split, record), as `global_batch` gives them to the devices of each process;
    where several hold a row, they hold the same."""
    devices = np.array(jax.devices()[: math.prod(layout.mesh)]).reshape(layout.mesh)
    sharding = jax.NamedSharding(jax.sharding.Mesh(devices, AXES), BATCH_SPEC)
    sequences, shards = batches.sequences(step), layout.mesh[0] * layout.mesh[1]
    found: dict[int, tuple[int, int]] = {}

    def rows(step: int, wanted: range) -> np.ndarray:
        return np.array([(one.split, one.record) for one in batches.positions(step, wanted)]).reshape(-1, 2)

    given: Any = types.SimpleNamespace(sequences=batches.sequences, window_tokens=2, rows=rows)
    total = -(-sequences // shards) * shards
    for process in range(layout.processes):
        held: Any = Held(sharding, layout, process)
        parts: Any = loader.global_batch(given, step, held, total)
        for first, values in parts:
            for row, place in enumerate(values.tolist(), first):
                assert found.setdefault(row, tuple(place)) == tuple(place)
    assert sorted(found) == list(range(total)) and all(found[row] == (-1, -1) for row in range(sequences, total))
    in_order = [found[row] for row in range(sequences)]
    return [(batches.splits[split][0].path.name, batches.splits[split][1], record) for split, record in in_order]


def trained(
    changes: list[Change],
    places: dict[str, str],
    order: str,
    kills: frozenset[int] = frozenset(),
    layouts: Sequence[Layout] = (Layout(),),
) -> list[tuple[int, int, list[tuple[str, int, int]]]]:
    """(step, tokens, windows) of every update of a run that goes on with each change; killed before each step in
    `kills`, it goes on from what its history says alone, on the next of `layouts`."""
    history, batches, step, updates, deaths = None, None, 0, [], 0
    for change in changes:
        mixture = change.mixture if order == "shuffle" else {"chunks": 1.0}
        recipe = recipe_of(mixture, places, order, batch=Batch(change.sequences), seed=change.seed)
        history = begun(history, step, recipe, batches)
        number = len(history.segments) - 1
        batches = run_folder.batches_of(history, number, recipe)
        for _ in range(change.steps):
            if step in kills:
                deaths += 1
                history = from_plain(history.plain(), "record")  # pyright: ignore[reportArgumentType]
                batches = run_folder.batches_of(history, history.at(step), history.segments[history.at(step)].recipe)
            updates.append((step, history.tokens(step), read(batches, step, layouts[deaths % len(layouts)])))
            step += 1
            assert history.tokens(step) > updates[-1][1]
    return updates


Updates = list[tuple[int, int, list[tuple[str, int, int]]]]


def check(updates: Updates, changes: list[Change], order: str) -> None:
    windows = [window for _, _, batch in updates for window in batch]
    assert [len(batch) for _, _, batch in updates] == [c.sequences for c in changes for _ in range(c.steps)]
    behind = 0
    for step, tokens, batch in updates:
        assert tokens == behind, step
        behind += len(batch) * LENGTH
    if order == "shuffle":  # each epoch of a source holds every window once, and they follow each other
        for name, splits in LENGTHS.items():
            of_source, length = [record for source, _, record in windows if source == name], splits.get("train", 0)
            for start in range(0, len(of_source), length or 1):
                epoch = of_source[start : start + length]
                assert len(set(epoch)) == len(epoch)
        return
    # Chunk after chunk, none twice in a pass over them; what is left of one is less than the batch that went on.
    passes: list[list[tuple[str, int, int]]] = [[]]
    for _, _, batch in updates:
        [split] = {split for _, split, _ in batch}
        if passes[-1] and split < passes[-1][-1][1]:
            passes.append([])
        elif passes[-1] and split == passes[-1][-1][1] and set(batch) & set(passes[-1]):
            passes.append([])  # no other chunk holds a batch: the next pass begins in the same one
        passes[-1] += batch
    assert all(len(set(one)) == len(one) for one in passes)


RUNS = dict(
    changes=CHANGES,
    kills=st.frozensets(st.integers(0, 40), max_size=4),
    layouts=st.lists(st.sampled_from(LAYOUTS), min_size=1, max_size=5),
)
SEEDED_ANEW = [Change(10, 2, {"a": 1.0}, 0), Change(10, 3, {"a": 1.0}, 1)]
MIXED_ANEW = [
    Change(5, 3, {"a": 1.0, "b": 7.0}, 0), Change(0, 1, {"c": 1.0}, 1), Change(9, 5, {"b": 1.0, "a": 0.3}, 2),
]  # fmt: skip


@given(**RUNS)
@example(changes=SEEDED_ANEW, kills=frozenset({11}), layouts=[Layout((2, 2, 2), 4), Layout()])
@example(changes=MIXED_ANEW, kills=frozenset(), layouts=[Layout((1, 8, 1), 2)])
@settings(deadline=None, derandomize=True, max_examples=20)
def test_any_changes_and_kills_read_every_window_once_in_an_epoch_and_the_same_ones(changes, kills, layouts, places):
    for order in ("shuffle", "chunks"):
        updates = trained(changes, places, order)
        check(updates, changes, order)
        assert trained(changes, places, order, kills, layouts) == updates


@pytest.mark.slow
@given(**RUNS)
@settings(deadline=None, max_examples=500)
def test_500_histories_read_every_window_once_in_an_epoch_and_the_same_ones(changes, kills, layouts, places):
    for order in ("shuffle", "chunks"):
        updates = trained(changes, places, order)
        check(updates, changes, order)
        assert trained(changes, places, order, kills, layouts) == updates
