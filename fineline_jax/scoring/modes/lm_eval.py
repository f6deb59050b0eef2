"""Mode lm-eval: context and continuation are encoded as one string; choices are compared by log-likelihood l, as it is
or per character, the leading space not counted. Source: lm-eval 0.4.13, `ConfigurableTask.process_results`.

    acc             arg-max of l is right
    acc_norm        arg-max of l / characters of the choice (without the delimiter) is right
    acc_bytes       arg-max of l / bytes
    exact_match     the right choice is what greedy decoding gives
    acc_mutual_info arg-max of l - l of the choice without its question; only for tasks that list it
    brier_score     squared distance of softmax(l) from the truth
"""

import numpy as np

from fineline_jax.scoring.modes.choices import (
    SMOOTH_METRICS,
    Choices,
    Columns,
    chosen_is_right,
    per_length,
    smooth_metrics,
    softmax,
)
from fineline_jax.scoring.modes.encode import Encoder
from fineline_jax.scoring.modes.mode import Mode


def compare(
    choices: Choices, loglikelihood: np.ndarray, is_greedy: np.ndarray, unconditional: np.ndarray | None
) -> Columns:
    values: Columns = {
        "acc": chosen_is_right(choices, loglikelihood),
        "acc_norm": chosen_is_right(choices, per_length(loglikelihood, choices.chars)),
        "acc_bytes": chosen_is_right(choices, per_length(loglikelihood, choices.bytes)),
        "exact_match": np.any(is_greedy & choices.right, axis=1),
    }
    if unconditional is not None:
        values["acc_mutual_info"] = chosen_is_right(choices, loglikelihood - unconditional)
    brier = ((softmax(loglikelihood) - choices.right) ** 2).sum(axis=1)
    values["brier_score"] = np.where(choices.right.any(axis=1), brier, np.nan)
    return values | smooth_metrics(choices, loglikelihood)


MODE = Mode(
    "lm-eval",
    encode=Encoder.pairs,
    compare=compare,
    choice_metrics=("acc", "acc_norm", "acc_bytes", "exact_match", "brier_score", *SMOOTH_METRICS),
    default_metric="acc",
    counterparts={"acc_raw": "acc", "acc_per_char": "acc_norm", "acc_ppl": "acc"},
    listed_metrics=("acc_mutual_info", "f1", "mcc"),
)
