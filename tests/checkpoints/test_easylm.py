"""EasyLM's streams: flax writes them, and what EasyLM's own converter would make of them is the oracle."""

import json
import struct
from pathlib import Path
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest
from easylm_examples import to_easylm, write_stream

from fineline_jax.checkpoints.formats import huggingface
from fineline_jax.checkpoints.formats.easylm import EASYLM, _Reader, read_easylm
from fineline_jax.checkpoints.formats.weight_files import open_weights, weight_files
from fineline_jax.errors import UserError
from fineline_jax.mesh import make_mesh
from fineline_jax.recipe import MeshShape

ARRAYS = {
    ("transformer", "wte", "embedding"): np.arange(12, dtype=np.float32).reshape(3, 4),
    ("transformer", "ln_f", "kernel"): np.arange(4, dtype=np.float16),
    ("lm_head", "kernel"): np.asarray(jnp.arange(12, dtype=jnp.bfloat16).reshape(4, 3)),
}


@pytest.mark.parametrize("prefix", [(), ("params",), ("params", "params")])
def test_a_stream_is_indexed_and_read_bit_by_bit(tmp_path: Path, prefix: tuple[str, ...]) -> None:
    write_stream(tmp_path / "streaming_params", ARRAYS, prefix)
    found = open_weights(tmp_path)
    assert found.format is EASYLM
    assert {name: (tensor.dtype, tensor.whole().tobytes()) for name, tensor in found.tensors.items()} == {
        ".".join(key): (value.dtype, value.tobytes()) for key, value in ARRAYS.items()
    }


def test_of_a_training_state_only_the_parameters_are_read(tmp_path: Path) -> None:
    state = {("params", *key): value for key, value in ARRAYS.items()}
    state |= {("opt_state", "0", "mu", *key): value for key, value in ARRAYS.items()}
    state |= {("step",): np.int32(7), ("opt_state", "0", "count"): np.zeros((), np.int32)}
    write_stream(tmp_path / "streaming_train_state_7", state, ())
    assert list(read_easylm(tmp_path / "streaming_train_state_7")) == [".".join(key) for key in ARRAYS]


def test_a_flax_tree_is_read_like_a_stream(tmp_path: Path) -> None:
    tree: dict[str, Any] = {}
    for (*parents, last), value in ARRAYS.items():
        below = tree
        for name in parents:
            below = below.setdefault(name, {})
        below[last] = value
    (tmp_path / "params.msgpack").write_bytes(flax.serialization.msgpack_serialize(tree))
    found = open_weights(tmp_path).tensors
    assert {name: tensor.whole().tobytes() for name, tensor in found.items()} == {
        ".".join(key): value.tobytes() for key, value in ARRAYS.items()
    }


def test_an_array_that_flax_has_cut_is_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 40)
    write_stream(tmp_path / "streaming_params", ARRAYS)
    assert b"__msgpack_chunked_array__" in (tmp_path / "streaming_params").read_bytes()
    tensor = read_easylm(tmp_path / "streaming_params")["transformer.wte.embedding"]
    whole = ARRAYS["transformer", "wte", "embedding"]
    assert np.array_equal(tensor.whole(), whole)
    for row, column in np.ndindex(*whole.shape):
        part = np.s_[row : row + 2, column : column + 2]
        assert np.array_equal(tensor[part], whole[part])


def damaged(tmp_path: Path) -> dict[str, bytes]:
    write_stream(tmp_path / "whole", ARRAYS)
    whole = (tmp_path / "whole").read_bytes()
    pair = lambda value: msgpack.packb((["a", "b"], value))
    array = lambda *parts: msgpack.packb(msgpack.ExtType(1, msgpack.packb(parts)))
    return {
        r"needs \d+ more": whole[:-5],
        r"it ends at byte": whole[:50],
        r"where the data of a tensor should be": b"\x93\x01\x02\x03" + whole,
        r"begins no msgpack value": pair(b"\xc1"),
        r"has 8 bytes, its shape \[3\] means others": pair(array([3], "float32", bytes(8))),
        r"'a.b' is 'float8_e4m3fn', which is not read": pair(array([3], "float8_e4m3fn", bytes(3))),
        r"a size that is none": pair(array([-3], "float32", bytes(12))),
        r"'a.b' is there twice": 2 * pair(array([3], "float32", bytes(12))),
        r"needs 4294967295 more": whole + b"\x92\x91\xa1a\xc6" + struct.pack(">I", 2**32 - 1),
        r"a path of 33 parts": msgpack.packb((["a"] * 33, b"")),
        r"called 'a\\n.b'": msgpack.packb((["a\n", "b"], array([1], "float32", bytes(4)))),
        r"a msgpack array where the data": pair(msgpack.packb([1, 2])),
    }


