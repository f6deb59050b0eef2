"""One reader of tokenizers: which file, which ids, which special tokens, and how one is recognised again."""

import dataclasses
import json
import types
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
import transformers
from data_examples import BOS, EOS, jsonl, letters, letters_tokenizer
from scoring_examples import write_benchmarks, write_tokenizer
from tokenizer_examples import EXTRA, SHARED_TOKENIZERS, byte_level, put, space_mark
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fineline_jax.cli import main
from fineline_jax.errors import UserError
from fineline_jax.scoring.requests.pack import load
from fineline_jax.tokenizers.files import copy_tokenizer
from fineline_jax.tokenizers.identity import encode, identity, vocabulary_size
from fineline_jax.tokenizers.open import UnreadableTokenizer, open_tokenizer
from fineline_jax.world import generate


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a SentencePiece model whose BOS is 0 and which has no EOS."""
    return train_pieces(tmp_path_factory.mktemp("pieces"), bos_id=0, unk_id=5, eos_id=-1)


def train_pieces(folder: Path, **options: Any) -> Path:
    folder.mkdir(exist_ok=True)
    options = {"model_type": "bpe", "normalization_rule_name": "identity", "vocab_size": 40} | options
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat  sat on the mat", "a dog ate the cat", "under the house", "Fäden"] * 20),
        model_prefix=str(folder / "tokenizer"), minloglevel=2, hard_vocab_limit=False, num_threads=1, **options,
    )  # fmt: skip
    return folder


def folder_of(folder: Path, vocabulary: dict[str, int], **side_files: object) -> Path:
    """A tokenizer.json with that vocabulary, and those files beside it."""
    folder.mkdir()
    model = tokenizers.models.WordLevel(vocabulary, unk_token=next(iter(vocabulary)))  # pyright: ignore
    tokenizers.Tokenizer(model).save(str(folder / "tokenizer.json"))
    for name, content in side_files.items():
        (folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def special_of(folder: Path, vocabulary: dict[str, int], **side_files: object) -> tuple[int | None, int | None]:
    """(BOS, EOS) of a tokenizer with that vocabulary and those files beside it."""
    opened = open_tokenizer(folder_of(folder, vocabulary, **side_files))
    return opened.bos_token_id, opened.eos_token_id


# Special tokens


def test_a_bare_tokenizer_json_has_the_first_usual_pair_of_which_it_knows_both(tmp_path: Path) -> None:
    assert special_of(tmp_path / "a", {"<unk>": 0, "<s>": 1, "</s>": 2, "<|endoftext|>": 3, "x": 4}) == (1, 2)
    assert special_of(tmp_path / "b", {"<|begin_of_text|>": 7, "<|end_of_text|>": 8}) == (7, 8)
    assert special_of(tmp_path / "c", {"<｜begin▁of▁sentence｜>": 7, "<｜end▁of▁sentence｜>": 8}) == (7, 8)
    assert special_of(tmp_path / "d", {"<|endoftext|>": 3, "x": 4}) == (3, 3)
    assert special_of(tmp_path / "e", {"x": 0}) == (None, None)
    assert special_of(tmp_path / "one", {"<s>": 0, "<|end_of_text|>": 1}) == (None, None)
    assert special_of(tmp_path / "half", {"<s>": 0, "<|endoftext|>": 1}) == (1, 1)
    # All at once: Llama's go before Llama 3's, those before DeepSeek's, those before GPT-NeoX's.
    names = [
        "<|endoftext|>",
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        "<|begin_of_text|>",
        "<|end_of_text|>",
    ]
    names += ["<s>", "</s>"]
    for count, expected in ((1, (0, 0)), (2, (0, 0)), (3, (1, 2)), (4, (1, 2)), (5, (3, 4)), (6, (3, 4)), (7, (5, 6))):
        assert special_of(tmp_path / f"f{count}", {name: i for i, name in enumerate(names[:count])}) == expected


def test_special_tokens_that_a_file_names_are_those_that_transformers_says(tmp_path: Path) -> None:
    llama = {"<unk>": 0, "<s>": 1, "</s>": 2, "<|endoftext|>": 3, "x": 4}
    added = {"__type": "AddedToken", "content": "<unk>", "lstrip": False, "normalized": False, "rstrip": False,
             "single_word": False}  # fmt: skip
    cases: dict[str, tuple[dict[str, object], tuple[int | None, int | None]]] = {
        "map": ({"special_tokens_map": {"bos_token": "x", "eos_token": {"content": "<unk>", "lstrip": False}}}, (4, 0)),
        "half a map": ({"special_tokens_map": {"bos_token": "x"}}, (4, None)),
        "config": ({"tokenizer_config": {"bos_token": "x", "eos_token": added}}, (4, 0)),
        "both": ({"special_tokens_map": {"bos_token": "x"},
                  "tokenizer_config": {"bos_token": "<unk>", "eos_token": None}}, (4, None)),
        "one in each": ({"special_tokens_map": {"bos_token": "x"}, "tokenizer_config": {"eos_token": "</s>"}}, (4, 2)),
        "named by the class": ({"tokenizer_config": {"tokenizer_class": "GPT2Tokenizer"}}, (3, 3)),
        "a config that names none": ({"tokenizer_config": {}}, (None, None)),
        "a name that is no token becomes one": ({"tokenizer_config": {"eos_token": "<end>"}}, (None, 5)),
    }  # fmt: skip
    for name, (side_files, expected) in cases.items():
        assert special_of(tmp_path / name, llama, **side_files) == expected, name
        oracle = AutoTokenizer.from_pretrained(tmp_path / name)
        assert (oracle.bos_token_id, oracle.eos_token_id) == expected, name
    # Here transformers wants a mark that it is a token; its own older files have none.
    unmarked = {"bos_token": "x", "eos_token": {"content": "<unk>", "lstrip": False}}
    assert special_of(tmp_path / "unmarked", llama, tokenizer_config=unmarked) == (4, 0)
    for bad, message in (("{", "not JSON"), ("[]", "no JSON object"), ("[" * 99_999, "not JSON")):
        folder = folder_of(tmp_path / f"bad {len(bad)}{message}", llama, tokenizer_config=bad)
        for path in (folder, folder / "tokenizer.json"):
            with pytest.raises(UnreadableTokenizer, match=rf"{folder.name}/tokenizer_config\.json: {message}"):
                open_tokenizer(path)


def test_bos_always_puts_the_bos_of_a_bare_tokenizer_json_first(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "a", {"<unk>": 0, "<|begin_of_text|>": 1, "<|end_of_text|>": 2, "x": 3})
    for bos, expected in (("auto", [3]), ("always", [1, 3]), ("never", [3])):
        opened = open_tokenizer(folder, bos)
        assert opened("x").input_ids == encode(opened, ["x"], special_tokens=True)[0] == expected


def test_a_sentencepiece_model_has_its_own_special_tokens_unless_files_beside_it_name_others(tmp_path: Path) -> None:
    folder = train_pieces(tmp_path / "a", bos_id=3, eos_id=7, unk_id=0)
    opened = open_tokenizer(folder)
    assert (opened.bos_token_id, opened.eos_token_id, opened("a").input_ids[0]) == (3, 7, 3)
    size = vocabulary_size(opened)
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "LlamaTokenizer", "add_bos_token": False, "bos_token": "</s>", "pad_token": "<pad>",
        "chat_template": "hello",
    }))  # fmt: skip
    for path in (folder, folder / "tokenizer.model"):
        changed = open_tokenizer(path)
        assert (changed.bos_token_id, changed.eos_token_id, changed.pad_token_id) == (7, 7, size)
        assert not identity(changed).adds_bos and changed.chat_template == "hello"
        assert [identity(open_tokenizer(path, bos)).adds_bos for bos in ("always", "never")] == [True, False]
        # transformers' own way from such a folder joins spaces otherwise
        oracle = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
        texts = ["the cat", " the  cat", "cat   mat\n  the"]
        assert encode(changed, texts) == oracle.encode(texts)


# Ids


def test_a_tokenizer_json_encodes_without_special_tokens_cuts_or_padding(tmp_path: Path) -> None:
    letters_tokenizer(tmp_path)
    model = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    model.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", BOS)])  # pyright: ignore
    model.enable_truncation(3)
    model.enable_padding(length=5, pad_token="<unk>")
    model.add_tokens(["zz"])  # id 29
    model.save(str(tmp_path / "tokenizer.json"))
    opened = open_tokenizer(tmp_path)
    texts = ["abcdef", "", "azzb"]
    assert encode(opened, texts) == [letters("abcdef"), [], [*letters("a"), 29, *letters("b")]]
    assert encode(opened, texts, special_tokens=True) == [[BOS, *ids] for ids in encode(opened, texts)]
    assert (vocabulary_size(opened), opened.bos_token_id, opened.eos_token_id) == (30, BOS, EOS)
    assert opened.name_or_path == str(tmp_path)


def test_the_size_of_a_vocabulary_with_gaps_is_one_more_than_its_largest_id(tmp_path: Path) -> None:
    assert vocabulary_size(open_tokenizer(folder_of(tmp_path / "a", {"x": 0, "y": 40}))) == 41


def test_a_bare_sentencepiece_model_has_its_ids_in_the_order_of_the_texts(pieces: Path) -> None:
    opened = open_tokenizer(pieces)
    oracle = sentencepiece.SentencePieceProcessor(str(pieces / "tokenizer.model"))
    texts = ["the cat", "", "a dög", *(f"mat {number}" for number in range(20))]
    assert encode(opened, texts) == [oracle.encode(text) for text in texts]
    assert (vocabulary_size(opened), opened.bos_token_id, opened.eos_token_id) == (len(oracle), 0, None)


# Files


def test_which_file_is_the_tokenizer(tmp_path: Path, pieces: Path) -> None:
    both = tmp_path / "both"
    both.mkdir()
    letters_tokenizer(both)
    (both / "tokenizer.model").write_bytes((pieces / "tokenizer.model").read_bytes())
    assert vocabulary_size(open_tokenizer(both)) == 29
    assert identity(open_tokenizer(both / "tokenizer.json")) == identity(open_tokenizer(both))
    assert identity(open_tokenizer(both / "tokenizer.model")) == identity(open_tokenizer(pieces))
    assert open_tokenizer(both / "tokenizer.model").name_or_path == str(both / "tokenizer.model")
    (both / "notes.txt").touch()
    for nothing in (tmp_path / "nowhere", tmp_path, both / "notes.txt"):
        with pytest.raises(UserError, match="no tokenizer; give a folder"):
            open_tokenizer(nothing)
    (both / "tokenizer.json").write_text("{}")
    for path in (both, both / "tokenizer.json"):
        with pytest.raises(UnreadableTokenizer, match=r"both/tokenizer\.json: the tokenizer cannot be opened"):
            open_tokenizer(path)
    (both / "odd.model").write_bytes(b"x")
    with pytest.raises(UserError, match=r"both/odd\.model: not a SentencePiece model"):
        open_tokenizer(both / "odd.model")


def test_a_copy_has_hugging_faces_names_and_is_the_same_tokenizer(tmp_path: Path, pieces: Path) -> None:
    names = {"special_tokens_map": {"bos_token": "x"}, "tokenizer_config": {"eos_token": "y"}}
    folder = folder_of(tmp_path / "a", {"x": 0, "y": 1}, **names)
    (folder / "tokenizer.json").rename(folder / "odd.json")
    for name in ("added_tokens.json", "weights.bin", "vocab.json"):
        (folder / name).write_text("{}")
    copy_tokenizer(folder / "odd.json", tmp_path / "copies" / "b")
    assert sorted(path.name for path in (tmp_path / "copies" / "b").iterdir()) == [
        "added_tokens.json", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    opened, copied = open_tokenizer(folder / "odd.json"), open_tokenizer(tmp_path / "copies" / "b")
    assert identity(copied) == identity(opened)
    assert {(one.bos_token_id, one.eos_token_id) for one in (opened, copied)} == {(0, 1)}
    copy_tokenizer(pieces / "tokenizer.model", tmp_path / "c")
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["tokenizer.model"]


def test_every_file_of_a_tokenizer_is_copied_and_nothing_else(tmp_path: Path) -> None:
    names = ["tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "tokenizer_config.json",
             "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"]  # fmt: skip
    (tmp_path / "a").mkdir()
    for name in [*names, "README.md", "config.json", "model.safetensors"]:
        (tmp_path / "a" / name).write_text(name)
    copy_tokenizer(tmp_path / "a", tmp_path / "b")
    assert {path.name: path.read_text() for path in (tmp_path / "b").iterdir()} == {name: name for name in names}


# Preparing data and scoring say the same


def bare(folder: Path, tokenizer: tokenizers.Tokenizer) -> Path:
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def llama_3(folder: Path) -> Path:
    """A bare tokenizer.json that knows <|begin_of_text|> (2) and <|end_of_text|> (3), and names neither."""
    vocabulary = {"<unk>": 0, "x": 1, "<|begin_of_text|>": 2, "<|end_of_text|>": 3}
    words = ["the", "cat", "dog", "house", "under", "runs", "very", "ice", "two"]
    folder_of(folder, vocabulary | {word: i for i, word in enumerate(words, start=4)})
    made = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()  # pyright: ignore
    made.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>"])
    made.save(str(folder / "tokenizer.json"))
    return folder


TOKENIZERS = {
    "a bare tokenizer.json": llama_3,
    "with its settings": lambda folder: write_tokenizer(folder, adds_bos=True),
    "no bos by default": lambda folder: write_tokenizer(folder, adds_bos=False),
    "bytes": lambda folder: bare(folder, byte_level()),
    "space mark": lambda folder: bare(folder, space_mark(metaspace=False)),
    "the demo's": lambda folder: generate.generate(folder.parent / "world", documents=30).tokenizer,
    "SentencePiece": lambda folder: train_pieces(folder),
}


@pytest.mark.parametrize("name", [*TOKENIZERS, *SHARED_TOKENIZERS])
def test_both_commands_say_the_same_of_a_tokenizer(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    made = TOKENIZERS.get(name)
    folder = made(tmp_path / "tokenizer") if made else request.getfixturevalue("shared_data") / name
    documents = ["the cat runs under the house", "two  dogs  ", "very <s> </s> ice\n\n and"]
    text = jsonl(tmp_path / "text.jsonl", documents * 9)
    benchmarks = write_benchmarks(tmp_path / "benchmarks", documents=2)
    of = ["--tokenizer", str(folder)]
    data, pack = tmp_path / "data", tmp_path / "pack"
    assert main(["data", "prepare", "text", str(text), *of, "--sequence-length", "8", "--bos", "--out", str(data)]) in (
        0,
        None,
    )
    assert main(["tasks", "prepare", "piqa", *of, "--benchmarks", str(benchmarks), "--out", str(pack)]) in (0, None)
    prepared, packed = json.loads((data / "metadata.json").read_text()), load(pack).manifest
    assert prepared["tokenizer_hash"] == packed["tokenizer"]["tokenizer_hash"]
    assert prepared["vocab_size"] == packed["tokenizer"]["size"]
    assert prepared["bos_id"] == packed["prefix_token"] is not None
    if name == "a bare tokenizer.json":
        assert (prepared["bos_id"], prepared["eos_id"]) == (2, 3)
    # What is copied beside the data, and from there into the run, is the same tokenizer again.
    copied, opened = open_tokenizer(data / "tokenizer"), open_tokenizer(folder)
    assert identity(copied) == identity(opened)
    assert (copied.bos_token_id, copied.eos_token_id) == (prepared["bos_id"], prepared["eos_id"])
    strings = [text.read_text(), "  a\n\n b", "<s>", "Fäden 東京 🙂"]
    assert encode(copied, strings) == opened(strings, add_special_tokens=False).input_ids


# Recognising


def test_a_tokenizer_is_the_same_by_what_it_makes_of_texts_and_not_by_its_files(tmp_path) -> None:
    folder = write_tokenizer(tmp_path / "t", adds_bos=True)
    first = identity(open_tokenizer(folder))
    assert first.adds_bos and len(first.tokenizer_hash) == 64

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
    found = {of(*other).tokenizer_hash for other in others}
    assert len(found) == 4 and first.tokenizer_hash not in found


# Reading


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
        transformers.AutoTokenizer,
        "from_pretrained",
        lambda folder, **options: (asked.append(options), found.pop(0))[1],
    )
    for name in ("tokenizer_config.json", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_info()
    assert open_tokenizer(tmp_path) is open_tokenizer(tmp_path, "always") is open_tokenizer(tmp_path, "never")
    plain = {"trust_remote_code": False, "model_max_length": 1 << 40}
    assert asked == [plain, plain | {"add_bos_token": True}, plain | {"add_bos_token": False}]
    with pytest.raises(UserError, match="object has no tokenizers backend, which is needed"):
        open_tokenizer(tmp_path)
    assert transformers.utils.logging.get_verbosity() == transformers.utils.logging.INFO
    transformers.utils.logging.set_verbosity(before)
    with pytest.raises(UserError, match="nowhere: no tokenizer; give a folder"):
        open_tokenizer(tmp_path / "nowhere")
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(UnreadableTokenizer, match=r"tokenizer\.json: the tokenizer cannot be opened"):
        open_tokenizer(tmp_path)
