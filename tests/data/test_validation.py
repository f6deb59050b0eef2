"""The windows of the validation losses: the same ones whatever the batch and the mesh."""

from pathlib import Path

import jax
import numpy as np
import pytest
from data_examples import numbered

from fineline_jax.data.validation import ValidationWindows, open_validation
from fineline_jax.errors import UserError
from fineline_jax.mesh import make_mesh
from fineline_jax.recipe import Data, MeshShape, Source, Validation
from fineline_jax.training.step import BATCH_SPEC

LENGTH, VOCABULARY = 7, 1000


def one(data: Data, *sets: Validation) -> ValidationWindows:
    [opened] = open_validation(data, sets, VOCABULARY)
    return opened


def rows_of(opened: ValidationWindows, sequences: int, devices: int = 1) -> tuple[list[int], list[float]]:
    """First token and weight of each row, batch after batch."""
    mesh = make_mesh(MeshShape(fsdp=devices), jax.devices()[:devices])
    batches = list(opened.batches(sequences, jax.NamedSharding(mesh, BATCH_SPEC)))
    assert all(windows.shape == (sequences, LENGTH + 1) and windows.dtype == np.int32 for windows, _ in batches)
    assert all(windows.sharding.spec == BATCH_SPEC for windows, _ in batches)
    numbers = np.concatenate([np.asarray(windows)[:, 0] for windows, _ in batches]).tolist()
    return numbers, np.concatenate([np.asarray(weights) for _, weights in batches]).tolist()


@pytest.mark.parametrize("windows", [1, 8, 9, 11, 64])
def test_they_are_the_first_of_the_split_for_any_batch_and_mesh_and_the_last_batch_is_filled_up(tmp_path, windows):
    data = Data((Source(numbered(tmp_path / "a", {"train": 9, "validation": 11}, LENGTH, VOCABULARY)),), LENGTH)
    count = min(windows, 11)
    opened = one(data, Validation(windows=windows))
    for sequences, devices in [(n, 1) for n in (1, 2, 3, 5, 8, 12, 48)] + [(4, 4), (8, 4), (24, 8)]:
        numbers, weights = rows_of(opened, sequences, devices)
        assert numbers[:count] == list(range(100, 100 + count))
        assert weights == [1.0] * count + [0.0] * (-count % sequences)


def test_those_of_the_sources_are_mixed_by_weight_and_none_comes_twice(tmp_path):
    places = [
        numbered(tmp_path / "a", {"train": 9, "held": 6}, LENGTH, VOCABULARY),
        numbered(tmp_path / "b", {"train": 9}, LENGTH, VOCABULARY, base=300),
        numbered(tmp_path / "c", {"train": 9, "held": 20}, LENGTH, VOCABULARY, base=500),
    ]
    data = Data(tuple(Source(path, weight) for path, weight in zip(places, (1.0, 50.0, 3.0))), LENGTH)
    drawn, _ = rows_of(one(data, Validation(split="held", windows=16)), 1)
    assert [name for name in drawn if name < 300] == [100, 101, 102, 103]
    assert [name for name in drawn if name >= 300] == list(range(600, 612))
    # Six windows of `a` are a share of 1 in 4: then 18 of `c` have come, and the next of `a` would be its first again.
    all_of_them, _ = rows_of(one(data, Validation(split="held", windows=1000)), 1)
    assert len(set(all_of_them)) == len(all_of_them) >= 24


def test_each_set_has_its_own_data_set_split_and_number(tmp_path):
    train = numbered(tmp_path / "a", {"train": 9, "validation": 4}, LENGTH, VOCABULARY)
    code = numbered(tmp_path / "b", {"train": 5, "test": 6}, LENGTH, VOCABULARY, base=300)
    sets = (
        Validation(),
        Validation("none", windows=0),
        Validation("no_source_has_it", split="test"),
        Validation("code", code, "test", 3),
        Validation("train", code, "train", 2),
    )
    opened = open_validation(Data((Source(train),), LENGTH), sets, VOCABULARY)
    assert {windows.name: rows_of(windows, 1)[0] for windows in opened} == {
        "held_out": [100, 101, 102, 103],
        "code": [400, 401, 402],
        "train": [300, 301],
    }


def test_a_set_that_does_not_fit_is_refused_by_its_option(tmp_path):
    train = numbered(tmp_path / "a", {"train": 9, "validation": 4}, LENGTH, VOCABULARY)
    data = Data((Source(train),), LENGTH)
    with pytest.raises(UserError, match=r"b: no such data set; .* correct --logging\.validation\.1\.path"):
        open_validation(data, (Validation(), Validation("b", str(tmp_path / "b"))), VOCABULARY)
    with pytest.raises(UserError, match=r"a: no windows in a split test, only in .*; correct --logging\.validation\.0"):
        open_validation(data, (Validation("b", train, "test"),), VOCABULARY)
    other = numbered(tmp_path / "c", {"validation": 4}, LENGTH + 1, VOCABULARY)
    with pytest.raises(UserError, match=r"c: prepared with sequence_length=8, data\.sequence_length is 7"):
        open_validation(data, (Validation("c", other),), VOCABULARY)
    foreign: Path = tmp_path / "d"
    numbered(foreign, {"validation": 4}, LENGTH, VOCABULARY, base=VOCABULARY)
    with pytest.raises(UserError, match=r"d: record 0 of split validation has a token id outside"):
        rows_of(one(data, Validation("d", str(foreign))), 2)
