"""Reading a scheduled HLO module of one device: its collectives, and its largest values."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8} | {f"{s}{8 * n}": n for s in "su" for n in (1, 2, 4, 8)}
_SHAPE = re.compile(rf"\b({'|'.join(_BYTES)})\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
_COMPUTES = ("fusion", "convolution", "custom-call", "while", "dot")
_HOLDS_NOTHING = ("parameter", "tuple", "get-tuple-element", "while", "bitcast", "call", "conditional")


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    shape: str
    operation: str
    rest: str
    """Operands and attributes."""

    def called(self, attribute: str = "calls") -> str | None:
        match = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.rest)
        return match[1] if match else None

    @property
    def scope(self) -> str:
        """Where in the model it was written: the names of the scopes that `models` sets."""
        match = re.search(r'op_name="([^"]*)"', self.rest)
        known = re.findall(r"\b(embed|attention|norm|mlp|mamba|gated_delta|head)\b", match[1]) if match else []
        return known[-1] if known else ""


@dataclasses.dataclass(frozen=True)
class Collective:
    """The collectives of one kind and size."""

    kind: str
    bytes: int
    """Of the whole value, not of a device's part of it."""
    times: int
    """Per step."""
    overlapped: int
    """Of these, those between whose start and end the device computes."""
    shape: str
    """Of its largest array; some are combined of several."""
    devices: int
    """That take part in each."""


@dataclasses.dataclass(frozen=True)
class Value:
    """An array of a step."""

    shape: str
    bytes: int
    scope: str


Computations = Mapping[str, list[Instruction]]


def computations(text: str) -> tuple[str, Computations]:
    """The name of the entry, and the instructions of every computation in the order in which they run."""
    found: dict[str, list[Instruction]] = {}
    entry, name = "", ""
    for line in text.splitlines():
        header = re.match(r"^(ENTRY )?%?([\w.\-]+)\s.*\{\s*$", line)
        if header and not line.startswith("HloModule"):
            name = header[2]
            entry = name if header[1] else entry
            found[name] = []
        elif name and (match := _INSTRUCTION.match(line)):
            found[name].append(Instruction(*match.groups()))
    return entry, found


def times_run(entry: str, found: Computations) -> dict[str, int]:
    """How often each computation runs in a step; those that fusions call are not in it."""
    times: dict[str, int] = collections.defaultdict(int)

    def walk(name: str, count: int) -> None:
        times[name] += count
        for one in found.get(name, []):
            if one.operation == "while":
                walk(one.called("body") or "", count * _rounds(one, found))
            elif one.operation == "call":
                walk(one.called("to_apply") or "", count)
            elif one.operation == "conditional":
                branches = re.search(r"branch_computations=\{([^}]*)\}", one.rest)
                names = (
                    branches[1].split(",") if branches else re.findall(r"(?:true|false)_computation=([^,]+)", one.rest)
                )
                for branch in names:
                    walk(branch.strip().lstrip("%"), count)

    walk(entry, 1)
    return times


def _rounds(loop: Instruction, found: Computations) -> int:
    """How often a loop goes round: as XLA says, else the largest constant in its condition."""
    known = re.search(r"known_trip_count\W+n\W+(\d+)", loop.rest)
    if known:
        return int(known[1])
    condition = found.get(loop.called("condition") or "", [])
    inner = [one for called in condition for one in found.get(called.called() or "", [])]
    constants = [
        one.rest for one in (*condition, *inner) if one.operation == "constant" and one.shape.startswith("s32[]")
    ]
    return max((int(re.match(r"\d*", text)[0] or 0) for text in constants), default=1) or 1  # pyright: ignore


def size(dtype: str, dims: str) -> int:
    """Bytes of an array: f32, 8,16 -> 512."""
    return math.prod(map(int, filter(None, dims.split(",")))) * _BYTES[dtype]