def test_a_broken_stream_is_refused_with_its_name(tmp_path: Path) -> None:
    for message, content in damaged(tmp_path).items():
        (tmp_path / "broken").write_bytes(content)
        with pytest.raises(UserError, match=message) as error:
            read_easylm(tmp_path / "broken")
        assert str(tmp_path / "broken") in str(error.value) and "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_two_thousand_damaged_streams_are_read_or_refused(tmp_path: Path) -> None:
    write_stream(tmp_path / "whole", ARRAYS)
    whole = (tmp_path / "whole").read_bytes()
    random = np.random.default_rng(0)
    read = 0
    for _ in range(2000):
        data = bytearray(whole)
        for _ in range(int(random.integers(1, 4))):
            data[int(random.integers(len(data)))] = int(random.integers(256))
        (tmp_path / "damaged").write_bytes(data[: int(random.integers(len(data)))] if random.random() < 0.2 else data)
        try:
            for tensor in read_easylm(tmp_path / "damaged").values():
                tensor.whole().tobytes()
            read += 1
        except UserError as error:
            assert "\n" not in str(error)
    assert 100 < read < 1900


def test_two_streams_in_a_folder_have_to_be_told_apart(tmp_path: Path) -> None:
    for step in (1000, 2000):
        write_stream(tmp_path / f"streaming_params_{step}", ARRAYS)
    with pytest.raises(UserError, match=r"several EasyLM streams \(streaming_params_1000, streaming_params_2000\)"):
        open_weights(tmp_path)
    assert len(open_weights(tmp_path / "streaming_params_2000").tensors) == 3


def grouped_queries() -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """The tensors of a random Llama by their Hugging Face names, and its config.json without a class."""
    random = np.random.default_rng(0)
    draw = lambda *shape: random.normal(size=shape).astype(np.float32)
    tensors = {"model.embed_tokens.weight": draw(16, 32), "model.norm.weight": draw(32), "lm_head.weight": draw(16, 32)}
    for layer in range(2):
        shapes = {
            "input_layernorm": (32,),
            "self_attn.q_proj": (32, 32),
            "self_attn.k_proj": (16, 32),
            "self_attn.v_proj": (16, 32),
            "self_attn.o_proj": (32, 32),
            "post_attention_layernorm": (32,),
            "mlp.gate_proj": (24, 32),
            "mlp.up_proj": (24, 32),
            "mlp.down_proj": (32, 24),
        }
        tensors |= {f"model.layers.{layer}.{name}.weight": draw(*shape) for name, shape in shapes.items()}
    config = {
        "vocab_size": 16,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_sequence_length": 64,
    }
    return tensors, config


def test_rotary_rows_of_grouped_queries_are_put_in_the_decoders_order(tmp_path: Path) -> None:
    """Loaded from a stream and from safetensors, on one device and sharded, a model has the same bits."""
    tensors, config = grouped_queries()
    from safetensors.numpy import save_file

    for folder in ("hf", "easylm"):
        (tmp_path / folder).mkdir()
        architectures = {"architectures": ["LlamaForCausalLM"]} if folder == "hf" else {}
        (tmp_path / folder / "config.json").write_text(json.dumps(config | architectures))
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    write_stream(tmp_path / "easylm" / "streaming_params", to_easylm(tensors, 4, 2))

    expected_config, expected = huggingface.load_hf(tmp_path / "hf", make_mesh(MeshShape(), jax.devices()[:1]))
    for mesh in (MeshShape(), MeshShape(2, 2, 2)):
        found_config, found = huggingface.load_hf(tmp_path / "easylm", make_mesh(mesh))
        assert found_config == expected_config
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
            assert np.array_equal(np.asarray(one), np.asarray(other))


def test_a_stream_of_a_tied_llama_may_hold_the_head_and_no_other_family_is_read_from_one(tmp_path: Path) -> None:
    tensors, config = grouped_queries()
    write_stream(tmp_path / "streaming_params", to_easylm(tensors, 4, 2))
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    mesh = make_mesh(MeshShape(), jax.devices()[:1])
    _, params = huggingface.load_hf(tmp_path, mesh)
    assert "head" not in params and np.array_equal(params["embed"], tensors["model.embed_tokens.weight"])
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["Qwen2ForCausalLM"]}))
    with pytest.raises(UserError, match=r"hold models of family llama, config[.]json means qwen2"):
        huggingface.load_hf(tmp_path, mesh)


