"""Slips in a task file of one's own: each is named with its file, and what lm-eval itself makes of it stands beside."""

import json
import logging
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import pytest
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from scoring_examples import write_tokenizer

from fineline_jax.errors import UserError, near
from fineline_jax.scoring.metrics import tidy
from fineline_jax.scoring.requests import build, tasks

LINES = [{"begin": f"{n} is", "ends": ["odd", "even"], "right": (n + 1) % 2} for n in range(4)]
GOOD = """
task: parity
dataset_path: json
dataset_kwargs: {data_files: {test: lines.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{begin}}"
doc_to_choice: ends
doc_to_target: right
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch) -> Path:
    """The working directory, with data and a tokenizer."""
    write_tokenizer(tmp_path / "tokenizer", adds_bos=False)
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tasks, "_memory", lambda config_sha256: tmp_path / "own_tasks" / config_sha256)
    return tmp_path


def made(text: str, name: str = "mine.yaml") -> Any:
    Path(name).write_text(text)
    return build.build(name, Path("tokenizer"))


class First(LM):
    """Of every question the first choice is likelier; so half of `LINES` is right."""

    def loglikelihood(self, requests):
        return [(-1.0 if request.args[1].strip() == "odd" else -2.0, False) for request in requests]  # pyright: ignore

    def loglikelihood_rolling(self, requests):
        raise AssertionError

    generate_until = loglikelihood_rolling


def of_lm_eval(text: str) -> dict[str, Any]:
    """Metrics by lm-eval's own evaluator."""
    Path("mine.yaml").write_text(text)
    manager = TaskManager(include_path=".", include_defaults=False)
    found: Any = lm_eval.simple_evaluate(model=First(), tasks=["parity"], task_manager=manager, bootstrap_iters=0)  # type: ignore[call-arg]
    return found["results"]["parity"]


def accuracy(text: str) -> float:
    """Of the same answers, by this package."""
    pack = made(text)
    values = np.array([-1.0 if one.strip() == "odd" else -2.0 for one in pack.requests["text"].to_pylist()])
    return tidy.of_tasks(pack, values, np.zeros(len(values), bool))["parity"]["acc"].value


@pytest.mark.parametrize("change", [
    ("", ""),
    ("doc_to_target: right", "doc_to_target: '{{ends[right]}}'"),
    ("doc_to_target: right", "doc_to_target: odd"),
    ("doc_to_choice: ends\ndoc_to_target: right", "doc_to_choice: [odd, even]\ndoc_to_target: odd"),
    ('doc_to_text: "{{begin}}"', 'doc_to_text: ""'),
])  # fmt: skip
def test_columns_templates_and_texts_that_are_a_choice_count_as_in_lm_eval(change) -> None:
    text = GOOD.replace(*change)
    assert accuracy(text) == of_lm_eval(text)["acc,none"] == (1.0 if "target: odd" in text else 0.5)


@pytest.mark.parametrize(("change", "message"), [
    (("target: right", "target: rigth"), "doc_to_target: 'rigth' is no column .*mean right.*begin, ends, right"),
    (('"{{begin}}"', "begn"), "doc_to_text: 'begn' is no column of its documents; did you mean begin"),
    (("choice: ends", "choice: endz"), "doc_to_choice: 'endz' is no column of its documents; did you mean ends"),
    (("target: right", "target: '{{ends[right]}}s'"), "doc_to_target gives no choice of any document"),
    (("metric: acc,", "metric: acuracy,"), "metric 'acuracy': lm-eval has no such metric; did you mean acc"),
    (("aggregation: mean", "aggregation: meen"), "metric 'acc': lm-eval has no aggregation 'meen'; did you mean mean"),
    (("aggregation: mean", "aggregation: median"), "metric 'acc' is not computed by aggregation 'median'"),
    (("better: true", "better: false"), "metric 'acc': higher_is_better is true"),
    (("better: true", "better: 'yes'"), "metric 'acc': higher_is_better is true"),
    (("[{metric: acc,", "[{metrik: acc,"), "metric_list must be a list of entries"),
    (("doc_to_target: right", ""), "has no key 'doc_to_target'; add it"),
    (("doc_to_choice: ends", ""), "has no key 'doc_to_choice'; add it"),
    (("choice: ends", "choise: ends"), "unknown key 'doc_to_choise'; did you mean doc_to_choice"),
])  # fmt: skip
def test_a_slip_is_named_with_its_file(change, message) -> None:
    assert GOOD.replace(*change) != GOOD
    with pytest.raises(UserError, match=f"^mine.yaml: task 'parity'.*{message}"):
        made(GOOD.replace(*change))
    assert not Path("out").exists()


