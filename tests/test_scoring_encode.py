"""Encoding a prompt line by line gives the tokens of encoding it as a whole, for every tokenizer; or it is not done."""

import functools
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from scoring_examples import WORDS, write_tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from fineline_jax.scoring import boundaries
from fineline_jax.scoring.encode import Encoder
from fineline_jax.scoring.tokenizer import open_tokenizer
from fineline_jax.world import generate

LINES = [" ".join(WORDS[i : i + 5]) + end for i in range(10) for end in ("\n", "\n\n", ".\n", " \n", ": ", ")\n\n")]
LLAMA3, QWEN2, OLMO2 = sorted(boundaries._TIKTOKEN, key=lambda text: (text.startswith("'"), r"{1,3}" not in text))


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
    made = {
        "llama-3": lambda: byte_level(LLAMA3),
        "qwen-2": lambda: byte_level(QWEN2, nfc=True),
        "olmo-2": lambda: byte_level(OLMO2),
        "unknown words": lambda: byte_level(r"\w+\s|[^\w]"),
        "blanks": lambda: byte_level(nfc=True),
        "normaliser": lambda: space_mark(False),
        "metaspace": lambda: space_mark(True),
        "metaspace, split": lambda: space_mark(True, split=True),
    }[kind]()
    if kind == "blanks":  # as GPT-NeoX has them
        made.add_tokens([AddedToken(" " * n, normalized=True, special=False) for n in range(2, 9)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


CUT = ("gpt-2", "llama-3", "qwen-2", "olmo-2", "blanks", "normaliser", "metaspace", "metaspace, split",
       "tokenizers/llama", "tokenizers/gpt-neox-20b", "models/tinystories-260k")  # fmt: skip
WHOLE = ("unknown words", "world")
_PIECES = st.sampled_from(
    [*WORDS, " ", "  ", "\n", "\n\n", "\n \n", "\t", "\r\n", ".", ":", "!?", "'s", " 's", "3", "1024", "(", "_",
     "\u2581",
     "\u00a0", "\u2003", "\u0301", "e\u0301", "\u200d", "\u4e2d\u6587", "\u3002", "\x1c", "\x85", "\u0661",
     "\U0001f600",
     "<s>", "</s>", "<|endoftext|>", "<0x0A>", "Answer:", " A", "the cat", "\n\nQ:"]
)  # fmt: skip
TEXT = st.lists(st.one_of(_PIECES, _PIECES, st.text(max_size=3)), max_size=25).map("".join)


@pytest.mark.parametrize("kind", [*CUT, *WHOLE])
def test_pieces_give_the_tokens_of_the_whole(kind: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    tokenizer = opened(kind, tmp_path_factory.mktemp("tokenizers"))
    found = boundaries.find_boundaries(tokenizer)
    assert (found is not None) == (kind in CUT)
    fast, plain = Encoder(tokenizer, "auto"), Encoder(tokenizer, "auto")
    plain.__dict__["boundaries"] = None  # nothing is cut

    @settings(
        max_examples=150,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
    @given(prefix=TEXT, question=TEXT, choices=st.lists(TEXT, min_size=1, max_size=3))
    @example("The cat.\n\nQ: two?\n\n", "Q: ice\nA:", [" the cat", "\n\nthe cat", " ", "  \n x"])
    @example("(cat)\n", "dog)", ["\ncat", " cat"])
    def check(prefix: str, question: str, choices: list[str]) -> None:
        context = prefix + question
        strings = [prefix, context, *[context + choice for choice in choices]]
        for special in (None, False):
            for ours, theirs in zip(fast.texts(strings, special), plain.texts(strings, special), strict=True):
                assert ours.tolist() == theirs.tolist()
        for choice in choices:
            assert outcome(fast, context, choice) == outcome(plain, context, choice)

    check()


def outcome(encoder: Encoder, context: str, choice: str) -> Any:
    """Tokens, or the error for a request without any."""
    try:
        return [part.tolist() for part in encoder.pairs([(context, choice)])[0]]
    except Exception as error:
        return str(error)


@pytest.mark.parametrize("kind", [kind for kind in CUT if kind not in ("normaliser", "metaspace", "metaspace, split")])
def test_a_prompt_with_solved_examples_is_cut_into_its_lines(kind: str, tmp_path_factory) -> None:
    tokenizer = opened(kind, tmp_path_factory.mktemp("tokenizers"))
    found = boundaries.find_boundaries(tokenizer)
    assert found is not None
    text = "Solved examples\n\nQ two\nA ice\n\nQ the cat\nA"
    assert found.pieces(text) == ["Solved examples", "\n\nQ two", "\nA ice", "\n\nQ the cat", "\nA"]
    assert found.separates("Answer:", " A") and not found.separates("Answer:", "A")
    assert not found.separates("Answer: ", " A") and not found.separates(tokenizer.bos_token, " A")


def test_a_merge_across_a_line_break_forbids_the_cut() -> None:
    """A piece that joins a letter with the line break behind it."""
    vocabulary = {piece: i for i, piece in enumerate(["<unk>", "\u2581", "\n", "a", "b", "a\n"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "\n")], unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    found = boundaries.find_boundaries(PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    assert found is not None
    assert found.pieces("ba\nb") == ["ba\nb"] and found.pieces("ab\nb") == ["ab", "\nb"]
    assert not found.separates("a", "\nb") and found.separates("a", " b")
