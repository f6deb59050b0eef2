"""Small tokenizers of every kind that is known, for the tests of tokenizers and of encoding."""

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scoring_examples import WORDS, write_tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from fineline_jax.tokenizers import safe_cuts
from fineline_jax.tokenizers.open import open_tokenizer
from fineline_jax.world import generate

CUT = ("gpt-2", "llama-3", "qwen-2", "olmo-2", "blanks", "normaliser", "metaspace", "metaspace, split",
       "tokenizers/llama", "tokenizers/gpt-neox-20b", "models/tinystories-260k")  # fmt: skip
WHOLE = ("unknown words", "world")
"""Kinds that are encoded line by line, and as a whole."""

SHARED_TOKENIZERS = ("tokenizers/llama", "tokenizers/gpt-neox-20b", "models/tinystories-260k")
"""Folders in the shared test data."""
LINES = [" ".join(WORDS[i : i + 5]) + end for i in range(10) for end in ("\n", "\n\n", ".\n", " \n", ": ", ")\n\n")]
LLAMA3, QWEN2, OLMO2 = sorted(safe_cuts._TIKTOKEN, key=lambda text: (text.startswith("'"), r"{1,3}" not in text))


def byte_level(first: str | None = None, **options: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    steps: list[Any] = [pre_tokenizers.Split(Regex(first), "isolated")] if first else []
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=first is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if first else steps[0]
    if options.get("nfc"):
        tokenizer.normalizer = normalizers.NFC()
    return train(tokenizer, pre_tokenizers.ByteLevel.alphabet())


def space_mark(metaspace: bool, split: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=split)
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    return train(tokenizer, [], [f"<0x{i:02X}>" for i in range(256)])


def train(tokenizer: Tokenizer, alphabet: list[str], tokens: list[str] | None = None) -> Tokenizer:
    special = ["<s>", "</s>", "<unk>", *(tokens or [])]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    tokenizer.train_from_iterator(LINES * 3, trainer)
    if tokens:  # bytes are pieces of the vocabulary and no tokens that are looked for in the text
        state = json.loads(tokenizer.to_str())
        state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < 3]
        tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def of_shared_data(name: str) -> Any:
    root = os.environ.get("FINELINE_SHARED_DATA")
    if not root:
        pytest.skip("set FINELINE_SHARED_DATA to the folder of the shared test data")
    return open_tokenizer(Path(root) / name)


@functools.cache
def opened(kind: str, folder: Path) -> Any:
    if "/" in kind:
        return of_shared_data(kind)
    if kind == "world":
        return open_tokenizer(generate.generate(folder / "world", documents=30).tokenizer)
    if kind == "gpt-2":
        return open_tokenizer(write_tokenizer(folder / "gpt-2", adds_bos=True))
    if kind == "no bos":
        return open_tokenizer(write_tokenizer(folder / "gpt-2", adds_bos=False))
    made = {
        "llama-3": lambda: byte_level(LLAMA3),
        "qwen-2": lambda: byte_level(QWEN2, nfc=True),
        "olmo-2": lambda: byte_level(OLMO2),
        "unknown words": lambda: byte_level(r"\w+\s|[^\w]"),
        "blanks": lambda: byte_level(nfc=True),
        "normaliser": lambda: space_mark(False),
        "metaspace": lambda: space_mark(True),
        "metaspace, split": lambda: space_mark(True, split=True),
        **dict.fromkeys(("long bos", "eos behind"), lambda: space_mark(False)),
    }[kind]()
    if kind == "long bos":  # as DeepSeek's, whose name holds the mark of a space
        made.add_special_tokens(["<b\u2581of\u2581s>"])
        made.decoder = decoders.Replace("\u2581", " ")
        bos = made.token_to_id("<b\u2581of\u2581s>")
        made.post_processor = processors.TemplateProcessing(
            single="<b\u2581of\u2581s> $A", special_tokens=[("<b\u2581of\u2581s>", bos)]
        )
        return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<b\u2581of\u2581s>", eos_token="</s>")
    if kind == "eos behind":
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    if kind == "blanks":  # as GPT-NeoX has them
        made.add_tokens([AddedToken(" " * n, normalized=True, special=False) for n in range(2, 9)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def changed(tokenizer: Tokenizer, change: Callable[[dict], Any]) -> Any:
    state = json.loads(tokenizer.to_str())
    change(state)
    made = Tokenizer.from_str(json.dumps(state))
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def put(state: Any, where: str, value: Any) -> None:
    """Put `value` at key.key.index; an index behind the last adds it."""
    *path, last = [int(key) if key.isdigit() else key for key in where.split(".")]
    for key in path:
        state = state[key]
    if isinstance(state, list) and last == len(state):
        state.append(value)
    else:
        state[last] = value


EXTRA = {"id": 700, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
