"""Encoding a prompt line by line gives the tokens of encoding it as a whole, for every tokenizer; or it is not done."""

import functools
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from scoring_examples import WORDS
from tokenizer_examples import CUT, EXTRA, LLAMA3, WHOLE, byte_level, changed, opened, put, space_mark
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from fineline_jax.scoring.modes.encode import Encoder
from fineline_jax.tokenizers.safe_cuts import SafeCuts, find_safe_cuts

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
    found = find_safe_cuts(tokenizer)
    assert (found is not None) == (kind in CUT)
    fast, plain = Encoder(tokenizer, "auto"), Encoder(tokenizer, "auto")
    plain.__dict__["safe_cuts"] = None  # nothing is cut

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
    found = find_safe_cuts(tokenizer)
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
    found = find_safe_cuts(PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    assert found is not None
    assert found.pieces("ba\nb") == ["ba\nb"] and found.pieces("ab\nb") == ["ab", "\nb"]
    assert not found.separates("a", "\nb") and found.separates("a", " b")


# Which tokenizers are cut


TEMPLATE_END = {"type": "TemplateProcessing", "pair": [], "special_tokens": {
    "</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}}, "single": [
    {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}]}  # fmt: skip
NOT_CUT = {
    "special tokens behind the text": ("words", ("post_processor", TEMPLATE_END)),
    "dropout": ("words", ("model.dropout", 0.5)),
    "marks on pieces inside words": ("words", ("model.merges", []), ("model.continuing_subword_prefix", "##")),
    "marks on the ends of words": ("words", ("model.end_of_word_suffix", "</w>")),
    "a space before the text": ("words", ("pre_tokenizer.add_prefix_space", True)),
    "another normaliser": ("words", ("normalizer", {"type": "NFKC"})),
    "no expression at all": ("words", ("pre_tokenizer.use_regex", False)),
    "a token that holds a space behind a letter": ("words", ("added_tokens.3", EXTRA | {"content": "a b"})),
    "no normaliser for the mark": ("mark", ("normalizer", {"type": "NFC"})),
    "a normaliser more": ("mark", ("normalizer.normalizers.0", {"type": "Lowercase"})),
    "whole words before merges": ("mark", ("model.ignore_merges", True)),
    "another mark": ("metaspace", ("pre_tokenizer.replacement", "_")),
    "a normaliser beside the mark": ("metaspace", ("normalizer", {"type": "NFC"})),
    "an expression twice": ("tiktoken", ("pre_tokenizer.pretokenizers.1.use_regex", True)),
    "an expression that removes": ("tiktoken", ("pre_tokenizer.pretokenizers.0.behavior", "Removed")),
    "an expression of what lies between": ("tiktoken", ("pre_tokenizer.pretokenizers.0.invert", True)),
    "an expression that is not known": ("tiktoken", ("pre_tokenizer.pretokenizers.0.pattern", {"Regex": r"\w+\s|."})),
}  # fmt: skip
BASES = {"words": byte_level, "tiktoken": lambda: byte_level(LLAMA3), "mark": lambda: space_mark(False),
         "metaspace": lambda: space_mark(True)}  # fmt: skip


@functools.cache
def base(name: str) -> Tokenizer:
    return BASES[name]()


@pytest.mark.parametrize("reason", NOT_CUT)
def test_a_tokenizer_for_which_a_cut_is_not_proven_is_not_cut(reason: str) -> None:
    name, *changes = NOT_CUT[reason]
    before = changed(base(name), lambda state: [put(state, *one) for one in changes[:-1]])
    assert find_safe_cuts(before) is not None
    after = changed(base(name), lambda state: [put(state, *one) for one in changes])
    assert find_safe_cuts(after) is None


def test_blanks_that_are_tokens_may_stand_at_a_cut_unless_they_take_their_neighbours() -> None:
    for option in (None, "lstrip", "rstrip", "single_word"):
        token = EXTRA | {"content": "  ", "special": False} | ({option: True} if option else {})
        found = find_safe_cuts(changed(base("words"), lambda state, t=token: put(state, "added_tokens.2", t)))
        assert (found is not None) == (option is None)


def test_a_string_is_cut_only_where_its_tokenizer_would_see_no_difference() -> None:
    of = lambda name, change=lambda state: None: find_safe_cuts(changed(base(name), change))
    words, mark, tiktoken = of("words"), of("mark"), of("tiktoken")
    composed = of("tiktoken", lambda state: put(state, "normalizer", {"type": "NFC"}))
    assert words.pieces("\u2581a\nb") == ["\u2581a", "\nb"] and mark.pieces("\u2581a\nb") == ["\u2581a\nb"]
    assert words.pieces("a<s>\nb") == ["a<s>\nb"] and words.pieces("a\nb</s>") == ["a\nb</s>"]
    assert tiktoken.pieces("a\nb)\nc5\nd") == ["a", "\nb)\nc5", "\nd"] and words.pieces("b)\nc") == ["b)", "\nc"]
    assert tiktoken.separates("a)", " b") and not tiktoken.separates("a)", "\nb") and tiktoken.separates("a", "\nb")
    assert not words.separates("a", "\tb") and not words.separates("", " b") and not words.separates("a", "")
    assert composed.pieces("e\u0301\nb") == ["e\u0301\nb"] and tiktoken.pieces("e\u0301b\nb") == ["e\u0301b", "\nb"]
    assert not composed.separates("ba", " e\u0301") and composed.separates("ba", " \u00e9")
    assert words.pieces("a \nb") == ["a \nb"] and words.pieces("a\n\n\nb") == ["a", "\n\n\nb"]


def test_a_mark_that_is_no_piece_of_the_vocabulary_is_not_cut_off() -> None:
    """Unknown characters are joined with unknown ones beside them."""

    def made(pieces: list[str], fallback: bool = False) -> SafeCuts:
        vocabulary = {piece: i for i, piece in enumerate(pieces)}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=fallback))
        tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
        found = find_safe_cuts(PreTrainedTokenizerFast(tokenizer_object=tokenizer))
        assert found is not None
        return found

    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    cuts = lambda found: (found.separates("a", " b"), found.separates("a", "\nb"))
    assert cuts(made(["<unk>", "a", "b", "\u2581", "\n"])) == (True, True)
    assert cuts(made(["<unk>", "a", "b", "\u2581"])) == (True, False)
    assert cuts(made(["<unk>", "a", "b", "\n"])) == (False, True)
    assert cuts(made(["<unk>", "a", "b", *bytes_], fallback=True)) == (True, True)
    assert cuts(made(["<unk>", "a", "b", *bytes_])) == (False, False)
    assert cuts(made(["<unk>", "a", "b", *bytes_[1:]], fallback=True)) == (False, False)
    assert cuts(made(["<unk>", "a", "b", "\u2581", "\n", "xa\u2581", "b\n"])) == (False, True)
