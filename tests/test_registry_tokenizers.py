"""Tokenizers of registered families give the ids their models were trained on."""

import functools
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fineline_jax.scoring.tokenizer import open_tokenizer


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
    ours, oracle = _opened(trained)
    assert ours(text, add_special_tokens=False).input_ids == oracle.encode(text)


@functools.cache
def _opened(folder: Path) -> tuple[Any, Any]:
    import sentencepiece

    return open_tokenizer(folder), sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
