"""GGUF: a file that the gguf package (0.19.0) wrote, held to the values that this package gives back.

tests/golden/llama.gguf: a tensor of each kind that is read, under llama.cpp's names. llama_gguf.npz: gguf.quants.
dequantize of each, queries and keys put back by the inverse of convert_hf_to_gguf's permute. Q4_K and Q6_K, which the
package does not quantize to, are random blocks.
"""

import struct
from pathlib import Path

import numpy as np
import pytest

from fineline_jax.checkpoints.formats.trainers.gguf import read_gguf, rotary_rows
from fineline_jax.checkpoints.formats.weight_files import open_weights
from fineline_jax.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden"
CONTENT = (GOLDEN / "llama.gguf").read_bytes()


def test_every_kind_of_tensor_has_the_values_that_gguf_gives() -> None:
    found, values = open_weights(GOLDEN / "llama.gguf").tensors, np.load(GOLDEN / "llama_gguf.npz")
    assert found.keys() == set(values)
    for name in values:
        assert found[name].shape == values[name].shape, name
        assert np.array_equal(found[name].whole().astype(np.float32), values[name]), name
        if values[name].ndim == 2:
            rows, columns = slice(1, 3), slice(5, 8)
            assert np.array_equal(found[name][rows, columns].astype(np.float32), values[name][rows, columns]), name


def test_queries_of_the_llama_architecture_alone_are_in_another_order(tmp_path: Path) -> None:
    other = tmp_path / "m.gguf"
    other.write_bytes(CONTENT.replace(struct.pack("<Q", 5) + b"llama", struct.pack("<Q", 5) + b"qwen2", 1))
    name = "model.layers.0.self_attn.q_proj.weight"
    halves, pairs = (read_gguf(file)[name].whole() for file in (GOLDEN / "llama.gguf", other))
    assert np.array_equal(halves.reshape(4, 2, 2, 8), pairs.reshape(4, 2, 2, 8).swapaxes(1, 2))


@pytest.mark.parametrize(("heads", "size"), [(1, 2), (3, 6), (2, 8), (4, 10)])
def test_rows_are_put_back_from_where_llama_cpp_put_them(heads: int, size: int) -> None:
    """Heads of more than four rows: the order of smaller ones is its own inverse."""
    rows = np.arange(heads * size)
    put = rows.reshape(heads, 2, size // 2).swapaxes(1, 2).reshape(-1)  # `permute` of convert_hf_to_gguf.py
    assert np.array_equal(put[rotary_rows(heads, heads * size)], rows)


@pytest.mark.parametrize("size", [0, 3, 24, 40, 100, 300, len(CONTENT) // 2, len(CONTENT) - 33])
def test_a_file_cut_short_is_named(tmp_path: Path, size: int) -> None:
    (tmp_path / "m.gguf").write_bytes(CONTENT[:size])
    with pytest.raises(UserError, match=r"m\.gguf: not a whole GGUF file") as error:
        read_gguf(tmp_path / "m.gguf")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (b"GGUF\x03", b"GGUF\x09", "not a whole GGUF file"),
        (b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0rwkv7", "architecture 'rwkv7' is not read, only llama"),
        (b"blk.0.ffn_up", b"blk.0.ssm_in", "tensor 'blk.0.ssm_in.weight' is of no model that is read"),
        (b"output_norm.weight\x01\0\0\0\x40", b"output_norm.weight\x01\0\0\0\xff", None),
        (b"output_norm.weight\x01\0\0\0", b"output_norm.weight\xff\0\0\0", "not a whole GGUF file"),
        (b"llama.attention.head_count", b"llama.attention.head_couns", "not a whole GGUF file"),
    ],
)
def test_what_is_wrong_or_not_read_is_named(tmp_path: Path, before: bytes, after: bytes, said: str | None) -> None:
    assert before in CONTENT
    (tmp_path / "m.gguf").write_bytes(CONTENT.replace(before, after, 1))
    if said is None:
        assert read_gguf(tmp_path / "m.gguf")["model.norm.weight"].shape == (255,), "config.json is what refuses it"
        return
    with pytest.raises(UserError, match=said) as error:
        read_gguf(tmp_path / "m.gguf")
    assert "m.gguf" in str(error.value) and "\n" not in str(error.value)


def test_a_quantization_that_is_not_read_is_named(tmp_path: Path) -> None:
    at = CONTENT.index(b"output.weight") + len(b"output.weight") + 4 + 16
    assert struct.unpack_from("<I", CONTENT, at) == (2,), "Q4_0"
    (tmp_path / "m.gguf").write_bytes(CONTENT[:at] + struct.pack("<I", 19) + CONTENT[at + 4 :])
    with pytest.raises(
        UserError, match=r"tensor output.weight has the quantization 19 of ggml_type, which is not read"
    ):
        read_gguf(tmp_path / "m.gguf")
