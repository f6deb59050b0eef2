"""Where the weights lie while a series is scored."""

import dataclasses
import types

import pytest

from fineline_jax.checkpoints.series import Checkpoint, Series
from fineline_jax.recipe import Mesh
from fineline_jax.scoring import placement


@pytest.fixture
def series(tmp_path) -> Series:
    (tmp_path / "model.safetensors").write_bytes(b"x" * 1000)
    return Series("s", (Checkpoint("s", "a", None, None, tmp_path, "hf"),))


@pytest.mark.parametrize(("memory", "shape"), [(8000, (8, 1, 1)), (7999, (1, 8, 1))])
def test_every_device_has_a_copy_if_that_fits_easily(series, monkeypatch, memory, shape):
    monkeypatch.setattr(placement, "memory_of_device", lambda: memory)
    assert tuple(placement.scoring_mesh(Mesh(), [series]).shape.values()) == shape


def test_the_mesh_asked_for_is_taken(series):
    assert placement.scoring_mesh(Mesh(2, 2, 2), [series]).shape["tensor"] == 2


def test_weights_of_unknown_size_are_sharded(series):
    there = dataclasses.replace(series.checkpoints[0], remote=types.SimpleNamespace())
    assert placement.scoring_mesh(Mesh(), [Series("s", (there,))]).shape["fsdp"] == 8
