"""Encoding a prompt line by line gives the tokens of encoding it as a whole, for every tokenizer; or it is not done."""

import dataclasses
import functools
import json
import os
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from scoring_examples import WORDS, write_tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from fineline_jax.errors import UserError
from fineline_jax.scoring import boundaries, encode
from fineline_jax.scoring import tokenizer as tokenizers
from fineline_jax.scoring.encode import Encoder
from fineline_jax.scoring.modes import olmes, opencompass_ppl
from fineline_jax.scoring.tokenizer import Bos, identity, open_tokenizer, prefix_token
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


# Which tokenizers are cut


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


TEMPLATE_END = {"type": "TemplateProcessing", "pair": [], "special_tokens": {
    "</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}}, "single": [
    {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}]}  # fmt: skip
EXTRA = {"id": 700, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
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
    assert boundaries.find_boundaries(before) is not None
    after = changed(base(name), lambda state: [put(state, *one) for one in changes])
    assert boundaries.find_boundaries(after) is None


def test_blanks_that_are_tokens_may_stand_at_a_cut_unless_they_take_their_neighbours() -> None:
    for option in (None, "lstrip", "rstrip", "single_word"):
        token = EXTRA | {"content": "  ", "special": False} | ({option: True} if option else {})
        found = boundaries.find_boundaries(
            changed(base("words"), lambda state, t=token: put(state, "added_tokens.2", t))
        )
        assert (found is not None) == (option is None)


def test_a_string_is_cut_only_where_its_tokenizer_would_see_no_difference() -> None:
    of = lambda name, change=lambda state: None: boundaries.find_boundaries(changed(base(name), change))
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

    def made(pieces: list[str], fallback: bool = False) -> boundaries.Boundaries:
        vocabulary = {piece: i for i, piece in enumerate(pieces)}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=fallback))
        tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
        found = boundaries.find_boundaries(PreTrainedTokenizerFast(tokenizer_object=tokenizer))
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


# Opening and recognising


def test_a_bare_tokenizer_json_takes_the_usual_names_for_its_special_tokens(tmp_path) -> None:
    def bare(*special: str) -> tuple[Any, Any]:
        tokenizer = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
        tokenizer.add_special_tokens(list(special))
        folder = tmp_path / repr(special).replace("/", "")
        folder.mkdir()
        tokenizer.save(str(folder / "tokenizer.json"))
        found = open_tokenizer(folder)
        return found.bos_token, found.eos_token

    assert bare("<s>", "</s>", "<|endoftext|>") == ("<s>", "</s>")
    assert bare("<s>", "<|endoftext|>") == ("<|endoftext|>",) * 2
    assert bare("<s>") == (None, None)


def test_an_empty_context_becomes_bos_else_eos(tmp_path) -> None:
    tokenizer = open_tokenizer(write_tokenizer(tmp_path / "t", adds_bos=False))
    assert prefix_token(tokenizer) == 0
    tokenizer.bos_token = None
    assert prefix_token(tokenizer) == 1 and Encoder(tokenizer, "auto").pairs([("", "a")])[0][0].tolist() == [1]
    assert olmes.encode(Encoder(tokenizer, "always"), [("", "a")])[0][0].tolist() == [1]
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="neither a BOS nor an EOS token"):
        prefix_token(tokenizer)


def test_a_tokenizer_is_the_same_by_what_it_makes_of_texts_and_not_by_its_files(tmp_path) -> None:
    folder = write_tokenizer(tmp_path / "t", adds_bos=True)
    first = identity(open_tokenizer(folder))
    assert first.adds_bos and len(first.sha256) == 64

    def of(where: str, value: Any) -> Any:
        copy = tmp_path / where
        copy.mkdir(exist_ok=True)
        state = json.loads((folder / "tokenizer.json").read_text())
        put(state, where, value)
        state = dict(reversed(state.items()))
        for name, content in (("tokenizer.json", json.dumps(state)), ("tokenizer_config.json", "{}")):
            (copy / name).write_text(content)
        return identity(PreTrainedTokenizerFast(tokenizer_file=str(copy / "tokenizer.json"), bos_token="<s>"))

    assert of("truncation", {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0}) == first
    assert of("added_tokens.1", EXTRA | {"id": 1, "content": "</s>", "special": False}) == first
    assert of("post_processor", None) == dataclasses.replace(first, adds_bos=False)
    merges = json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]
    others = [("model.merges", merges[:-1]), ("normalizer", {"type": "NFC"}), ("pre_tokenizer.add_prefix_space", True)]
    others.append(("added_tokens.1", EXTRA | {"id": 1, "content": "<e>"}))
    found = {of(*other).sha256 for other in others}
    assert len(found) == 4 and first.sha256 not in found


