"""The ids of texts by way of their words.

Where `safe_cuts` proves that a tokenizer may be given the words of a text one by one, each distinct word is encoded
once and looked up from there on, and a text is taken in parts, so that its length costs no memory besides its ids. For
every other tokenizer or text the ids are those of the text as a whole, by `identity.encode`.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from fineline_jax.tokenizers.identity import encode
from fineline_jax.tokenizers.safe_cuts import SafeCuts, find_safe_cuts

PART = 1 << 16
"""Characters of a long text after which it is cut: of what may not be cut into words, not more is encoded whole."""
BATCH = 1 << 20
"""Characters that are encoded at a time."""
MOST_IDS = 1 << 22
"""Of known words together, after which all are forgotten."""

_Key = str | tuple[str]
"""A word without the space before it; in a tuple: the first of a text."""
Encoder = Callable[[Iterable[tuple[Any, Iterator[str]]]], Iterator[list[tuple[Any, np.ndarray, bool, bool]]]]
"""From (name, pieces) of each text to batches of (name, ids, whether they begin and whether they end its text) of their
parts, in order; ids: int32 [any]."""


class _Part(NamedTuple):
    """Of a text; one that is not the first begins with a space or line break."""

    name: Any
    text: str
    before: str
    """The character before it; "": it is the first."""
    is_last: bool


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
            last = {w[-1:] for w in new if isinstance(w, str)}
            cut = {end: (seam(f"{end} ") is not None, seam(f"{end}\n") is not None) for end in last}
            flags = [(*cut[w[-1:]], w[:1] == "\n") if isinstance(w, str) else (False, False, False) for w in new]
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
        self.ids = np.append(self.ids, np.fromiter(itertools.chain.from_iterable(ids), np.int32))

    def ids_of(self, parts: Sequence[_Part]) -> list[np.ndarray]:
        """Those of each part, int32."""
        if not parts:
            return []
        words: list[str] = []
        begins = []
        for part in parts:
            begins.append(len(words))
            words += part.text.replace("\n", " \n")[1 if part.before else 0 :].split(" ")
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
        first = of_part[[not part.before for part in parts]]
        numbers[first] = self.numbers([(word,) for word in joined(first)])
        self.encode(numbers)
        sizes = self.sizes[numbers]
        stops = np.cumsum(sizes)
        ids = self.ids[np.repeat(self.starts[numbers] - stops + sizes, sizes) + np.arange(stops[-1])]
        return np.split(ids, (stops - sizes)[of_part[1:]])


def _text(spaced: str) -> str:
    """The text of words, in which every line break has a space before it, at which it is split like at the others."""
    return spaced.replace(" \n", "\n")


def word_encoder(tokenizer: Any) -> Encoder:
    """An encoder without special tokens: the ids are those of `identity.encode` of each text as a whole, which is
    asked for parts that may not be cut into words, and for texts that may not be cut into parts."""
    cuts = find_safe_cuts(tokenizer)
    table = None if cuts is None else _Table(tokenizer, cuts)

    def whole(parts: list[_Part]) -> Iterator[np.ndarray]:
        # The beginning of a text may be encoded otherwise: a character before the cut, the ids of which are dropped.
        before = encode(tokenizer, [part.before for part in parts])
        ids = encode(tokenizer, [part.before + part.text for part in parts])
        return (np.array(one[len(left) :], np.int32) for one, left in zip(ids, before, strict=True))

    def encoded(texts: Iterable[tuple[Any, Iterator[str]]]) -> Iterator[list[tuple[Any, np.ndarray, bool, bool]]]:
        for parts in _batches(part for name, pieces in texts for part in _parts(cuts, name, pieces)):
            by_words = [table is not None and table.cuts.may_cut(part.text) for part in parts]
            others = whole([part for part, is_cut in zip(parts, by_words) if not is_cut])
            known = iter(table.ids_of([part for part, is_cut in zip(parts, by_words) if is_cut]) if table else ())
            ids = (next(known if is_cut else others) for is_cut in by_words)
            yield [(part.name, one, not part.before, part.is_last) for part, one in zip(parts, ids)]
            if table is not None and len(table.ids) > MOST_IDS:
                table.forget()

    return encoded


def _parts(cuts: SafeCuts | None, name: Any, pieces: Iterator[str]) -> Iterator[_Part]:
    """A text in parts of about PART characters, cut where it may be."""
    text = before = ""
    seen, seam = PART, None
    for piece in pieces:
        text += piece
        while cuts is not None and (seam := cuts.seams.search(text, seen)):
            place = seam.start() + 1
            yield _Part(name, text[:place], before, False)
            before, text, seen = text[place - 1], text[place:], PART
        seen = max(PART, len(text) - 1)
    yield _Part(name, text, before, True)


def _batches(parts: Iterable[_Part]) -> Iterator[list[_Part]]:
    """Parts with about BATCH characters together."""
    batch, characters = [], 0
    for part in parts:
        batch.append(part)
        characters += len(part.text)
        if characters >= BATCH:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
