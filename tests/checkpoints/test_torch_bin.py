"""pytorch_model*.bin: torch is the oracle; nothing in a file is ever executed, whatever it holds."""

import io
import json
import os
import pickle
import pickletools
import random
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save as save_safetensors

from fineline_jax.checkpoints.formats.safetensors_files import read_safetensors
from fineline_jax.checkpoints.formats.torch_bin import read_torch_bin
from fineline_jax.checkpoints.formats.torch_pickle import LARGEST, Refused, read_pickle
from fineline_jax.checkpoints.formats.weight_files import TORCH_BIN, open_weights, weight_files
from fineline_jax.errors import UserError

MARKER = "executed"


def as_bytes(array: np.ndarray) -> bytes:
    return np.ascontiguousarray(array).tobytes()


# Files that torch wrote


@pytest.fixture(scope="module")
def torch() -> Any:
    return pytest.importorskip("torch", reason="pip install -e '.[test]'")


DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_dtype_has_the_bits_that_torch_wrote(tmp_path: Path, torch: Any, protocol: int) -> None:
    numbers = torch.arange(-3, 9).reshape(3, 4)
    state = {name: numbers.to(getattr(torch, name)) for name in DTYPES}
    torch.save(state, tmp_path / "pytorch_model.bin", pickle_protocol=protocol)
    found = read_torch_bin(tmp_path / "pytorch_model.bin")
    assert list(found) == list(state)
    for name, tensor in state.items():
        assert found[name].dtype.name == name and found[name].shape == (3, 4)
        assert as_bytes(found[name].whole()) == bytes(tensor.contiguous().view(torch.uint8).numpy())


def test_views_of_a_shared_storage_have_their_own_shapes_offsets_and_strides(tmp_path: Path, torch: Any) -> None:
    base = torch.arange(60.0).reshape(5, 12)
    state = {
        "whole": base,
        "transposed": base.T,
        "middle": base[1:4, 2:9:3],
        "expanded": base[:1].expand(4, 12),
        "one": base[2, 3],
        "empty": base[:0],
        "parameter": torch.nn.Parameter(base[4:]),
    }
    torch.save(state, tmp_path / "model.bin")
    found = read_torch_bin(tmp_path / "model.bin")
    for name, tensor in state.items():
        assert found[name].shape == tuple(tensor.shape)
        assert np.array_equal(found[name].whole(), tensor.detach().numpy()), name
    assert np.array_equal(found["transposed"][slice(3, 7), slice(1, 2)], base.T[3:7, 1:2].numpy())


def test_a_state_dict_of_a_module_is_read_and_its_metadata_dropped(tmp_path: Path, torch: Any) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    torch.save(module.state_dict(), tmp_path / "model.bin")
    found = read_torch_bin(tmp_path / "model.bin")
    assert {name: as_bytes(tensor.whole()) for name, tensor in found.items()} == {
        name: as_bytes(tensor.numpy()) for name, tensor in module.state_dict().items()
    }


def test_eight_bit_floats_are_refused_by_name(tmp_path: Path, torch: Any) -> None:
    torch.save({"w": torch.ones(2).to(torch.float8_e4m3fn)}, tmp_path / "model.bin")
    with pytest.raises(UserError, match=r"tensor w is torch.float8_e4m3fn, which is not read"):
        read_torch_bin(tmp_path / "model.bin")


def test_the_legacy_format_is_named_with_its_remedy(tmp_path: Path, torch: Any) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "model.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"written by torch before 1.6 .*weights_only=True"):
        read_torch_bin(tmp_path / "model.bin")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"w": {"nested": 1}}, r"'w' is a dict, not a tensor"),
        ({"step": 3}, r"'step' is a int, not a tensor"),
        ([1, 2], r"holds a list instead of tensors"),
        ({"args": Path("x")}, r"the name 'pathlib"),
    ],
)
def test_what_is_no_state_dict_is_refused(tmp_path: Path, torch: Any, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "model.bin")
    with pytest.raises(UserError, match=message) as error:
        read_torch_bin(tmp_path / "model.bin")
    assert "\n" not in str(error.value)


def test_a_sharded_checkpoint_is_read_by_its_index(tmp_path: Path, torch: Any) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({"b": torch.zeros(3)}, tmp_path / "pytorch_model-00002-of-00002.bin")
    index = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    (tmp_path / TORCH_BIN.index).write_text(json.dumps({"weight_map": index}))
    found = open_weights(tmp_path)
    assert {name: tensor.file.name for name, tensor in found.tensors.items()} == index