def results(collective: Instruction) -> list[tuple[str, str]]:
    """(dtype, dims) of the arrays that a collective gives; what starts one names its operands before them."""
    arrays = _SHAPE.findall(collective.shape)
    if collective.operation.endswith("-start") and not collective.operation.startswith("all-reduce"):
        arrays = [array for array in arrays if array[1]]  # without its state
        return arrays[len(arrays) // 2 :]
    return arrays


def collectives(text: str) -> list[Collective]:
    """Those of a step, the most bytes first."""
    entry, found = computations(text)
    counts: dict[tuple[str, int, str, int], list[int]] = collections.defaultdict(lambda: [0, 0])
    for name, times in times_run(entry, found).items():
        for index, one in enumerate(found.get(name, [])):
            for inner in _collectives_of(one, found):
                kind = inner.operation.removesuffix("-start")
                if "all-reduce-scatter" in (one.called() or ""):  # how TPUs scatter sums of other shapes
                    kind = "reduce-scatter"
                devices, arrays = _devices(inner), results(inner)
                whole = sum(size(*array) for array in arrays)
                whole *= devices if inner.operation.startswith("reduce-scatter") else 1
                count = counts[kind, whole, "{}[{}]".format(*max(arrays, key=lambda array: size(*array))), devices]
                count[0] += times
                count[1] += times * _is_overlapped(one, found[name][index + 1 :])
    listed = [
        Collective(kind, whole, n, hidden, shape, devices)
        for (kind, whole, shape, devices), (n, hidden) in counts.items()
    ]
    return sorted(listed, key=lambda one: -one.bytes * one.times)


def _collectives_of(one: Instruction, found: Computations, depth: int = 0) -> Iterator[Instruction]:
    """The instruction if it is a collective, or those in the computation that it calls. What a TPU started it goes on
    with in other fusions, and ends in one; it is counted where it starts."""
    if one.operation.removesuffix("-start") in KINDS:
        yield one
    elif one.operation in ("fusion", "async-start", "custom-call") and depth < 3:
        called = one.called() or ""
        goes_on = called.startswith("async_collective_fusion") or one.name.startswith("async-collective-done")
        for inner in () if goes_on else found.get(called, []):
            yield from _collectives_of(inner, found, depth + 1)


def _devices(one: Instruction) -> int:
    """Devices of a group, of replica_groups=[4,64]<=[256], {{0,1},{2,3}} or mesh['a'=4,'b'=64] {'b'}."""
    groups = one.rest.partition("replica_groups=")[2]
    if groups.startswith("mesh"):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", groups.partition("]")[0]))
        named = re.search(r"\{([^}]*)\}", groups)
        return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", named[1] if named else ""))
    match = re.match(r"\[\d+,(\d+)\]|\{\{([\d,]*)\}", groups)
    return 1 if match is None else int(match[1]) if match[1] else match[2].count(",") + 1


def _is_overlapped(one: Instruction, later: list[Instruction]) -> bool:
    """Whether something is computed between its start and its end."""
    if "-start" not in one.operation + one.name:
        return False
    end = one.name.replace("-start", "-done")
    for other in later:
        if other.name == end or (
            other.operation.endswith("-done") and re.search(rf"%?{re.escape(one.name)}\b", other.rest)
        ):
            return False
        if other.operation in _COMPUTES:
            return True
    return False


def largest(text: str, count: int = 5) -> list[Value]:
    """The largest arrays of a step that are no arguments, each shape once."""
    entry, found = computations(text)
    values: dict[str, Value] = {}
    for name in times_run(entry, found):
        for one in found.get(name, []):
            if one.operation not in _HOLDS_NOTHING and "S(5)" not in one.shape:  # 5: the host's memory
                for match in _SHAPE.finditer(one.shape):
                    if not (match[0] in values and values[match[0]].scope):
                        values[match[0]] = Value(match[0], size(*match.groups()), one.scope)
    return sorted(values.values(), key=lambda value: -value.bytes)[:count]