def test_only_bpe_models_that_leave_characters_are_read_from_sentencepiece(tmp_path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "corpus.txt").write_text("\n".join(["the cat  runs", "under the house", "Fäden"] * 30))

    def trained(name: str, **options: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        options = {"model_type": "bpe", "normalization_rule_name": "identity"} | options
        sentencepiece.SentencePieceTrainer.Train(
            input=str(tmp_path / "corpus.txt"), model_prefix=str(folder / "tokenizer"), num_threads=1, minloglevel=2,
            vocab_size=40, hard_vocab_limit=False, **options,
        )  # fmt: skip
        return folder

    texts = ["the cat  runs", " house\n  cat", "Straße ☃☃ the", "the<", ""]
    for name, options in (("plain", {}), ("no prefix", {"add_dummy_prefix": False}), ("no bos", {"bos_id": -1})):
        folder = trained(name, **options)
        ours, oracle = open_tokenizer(folder), sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
        bos = [oracle.bos_id()] if oracle.bos_id() >= 0 else []
        assert [ours(text).input_ids for text in texts] == [[*bos, *oracle.encode(text)] for text in texts]
        assert [ours(t, add_special_tokens=False).input_ids for t in texts] == [oracle.encode(text) for text in texts]
        assert (ours.bos_token_id, ours.eos_token_id) == (oracle.bos_id() if bos else None, oracle.eos_id())
        assert ours.decode(oracle.encode("the cat"), clean_up_tokenization_spaces=False).strip() == "the cat"
    for name, options in (("unigram", {"model_type": "unigram"}), ("nfkc", {"normalization_rule_name": "nmt_nfkc"})):
        with pytest.raises(UserError, match="only BPE models that leave characters as they are"):
            open_tokenizer(trained(name, **options))
    (tmp_path / "plain" / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        open_tokenizer(tmp_path / "plain")


def test_a_tokenizer_is_opened_by_its_own_class_with_the_policy_and_without_foreign_code(tmp_path, monkeypatch) -> None:
    """As lm-eval's backend: the flag goes to the constructor, since some tokenizers build their template there."""
    asked: list[dict] = []
    has_backend = types.SimpleNamespace(backend_tokenizer=None)
    found: list[Any] = [has_backend] * 3 + [object()]
    monkeypatch.setattr(
        tokenizers.AutoTokenizer, "from_pretrained", lambda folder, **options: (asked.append(options), found.pop(0))[1]
    )
    for name in ("tokenizer_config.json", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    before = tokenizers.logging.get_verbosity()
    tokenizers.logging.set_verbosity_info()
    assert open_tokenizer(tmp_path) is open_tokenizer(tmp_path, "always") is open_tokenizer(tmp_path, "never")
    plain = {"trust_remote_code": False, "model_max_length": 1 << 40}
    assert asked == [plain, plain | {"add_bos_token": True}, plain | {"add_bos_token": False}]
    with pytest.raises(UserError, match="object has no tokenizers backend, which is needed"):
        open_tokenizer(tmp_path)
    assert tokenizers.logging.get_verbosity() == tokenizers.logging.INFO
    tokenizers.logging.set_verbosity(before)
    with pytest.raises(UserError, match="no tokenizer found; expected"):
        open_tokenizer(tmp_path / "nowhere")
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(tokenizers.UnreadableTokenizer, match=r"tokenizer\.json: the tokenizer cannot be opened"):
        open_tokenizer(tmp_path)
