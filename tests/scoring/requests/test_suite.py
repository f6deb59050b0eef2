"""Suites are read from files, names and lists of tasks."""

from typing import Any

import pytest
import yaml
from lm_eval.tasks._index import TaskIndex
from lm_eval.tasks._yaml_loader import load_yaml
from suite_leaves import leaves

from fineline_jax.errors import UserError
from fineline_jax.scoring.modes.names import MODES
from fineline_jax.scoring.requests import suite as suites
from fineline_jax.scoring.requests import tasks
from fineline_jax.scoring.requests.suite import Suite, TaskSpec, open_suite, read_suite, shipped_suites

SUITES = {"core", "demo", "fineline", "mmlu", "olmes", "pythia"}


def test_shipped_suites_are_complete():
    suites = {suite.name: suite for suite in shipped_suites()}
    assert set(suites) == SUITES
    for suite in suites.values():
        for spec in suite.tasks:
            assert spec.domain != "other" and spec.shots is not None and spec.metric
            # bits have no level of guessing; the choices of agieval differ in number
            assert (spec.chance is None) == (spec.metric == "bits_per_byte" or spec.task == "agieval_nous")
    assert len(suites["core"].tasks) == 9 and suites["olmes"].mode == "olmes"
    domains = {spec.domain for spec in suites["fineline"].tasks}
    assert domains == {
        "exam", "knowledge", "commonsense", "reading comprehension", "reasoning", "math", "code", "Chinese",
    }  # fmt: skip


CHOICES = {  # of a question, as the papers of the data sets have them; lambada's is any word
    2: "piqa winogrande boolq copa xstorycloze_en xstorycloze_zh xwinograd_zh xcopa_zh wsc crows_pairs_english"
    " crows_pairs_french",
    3: "social_iqa",
    4: "hellaswag arc_easy arc_challenge openbookqa sciq race logiqa mmlu mmlu_continuation cmmlu ceval-valid",
    5: "commonsense_qa",
    float("inf"): "lambada_openai",
}
NORMED = "hellaswag piqa arc_easy arc_challenge openbookqa sciq logiqa"
METRICS = {  # suite -> metric -> its tasks; of all others the first
    "core": {"acc": "", "acc_norm": NORMED.removesuffix(" logiqa")},
    "fineline": {
        "acc": "", "acc_norm": NORMED,
        "bits_per_byte": "triviaqa nq_open drop bbh_fewshot gsm8k minerva_math humaneval mbpp",
    },
    "mmlu": {"acc": ""},
    "olmes": {"acc_per_char": "", "acc_raw": "boolq commonsense_qa winogrande"},
    "pythia": {"acc": "", "acc_norm": "arc_challenge", "pct_stereotype": "crows_pairs_english crows_pairs_french"},
}  # fmt: skip
SHOTS = {
    "core": {0: ""},
    "fineline": {
        0: "", 3: "bbh_fewshot mbpp", 4: "minerva_math", 5: "mmlu triviaqa nq_open gsm8k cmmlu ceval-valid",
        7: "commonsense_qa", 25: "arc_challenge",
    },
    "mmlu": {5: ""},
    "olmes": {5: ""},
    "pythia": {0: ""},
}  # fmt: skip
ENGLISH = {
    "exam": "mmlu mmlu_continuation agieval_nous arc_easy arc_challenge",
    "knowledge": "triviaqa nq_open openbookqa sciq",
    "commonsense": "hellaswag piqa winogrande social_iqa commonsense_qa copa xstorycloze_en wsc",
    "reading comprehension": "race boolq lambada_openai drop",
    "reasoning": "bbh_fewshot logiqa",
    "math": "gsm8k minerva_math",
    "code": "humaneval mbpp",
    "Chinese": "cmmlu ceval-valid xstorycloze_zh xwinograd_zh xcopa_zh",
    "stereotypes": "crows_pairs_english crows_pairs_french",
}


def chosen(table: dict[Any, str], task: str) -> Any:
    """The key under which a task stands; else the first."""
    return next((key for key, names in table.items() if task in names.split()), next(iter(table)))


