"""Folders as other tools write them: names of tensors, the Trainer's output, the hub's cache, git LFS pointers."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from scoring_examples import write_tokenizer

from fineline_jax.checkpoints.formats.huggingface import export_hf, load_hf
from fineline_jax.checkpoints.open import open_series
from fineline_jax.cli import main
from fineline_jax.errors import UserError
from fineline_jax.mesh import make_mesh
from fineline_jax.models import decoder
from fineline_jax.models.config import ModelConfig
from fineline_jax.tokenizers.open import UnreadableTokenizer, open_tokenizer

TIED = ModelConfig(
    vocab_size=32, width=16, layers=2, heads=2, kv_heads=2, mlp_width=24, context=32, tied_embeddings=True
)
UNTIED = ModelConfig(vocab_size=32, width=16, layers=2, heads=2, kv_heads=2, mlp_width=24, context=32)
NEOX = ModelConfig(
    vocab_size=32, width=16, layers=2, heads=2, mlp_width=24, context=32, norm="layer", parallel_residual=True,
    rotary_fraction=0.5, mlp="gelu", attention_bias=True, mlp_bias=True,
)  # fmt: skip
Rename = Callable[[str], str]


def write(folder: Path, config: ModelConfig, rename: Rename = lambda name: name, **keys: Any) -> dict[str, Any]:
    """A checkpoint with renamed tensors; returns its parameters. keys: changed in config.json."""
    random = np.random.default_rng(3)
    target = decoder.abstract_params(config, make_mesh())
    params = jax.tree.map(
        lambda leaf: jax.device_put(random.normal(size=leaf.shape).astype(leaf.dtype), leaf.sharding), target
    )
    export_hf(config, params, folder)
    file = folder / "model.safetensors"
    save_file({rename(name): tensor for name, tensor in load_file(file).items()}, file)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | keys))
    return params


def bits(params: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params)]


@pytest.mark.parametrize(
    ("config", "rename", "keys"),
    [
        (TIED, lambda name: name.removeprefix("model."), {"architectures": ["LlamaModel"]}),
        (UNTIED, lambda name: f"module.{name}", {}),
        (UNTIED, lambda name: f"_orig_mod.module.{name}", {}),
        (UNTIED, lambda name: name.replace("layers.1.", "layers.1._checkpoint_wrapped_module."), {}),
        (UNTIED, lambda name: name.replace("lm_head", "embed_out").removeprefix("model."), {}),
        (NEOX, lambda name: name.replace("embed_out", "lm_head"), {}),
    ],
    ids=["without head", "module", "compiled", "inside", "other head", "NeoX state dict"],
)
def test_names_that_wrappers_and_base_classes_write_are_understood(config, rename, keys, tmp_path) -> None:
    expected = write(tmp_path / "x", config, rename, **keys)
    read, params = load_hf(tmp_path / "x", make_mesh())
    assert read == config and bits(params) == bits(expected)


def test_two_tensors_of_one_meaning_are_refused(tmp_path) -> None:
    write(tmp_path / "x", UNTIED)
    file = tmp_path / "x/model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"module.lm_head.weight": tensors["lm_head.weight"] + 1}, file)
    with pytest.raises(UserError, match=r"tensors .*lm_head.weight and .*lm_head.weight are both lm_head.weight"):
        load_hf(tmp_path / "x", make_mesh())


def test_an_unexpected_tensor_is_named_before_a_missing_one(tmp_path) -> None:
    write(tmp_path / "x", UNTIED, lambda name: name.replace("q_proj", "query"))
    with pytest.raises(UserError, match=r"layers\.0\.self_attn\.query\.weight .* is not part of .*q_proj.* is missing"):
        load_hf(tmp_path / "x", make_mesh())


def test_a_head_that_was_not_saved_is_missing(tmp_path) -> None:
    write(tmp_path / "x", UNTIED, architectures=["LlamaModel"])
    file = tmp_path / "x/model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if name != "lm_head.weight"}, file)
    with pytest.raises(UserError, match=r"tensor lm_head\.weight is missing"):
        load_hf(tmp_path / "x", make_mesh())


def test_a_mistral_has_the_window_of_its_file_or_of_its_class(tmp_path) -> None:
    expected = write(tmp_path / "x", UNTIED, architectures=["MistralForCausalLM"], sliding_window=None)
    assert bits(load_hf(tmp_path / "x", make_mesh())[1]) == bits(expected)
    raw = json.loads((tmp_path / "x/config.json").read_text())
    del raw["sliding_window"]  # transformers' MistralConfig then has one of 4096
    (tmp_path / "x/config.json").write_text(json.dumps(raw | {"max_position_embeddings": 8192}))
    config, params = load_hf(tmp_path / "x", make_mesh())
    assert (config.window, config.context) == (4096, 8192)
    assert bits(params) == bits(expected)


# Folders


@pytest.fixture
def trainer(tmp_path) -> Path:
    """What transformers' Trainer leaves: two checkpoints and the last model, with trainer_state.json in each."""
    write(tmp_path / "out", TIED)
    for step in (500, 1000):
        shutil.copytree(tmp_path / "out", tmp_path / f"checkpoint-{step}")
        shutil.move(tmp_path / f"checkpoint-{step}", tmp_path / "out")
        state = {"global_step": step, "num_input_tokens_seen": step * 4096, "log_history": []}
        (tmp_path / f"out/checkpoint-{step}/trainer_state.json").write_text(json.dumps(state))
    (tmp_path / "out/trainer_state.json").write_text(json.dumps({"global_step": 1200, "num_input_tokens_seen": 0}))
    return tmp_path / "out"


