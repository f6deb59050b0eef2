"""EasyLM's streamed msgpack, in which OpenLLaMA's JAX weights are released, and flax's msgpack of a whole tree.

A stream is a row of (path, bytes) pairs; the bytes are one array as flax.serialization writes it: an extension of type
1 that holds (shape, dtype name, data). A first pass over the file notes where the data of each array lies and reads
none of it. Sources: EasyLM/checkpoint.py `StreamingCheckpointer`, flax/serialization.py, the msgpack specification.
"""

import dataclasses
import math
import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fineline_jax.checkpoints.formats.lazy_tensor import BFLOAT16, StoredTensor, row_major
from fineline_jax.checkpoints.formats.weight_format import WeightFormat
from fineline_jax.errors import UserError
from fineline_jax.models.families.llama import LLAMA
from fineline_jax.models.families.name_map import Weight

_LAYER = "transformer.h.{layer}."
# EasyLM rotates neighbouring features, as Meta's code does; the decoder rotates feature j with j + head_dim / 2.
_ROTARY = "width (heads half 2:pair) -> width heads (2:pair half)"
EASYLM_LLAMA = dataclasses.replace(
    LLAMA,
    weights=(
        Weight("transformer.wte.embedding", "embed", "vocab width -> vocab width"),
        Weight(_LAYER + "attention_norm.kernel", "layers.attention_norm", "width -> width"),
        Weight(_LAYER + "attention.wq.kernel", "layers.q", _ROTARY),
        Weight(_LAYER + "attention.wk.kernel", "layers.k", _ROTARY),
        Weight(_LAYER + "attention.wv.kernel", "layers.v", "width (heads dim) -> width heads dim"),
        Weight(_LAYER + "attention.wo.kernel", "layers.o", "(heads dim) width -> heads dim width"),
        Weight(_LAYER + "ffn_norm.kernel", "layers.mlp_norm", "width -> width"),
        Weight(_LAYER + "feed_forward.w1.kernel", "layers.gate", "width mlp -> width mlp"),
        Weight(_LAYER + "feed_forward.w3.kernel", "layers.up", "width mlp -> width mlp"),
        Weight(_LAYER + "feed_forward.w2.kernel", "layers.down", "mlp width -> mlp width"),
        Weight("transformer.ln_f.kernel", "norm", "width -> width"),
        Weight("lm_head.kernel", "head", "width vocab -> width vocab"),
    ),
    tied_copies=("lm_head.kernel",),
)
"""EasyLM/models/llama/llama_model.py `FlaxLLaMAForCausalLM`, path parts joined by dots."""

DTYPES = {"bfloat16": BFLOAT16, "bool": np.dtype("?"), "int8": np.dtype("i1"), "uint8": np.dtype("u1")} | {
    f"{kind}{bits}": np.dtype(f"{kind}{bits}").newbyteorder("<")
    for kind, sizes in (("float", (16, 32, 64)), ("int", (16, 32, 64)), ("uint", (16, 32, 64)))
    for bits in sizes
}
"""By flax's name for them."""
MOST_ENTRIES = 1_000_000
NEVER_STREAMS = (
    *(".json", ".model", ".txt", ".md", ".pkl", ".py", ".safetensors", ".bin", ".pt", ".jinja", ".h5", ".tiktoken"),
)
"""Suffixes of files that are not opened to see whether they are EasyLM streams."""


def is_easylm(path: Path) -> bool:
    """Whether the file begins like a stream of (path, array) pairs or like a flax tree of parameters."""
    if path.suffix in NEVER_STREAMS:
        return False
    try:
        with path.open("rb") as file:
            start = file.read(3)
    except OSError:
        return False
    if len(start) < 3:
        return False
    pair = start[0] == 0x92 and 0x91 <= start[1] <= 0x9F and _is_text(start[2])
    return pair or (0x81 <= start[0] <= 0x8F and _is_text(start[1]))


