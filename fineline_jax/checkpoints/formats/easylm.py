"""EasyLM's streamed msgpack, in which OpenLLaMA's JAX weights are released, and flax's msgpack of a whole tree.

A stream is a row of (path, bytes) pairs; the bytes are one array as flax.serialization writes it: an extension of type
1 that holds (shape, dtype name, data). A first pass over the file notes where the data of each array lies and reads
none of it. Sources: EasyLM/checkpoint.py `StreamingCheckpointer`, flax/serialization.py, the msgpack specification.
"""

import dataclasses
import math
import mmap
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

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
    families=(EASYLM_LLAMA,),
)


class _Broken(Exception):
    """Why the file cannot be read."""


def _index(path: Path, data: mmap.mmap) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    reader = _Reader(data, 0, len(data))
    for keys, value in _pairs(reader) if data[0] == 0x92 else _leaves(reader.value(), ()):
        leaf = _array(data, value)
        # A training state is {step, params: {params: …}, opt_state}, its `params` part {params: …}.
        if leaf is None or keys[:1] in (("step",), ("opt_state",)):
            continue
        name = ".".join(keys).removeprefix("params.").removeprefix("params.")
        if name in tensors:
            raise _Broken(f"tensor {name!r} is there twice")
        tensors[name] = _stored(path, name, leaf)
    return tensors


@dataclasses.dataclass(frozen=True)
class _Span:
    """Where the bytes of a text lie in the file, or those of an extension."""

    start: int
    stop: int
    code: int | None = None
    """Of the extension; None: a text."""


@dataclasses.dataclass(frozen=True)
class _Array:
    """Where an array lies in the file."""

    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[_Span, ...]
    """One, but of an array that flax has cut."""


def _pairs(reader: "_Reader") -> Iterator[tuple[tuple[str, ...], Any]]:
    count = 0
    while reader.at < reader.end:
        match reader.value():
            case [list(path), _Span(start, stop, None)] if path:
                if len(path) > 32:
                    raise _Broken(f"a path of {len(path)} parts at byte {reader.at}")
                yield tuple(reader.word(part) for part in path), _Reader(reader.data, start, stop).value()
            case _:
                raise _Broken(f"no pair of a path and an array before byte {reader.at}")
        if (count := count + 1) > MOST_ENTRIES:
            raise _Broken(f"too many entries at byte {reader.at}")


