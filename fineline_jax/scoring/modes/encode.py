"""From strings to tokens exactly as lm-eval's Hugging Face backend, each distinct string once.

Source of the rules: lm-eval 0.4.13, `api/model.py` (`TemplateLM.loglikelihood`, `_encode_pair`) and
`models/huggingface.py` (`HFLM.tok_encode`, `HFLM.apply_chat_template`).
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jinja2
import numpy as np

from fineline_jax.errors import UserError
from fineline_jax.tokenizers.identity import encode
from fineline_jax.tokenizers.open import Bos, prefix_token
from fineline_jax.tokenizers.safe_cuts import SafeCuts, find_safe_cuts

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
        policy requires, and never where the string itself starts with the BOS text."""
        plain = self.bos == "never"
        kinds = [plain or s.startswith(self.start) if special is None else not special for s in strings]
        wanted = list(dict.fromkeys(zip(strings, kinds, strict=True)))
        encoded: dict[tuple[str, bool], Tokens] = {}
        for without_special in (False, True):
            chosen = [s for s, kind in wanted if kind == without_special]
            for string, tokens in zip(chosen, self._distinct(chosen, not without_special), strict=True):
                encoded[string, without_special] = tokens
        return [encoded[key] for key in zip(strings, kinds, strict=True)]

    def pairs(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[Tokens, Tokens]]:
        """(context, continuation) -> their tokens.

        White space at the end of the context moves to the continuation; both are encoded as one string and cut
        after as many tokens as the context alone has; an empty context becomes the prefix token. Raises UserError
        where lm-eval would fail: a context or continuation that has no tokens.
        """
        moved = [_move_space(context, continuation) for context, continuation in pairs]
        # As given: of a context that is only white space BOS stays, if there is one.
        empty = [not context for context, _ in pairs]
        contexts = list(dict.fromkeys(context for (context, _), none in zip(moved, empty, strict=True) if not none))
        heads = dict(zip(contexts, self.texts(contexts), strict=True))
        separate = [bool(context) and self._separates(context, continuation) for context, continuation in moved]
        kinds = list(zip(moved, empty, separate, strict=True))
        whole = iter(self.texts([c + t for (c, t), none, cut in kinds if not none and not cut]))
        rest = iter(self._rest([t for (_, t), _, cut in kinds if cut]))
        alone = iter(self.texts([t for (_, t), none, _ in kinds if none], special=False))
        prefix = np.array([self.prefix], np.int32)
        result = []
        for ((context, _), none, cut), (given, continuation) in zip(kinds, pairs, strict=True):
            if none:
                tail = next(alone)
                encoded = (tail[:1], tail[1:]) if len(tail) and tail[0] == self.prefix else (prefix, tail)
            else:
                head = heads[context]
                encoded = head, next(rest) if cut else next(whole)[len(head) :]
            if len(encoded[0]) == 0:
                raise UserError(f"the context {given!r} is only white space, which has no tokens")
            if len(encoded[1]) == 0:
                raise UserError(f"the continuation {continuation!r} adds no tokens to its context {given[-40:]!r}")
            result.append(encoded)
        return result

    def chat(self, messages: Sequence[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Messages, as {role, content}, worded by the tokenizer's chat template; without those of the system where the
        template knows no such role. Raises ValueError if there is no template."""
        apply = functools.partial(
            self.tokenizer.apply_chat_template, tokenize=False, add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )  # fmt: skip
        try:
            return apply(messages)
        except jinja2.TemplateError:
            return apply([message for message in messages if message["role"] != "system"])

    @functools.cached_property
    def start(self) -> str:
        """The BOS text."""
        return self.tokenizer.decode(self.prefix)

    @functools.cached_property
    def safe_cuts(self) -> SafeCuts | None:
        return find_safe_cuts(self.tokenizer)

    def _separates(self, context: str, continuation: str) -> bool:
        """Whether the continuation may be encoded by itself. (A context shorter than the BOS text could become it.)"""
        return (
            self.safe_cuts is not None
            and len(context) >= len(self.start)
            and self.safe_cuts.separates(context, continuation)
        )

    def _distinct(self, strings: list[str], special: bool) -> list[Tokens]:
        """Tokens of distinct strings, each distinct line of them encoded once where that gives the same."""
        if self.safe_cuts is None:
            return self._batches(strings, special)
        cut = [self.safe_cuts.pieces(string) for string in strings]
        firsts = list(dict.fromkeys(pieces[0] for pieces in cut))
        head = dict(zip(firsts, self._batches(firsts, special), strict=True))
        lines = list(dict.fromkeys(piece for pieces in cut for piece in pieces[1:]))
        rest = dict(zip(lines, self._rest(lines), strict=True))
        return [
            np.concatenate([head[pieces[0]], *[rest[piece] for piece in pieces[1:]]]) if pieces[1:] else head[pieces[0]]
            for pieces in cut
        ]

    def _rest(self, strings: list[str]) -> list[Tokens]:
        """Tokens of what stands behind a cut."""
        if not strings:
            return []
        assert self.safe_cuts is not None
        distinct = list(dict.fromkeys(strings))
        encoded = self.safe_cuts.rest.encode_batch_fast(distinct, add_special_tokens=False)
        tokens = {string: np.array(one.ids, np.int32) for string, one in zip(distinct, encoded, strict=True)}
        return [tokens[string] for string in strings]

    def _batches(self, strings: list[str], special: bool) -> list[Tokens]:
        parts = [strings[first : first + BATCH] for first in range(0, len(strings), BATCH)]
        return [tokens for part in parts for tokens in self._batch(part, special)]

    def _batch(self, strings: list[str], special: bool) -> list[Tokens]:
        return [np.array(ids, np.int32) for ids in encode(self.tokenizer, strings, special_tokens=special)]


def _move_space(context: str, continuation: str) -> tuple[str, str]:
    stripped = context.rstrip()
    return stripped, context[len(stripped) :] + continuation