def test_shipped_suites_have_the_shots_metrics_domains_and_chances_of_their_sources():
    for suite in shipped_suites():
        if suite.name == "demo":  # see test_world_tasks
            continue
        assert suite.mode == ("olmes" if suite.name == "olmes" else "lm-eval")
        for spec in suite.tasks:
            place = (suite.name, spec.task)
            assert spec.shots == chosen(SHOTS[suite.name], spec.task), place
            assert spec.metric == chosen(METRICS[suite.name], spec.task), place
            assert spec.domain == chosen(ENGLISH, spec.task)
            if spec.chance is not None:
                [choices] = [k for k, names in CHOICES.items() if spec.task in names.split()]
                assert spec.chance == pytest.approx(1 / choices, abs=1e-6), place
        named = {task for table in (METRICS, SHOTS) for names in table[suite.name].values() for task in names.split()}
        assert named <= {spec.task for spec in suite.tasks}
    sizes = {suite.name: len(suite.tasks) for suite in shipped_suites()}
    assert sizes == {"core": 9, "demo": 16, "fineline": 30, "mmlu": 1, "olmes": 10, "pythia": 11}


def test_what_a_suite_leaves_out_is_what_is_known_of_the_task(tmp_path):
    entries = (
        "piqa", {"task": "social_iqa", "domain": "mine", "metric": "margin", "chance": 0.5}, "gsm8k", "siqa", "own",
        {"task": "boolq", "chance": 0},
    )  # fmt: skip
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"tasks": list(entries)}))
    assert [(spec.domain, spec.metric, spec.chance) for spec in read_suite(file).tasks] == [
        ("commonsense", "acc_norm", 0.5), ("mine", "margin", 0.5), ("math", "bits_per_byte", None),
        ("commonsense", "acc", 1 / 3), ("other", None, None), ("reading comprehension", "acc", 0.0),
    ]  # fmt: skip


def test_every_task_exists_in_lm_eval_and_has_the_metric():
    index = tasks._lm_eval_index() | dict(TaskIndex.build([tasks.TASKS_FOLDER]))
    kinds = {
        "bits_per_byte": "generate_until",
        "acc": "multiple_choice loglikelihood",
        "acc_norm": "multiple_choice",
        "acc_per_char": "multiple_choice",
        "acc_raw": "multiple_choice",
        "pct_stereotype": "multiple_choice",
    }
    for suite in shipped_suites():
        for spec in suite.tasks:
            assert spec.task in index, (suite.name, spec.task)
            configs = [load_yaml(leaf.yaml_path, resolve_func=False) for leaf in leaves(index[spec.task], index)]
            assert configs
            for config in configs:
                kind = config.get("output_type", "generate_until")
                assert kind in kinds[spec.metric], (suite.name, spec.task, kind)
                fixed = config.get("num_fewshot")
                assert not (fixed == 0 and spec.shots), (suite.name, spec.task)
                listed = {entry["metric"] for entry in config.get("metric_list", ())}
                if suite.mode == "lm-eval" and spec.metric == "acc":
                    assert "acc" in listed, (suite.name, spec.task)


def test_a_list_of_tasks_borrows_from_the_shipped_suites():
    suite = open_suite("piqa,arc_challenge@25, my_task")
    assert [spec.task for spec in suite.tasks] == ["piqa", "arc_challenge", "my_task"]
    assert suite.tasks[0] == TaskSpec("piqa", "commonsense", 0, "acc_norm", 0.5)
    assert suite.tasks[1].shots == 25 and suite.tasks[1].domain == "exam"
    assert suite.tasks[2] == TaskSpec("my_task")


