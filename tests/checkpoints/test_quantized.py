"""Quantized Hugging Face folders: packed here as AutoGPTQ, AutoAWQ and DeepSeek pack, opened as what that means."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file
from series_examples import CONFIG, fresh_params, one_device

from fineline_jax.checkpoints.formats.huggingface import export_hf, load_hf
from fineline_jax.checkpoints.formats.safetensors_files import read_safetensors
from fineline_jax.checkpoints.formats.trainers.quantized import dequantized
from fineline_jax.errors import UserError

Packed = tuple[dict[str, np.ndarray], np.ndarray]
"""Tensors of a module by the ends of their names, and the float64 weight [out, in] they mean."""


def gptq(rng: np.random.Generator, out: int, into: int, bits: int = 4, group: int = 8, **how: Any) -> Packed:
    """As AutoGPTQ's `pack`: values along the rows of words, zeros - 1 along the columns, the lowest bits first."""
    values, zeros = rng.integers(0, 2**bits, (into, out)), rng.integers(0, 2**bits, (into // group, out))
    scales = rng.normal(size=zeros.shape).astype(np.float16)
    group_of = rng.integers(0, into // group, into) if how.get("desc_act") else np.arange(into) // group
    stored = zeros if how.get("checkpoint_format") == "gptq_v2" else (zeros - 1) % 2**bits
    per = 32 // bits
    words, zero_words = np.zeros((into // per, out), np.uint32), np.zeros((into // group, out // per), np.uint32)
    for row in range(into):
        words[row // per] |= values[row].astype(np.uint32) << np.uint32(bits * (row % per))
    for column in range(out):
        zero_words[:, column // per] |= stored[:, column].astype(np.uint32) << np.uint32(bits * (column % per))
    parts = {"qweight": words.view(np.int32), "qzeros": zero_words.view(np.int32), "scales": scales}
    if how.get("desc_act"):
        parts["g_idx"] = group_of.astype(np.int32)
    return parts, (scales.astype(np.float64)[group_of] * (values - zeros[group_of])).T


def awq(rng: np.random.Generator, out: int, into: int, group: int = 8, **_: Any) -> Packed:
    """As AutoAWQ's `from_linear`: values and zeros along the columns of words, in the order 0 2 4 6 1 3 5 7."""
    values, zeros = rng.integers(0, 16, (into, out)), rng.integers(0, 16, (into // group, out))
    scales = rng.normal(size=zeros.shape).astype(np.float16)
    words, zero_words = np.zeros((into, out // 8), np.uint32), np.zeros((into // group, out // 8), np.uint32)
    for column in range(out // 8):
        for place, of in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            words[:, column] |= values[:, 8 * column + of].astype(np.uint32) << np.uint32(4 * place)
            zero_words[:, column] |= zeros[:, 8 * column + of].astype(np.uint32) << np.uint32(4 * place)
    group_of = np.arange(into) // group
    parts = {"qweight": words.view(np.int32), "qzeros": zero_words.view(np.int32), "scales": scales}
    return parts, (scales.astype(np.float64)[group_of] * (values - zeros[group_of])).T


def fp8(rng: np.random.Generator, out: int, into: int, scales: str = "blocks", **_: Any) -> Packed:
    """With scales of 24 x 20 blocks (the last are smaller), of rows, or of the whole matrix."""
    values = rng.normal(size=(out, into)).astype(ml_dtypes.float8_e4m3fn)
    exact = values.astype(np.float64)
    if scales == "blocks":
        factors = rng.uniform(0.5, 2, (-(-out // 24), -(-into // 20))).astype(np.float32)
        for row in range(out):
            for column in range(into):
                exact[row, column] *= factors[row // 24, column // 20]
        return {"weight": values, "weight_scale_inv": factors}, exact
    factors = rng.uniform(0.5, 2, (out, 1) if scales == "rows" else ()).astype(np.float32)
    return {"weight": values, "weight_scale": factors, "input_scale": np.ones((), np.float32)}, exact * factors


CASES: dict[str, tuple[Callable[..., Packed], dict[str, Any], dict[str, Any]]] = {
    "gptq": (gptq, {}, {"quant_method": "gptq", "bits": 4, "group_size": 8, "sym": False}),
    "gptq of 8 bits": (gptq, {"bits": 8}, {"quant_method": "gptq", "bits": 8, "group_size": 8}),
    "gptq of 2 bits": (gptq, {"bits": 2, "group": 16}, {"quant_method": "gptq", "bits": 2, "group_size": 16}),
    "gptq by activation": (gptq, {"desc_act": True}, {"quant_method": "gptq", "bits": 4, "group_size": 8}),
    "gptq v2": (
        gptq,
        {"checkpoint_format": "gptq_v2"},
        {"quant_method": "gptq", "bits": 4, "group_size": 8, "checkpoint_format": "gptq_v2"},
    ),
    "awq": (awq, {}, {"quant_method": "awq", "bits": 4, "group_size": 8, "version": "gemm", "zero_point": True}),
    "fp8 of blocks": (fp8, {}, {"quant_method": "fp8", "weight_block_size": [24, 20]}),
    "fp8 of rows": (fp8, {"scales": "rows"}, {"quant_method": "fbgemm_fp8"}),
    "fp8 of the matrix": (fp8, {"scales": "one"}, {"quant_method": "compressed-tensors"}),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "model"
    with jax.set_mesh(one_device()):
        export_hf(CONFIG, fresh_params(0), folder)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_a_quantized_folder_is_the_model_of_the_weights_it_means(case: str, plain: Path, tmp_path: Path) -> None:
    pack, sizes, how = CASES[case]
    rng = np.random.default_rng(len(case))
    tensors = load_file(plain / "model.safetensors")
    meant = dict(tensors)
    for name in [name for name in tensors if "_proj.weight" in name]:
        whole = tensors.pop(name)
        parts, exact = pack(rng, *whole.shape, **sizes)
        tensors |= {f"{name.removesuffix('weight')}{part}": array for part, array in parts.items()}
        meant[name] = exact.astype(np.float32)
    for folder, content, more in (
        (tmp_path / "quantized", tensors, {"quantization_config": how}),
        (tmp_path / "meant", meant, {}),
    ):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(json.loads((plain / "config.json").read_bytes()) | more))
        save_file({name: np.ascontiguousarray(array) for name, array in content.items()}, folder / "model.safetensors")
    config, found = load_hf(tmp_path / "quantized", one_device())
    same, wanted = load_hf(tmp_path / "meant", one_device())
    assert config == same
    for (name, array), other in zip(flatten_dict(found, sep=".").items(), flatten_dict(wanted, sep=".").values()):
        assert np.allclose(array, np.asarray(other), rtol=1e-6, atol=1e-6), (
            name
        )  # one float32 product of float16 and an integer
    opened = dequantized(read_safetensors(tmp_path / "quantized/model.safetensors"), how)
    for name in ("model.layers.1.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"):
        part = opened[name][slice(5, 27), slice(3, 22)]
        assert np.array_equal(part, opened[name].whole()[5:27, 3:22]), "a part is read from the words it lies in"
        assert np.allclose(part, meant[name][5:27, 3:22], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True},
            r"config\.json: quantization_config bitsandbytes .*not",
        ),
        ({"quant_method": "awq", "version": "gemv"}, r"config\.json: quantization_config awq gemv is not read"),
        ({"quant_method": "gptq", "bits": 3, "group_size": 8}, "up_proj has 3 bits"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 16}, "for another group size than 16"),
        ({"quant_method": "fp8"}, "up_proj.qweight|up_proj"),
    ],
)
def test_what_is_packed_otherwise_is_named(how: dict[str, Any], said: str, plain: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(plain, tmp_path / "model")
    raw, tensors = json.loads((plain / "config.json").read_bytes()), load_file(plain / "model.safetensors")
    module = "model.layers.0.mlp.up_proj"
    out, into = tensors.pop(f"{module}.weight").shape
    parts = gptq(np.random.default_rng(0), out, into)[0]
    save_file(tensors | {f"{module}.{part}": array for part, array in parts.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(raw | {"quantization_config": how}))
    with pytest.raises(UserError, match=said) as error:
        load_hf(folder, one_device())
    assert "\n" not in str(error.value)


def test_an_eight_bit_matrix_without_the_scales_of_its_blocks_is_named(plain: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    parts, _ = fp8(np.random.default_rng(0), 64, 32)
    for scales in ({}, {f"{name}_scale_inv": parts["weight_scale_inv"][:1]}):
        save_file({name: parts["weight"], **scales}, tmp_path / "model.safetensors")
        tensors = read_safetensors(tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=f"tensor {name} has no scales for its blocks"):
            dequantized(tensors, {"quant_method": "fp8", "weight_block_size": [24, 20]})
