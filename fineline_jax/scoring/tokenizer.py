"""Opening a tokenizer folder, and recognising the same tokenizer again."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import logging

from fineline_jax.errors import UserError
from fineline_jax.scoring.sentencepiece_bpe import open_sentencepiece

Bos = Literal["auto", "always", "never"]
"""Whether a begin-of-sequence token is put first: as the tokenizer does by default, always, never."""


class UnreadableTokenizer(UserError):
    """Its files, or those beside it, are damaged."""


@dataclasses.dataclass(frozen=True)
class Identity:
    """What must agree between the tokenizer of a pack and that of a checkpoint."""

    sha256: str
    """Of vocabulary, merges, normaliser, pre-tokeniser and added tokens; not of padding or special-token defaults."""
    adds_bos: bool
    """Whether it puts BOS first by default."""


def open_tokenizer(folder: Path, bos: Bos = "auto") -> Any:
    """The transformers tokenizer in `folder`: HF layout, or a bare Llama tokenizer.model, or a bare tokenizer.json.

    A bare tokenizer.json says nothing about special tokens: `<s>`/`</s>` or else `<|endoftext|>` are taken if present.
    Raises UserError if `folder` holds none of the three.
    """
    # As lm-eval's HF backend: the flag goes to the constructor, since some tokenizers build their template there.
    options: dict[str, Any] = {} if bos == "auto" else {"add_bos_token": bos == "always"}
    options["model_max_length"] = 1 << 40  # requests are cut when a model is known; here it would only be a warning
    if (folder / "tokenizer_config.json").is_file():
        return _own_class(folder, options)
    if (folder / "tokenizer.json").is_file():
        try:
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **options)
        except Exception as error:  # what the library raises for a broken file is not documented
            raise _unreadable(folder / "tokenizer.json", error) from error
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        if {"<s>", "</s>"} <= special:
            tokenizer.bos_token, tokenizer.eos_token = "<s>", "</s>"
        elif "<|endoftext|>" in special:
            tokenizer.bos_token = tokenizer.eos_token = "<|endoftext|>"
        return tokenizer
    if (folder / "tokenizer.model").is_file():
        return open_sentencepiece(folder / "tokenizer.model")
    raise UserError(f"{folder}: no tokenizer found; expected tokenizer.json or tokenizer.model")


def _own_class(folder: Path, options: dict[str, Any]) -> Any:
    """The tokenizer of the class that tokenizer_config.json names; no foreign code is run."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it reads config.json as well and remarks on models it does not know
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, **options)
    except Exception as error:  # what transformers raises for broken files and foreign classes is not documented
        raise _unreadable(folder, error) from error
    finally:
        logging.set_verbosity(verbosity)
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise UserError(f"{folder}: {type(tokenizer).__name__} has no tokenizers backend, which is needed; {_OTHERS}")
    return tokenizer


_OTHERS = "mend it, or give --tokenizer a folder with only tokenizer.model or tokenizer.json"


def _unreadable(place: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200]
    return UnreadableTokenizer(f"{place}: the tokenizer cannot be opened ({type(error).__name__}: {reason}); {_OTHERS}")


def identity(tokenizer: Any) -> Identity:
    """Independent of file names, key order and of the version that wrote the files."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    kept = {key: state[key] for key in ("model", "normalizer", "pre_tokenizer")}
    kept["added_tokens"] = sorted((token["id"], token["content"]) for token in state["added_tokens"])
    text = json.dumps(kept, sort_keys=True, ensure_ascii=False)
    return Identity(hashlib.sha256(text.encode()).hexdigest(), _adds_bos(tokenizer))


def prefix_token(tokenizer: Any) -> int:
    """The token an empty context is replaced by: BOS, else EOS (lm-eval `HFLM.prefix_token_id`)."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise UserError("the tokenizer has neither a BOS nor an EOS token; name one in its tokenizer_config.json")


def _adds_bos(tokenizer: Any) -> bool:
    return tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
