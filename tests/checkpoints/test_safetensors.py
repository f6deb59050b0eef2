"""safetensors files: the reference implementation is the oracle, for what is read, refused and written. No JAX."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from fineline_jax.checkpoints.formats import safetensors_files
from fineline_jax.checkpoints.formats.safetensors_files import read_safetensors, write_safetensors
from fineline_jax.errors import UserError

DTYPES = [
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint64",
    "uint32",
    "uint16",
    "uint8",
    "bool",
]
NAMES = ["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL"]


def arrays() -> dict[str, np.ndarray]:
    """One of each dtype with an odd number of elements, beside a scalar, an empty one, and one of more than a page."""
    random = np.random.default_rng(0)
    wanted = {name: np.dtype(getattr(ml_dtypes, name, name)) for name in DTYPES}
    made = {name: (99 * random.normal(size=(3, 5))).astype(dtype) for name, dtype in wanted.items()}
    large = np.arange(5 * 1021, dtype=np.float32).reshape(5, 1021)
    return made | {"scalar": np.full((), 3.5, np.float32), "empty": np.zeros((0, 4), np.float16), "large": large}


def file_of(header: Any, data: bytes, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_what_the_reference_wrote_is_read_bit_by_bit_and_part_by_part(tmp_path: Path) -> None:
    expected = arrays()
    save_file(expected, tmp_path / "m.safetensors", metadata={"format": "pt"})
    found = read_safetensors(tmp_path / "m.safetensors")
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].nbytes == array.nbytes
        assert found[name].whole().tobytes() == array.tobytes(), name
    for rows, columns in ((slice(1, 3), slice(1018, 1021)), (slice(4, 5), slice(0, 1)), (slice(2, 2), slice(0, 9))):
        assert np.array_equal(found["large"][rows, columns], expected["large"][rows, columns])


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_what_is_written_the_reference_reads_bit_by_bit_with_every_tensor_aligned(tmp_path: Path) -> None:
    expected = dict(reversed(arrays().items()))
    tensors = [(name, array.dtype, array.shape) for name, array in expected.items()]
    write_safetensors(tmp_path / "m.safetensors", tensors, lambda name, *_: expected[name].T.copy().T, {"format": "pt"})
    found = load_file(tmp_path / "m.safetensors")
    assert {name: (a.dtype, a.shape, a.tobytes()) for name, a in found.items()} == {
        name: (a.dtype, a.shape, a.tobytes()) for name, a in expected.items()
    }
    with safe_open(tmp_path / "m.safetensors", "np") as opened:
        assert opened.metadata() == {"format": "pt"}
        assert {name: opened.get_slice(name).get_dtype() for name in DTYPES} == dict(zip(DTYPES, NAMES))
    content = (tmp_path / "m.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0
    for name, tensor in read_safetensors(tmp_path / "m.safetensors").items():
        assert tensor.offset % expected[name].itemsize == 0 and tensor.offset >= 8 + length, name


A, B = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, {"dtype": "F16", "shape": [2], "data_offsets": [8, 12]}
WRONG = {
    "overlapping": (file_of({"a": A, "b": B | {"data_offsets": [6, 10]}}, bytes(12)), "b begins at 6 instead of 8"),
    "the same bytes twice": (file_of({"a": A, "b": A}, bytes(8)), "begins at 0 instead of 8"),
    "a gap": (file_of({"a": A, "b": B | {"data_offsets": [9, 13]}}, bytes(13)), "b begins at 9 instead of 8"),
    "a gap at the start": (file_of({"b": B}, bytes(12)), "b begins at 8 instead of 0"),
    "a byte behind the last": (file_of({"a": A, "b": B}, bytes(13)), "1 bytes behind its last tensor"),
    "a byte too few": (file_of({"a": A, "b": B}, bytes(11)), "it is cut short"),
    "offsets the wrong way round": (file_of({"a": A | {"data_offsets": [8, 0]}}, bytes(8)), "impossible shape"),
    "a shape of more bytes": (file_of({"a": A | {"shape": [3]}}, bytes(8)), "its shape .3. means others"),
    "a shape of fewer bytes": (file_of({"a": A | {"shape": [1]}}, bytes(8)), "its shape .1. means others"),
    "another dtype": (file_of({"a": A | {"dtype": "F64"}}, bytes(8)), "its shape .2. means others"),
    "no header": (b"", "the header ends behind"),
    "seven bytes": (bytes(7), "the header ends behind"),
    "a header cut short": (file_of({"a": A}, b"", length=99), "the header ends behind"),
    "a header of four bytes less": (file_of({}, b"", length=6), "the header ends behind"),
    "a name twice": (file_of(b'{"a":%s,"a":%s}' % (2 * (json.dumps(A).encode(),)), bytes(8)), "a is there twice"),
    "a list": (file_of([], b""), "not a JSON object"),
    "a size that is no integer": (file_of({"a": A | {"shape": [2.0]}}, bytes(8)), "impossible shape"),
    "a key more": (file_of({"a": A | {"x": 1}}, bytes(8)), "no dtype, shape and data_offsets"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_the_reference_refuses_is_refused_with_the_reason(tmp_path: Path, case: str) -> None:
    content, said = WRONG[case]
    (tmp_path / "m.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=rf"m\.safetensors: not a whole safetensors file: .*{said}"):
        read_safetensors(tmp_path / "m.safetensors")
    if case not in ("a key more", "a size that is no integer", "a name twice"):  # of which it is more tolerant
        with pytest.raises((SafetensorError, ValueError)):
            load_file(tmp_path / "m.safetensors")


def test_a_whole_file_of_no_tensors_and_one_to_the_last_byte_are_read(tmp_path: Path) -> None:
    for content, names in ((file_of({}, b""), []), (file_of({"b": B, "a": A}, bytes(12)), ["b", "a"])):
        (tmp_path / "m.safetensors").write_bytes(content)
        assert list(read_safetensors(tmp_path / "m.safetensors")) == names


def test_four_bit_floats_and_a_header_above_the_limit_are_refused(tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(file_of({"a": {"dtype": "F4", "shape": [16], "data_offsets": [0, 8]}}, bytes(8)))
    with pytest.raises(UserError, match="tensor a is 'F4', which is not read"):
        read_safetensors(path)
    assert safetensors_files.LARGEST_HEADER == 100_000_000  # MAX_HEADER_SIZE of the reference
    path.write_bytes(content := file_of({"a": A}, bytes(8)))
    length = len(content) - 16
    monkeypatch.setattr(safetensors_files, "LARGEST_HEADER", length)
    read_safetensors(path)
    monkeypatch.setattr(safetensors_files, "LARGEST_HEADER", length - 1)
    with pytest.raises(UserError, match="above the limit"):
        read_safetensors(path)


def test_a_file_that_has_become_shorter_since_it_was_opened_is_named(tmp_path: Path) -> None:
    save_file({"a": np.zeros(4096, np.float32)}, tmp_path / "m.safetensors")
    tensor = read_safetensors(tmp_path / "m.safetensors")["a"]
    (tmp_path / "m.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"m\.safetensors: tensor a cannot be read"):
        tensor.whole()
