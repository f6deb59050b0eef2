"""What is known of metrics and tasks, against statements of our own, lm-eval's definitions and published numbers."""

import math
import re
from pathlib import Path

import lm_eval
import pandas as pd
import pytest
from lm_eval.api.registry import HIGHER_IS_BETTER_REGISTRY
from metric_examples import answers, docs, packed
from metric_examples import task as task_row

from fineline_jax.facts.metrics import METRICS, metric_of
from fineline_jax.facts.tasks import TASKS, chance_of, task_of
from fineline_jax.scoring.metrics import tidy
from fineline_jax.world.reading import PLACES

NAN = math.nan

# Choices of a question; 0: the answer is generated, or any word; None: no one number.
CHOICES = {
    "commonsense": {
        "piqa": 2, "hellaswag": 4, "winogrande": 2, "wsc": 2, "wsc273": 2, "copa": 2, "commonsense_qa": 5, "csqa": 5,
        "social_iqa": 3, "socialiqa": 3, "siqa": 3,
    },
    "exam": {
        "arc_easy": 4, "arc_challenge": 4, "hendrycksTest-anatomy": 4, "mmlu": 4, "mmlu_anatomy": 4,
        "agieval_sat_math": None,
    },
    "Chinese": {"cmmlu_agronomy": 4, "ceval-valid_law": 4, "xcopa_zh": 2, "xstorycloze_zh": 2, "xwinograd_zh": 2},
    "reading comprehension": {
        "boolq": 2, "race": 4, "record": None, "lambada_openai": 0, "lambada_standard": 0, "drop": 0,
    },
    "reasoning": {"logiqa": 4, "logiqa2": 4, "bbh_fewshot_navigate": None},
    "language modelling": {"wikitext": None},
    "math": {"gsm8k": 0, "gsm8k_cot": 0, "minerva_math_algebra": 0, "mathqa": 5, "arithmetic_2da": 0},
    "code": {"humaneval": 0, "humaneval_instruct": 0, "mbpp": 0},
    "knowledge": {
        "openbookqa": 4, "sciq": 4, "triviaqa": 0, "nq_open": 0, "truthfulqa_mc1": None, "truthfulqa_mc2": None,
    },
    "language understanding": {"rte": 2, "wic": 2, "cb": 3, "anli_r1": 3, "anli_r3": 3},
    "grammar": {"blimp": 2, "blimp_adjunct_island": 2},
    "stereotypes": {"crows_pairs_english": 2},
    "other": {"race_hard": None, "piqa_2": None, "arithmetic": None, "my_task": None, "rte2": None},
}  # fmt: skip


@pytest.mark.parametrize("domain", CHOICES)
def test_a_public_task_has_the_chance_of_its_number_of_choices(domain: str) -> None:
    for task, choices in CHOICES[domain].items():
        chance = NAN if choices is None else 1 / choices if choices else 0.0
        assert task_of(task).domain == domain and task_of(task).chance == pytest.approx(chance, nan_ok=True), task
        for metric in ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "choice_prob", "pct_stereotype"):
            assert chance_of(task, metric) == pytest.approx(chance, nan_ok=True)
        for metric in ("margin", "bits_per_byte", "perplexity", "brier_score", "likelihood_difference", "my_metric"):
            assert math.isnan(chance_of(task, metric)), metric
        for metric in ("exact_match", "exact_match (strict-match)"):
            assert chance_of(task, metric) == 0.0


def test_choices_are_those_of_lm_evals_own_tasks() -> None:
    """Where lm-eval's definition lists the choices, they are as many as we say."""
    compared = set()
    for file in (Path(lm_eval.__file__).parent / "tasks").rglob("*.yaml"):
        text = file.read_text()
        task = re.search(r"^task: *(\S+)$", text, re.M)
        listed = re.search(r"^doc_to_choice: *(\[.*\])$", text, re.M) or re.search(
            r'^doc_to_choice: *"\{\{(\[.*\])\}\}"$', text, re.M
        )
        if task and listed and not math.isnan(task_of(task[1]).chance):
            assert task_of(task[1]).chance == pytest.approx(1 / len(listed[1].split(","))), task[1]
            compared.add(task[1])
    assert {"piqa", "boolq", "rte", "cb", "sciq"} <= compared


def test_metrics_are_read_in_their_direction() -> None:
    falling = {"bits_per_byte", "byte_perplexity", "word_perplexity", "perplexity", "ppl", "brier_score", "loss"}
    falling |= {"likelihood_difference", "likelihood_diff", "cross_entropy", "bits_per_byte_best", "pct_male_preferred"}
    falling |= {name for name in METRICS if "bias" in name}
    on_chance = {"acc", "acc_norm", "acc_bytes", "acc_mutual_info", "choice_prob", "choice_prob_per_token"}
    on_chance |= {"choice_prob_per_char", "pct_stereotype", "acc_raw", "acc_per_char", "acc_per_token", "acc_uncond"}
    on_chance |= {"acc_ppl"}
    assert {name for name in METRICS if metric_of(name).better == -1} == falling
    assert {name for name in METRICS if metric_of(name).better == 1} == METRICS.keys() - falling
    assert {name for name in METRICS if metric_of(name).chance == "task"} == on_chance
    assert {name for name in METRICS if metric_of(name).chance == "generated"} == {"exact_match"}
    logarithmic = {"byte_perplexity", "word_perplexity", "perplexity", "ppl"}
    assert {name for name in METRICS if metric_of(name).log} == logarithmic
    own = metric_of("my_own_metric")
    assert (own.label, own.better, own.chance, own.log) == ("my own metric", 1, "task", False)
    assert metric_of("ppl").label == "perplexity" and metric_of("bits_per_byte").label == "bits per byte"


