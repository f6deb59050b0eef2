"""What is known of common metrics and of the public tasks: direction, label, domain, chance level.

Tables written by `fineline score` carry domain and chance themselves; this page is consulted only for tables that do
not, such as lm-eval result files. A task or metric that is not listed keeps domain "other" and chance NaN: then nothing
is said about chance, rather than something guessed.
"""

import re
from dataclasses import dataclass
from math import nan


@dataclass(frozen=True)
class Metric:
    """How a metric is read: `better` is +1 (higher is better) or -1; `on_chance` says whether chance levels apply."""

    label: str
    better: int
    on_chance: bool
    log: bool = False  # rise, noise and SNR are taken on the logarithm (perplexities span many decades)


METRICS: dict[str, Metric] = {
    "acc": Metric("accuracy", +1, True),
    "acc_norm": Metric("accuracy, length-normalised (characters)", +1, True),
    "acc_bytes": Metric("accuracy, length-normalised (bytes)", +1, True),
    "acc_mutual_info": Metric("accuracy, unconditional-normalised", +1, True),
    "choice_prob": Metric("probability of the correct choice", +1, True),
    "choice_prob_per_token": Metric("probability of the correct choice, per token", +1, True),
    "choice_prob_per_char": Metric("probability of the correct choice, per character", +1, True),
    "exact_match": Metric("exact match", +1, False),
    "margin": Metric("margin of the correct choice (nats)", +1, False),
    "bits_per_byte": Metric("bits per byte", -1, False),
    "byte_perplexity": Metric("perplexity per byte", -1, False, log=True),
    "word_perplexity": Metric("perplexity per word", -1, False, log=True),
    "perplexity": Metric("perplexity", -1, False, log=True),
    "ppl": Metric("perplexity", -1, False, log=True),
    "brier_score": Metric("Brier score", -1, False),
    "pct_stereotype": Metric("share of stereotypical choices", +1, True),
    "likelihood_difference": Metric("likelihood difference", -1, False),
}

# The order in which a report offers metrics and picks its first one.
METRIC_ORDER = tuple(METRICS)


def metric_of(name: str) -> Metric:
    """The reading of metric `name`; an unknown one is taken as higher-is-better with its own name as label."""
    return METRICS.get(name, Metric(name.replace("_", " "), +1, True))


# (task name or prefix ending in "*", domain, chance of acc). Chance is 1 / number of choices; generated or
# last-word answers have chance 0. ARC has a few questions with 3 or 5 choices: their effect on 1/4 is below 1e-3.
_TASKS: tuple[tuple[str, str, float], ...] = (
    ("piqa", "commonsense", 0.5),
    ("hellaswag", "commonsense", 0.25),
    ("winogrande", "commonsense", 0.5),
    ("wsc*", "commonsense", 0.5),
    ("wsc273", "commonsense", 0.5),
    ("copa", "commonsense", 0.5),
    ("commonsense_qa", "commonsense", 0.2),
    ("csqa", "commonsense", 0.2),
    ("social_iqa", "commonsense", 1 / 3),
    ("socialiqa", "commonsense", 1 / 3),
    ("siqa", "commonsense", 1 / 3),
    ("arc_easy", "science", 0.25),
    ("arc_challenge", "science", 0.25),
    ("openbookqa", "science", 0.25),
    ("sciq", "science", 0.25),
    ("boolq", "reading", 0.5),
    ("race", "reading", 0.25),
    ("record", "reading", nan),
    ("logiqa*", "logic", 0.25),
    ("lambada*", "language modelling", 0.0),
    ("wikitext", "language modelling", nan),
    ("hendrycksTest-*", "exams", 0.25),
    ("mmlu*", "exams", 0.25),
    ("cmmlu*", "exams", 0.25),
    ("ceval*", "exams", 0.25),
    ("agieval*", "exams", nan),
    ("gsm8k*", "mathematics", 0.0),
    ("minerva_math*", "mathematics", 0.0),
    ("mathqa", "mathematics", 0.2),
    ("arithmetic_*", "mathematics", 0.0),
    ("humaneval*", "code", 0.0),
    ("mbpp*", "code", 0.0),
    ("triviaqa", "knowledge", 0.0),
    ("nq_open", "knowledge", 0.0),
    ("truthfulqa*", "knowledge", nan),
    ("rte", "language understanding", 0.5),
    ("wic", "language understanding", 0.5),
    ("cb", "language understanding", 1 / 3),
    ("anli_r*", "language understanding", 1 / 3),
    ("blimp*", "grammar", 0.5),
    ("crows_pairs_*", "stereotypes", 0.5),
)


def task_of(name: str) -> tuple[str, float]:
    """(domain, chance of accuracy) of a public lm-eval task; ("other", nan) when it is not known."""
    for pattern, domain, chance in _TASKS:
        if name == pattern or (pattern.endswith("*") and name.startswith(pattern[:-1])):
            return domain, chance
    return "other", nan


def chance_of(task: str, metric: str) -> float:
    """Chance level of a (task, metric), NaN where none is known or the metric has none."""
    if metric == "exact_match" or metric.startswith("exact_match ("):
        return 0.0  # a whole answer is not guessed
    return task_of(task)[1] if metric in METRICS and metric_of(metric).on_chance else nan


def order_by_size(names: list[str]) -> tuple[list[str], bool]:
    """Series by model size where every name holds a different one (160m, 1.4B); else as they came. And whether so."""
    found = [re.search(r"(?<![\d.])(\d+(?:\.\d+)?)([mb])(?![a-z])", name.lower()) for name in names]
    sizes = {name: float(m[1]) * (1e6 if m[2] == "m" else 1e9) for name, m in zip(names, found, strict=True) if m}
    if len(names) < 3 or len(set(sizes.values())) < len(names):
        return names, False
    return sorted(names, key=sizes.__getitem__), True
