"""Mode olmes: context and continuation are encoded apart, BOS first if the tokenizer has one; choices are compared
raw, per token, and per character with the leading space; groups are plain means; at most 2048 tokens are fed.

Source: allenai/OLMo-in-loop-evals, `olmo_eval/tasks.py` and `metrics.py`; arXiv 2406.08446.
"""

from collections.abc import Sequence

import numpy as np

from fineline_jax.errors import UserError
from fineline_jax.scoring.modes.choices import (
    SMOOTH_METRICS,
    Choices,
    Columns,
    chosen_is_right,
    per_length,
    smooth_metrics,
)
from fineline_jax.scoring.modes.encode import Encoder, Tokens
from fineline_jax.scoring.modes.mode import Mode


def encode(encoder: Encoder, pairs: Sequence[tuple[str, str]]) -> list[tuple[Tokens, Tokens]]:
    """(context, continuation) -> their tokens, encoded one without the other.

    BOS goes before the context if the tokenizer has one and the policy does not forbid it; an empty context becomes
    the prefix token. Raises UserError for a continuation that has no tokens.
    """
    bos = None if encoder.bos == "never" else encoder.tokenizer.bos_token_id
    contexts = encoder.texts([context for context, _ in pairs], special=False)
    continuations = encoder.texts([continuation for _, continuation in pairs], special=False)
    result = []
    for (_, text), context, continuation in zip(pairs, contexts, continuations, strict=True):
        if len(continuation) == 0:
            raise UserError(f"the continuation {text!r} has no tokens")
        if bos is not None and not (len(context) and context[0] == bos):
            context = np.concatenate([np.array([bos], np.int32), context])
        result.append((context if len(context) else np.array([encoder.prefix], np.int32), continuation))
    return result


def compare(
    choices: Choices, loglikelihood: np.ndarray, is_greedy: np.ndarray, unconditional: np.ndarray | None
) -> Columns:
    """acc_uncond (the log-likelihood less that without the question) only for tasks that list acc_mutual_info."""
    values: Columns = {
        "acc_raw": chosen_is_right(choices, loglikelihood),
        "acc_per_token": chosen_is_right(choices, per_length(loglikelihood, choices.tokens)),
        "acc_per_char": chosen_is_right(choices, per_length(loglikelihood, choices.chars)),
    }
    if unconditional is not None:
        values["acc_uncond"] = chosen_is_right(choices, loglikelihood - unconditional)
    return values | smooth_metrics(choices, loglikelihood)


MODE = Mode(
    "olmes",
    encode=encode,
    compare=compare,
    choice_metrics=("acc_raw", "acc_per_token", "acc_per_char", *SMOOTH_METRICS),
    default_metric="acc_per_char",
    counterparts={"acc": "acc_raw", "acc_norm": "acc_per_char", "acc_ppl": "acc_per_token"},
    context_limit=2048,
    delimiter_counts=True,
    groups_weighted_by_size=False,
)
