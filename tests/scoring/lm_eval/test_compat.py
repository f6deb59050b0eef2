"""Every private name and replacement of `lm_eval_compat` does what it is used for: a new lm-eval fails here first."""

import ast
import inspect
import json
import random
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import lm_eval
import lm_eval.api.metrics
import lm_eval.utils
import pytest
from lm_eval.api.model import TemplateLM

import fineline_jax
from fineline_jax.scoring import lm_eval_compat as compat
from fineline_jax.scoring.lm_eval.export import Documents
from fineline_jax.scoring.requests import tasks

CHOICE = """
task: choice
dataset_path: made
dataset_name: null
output_type: multiple_choice
test_split: test
doc_to_text: "Q: {{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
gen_prefix: "A:"
metric_list: [{metric: acc}, {metric: f1}]
"""
TEXT = """
task: text
dataset_path: made
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""
GROUP = """
group: both
task: [choice]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
"""
DOC = {"question": "one two  é", "choices": ["b", "cc"], "answer": 1}


@pytest.fixture
def manager(tmp_path: Path) -> Any:
    for name, text in (("choice", CHOICE), ("text", TEXT), ("both", GROUP)):
        (tmp_path / f"{name}.yaml").write_text(text)
    return compat.TaskManager(include_defaults=False, include_path=str(tmp_path))


def load_dataset(path: str, name: str | None = None, split: str | None = None, **options: Any) -> Any:
    assert path == "made" and split in (None, "test")
    found = datasets.DatasetDict({"test": datasets.Dataset.from_list([DOC])})
    return found if split is None else found[split]


def test_lm_eval_is_imported_here_and_by_the_backend_alone():
    package = Path(fineline_jax.__file__).parent
    importing = {}
    for path in package.rglob("*.py"):
        names = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
            names |= {node.module or ""} if isinstance(node, ast.ImportFrom) and not node.level else set()
        importing[path.relative_to(package).as_posix()] = {name for name in names if name.split(".")[0] == "lm_eval"}
    assert importing.pop("scoring/lm_eval_compat.py")
    public = {"lm_eval.models", "lm_eval.api.instance", "lm_eval.api.model", "lm_eval.api.registry"}
    assert importing.pop("scoring/lm_eval/backend.py") == public
    left = {name: names for name, names in importing.items() if names}
    assert all(names <= {"lm_eval", "lm_eval.__main__"} for names in left.values()), left


def test_the_index_of_tasks_is_the_managers_own(manager):
    index = compat.task_index(manager)
    assert set(index) == {"choice", "text", "both"}
    entry = index["choice"]
    assert isinstance(entry, compat.Entry) and entry.kind is compat.Kind.TASK
    assert entry.yaml_path is not None and entry.yaml_path.name == "choice.yaml"
    index["again"] = compat.Entry("again", compat.Kind.TASK, entry.yaml_path, tags=set())
    assert "choice" in compat.load(manager, "again", load_dataset)["tasks"]  # what is put in can be loaded
    built = compat.TaskIndex.build([entry.yaml_path.parent])
    assert {name: one.kind.name for name, one in built.items()} == {"choice": "TASK", "text": "TASK", "both": "GROUP"}
    assert compat.load_yaml(entry.yaml_path)["doc_to_choice"] == "{{choices}}"


def test_lm_evals_own_tasks_lie_in_its_package():
    assert (compat.tasks_folder() / "arc/arc_easy.yaml").is_file()
    assert compat.tasks_folder() == Path(lm_eval.__file__).parent / "tasks"


def test_a_group_is_loaded_with_its_tasks_from_the_data_set_given(manager):
    loaded = compat.load(manager, "both", load_dataset)
    assert list(loaded["tasks"]) == ["choice"] and list(loaded["groups"]) == ["both"]
    assert dict(loaded["tasks"]["choice"].dataset["test"][0]) == DOC
    assert compat.aggregated_metrics(loaded["groups"]["both"]) == (("acc", True),)
    assert datasets.load_dataset is not load_dataset


def test_requests_of_a_question(manager):
    task = compat.load(manager, "choice", load_dataset)["tasks"]["choice"]
    assert compat.generation_prefix(task, DOC) == "A:"
    assert compat.request_arguments(task, DOC, 0, "Q: x") == [("Q: x", " b"), ("Q: x", " cc")]
    assert compat.choices(task, DOC) == ["b", "cc"] and compat.right_answer(task, DOC) == 1
    assert not compat.has_several_targets(task)
    assert compat.fewshot_config(task).target_delimiter == " " and compat.target_as_shown(task, DOC) == 1
    parameters = {
        "doc", "num_fewshot", "system_instruction", "apply_chat_template", "fewshot_as_multiturn", "chat_template",
        "gen_prefix",
    }  # fmt: skip
    assert parameters <= set(inspect.signature(task.fewshot_context).parameters)
    assert {"rank", "limit", "world_size"} <= set(inspect.signature(task.doc_iterator).parameters)
    assert {"metric_list", "doc_to_text"} <= set(task.dump_config())


def test_a_whole_text_has_one_request_and_its_words_and_bytes(manager):
    task = compat.load(manager, "text", load_dataset)["tasks"]["text"]
    assert compat.request_arguments(task, DOC, 0, "") == [("one two  é",)]
    assert compat.words_and_bytes(task, DOC) == (3, 11)


def test_a_space_is_put_between_a_prefix_and_a_text_that_do_not_have_one():
    assert [compat.delimited(a, b) for a, b in (("A:", "x"), ("A: ", "x"), ("A:", " x"))] == ["A: x", "A: x", "A: x"]


def test_aggregations_are_lm_evals_by_name_by_default_and_a_tasks_own():
    own = lambda items: 0.5
    config = {
        "metric_list": [
            {"metric": "acc"}, {"metric": "f1"}, {"metric": "mcc", "aggregation": "mean"},
            {"metric": "perplexity"}, {"metric": "mine", "aggregation": own},
        ]
    }  # fmt: skip
    found = {name: compat.aggregation_of(config, name) for name in ("acc", "f1", "mcc", "perplexity", "mine", "none")}
    kinds = {name: compat.aggregation_kind(one) for name, one in found.items()}
    assert kinds == {"acc": "mean", "f1": "f1", "mcc": "mean", "perplexity": "perplexity", "mine": None, "none": "mean"}
    assert found["f1"]([(1, 1), (0, 1), (1, 1)]) == pytest.approx(0.8) and found["mine"] is own
    matthews = compat.aggregation_of({"metric_list": [{"metric": "mcc"}]}, "mcc")
    assert compat.aggregation_kind(matthews) == "mcc" and matthews([(1, 1), (0, 0)]) == 1.0


@pytest.mark.skipif(compat.LATER, reason="lm-eval 0.5 has no accuracy over all parts of a question")
def test_the_error_of_an_accuracy_over_all_parts_of_a_question():
    items = [
        (right, {"idx": {"question": number // 2, "paragraph": 0}, "label": 1})
        for number, right in enumerate((1, 1, 1, 0))
    ]
    assert compat.aggregation_kind(lm_eval.api.metrics.acc_all) == "acc_all"
    assert compat.acc_all_stderr(items) == pytest.approx(0.5)


def test_the_bootstrap_is_replaced_where_lm_eval_looks_it_up_and_only_inside():
    asked = []
    values = [-1.0, -2.0, -0.25]
    resampled: Any = lambda aggregation: lm_eval.api.metrics.stderr_for_metric(aggregation, 50)
    with compat.bootstrap_by(lambda kind, items, resamples: asked.append((kind, items, resamples)) or 7.0):
        assert resampled(compat.perplexity)(values) == 7.0
    assert asked == [("perplexity", values, 50)]
    with compat.bootstrap_by(lambda *_: None):  # its own, in this process
        found = resampled(compat.perplexity)(values)
    draws = random.Random(0)
    drawn = [compat.perplexity(draws.choices(values, k=3)) for _ in range(50)]
    assert found == pytest.approx(statistics.stdev(drawn))
    assert resampled(compat.mean)(values) != 7.0


@pytest.mark.skipif(compat.LATER, reason="lm-eval 0.5 keeps compiled templates itself")
def test_templates_are_compiled_once():
    text = "{{question}} of the test of compatibility"
    assert lm_eval.utils.env.from_string(text) is lm_eval.utils.env.from_string(text)
    assert lm_eval.utils.apply_template(text, {"question": "Q"}).startswith("Q of")


@pytest.mark.skipif(compat.LATER, reason="lm-eval 0.5 takes results in another form")
def test_documents_are_replaced_and_results_are_those_of_lm_evals_evaluator(manager):
    documents = Documents([{"content": json.dumps(doc)} for doc in (DOC, {**DOC, "answer": 0})])
    with compat.documents_replaced(lambda task: documents):
        loaded = compat.load(manager, "both")  # no data set called "made" exists
        task = loaded["tasks"]["choice"]
        assert [doc for _, doc in task.doc_iterator(rank=0, limit=None, world_size=1)] == documents
        scored = [(-1.0, True), (-2.0, False)]
        metrics = [task.process_results(doc, scored) for doc in documents]
        raw = {("acc", "none"): [one["acc"] for one in metrics], ("f1", "none"): [one["f1"] for one in metrics]}
        logged = [{"doc_id": i, "doc": doc} for i, doc in enumerate(documents)]
        found = compat.evaluation_results(
            {"choice": {"task": task, "raw_metrics": raw, "logged_samples": logged}}, loaded["groups"], 0
        )
    assert found["results"]["choice"]["acc,none"] == found["results"]["both"]["acc,none"] == 0.5
    assert found["results"]["choice"]["f1,none"] == 0.0  # the first choice is taken twice: class 1 is never found
    assert found["samples"] == {"choice": logged} and found["group_subtasks"] == {"both": ["choice"]}
    assert {"configs", "versions", "n-shot", "higher_is_better", "n-samples"} <= set(found)


def test_defaults_and_hashes_are_lm_evals():
    parameters = inspect.signature(lm_eval.simple_evaluate).parameters
    assert parameters["random_seed"].default == compat.DEFAULT_RANDOM_SEED
    assert parameters["fewshot_random_seed"].default == compat.DEFAULT_OTHER_SEED == tasks.FEWSHOT_SEED
    assert compat.hash_string("a") == "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"
    assert compat.handle_non_serializable({1}) == [1]
    assert {"storage"} == set(inspect.signature(compat.add_env_info).parameters)
    wanted = {"save_results_aggregated": ["results", "samples"], "save_results_samples": ["task_name", "samples"]}
    for name, parameters in wanted.items():
        assert list(inspect.signature(getattr(compat.EvaluationTracker, name)).parameters)[1:] == parameters


def test_the_warnings_of_lm_eval_are_those_of_its_logger(manager, caplog):
    with compat.without_warnings():
        compat.load(manager, "choice", load_dataset)
    assert not [record for record in caplog.records if record.name.startswith("lm_eval")]


def test_the_interface_of_a_model_asks_for_what_the_backend_gives():
    asked = {"tok_encode", "_loglikelihood_tokens", "loglikelihood_rolling", "generate_until", "eot_token_id"}
    assert asked <= TemplateLM.__abstractmethods__ | {"tok_encode"}
    several = SimpleNamespace(multiple_target=2, _multiple_targets=True)
    assert compat.has_several_targets(several)
