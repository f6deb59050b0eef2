"""The world's tokenizer: one token per word, digit or mark; upper and lower case are the same.

A token never reaches over a space, so the tokens of `context + " " + continuation` are those of the context
followed by those of the continuation: the cut lm-eval makes between them is exact.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from fineline_jax.atomic_files import write_atomic

VOCAB_SIZE = 1024
"""The same for every seed and size of the text; ids without a word are reserved."""
UNK, BOS, EOS = "<unk>", "<s>", "</s>"
"""Ids 0, 1 and 2, as in Llama's tokenizer. BOS is put before a text as in Llama's, EOS is not put behind."""


def build(texts: Iterable[str]) -> tokenizers.Tokenizer:
    """A tokenizer that knows every word of the texts. Raises ValueError where they do not fit VOCAB_SIZE."""
    normalizer = normalizers.Lowercase()
    # Digits one by one: sums of numbers never seen together can then be worked out.
    splitter = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)])
    chunks = {chunk.lower() for text in texts for chunk in text.split(" ")}
    words = {word for chunk in chunks for word, _ in splitter.pre_tokenize_str(chunk)} | set("0123456789")
    vocabulary = [UNK, BOS, EOS, *sorted(words)]
    if len(vocabulary) > VOCAB_SIZE:
        raise ValueError(f"the world has {len(vocabulary)} words and marks; at most {VOCAB_SIZE} fit")
    vocabulary += [f"<reserved_{i}>" for i in range(VOCAB_SIZE - len(vocabulary))]

    tokenizer = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=UNK))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 1)])
    tokenizer.decoder = decoders.WordPiece(prefix="", cleanup=True)
    tokenizer.add_special_tokens([UNK, BOS, EOS])
    return tokenizer


def save(tokenizer: tokenizers.Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, which `transformers.AutoTokenizer` loads."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": UNK,
        "bos_token": BOS,
        "eos_token": EOS,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000,  # the model's context is the limit, not the tokenizer
    }
    for name, text in (
        ("tokenizer.json", tokenizer.to_str(pretty=True)),
        ("tokenizer_config.json", json.dumps(config, indent=2) + "\n"),
    ):
        write_atomic(folder / name, text)
