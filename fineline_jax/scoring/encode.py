"""From strings to tokens exactly as lm-eval's Hugging Face backend, each distinct string once.

Source of the rules: lm-eval 0.4.13, `api/model.py` (`TemplateLM.loglikelihood`, `_encode_pair`) and
`models/huggingface.py` (`HFLM.tok_encode`).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from fineline_jax.errors import UserError
from fineline_jax.scoring.tokenizer import Bos, prefix_token

Tokens = np.ndarray
"""int32 [length]"""
BATCH = 1024
"""Strings handed to the tokenizer at a time; it spreads them over the cores."""


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A tokenizer with its BOS policy."""

    tokenizer: Any
    bos: Bos

    @property
    def prefix(self) -> int:
        """What stands for an empty context."""
        return prefix_token(self.tokenizer)

    def texts(self, strings: Sequence[str], special: bool | None = None) -> list[Tokens]:
        """Tokens of each string. `special`: put BOS (and what else the tokenizer adds) around it or not; None: as the
        policy says, and never where the string itself starts with the BOS text."""
        start = self.tokenizer.decode(self.prefix)
        plain = self.bos == "never"
        kinds = [plain or s.startswith(start) if special is None else not special for s in strings]
        found: dict[tuple[str, bool], Tokens] = {}
        wanted = list(dict.fromkeys(zip(strings, kinds, strict=True)))
        for without_special in (False, True):
            chosen = [s for s, kind in wanted if kind == without_special]
            for first in range(0, len(chosen), BATCH):
                batch = chosen[first : first + BATCH]
                for string, tokens in zip(batch, self._batch(batch, not without_special), strict=True):
                    found[string, without_special] = tokens
        return [found[key] for key in zip(strings, kinds, strict=True)]

    def pairs(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[Tokens, Tokens]]:
        """(context, continuation) -> their tokens.

        White space at the end of the context moves to the continuation; both are encoded as one string and cut
        after as many tokens as the context alone has; an empty context becomes the prefix token. Raises UserError
        where lm-eval would fail: a context or continuation that has no tokens.
        """
        moved = [_move_space(context, continuation) for context, continuation in pairs]
        whole = self.texts([context + continuation for context, continuation in moved if context])
        contexts = self.texts([context for context, _ in moved if context])
        alone = self.texts([continuation for context, continuation in moved if not context], special=False)
        rest, first, single = iter(whole), iter(contexts), iter(alone)
        prefix = np.array([self.prefix], np.int32)
        result = []
        for (context, _), (given, continuation) in zip(moved, pairs, strict=True):
            if context:
                head = next(first)
                encoded = head, next(rest)[len(head) :]
            elif given:
                raise UserError(f"the context {given!r} is only white space, which has no tokens")
            else:
                tail = next(single)
                encoded = (tail[:1], tail[1:]) if len(tail) and tail[0] == self.prefix else (prefix, tail)
            if len(encoded[0]) == 0 or len(encoded[1]) == 0:
                raise UserError(f"the continuation {continuation!r} adds no tokens to its context {given[-40:]!r}")
            result.append(encoded)
        return result

    def _batch(self, strings: list[str], special: bool) -> list[Tokens]:
        ids = self.tokenizer(
            strings, add_special_tokens=special, return_attention_mask=False, return_token_type_ids=False
        )["input_ids"]
        return [np.array(row, np.int32) for row in ids]


def _move_space(context: str, continuation: str) -> tuple[str, str]:
    stripped = context.rstrip()
    return stripped, context[len(stripped) :] + continuation
