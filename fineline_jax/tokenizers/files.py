"""The files of a tokenizer, under the names that Hugging Face gives them."""

import shutil
from pathlib import Path

VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""A folder with one of these holds a tokenizer."""
SETTINGS_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
"""Name the special tokens, among other things."""
TOKENIZER_FILES = (*VOCABULARY_FILES, "merges.txt", *SETTINGS_FILES)


def holds_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in VOCABULARY_FILES)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a tokenizer into the folder `target`, which is made if need be.

    source: its folder, or a file `*.json` or `*.model`, which becomes tokenizer.json or tokenizer.model; the settings
    beside the file are copied as well. The copy opens as the same tokenizer as `source`.
    """
    target.mkdir(parents=True, exist_ok=True)
    single = source.is_file()
    folder = source.parent if single else source
    for name in SETTINGS_FILES if single else (*TOKENIZER_FILES, "chat_template.jinja"):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)
    if single:
        shutil.copyfile(source, target / f"tokenizer{source.suffix}")