def cut_array(shape: list[int], pieces: list[tuple[str, bytes]], names: list[str] | None = None) -> bytes:
    """A stream of one array that is cut, written out from flax/serialization.py `_chunk`."""
    array = lambda dtype, data: msgpack.ExtType(1, msgpack.packb(([len(data)], dtype, data)))
    names = names or [str(i) for i in range(len(pieces))]
    chunks = {name: array(dtype, data) for name, (dtype, data) in zip(names, pieces)}
    sizes = {str(i): size for i, size in enumerate(shape)}
    value = {"__msgpack_chunked_array__": True, "shape": sizes, "chunks": chunks}
    return msgpack.packb((["params", "w"], msgpack.packb(value)))


NUMBERS = np.arange(6, dtype="<f4")


@pytest.mark.parametrize(
    ("ends", "fits"),
    [
        ([8, 16, 24], True), ([8, 16, 22, 24], False), ([16, 24], True), ([20, 24], True), ([24], True),
        ([8, 24], False),  # the last piece may be shorter than the others, not longer
        ([4, 12, 24], False), ([8, 12, 24], False), ([12, 20, 24], False), ([8, 16, 23], False),
    ],
)  # fmt: skip
def test_the_pieces_of_a_cut_array_are_equally_long_but_for_a_shorter_last_one(
    tmp_path: Path, ends: list[int], fits: bool
) -> None:
    data = NUMBERS.tobytes()
    pieces = [("float32", data[start:end]) for start, end in zip([0, *ends], ends)]
    (tmp_path / "s").write_bytes(cut_array([2, 3], pieces))
    if not fits:
        with pytest.raises(UserError, match=r"pieces do not fit|has 23 bytes"):
            read_easylm(tmp_path / "s")
        return
    found = read_easylm(tmp_path / "s")["w"]
    assert np.array_equal(found.whole(), NUMBERS.reshape(2, 3))
    assert np.array_equal(found[slice(1, 2), slice(1, 3)], [[4, 5]])


def test_pieces_of_other_dtypes_names_or_a_missing_one_are_refused(tmp_path: Path) -> None:
    data = NUMBERS.tobytes()
    halves = [("float32", data[:12]), ("float32", data[12:])]
    for content in (
        cut_array([6], [halves[0], ("int32", data[12:])]),
        cut_array([6], halves, ["1", "0"]),
        cut_array([6], halves[:1]),
        cut_array([6], []),
        cut_array([7], halves),
    ):
        (tmp_path / "s").write_bytes(content)
        with pytest.raises(UserError, match=r"pieces do not fit|means others"):
            read_easylm(tmp_path / "s")


@pytest.mark.parametrize("size", [15, 16, 23, 24, 40, 64, 100])
def test_arrays_that_flax_has_cut_anywhere_are_read_in_a_stream_and_in_a_tree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """Chunks of `size` bytes: of one element, within a row, over rows, with and without a rest."""
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", size)
    arrays = {
        ("a",): np.arange(35, dtype=np.float64).reshape(5, 7) - 9,
        ("b",): np.asarray(jnp.arange(24, dtype=jnp.bfloat16).reshape(2, 3, 4)),
    }
    write_stream(tmp_path / "stream", arrays)
    (tmp_path / "tree").write_bytes(
        flax.serialization.to_bytes({"params": {key[0]: value for key, value in arrays.items()}})
    )
    for file in ("stream", "tree"):
        found = read_easylm(tmp_path / file)
        assert {name: (t.shape, t.dtype, t.whole().tobytes()) for name, t in found.items()} == {
            ".".join(key): (value.shape, value.dtype, value.tobytes()) for key, value in arrays.items()
        }
        for start in range(7):
            part = found["a"][slice(1, 4), slice(start, start + 2)]
            assert np.array_equal(part, arrays["a",][1:4, start : start + 2])


EVERY = [
    "bfloat16",
    "bool",
    "int8",
    "uint8",
    "float16",
    "float32",
    "float64",
    "int16",
    "int32",
    "int64",
    "uint16",
    "uint32",
    "uint64",
]


def test_every_dtype_is_read_with_its_bits(tmp_path: Path) -> None:
    arrays = {(name,): np.arange(-3, 4).astype(jnp.dtype(name)) for name in EVERY}
    write_stream(tmp_path / "s", arrays)
    assert {name: (t.dtype.name, t.whole().tobytes()) for name, t in read_easylm(tmp_path / "s").items()} == {
        name: (name, value.tobytes()) for (name,), value in arrays.items()
    }


