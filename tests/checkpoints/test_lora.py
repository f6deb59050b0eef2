"""LoRA adapters: what opens is W + scale B A, computed here on whole matrices as peft's merge_and_unload does."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from scoring_examples import write_tokenizer
from series_examples import make_series, one_device

from fineline_jax.checkpoints.formats.huggingface import load_hf
from fineline_jax.checkpoints.formats.weight_files import config_file, open_weights, weight_files
from fineline_jax.checkpoints.open import open_series
from fineline_jax.errors import UserError

LAYER = "model.layers.0."
Q, DOWN = f"{LAYER}self_attn.q_proj", f"{LAYER}mlp.down_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_tokenizer(folder / "tokenizer", adds_bos=False)
    return make_series(folder / "series", folder / "tokenizer", (100,)) / "step100"


def adapter(folder: Path, base: Path, **changes: Any) -> tuple[Path, dict[str, np.ndarray]]:
    """An adapter of rank 2 for two matrices; its tensors."""
    shapes = {name: load_file(base / "model.safetensors")[f"{name}.weight"].shape for name in (Q, DOWN)}
    rng, tensors = np.random.default_rng(1), {}
    for name, (rows, columns) in shapes.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = rng.normal(size=(2, columns)).astype(np.float32)
        tensors[f"base_model.model.{name}.lora_B.weight"] = rng.normal(size=(rows, 2)).astype(np.float32)
    folder.mkdir(parents=True)
    how = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "base_model_name_or_path": str(base)} | changes
    (folder / "adapter_config.json").write_text(json.dumps(how))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder, tensors


@pytest.mark.parametrize(
    ("changes", "scales"),
    [
        ({}, (1.5, 1.5)),
        ({"use_rslora": True}, (3 / math.sqrt(2), 3 / math.sqrt(2))),
        ({"alpha_pattern": {"down_proj": 8}}, (1.5, 4.0)),
    ],
)
def test_an_adapter_is_its_base_and_the_product_of_its_factors(base: Path, tmp_path: Path, changes, scales) -> None:
    folder, factors = adapter(tmp_path / "adapter", base, **changes)
    before, found = load_file(base / "model.safetensors"), open_weights(folder).tensors
    assert found.keys() == before.keys() and config_file(folder) == base / "config.json"
    for name, scale in zip((Q, DOWN), scales):
        a, b = (factors[f"base_model.model.{name}.lora_{one}.weight"].astype(np.float64) for one in "AB")
        wanted = before[f"{name}.weight"].astype(np.float64) + scale * (b @ a)
        assert np.allclose(found[f"{name}.weight"].whole(), wanted, rtol=1e-5, atol=1e-5)
        part = found[f"{name}.weight"][slice(1, 4), slice(2, 5)]
        assert np.allclose(part, wanted[1:4, 2:5], rtol=1e-5, atol=1e-5)
    untouched = before.keys() - {f"{Q}.weight", f"{DOWN}.weight"}
    assert all(np.array_equal(found[name].whole(), before[name]) for name in untouched)


def test_a_trainers_folder_of_adapters_is_a_series_and_loads(base: Path, tmp_path: Path) -> None:
    for step in (10, 20):
        folder, factors = adapter(tmp_path / f"run/checkpoint-{step}", base)
        shutil.copy(base / "tokenizer.json", folder)
    found = open_series(str(tmp_path / "run")).checkpoints
    assert [(one.name, one.step) for one in found] == [("checkpoint-10", 10), ("checkpoint-20", 20)]
    assert {file.name for file in weight_files(found[0].location)} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    (config, plain), (same, params) = (load_hf(where, one_device()) for where in (base, found[0].location))
    assert config == same
    a, b = (factors[f"base_model.model.{DOWN}.lora_{one}.weight"] for one in "AB")
    change = np.asarray(params["layers"]["down"])[0] - np.asarray(plain["layers"]["down"])[0]
    assert np.allclose(change, 1.5 * (b @ a).T, atol=1e-5), "the decoder multiplies with the transpose"


def test_whole_modules_of_an_adapter_stand_for_those_of_the_base(base: Path, tmp_path: Path) -> None:
    folder, tensors = adapter(tmp_path / "adapter", base)
    norm = np.full_like(load_file(base / "model.safetensors")["model.norm.weight"], 7)
    save_file(tensors | {"base_model.model.model.norm.weight": norm}, folder / "adapter_model.safetensors")
    assert np.array_equal(open_weights(folder).tensors["model.norm.weight"].whole(), norm)


@pytest.mark.parametrize(
    ("changes", "extra", "said"),
    [
        ({"peft_type": "IA3"}, {}, "is a IA3 of rank 2; only LoRA is merged here"),
        ({"use_dora": True}, {}, "use_dora is set, which is not merged here"),
        ({"base_model_name_or_path": "org/model"}, {}, "'org/model' is no folder with config.json; fetch that model"),
        ({"r": "many"}, {}, "adapter_config.json: not an adapter's config"),
        (
            {},
            {"base_model.model.model.other.lora_A.weight": np.ones((2, 2), np.float32)},
            "changes no tensor of the base",
        ),
        ({}, {f"base_model.model.{Q}.lora_A.weight": np.ones((2, 3), np.float32)}, "do not fit"),
        ({}, {f"base_model.model.{Q}.lora_embedding_A": np.ones((2, 3), np.float32)}, "changes no tensor of the base"),
    ],
)
def test_what_is_not_merged_is_named(base: Path, tmp_path: Path, changes, extra, said: str) -> None:
    folder, tensors = adapter(tmp_path / "adapter", base, **changes)
    save_file(tensors | extra, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match=said) as error:
        open_weights(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)
