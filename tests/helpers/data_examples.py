"""Small corpora for the tests of data preparation, and a reader that is not ours."""

import json
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
import tokenizers

from fineline_jax.data.storage import WindowWriter, write_metadata

BOS, EOS = 1, 2


def letters_tokenizer(folder: Path) -> Path:
    """One token per letter: id = 3 + position in the alphabet."""
    vocabulary = {"<unk>": 0, "<s>": BOS, "</s>": EOS} | {chr(97 + i): 3 + i for i in range(26)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))  # pyright: ignore
    model.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")  # pyright: ignore
    model.save(str(folder / "tokenizer.json"))
    return folder


def letters(text: str) -> list[int]:
    return [3 + ord(letter) - 97 for letter in text]


def jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def stored(folder: Path, split: str) -> np.ndarray:
    """Read with TFDS alone, so that the format and not our reader is tested."""
    source = tfds.builder_from_directory(folder).as_data_source(split)
    return np.stack([source[i]["tokens"] for i in range(len(source))]).astype(np.int64)


def amber(path: Path, windows: list[list[int]]) -> Path:
    path.write_text("".join(json.dumps({"token_ids": window, "source": "c4"}) + "\n" for window in windows))
    return path


def numbered(folder: Path, splits: dict[str, int], length: int, vocab_size: int, base: int = 0) -> str:
    """A data set whose window i of its n-th split is [base + 100 n + i, 0, 1, 2, ...]."""
    writer = WindowWriter(folder, list(splits), window_tokens=length + 1, vocab_size=vocab_size)
    for number, (split, count) in enumerate(splits.items()):
        windows = np.tile(np.arange(-1, length), (count, 1))
        windows[:, 0] = base + 100 * number + np.arange(count)
        writer.add(split, windows)
    writer.close()
    write_metadata(folder, {"sequence_length": length, "vocab_size": vocab_size, "name": folder.name})
    return str(folder)
