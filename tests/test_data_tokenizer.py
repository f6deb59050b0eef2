"""Tokenizers as their own authors' code runs them: which file, which ids, which special tokens."""

import hashlib
import json
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from data_examples import BOS, EOS, letters, letters_tokenizer

from fineline_jax.data.tokenizer import copy_tokenizer, load_tokenizer
from fineline_jax.errors import UserError


@pytest.fixture(scope="module")
def unigrams(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unigrams")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat", "a dog ate the cat"] * 20),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=30, bos_id=0, unk_id=5, eos_id=-1, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    return folder


def special_of(folder: Path, vocabulary: dict[str, int], **side_files: object) -> tuple[int | None, int | None]:
    """(BOS, EOS) of a tokenizer with that vocabulary and those files beside it."""
    folder.mkdir()
    model = tokenizers.models.WordLevel(vocabulary, unk_token=next(iter(vocabulary)))  # pyright: ignore
    tokenizers.Tokenizer(model).save(str(folder / "tokenizer.json"))
    for name, content in side_files.items():
        (folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    opened = load_tokenizer(folder)
    return opened.bos_id, opened.eos_id


def test_special_tokens_are_those_of_the_side_files_and_else_the_usual_ones(tmp_path: Path) -> None:
    llama = {"<unk>": 0, "<s>": 1, "</s>": 2, "<|endoftext|>": 3, "x": 4}
    assert special_of(tmp_path / "a", llama) == (1, 2)
    assert special_of(tmp_path / "b", {"<|begin_of_text|>": 7, "<|end_of_text|>": 8}) == (7, 8)
    assert special_of(tmp_path / "c", {"<｜begin▁of▁sentence｜>": 7, "<｜end▁of▁sentence｜>": 8}) == (7, 8)
    assert special_of(tmp_path / "d", {"<|endoftext|>": 3, "x": 4}) == (3, 3)
    assert special_of(tmp_path / "e", {"x": 0}) == (None, None)
    # All at once: Llama's go before Llama 3's, those before DeepSeek's, those before GPT-NeoX's.
    names = ["<|endoftext|>", "<｜begin▁of▁sentence｜>", "<|begin_of_text|>", "<s>"]
    names += ["<｜end▁of▁sentence｜>", "<|end_of_text|>", "</s>"]
    for count, expected in ((1, (0, 0)), (2, (1, 0)), (3, (2, 0)), (5, (3, 4)), (6, (3, 5)), (7, (3, 6))):
        assert special_of(tmp_path / f"f{count}", {name: i for i, name in enumerate(names[:count])}) == expected
    for name in ("special_tokens_map", "tokenizer_config"):
        named = {"bos_token": "x", "eos_token": {"content": "<unk>", "lstrip": False}}
        assert special_of(tmp_path / name, llama, **{name: named}) == (4, 0)
    both = {"special_tokens_map": {"bos_token": "x"}, "tokenizer_config": {"bos_token": "<unk>", "eos_token": None}}
    assert special_of(tmp_path / "both", llama, **both) == (0, 2)
    # Named, but no token: there is none, whatever else would do.
    assert special_of(tmp_path / "absent", llama, tokenizer_config={"eos_token": "<end>"}) == (1, None)
    for bad, message in (("{", "not JSON"), ("[]", "no JSON object")):
        with pytest.raises(UserError, match=rf"tokenizer_config\.json: {message}"):
            special_of(tmp_path / message.replace(" ", "_"), llama, tokenizer_config=bad)


def test_a_tokenizer_json_encodes_without_special_tokens_cuts_or_padding(tmp_path: Path) -> None:
    letters_tokenizer(tmp_path)
    model = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    model.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", BOS)])  # pyright: ignore
    model.enable_truncation(3)
    model.enable_padding(length=5)
    model.add_tokens(["zz"])  # id 29
    model.save(str(tmp_path / "tokenizer.json"))
    opened = load_tokenizer(tmp_path)
    assert opened.encode(["abcdef", "", "azzb"]) == [letters("abcdef"), [], [*letters("a"), 29, *letters("b")]]
    assert (opened.vocab_size, opened.bos_id, opened.eos_id) == (30, BOS, EOS)
    assert opened.sha256 == hashlib.sha256((tmp_path / "tokenizer.json").read_bytes()).hexdigest()
    assert opened.path == tmp_path / "tokenizer.json"


def test_the_size_of_a_vocabulary_with_gaps_is_one_more_than_its_largest_id(tmp_path: Path) -> None:
    special_of(tmp_path / "a", {"x": 0, "y": 40})
    assert load_tokenizer(tmp_path / "a").vocab_size == 41


def test_a_bare_sentencepiece_model_has_its_ids_in_the_order_of_the_texts(unigrams: Path) -> None:
    opened = load_tokenizer(unigrams)
    oracle = sentencepiece.SentencePieceProcessor(str(unigrams / "tokenizer.model"))
    texts = ["the cat", "", "a dög", *(f"mat {number}" for number in range(20))]
    assert opened.encode(texts) == [oracle.encode(text) for text in texts]
    assert (opened.vocab_size, opened.bos_id, opened.eos_id) == (len(oracle), 0, None)
    assert opened.sha256 == hashlib.sha256((unigrams / "tokenizer.model").read_bytes()).hexdigest()


def test_which_file_is_the_tokenizer(tmp_path: Path, unigrams: Path) -> None:
    both = tmp_path / "both"
    both.mkdir()
    letters_tokenizer(both)
    (both / "tokenizer.model").write_bytes((unigrams / "tokenizer.model").read_bytes())
    assert load_tokenizer(both).path.name == "tokenizer.json"
    assert load_tokenizer(both / "tokenizer.model").bos_id == 0
    (both / "notes.txt").touch()
    for nothing in (tmp_path / "nowhere", tmp_path, both / "notes.txt"):
        with pytest.raises(UserError, match="no tokenizer; give a folder"):
            load_tokenizer(nothing)
    (both / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json: not a tokenizer\.json"):
        load_tokenizer(both)
    (both / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(UserError, match=r"tokenizer\.model: not a SentencePiece model"):
        load_tokenizer(both / "tokenizer.model")


def test_a_copy_has_hugging_faces_names_and_the_same_special_tokens(tmp_path: Path, unigrams: Path) -> None:
    vocabulary = {"x": 0, "y": 1}
    special_of(tmp_path / "a", vocabulary, special_tokens_map={"bos_token": "x"}, tokenizer_config={"eos_token": "y"})
    (tmp_path / "a" / "tokenizer.json").rename(tmp_path / "a" / "odd.json")
    for name in ("added_tokens.json", "weights.bin"):
        (tmp_path / "a" / name).write_text("{}")
    opened = load_tokenizer(tmp_path / "a" / "odd.json")
    copy_tokenizer(opened, tmp_path / "copies" / "b")
    assert sorted(path.name for path in (tmp_path / "copies" / "b").iterdir()) == [
        "added_tokens.json", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    copied = load_tokenizer(tmp_path / "copies" / "b")
    assert (copied.sha256, copied.bos_id, copied.eos_id) == (opened.sha256, 0, 1)
    copy_tokenizer(load_tokenizer(unigrams), tmp_path / "c")
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["tokenizer.model"]