HEADS = [0, 127, 128, 255, 256, 65_535, 65_536, (1 << 32) - 1, 1 << 32, -1, -32, -33, -128, -129, -32_768, -32_769,
         -(1 << 31), -(1 << 31) - 1, 1.5, None, True, False, "", "x" * 31, "x" * 32, "x" * 255, "x" * 256, "x" * 65_535,
         "x" * 65_536, b"y" * 255, b"y" * 256, b"y" * 65_536, [1] * 15, [1] * 16, [1] * 65_536,
         *({str(i): 0 for i in range(size)} for size in (15, 16, 65_536))]  # fmt: skip


@pytest.mark.parametrize("value", HEADS, ids=lambda value: f"{type(value).__name__} {str(value)[:8]}")
def test_the_head_of_every_msgpack_value_says_what_it_is_and_where_it_ends(value: Any) -> None:
    data = msgpack.packb(value)
    reader = _Reader(data + b"\xc1", 0, len(data))  # type: ignore[arg-type]
    found = reader.value()
    assert reader.at == len(data)
    if isinstance(value, (str, bytes)):
        assert found.code is None
        assert data[found.start : found.stop] == (value.encode() if isinstance(value, str) else value)
    else:
        assert found == value and type(found) is type(value)


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16, 3, 17, 255, 256, 65_535, 65_536])
def test_extensions_of_every_length_are_jumped_over(size: int) -> None:
    data = msgpack.packb(msgpack.ExtType(127, b"z" * size))
    reader = _Reader(data, 0, len(data))  # type: ignore[arg-type]
    found = reader.value()
    assert (found.code, data[found.start : found.stop], reader.at) == (127, b"z" * size, len(data))
    time = msgpack.packb(msgpack.Timestamp(5))
    assert _Reader(time, 0, len(time)).value().code == -1  # type: ignore[arg-type]
    with pytest.raises(Exception, match="needs"):
        _Reader(data, 0, len(data) - 1).value()  # type: ignore[arg-type]


def nested(depth: int) -> bytes:
    return b"\x81\xa1a" * depth + b"\x01"


def test_trees_too_deep_too_wide_or_with_a_name_twice_are_refused(tmp_path: Path) -> None:
    """33 levels are the limit: `depth` of the innermost map is 32."""
    (tmp_path / "s").write_bytes(nested(33))
    assert read_easylm(tmp_path / "s") == {}
    wide = b"\x81\xa1a\xdf" + struct.pack(">I", 1_000_001)
    for content, said in ((nested(34), "too deep"), (nested(100_000), "too deep"), (wide, "too wide")):
        (tmp_path / "s").write_bytes(content)
        with pytest.raises(UserError, match=said):
            read_easylm(tmp_path / "s")
    (tmp_path / "s").write_bytes(b"\x82\xa1a\x01\xa1a\x01")
    with pytest.raises(UserError, match="'a' is there twice"):
        read_easylm(tmp_path / "s")


def test_what_is_no_stream_is_not_taken_for_one(tmp_path: Path) -> None:
    from fineline_jax.checkpoints.formats.easylm import is_easylm

    write_stream(tmp_path / "stream", ARRAYS)
    (tmp_path / "tree").write_bytes(flax.serialization.to_bytes({"params": {"a": np.zeros(2)}}))
    others = {"text": b"Some words", "short": b"\x92\x91", "empty": b"", "zip": b"PK\x03\x04", "array": b"\x93\x91\xa1",
              "no path": b"\x92\x90\xa1", "no text": b"\x92\x91\x01", "empty map": b"\x80\xa1a"}  # fmt: skip
    for name, content in others.items():
        (tmp_path / name).write_bytes(content)
    assert [name for name in ("stream", "tree", *others, "absent") if is_easylm(tmp_path / name)] == ["stream", "tree"]


def test_scalars_and_counts_beside_the_arrays_are_not_parameters(tmp_path: Path) -> None:
    """And `params` is left off the names twice at most."""
    arrays = {("params", "params", "params", "w"): np.ones(2), ("n",): 3, ("x", "none"): None}
    write_stream(tmp_path / "s", arrays, ())
    assert list(read_easylm(tmp_path / "s")) == ["params.w"]


def test_files_of_these_kinds_are_never_weights_whatever_they_begin_with(tmp_path: Path) -> None:
    others = [
        ".json",
        ".model",
        ".txt",
        ".md",
        ".pkl",
        ".py",
        ".safetensors",
        ".bin",
        ".pt",
        ".jinja",
        ".h5",
        ".tiktoken",
    ]
    for suffix in others:
        write_stream(tmp_path / f"x{suffix}", ARRAYS)
    (tmp_path / "folder").mkdir()
    assert weight_files(tmp_path) == []
    for name in ("x.msgpack", "x.stream", "x", "x.1000"):
        write_stream(tmp_path / name, ARRAYS)
        assert weight_files(tmp_path) == [tmp_path / name]
        (tmp_path / name).unlink()
