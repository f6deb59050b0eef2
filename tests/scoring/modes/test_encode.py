"""Strings become the tokens that lm-eval, OLMES and OpenCompass make of them."""

import functools
import types
from typing import Any

import pytest
from scoring_examples import WORDS, write_tokenizer
from tokenizer_examples import opened

from fineline_jax.errors import UserError
from fineline_jax.scoring.modes import encode, olmes, opencompass_ppl
from fineline_jax.scoring.modes.encode import Encoder
from fineline_jax.tokenizers.open import Bos, open_tokenizer, prefix_token

# lm-eval's own code


def as_lm_eval(tokenizer: Any, bos: Bos, pairs: list[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
    """What lm-eval's Hugging Face backend makes of the strings of requests."""
    backend_of = pytest.importorskip("lm_eval.models.huggingface", reason="pip install -e '.[test]'").HFLM
    from lm_eval.api.model import TemplateLM

    prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    backend = types.SimpleNamespace(
        tokenizer=tokenizer, backend="causal", prefix_token_id=prefix, _loglikelihood_tokens=lambda found, **_: found,
        add_bos_token={"auto": None, "always": True, "never": False}[bos],
    )  # fmt: skip
    for name in ("tok_encode", "_encode_pair"):
        setattr(backend, name, functools.partial(getattr(backend_of, name), backend))
    requests = [types.SimpleNamespace(args=pair) for pair in pairs]
    found = TemplateLM.loglikelihood(backend, requests, disable_tqdm=True)
    return [(context, continuation) for _, context, continuation in found]


PAIRS = [
    ("the cat", " runs"), ("the cat ", "runs"), ("the cat \n ", " runs"), ("the cat\n", "\n runs"), ("the cat", "runs"),
    ("", "the cat"), ("", " the cat"), ("", "<s>the cat"), ("", "<s> the"), (" ", "the cat"), (" \n", "x"),
    ("<s>", "the cat"), ("<s> the", " cat"), ("<s>the", " cat"), (" <s>the", " cat"), ("the <s>", " cat"),
    ("<s", ">cat"), ("<s", "> cat"), ("<s>", " cat"), ("the", " cat<s>"), ("the", "<s>"), ("<", "s> cat"),
    ("a", " b"), ("<s>a", "\nb"),
    ("Q: two\nA: ice\n\nQ: the cat\nA:", " dog"), ("ice\n", "ice\n"), ("Fäden 東京", " and,"), ("the", " "),
]  # fmt: skip


@pytest.mark.parametrize("bos", ["auto", "always", "never"])
@pytest.mark.parametrize("kind", ["gpt-2", "no bos", "normaliser", "llama-3", "long bos", "eos behind"])
def test_requests_become_the_tokens_that_lm_eval_makes_of_them(kind: str, bos: Bos, tmp_path_factory) -> None:
    tokenizer = opened(kind, tmp_path_factory.mktemp("tokenizers"))
    if kind == "long bos":
        pairs = [
            ("<b", " of s> the"),
            ("<b", " of s>"),
            ("<b of s>", " the"),
            ("<b of", " s> the"),
            ("<b of s> a", " b"),
        ]
        assert Encoder(tokenizer, bos).start == "<b of s>"
    else:
        pairs = PAIRS
        assert Encoder(tokenizer, bos).start == "<s>"
    for pair in pairs:
        [(context, continuation)] = as_lm_eval(tokenizer, bos, [pair])
        if context and continuation:
            found = Encoder(tokenizer, bos).pairs([pair])[0]
            assert [part.tolist() for part in found] == [context, continuation], pair
        else:
            with pytest.raises(UserError, match="no tokens"):
                Encoder(tokenizer, bos).pairs([pair])
    usable = [p for p in pairs if all(as_lm_eval(tokenizer, bos, [p])[0])]
    together = Encoder(tokenizer, bos).pairs(usable)
    assert [(a.tolist(), b.tolist()) for a, b in together] == as_lm_eval(tokenizer, bos, usable), "in any company"


def ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize(("bos", "first"), [("auto", [0]), ("always", [0]), ("never", [])])
def test_olmes_puts_one_bos_before_a_context_whatever_it_begins_with(bos: Bos, first: list[int], tmp_path) -> None:
    tokenizer = open_tokenizer(write_tokenizer(tmp_path / "t", adds_bos=False))
    encoder, cat = Encoder(tokenizer, bos), ids(tokenizer, "cat")
    found = olmes.encode(
        encoder, [("cat", " the"), ("<s>cat", " the"), ("<s><s>cat", " the"), ("", " the"), ("</s>cat", "<s>")]
    )
    contexts = [context.tolist() for context, _ in found]
    assert contexts == [[*first, *cat], [0, *cat], [0, 0, *cat], [0], [*first, 1, *cat]]
    assert [tail.tolist() for _, tail in found] == [ids(tokenizer, " the")] * 4 + [[0]]
    with pytest.raises(UserError, match="the continuation '' has no tokens"):
        olmes.encode(encoder, [("cat", "")])


def test_opencompass_scores_all_but_the_first_token_of_the_whole_prompt(tmp_path) -> None:
    tokenizer = open_tokenizer(write_tokenizer(tmp_path / "t", adds_bos=True))
    [(first, others)] = opencompass_ppl.encode(Encoder(tokenizer, "auto"), [("the ", "cat")])
    assert [*first, *others] == [0, *ids(tokenizer, "the cat")] and len(first) == 1
    [(first, others)] = opencompass_ppl.encode(Encoder(tokenizer, "never"), [("the ", "cat")])
    assert [*first, *others] == ids(tokenizer, "the cat") and len(first) == 1
    assert [part.tolist() for part in opencompass_ppl.encode(Encoder(tokenizer, "auto"), [("", "<")])[0]] == [
        [0],
        ids(tokenizer, "<"),
    ]
    with pytest.raises(UserError, match="fewer than two tokens"):
        opencompass_ppl.encode(Encoder(tokenizer, "never"), [("", "<")])


def test_strings_come_back_in_their_order_however_many_there_are(tmp_path, monkeypatch) -> None:
    """More than the tokenizer is handed at a time, with repetitions, and some with BOS already."""
    monkeypatch.setattr(encode, "BATCH", 3)
    tokenizer = open_tokenizer(write_tokenizer(tmp_path / "t", adds_bos=True))
    strings = [WORDS[i % 7] + "\n" * (i % 3) + WORDS[i % 5 + 2] for i in range(20)] + ["<s>cat", "<s>cat\ndog", ""]
    whole = [ids(tokenizer, string) for string in strings]
    bos = lambda string, tokens: tokens if string.startswith("<s>") else [0, *tokens]
    of = lambda *arguments: [tokens.tolist() for tokens in Encoder(tokenizer, *arguments[:1]).texts(*arguments[1:])]
    assert of("auto", strings) == [bos(*one) for one in zip(strings, whole, strict=True)]
    assert of("never", strings) == of("auto", strings, False) == whole
    for count in range(1, 8):  # the last batch full or not
        assert of("never", strings[:count], False) == whole[:count]
    assert of("never", strings, True) == [[0, *tokens] for tokens in whole]


def test_an_empty_context_becomes_bos_else_eos(tmp_path) -> None:
    tokenizer = open_tokenizer(write_tokenizer(tmp_path / "t", adds_bos=False))
    assert prefix_token(tokenizer) == 0
    tokenizer.bos_token = None
    assert prefix_token(tokenizer) == 1 and Encoder(tokenizer, "auto").pairs([("", "a")])[0][0].tolist() == [1]
    assert olmes.encode(Encoder(tokenizer, "always"), [("", "a")])[0][0].tolist() == [1]
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="neither a BOS nor an EOS token"):
        prefix_token(tokenizer)
