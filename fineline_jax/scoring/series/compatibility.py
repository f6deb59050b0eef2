"""Whether a request pack is one for a model: its context, vocabulary, tokenizer and BOS policy."""

import functools
import logging
from pathlib import Path
from typing import Any

from fineline_jax.checkpoints import load
from fineline_jax.checkpoints.series import Checkpoint, Series
from fineline_jax.errors import UserError
from fineline_jax.models.config import ModelConfig
from fineline_jax.scoring.modes.mode import context_of_model
from fineline_jax.scoring.modes.names import find_mode
from fineline_jax.scoring.requests.pack import Pack
from fineline_jax.tokenizers.identity import identity
from fineline_jax.tokenizers.open import open_tokenizer

log = logging.getLogger(__name__)


def model_context(pack: Pack, config: ModelConfig) -> int:
    """Tokens the model reads: what the pack was prepared with, else the model's context, as the pack's mode cuts."""
    return context_of_model(find_mode(pack.manifest["mode"]), pack.manifest["max_context"], config.context)


def log_policy(series: Series, pack: Pack) -> None:
    """Log what a reader of the numbers must know, and where the pack is not what the registry entry wants."""
    for note in series.scoring.notes:
        log.info("%s: %s", series.name, note)
    wanted, asked = series.scoring.bos, pack.manifest["bos"]
    if asked == "auto":
        asked = "always" if pack.manifest["tokenizer"]["adds_bos"] else "never"
    if wanted not in ("auto", asked):
        log.warning("%s: its entry wants --bos %s, the pack has --bos %s", series.name, wanted, asked)


def check_vocabulary(pack: Pack, config: ModelConfig, name: str) -> None:
    """Raise UserError if a request has an id that the embedding of the model `name` has no row for.

    A tokenizer may have more ids than that, such as a padding token that was added later; none of them is read then.
    """
    largest = pack.request_tokens.largest_token
    if largest >= config.vocab_size:
        raise UserError(
            f"{name}: a request has token {largest}, the embedding {config.vocab_size} rows; prepare the pack with the"
            " tokenizer the model was trained with"
        )


def check_tokenizer(pack: Pack, checkpoint: Checkpoint) -> None:
    """Raise UserError if the checkpoint comes with another tokenizer than the pack was made with.

    A checkpoint without a tokenizer passes; the ids of the requests are checked when it is scored.
    """
    folder = load.tokenizer_folder(checkpoint)
    if folder is not None:
        check_tokenizer_folder(pack, folder, f"{checkpoint.series}/{checkpoint.name}")


def check_tokenizer_folder(pack: Pack, folder: Path, name: str) -> None:
    """Raise UserError if the tokenizer in `folder`, which `name` uses, is another than the pack was made with."""
    model, packed = _identity(folder), pack.manifest["tokenizer"]
    if model.tokenizer_hash != packed["tokenizer_hash"]:
        raise UserError(
            f"the tokenizer of {name} ({folder}) is not the one the pack was prepared with;"
            f" run `fineline tasks prepare {pack.manifest['suite']} --tokenizer {folder}`"
        )
    if pack.manifest["bos"] == "auto" and model.adds_bos != packed["adds_bos"]:
        raise UserError(
            f"the tokenizer of {name} {'adds' if model.adds_bos else 'does not add'} BOS by default, that of the pack"
            f" {'does' if packed['adds_bos'] else 'does not'}; prepare the pack with --bos always or --bos never"
        )


@functools.lru_cache(maxsize=8)
def _identity(folder: Path) -> Any:
    return identity(open_tokenizer(folder))
