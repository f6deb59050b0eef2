"""What is known of public tasks and of the demo's: domain, chance, documents, first metric, other names.

Domains are those of The Fine Line (arXiv 2404.01204) where it has one. A suite may give its own domain, metric and
chance, and a pack its own number of documents (a run may be limited). A task that is not listed has domain "other" and
no chance: then nothing is said about chance, rather than something guessed.
"""

import re
from dataclasses import dataclass, replace
from math import nan

from fineline_jax.facts.metrics import has_chance, metric_of


@dataclass(frozen=True)
class Task:
    """A task of lm-eval's or of this package's."""

    name: str
    """A name that ends in "*" stands for all that begin so."""
    domain: str
    chance: float
    """Accuracy of guessing: 1 / number of choices, 0 where the answer is generated or any word; NaN where there is no
    one number."""
    documents: int | None = None
    """Of the split that lm-eval scores; None: not known, or of several tasks."""
    metric: str | None = None
    """Reported first; None: what a suite that names none reports."""
    aliases: tuple[str, ...] = ()
    """Names of older versions and other tools."""


# ARC has a few questions with 3 or 5 choices: their effect on 1/4 is below 1e-3. 0.62 of boolq's answers are "yes",
# but guessing without a prior gives 0.5. The answers of world_cloze are 12 places: a model that knows no more than that
# is right in a twelfth of the cases.
TASKS = (
    Task("piqa", "commonsense", 1 / 2, 1838, "acc_norm"),
    Task("hellaswag", "commonsense", 1 / 4, 10_042, "acc_norm"),
    Task("winogrande", "commonsense", 1 / 2, 1267, "acc"),
    Task("wsc", "commonsense", 1 / 2, 104, "acc"),
    Task("wsc273", "commonsense", 1 / 2, 273, "acc"),
    Task("wsc*", "commonsense", 1 / 2),
    Task("copa", "commonsense", 1 / 2, 100, "acc"),
    Task("commonsense_qa", "commonsense", 1 / 5, 1221, "acc", aliases=("csqa",)),
    Task("social_iqa", "commonsense", 1 / 3, 1954, "acc", aliases=("socialiqa", "siqa")),
    Task("xstorycloze_en", "commonsense", 1 / 2, 1511, "acc"),
    Task("arc_easy", "exam", 1 / 4, 2376, "acc_norm", aliases=("arc_e",)),
    Task("arc_challenge", "exam", 1 / 4, 1172, "acc_norm", aliases=("arc_c", "arc:challenge")),
    Task("mmlu", "exam", 1 / 4, 14_042, "acc"),
    Task("mmlu*", "exam", 1 / 4),
    Task("hendrycksTest-*", "exam", 1 / 4),
    Task("agieval_nous", "exam", nan, metric="acc"),
    Task("agieval*", "exam", nan),
    Task("openbookqa", "knowledge", 1 / 4, 500, "acc_norm"),
    Task("sciq", "knowledge", 1 / 4, 1000, "acc_norm"),
    Task("triviaqa", "knowledge", 0.0, 17_944, "bits_per_byte"),
    Task("nq_open", "knowledge", 0.0, 3610, "bits_per_byte", aliases=("nq",)),
    Task("truthfulqa*", "knowledge", nan),
    Task("boolq", "reading comprehension", 1 / 2, 3270, "acc"),
    Task("race", "reading comprehension", 1 / 4, 1045, "acc"),
    Task("record", "reading comprehension", nan),
    Task("drop", "reading comprehension", 0.0, 9536, "bits_per_byte"),
    Task("lambada_openai", "reading comprehension", 0.0, 5153, "acc"),
    Task("lambada_standard", "reading comprehension", 0.0, 5153, "acc"),
    Task("lambada*", "reading comprehension", 0.0),
    Task("logiqa", "reasoning", 1 / 4, 651, "acc_norm"),
    Task("logiqa*", "reasoning", 1 / 4),
    Task("bbh_fewshot*", "reasoning", nan, metric="bits_per_byte"),
    Task("gsm8k", "math", 0.0, 1319, "bits_per_byte"),
    Task("gsm8k*", "math", 0.0, metric="bits_per_byte"),
    Task("minerva_math*", "math", 0.0, metric="bits_per_byte"),
    Task("mathqa", "math", 1 / 5, 2985, "acc"),
    Task("arithmetic_*", "math", 0.0),
    Task("humaneval", "code", 0.0, 164, "bits_per_byte", aliases=("openai_humaneval",)),
    Task("humaneval*", "code", 0.0, metric="bits_per_byte"),
    Task("mbpp", "code", 0.0, 500, "bits_per_byte"),
    Task("mbpp*", "code", 0.0, metric="bits_per_byte"),
    Task("cmmlu", "Chinese", 1 / 4, 11_582, "acc"),
    Task("cmmlu*", "Chinese", 1 / 4),
    Task("ceval-valid", "Chinese", 1 / 4, 1346, "acc"),
    Task("ceval*", "Chinese", 1 / 4),
    Task("xstorycloze_zh", "Chinese", 1 / 2, 1511, "acc"),
    Task("xwinograd_zh", "Chinese", 1 / 2, 504, "acc"),
    Task("xcopa_zh", "Chinese", 1 / 2, 500, "acc"),
    Task("wikitext", "language modelling", nan, 62),
    Task("rte", "language understanding", 1 / 2, 277, "acc"),
    Task("wic", "language understanding", 1 / 2, 638, "acc"),
    Task("cb", "language understanding", 1 / 3, 56, "acc"),
    Task("anli_r*", "language understanding", 1 / 3),
    Task("blimp*", "grammar", 1 / 2),
    Task("crows_pairs_*", "stereotypes", 1 / 2, metric="pct_stereotype"),
    Task("world_word_order", "language", 1 / 2, 240, "acc"),
    Task("world_agreement", "language", 1 / 2, 240, "acc"),
    Task("world_agreement_distant", "language", 1 / 2, 240, "acc"),
    Task("world_cloze", "reading", 1 / 12, 240, "acc"),
    Task("world_tracking", "reading", 1 / 4, 240, "acc"),
    Task("world_knowledge_common", "knowledge", 1 / 4, 240, "acc"),
    Task("world_knowledge_rare", "knowledge", 1 / 4, 240, "acc"),
    Task("world_physical", "commonsense", 1 / 4, 240, "acc"),
    Task("world_size", "commonsense", 1 / 2, 240, "acc"),
    Task("world_social", "commonsense", 1 / 2, 240, "acc"),
    Task("world_comparison", "arithmetic", 1 / 2, 240, "acc"),
    Task("world_counting", "arithmetic", 1 / 4, 160, "acc"),
    Task("world_addition", "arithmetic", 1 / 4, 240, "acc"),
    Task("world_remainder", "arithmetic", 1 / 4, 240, "acc"),
    Task("world_two_hop_memory", "reasoning", 1 / 4, 240, "acc"),
    Task("world_two_hop_context", "reasoning", 1 / 4, 240, "acc"),
)  # fmt: skip

_BY_NAME = {name: task for task in TASKS for name in (task.name, *task.aliases)}
_VARIANT = re.compile(r":.*|(?:_(?:train|val|validation|test|rc|mc|\d+shot))+$")
"""What other tools add to the name of a task: "piqa_val_rc_5shot" (OLMo), "piqa:rc::olmes" (OLMES)."""


def task_of(name: str) -> Task:
    """What is known of task `name`: its own row or that of an alias, else that of the first pattern it fits.

    Of a variant of a known task ("piqa_val_rc", "PIQA") domain and chance are known, not how many documents it has.
    """
    if name in _BY_NAME:
        return _BY_NAME[name]
    bare = _VARIANT.sub("", name).lower().replace("-", "_")
    if bare in _BY_NAME:
        return replace(_BY_NAME[bare], documents=None)
    fits = (task for task in TASKS if task.name.endswith("*") and name.startswith(task.name[:-1]))
    return next(fits, Task(name, "other", nan))


def chance_of(task: str, metric: str) -> float:
    """Chance level of a (task, metric), NaN where none is known or the metric has none."""
    if metric_of(metric).chance == "generated":
        return 0.0
    return task_of(task).chance if has_chance(metric) else nan
