"""llama2.c's files: a published one beside the same model in Hugging Face's layout; version 1 written here as export.py
writes it."""

import json
import struct
from pathlib import Path

import family_examples
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from fineline_jax.checkpoints.formats import huggingface
from fineline_jax.checkpoints.formats.trainers.llama2c import config_of, is_llama2c
from fineline_jax.checkpoints.formats.weight_files import open_weights, weight_files
from fineline_jax.errors import UserError
from fineline_jax.mesh import make_mesh
from fineline_jax.recipe import MeshShape


@pytest.fixture
def model(shared_data: Path) -> Path:
    return shared_data / "models" / "tinystories-260k"


def meta_order(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of halves (j, j + size / 2) as the pairs (2j, 2j + 1) of Meta's code (transformers' permute, undone)."""
    return rows.reshape(heads, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def version_1(tensors: dict[str, np.ndarray], head: np.ndarray | None) -> bytes:
    """export.py's version1_export of tinystories-260k."""
    of = lambda name: [tensors[f"model.layers.{i}.{name}.weight"] for i in range(5)]
    order = [*of("input_layernorm"), *of("post_attention_layernorm"), tensors["model.norm.weight"]]
    order += [tensors["model.embed_tokens.weight"]]
    order += [meta_order(rows, 8) for rows in of("self_attn.q_proj")]
    order += [meta_order(rows, 4) for rows in of("self_attn.k_proj")]
    for name in ("self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj", "mlp.up_proj"):
        order += of(name)
    order += [] if head is None else [head]
    header = struct.pack("<Ii7iB", 0x616B3432, 1, 64, 172, 5, 8, 4, 512, 512, head is None)
    return header.ljust(256, b"\0") + b"".join(tensor.astype("<f4").tobytes() for tensor in order)


def test_the_published_file_has_the_tensors_of_the_folder_beside_it(model: Path) -> None:
    found, expected = open_weights(model / "checkpoint_legacy.bin").tensors, load_file(model / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].whole().tobytes() == tensor.tobytes(), name
        assert np.array_equal(found[name][(slice(3, 7),) * tensor.ndim], tensor[(slice(3, 7),) * tensor.ndim]), name


def test_a_file_alone_says_what_model_it_is_and_has_the_golden_log_probabilities(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "stories260K.bin"
    file.write_bytes((model / "checkpoint_legacy.bin").read_bytes())
    mesh = make_mesh(MeshShape(1, 1, 4), jax.devices()[:4])
    config, params = huggingface.load_hf(file, mesh)
    assert config == huggingface.config_from_hf(model / "config.json")
    item = json.loads((model / "golden.json").read_text())["items"][0]
    logits = family_examples.our_logits(config, params, np.asarray([item["ids"]], np.int32), mesh)[0]
    logits = logits.astype(np.float64)
    logp = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    found = logp[np.arange(len(item["ids"]) - 1), item["ids"][1:]]
    assert np.abs(found - item["logprobs"]).max() < 1e-4


@pytest.mark.parametrize("tied", [True, False])
def test_version_1_has_the_same_tensors_and_a_head_of_its_own_where_it_says_so(
    model: Path, tmp_path: Path, tied: bool
) -> None:
    expected = load_file(model / "model.safetensors")
    head = None if tied else np.arange(512 * 64, dtype=np.float32).reshape(512, 64)
    (tmp_path / "model.bin").write_bytes(version_1(expected, head))
    found = open_weights(tmp_path).tensors
    expected |= {} if head is None else {"lm_head.weight": head}
    assert found.keys() == expected.keys()
    assert all(found[name].whole().tobytes() == tensor.tobytes() for name, tensor in expected.items())
    assert config_of(tmp_path / "model.bin")["tie_word_embeddings"] == tied


def test_other_files_are_not_taken_for_one_and_damaged_ones_are_refused(model: Path, tmp_path: Path) -> None:
    whole, file = (model / "checkpoint_legacy.bin").read_bytes(), tmp_path / "model.bin"
    assert not is_llama2c(model / "tokenizer.bin") and not is_llama2c(model / "model.safetensors")
    assert weight_files(model) == [model / "model.safetensors"]
    quantized = struct.pack("<Ii7iB", 0x616B3432, 2, 64, 172, 5, 8, 4, 512, 512, 1).ljust(300, b"\0")
    for content, message in (
        (whole[:-1], r"model\.bin: has 1056539 bytes, its header means 1056540; fetch"),
        (whole + b"\0", "has 1056541 bytes"),
        (quantized, "version 2 .* quantized"),
        (whole[:20], "PyTorch checkpoint"),
        (struct.pack("<7i", 64, 172, 5, 7, 4, 512, 512) + whole[28:], "PyTorch checkpoint"),
        (b"", "PyTorch checkpoint"),
    ):  # fmt: skip
        file.write_bytes(content)
        with pytest.raises(UserError, match=message) as error:
            open_weights(file)
        assert "\n" not in str(error.value)
