"""Where the weights lie while a series is scored."""

import dataclasses
import os
import types

import jax
import pytest

from fineline_jax.checkpoints.series import Checkpoint, Series
from fineline_jax.recipe import MeshShape
from fineline_jax.scoring.series import auto_mesh


@pytest.fixture
def series(tmp_path) -> Series:
    (tmp_path / "model.safetensors").write_bytes(b"x" * 1000)
    return Series("s", (Checkpoint("s", "a", None, None, tmp_path, "hf"),))


@pytest.mark.parametrize(("memory", "shape"), [(8000, (8, 1, 1)), (7999, (1, 8, 1))])
def test_every_device_has_a_copy_if_that_fits_easily(series, monkeypatch, memory, shape):
    monkeypatch.setattr(auto_mesh, "memory_of_device", lambda: memory)
    assert tuple(auto_mesh.scoring_mesh(MeshShape(), [series]).shape.values()) == shape


def test_the_mesh_asked_for_is_taken(series):
    assert auto_mesh.scoring_mesh(MeshShape(2, 2, 2), [series]).shape["tensor"] == 2


def test_weights_of_unknown_size_are_sharded(series):
    there = dataclasses.replace(series.checkpoints[0], remote=types.SimpleNamespace())
    assert auto_mesh.scoring_mesh(MeshShape(), [Series("s", (there,))]).shape["fsdp"] == 8


def test_the_largest_of_several_series_decides(series, tmp_path, monkeypatch):
    monkeypatch.setattr(auto_mesh, "memory_of_device", lambda: 8000)
    (tmp_path / "large").mkdir()
    (tmp_path / "large/model.safetensors").write_bytes(b"x" * 1001)
    large = Series("l", (Checkpoint("l", "a", None, None, tmp_path / "large", "hf"), *series.checkpoints))
    for opened in ([series, large], [large, series]):
        assert auto_mesh.scoring_mesh(MeshShape(), opened).shape["fsdp"] == 8
    assert auto_mesh.scoring_mesh(MeshShape(), [series, series]).shape["replica"] == 8


def test_weights_are_all_files_of_the_first_checkpoint(tmp_path):
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for size, name in enumerate(names, start=2):
        (tmp_path / name).write_bytes(b"x" * size)
    (tmp_path / "model.safetensors.index.json").write_text(
        f'{{"weight_map": {{"a": "{names[0]}", "b": "{names[1]}"}}}}'
    )
    index = (tmp_path / "model.safetensors.index.json").stat().st_size
    here = Checkpoint("s", "a", None, None, tmp_path, "hf")
    assert auto_mesh.weight_bytes(Series("s", (here,))) in (5, 5 + index)
    absent = dataclasses.replace(here, location=tmp_path / "absent")
    assert auto_mesh.weight_bytes(Series("s", (absent, here))) == float("inf")


def test_a_cpus_memory_is_shared_by_its_devices_and_another_device_says_its_own(monkeypatch):
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert auto_mesh.memory_of_device() == whole / 8
    chip = types.SimpleNamespace(platform="gpu", memory_stats=lambda: {"bytes_limit": 7, "bytes_in_use": 3})
    monkeypatch.setattr(jax, "local_devices", lambda: [chip])
    assert auto_mesh.memory_of_device() == 7
    chip.memory_stats = lambda: None
    assert auto_mesh.memory_of_device() == 0.0
