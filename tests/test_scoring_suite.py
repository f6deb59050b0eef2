"""Suites are read from files, names and lists of tasks."""

from typing import Any

import pytest
from lm_eval.tasks._index import Entry, Kind, TaskIndex
from lm_eval.tasks._yaml_loader import load_yaml

from fineline_jax.errors import UserError
from fineline_jax.scoring import tasks
from fineline_jax.scoring.suite import Suite, TaskSpec, open_suite, shipped_suites

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


def leaves(entry: Any, index: dict[str, Entry]) -> list[Any]:
    """The tasks of a group, through groups within it."""
    if entry.kind in (Kind.TASK, Kind.PY_TASK):
        return [entry]
    if entry.kind == Kind.TAG:
        return [leaf for name in sorted(entry.tags) for leaf in leaves(index[name], index)]
    assert entry.yaml_path is not None
    found, queue = [], list(load_yaml(entry.yaml_path, resolve_func=False)["task"])
    while queue:
        item = queue.pop(0)
        if isinstance(item, dict):
            queue = list(item["task"]) + queue
        else:
            found += leaves(index[item], index)
    return found


def test_every_task_exists_in_lm_eval_and_has_the_metric():
    index = tasks._lm_eval_index() | dict(TaskIndex.build([tasks._own_tasks()]))
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


def test_a_suite_in_the_working_directory_comes_first(tmp_path, monkeypatch):
    (tmp_path / "configs/suites").mkdir(parents=True)
    (tmp_path / "configs/suites/core.yaml").write_text("name: mine\ntasks: [piqa]\n")
    monkeypatch.chdir(tmp_path)
    assert open_suite("core") == Suite("mine", (TaskSpec("piqa"),))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tasks: 3", "needs the keys"),
        ("tasks: []", "has no tasks"),
        ("tasks: [{task: a, shot: 3}]", "unknown key 'shot'"),
        ("tasks: [{task: a, shots: '3'}]", "wrong type"),
        ("tasks: [{task: a, chance: 25}]", "between 0 and 1"),
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
    assert "wrong" in str(error.value) and "\n" not in str(error.value)
