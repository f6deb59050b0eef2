"""A tokenizer as its own authors' code runs it: text to token ids, without special tokens.

`tokenizer.json` runs in `tokenizers`, a bare `tokenizer.model` in `sentencepiece`. It is deliberately not
converted: transformers 5 loads a folder with only a `tokenizer.model` without the leading space mark, which
gives other ids than the model was trained on.
"""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import sentencepiece
import tokenizers

from fineline_jax.errors import UserError

# Files beside the defining one that name special tokens; copied along.
SIDE_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
# Used only where no side file names the token, in this order (Llama; Llama 3 and DeepSeek; GPT-NeoX, OLMo).
BOS_NAMES = ("<s>", "<|begin_of_text|>", "<｜begin▁of▁sentence｜>", "<|endoftext|>")
EOS_NAMES = ("</s>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "<|endoftext|>")


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A loaded tokenizer. `encode` adds neither BOS nor EOS and keeps the order of its texts."""

    path: Path
    """The file that defines the ids: tokenizer.json or tokenizer.model."""
    sha256: str
    """Of that file; the tokenizer's identity."""
    vocab_size: int
    """One more than the largest id."""
    bos_id: int | None
    eos_id: int | None
    encode: Callable[[Sequence[str]], list[list[int]]]


def load_tokenizer(path: Path) -> Tokenizer:
    """Open a tokenizer folder, a tokenizer.json or a SentencePiece .model file.

    In a folder tokenizer.json goes before tokenizer.model; name the file to choose. Raises UserError where
    there is no tokenizer or it cannot be read.
    """
    file = _defining_file(path)
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    if file.suffix == ".model":
        return _load_sentencepiece(file, sha256)
    return _load_json(file, sha256)


def copy_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Copy the tokenizer's files into `folder` (made here), under the names Hugging Face gives them."""
    folder.mkdir(parents=True)
    shutil.copyfile(tokenizer.path, folder / f"tokenizer{tokenizer.path.suffix}")
    for name in SIDE_FILES:
        if (tokenizer.path.parent / name).is_file():
            shutil.copyfile(tokenizer.path.parent / name, folder / name)


def _defining_file(path: Path) -> Path:
    candidates = [path / "tokenizer.json", path / "tokenizer.model"] if path.is_dir() else [path]
    for file in candidates:
        if file.is_file() and file.suffix in (".json", ".model"):
            return file
    raise UserError(f"{path}: no tokenizer; give a folder with tokenizer.json or tokenizer.model, or one of them")


def _load_sentencepiece(file: Path, sha256: str) -> Tokenizer:
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(file))
    except (RuntimeError, OSError) as error:
        raise UserError(f"{file}: not a SentencePiece model ({error}); give another tokenizer") from error

    def present(token_id: int) -> int | None:  # SentencePiece says -1 for "none"
        return token_id if token_id >= 0 else None

    return Tokenizer(
        path=file,
        sha256=sha256,
        vocab_size=model.vocab_size(),
        bos_id=present(model.bos_id()),
        eos_id=present(model.eos_id()),
        # num_threads -1: as many as there are cores.
        encode=lambda texts: model.encode(list(texts), out_type=int, num_threads=-1),
    )


def _load_json(file: Path, sha256: str) -> Tokenizer:
    try:
        model = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(f"{file}: not a tokenizer.json ({error}); give another tokenizer") from error
    model.no_truncation()
    model.no_padding()
    vocabulary = model.get_vocab(with_added_tokens=True)
    named = _named_special_tokens(file.parent)

    def special(role: str, usual: tuple[str, ...]) -> int | None:
        names = (named[role],) if role in named else usual
        return next((vocabulary[name] for name in names if name in vocabulary), None)

    return Tokenizer(
        path=file,
        sha256=sha256,
        vocab_size=max(vocabulary.values()) + 1,
        bos_id=special("bos_token", BOS_NAMES),
        eos_id=special("eos_token", EOS_NAMES),
        encode=lambda texts: [e.ids for e in model.encode_batch_fast(list(texts), add_special_tokens=False)],
    )


def _named_special_tokens(folder: Path) -> dict[str, str]:
    """bos_token and eos_token as the side files name them; either a string or {"content": string}."""
    named: dict[str, str] = {}
    for file in (folder / "special_tokens_map.json", folder / "tokenizer_config.json"):
        if not file.is_file():
            continue
        try:
            entries = json.loads(file.read_bytes())
        except ValueError as error:
            raise UserError(f"{file}: not JSON ({error}); mend or remove it") from error
        if not isinstance(entries, dict):
            raise UserError(f"{file}: no JSON object; mend or remove it")
        for role in ("bos_token", "eos_token"):
            token = entries.get(role)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                named[role] = token
    return named
