"""Scoring modes: how the same requests are encoded and compared.

    lm-eval          Context and continuation are encoded as one string. Choices are compared by log-likelihood, as it
                     is or per character, the leading space not counted.
    olmes            They are encoded apart, BOS first if the tokenizer has one. Choices are compared raw, per token,
                     and per character with the leading space. Groups are plain means. At most 2048 tokens are fed.
                     Source: allenai/OLMo-in-loop-evals, `olmo_eval/tasks.py` and `metrics.py`; arXiv 2406.08446.
    opencompass-ppl  Prompt and choice are one text; that with the lowest mean cross-entropy over all of its tokens
                     wins, solved examples included. Source: open-compass/opencompass, `models/huggingface.py`,
                     `_get_ppl`: the sum over all tokens but the first is divided by the number of all tokens.

The prompts are lm-eval's in every mode. The mode is a key of a suite or an option, and part of the hash of the pack.
"""

from collections.abc import Collection
from typing import Literal, get_args

from fineline_jax.errors import UserError

Mode = Literal["lm-eval", "olmes", "opencompass-ppl"]
MODES: tuple[str, ...] = get_args(Mode)
OLMES_CONTEXT = 2048
_COUNTERPARTS: dict[str, dict[str | None, str]] = {
    "lm-eval": {None: "acc", "acc_raw": "acc", "acc_per_char": "acc_norm", "acc_ppl": "acc"},
    "olmes": {None: "acc_per_char", "acc": "acc_raw", "acc_norm": "acc_per_char", "acc_ppl": "acc_per_token"},
    "opencompass-ppl": dict.fromkeys((None, "acc", "acc_norm", "acc_raw", "acc_per_char", "acc_per_token"), "acc_ppl"),
}
"""By mode: what a metric that a suite names for another mode is read as; None: where a suite names none."""
_SMOOTH = ("choice_prob", "choice_prob_per_token", "choice_prob_per_char", "margin", "bits_per_byte")
CHOICE_METRICS = {
    "lm-eval": ("acc", "acc_norm", "acc_bytes", "exact_match", "brier_score", *_SMOOTH),
    "olmes": ("acc_raw", "acc_per_token", "acc_per_char", *_SMOOTH),
    "opencompass-ppl": ("acc_ppl", "cross_entropy"),
}
"""What `document_metrics` gives for every task of multiple choice."""
SOLUTION_METRICS = ("bits_per_byte", "bits_per_byte_best", "greedy_match")
TEXT_METRICS = {
    "loglikelihood": ("acc", "perplexity", "bits_per_byte"),
    "loglikelihood_rolling": ("word_perplexity", "byte_perplexity", "bits_per_byte"),
    "generate_until": SOLUTION_METRICS,
}
_FIRST = {
    "multiple_choice": "acc",
    "loglikelihood": "acc",
    "loglikelihood_rolling": "bits_per_byte",
    "generate_until": "bits_per_byte",
}


def first_metric(mode: str, output_type: str, wanted: str | None) -> str:
    """The metric reported first; a metric of another mode that a suite names is read as its counterpart."""
    if output_type == "multiple_choice":
        return _COUNTERPARTS[mode].get(wanted) or wanted or "acc"
    if output_type == "generate_until" and wanted not in SOLUTION_METRICS:  # in a group with others
        return _FIRST[output_type]
    return wanted or _FIRST[output_type]


def check_metric(mode: str, task: str, output_type: str, wanted: str, own: Collection[str], brings: bool) -> None:
    """Refuse a metric that a suite names for a task, and nothing computes.

    own: the metrics that the task's definition aggregates; brings: whether the task computes them itself.
    """
    if brings:
        known, asked = set(own), wanted
    elif output_type == "multiple_choice":
        known = {*CHOICE_METRICS[mode], *({"f1", "mcc", "acc_mutual_info"} & set(own) if mode == "lm-eval" else ())}
        asked = first_metric(mode, output_type, wanted)
    else:
        known, asked = set(TEXT_METRICS[output_type]), wanted
    if asked not in known:
        raise UserError(f"task {task!r} has no metric {wanted!r}; name one of {', '.join(sorted(known))}")


def largest_context(mode: str, given: int | None) -> int | None:
    """Tokens of a request that are fed at most; None: as many as the model takes."""
    if mode == "olmes":
        return min(given or OLMES_CONTEXT, OLMES_CONTEXT)
    return given


def weighted_by_size(mode: str) -> bool:
    """Whether the tasks of a group count by their documents where the group does not say."""
    return mode != "olmes"


def check_mode(mode: str, where: str) -> None:
    if mode not in MODES:
        raise UserError(f"{where}: mode {mode!r} must be one of {', '.join(MODES)}")


def check_task(mode: str, task: str, output_type: str, own_metrics: bool) -> None:
    """Refuse a task that the mode does not define."""
    if mode == "opencompass-ppl" and (output_type != "multiple_choice" or own_metrics):
        raise UserError(f"task {task!r}: mode opencompass-ppl compares the choices of a question; drop this task")