def test_a_named_task_keeps_all_but_its_shots(monkeypatch):
    [spec] = open_suite("arc_challenge@7").tasks
    assert spec == TaskSpec("arc_challenge", "exam", 7, "acc_norm", 0.25)
    [spec] = open_suite("arc_challenge@0").tasks
    assert spec.shots == 0
    own = TaskSpec("own", "mine", 3, "margin", 0.4)
    monkeypatch.setattr(suites, "shipped_suites", lambda: [Suite("one", (own,))])
    assert open_suite("own@7").tasks == (TaskSpec("own", "mine", 7, "margin", 0.4),), "what facts do not know of it"
    monkeypatch.undo()
    # of the first suite by name that knows it: pythia would say acc, fineline 25 shots
    assert open_suite("arc_challenge").tasks[0].shots == 0 and open_suite("piqa").tasks[0].metric == "acc_norm"
    assert open_suite("crows_pairs_french").tasks[0].metric == "pct_stereotype"
    # olmes names metrics that other modes do not have
    assert open_suite("mmlu_continuation").tasks == (TaskSpec("mmlu_continuation"),)
    assert [open_suite(text).name for text in ("piqa", "piqa@2", "piqa,copa")] == ["piqa", "piqa@2", "custom"]
    assert all(open_suite(text).mode == "lm-eval" for text in ("piqa", "piqa,copa"))


def test_every_key_of_a_suite_file_arrives_where_it_belongs(tmp_path):
    path = tmp_path / "mine.yml"
    path.write_text(
        "{mode: olmes, tasks: [{task: a, domain: d, shots: 3, metric: m, chance: 1}, b, {task: c, chance: 0}]}"
    )
    assert open_suite(str(path)) == Suite(
        "mine",
        (TaskSpec("a", "d", 3, "m", 1), TaskSpec("b", "other", None, None, None), TaskSpec("c", chance=0)),
        "olmes",
    )
    path.write_text("{name: called, tasks: [{task: a, shots: 0}]}")
    assert open_suite(path) == Suite("called", (TaskSpec("a", shots=0),), MODES[0])


def test_a_shipped_suite_comes_before_one_of_the_working_directory(tmp_path, monkeypatch, caplog):
    """A stranger's folder decides nothing unless its path is given."""
    (tmp_path / "configs/suites").mkdir(parents=True)
    for name in ("core", "own"):
        (tmp_path / f"configs/suites/{name}.yaml").write_text(f"name: {name} of mine\ntasks: [piqa]\n")
    monkeypatch.chdir(tmp_path)
    assert len(open_suite("core").tasks) > 1 and "configs/suites/core.yaml is not read" in caplog.text
    assert open_suite("own") == Suite("own of mine", (TaskSpec("piqa"),))
    assert open_suite("configs/suites/core.yaml") == Suite("core of mine", (TaskSpec("piqa"),))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tasks: 3", "needs the keys"),
        ("tasks: []", "has no tasks"),
        ("tasks: [{task: a, shot: 3}]", "unknown key 'shot'"),
        ("tasks: [{task: a, shots: '3'}]", "wrong type"),
        ("tasks: [{task: a, chance: 25}]", "between 0 and 1"),
        ("tasks: [{task: a, chance: 1.01}]", "between 0 and 1"),
        ("tasks: [{task: a, chance: -0.01}]", "between 0 and 1"),
        ("tasks: [{task: a, shots: -1}]", "at least 0"),
        ("tasks: [{task: a, shots: true}]", "wrong type"),
        ("tasks: [{task: a, metric: 1}]", "wrong type"),
        ("tasks: [{task: 1}]", "needs a `task`"),
        ("tasks: [{domain: a}]", "needs a `task`"),
        ("tasks: [a, a]", "twice"),
        ("tasks: [", "not valid YAML"),
        ("{mode: fast, tasks: [a]}", "mode 'fast' must be one of lm-eval, olmes, opencompass-ppl"),
        ("{moed: olmes, tasks: [a]}", "no key 'moed'"),
    ],
)
def test_a_wrong_suite_file_is_refused_by_name(tmp_path, text, message):
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        open_suite(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "is empty"), (" , ", "is empty"), ("a@", "task@shots"), ("a@-1", "task@shots"), ("a@x", "task@shots")],
)
def test_a_wrong_list_of_tasks_is_refused(text, message):
    with pytest.raises(UserError, match=message):
        open_suite(text)