def read_easylm(path: Path) -> dict[str, StoredTensor]:
    """The parameters in the file `path`, by their path with dots, without a leading `params`; reads no data.

    Of a whole training state only the parameters are listed. Raises UserError naming the file, and the tensor where
    one is to blame, for anything but a whole valid file.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _index(path, data)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; fetch it") from error
    except (_Broken, struct.error, IndexError, ValueError) as error:
        why = str(error) if isinstance(error, _Broken) else "it breaks off"
        raise UserError(f"{path}: not a whole EasyLM checkpoint: {why}; fetch it again") from error


EASYLM = WeightFormat(
    "EasyLM streams",
    r"(?!LICENSE|NOTICE|README|Makefile|Dockerfile)[^.]+|.+\.(msgpack|stream)",
    read_easylm,
    recognises=is_easylm,
    family=EASYLM_LLAMA,
)


class _Broken(Exception):
    """Why the file cannot be read."""


def _index(path: Path, data: mmap.mmap) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    reader = _Reader(data, 0, len(data))
    entries = _pairs(reader) if data[0] == 0x92 else _leaves(reader, reader.token(), (), 0)
    for keys, leaf in entries:
        # A training state is {step, params: {params: …}, opt_state}, its `params` part {params: …}.
        if leaf is None or keys[:1] in (("step",), ("opt_state",)):
            continue
        name = ".".join(keys).removeprefix("params.").removeprefix("params.")
        if name in tensors:
            raise _Broken(f"tensor {name!r} is there twice")
        tensors[name] = _stored(path, name, leaf)
    return tensors


@dataclasses.dataclass(frozen=True)
class _Array:
    """Where an array lies in the file."""

    shape: tuple[int, ...]
    dtype: str
    start: int
    stop: int
    more: tuple["_Array", ...] = ()
    """The further pieces of an array that flax has cut."""


def _pairs(reader: "_Reader") -> Iterator[tuple[tuple[str, ...], _Array | None]]:
    count = 0
    while reader.at < reader.end:
        if reader.expect("array") != 2:
            raise _Broken(f"no pair of a path and an array at byte {reader.at}")
        keys = tuple(reader.words())
        start, stop = reader.expect("text")
        yield keys, _leaf(_Reader(reader.data, start, stop))
        count += 1
        if not keys or count > MOST_ENTRIES:
            raise _Broken(f"an entry without a path, or too many, at byte {reader.at}")


def _leaves(
    reader: "_Reader", token: "_Token", keys: tuple[str, ...], depth: int
) -> Iterator[tuple[tuple[str, ...], _Array | None]]:
    """The arrays of a tree of maps, which `token` begins."""
    if token.kind != "map":
        yield keys, _leaf(reader, token)
        return
    if depth > 32 or token.value > MOST_ENTRIES:
        raise _Broken(f"a tree too deep or too wide at byte {reader.at}")
    for _ in range(token.value):
        key = reader.word()
        if key == _CHUNKED:
            reader.token()
            yield keys, _chunked(reader)
            return
        yield from _leaves(reader, reader.token(), (*keys, key), depth + 1)


_CHUNKED = "__msgpack_chunked_array__"


def _leaf(reader: "_Reader", token: "_Token | None" = None) -> _Array | None:
    """One value as flax writes it; None for what is no array (a step count)."""
    token = token or reader.token()
    if token.kind == "ext" and token.code == 1:
        inner = _Reader(reader.data, *token.value)
        if inner.expect("array") != 3:
            raise _Broken(f"an array without shape, dtype and data at byte {inner.at}")
        shape = tuple(inner.size() for _ in range(inner.expect("array")))
        dtype = inner.word()
        return _Array(shape, dtype, *inner.expect("text"))
    if token.kind == "map" and token.value == 3 and reader.word() == _CHUNKED:
        reader.token()
        return _chunked(reader)
    if token.kind in ("map", "array"):
        raise _Broken(f"a msgpack {token.kind} where the data of a tensor should be, at byte {reader.at}")
    return None


def _chunked(reader: "_Reader") -> _Array:
    """The rest of {marker: true, shape: {"0": n, …}, chunks: {"0": array, …}}, which flax writes above 1 GiB."""
    if reader.word() != "shape":
        raise _Broken(f"a cut array without a shape at byte {reader.at}")
    shape = []
    for _ in range(reader.expect("map")):
        reader.word()
        shape.append(reader.size())
    if reader.word() != "chunks":
        raise _Broken(f"a cut array without pieces at byte {reader.at}")
    pieces = []
    for number in range(reader.expect("map")):
        piece = _leaf(reader) if reader.word() == str(number) else None
        if piece is None or piece.more or (pieces and piece.dtype != pieces[0].dtype):
            raise _Broken(f"a cut array whose pieces do not fit at byte {reader.at}")
        pieces.append(piece)
    sizes = [piece.stop - piece.start for piece in pieces]
    if not pieces or any(size != sizes[0] for size in sizes[:-1]) or sizes[-1] > sizes[0]:
        raise _Broken(f"a cut array whose pieces do not fit at byte {reader.at}")
    return _Array(tuple(shape), pieces[0].dtype, pieces[0].start, pieces[0].stop, tuple(pieces[1:]))


def _stored(path: Path, name: str, leaf: _Array) -> StoredTensor:
    if not name.isprintable():
        raise _Broken(f"a tensor is called {name[:120]!r}")
    dtype = DTYPES.get(leaf.dtype)
    if dtype is None:
        raise _Broken(f"tensor {name!r} is {leaf.dtype!r}, which is not read")
    size = sum(piece.stop - piece.start for piece in (leaf, *leaf.more))
    if len(leaf.shape) > 32 or math.prod(leaf.shape) * dtype.itemsize != size:
        raise _Broken(f"tensor {name!r} has {size} bytes, its shape {list(leaf.shape)} means others")
    strides = row_major(leaf.shape, dtype.itemsize)
    more = tuple(piece.start for piece in leaf.more)
    return StoredTensor(name, path, dtype, leaf.shape, leaf.start, strides, leaf.stop - leaf.start, more)


@dataclasses.dataclass(frozen=True)
class _Token:
    """The head of a msgpack value. value: entries of a map or array, (start, stop) of text and ext, else the value."""

    kind: Literal["map", "array", "text", "ext", "value"]
    value: Any
    code: int = 0


class _Reader:
    """Reads msgpack heads between two offsets of the file and jumps over the data behind them."""

    def __init__(self, data: mmap.mmap, at: int, end: int):
        self.data, self.at, self.end = data, at, end

    def take(self, count: int) -> bytes:
        start, stop = self.skip(count)
        return self.data[start:stop]

    def skip(self, count: int) -> tuple[int, int]:
        if count > self.end - self.at:
            raise _Broken(f"it ends at byte {self.end}, what begins at {self.at} needs {count} more")
        self.at += count
        return self.at - count, self.at

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def token(self) -> _Token:
        head = self.take(1)[0]
        if head <= 0x7F or head >= 0xE0:
            return _Token("value", head if head <= 0x7F else head - 256)
        if head <= 0x8F:
            return _Token("map", head & 0x0F)
        if head <= 0x9F:
            return _Token("array", head & 0x0F)
        if head <= 0xBF:
            return _Token("text", self.skip(head & 0x1F))
        if head in _CONSTANTS:
            return _Token("value", _CONSTANTS[head])
        if head in _NUMBERS:
            return _Token("value", self.number(_NUMBERS[head]))
        if head in _TEXTS:
            return _Token("text", self.skip(self.number(_TEXTS[head])))
        if head in _GROUPS:
            kind, form = _GROUPS[head]
            return _Token(kind, self.number(form))
        if head in _EXTENSIONS:
            length = _EXTENSIONS[head]
            size = length if isinstance(length, int) else self.number(length)
            code = self.number("b")
            return _Token("ext", self.skip(size), code)
        raise _Broken(f"byte {self.at - 1} begins no msgpack value")

    def expect(self, kind: str) -> Any:
        token = self.token()
        if token.kind != kind:
            raise _Broken(f"no {kind} before byte {self.at}")
        return token.value

    def word(self) -> str:
        start, stop = self.expect("text")
        if stop - start > 1000:
            raise _Broken(f"a name of {stop - start} bytes at byte {start}")
        return self.data[start:stop].decode()

    def words(self) -> list[str]:
        count = self.expect("array")
        if count > 32:
            raise _Broken(f"a path of {count} parts at byte {self.at}")
        return [self.word() for _ in range(count)]

    def size(self) -> int:
        value = self.expect("value")
        if type(value) is not int or value < 0:
            raise _Broken(f"a size that is none before byte {self.at}")
        return value


def _is_text(head: int) -> bool:
    return 0xA0 <= head <= 0xBF or head in _TEXTS


_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
_NUMBERS = dict(zip(range(0xCA, 0xD4), (">f", ">d", ">B", ">H", ">I", ">Q", ">b", ">h", ">i", ">q")))
_TEXTS = {0xC4: ">B", 0xC5: ">H", 0xC6: ">I", 0xD9: ">B", 0xDA: ">H", 0xDB: ">I"}
_GROUPS: dict[int, tuple[Literal["map", "array"], str]] = {
    0xDC: ("array", ">H"),
    0xDD: ("array", ">I"),
    0xDE: ("map", ">H"),
    0xDF: ("map", ">I"),
}
_EXTENSIONS: dict[int, int | str] = {0xC7: ">B", 0xC8: ">H", 0xC9: ">I", 0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}
