"""Opening a tokenizer, for preparing data and for scoring alike.

One rule says which ids and which special tokens a tokenizer has:

* A folder with tokenizer.json is opened as transformers opens it, by the class that tokenizer_config.json names; so is
  one with vocab.json and merges.txt. BOS and EOS are what transformers says.
* A tokenizer.model without tokenizer.json is run with SentencePiece's own merges (`sentencepiece_bpe`): transformers 5
  would give other ids than models were trained on. BOS and EOS are the model's, unless the files beside it name others.
* A bare tokenizer.json, with no tokenizer_config.json and nothing in special_tokens_map.json, names no special tokens.
  It has the first pair of USUAL_SPECIAL_TOKENS of which it knows both, else none.
"""

import json
import tempfile
from pathlib import Path
from typing import Any, Literal

from fineline_jax.errors import LFS_POINTER, UserError, is_lfs_pointer, reading
from fineline_jax.tokenizers.files import SETTINGS_FILES, copy_tokenizer, holds_tokenizer

Bos = Literal["auto", "always", "never"]
"""Whether a begin-of-sequence token is put first: as the tokenizer does by default, always, never."""

USUAL_SPECIAL_TOKENS = (
    ("<s>", "</s>"),  # Llama
    ("<|begin_of_text|>", "<|end_of_text|>"),  # Llama 3
    ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),  # DeepSeek
    ("<|endoftext|>", "<|endoftext|>"),  # GPT-2, GPT-NeoX, OLMo
)
"""(BOS, EOS)"""


class UnreadableTokenizer(UserError):
    """Its files, or those beside it, are damaged."""


def open_tokenizer(path: Path, bos: Bos = "auto") -> Any:
    """The transformers tokenizer in `path`: a folder, or a file `*.json` or `*.model` with its settings beside it.

    In a folder tokenizer.json goes before tokenizer.model; give the file to choose. Raises UserError if there is none,
    and UnreadableTokenizer if it cannot be opened. No code from the folder is run.
    """
    # As lm-eval's HF backend: the flag goes to the constructor, since some tokenizers build their template there.
    options: dict[str, Any] = {} if bos == "auto" else {"add_bos_token": bos == "always"}
    options["model_max_length"] = 1 << 40  # requests are cut when a model is known; here it would only be a warning
    if holds_tokenizer(path):
        return _open_folder(path, path, options)
    if path.is_file() and path.suffix in (".json", ".model"):
        with tempfile.TemporaryDirectory() as folder:
            copy_tokenizer(path, Path(folder))
            return _open_folder(Path(folder), path, options)
    raise UserError(f"{path}: no tokenizer; give a folder with tokenizer.json or tokenizer.model, or one of them")


def _open_folder(folder: Path, path: Path, options: dict[str, Any]) -> Any:
    """path: the folder, or the file that was given and copied into it."""
    given_file = path if path.is_file() else None
    settings = {name: _read_settings((given_file.parent if given_file else folder) / name) for name in SETTINGS_FILES}
    _read_settings(folder / "config.json")  # transformers reads it as well, and would blame the tokenizer
    config = settings["tokenizer_config.json"]
    options |= _plain_tokens(config or {})
    if (file := folder / "tokenizer.json").is_file():
        if config is None:
            tokenizer = _from_pretrained("PreTrainedTokenizerFast", folder, given_file or file, options)
            if tokenizer.bos_token is None and tokenizer.eos_token is None:
                _name_special_tokens(tokenizer, always_bos=options.get("add_bos_token", False))
        else:
            tokenizer = _from_pretrained("AutoTokenizer", folder, given_file or file, options)
    elif (file := folder / "tokenizer.model").is_file():
        tokenizer = _open_sentencepiece(file, given_file or file, settings, options)
    else:
        tokenizer = _from_pretrained("AutoTokenizer", folder, folder, options)
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise UserError(f"{path}: {type(tokenizer).__name__} has no tokenizers backend, which is needed; {_OTHERS}")
    tokenizer.name_or_path = str(path)
    return tokenizer


def _open_sentencepiece(
    file: Path, path: Path, settings: dict[str, dict[str, Any] | None], options: dict[str, Any]
) -> Any:
    """By way of a tokenizer.json with SentencePiece's merges, to which transformers applies the settings."""
    from fineline_jax.tokenizers.sentencepiece_bpe import convert

    model, special_tokens = convert(file, path)
    config = settings["tokenizer_config.json"] or {}
    with tempfile.TemporaryDirectory() as folder:
        model.save(str(Path(folder, "tokenizer.json")))
        for name, content in (settings | {"tokenizer_config.json": special_tokens | config}).items():
            if content is not None:
                Path(folder, name).write_text(json.dumps(content))
        # Beside a tokenizer.json transformers does not heed what the settings say of BOS.
        options = {"add_bos_token": config.get("add_bos_token", True)} | options
        return _from_pretrained("PreTrainedTokenizerFast", Path(folder), path, options)


def _from_pretrained(kind: str, folder: Path, path: Path, options: dict[str, Any]) -> Any:
    import transformers  # takes seconds: not where no tokenizer is opened
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it reads config.json as well and remarks on models it does not know
    try:
        return getattr(transformers, kind).from_pretrained(str(folder), trust_remote_code=False, **options)
    except Exception as error:  # what transformers raises for broken files and foreign classes is not documented
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        message = f"{path}: the tokenizer cannot be opened ({reason}); {_OTHERS}"
        pointer = next(filter(is_lfs_pointer, sorted(folder.iterdir())), None)
        raise UnreadableTokenizer(message if pointer is None else LFS_POINTER.format(pointer)) from error
    finally:
        logging.set_verbosity(verbosity)


_OTHERS = "repair it, or give --tokenizer a folder with only tokenizer.model or tokenizer.json"


def _read_settings(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        with reading(file, "repair or remove it", "not JSON"):
            content = json.loads(file.read_bytes())
    except UserError as error:
        raise UnreadableTokenizer(str(error)) from error
    if not isinstance(content, dict):
        raise UnreadableTokenizer(f"{file}: no JSON object; repair or remove it")
    return content


def _plain_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Special tokens written as in special_tokens_map.json, without the mark that transformers wants in this file."""
    return {
        role: token["content"]
        for role, token in config.items()
        if role.endswith("_token") and isinstance(token, dict) and "content" in token and "__type" not in token
    }


def _name_special_tokens(tokenizer: Any, always_bos: bool) -> None:
    vocabulary = tokenizer.get_vocab()
    for bos_token, eos_token in USUAL_SPECIAL_TOKENS:
        if bos_token in vocabulary and eos_token in vocabulary:
            tokenizer.bos_token, tokenizer.eos_token = bos_token, eos_token
            if always_bos:  # it was opened when it had none
                tokenizer.add_bos_token = True
            return


def prefix_token(tokenizer: Any) -> int:
    """The token an empty context is replaced by: BOS, else EOS (lm-eval `HFLM.prefix_token_id`)."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise UserError("the tokenizer has neither a BOS nor an EOS token; name one in its tokenizer_config.json")
