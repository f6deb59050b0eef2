"""Batches: a pure function of (history, step), the same for every cut into processes."""

import collections
import contextlib
import dataclasses
import json
import shutil
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from data_examples import numbered

from fineline_jax.data import prefetch as prefetching
from fineline_jax.data.loader import Batches, global_batch, open_batches
from fineline_jax.data.prefetch import prefetch
from fineline_jax.data.storage import WindowWriter, write_metadata
from fineline_jax.errors import UserError
from fineline_jax.recipe import Data, Source

LENGTH = 7
VOCABULARY = 1000


def write(folder: Path, splits: dict[str, int], base: int = 0, vocab_size: int = VOCABULARY) -> str:
    return numbered(folder, splits, LENGTH, vocab_size, base)


def names(batches: Batches, step: int) -> list[int]:
    return batches.rows(step)[:, 0].tolist()


def test_rows_are_the_same_for_1_2_and_4_processes_and_whenever_asked(tmp_path: Path) -> None:
    data = Data((Source(write(tmp_path / "a", {"train": 50})),), LENGTH)
    batches = open_batches(data, sequences=8, vocab_size=VOCABULARY, seed=3)
    whole = [batches.rows(step) for step in range(10)]
    assert whole[0].dtype == np.int32 and whole[0].shape == (8, LENGTH + 1)
    np.testing.assert_array_equal(whole[0][:, 1:], np.tile(np.arange(LENGTH), (8, 1)))
    fresh = open_batches(data, sequences=8, vocab_size=VOCABULARY, seed=3)
    for step in (9, 0, 5):
        for processes in (1, 2, 4):
            size = 8 // processes
            pieces = [fresh.rows(step, range(p * size, (p + 1) * size)) for p in range(processes)]
            np.testing.assert_array_equal(np.concatenate(pieces), whole[step])
        np.testing.assert_array_equal(fresh.rows(step, slice(1, 8, 3)), whole[step][1:8:3])
    other = open_batches(data, sequences=8, vocab_size=VOCABULARY, seed=4)
    assert names(other, 0) != names(fresh, 0)


def test_only_the_rows_asked_for_are_read(tmp_path: Path) -> None:
    data = Data((Source(write(tmp_path / "a", {"train": 50})),), LENGTH)
    batches = open_batches(data, sequences=16, vocab_size=VOCABULARY, seed=0)
    (data_set, split), asked = batches.splits[0], []

    class Recorder:
        def __getitems__(self, records: list[int]) -> list[dict]:
            asked.extend(records)
            return data_set.source(split).__getitems__(records)

    recorded = dataclasses.replace(data_set, source=lambda name: Recorder())
    selected = dataclasses.replace(batches, splits=((recorded, split),)).rows(2, range(4, 7))
    assert asked == selected[:, 0].tolist() == names(batches, 2)[4:7]


