"""Every metric that scoring writes or that is read from tables of others: label, unit, direction, chance, scale.

`METRICS` is the one table. A metric of someone else's that is not in it is still read, with its own name as label: like
the metric whose name it extends (`amb_bias_score_Age`, `zh_perplexity`), else as higher is better, without logarithm.
"""

from dataclasses import dataclass, replace
from typing import Literal

Chance = Literal["task", "generated", "none"]
"""task: the task's chance level; generated: 0 where the answer is generated (a whole answer is not guessed), of choices
not known; none: guessing has no level."""
Source = Literal["fineline", "lm-eval", "other tables"]
"""fineline: from stored log-likelihoods, by `scoring`; lm-eval: by its code on the same numbers; other tables: read
only."""


@dataclass(frozen=True)
class Metric:
    """How a metric is read."""

    name: str
    label: str
    """For axes and headings."""
    unit: str
    """"1" for shares and pure numbers; "" if unknown."""
    better: Literal[1, -1]
    """+1: higher is better; -1: lower."""
    chance: Chance
    computed_by: Source
    log: bool = False
    """Rise, noise and SNR are taken of the logarithm, and a group has no mean unless it asks: perplexities span many
    decades."""


_ROWS = (
    Metric("acc", "accuracy", "1", +1, "task", "fineline"),
    Metric("acc_norm", "accuracy, length-normalised (characters)", "1", +1, "task", "fineline"),
    Metric("acc_bytes", "accuracy, length-normalised (bytes)", "1", +1, "task", "fineline"),
    Metric("acc_mutual_info", "accuracy, unconditional-normalised", "1", +1, "task", "fineline"),
    Metric("acc_raw", "accuracy (OLMES)", "1", +1, "task", "fineline"),
    Metric("acc_per_char", "accuracy per character (OLMES)", "1", +1, "task", "fineline"),
    Metric("acc_per_token", "accuracy per token (OLMES)", "1", +1, "task", "fineline"),
    Metric("acc_uncond", "accuracy, unconditional-normalised (OLMES)", "1", +1, "task", "fineline"),
    Metric("acc_ppl", "accuracy by perplexity (OpenCompass)", "1", +1, "task", "fineline"),
    Metric("choice_prob", "probability of the correct choice", "1", +1, "task", "fineline"),
    Metric("choice_prob_per_token", "probability of the correct choice, per token", "1", +1, "task", "fineline"),
    Metric("choice_prob_per_char", "probability of the correct choice, per character", "1", +1, "task", "fineline"),
    Metric("exact_match", "exact match", "1", +1, "generated", "fineline"),
    Metric("greedy_match", "greedy decoding starts with a solution", "1", +1, "none", "fineline"),
    Metric("f1", "F1", "1", +1, "none", "lm-eval"),
    Metric("mcc", "Matthews correlation", "1", +1, "none", "lm-eval"),
    Metric("em", "exact match", "1", +1, "none", "lm-eval"),
    Metric("mrr", "mean reciprocal rank", "1", +1, "none", "lm-eval"),
    Metric("r@1", "recall at 1", "1", +1, "none", "lm-eval"),
    Metric("r@2", "recall at 2", "1", +1, "none", "lm-eval"),
    Metric("margin", "margin of the correct choice (nats)", "nats", +1, "none", "fineline"),
    Metric("bits_per_byte", "bits per byte", "bits/byte", -1, "none", "fineline"),
    Metric("bits_per_byte_best", "bits per byte, best solution", "bits/byte", -1, "none", "fineline"),
    Metric("cross_entropy", "cross-entropy of prompt and correct choice (nats)", "nats/token", -1, "none", "fineline"),
    Metric("byte_perplexity", "perplexity per byte", "1", -1, "none", "fineline", log=True),
    Metric("word_perplexity", "perplexity per word", "1", -1, "none", "fineline", log=True),
    Metric("perplexity", "perplexity", "1", -1, "none", "fineline", log=True),
    Metric("ppl", "perplexity", "1", -1, "none", "other tables", log=True),
    Metric("loss", "loss", "nats/token", -1, "none", "other tables"),
    Metric("brier_score", "Brier score", "1", -1, "none", "fineline"),
    Metric("pct_stereotype", "share of stereotypical choices", "1", +1, "task", "lm-eval"),
    Metric("likelihood_diff", "likelihood difference (nats)", "nats", -1, "none", "lm-eval"),
    Metric("likelihood_difference", "likelihood difference", "nats", -1, "none", "other tables"),
    Metric("pct_male_preferred", "share of male choices", "1", -1, "none", "lm-eval"),
    Metric("accuracy_amb", "accuracy, ambiguous context", "1", +1, "none", "lm-eval"),
    Metric("accuracy_disamb", "accuracy, disambiguated context", "1", +1, "none", "lm-eval"),
    Metric("amb_bias_score", "bias, ambiguous context", "1", -1, "none", "lm-eval"),
    Metric("disamb_bias_score", "bias, disambiguated context", "1", -1, "none", "lm-eval"),
    Metric("bias_score_ambig", "bias, ambiguous context", "1", -1, "none", "lm-eval"),
    Metric("bias_score_disambig", "bias, disambiguated context", "1", -1, "none", "lm-eval"),
    Metric("bias", "bias", "1", -1, "none", "lm-eval"),
)

METRICS: dict[str, Metric] = {metric.name: metric for metric in _ROWS}
"""Name -> metric, in the order in which a report offers them and picks its first one."""


def metric_of(name: str) -> Metric:
    """How metric `name` is read; a filter of lm-eval in brackets, "exact_match (strict-match)", changes the label only.

    Of an unknown one this is an assumption (see the module): direction and scale of the longest known name that it
    begins or ends with ("…_"), else higher is better; whether guessing has a level is left to the table it stands in.
    """
    if name in METRICS:
        return METRICS[name]
    bare, _, chosen = name.partition(" (")
    if chosen and bare in METRICS:
        return replace(METRICS[bare], name=name, label=f"{METRICS[bare].label} ({chosen}")
    label = name.replace("_", " ")
    inside = [known for known in METRICS if name.startswith(f"{known}_") or name.endswith(f"_{known}")]
    extended = max(inside, key=len, default=None)
    if extended is None:
        return Metric(name, label, "", +1, "task", "other tables")
    return replace(METRICS[extended], name=name, label=label, chance="task", computed_by="other tables")


def has_chance(name: str) -> bool:
    """Whether the chance level of a task is one of this metric; of an unknown metric False."""
    return name in METRICS and METRICS[name].chance == "task"
