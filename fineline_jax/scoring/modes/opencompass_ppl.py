"""Mode opencompass-ppl: prompt and choice are one text; that with the lowest mean cross-entropy over all of its tokens
wins, solved examples included.

Source: open-compass/opencompass, `models/huggingface.py`, `_get_ppl`: the sum over all tokens but the first is divided
by the number of all tokens.
"""

from collections.abc import Sequence

import numpy as np

from fineline_jax.errors import UserError
from fineline_jax.scoring.modes.choices import Choices, Columns, chosen_is_right
from fineline_jax.scoring.modes.encode import Encoder, Tokens
from fineline_jax.scoring.modes.mode import Mode


def encode(encoder: Encoder, pairs: Sequence[tuple[str, str]]) -> list[tuple[Tokens, Tokens]]:
    """(context, continuation) -> the first token of both as one string, and all others."""
    result = []
    for (_, continuation), tokens in zip(pairs, encoder.texts([c + t for c, t in pairs]), strict=True):
        if len(tokens) < 2:
            raise UserError(f"a prompt that ends in {continuation!r} has fewer than two tokens")
        result.append((tokens[:1], tokens[1:]))
    return result


def compare(
    choices: Choices, loglikelihood: np.ndarray, is_greedy: np.ndarray, unconditional: np.ndarray | None
) -> Columns:
    mean = loglikelihood / (choices.tokens + 1)  # the first token, which is not predicted, counts as well
    best = np.where(choices.right, mean, -np.inf).max(axis=1)
    cross_entropy = np.where(choices.right.any(axis=1), -best, np.nan)
    return {"acc_ppl": chosen_is_right(choices, mean), "cross_entropy": cross_entropy}


MODE = Mode(
    "opencompass-ppl",
    encode=encode,
    compare=compare,
    choice_metrics=("acc_ppl", "cross_entropy"),
    default_metric="acc_ppl",
    counterparts=dict.fromkeys(("acc", "acc_norm", "acc_raw", "acc_per_char", "acc_per_token"), "acc_ppl"),
    only_choices=True,
)