def test_an_epoch_reads_every_window_once_then_anew(tmp_path: Path) -> None:
    data = Data((Source(write(tmp_path / "a", {"train": 40, "validation": 3})),), LENGTH)
    batches = open_batches(data, sequences=8, vocab_size=VOCABULARY, seed=0)
    assert batches.passed(5) == batches.lengths and set(batches.lengths.values()) == {40}
    epochs = [[name for step in range(5 * e, 5 * e + 5) for name in names(batches, step)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(40))
    assert epochs[0] != epochs[1]


def test_a_mixture_draws_from_both_sources_by_weight(tmp_path: Path) -> None:
    small = write(tmp_path / "a", {"train": 20})
    large = write(tmp_path / "b", {"train": 80}, base=500)
    data = Data((Source(small, 1.0), Source(large, 3.0)), LENGTH)
    batches = open_batches(data, sequences=8, vocab_size=VOCABULARY, seed=0)
    for step in range(12):
        assert sum(name < 500 for name in names(batches, step)) == 2
    drawn = [name for step in range(10) for name in names(batches, step)]
    assert sorted(name for name in drawn if name < 500) == list(range(20))
    assert len(set(drawn)) == 80


def test_chunks_are_read_in_order_and_their_tails_dropped(tmp_path: Path) -> None:
    # Ten and more chunks, so that chunk_10 must not come before chunk_2.
    data = Data((Source(write(tmp_path / "a", {f"chunk_{c}": 10 for c in range(12)}, vocab_size=2000)),), LENGTH)
    data = dataclasses.replace(data, order="chunks")
    batches = open_batches(data, sequences=4, vocab_size=2000, seed=0)
    assert set(batches.passed(24).values()) == {12 * 10 - 2}, "the last tail is passed with the batch behind it"
    for step in range(24):
        assert {name // 100 for name in names(batches, step)} == {step // 2}
    assert len({name for step in range(24) for name in names(batches, step)}) == 96


def test_shuffle_order_takes_the_windows_of_all_chunks(tmp_path: Path) -> None:
    data = Data((Source(write(tmp_path / "a", {"chunk_000": 9, "chunk_001": 11, "validation": 5})),), LENGTH)
    batches = open_batches(data, sequences=4, vocab_size=VOCABULARY, seed=0)
    drawn = [name for step in range(5) for name in names(batches, step)]
    assert sorted(drawn) == [*range(9), *range(100, 111)]


def test_a_split_of_exactly_one_batch_is_enough(tmp_path: Path) -> None:
    chunks = Data((Source(write(tmp_path / "b", {"chunk_000": 4, "chunk_001": 5})),), LENGTH, "chunks")
    batches = open_batches(chunks, sequences=5, vocab_size=VOCABULARY, seed=0)
    assert [sorted(names(batches, step)) for step in range(2)] == [list(range(100, 105))] * 2


def test_the_end_of_documents_is_that_of_every_data_set(tmp_path: Path) -> None:
    ending = {"eos": True, "eos_id": 2}
    others = {"c": {"eos": True, "eos_id": 3}, "d": {"eos": False}}
    for name, metadata in {"a": ending, "b": {"eos": True, "eos_id": None, "other": 1}, **others}.items():
        write(tmp_path / name, {"train": 8})
        write_metadata(tmp_path / name, {"sequence_length": LENGTH, "vocab_size": VOCABULARY, **metadata})
    data = lambda *names: Data(tuple(Source(str(tmp_path / name)) for name in names), LENGTH, mask_documents_at=2)
    open_batches(data("a", "b"), sequences=4, vocab_size=VOCABULARY, seed=0)
    for name, message in (("c", "end with id 3, .* is 2; use 3"), ("d", "have no token at their end; prepare")):
        with pytest.raises(UserError, match=f"{name}: its documents .*{message}"):
            open_batches(data("a", name), sequences=4, vocab_size=VOCABULARY, seed=0)


def test_the_training_windows_are_those_of_train_or_else_of_all_chunks(tmp_path: Path) -> None:
    both = Data((Source(write(tmp_path / "a", {"chunk_000": 5, "train": 6, "chunk_1x": 2})),), LENGTH)
    batches = open_batches(both, sequences=6, vocab_size=VOCABULARY, seed=0)
    assert sorted(names(batches, 0)) == list(range(100, 106))
    chunks = open_batches(dataclasses.replace(both, order="chunks"), sequences=5, vocab_size=VOCABULARY, seed=0)
    assert sorted(names(chunks, 0)) == sorted(names(chunks, 1)) == list(range(5))
    only = Data((Source(write(tmp_path / "b", {"chunk_010": 3, "chunk_9": 4, "chunk_1x": 2})),), LENGTH)
    assert open_batches(only, sequences=7, vocab_size=VOCABULARY, seed=0).splits[0][1] == "chunk_9+chunk_010"


def test_a_source_may_lie_under_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a", {"train": 9})
    monkeypatch.setenv("HOME", str(tmp_path))
    batches = open_batches(Data((Source("~/a"),), LENGTH), sequences=2, vocab_size=VOCABULARY, seed=0)
    assert batches.splits[0][0].path == tmp_path / "a"
    assert (batches.sequences(7), batches.window_tokens, batches.vocab_size) == (2, LENGTH + 1, VOCABULARY)


def test_what_does_not_fit_the_recipe_is_refused_by_name(tmp_path: Path) -> None:
    text = write(tmp_path / "text", {"train": 9})

    def refused(message: str, data: Data, sequences: int = 2, vocab_size: int = VOCABULARY, seed: int = 0) -> None:
        with pytest.raises(UserError, match=message):
            open_batches(data, sequences=sequences, vocab_size=vocab_size, seed=seed)

    refused("nowhere: no such data set.* --data.sources.1.path$", Data((Source(text), Source("nowhere")), LENGTH))
    (tmp_path / "empty").mkdir()
    refused("empty: not a prepared data set", Data((Source(str(tmp_path / "empty")),), LENGTH))
    refused("text: prepared with sequence_length=7, data.sequence_length is 8", Data((Source(text),), 8))
    refused("text: prepared with sequence_length=7, data.sequence_length is 6", Data((Source(text),), 6))
    refused(
        "text: prepared for a vocabulary of 1000, the model has 999",
        Data((Source(text),), LENGTH),
        vocab_size=999,
    )
    refused("text: data.order='chunks' needs splits chunk_000", Data((Source(text),), LENGTH, "chunks"))
    refused("seed=-1 must not be negative", Data((Source(text),), LENGTH), seed=-1)
    shutil.copytree(text, tmp_path / "copy")
    again = Data((Source(text), Source(str(tmp_path / "copy"))), LENGTH)
    refused("copy: the same data set as .*text; name it once", again)
    held = write(tmp_path / "held", {"validation": 9})
    refused("held: no split train or chunk_000, ... but validation", Data((Source(held),), LENGTH))
    chunks = write(tmp_path / "chunks", {"chunk_000": 3, "chunk_001": 4})
    refused("chunks: no chunk holds a batch of 5 windows", Data((Source(chunks),), LENGTH, "chunks"), sequences=5)


@pytest.mark.parametrize(("ids", "bad"), [([0, 7], None), ([3, 8], 2), ([8, 0], 2), ([-1, 3], 2)])
def test_a_record_with_a_token_outside_the_vocabulary_is_named(tmp_path: Path, ids: list[int], bad: int | None) -> None:
    writer = WindowWriter(tmp_path / "a", ["train"], window_tokens=2, vocab_size=1 << 17)
    writer.add("train", np.array([[1, 2], [3, 4], ids]))
    writer.close()
    write_metadata(tmp_path / "a", {"sequence_length": 1, "vocab_size": 8})  # it may claim less than it holds
    batches = open_batches(
        Data((Source(str(tmp_path / "a")),), 1), sequences=3, vocab_size=8, seed=4
    )  # records 1, 2, 0
    if bad is None:
        assert sorted(batches.rows(0).tolist()) == [[0, 7], [1, 2], [3, 4]]
        return
    with pytest.raises(
        UserError, match=rf"a: record {bad} of split train has a token id outside the model's vocabulary of 8"
    ):
        batches.rows(0)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_535, "uint16"), (65_536, "uint16"), (65_537, "int32")])
