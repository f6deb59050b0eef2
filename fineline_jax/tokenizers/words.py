"""The ids of texts by way of their words.

Where `safe_cuts` proves that a tokenizer may be given the words of a text one by one, each distinct word is encoded
once and looked up from there on, and a text is taken in parts, so that its length costs no memory besides its ids. For
every other tokenizer or text the ids are those of the text as a whole, by `identity.encode`.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from fineline_jax.tokenizers.identity import encode
from fineline_jax.tokenizers.safe_cuts import SafeCuts, find_safe_cuts

PART = 1 << 20
"""Characters that are split into words at a time."""
MOST_IDS = 1 << 23
"""Of known words together, after which all are forgotten."""

_Key = str | tuple[str]
"""A word without the space before it; in a tuple: the first of a text."""
_Part = tuple[int, str, bool]
"""Number of a text, a part of it, whether it is the first; another begins with a space or line break."""


class _Known(dict[_Key, int]):
    """The number of each word, counted in the order in which they appear."""

    def __init__(self) -> None:
        self.words: list[_Key] = []

    def __missing__(self, word: _Key) -> int:
        self.words.append(word)
        return self.setdefault(word, len(self))


class _Table:
    """Of known words: what may be cut off behind them, and of those that were used as they are their ids."""

    def __init__(self, tokenizer: Any, cuts: SafeCuts):
        self.tokenizer, self.cuts = tokenizer, cuts
        self.forget()

    def forget(self) -> None:
        self.known = _Known()
        self.ids, self.starts, self.sizes = np.empty(0, np.int32), np.empty(0, np.int64), np.empty(0, np.int64)
        """Ids laid end to end, and where those of a word are; -1: not encoded yet."""
        self.flags = np.empty((0, 3), bool)
        """Whether a space, a line break may be cut off behind the word; whether it begins with a line break."""

    def numbers(self, words: Sequence[_Key]) -> np.ndarray:
        """int64 [len(words)]."""
        found = np.array(list(map(self.known.__getitem__, words)), np.int64)
        if new := self.known.words[len(self.flags) :]:
            seam = self.cuts.seams.fullmatch
            flags = [(seam(f"{w[-1:]} ") is not None, seam(f"{w[-1:]}\n") is not None, w[:1] == "\n")
                     if isinstance(w, str) else (False, False, False) for w in new]  # fmt: skip
            unknown = np.full(len(new), -1)
            self.flags = np.concatenate([self.flags, flags])
            self.starts, self.sizes = np.append(self.starts, unknown), np.append(self.sizes, unknown)
        return found

    def encode(self, numbers: np.ndarray) -> None:
        """The words of these numbers that are not encoded yet."""
        new = np.unique(numbers[self.starts[numbers] < 0])
        words = [self.known.words[i] for i in new.tolist()]
        first = iter(encode(self.tokenizer, [_text(word[0]) for word in words if isinstance(word, tuple)]))
        texts = [_text(f" {word}") for word in words if isinstance(word, str)]
        others = iter(self.cuts.rest.encode_batch_fast(texts, add_special_tokens=False))
        ids = [next(first) if isinstance(word, tuple) else next(others).ids for word in words]
        self.sizes[new] = [len(one) for one in ids]
        self.starts[new] = len(self.ids) + np.cumsum(self.sizes[new]) - self.sizes[new]
        self.ids = np.concatenate([self.ids, *(np.array(one, np.int32) for one in ids)])

    def ids_of(self, parts: Sequence[_Part]) -> list[np.ndarray]:
        """Those of each part, int32."""
        words: list[str] = []
        begins = []
        for _, text, is_first in parts:
            begins.append(len(words))
            words += text.replace("\n", " \n")[0 if is_first else 1 :].split(" ")
        numbers = self.numbers(words)
        flags = self.flags[numbers]
        # A word is its own where what stands before it may be cut off; else it belongs to the one before.
        alone = np.concatenate([[True], np.where(flags[1:, 2], flags[:-1, 1], flags[:-1, 0])])
        alone[begins] = True
        starts = np.flatnonzero(alone)
        ends = np.append(starts[1:], len(words))
        joined = lambda places: [" ".join(words[i:j]) for i, j in zip(starts[places].tolist(), ends[places].tolist())]
        numbers = numbers[starts]
        several = np.flatnonzero(ends - starts > 1)
        numbers[several] = self.numbers(joined(several))
        of_part = np.searchsorted(starts, begins)
        first = of_part[[is_first for _, _, is_first in parts]]
        numbers[first] = self.numbers([(word,) for word in joined(first)])
        self.encode(numbers)
        sizes = self.sizes[numbers]
        stops = np.cumsum(sizes)
        ids = self.ids[np.repeat(self.starts[numbers] - stops + sizes, sizes) + np.arange(stops[-1])]
        return np.split(ids, (stops - sizes)[of_part[1:]])


def _text(spaced: str) -> str:
    """The text of words, in which every line break has a space before it, at which it is split like at the others."""
    return spaced.replace(" \n", "\n")


def word_encoder(tokenizer: Any) -> Callable[[Sequence[str]], list[np.ndarray]]:
    """A function that gives the ids of each of some texts, int32, without special tokens: those of `identity.encode`,
    which is asked for texts that may not be cut."""
    cuts = find_safe_cuts(tokenizer)
    table = None if cuts is None else _Table(tokenizer, cuts)

    def encoded(texts: Sequence[str]) -> list[np.ndarray]:
        found: list[list[np.ndarray]] = [[np.empty(0, np.int32)] for _ in texts]
        whole = [i for i, text in enumerate(texts) if cuts is None or not cuts.may_cut(text)]
        for i, ids in zip(whole, encode(tokenizer, [texts[i] for i in whole]), strict=True):
            found[i].append(np.array(ids, np.int32))
        if table is not None:
            for parts in _batches(table.cuts, set(range(len(texts))) - set(whole), texts):
                for (i, _, _), ids in zip(parts, table.ids_of(parts), strict=True):
                    found[i].append(ids)
                if len(table.ids) > MOST_IDS:
                    table.forget()
        return [np.concatenate(ids) for ids in found]

    return encoded


def _batches(cuts: SafeCuts, chosen: set[int], texts: Sequence[str]) -> Iterator[list[_Part]]:
    """The texts chosen in parts of about PART characters, cut where they may be, or several short ones together."""
    batch: list[_Part] = []
    room = PART
    for i in sorted(chosen):
        text, start = texts[i], 0
        while start < len(text):
            seam = cuts.seams.search(text, start + PART)
            end = seam.start() + 1 if seam else len(text)
            batch.append((i, text[start:end], start == 0))
            room -= end - start
            if room <= 0:
                yield batch
                batch, room = [], PART
            start = end
    if batch:
        yield batch