def test_reading_needs_no_torch_and_no_jax(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from fineline_jax.checkpoints.formats.weight_files import open_weights\n"
        "assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


# Files made by hand


def zipped(pickled: bytes, storages: dict[str, bytes], **changes: Any) -> bytes:
    """An archive as torch.save lays it out."""
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w", changes.get("compression", zipfile.ZIP_STORED)) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", changes.get("byteorder", "little"))
        for name, data in storages.items():
            archive.writestr(f"archive/data/{name}", data)
        for name, data in changes.get("more", {}).items():
            archive.writestr(name, data)
        archive.writestr("archive/version", "3\n")
    return memory.getvalue()


class Global:
    """Pickles as a name, without the module being there."""

    def __init__(self, text: str):
        self.text = text


class Call:
    """Pickles as a call."""

    def __init__(self, function: Global, *arguments: Any):
        self.function, self.arguments = function, arguments


class Pickler(pickle._Pickler):  # the one in Python: names of absent modules can be written
    def persistent_id(self, obj: Any) -> Any:
        return obj[1:] if isinstance(obj, tuple) and obj[:1] == ("persistent",) else None

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        if isinstance(obj, Global):
            module, _, name = obj.text.rpartition(".")
            self.write(b"c" + f"{module}\n{name}\n".encode())
        elif isinstance(obj, Call):
            self.save(obj.function)
            self.save(obj.arguments)
            self.write(b"R")
        else:
            super().save(obj, save_persistent_id)


def pickled(value: Any, protocol: int = 2) -> bytes:
    memory = io.BytesIO()
    Pickler(memory, protocol).dump(value)
    return memory.getvalue()


def tensor(key: str = "0", size: Any = 6, offset: Any = 0, shape: Any = (2, 3), strides: Any = (3, 1)) -> Call:
    storage = ("persistent", "storage", Global("torch.FloatStorage"), key, "cpu", size)
    hooks = Call(Global("collections.OrderedDict"))
    return Call(Global("torch._utils._rebuild_tensor_v2"), storage, offset, shape, strides, False, hooks)


SIX = np.arange(6, dtype=np.float32)


def good() -> bytes:
    return zipped(pickled({"w": tensor(), "v": tensor("1", 4, 1, (3,), (1,))}), {"0": SIX.tobytes(), "1": bytes(16)})


def read(tmp_path: Path, content: bytes) -> dict[str, Any]:
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(content)
    return read_torch_bin(path)


def test_an_archive_made_by_hand_is_read(tmp_path: Path) -> None:
    assert np.array_equal(read(tmp_path, good())["w"].whole(), SIX.reshape(2, 3))


def executes() -> Call:
    return Call(Global("os.system"), f"touch {MARKER}")


