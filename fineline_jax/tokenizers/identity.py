"""What of a tokenizer decides the ids of a text, and the ids themselves."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Identity:
    """What must agree between the tokenizer of a pack and that of a checkpoint."""

    tokenizer_hash: str
    """SHA-256 of vocabulary, merges, normaliser, pre-tokeniser and added tokens; not of padding or special-token
    defaults."""
    adds_bos: bool
    """Whether it puts BOS first by default."""


def identity(tokenizer: Any) -> Identity:
    """Of a transformers tokenizer; independent of file names, key order and of the version that wrote the files."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    decisive = {key: state[key] for key in ("model", "normalizer", "pre_tokenizer")}
    decisive["added_tokens"] = sorted((token["id"], token["content"]) for token in state["added_tokens"])
    text = json.dumps(decisive, sort_keys=True, ensure_ascii=False)
    adds_bos = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    return Identity(hashlib.sha256(text.encode()).hexdigest(), adds_bos)


def vocabulary_size(tokenizer: Any) -> int:
    """One more than the largest id."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def encode(tokenizer: Any, texts: Sequence[str], *, special_tokens: bool = False) -> list[list[int]]:
    """The ids of each text, in order, on all cores, neither cut nor padded.

    special_tokens: with BOS, and whatever else the tokenizer puts around a text by default.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return [one.ids for one in backend.encode_batch_fast(list(texts), add_special_tokens=special_tokens)]
