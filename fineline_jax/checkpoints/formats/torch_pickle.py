"""The pickle inside a PyTorch checkpoint, read by a machine that knows tensors and containers and can do nothing else.

A pickle is a program. Python's unpickler imports and calls whatever it names; this one has no import and no call: it
knows the opcodes that `torch.save` writes and a list of names, each of which stands for a value made here. Anything
else is refused by its name. Opcodes: CPython Lib/pickletools.py. What torch writes: torch/serialization.py `_save`,
torch/_tensor.py `__reduce_ex__`, torch/_utils.py `_rebuild_*`.
"""

import dataclasses
import io
import pickletools
import re
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


@dataclasses.dataclass(eq=False)
class Record:
    """An object of a class that the reader of the pickle has named: its fields, and nothing that it could do."""

    kind: str
    """The module-level name of the class."""
    state: Any = None
    """What the pickle sets as the fields: a dict, where the class does not say otherwise."""


def read_pickle(data: bytes, records: str = "") -> Any:
    """The value of the pickle: dict, list, tuple, str, int, float, bool, None, `View`, `Record` of the classes whose
    names fit the regular expression `records`.

    Raises Refused for anything else, at the first opcode or name that is not known. Attributes set on a container
    (`_metadata` of a state dict) are dropped.
    """
    if len(data) > LARGEST:
        raise Refused(f"a pickle of {len(data)} bytes, above the limit of {LARGEST}")
    machine, program = _Machine(records), io.BytesIO(data)
    try:
        while (code := program.read(1)) != b".":
            opcode = _OPCODES.get(code)
            if opcode is None or opcode.name not in _OPERATIONS:
                raise Refused(f"the pickle opcode {opcode.name if opcode else hex(code[0])}")
            _OPERATIONS[opcode.name](machine, opcode.arg.reader(program) if opcode.arg else None)
        if len(machine.stack) != 1:
            raise Refused(f"a pickle that ends with {len(machine.stack)} values")
        return machine.stack[0]
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise Refused(f"a pickle that breaks off or makes no sense near byte {program.tell()}") from error


_OPCODES = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}


class _Mark:
    """Where on the stack a group of items begins."""


class _Dict(dict):
    """A dict made by the pickle: keys are checked, so that hashing one takes no time to speak of."""

    def put(self, key: Any, value: Any) -> None:
        if type(key) not in (str, int, Record):
            raise Refused(f"a dict with a key that is a {type(key).__name__}")
        self[key] = value


class _Machine:
    """Stack and memo. Every opcode takes bytes, and adds one value at most, so all is bounded by the size."""

    def __init__(self, records: str):
        self.records = re.compile(records or "(?!)")
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

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

    def long(self, value: int) -> None:
        if value.bit_length() > 63:
            raise Refused(f"an integer of {value.bit_length() // 8 + 1} bytes")
        self.push(value)

    def global_name(self, text: str) -> None:
        if text not in STORAGES and text not in DTYPES and text not in _CALLS and not self.records.fullmatch(text):
            raise Refused(f"the name {text[:120]!r}, which is neither a tensor nor a container")
        self.push(Name(text))

    def stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        if not (isinstance(name, str) and isinstance(module, str)):
            raise ValueError
        self.global_name(f"{module}.{name}")

    def persistent(self) -> None:
        """A reference to what lies beside the pickle: ("storage", class, key, device, elements)."""
        match self.pop():
            case ("storage", Name(text), str(key), str(), int(size)) if text in STORAGES:
                self.push(Storage(text.rpartition(".")[2], key, size))
            case _:
                raise Refused("a persistent id that is no storage")

    def reduce(self) -> None:
        arguments, function = self.pop(), self.pop()
        name = function.text if isinstance(function, Name) else type(function).__name__
        if type(arguments) is not tuple or (name not in _CALLS and not self.records.fullmatch(name)):
            raise Refused(f"a call of {name}")
        self.push(_CALLS[name](arguments) if name in _CALLS else Record(name, arguments))

    def new_object(self) -> None:
        """A `Record`, whose fields follow; never a call."""
        arguments, kind = self.pop(), self.pop()
        if not isinstance(kind, Name) or not self.records.fullmatch(kind.text) or arguments != ():
            raise Refused("the pickle opcode NEWOBJ")
        self.push(Record(kind.text))

    def build(self) -> None:
        state, built = self.pop(), self.stack[-1]
        if isinstance(built, Record):
            built.state = state
        elif not isinstance(built, _Dict):
            raise Refused(f"attributes of a {type(built).__name__}")

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

_OPERATIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda m, version: _protocol(version),
    "FRAME": lambda m, size: None,  # a hint for reading ahead
    "MARK": lambda m, _: m.push(_Mark()),
    "NONE": lambda m, _: m.push(None),
    "NEWTRUE": lambda m, _: m.push(True),
    "NEWFALSE": lambda m, _: m.push(False),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "BINFLOAT"), _Machine.push),
    "LONG1": _Machine.long,
    **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"), _Machine.push),
    "EMPTY_TUPLE": lambda m, _: m.push(()),
    "TUPLE1": lambda m, _: m.tuple_of(1),
    "TUPLE2": lambda m, _: m.tuple_of(2),
    "TUPLE3": lambda m, _: m.tuple_of(3),
    "TUPLE": lambda m, _: m.push(tuple(m.items())),
    "EMPTY_LIST": lambda m, _: m.push([]),
    "APPEND": lambda m, _: m.append([m.pop()]),
    "APPENDS": lambda m, _: m.append(m.items()),
    "EMPTY_DICT": lambda m, _: m.push(_Dict()),
    "SETITEM": lambda m, _: m.set_items([m.pop(), m.pop()][::-1]),
    "SETITEMS": lambda m, _: m.set_items(m.items()),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), lambda m, place: m.memo.__setitem__(place, m.stack[-1])),
    "MEMOIZE": lambda m, _: m.memo.__setitem__(len(m.memo), m.stack[-1]),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda m, place: m.push(m.memo[place])),
    "POP": lambda m, _: m.discard(),
    "DUP": lambda m, _: m.push(m.stack[-1]),
    "GLOBAL": lambda m, text: m.global_name(text.replace(" ", ".")),
    "STACK_GLOBAL": lambda m, _: m.stack_global(),
    "BINPERSID": lambda m, _: m.persistent(),
    "REDUCE": lambda m, _: m.reduce(),
    "NEWOBJ": lambda m, _: m.new_object(),
    "BUILD": lambda m, _: m.build(),
}


def _protocol(version: int) -> None:
    if not 2 <= version <= 5:
        raise Refused(f"pickle protocol {version}")