def test_ids_are_stored_whole_up_to_the_largest_that_there_can_be(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    folder, window = tmp_path / "a", [vocab_size - 1, 0, 65_534]
    writer = WindowWriter(folder, ["train"], window_tokens=3, vocab_size=vocab_size)
    writer.add("train", np.array([window]))
    writer.close()
    write_metadata(folder, {"sequence_length": 2, "vocab_size": vocab_size})
    assert tfds.builder_from_directory(folder).info.features["tokens"].np_dtype == np.dtype(dtype)  # pyright: ignore
    batches = open_batches(Data((Source(str(folder)),), 2), sequences=1, vocab_size=vocab_size, seed=0)
    assert batches.rows(0).tolist() == [window]
    assert batches.rows(0).dtype == np.int32


MESHES = """
import json, sys
import jax
import numpy as np
from fineline_jax.data.loader import global_batch, open_batches
from fineline_jax.recipe import Data, Source
jax.config.update("jax_platforms", "cpu")
batches = open_batches(Data((Source(sys.argv[1]),), 7), sequences=8, vocab_size=1000, seed=3)
results = []
for shape in ((1, 8, 1), (2, 2, 2), (1, 1, 8)):
    mesh = jax.make_mesh(shape, ("replica", "fsdp", "tensor"))
    sharding = jax.NamedSharding(mesh, jax.P(("replica", "fsdp"), None))
    array = global_batch(batches, 5, sharding)
    assert array.sharding == sharding and array.dtype == np.int32
    results.append(np.asarray(array).tolist())
print(json.dumps(results))
"""


def test_the_global_batch_is_the_same_on_every_mesh_and_nothing_is_logged(tmp_path: Path) -> None:
    path = write(tmp_path / "a", {"train": 50})
    batches = open_batches(Data((Source(path),), LENGTH), sequences=8, vocab_size=VOCABULARY, seed=3)
    run = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning", "-c", MESHES, path],
        env={
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
            "PYTHONPATH": str(Path(__file__).parents[2]),
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stderr == ""
    assert json.loads(run.stdout) == [batches.rows(5).tolist()] * 3


@pytest.mark.parametrize(
    "spec", [(("replica", "fsdp"), None), (None, "tensor"), (("replica",), "tensor"), (None, None)]
)
def test_the_global_batch_reads_each_row_once(tmp_path: Path, spec: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a", {"train": 500})
    batches = open_batches(Data((Source(path),), LENGTH), sequences=8, vocab_size=VOCABULARY, seed=3)
    expected, read = batches.rows(2), []
    rows = Batches.rows
    monkeypatch.setattr(Batches, "rows", lambda self, step, wanted: read.extend(wanted) or rows(self, step, wanted))
    mesh = jax.make_mesh((2, 2, 2), ("replica", "fsdp", "tensor"))
    made = global_batch(batches, 2, jax.NamedSharding(mesh, jax.P(*spec)))
    np.testing.assert_array_equal(np.asarray(made), expected)
    assert sorted(read) == list(range(8))
    read.clear()
    filled = np.asarray(global_batch(batches, 2, jax.NamedSharding(mesh, jax.P(*spec)), rows=16))
    np.testing.assert_array_equal(filled, np.pad(expected, ((0, 8), (0, 0)), constant_values=-1))
    assert sorted(read) == list(range(8))


def test_prefetch_keeps_the_order_and_works_ahead_by_depth() -> None:
    started: list[int] = []
    series = prefetch(lambda step: started.append(step) or step * 10, range(3, 9), depth=2)
    assert started == []  # nothing before it is asked for
    first = next(series)
    deadline = time.monotonic() + 5
    while len(started) < 3 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.02)
    assert started == [3, 4, 5]
    assert [first[:2], *(loaded[:2] for loaded in series)] == [(step, step * 10) for step in range(3, 9)]


def test_prefetch_counts_only_what_the_consumer_stood_still(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(prefetching, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))

    class Load:
        def result(self) -> str:
            now[0] += 2.5
            return "value"

    now[0] = 100.0
    assert prefetching._next(collections.deque([(7, Load())])) == (7, "value", 2.5)  # pyright: ignore


def test_prefetch_measures_the_wait() -> None:
    slow = list(prefetch(lambda step: time.sleep(0.05), range(3)))
    assert all(loaded.wait_seconds > 0.04 for loaded in slow)
    waits = []
    for loaded in prefetch(lambda step: time.sleep(0.01), range(4)):
        waits.append(loaded.wait_seconds)
        time.sleep(0.05)
    assert max(waits[1:]) < 0.01


def test_prefetch_raises_where_the_load_failed() -> None:
    def load(step: int) -> int:
        if step == 2:
            raise UserError("a: record 8")
        return step

    series = prefetch(load, range(5))
    assert [next(series).value, next(series).value] == [0, 1]
    with pytest.raises(UserError, match="a: record 8"):
        next(series)


def test_prefetch_drops_what_is_queued_when_it_is_left() -> None:
    go_on, loaded = threading.Event(), []

    def load(step: int) -> None:
        loaded.append(step)
        assert step == 0 or go_on.wait(20)

    series = prefetch(load, range(1000), depth=4)
    next(series)
    while loaded != [0, 1]:
        time.sleep(0.001)
    threading.Timer(0.1, go_on.set).start()
    series.close()
    assert loaded == [0, 1]  # the one under way is waited for


def test_prefetch_stops_its_thread_when_left() -> None:
    loaded: list[int] = []
    with contextlib.closing(prefetch(lambda step: loaded.append(step), range(1000), depth=3)) as series:
        for item in series:
            if item.step == 5:
                break
    assert len(loaded) <= 10
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]