def _leaves(value: Any, keys: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The values in a tree of maps, but for the maps of arrays that flax has cut."""
    if not isinstance(value, dict) or _CHUNKED in value:
        yield keys, value
        return
    for key, below in value.items():
        yield from _leaves(below, (*keys, key))


_CHUNKED = "__msgpack_chunked_array__"


def _array(data: mmap.mmap, value: Any) -> _Array | None:
    """An array as flax writes it, cut where it is above 1 GiB; None for what is none (a step count)."""
    match value:
        case _Span(start, stop, 1):
            reader = _Reader(data, start, stop)
            match reader.value():
                case [list(shape), _Span(code=None) as dtype, _Span(code=None) as content]:
                    return _Array(_sizes(shape, stop), reader.word(dtype), (content,))
            raise _Broken(f"an array without shape, dtype and data at byte {start}")
        case {"__msgpack_chunked_array__": _, "shape": dict(shape), "chunks": dict(chunks)}:
            pieces = [_array(data, chunk) for chunk in chunks.values()]
            whole = [piece for piece in pieces if piece is not None and len(piece.pieces) == 1]
            spans = tuple(piece.pieces[0] for piece in whole)
            sizes = [span.stop - span.start for span in spans]
            if (
                not whole
                or len(whole) < len(pieces)
                or list(chunks) != [str(number) for number in range(len(pieces))]
                or len({piece.dtype for piece in whole}) > 1
                or any(size != sizes[0] for size in sizes[:-1])
                or sizes[-1] > sizes[0]
            ):
                raise _Broken("a cut array whose pieces do not fit")
            return _Array(_sizes(shape.values(), spans[-1].stop), whole[0].dtype, spans)
        case dict() | list():
            kind = "map" if isinstance(value, dict) else "array"
            raise _Broken(f"a msgpack {kind} where the data of a tensor should be")
    return None


def _sizes(values: Iterable[Any], at: int) -> tuple[int, ...]:
    sizes = tuple(values)
    if any(type(size) is not int or size < 0 for size in sizes):
        raise _Broken(f"a size that is none before byte {at}")
    return sizes


def _stored(path: Path, name: str, leaf: _Array) -> StoredTensor:
    if not name.isprintable():
        raise _Broken(f"a tensor is called {name[:120]!r}")
    dtype = DTYPES.get(leaf.dtype)
    if dtype is None:
        raise _Broken(f"tensor {name!r} is {leaf.dtype!r}, which is not read")
    sizes = [piece.stop - piece.start for piece in leaf.pieces]
    if len(leaf.shape) > 32 or math.prod(leaf.shape) * dtype.itemsize != sum(sizes):
        raise _Broken(f"tensor {name!r} has {sum(sizes)} bytes, its shape {list(leaf.shape)} means others")
    first, *more = (piece.start for piece in leaf.pieces)
    return StoredTensor(
        name, path, dtype, leaf.shape, first, row_major(leaf.shape, dtype.itemsize), sizes[0], tuple(more)
    )


class _Reader:
    """Reads msgpack values between two offsets of the file; of texts and extensions, where they lie."""

    def __init__(self, data: mmap.mmap, at: int, end: int):
        self.data, self.at, self.end = data, at, end

    def span(self, count: int, code: int | None = None) -> _Span:
        if count > self.end - self.at:
            raise _Broken(f"it ends at byte {self.end}, what begins at {self.at} needs {count} more")
        self.at += count
        return _Span(self.at - count, self.at, code)

    def number(self, form: str) -> Any:
        where = self.span(struct.calcsize(form))
        return struct.unpack(form, self.data[where.start : where.stop])[0]

    def value(self, depth: int = 0) -> Any:
        """A number, None, True or False; a `_Span`; a list, or a dict by words."""
        head = self.number("B")
        if head <= 0x7F or head >= 0xE0:
            return head if head <= 0x7F else head - 256
        if head in _CONSTANTS:
            return _CONSTANTS[head]
        if head in _NUMBERS:
            return self.number(_NUMBERS[head])
        if _is_text(head):
            return self.span(self.number(_TEXTS[head]) if head in _TEXTS else head & 0x1F)
        if head in _EXTENSIONS:
            length = _EXTENSIONS[head]
            size = length if isinstance(length, int) else self.number(length)
            code = self.number("b")
            return self.span(size, code)
        if head > 0x9F and head not in _GROUPS:
            raise _Broken(f"byte {self.at - 1} begins no msgpack value")
        count = self.number(_GROUPS[head]) if head in _GROUPS else head & 0x0F
        if depth > 32 or count > MOST_ENTRIES:
            raise _Broken(f"a tree too deep or too wide at byte {self.at}")
        if 0x8F < head < 0xDE:
            return [self.value(depth + 1) for _ in range(count)]
        values: dict[str, Any] = {}
        for _ in range(count):
            if (key := self.word(self.value(depth + 1))) in values:
                raise _Broken(f"{key[:120]!r} is there twice")
            values[key] = self.value(depth + 1)
        return values

    def word(self, where: Any) -> str:
        """The text that lies there."""
        if not isinstance(where, _Span) or where.code is not None or where.stop - where.start > 1000:
            raise _Broken(f"no name before byte {self.at}")
        return self.data[where.start : where.stop].decode()


def _is_text(head: int) -> bool:
    return 0xA0 <= head <= 0xBF or head in _TEXTS


_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
_NUMBERS = dict(zip(range(0xCA, 0xD4), (">f", ">d", ">B", ">H", ">I", ">Q", ">b", ">h", ">i", ">q")))
_TEXTS = {0xC4: ">B", 0xC5: ">H", 0xC6: ">I", 0xD9: ">B", 0xDA: ">H", 0xDB: ">I"}
_GROUPS = {0xDC: ">H", 0xDD: ">I", 0xDE: ">H", 0xDF: ">I"}
"""Arrays, then maps."""
_EXTENSIONS: dict[int, int | str] = {0xC7: ">B", 0xC8: ">H", 0xC9: ">I", 0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}