NESTED = b"\x80\x02" + b")" + b"\x85" * 500_000 + b"."
HOSTILE = {
    "os.system": (pickled({"w": executes()}), r"the name 'os.system'"),
    "a call in a key": (pickled([executes()]), r"the name 'os.system'"),
    "builtins.eval": (pickled({"w": Call(Global("builtins.eval"), "1")}), r"the name 'builtins.eval'"),
    "getattr": (pickled({"w": Call(Global("builtins.getattr"), 1, "x")}), r"the name 'builtins.getattr'"),
    "torch.load": (pickled({"w": Call(Global("torch.load"), "x")}), r"the name 'torch.load'"),
    "a storage from bytes": (
        pickled({"w": Call(Global("torch.storage._load_from_bytes"), b"x")}, 3),
        r"the name 'torch.storage._load_from_bytes'",
    ),
    "a tensor subclass": (
        pickled({"w": Call(Global("torch._tensor._rebuild_from_type_v2"), 1)}),
        r"the name 'torch._tensor._rebuild_from_type_v2'",
    ),
    "a stacked name": (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", r"the name 'os.system'"),
    "a name with dots": (b"\x80\x04\x8c\x05torch\x8c\x0cSize.__new__\x93.", r"the name 'torch.Size.__new__'"),
    "INST": (b"\x80\x02(ios\nsystem\n.", r"opcode INST"),
    "OBJ": (b"\x80\x02(cos\nsystem\no.", r"the name 'os.system'"),
    "NEWOBJ": (b"\x80\x02ctorch\nSize\n)\x81.", r"opcode NEWOBJ"),
    "EXT1": (b"\x80\x02\x82\x01.", r"opcode EXT1"),
    "PERSID": (b"\x80\x02Px\n.", r"opcode PERSID"),
    "a call of a value": (b"\x80\x02K\x01)R.", r"a call of int"),
    "a call of a storage class": (b"\x80\x02ctorch\nFloatStorage\n)R.", r"a call of torch.FloatStorage"),
    "attributes of a tensor": (pickled({"w": tensor()})[:-2] + b"}b.", r"attributes of|makes no sense"),
    "a long integer": (b"\x80\x02\x8a\xff" + b"\x01" * 255 + b".", r"an integer of 255 bytes"),
    "a very long integer": (b"\x80\x02\x8b\xff\xff\xff\x7f\x01.", r"opcode LONG4"),
    "a string beyond the end": (b"\x80\x02X\xff\xff\xff\xffabc.", r"breaks off"),
    "a string far beyond the end": (b"\x80\x04\x8d" + b"\xff" * 8 + b"abc.", r"breaks off"),
    "an unknown memo": (b"\x80\x02j\xff\xff\xff\xff.", r"makes no sense"),
    "nested tuples": (NESTED, r"holds a tuple instead of tensors"),
    "a tuple as a key": (b"\x80\x02})" + b"2\x86" * 200 + b"K\x01s.", r"a key that is a tuple"),
    "a list in itself": (b"\x80\x02}X\x01\x00\x00\x00w]q\x00(" + b"h\x00" * 1000 + b"es.", r"'w' is a list"),
    "no stop": (b"\x80\x02}", r"breaks off"),
    "nothing": (b"", r"breaks off"),
    "an empty stack": (b"\x80\x020.", r"breaks off"),
    "marks alone": (b"\x80\x02" + b"(" * 1000 + b".", r"ends with 1000 values"),
    "protocol 0": (pickle.dumps({"w": 1}, 0), r"opcode"),
    "protocol 9": (b"\x80\x09}.", r"protocol 9"),
    "an impossible key": (pickled({"w": tensor("../../../etc/passwd")}), r"the data of tensor w is missing"),
    "no storage": (pickled({"w": tensor("7")}), r"the data of tensor w is missing"),
    "a storage too small": (pickled({"w": tensor(size=7)}), r"needs 28 bytes of data, there are 24"),
    "a shape too large": (pickled({"w": tensor(shape=(3, 3))}), r"reaches element 8 of 6"),
    "an offset too large": (pickled({"w": tensor(offset=1)}), r"reaches element 6 of 6"),
    "a huge offset": (pickled({"w": tensor(offset=1 << 60)}), r"reaches element"),
    "a negative offset": (pickled({"w": tensor(offset=-1)}), r"impossible shape"),
    "a negative stride": (pickled({"w": tensor(strides=(-3, 1))}), r"impossible shape"),
    "a negative size": (pickled({"w": tensor(shape=(-2, 3))}), r"impossible shape"),
    "too few strides": (pickled({"w": tensor(strides=(1,))}), r"impossible shape"),
    "sizes that are none": (pickled({"w": tensor(shape=("a", "b"))}), r"sizes are not integers"),
    "a tensor with a list as shape": (pickled({"w": tensor(shape=[2, 3])}), r"sizes are not integers"),
    "a name over several lines": (pickled({"a\nb": tensor()}), r"'a\\nb' is"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_pickle_is_refused_at_once_and_never_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.chdir(tmp_path)
    program, message = HOSTILE[case]
    start = time.process_time()
    with pytest.raises(UserError, match=message) as error:
        read(tmp_path, zipped(program, {"0": SIX.tobytes()}))
    assert "pytorch_model.bin" in str(error.value) and "\n" not in str(error.value)
    assert time.process_time() - start < 5
    assert not (tmp_path / MARKER).exists()


def test_a_memo_number_far_away_costs_nothing(tmp_path: Path) -> None:
    assert read(tmp_path, zipped(b"\x80\x02}r\xff\xff\xff\xff.", {})) == {}


def directory_entry(content: bytes, name: bytes) -> int:
    """Where the entry of the central directory begins."""
    return content.rindex(b"PK\x01\x02", 0, content.rindex(name))


def patched(content: bytes, at: int, form: str, value: int) -> bytes:
    return content[:at] + struct.pack(form, value) + content[at + struct.calcsize(form) :]


def hostile_archives() -> Iterator[tuple[str, bytes, str]]:
    content = good()
    entry = directory_entry(content, b"archive/data/0")
    yield "cut", content[:-40], r"not a whole PyTorch checkpoint"
    yield "cut to the half", content[: len(content) // 2], r"not a whole PyTorch checkpoint"
    yield "a few bytes", b"PK\x03\x04abc", r"not a whole PyTorch checkpoint"
    yield "empty", b"", r"it is no zip"
    yield "a web page", b"<html>not found</html>", r"it is no zip"
    pickle_of_one = pickled({"w": tensor()})
    bomb = zipped(pickle_of_one, {"0": bytes(1 << 20)}, compression=zipfile.ZIP_DEFLATED)
    yield "compressed", bomb, r"'archive/data.pkl' is compressed"
    yield (
        "a size beyond the file",
        patched(patched(content, entry + 20, "<I", 1 << 30), entry + 24, "<I", 1 << 30),
        (r"ends at byte \d+, the file has|not a whole"),
    )
    yield "two sizes", patched(content, entry + 24, "<I", 1 << 30), r"'archive/data/0' is compressed"
    yield "encrypted", patched(content, entry + 8, "<H", 1), r"'archive/data/0' is encrypted"
    yield "an offset beyond the file", patched(content, entry + 42, "<I", 1 << 30), r"does not begin where|not a whole"
    yield "another offset", patched(content, entry + 42, "<I", 7), r"does not begin where|not a whole"
    with pytest.warns(UserWarning, match="Duplicate name"):
        twice = zipped(pickle_of_one, {"0": SIX.tobytes()}, more={"archive/data/0": SIX.tobytes()})
    yield "twice", twice, r"'archive/data/0' is there twice"
    more = {"other/data.pkl": pickle_of_one}
    yield "two pickles", zipped(pickle_of_one, {"0": SIX.tobytes()}, more=more), r"2 data.pkl instead of one"
    yield "big-endian", zipped(pickle_of_one, {"0": SIX.tobytes()}, byteorder="big"), r"big-endian"
    script = zipped(pickle_of_one, {"0": SIX.tobytes()}, more={"archive/constants.pkl": b""})
    yield "a program", script, r"TorchScript"
    yield "a large pickle", zipped(bytes(LARGEST + 1), {}), r"above the limit"
    climbing = zipped(pickle_of_one, {"../../0": SIX.tobytes()})
    yield "a path that climbs", climbing, r"the data of tensor w is missing"


def test_a_broken_archive_is_refused_with_its_name(tmp_path: Path) -> None:
    for case, content, message in hostile_archives():
        with pytest.raises(UserError, match=message) as error:
            read(tmp_path, content)
        assert "pytorch_model.bin" in str(error.value) and "\n" not in str(error.value), case
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_model.bin"], "nothing is unpacked"


@pytest.mark.parametrize("content", [good(), None])
def test_a_flipped_bit_of_a_tensor_is_refused(tmp_path: Path, content: bytes | None) -> None:
    """By the CRC-32 of the zip, which torch itself does not check."""
    file = tmp_path / "pytorch_model.bin"
    if content is None:
        torch = pytest.importorskip("torch")
        torch.save({"w": torch.arange(4096.0)}, file)
        content = file.read_bytes()
    expected = {name: one.whole().tobytes() for name, one in read(tmp_path, content).items()}
    rng, refused = random.Random(0), 0
    for _ in range(400):
        changed = bytearray(content)
        changed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        try:
            found = {name: one.whole().tobytes() for name, one in read(tmp_path, bytes(changed)).items()}
        except UserError:
            refused += 1
            continue
        assert found == expected
    assert refused > 20
    crc = directory_entry(
        content, next(name for name in (b"archive/data/0", b"pytorch_model/data/0") if name in content)
    )
    assert read(tmp_path, patched(content, crc + 16, "<I", 0)), "none was computed"


# Ten thousand damaged files


def safetensors_file() -> bytes:
    return save_safetensors({"w": SIX.reshape(2, 3), "v": np.zeros(3, np.float16), "u": np.ones((2, 2), np.int32)})


SPLICES = (
    b"cos\nsystem\nX\x0e\x00\x00\x00touch executed\x85R",
    b"cbuiltins\neval\nX\x12\x00\x00\x00open('executed','w')\x85R",
    b"cbuiltins\nexec\n",
    b"(ios\nsystem\n",
    b"X\xff\xff\xff\x7f",
    b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"\x8b\xff\xff\xff\x7f",
    b"\x8a\xff",
    b"r\xff\xff\xff\xff",
    b")" + b"\x85" * 3000,
    b"(" * 3000,
    b"2" * 3000,
    b"})2\x86" * 50,
    b"ctorch._utils\n_rebuild_tensor_v2\n(NNNNt",
    b"R",
    b"b",
    b"s",
    b"u",
    b"Q",
)


def mutated(random: np.random.Generator, content: bytes, splices: tuple[bytes, ...], inside: tuple[int, int]) -> bytes:
    """Bytes flipped, pieces cut, moved or doubled, hostile opcodes put in, most of them within `inside`."""
    data = bytearray(content)
    for _ in range(int(random.integers(1, 5))):
        low, high = inside if random.random() < 0.7 else (0, len(data))
        low, high = min(low, len(data)), max(1, min(high, len(data)))
        at = int(random.integers(low, high)) if low < high else 0
        match int(random.integers(8)):
            case 0 | 1:
                data[at : at + 1] = bytes([int(random.integers(256))])
            case 2:
                data[at : at + 1] = bytes([data[at] ^ (1 << int(random.integers(8)))]) if data else b""
            case 3:
                del data[at : len(data) if random.random() < 0.3 else at + int(random.integers(1, 9))]
            case 4:
                other = int(random.integers(0, len(data) + 1))
                data[at:at] = data[other : other + int(random.integers(1, 40))]
            case 5:
                data[at : at + 4] = struct.pack("<I", int(random.choice([0, 1, 2**31 - 1, 2**32 - 1, len(data)])))
            case 6:
                splice = splices[int(random.integers(len(splices)))]
                data[at:at] = splice
            case _:
                splice = splices[int(random.integers(len(splices)))]
                data[at : at + len(splice)] = splice
        if not data:
            break
    return bytes(data)


JSON_SPLICES = (
    b'{"w":',
    b"[" * 2000,
    b"9" * 400,
    b"-1",
    b"1e400",
    b"null",
    b'"data_offsets":[0,8],',
    b'"dtype":"F8_E4M3",',
    b'"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},',
    b"\\ud800",
    b"\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"\n",
)


def damage(tmp_path: Path, kind: str, seed: int, count: int) -> dict[str, int]:
    """Read `count` damaged files: how many were read, how many refused. Anything else is an exception."""
    random = np.random.default_rng(seed)
    outcome = {"read": 0, "refused": 0}
    if kind == "bin":
        program = pickled({"w": tensor(), "v": tensor("1", 4, 1, (3,), (1,))})
        content = good()
        span = content.index(program), content.index(program) + len(program)
        file, read_file, splices = tmp_path / "pytorch_model.bin", read_torch_bin, SPLICES
    else:
        program, content = b"", safetensors_file()
        span = 0, 8 + int.from_bytes(content[:8], "little")
        file, read_file, splices = tmp_path / "model.safetensors", read_safetensors, JSON_SPLICES
    for number in range(count):
        if kind == "bin" and number % 2:  # damage inside a sound archive reaches the pickle machine
            case = zipped(mutated(random, program, splices, (2, len(program))), {"0": SIX.tobytes(), "1": bytes(16)})
        else:
            case = mutated(random, content, splices, span)
        file.write_bytes(case)
        try:
            for found in read_file(file).values():
                if found.nbytes < 1 << 20:
                    found.whole().sum()
            outcome["read"] += 1
        except UserError as error:
            assert "\n" not in str(error) and file.name in str(error)
            outcome["refused"] += 1
    return outcome


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_five_thousand_damaged_files_each_are_read_or_refused_and_never_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Any other exception than UserError fails, and so does code that runs, a file that appears, and a slow case."""
    events: list[str] = []
    watching = [True]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if watching[0] and event in ("os.system", "os.exec", "exec", "compile", "subprocess.Popen", "import"):
            events.append(f"{event} {str(arguments)[:200]}")

    monkeypatch.chdir(tmp_path)
    with np.errstate(all="ignore"):
        damage(tmp_path, kind, seed=0, count=20)  # what is imported late is imported now
        sys.addaudithook(hook)
        start = time.process_time()
        outcome = damage(tmp_path, kind, seed=1, count=5000)
        watching[0] = False
    assert outcome["read"] > 30 and outcome["refused"] > 1000
    assert not events and not os.path.exists(MARKER)
    assert time.process_time() - start < 60


# Numbers at the borders of their widths


BORDERS = sorted(
    {sign * (1 << bits) + near for bits in (7, 8, 15, 16, 31, 32, 62) for near in (-1, 0, 1) for sign in (1, -1)}
)


@pytest.mark.parametrize("protocol", [2, 4])
def test_integers_of_every_width_are_those_of_pythons_own_pickle(protocol: int) -> None:
    """BININT1 and BININT2 are unsigned, BININT and LONG1 signed."""
    data = pickle.dumps(BORDERS, protocol)
    assert {code.name for code, *_ in pickletools.genops(data)} >= {"BININT1", "BININT2", "BININT", "LONG1"}
    assert read_pickle(data) == BORDERS


def test_values_of_every_kind_are_those_of_pythons_own_pickle() -> None:
    """Texts of one, four and eight bytes of length, memo numbers above 255, tuples of 0 to 4, floats, nested dicts."""
    words = [f"w{i}" for i in range(300)]
    value = {"a": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)], "ü" * 200: {"x" * 70_000: [True, False, None, -2.5]},
             "w": words + words[::-1], 7: [[]]}  # fmt: skip
    for protocol in (2, 3, 4, 5):
        assert read_pickle(pickle.dumps(value, protocol)) == value
    assert read_pickle(b"\x80\x04\x8d" + struct.pack("<Q", 3) + b"abc.") == "abc"
    assert read_pickle(b"\x80\x02K\x05r\x00\x01\x00\x000j\x00\x01\x00\x00.") == 5
    assert read_pickle(b"\x80\x02]q\x00K\x01aK\x02a0h\x00.") == [1, 2]


def test_the_largest_pickle_has_four_mebibytes() -> None:
    """And one byte more is refused."""
    for more, fits in ((0, True), (1, False)):
        data = b"\x80\x04X" + struct.pack("<I", (1 << 22) - 8 + more) + bytes((1 << 22) - 8 + more) + b"."
        assert len(data) == (1 << 22) + more
        if fits:
            assert read_pickle(data) == "\0" * ((1 << 22) - 8)
        else:
            with pytest.raises(Refused, match="above the limit"):
                read_pickle(data)


@pytest.mark.parametrize("rows", [255, 256, 32_767, 32_768, 65_535, 65_536])
def test_dimensions_strides_and_offsets_beyond_15_and_16_bits_are_read(tmp_path: Path, torch: Any, rows: int) -> None:
    """A column, its transpose, what begins behind so many elements; two storages, one of them shared."""
    base = torch.arange(3 * rows + 5, dtype=torch.int32)
    state = {
        "rows": base[: 3 * rows].reshape(rows, 3),
        "columns": base[: 3 * rows].reshape(3, rows),  # a stride of `rows`
        "behind": base[rows:][:7],  # an offset of `rows`
        "every": base[5:].reshape(3, rows).T[1:],
        "other": torch.arange(rows).to(torch.bfloat16),
    }
    torch.save(state, tmp_path / "model.bin")
    found = read_torch_bin(tmp_path / "model.bin")
    for name, tensor in state.items():
        assert found[name].shape == tuple(tensor.shape)
        assert as_bytes(found[name].whole()) == bytes(tensor.contiguous().view(torch.uint8).numpy()), name
    part = found["rows"][slice(rows - 2, rows), slice(1, 2)]
    assert part.tolist() == state["rows"][rows - 2 :, 1:2].tolist()


def test_unsigned_dtypes_without_a_storage_class_have_their_bits(tmp_path: Path, torch: Any) -> None:
    state = {
        f"uint{bits}": torch.tensor([0, 1, (1 << bits - 1), (1 << bits) - 1], dtype=getattr(torch, f"uint{bits}"))[1:]
        for bits in (16, 32)
    }
    torch.save(state, tmp_path / "model.bin")
    found = read_torch_bin(tmp_path / "model.bin")
    assert {name: (t.dtype.name, t.whole().tolist()) for name, t in found.items()} == {
        f"uint{bits}": (f"uint{bits}", [1, 1 << bits - 1, (1 << bits) - 1]) for bits in (16, 32)
    }


def test_a_tensor_may_end_at_the_last_element_of_its_storage_and_not_behind_it(tmp_path: Path) -> None:
    """Also where the storage is said to be smaller than its data, and where the tensor is empty."""
    read_one = lambda **how: read(tmp_path, zipped(pickled({"w": tensor(**how)}), {"0": SIX.tobytes()}))["w"].whole()
    assert read_one(offset=2, shape=(2, 2), strides=(2, 1)).tolist() == [[2, 3], [4, 5]]
    assert read_one(offset=5, shape=(3,), strides=(0,)).tolist() == [5, 5, 5]
    assert read_one(offset=99, shape=(0, 4), strides=(4, 1)).shape == (0, 4)
    assert read_one(size=4, shape=(4,), strides=(1,)).tolist() == [0, 1, 2, 3]
    for how in ({"size": 4, "shape": (5,), "strides": (1,)}, {"offset": 3, "shape": (2, 2), "strides": (2, 1)}):
        with pytest.raises(UserError, match="reaches element"):
            read_one(**how)


def test_a_tensor_of_a_dtype_of_its_own_counts_the_bytes_of_its_storage(tmp_path: Path) -> None:
    """Whether or not its Python attributes are written behind its dtype."""

    def read_one(elements: int, more: tuple = ()) -> list[int]:
        storage = ("persistent", "storage", Global("torch.storage.UntypedStorage"), "0", "cpu", 8)
        place = storage, 0, (elements,), (1,), False, Call(Global("collections.OrderedDict"))
        made = Call(Global("torch._utils._rebuild_tensor_v3"), *place, Global("torch.uint16"), *more)
        return (
            read(tmp_path, zipped(pickled({"w": made}), {"0": np.arange(9, dtype="<u2").tobytes()}))["w"]
            .whole()
            .tolist()
        )

    assert read_one(4) == [0, 1, 2, 3] == read_one(4, ({},))
    with pytest.raises(UserError, match="reaches element 4 of 4"):
        read_one(5)


def test_a_sharded_checkpoint_whose_index_or_files_disagree_is_refused_by_name(tmp_path: Path, torch: Any) -> None:
    files = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    for name, file in files.items():
        torch.save({name: torch.ones(2)}, tmp_path / file)
    index = lambda found: (tmp_path / TORCH_BIN.index).write_text(json.dumps({"weight_map": found}))
    for found, said in (
        (files | {"a": files["b"]}, rf"{files['b']}: tensor a is not in it"),
        ({"a": files["b"], "b": files["a"]}, r"tensor . is not in it"),
        (files | {"c": files["a"]}, rf"{files['a']}: tensor c is not in it"),
        (files | {"c": "pytorch_model-00003-of-00003.bin"}, r"00003-of-00003.bin: missing; .* tensor c"),
        (files | {"a": f"../{tmp_path.name}/{files['a']}"}, "no file beside the index"),
        ({"a": ""}, "no file beside the index"),
        ({"a": ".."}, "no file beside the index"),
    ):
        index(found)
        with pytest.raises(UserError, match=said):
            open_weights(tmp_path)
    torch.save({"b": torch.ones(2), "a": torch.ones(2)}, tmp_path / files["b"])
    index(files)
    with pytest.raises(UserError, match=rf"{files['b']}: tensor a is also in {files['a']}"):
        open_weights(tmp_path)


def test_the_file_without_an_index_is_preferred_and_safetensors_before_torch(tmp_path: Path, torch: Any) -> None:
    def offered() -> list[str]:
        return [file.name for file in weight_files(tmp_path)]

    assert offered() == []
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model-00001-of-00001.bin")
    (tmp_path / TORCH_BIN.index).write_text('{"weight_map": {"a": "pytorch_model-00001-of-00001.bin"}}')
    assert offered() == ["pytorch_model-00001-of-00001.bin"]
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    assert offered() == ["pytorch_model.bin"]
    (tmp_path / "model-00001-of-00001.safetensors").write_bytes(safetensors_file())
    files = dict.fromkeys(("w", "v", "u"), "model-00001-of-00001.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    assert offered() == ["model-00001-of-00001.safetensors"]
    (tmp_path / "model.safetensors").write_bytes(safetensors_file())
    assert offered() == ["model.safetensors"]
    torch.save({"b": torch.ones(2)}, tmp_path / "model.pt")
    for name, tensor in (("pytorch_model.bin", "a"), ("model.pt", "b")):
        assert list(open_weights(tmp_path / name).tensors) == [tensor], "a file that is named"