def test_the_output_of_the_trainer_is_a_series(trainer) -> None:
    found = open_series(str(trainer))
    assert [(one.name, one.step, one.tokens) for one in found.checkpoints] == [
        ("checkpoint-500", 500, 2_048_000), ("checkpoint-1000", 1000, 4_096_000), ("main", 1200, None),
    ]  # fmt: skip
    assert found.checkpoints[-1].location == trainer
    (trainer / "trainer_state.json").write_text('{"global_step": 1000}')
    assert [one.name for one in open_series(str(trainer)).checkpoints] == ["checkpoint-500", "checkpoint-1000"]
    assert [one.name for one in open_series(f"{trainer}@checkpoint-5*").checkpoints] == ["checkpoint-500"]


def test_a_damaged_state_of_the_trainer_is_named(trainer) -> None:
    (trainer / "checkpoint-500/trainer_state.json").write_text('{"global_step": ')
    with pytest.raises(UserError, match=r"checkpoint-500/trainer_state\.json: not a state of transformers' Trainer"):
        open_series(str(trainer))


def test_bare_numbers_are_steps_and_sizes_are_no_tokens(trainer) -> None:
    folder = trainer.parent / "numbers"
    for name in ("1000", "200", "step300-7b"):
        shutil.copytree(trainer / "checkpoint-500", folder / name, ignore=shutil.ignore_patterns("trainer_state.json"))
    found = open_series(str(folder))
    assert [(one.name, one.step, one.tokens) for one in found.checkpoints] == [
        ("200", 200, None), ("step300-7b", 300, None), ("1000", 1000, None),
    ]  # fmt: skip


def test_models_beneath_a_model_are_mentioned(trainer, caplog) -> None:
    for name in ("500", "1000"):
        (trainer / f"checkpoint-{name}").rename(trainer / f"epoch-{name}")
    with caplog.at_level(logging.WARNING):
        assert [one.name for one in open_series(str(trainer)).checkpoints] == ["main"]
    assert "beneath it lie others (epoch-1000 to epoch-500)" in caplog.text


def test_a_cache_of_the_hub_is_its_snapshots(trainer, capsys) -> None:
    cache = trainer.parent / "models--org--tiny"
    for commit, revision in (("a" * 40, "main"), ("b" * 40, "step20"), ("c" * 40, "")):
        shutil.copytree(trainer / "checkpoint-500", cache / "snapshots" / commit)
        if revision:
            (cache / "refs").mkdir(exist_ok=True)
            (cache / "refs" / revision).write_text(commit)
    (cache / "snapshots" / ("d" * 40)).mkdir()  # only a tokenizer was asked for
    found = open_series(str(cache))
    assert found.name == "tiny"
    assert [(one.name, one.step) for one in found.checkpoints] == [
        ("step20", 20),
        ("cccccccccccc", None),
        ("main", None),
    ]
    [one] = open_series(str(cache / "snapshots" / ("b" * 40))).checkpoints
    assert (one.series, one.name) == ("tiny", "step20")
    assert main(["series", str(cache / "snapshots" / ("d" * 40))]) == 2
    assert "no snapshot of this cache holds config.json and weights" in capsys.readouterr().err
    for ref, commit in (("pr-1", "a"), ("pr/1", "b")):
        (cache / "refs" / ref).parent.mkdir(exist_ok=True)
        (cache / "refs" / ref).write_text(commit * 40)
    for ref in ("main", "step20"):
        (cache / "refs" / ref).unlink()
    with pytest.raises(UserError, match="two snapshots of this cache are called pr-1; give the folder of one"):
        open_series(str(cache))
    assert [one.name for one in open_series(str(cache / "snapshots" / ("a" * 40))).checkpoints] == ["pr-1"]


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


@pytest.mark.parametrize(
    "name", ["model.safetensors", "pytorch_model.bin", "config.json", "model.safetensors.index.json"]
)
def test_a_pointer_of_git_lfs_is_called_one(name, tmp_path) -> None:
    write(tmp_path / "x", UNTIED)
    if name != "config.json":
        (tmp_path / "x/model.safetensors").unlink()
    (tmp_path / "x" / name).write_text(POINTER)
    with pytest.raises(UserError, match=rf"{name}: a git LFS pointer, not the file itself; run `git lfs pull`"):
        load_hf(tmp_path / "x", make_mesh())


def test_a_tokenizer_that_is_a_pointer_or_beside_a_broken_config_is_not_blamed_for_it(tmp_path) -> None:
    folder = write_tokenizer(tmp_path / "x", adds_bos=False)
    (folder / "config.json").write_text('{"model_type": ')
    with pytest.raises(UnreadableTokenizer, match=r"x/config\.json: not JSON"):
        open_tokenizer(folder)
    (folder / "config.json").unlink()
    (folder / "tokenizer.json").write_text(POINTER)
    with pytest.raises(UnreadableTokenizer, match=r"x/tokenizer\.json: a git LFS pointer"):
        open_tokenizer(folder)
