"""The small language of series files: names with braces, patterns of names, rules over their numbers.

    step{0..4000..1000}      expand: a list of names
    step{step}-tokens{b}B    bind: the numbers in a name
    762 * (chunk + 1)        evaluate: a number from numbers

A rule is parsed, checked and computed here; nothing of a file is executed.
"""

import ast
import functools
import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

from fineline_jax.errors import UserError

NUMBER = r"\d+(?:\.\d+)?"
MOST_NAMES = 100_000
"""That one text means; more are a mistake."""


def expand(text: str) -> list[str]:
    """Braces as in a shell: step{0..6..2} -> step0 step2 step4 step6; {000..002} keeps the zeros; {a,b}."""
    braces = re.search(r"\{([^{}]*)\}", text)
    if not braces:
        return [text]
    span = re.fullmatch(r"(\d+)\.\.(\d+)(?:\.\.(\d+))?", braces[1])
    if span:
        start, stop, by = int(span[1]), int(span[2]), int(span[3] or 1)
        if by < 1 or stop < start:
            raise UserError(f"{text}: {{{braces[1]}}} is no range; write {{first..last}} or {{first..last..step}}")
        if (stop - start) // by >= MOST_NAMES:
            raise UserError(f"{text}: {{{braces[1]}}} are more than {MOST_NAMES:,} names; write a smaller range")
        width = len(span[1]) if span[1].startswith("0") else 0
        parts = [f"{number:0{width}d}" for number in range(start, stop + 1, by)]
    elif "," in braces[1]:
        parts = [part.strip() for part in braces[1].split(",")]
    else:
        raise UserError(f"{text}: {{{braces[1]}}} is neither a range nor a list")
    before, after = text[: braces.start()], expand(text[braces.end() :])
    if len(parts) * len(after) > MOST_NAMES:
        raise UserError(f"{text}: means more than {MOST_NAMES:,} names; write smaller ranges")
    return [before + part + rest for part in parts for rest in after]


_OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}
_FUNCTIONS: dict[str, tuple[Callable[..., float], int]] = {"round": (round, 1), "min": (min, 2), "max": (max, 2)}
"""With the number of their arguments."""
ALLOWED = "numbers, names, + - * / //, parentheses, round(), min(,) and max(,)"


def evaluate(rule: str, numbers: Mapping[str, float]) -> float | None:
    """The value of a rule such as "762 * (chunk + 1)"; None if it uses a number that is not known.

    Raises UserError as `names_in`, and for a division by zero or what is too large.
    """
    tree, names = _parsed(rule)
    if not names <= numbers.keys():
        return None

    def value(node: ast.expr) -> float:
        match node:
            case ast.Constant(value=int() | float() as number):
                return number
            case ast.Name(id=name):
                return numbers[name]
            case ast.BinOp(left=left, op=op, right=right):
                return _OPERATORS[type(op)](value(left), value(right))
            case ast.Call(func=ast.Name(id=name), args=arguments):
                return _FUNCTIONS[name][0](*map(value, arguments))
        raise AssertionError(f"{rule!r} was checked")

    try:
        result = value(tree)
    except ArithmeticError as error:
        raise UserError(f"{rule!r} cannot be computed: {error}") from error
    if not math.isfinite(result):
        raise UserError(f"{rule!r} gives {result}; write a rule that gives a number of tokens or steps")
    return result


def names_in(rule: str) -> frozenset[str]:
    """The numbers that a rule uses.

    Raises UserError for anything but what is ALLOWED.
    """
    return _parsed(rule)[1]


@functools.cache
def _parsed(rule: str) -> tuple[ast.expr, frozenset[str]]:
    names = set()

    def check(node: ast.expr) -> None:
        match node:
            case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
                return
            case ast.Name(id=name):
                names.add(name)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                check(left)
                check(right)
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if (
                name in _FUNCTIONS and len(arguments) == _FUNCTIONS[name][1]
            ):
                for argument in arguments:
                    check(argument)
            case _:
                raise UserError(f"{rule!r} is no rule; allowed are {ALLOWED}")

    try:
        tree = ast.parse(rule, mode="eval").body
        check(tree)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"{rule!r} is no rule: {' '.join(str(error).split())}") from error
    return tree, frozenset(names)


def bind(pattern: str, name: str) -> dict[str, float] | None:
    """The numbers that `pattern` finds in `name`; None if it does not fit."""
    match = compiled(pattern).fullmatch(name)
    if match is None:
        return None
    return {key: float(text) if "." in text else int(text) for key, text in match.groupdict().items()}


@functools.cache
def compiled(pattern: str) -> re.Pattern[str]:
    """The regular expression of a pattern; its groups are the numbers. Raises UserError for a wrong one."""
    parts = re.split(r"(\{\w+\}|\*)", pattern)
    regex = "".join(
        ".*?" if part == "*" else f"(?P<{part[1:-1]}>{NUMBER})" if part.startswith("{") else re.escape(part)
        for part in parts
    )
    try:
        return re.compile(regex)
    except re.error as error:
        raise UserError(f"{pattern!r} is no pattern: {error.msg}") from error
