"""Steps and tokens in the names of checkpoints."""

import re
from typing import Any

_STEP = r"(?:step|iter)[-_]?(\d+)(k?)(?![\d.])"
_AMOUNT = r"(\d+(?:\.\d+)?)(b|t)t?(?![a-z0-9])"


def parse_name(name: str, common: str = "") -> tuple[int | None, int | None]:
    """(step, tokens) in a checkpoint's name, None where it does not say.

    Known: step1000, step1000-tokens4B, …-step-50K-105b, train_00220B, Amber-Reproduce-8.39B. A bare amount at
    the end could be the model's size (open_llama_7b): it counts only behind `common`, what all names share.
    """
    text = name.lower()
    step = tokens = None
    if match := re.search(_STEP, text):
        step = int(match[1]) * (1000 if match[2] else 1)
    amounts = [
        rf"tokens?[-_]?{_AMOUNT}",
        rf"{_STEP}[-_](?:token[-_])?{_AMOUNT}",
        rf"(?:train_|reproduce-){_AMOUNT}",
    ]
    for pattern in amounts:
        if match := re.search(pattern, text):
            tokens = _tokens(*match.groups()[-2:])
            break
    else:
        if common and (match := re.fullmatch(rf"(?:.*[-_])?{_AMOUNT}", text[len(common) :])):
            tokens = _tokens(*match.groups())
    return step, tokens


def common_start(names: list[str]) -> str:
    """What all names begin with, up to the first number that differs."""
    first, last = min(names), max(names)
    same = next((i for i, (a, b) in enumerate(zip(first, last)) if a != b), len(first))
    return re.sub(r"[\d.]*$", "", first[:same])


def natural(name: str) -> list[Any]:
    """Sort key: ckpt_9 before ckpt_10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _tokens(number: str, unit: str) -> int:
    return round(float(number) * {"b": 1e9, "t": 1e12}[unit])
