"""Where the weights lie while a series is scored."""

import json
import os
import types
from pathlib import Path
from typing import Any

import jax
import pytest

from fineline_jax.checkpoints.series import Checkpoint, Series
from fineline_jax.errors import UserError
from fineline_jax.models.config import ModelConfig
from fineline_jax.recipe import MeshShape
from fineline_jax.scoring.series import auto_mesh

MODEL = ModelConfig(vocab_size=10, width=4, layers=1, heads=1, mlp_width=4)
"""204 weights: 2 * 10 * 4 of the tables, 4 * 4 * 4 of attention, 3 * 4 * 4 of the MLP, and three norms of 4."""


def series_of(folder: Path, layers: int = 1, **changes: Any) -> Series:
    folder.mkdir(exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 10, "hidden_size": 4,
        "num_hidden_layers": layers, "num_attention_heads": 1, "intermediate_size": 4, "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return Series("s", (Checkpoint("s", "a", None, None, folder, "hf", **changes),))


@pytest.fixture
def series(tmp_path) -> Series:
    return series_of(tmp_path / "small")


def test_the_weights_are_counted_from_the_config(series, tmp_path):
    assert auto_mesh.parameters(series) == MODEL.parameters == 204
    run = Series("r", (Checkpoint("r", "1", 1, None, tmp_path / "run/checkpoints/1", "orbax"),))
    assert auto_mesh.parameters(run) == float("inf")


@pytest.mark.parametrize(
    ("memory", "dtype", "shape"),
    [
        (2 * 4 * 204 / 0.6 + 1, "float32", (8, 1, 1)),
        (2 * 4 * 204 / 0.6 - 1, "float32", (1, 8, 1)),
        (2 * 2 * 204 / 0.6 + 1, "bfloat16", (8, 1, 1)),
        (2 * 2 * 204 / 0.6 - 1, "bfloat16", (1, 8, 1)),
        (0.0, "float32", (1, 8, 1)),
    ],
)
def test_every_device_has_a_copy_if_it_has_room_for_two_in_the_dtype_asked_for(
    series, monkeypatch, memory, dtype, shape
):
    monkeypatch.setattr(auto_mesh, "memory_of_device", lambda: memory)
    assert tuple(auto_mesh.scoring_mesh(MeshShape(), [series], dtype).shape.values()) == shape


def test_weights_that_cannot_fit_are_refused_with_what_would():
    """67 billion weights: 4 * 67e9 / 4 / 2**30 = 62.4 GiB on each of four, half of it in bfloat16."""
    with pytest.raises(UserError, match=r"float32 need 62.4 GiB of each of 4 .* 30.8 GiB; --dtype bfloat16 needs 31.2"):
        auto_mesh.placement(67e9, "float32", 4, 30.75 * 2**30)
    with pytest.raises(UserError, match=r"bfloat16 need 31.2 GiB [^;]*; take more devices"):
        auto_mesh.placement(67e9, "bfloat16", 4, 30.75 * 2**30)
    assert auto_mesh.placement(67e9, "bfloat16", 4, 32 * 2**30) == MeshShape()


def test_the_mesh_asked_for_is_taken(series):
    assert auto_mesh.scoring_mesh(MeshShape(2, 2, 2), [series], "float32").shape["tensor"] == 2


def test_weights_of_unknown_size_are_sharded(tmp_path):
    assert auto_mesh.scoring_mesh(MeshShape(), [Series("s", (absent(tmp_path),))], "float32").shape["fsdp"] == 8


def absent(folder: Path) -> Checkpoint:
    return Checkpoint("s", "a", None, None, folder / "absent", "hf")


def test_the_largest_of_several_series_decides(series, tmp_path, monkeypatch):
    monkeypatch.setattr(auto_mesh, "memory_of_device", lambda: 2 * 4 * 204 / 0.6 + 1)
    large = series_of(tmp_path / "large", layers=2)
    for opened in ([series, large], [large, series]):
        assert auto_mesh.scoring_mesh(MeshShape(), opened, "float32").shape["fsdp"] == 8
    assert auto_mesh.scoring_mesh(MeshShape(), [series, series], "float32").shape["replica"] == 8


def test_a_cpus_memory_is_shared_by_its_devices_and_another_device_says_its_own(monkeypatch):
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert auto_mesh.memory_of_device() == whole / 8
    chip = types.SimpleNamespace(platform="gpu", memory_stats=lambda: {"bytes_limit": 7, "bytes_in_use": 3})
    monkeypatch.setattr(jax, "local_devices", lambda: [chip])
    assert auto_mesh.memory_of_device() == 7
    chip.memory_stats = lambda: None
    assert auto_mesh.memory_of_device() == 0.0
