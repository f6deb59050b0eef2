"""Suites are read from files, names and lists of tasks."""

import pytest

from fineline_jax.errors import UserError
from fineline_jax.scoring.suite import Suite, TaskSpec, open_suite, shipped_suites


def test_shipped_suites_are_complete():
    suites = {suite.name: suite for suite in shipped_suites()}
    assert {"core", "mmlu"} <= set(suites)
    for suite in suites.values():
        for spec in suite.tasks:
            assert spec.domain != "other" and spec.shots is not None and spec.metric and spec.chance is not None
    assert len(suites["core"].tasks) == 9


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
    ],
)
def test_a_wrong_suite_file_is_refused_by_name(tmp_path, text, message):
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        open_suite(path)
    assert "wrong" in str(error.value) and "\n" not in str(error.value)
