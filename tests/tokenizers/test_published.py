"""Tokenizers of registered families give the ids their models were trained on."""

import functools
import itertools
import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fineline_jax.tokenizers.identity import encode, vocabulary_size
from fineline_jax.tokenizers.open import open_tokenizer


def test_ambers_tokenizer_gives_back_the_ids_of_its_training_data(shared_data: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = shared_data / "tokenizers" / "llama"
    stream = [
        token
        for line in (shared_data / "amber" / "good_sample.jsonl").read_text().splitlines()
        for token in json.loads(line)["token_ids"]
    ]
    ends = [position for position, token in enumerate(stream) if token == 2]
    documents = [stream[start + 1 : end] for start, end in itertools.pairwise(ends)]
    decode = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model")).decode
    tokenizer = open_tokenizer(folder)  # a bare tokenizer.model, as the registry names it for OpenLLaMA and Baichuan2
    found = tokenizer([decode(ids) for ids in documents], add_special_tokens=False)["input_ids"]
    assert len(documents) > 20 and found == documents
    assert tokenizer("x").input_ids[0] == 1  # Llama's default


@pytest.mark.parametrize(
    ("name", "bos", "eos", "size"),
    [
        ("tokenizers/llama", 1, 2, 32_000),
        ("tokenizers/gpt-neox-20b", 0, 0, 50_277),
        ("models/tinystories-260k", 1, 2, 512),
    ],
)
def test_special_tokens_of_known_tokenizers(shared_data: Path, name: str, bos: int, eos: int, size: int) -> None:
    model = open_tokenizer(shared_data / name)
    assert (model.bos_token_id, model.eos_token_id, vocabulary_size(model)) == (bos, eos, size)
    assert all(bos not in ids for ids in encode(model, ["a b", "c"]))


def test_tinystories_tokenizer_gives_its_golden_ids(shared_data: Path) -> None:
    folder = shared_data / "models" / "tinystories-260k"
    golden = json.loads((folder / "golden.json").read_text())["items"]
    tokenizer = open_tokenizer(folder)
    assert [tokenizer(item["text"]).input_ids for item in golden] == [item["ids"] for item in golden]


def test_pythias_tokenizer_gives_known_ids_and_no_bos(shared_data: Path) -> None:
    tokenizer = open_tokenizer(shared_data / "tokenizers" / "gpt-neox-20b")
    # EleutherAI's documented examples: runs of spaces are tokens of their own, nothing is put around a text
    assert tokenizer("Hello world").input_ids == [12092, 1533]
    assert tokenizer("<|endoftext|>").input_ids == [0]
    text = "def f(x):\n        return x  # Fäden 東京\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer) == 50277


def test_pythias_tokenizer_gives_the_ids_of_its_merges_applied_one_by_one(shared_data: Path) -> None:
    """GPT-2's algorithm (openai/gpt-2, encoder.py) written out over the same tables."""
    regex = pytest.importorskip("regex")
    folder = shared_data / "tokenizers" / "gpt-neox-20b"
    tables = json.loads((folder / "tokenizer.json").read_text())
    vocabulary: dict[str, int] = tables["model"]["vocab"]
    added = {token["content"]: token["id"] for token in tables["added_tokens"]}
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in tables["model"]["merges"])
    ranks = {tuple(pair): rank for rank, pair in enumerate(pairs)}
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    words = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    specials = regex.compile("|".join(regex.escape(one) for one in sorted(added, key=len, reverse=True)))

    @functools.cache
    def of_word(word: str) -> list[int]:
        parts = [letters[byte] for byte in word.encode()]
        while len(parts) > 1:
            rank, at = min((ranks.get(pair, 1 << 30), i) for i, pair in enumerate(itertools.pairwise(parts)))
            if rank == 1 << 30:
                break
            parts[at : at + 2] = ["".join(parts[at : at + 2])]
        return [vocabulary[part] for part in parts]

    def of_text(text: str) -> list[int]:
        text, ids, at = unicodedata.normalize("NFC", text), [], 0
        for special in [*specials.finditer(text), None]:
            for word in words.findall(text[at : special.start() if special else len(text)]):
                ids += of_word(word)
            if special:
                ids.append(added[special[0]])
                at = special.end()
        return ids

    texts = (shared_data / "text" / "wikitext2_valid.txt").read_text().splitlines()[:1500]
    texts += (shared_data / "text" / "tinyshakespeare.txt").read_text()[:40_000].split("\n\n")
    texts += [
        "def f(x):\n        return  x\t# Fa\u0308den 東京 🙂\r\n",
        " " * 40 + "x",
        "a<|endoftext|> b",
        "don't  \n \n12345'S",
    ]
    ours = open_tokenizer(folder)(texts).input_ids
    assert sum(map(len, ours)) > 50_000
    assert ours == [of_text(text) for text in texts]


@pytest.fixture(scope="module", params=[True, False], ids=["spaces joined", "spaces kept"])
def trained(request, tmp_path_factory) -> Path:
    """A BPE model as OpenLLaMA's: v1 joins runs of spaces (SentencePiece's default), v2 does not."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("bpe")
    lines = [
        "def f(x):",
        "    return x  +  1",
        "the cat runs under the house",
        "the  house  runs",
        "Fäden 東京 and, then!",
    ]
    (folder / "corpus.txt").write_text("\n".join(lines * 20))
    sentencepiece.SentencePieceTrainer.Train(
        input=str(folder / "corpus.txt"), model_prefix=str(folder / "tokenizer"), model_type="bpe", vocab_size=340,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=request.param,
        minloglevel=2, num_threads=1,
    )  # fmt: skip
    return folder


@settings(max_examples=400, deadline=None)
@given(text=st.text(st.sampled_from("ab \n\t  therunsd()+:xé東▁\u00a0"), max_size=24) | st.text(max_size=12))
def test_a_bare_model_gives_sentencepieces_ids_whether_it_joins_spaces_or_not(trained: Path, text: str) -> None:
    assume(not any(special in text for special in ("<s>", "</s>", "<unk>")))
    ours, oracle = _opened(trained)
    assert ours(text, add_special_tokens=False).input_ids == oracle.encode(text)


def test_a_special_token_written_in_a_text_is_that_token_as_in_every_hugging_face_tokenizer(trained: Path) -> None:
    ours, oracle = _opened(trained)
    assert ours("<s>", add_special_tokens=False).input_ids == [oracle.bos_id()]
    whole = ours("the cat</s>the house<unk>", add_special_tokens=False).input_ids
    assert whole == [*oracle.encode("the cat"), oracle.eos_id(), *oracle.encode("the house"), oracle.unk_id()]


@functools.cache
def _opened(folder: Path) -> tuple[Any, Any]:
    import sentencepiece

    return open_tokenizer(folder), sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