def test_lm_eval_itself_scores_a_misspelt_column_as_wrong_and_drops_a_metric() -> None:
    """What the refusals spare the user."""
    assert of_lm_eval(GOOD.replace("target: right", "target: rigth"))["acc,none"] == 0.0
    assert "perplexity,none" not in of_lm_eval(
        GOOD.replace("acc, aggregation: mean, higher_is_better: true", "perplexity")
    )


@pytest.mark.parametrize(("change", "message"), [
    (("{{begin}}", "{{begn}}"), r"UndefinedError: 'begn' is undefined; its columns are begin, ends, right\); correct"),
    (("multiple_choice", "multiple_choise"), "invalid output_type 'multiple_choise'.*; correct mine.yaml, or the data"),
    (("test_split: test", "test_split: tets"), "KeyError: 'tets'.*; correct mine.yaml, or the data that it names"),
])  # fmt: skip
def test_the_remedy_of_a_file_of_ones_own_is_that_file(change, message) -> None:
    with pytest.raises(UserError, match=f"task 'parity': lm-eval cannot use it \\(.*{message}"):
        made(GOOD.replace(*change))


def test_what_is_not_computed_is_told(caplog) -> None:
    with caplog.at_level(logging.WARNING):
        made(GOOD.replace("[{", "[{metric: perplexity}, {metric: likelihood}, {"))
    assert "mine.yaml: task parity: not computed of such a task: perplexity, likelihood" in caplog.text
    caplog.clear()
    made(GOOD)
    assert not caplog.text


def test_documents_without_a_right_choice_are_counted(caplog) -> None:
    """Of 4 documents, 1 has an answer beyond its two choices; with all beyond, nothing could be right."""
    Path("lines.jsonl").write_text(
        "".join(json.dumps(line | {"right": 2 if line is LINES[3] else line["right"]}) + "\n" for line in LINES)
    )
    assert accuracy(GOOD) == of_lm_eval(GOOD)["acc,none"] == 0.25
    assert "task parity: the right answer of 1 of 4 documents is none of their choices" in caplog.text
    Path("lines.jsonl").write_text("".join(json.dumps(line | {"right": -1}) + "\n" for line in LINES))
    with pytest.raises(UserError, match="task 'parity': doc_to_target gives no choice of any document"):
        made(GOOD.replace("test: lines", "test: ./lines"))


def test_a_group_of_ones_own(place) -> None:
    Path("mine.yaml").write_text(GOOD)
    group = "group: both\ntask: [parity]\naggregate_metric_list: [{metric: acc}]\n"
    assert made(group, "g.yaml").manifest["groups"][0]["weight_by_size"] == {"acc": True}
    with pytest.raises(
        UserError, match=r"^g\.yaml: group 'both': no task of it has the metric 'acuracy'; did you mean acc"
    ):
        made(group.replace("acc}", "acuracy}"), "g.yaml")
    with pytest.raises(UserError, match=r"^g\.yaml: task 'parity' has the unknown key 'num_shots'"):
        made(f"{group}num_shots: 1\n", "g.yaml")
    with pytest.raises(UserError, match=r"^g\.yaml: it lists task 'parrity', which no file defines; correct it"):
        made(group.replace("[parity]", "[parity, parrity]"), "g.yaml")
    within = GOOD.replace("task: parity", "task: inner").replace("target: right", "target: rigth")
    entry = "\n".join(f"    {line}" for line in within.strip().splitlines())
    with pytest.raises(UserError, match=r"^h\.yaml: task 'outer::inner', doc_to_target: 'rigth' is no column"):
        made(f"group: outer\ntask:\n  -\n{entry}\n", "h.yaml")


def test_names_that_are_like_another() -> None:
    assert near("acuracy", ["acc", "mean"]) == "; did you mean acc?"
    assert near("x", ["acc", "mean"]) == ""