def test_a_metric_of_others_is_read_like_the_one_it_extends() -> None:
    filtered = metric_of("perplexity (last word)")
    assert (filtered.label, filtered.better, filtered.log) == ("perplexity (last word)", -1, True)
    assert metric_of("exact_match (strict-match)").label == "exact match (strict-match)"
    part = metric_of("amb_bias_score_Age")
    assert (part.label, part.better, part.computed_by) == ("amb bias score Age", -1, "other tables")
    assert metric_of("bits_per_byte_best_of_3").name == "bits_per_byte_best_of_3"
    assert metric_of("word_perplexity_of_code").log and metric_of("zh_perplexity").better == -1
    assert not metric_of("perplexing").log
    assert math.isnan(chance_of("piqa", "acc_text"))  # read as an accuracy, but whose chance is not known
    assert math.isnan(chance_of("piqa", "acc (some filter)"))


def test_lm_eval_says_the_same_of_what_its_tasks_compute() -> None:
    """`higher_is_better` of lm-eval's metrics, and of tasks with their own code that are scored by log-likelihood."""
    stated = dict(HIGHER_IS_BETTER_REGISTRY)
    for file in (Path(lm_eval.__file__).parent / "tasks").rglob("*.yaml"):
        text = file.read_text()
        if "process_results" in text and re.search(r"^output_type: (multiple_choice|loglikelihood)$", text, re.M):
            found = re.findall(r"^ *- metric: *([\w@]+)\n(?:    .*\n)*?    higher_is_better: *(\w+)", text, re.M)
            stated |= {name: value.lower() == "true" for name, value in found}
    assert {"likelihood_diff", "pct_stereotype", "amb_bias_score_Age", "mrr", "brier_score", "acc_all"} <= stated.keys()
    # of the share of stereotypes a rise is shown, lm-eval wishes a fall; ter is of generated text, which is not scored
    stated_by_us = {name: metric_of(name).better == 1 for name in stated.keys() - {"pct_stereotype", "ter"}}
    assert stated_by_us == {name: stated[name] for name in stated_by_us}


def written(mode: str) -> set[str]:
    """Names of all metrics that are computed from stored log-likelihoods in a mode."""
    kinds = {"c": "multiple_choice"}
    if mode != "opencompass-ppl":
        kinds |= {"s": "loglikelihood", "r": "loglikelihood_rolling", "g": "generate_until"}
    asked = {name: docs(4, choices=(3,) if name in "cg" else (1,)) for name in kinds}
    made = packed([(task_row(n, kind, unconditional=n == "c"), asked[n]) for n, kind in kinds.items()], mode)
    return {name for values in tidy.of_tasks(made, *answers(made), resample=False).values() for name in values}


def test_every_metric_that_scoring_computes_has_its_row_and_no_row_says_so_of_another() -> None:
    computed = written("lm-eval") | written("olmes") | written("opencompass-ppl")
    assert computed == {name for name in METRICS if METRICS[name].computed_by == "fineline"}


def test_names_of_tasks_are_given_once_and_their_metrics_are_known() -> None:
    names = [name for one in TASKS for name in (one.name, *one.aliases)]
    assert len(names) == len(set(names))
    assert all(one.metric is None or one.metric in METRICS for one in TASKS)
    assert task_of("siqa") is task_of("social_iqa") and task_of("csqa").documents == 1221
    assert (task_of("mmlu").documents, task_of("mmlu_anatomy").documents) == (14_042, None)


def test_a_place_of_the_world_is_guessed_once_in_as_many_as_there_are() -> None:
    assert chance_of("world_cloze", "acc") == 1 / len(PLACES) == 1 / 12


def test_tasks_have_as_many_documents_as_published_standard_errors_say(shared_data: Path) -> None:
    """lm-eval's standard error of an accuracy is sqrt(p (1 - p) / (n - 1))."""
    published = pd.read_csv(shared_data / "trajectories/pythia/pythia_v1_tidy.csv.gz")
    published = published.rename(columns={"acc_stderr": "stderr"})
    rows = published[(published["metric"] == "acc") & (published["stderr"] > 0)]
    counted = (rows["value"] * (1 - rows["value"]) / rows["stderr"] ** 2 + 1).groupby(rows["task"]).median()
    compared = {str(name): n for name, n in counted.items() if task_of(str(name)).documents}
    assert len(compared) >= 6
    for name, n in compared.items():
        assert round(n) == task_of(name).documents, name
