"""Steps and tokens in the names of checkpoints, and in what transformers' Trainer writes beside the weights."""

import json
import re
from pathlib import Path
from typing import Any

from fineline_jax.checkpoints.formats.trainers import megatron
from fineline_jax.errors import reading

_STEP = r"(?:(?:step|iter)[-_]?|checkpoint[-_])(\d+)(k?)(?![\d.])"
_AMOUNT = r"(\d+(?:\.\d+)?)(b|t)"


def parse_name(name: str) -> tuple[int | None, int | None]:
    """(step, tokens) in a checkpoint's name, None where it does not say.

    Known: step1000, checkpoint-1000 and 1000 (transformers' Trainer), step1000-tokens4B, 300bt, train_00220B,
    Amber-Reproduce-8.39B. Another amount may be the model's size (open_llama_7b, step1000-7b) and is never tokens.
    """
    text = name.lower()
    step = re.search(_STEP, text) or re.fullmatch(r"(\d+)()", text)
    amount = re.search(rf"(?:tokens?[-_]?|\btrain_|reproduce-){_AMOUNT}t?(?![a-z0-9])", text)
    amount = amount or re.search(rf"(?<![a-z0-9.]){_AMOUNT}t(?![a-z0-9])", text)
    return (
        int(step[1]) * (1000 if step[2] else 1) if step else None,
        round(float(amount[1]) * {"b": 1e9, "t": 1e12}[amount[2]]) if amount else None,
    )


def step_and_tokens(folder: Path) -> tuple[int | None, int | None]:
    """Of a folder with weights: as its trainer_state.json or Megatron-LM's own file says, else as its name does
    (`parse_name`).

    Raises UserError naming such a file that cannot be read.
    """
    named_step, named_tokens = parse_name(folder.name)
    file = folder / "trainer_state.json"
    if not file.is_file():
        step, tokens = megatron.step_and_tokens(folder)
        return (named_step if step is None else step), tokens or named_tokens
    with reading(file, "repair or remove it", "not a state of transformers' Trainer"):
        state = json.loads(file.read_bytes())
        step, tokens = int(state["global_step"]), int(state.get("num_input_tokens_seen") or 0)
    return step, tokens or named_tokens  # 0: it did not count them


def natural(name: str) -> list[Any]:
    """Sort key: ckpt_9 before ckpt_10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
