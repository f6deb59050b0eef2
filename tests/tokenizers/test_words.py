"""Ids by way of words are those of the texts as a whole, for every tokenizer; or the whole texts are encoded."""

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizer_examples import CUT, WHOLE, opened

from fineline_jax.tokenizers import words
from fineline_jax.tokenizers.identity import encode
from fineline_jax.tokenizers.words import word_encoder

_PIECES = st.sampled_from(
    ["the", "cat", " the", " cat", "dog", " ", "  ", "\n", "\n\n", "\n \n", " \n", "\t", "\r\n", ".", ":", "!?", "'s",
     " 's", "3", "1024", "(", "_", "\u2581", "\u00a0", "\u2003", "\u0301", "e\u0301", "\u4e2d\u6587", "\u3002", "\x1c",
     "\u201d", "\U0001f600", "<s>", "</s>", "<|endoftext|>", "<0x0A>"]
)  # fmt: skip
TEXT = st.lists(st.one_of(_PIECES, _PIECES, st.text(max_size=3)), max_size=25).map("".join)


def ids_by_words(encoder: words.Encoder, texts: list[str], piece: int) -> list[list[int]]:
    """Of each of some texts that come in pieces of so many characters; every text begins and ends once."""
    given_pieces = [[text[i : i + piece] for i in range(0, len(text), piece)] for text in texts]
    ids: list[list[int]] = []
    ended = True
    for batch in encoder((number, iter(pieces)) for number, pieces in enumerate(given_pieces)):
        for number, part, begins, ends in batch:
            assert part.dtype == np.int32 and begins is ended and number == len(ids) - (not begins)
            ids += [[]] if begins else []
            ids[-1] += part.tolist()
            ended = ends
    assert ended
    return ids


@pytest.mark.parametrize("kind", [*CUT, *WHOLE])
@pytest.mark.parametrize("part", [3, 1 << 20])
def test_the_ids_are_those_of_the_whole_text(
    kind: str, part: int, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a text is taken in parts of a few characters, and what is known is forgotten now and then."""
    monkeypatch.setattr(words, "PART", part)
    monkeypatch.setattr(words, "MOST_IDS", 200)
    tokenizer = opened(kind, tmp_path_factory.mktemp("tokenizers"))
    by_words = word_encoder(tokenizer)

    @settings(
        max_examples=100,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
    @given(texts=st.lists(TEXT, max_size=4))
    @example(["", "the", "", "\nthe", " the", "the the\nthe \n the", "\n", " "])
    @example(["the </s> cat", "the cat", "cat. \u201dThe\u201d cat\n\n\ncat"])
    @example(["the cat the</s>the </s> the\ncat <0x0A> cat\u2581cat the e\u0301 cat e\u0301\ncat"])
    def check(texts: list[str]) -> None:
        for piece in (2, 1000):
            assert ids_by_words(by_words, texts, piece) == encode(tokenizer, texts)

    check()


class Counting:
    """Counts the texts that a tokenizer encodes."""

    def __init__(self, inner: Any):
        self.inner, self.texts = inner, []

    def encode_batch_fast(self, texts: list[str], **options: Any) -> Any:
        self.texts += texts
        return self.inner.encode_batch_fast(texts, **options)


def test_each_word_is_encoded_once_and_no_text_is_encoded_whole(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand times the same line; "  and" is one word, since nothing may be cut off behind a space."""
    tokenizer = opened("gpt-2", tmp_path)
    found = words.find_safe_cuts(tokenizer)
    assert found is not None
    counting, whole = Counting(found.rest), []
    monkeypatch.setattr(words, "find_safe_cuts", lambda _: words.SafeCuts(**{**vars(found), "rest": counting}))
    monkeypatch.setattr(words, "encode", lambda tokenizer, texts: whole.extend(texts) or encode(tokenizer, texts))
    monkeypatch.setattr(words, "PART", 64)
    text = "\n".join(["the cat  and the cat."] * 1000)
    assert ids_by_words(word_encoder(tokenizer), [text], 50) == encode(tokenizer, [text])
    assert sorted(counting.texts) == ["\nthe", "  and", " cat", " cat.", " the"] and whole == ["the"]
