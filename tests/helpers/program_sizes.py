"""How large the arrays of a compiled program are: what never exists cannot be among them."""

import math
import re
from collections.abc import Callable
from typing import Any

import jax


def largest_array(function: Callable[..., Any], *shapes: Any) -> int:
    """Elements of the largest array, intermediate ones included, of `function` compiled for these arguments."""
    text = jax.jit(function).lower(*shapes).compile().as_text()
    sizes = re.findall(r"\b(?:pred|bf16|[fsu]\d+)\[([\d,]+)\]", text)
    return max(math.prod(map(int, size.split(","))) for size in sizes)
