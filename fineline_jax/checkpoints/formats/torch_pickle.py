"""The pickle inside a PyTorch checkpoint, read by a machine that knows tensors and containers and can do nothing else.

A pickle is a program. Python's unpickler imports and calls whatever it names; this one has no import and no call: it
knows the opcodes that `torch.save` writes and a list of names, each of which stands for a value made here. Anything
else is refused by its name. Opcodes: CPython Lib/pickletools.py. What torch writes: torch/serialization.py `_save`,
torch/_tensor.py `__reduce_ex__`, torch/_utils.py `_rebuild_*`.
"""

import dataclasses
import struct
from collections.abc import Callable
from typing import Any

LARGEST = 1 << 22
"""Bytes of pickle that are read: 20,000 tensors. Time and memory are proportional to it: seconds, hundreds of MB."""


class Refused(Exception):
    """What the pickle holds that is not read, as the middle of an error message."""


@dataclasses.dataclass(frozen=True)
class Storage:
    """A row of numbers in the archive that tensors are views of."""

    kind: str
    """HalfStorage, BFloat16Storage, …"""
    key: str
    size: int
    """Elements."""


@dataclasses.dataclass(frozen=True)
class View:
    """A tensor: elements of a storage. All in elements of the storage's kind."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str | None = None
    """Of the elements, where the storage does not say it (float8 and others)."""


@dataclasses.dataclass(frozen=True)
class Name:
    """A module-level name that the pickle refers to."""

    text: str


UNTYPED = ("uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
DTYPES = frozenset(f"torch.{name}" for name in UNTYPED)
"""Dtypes without a storage class of their own; files may name them, weights that are read have none of them."""
KINDS = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
STORAGES = frozenset(f"torch.{kind}Storage" for kind in KINDS) | {"torch.storage.UntypedStorage"}


def read_pickle(data: bytes) -> Any:
    """The value of the pickle: dict, list, tuple, str, int, float, bool, None, `View`.

    Raises Refused for anything else, at the first opcode or name that is not known. Attributes set on a container
    (`_metadata` of a state dict) are dropped.
    """
    if len(data) > LARGEST:
        raise Refused(f"a pickle of {len(data)} bytes, above the limit of {LARGEST}")
    machine = _Machine(data)
    try:
        return machine.run()
    except (IndexError, struct.error) as error:
        raise Refused(f"a pickle that breaks off near byte {machine.at}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise Refused(f"a pickle that makes no sense at byte {machine.at}") from error


class _Mark:
    """Where on the stack a group of items begins."""


class _Dict(dict):
    """A dict made by the pickle: keys are checked, so that hashing one takes no time to speak of."""

    def put(self, key: Any, value: Any) -> None:
        if type(key) not in (str, int):
            raise Refused(f"a dict with a key that is a {type(key).__name__}")
        self[key] = value


class _Machine:
    """Stack, memo and position. Every opcode takes bytes, and adds one value at most, so all is bounded by the size."""

    def __init__(self, data: bytes):
        self.data, self.at = data, 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        while True:
            code = self.take(1)[0]
            if code == _STOP:
                if len(self.stack) != 1:
                    raise Refused(f"a pickle that ends with {len(self.stack)} values")
                return self.stack[0]
            operation = _OPERATIONS.get(code)
            if operation is None:
                raise Refused(f"the pickle opcode {OPCODE_NAMES.get(code, hex(code))}")
            operation(self)

    def take(self, count: int) -> bytes:
        """The next bytes of the program."""
        chunk = self.data[self.at : self.at + count]
        if len(chunk) < count:
            raise IndexError
        self.at += count
        return chunk

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def line(self) -> str:
        end = self.data.index(b"\n", self.at, self.at + 256)
        return self.take(end + 1 - self.at)[:-1].decode("ascii")

    def text(self, form: str) -> None:
        self.push(self.take(self.number(form)).decode("utf-8", "surrogatepass"))

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        value = self.stack.pop()
        if isinstance(value, _Mark):
            raise ValueError
        return value

    def items(self) -> list[Any]:
        """What lies above the last mark."""
        for start in range(len(self.stack) - 1, -1, -1):
            if isinstance(self.stack[start], _Mark):
                values = self.stack[start + 1 :]
                del self.stack[start:]
                return values
        raise ValueError

    def tuple_of(self, count: int) -> None:
        self.push(tuple([self.pop() for _ in range(count)][::-1]))

    def append(self, values: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise ValueError
        self.stack[-1].extend(values)

    def set_items(self, values: list[Any]) -> None:
        if not isinstance(self.stack[-1], _Dict) or len(values) % 2:
            raise ValueError
        for key, value in zip(values[::2], values[1::2]):
            self.stack[-1].put(key, value)

    def long(self) -> None:
        count = self.number("B")
        if count > 8:
            raise Refused(f"an integer of {count} bytes")
        self.push(int.from_bytes(self.take(count), "little", signed=True))

    def global_name(self, module: str, name: str) -> None:
        text = f"{module}.{name}"
        if text not in STORAGES and text not in DTYPES and text not in _CALLS:
            raise Refused(f"the name {text[:120]!r}, which is neither a tensor nor a container")
        self.push(Name(text))

    def stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        if not (isinstance(name, str) and isinstance(module, str)):
            raise ValueError
        self.global_name(module, name)

    def persistent(self) -> None:
        """A reference to what lies beside the pickle: ("storage", class, key, device, elements)."""
        match self.pop():
            case ("storage", Name(text), str(key), str(), int(size)) if text in STORAGES:
                self.push(Storage(text.rpartition(".")[2], key, size))
            case _:
                raise Refused("a persistent id that is no storage")

    def reduce(self) -> None:
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, Name) or function.text not in _CALLS or type(arguments) is not tuple:
            raise Refused(f"a call of {function.text if isinstance(function, Name) else type(function).__name__}")
        self.push(_CALLS[function.text](arguments))

    def build(self) -> None:
        self.pop()
        if not isinstance(self.stack[-1], _Dict):
            raise Refused(f"attributes of a {type(self.stack[-1]).__name__}")

    def discard(self) -> None:
        self.stack.pop()


def _sizes(value: Any) -> tuple[int, ...]:
    if type(value) is not tuple or len(value) > 32 or any(type(size) is not int for size in value):
        raise Refused("a tensor whose sizes are not integers")
    return value


def _tensor(arguments: tuple) -> View:
    """_rebuild_tensor[_v2](storage, offset, size, stride[, requires_grad, hooks, metadata])."""
    storage, offset, shape, strides = arguments[:4]
    if not isinstance(storage, Storage) or type(offset) is not int:
        raise Refused("a tensor without a storage")
    return View(storage, offset, _sizes(shape), _sizes(strides))


def _tensor_v3(arguments: tuple) -> View:
    """_rebuild_tensor_v3(storage, offset, size, stride, requires_grad, hooks, dtype[, metadata]), for young dtypes."""
    view, dtype = _tensor(arguments), arguments[6]
    if not isinstance(dtype, Name) or dtype.text not in DTYPES:
        raise Refused("a tensor without a dtype")
    return dataclasses.replace(view, dtype=dtype.text)


def _parameter(arguments: tuple) -> View:
    """_rebuild_parameter(data, requires_grad, hooks)."""
    if not isinstance(arguments[0], View):
        raise Refused("a parameter without a tensor")
    return arguments[0]


def _ordered_dict(arguments: tuple) -> _Dict:
    if arguments:
        raise Refused("an OrderedDict with arguments")
    return _Dict()


_CALLS: dict[str, Callable[[tuple], Any]] = {
    "collections.OrderedDict": _ordered_dict,
    "torch.Size": lambda arguments: _sizes(arguments[0]),
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
}

_STOP = ord(".")
_OPERATIONS: dict[int, Callable[[_Machine], None]] = {
    0x80: lambda m: _protocol(m.number("B")),
    0x95: lambda m: _ignore(m.take(8)),  # FRAME: a hint for reading ahead
    ord("("): lambda m: m.push(_Mark()),
    ord("N"): lambda m: m.push(None),
    0x88: lambda m: m.push(True),
    0x89: lambda m: m.push(False),
    ord("J"): lambda m: m.push(m.number("<i")),
    ord("K"): lambda m: m.push(m.number("B")),
    ord("M"): lambda m: m.push(m.number("<H")),
    0x8A: _Machine.long,
    ord("G"): lambda m: m.push(m.number(">d")),
    ord("X"): lambda m: m.text("<I"),
    0x8C: lambda m: m.text("B"),
    0x8D: lambda m: m.text("<Q"),
    ord(")"): lambda m: m.push(()),
    0x85: lambda m: m.tuple_of(1),
    0x86: lambda m: m.tuple_of(2),
    0x87: lambda m: m.tuple_of(3),
    ord("t"): lambda m: m.push(tuple(m.items())),
    ord("]"): lambda m: m.push([]),
    ord("a"): lambda m: m.append([m.pop()]),
    ord("e"): lambda m: m.append(m.items()),
    ord("}"): lambda m: m.push(_Dict()),
    ord("s"): lambda m: m.set_items([m.pop(), m.pop()][::-1]),
    ord("u"): lambda m: m.set_items(m.items()),
    ord("q"): lambda m: m.memo.__setitem__(m.number("B"), m.stack[-1]),
    ord("r"): lambda m: m.memo.__setitem__(m.number("<I"), m.stack[-1]),
    0x94: lambda m: m.memo.__setitem__(len(m.memo), m.stack[-1]),
    ord("h"): lambda m: m.push(m.memo[m.number("B")]),
    ord("j"): lambda m: m.push(m.memo[m.number("<I")]),
    ord("0"): _Machine.discard,
    ord("2"): lambda m: m.push(m.stack[-1]),
    ord("c"): lambda m: m.global_name(m.line(), m.line()),
    0x93: _Machine.stack_global,
    ord("Q"): _Machine.persistent,
    ord("R"): _Machine.reduce,
    ord("b"): _Machine.build,
}

OPCODE_NAMES = {
    ord("I"): "INT",
    ord("L"): "LONG",
    ord("F"): "FLOAT",
    ord("S"): "STRING",
    ord("V"): "UNICODE",
    ord("p"): "PUT",
    ord("g"): "GET",
    ord("P"): "PERSID",
    ord("i"): "INST",
    ord("o"): "OBJ",
    ord("d"): "DICT",
    ord("l"): "LIST",
    ord("1"): "POP_MARK",
    ord("T"): "BINSTRING",
    ord("U"): "SHORT_BINSTRING",
    ord("B"): "BINBYTES",
    ord("C"): "SHORT_BINBYTES",
    0x81: "NEWOBJ",
    0x82: "EXT1",
    0x83: "EXT2",
    0x84: "EXT4",
    0x8B: "LONG4",
    0x8E: "BINBYTES8",
    0x8F: "EMPTY_SET",
    0x90: "ADDITEMS",
    0x91: "FROZENSET",
    0x92: "NEWOBJ_EX",
    0x96: "BYTEARRAY8",
    0x97: "NEXT_BUFFER",
    0x98: "READONLY_BUFFER",
}
"""Of the opcodes that `torch.save` does not write for tensors."""


def _ignore(value: bytes) -> None:
    pass


def _protocol(version: int) -> None:
    if not 2 <= version <= 5:
        raise Refused(f"pickle protocol {version}")
