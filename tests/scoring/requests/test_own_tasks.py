"""Task files of one's own: the cases `custom_tasks`, against what lm-eval itself asks and computes of them."""

import collections
import json
import shutil
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import pytest
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from scoring_examples import write_tokenizer

from fineline_jax import prepare_pack
from fineline_jax.cli import main
from fineline_jax.errors import UserError
from fineline_jax.scoring.metrics import tidy
from fineline_jax.scoring.options import PackOptions
from fineline_jax.scoring.requests import build, tasks
from fineline_jax.scoring.requests.suite import TaskSpec, open_suite, read_suite

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}"
    "{% if not loop.last or add_generation_prompt %}</>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory, shared_data) -> Path:
    folder = tmp_path_factory.mktemp("own") / "custom_tasks"
    shutil.copytree(shared_data / "cases/scoring/custom_tasks", folder)
    write_tokenizer(folder / "tokenizer", adds_bos=False)
    file = folder / "tokenizer/tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": TEMPLATE}))
    return folder


@pytest.fixture(autouse=True)
def inside(place, monkeypatch, tmp_path) -> None:
    """Paths in data_files are relative to the working directory, as in lm-eval."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(tasks, "_memory", lambda config_sha256: tmp_path / "own_tasks" / config_sha256)


class Oracle(LM):
    """An lm-eval model that writes down what it is asked, and answers by the length of the texts."""

    tokenizer_name = "t"

    def __init__(self, tokenizer: Any):
        super().__init__()
        self.tokenizer, self.asked = tokenizer, collections.defaultdict(list)

    def loglikelihood(self, requests):
        for request in requests:
            self.asked[request.task_name].append((request.doc_id, *request.args))
        return [answer(*request.args) for request in requests]

    def loglikelihood_rolling(self, requests):
        for request in requests:
            self.asked[request.task_name].append((request.doc_id, "", request.args[-1]))
        return [answer("", request.args[-1])[0] for request in requests]

    def generate_until(self, requests):
        raise AssertionError

    def chat_template(self, chat_template=False):
        return self.tokenizer.chat_template

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        return self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )  # fmt: skip


def answer(context: str, continuation: str) -> tuple[float, bool]:
    return -1.0 - sum(map(ord, context[-30:] + "|" + continuation)) % 97 / 7, len(continuation) % 3 == 0


def asked(made: Any) -> dict[str, list[tuple[int, str, str]]]:
    contexts, found = [*made.contexts["text"].to_pylist(), ""], collections.defaultdict(list)
    for row in made.requests.to_pylist():
        found[row["task"]].append((row["doc"], contexts[row["context"]], row["text"]))
    return found


def compare(place: Path, suite: str, evaluate: dict[str, Any], **options: Any) -> Any:
    """Requests, metrics and standard errors of our pack with those of lm-eval's own evaluator."""
    made = build.build(suite, place / "tokenizer", PackOptions(include_path=place, **options))
    from fineline_jax.tokenizers.open import open_tokenizer

    oracle = Oracle(open_tokenizer(place / "tokenizer"))
    result: Any = lm_eval.simple_evaluate(  # type: ignore[call-arg]
        model=oracle, tasks=list(evaluate.pop("tasks", suite.split(","))), bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(place), include_defaults=False), **evaluate,
    )  # fmt: skip
    ours = asked(made)
    for task, requests in oracle.asked.items():
        assert sorted(ours[task]) == sorted(requests), task
    assert ours.keys() == oracle.asked.keys()
    answers = [answer(context, text) for task in ours for _, context, text in ours[task]]
    values = tidy.of_tasks(made, np.array([one for one, _ in answers]), np.array([greedy for _, greedy in answers]))
    compared = 0
    for task, metrics in result["results"].items():
        for name, value in metrics.items():
            metric, _, kind = name.partition(",")
            if kind and not metric.endswith("_stderr") and isinstance(value, float):
                assert values[task][metric].value == pytest.approx(value, rel=1e-12), (task, metric)
                error = metrics.get(f"{metric}_stderr,{kind}")
                if isinstance(error, float) and error > 0:
                    assert values[task][metric].stderr == pytest.approx(error, rel=1e-9), (task, metric)
                compared += 1
    assert compared
    return made


def test_every_case_asks_and_counts_as_lm_eval(place) -> None:
    made = compare(place, "my_mc,my_mc_shots,my_mc_rand,my_mc_nodelim,my_ll,my_roll", {})
    assert [row["shots"] for row in made.tasks] == [0, 3, 2, 0, 0, 0]
    assert made.tasks[4]["metric"] == "acc" and made.tasks[5]["metric"] == "bits_per_byte"
    compare(place, "my_mc_pmi", {"limit": 2}, limit=2)  # lm-eval's brier_score takes one number of choices
    grouped = compare(place, "my_group", {})
    assert [row["task"] for row in grouped.tasks] == ["my_mc", "my_mc_shots"]


def test_a_task_with_functions_of_its_own_is_a_program_that_is_run(place, tmp_path, monkeypatch) -> None:
    made = compare(place, "my_mc_fn", {})
    assert made.tasks[0]["own_metrics"]
    assert tasks.definition_file("my_mc_fn", made.tasks[0]["config_sha256"]) == place / "my_mc_fn.yaml"
    monkeypatch.setattr(tasks, "_memory", lambda config_sha256: tmp_path / "of another user" / config_sha256)
    count = made.requests.num_rows
    with pytest.raises(UserError, match=r"'my_mc_fn' computes its own metrics.*--include-path"):
        tidy.of_tasks(made, np.zeros(count), np.zeros(count, bool))
    assert tasks.own_file("../../../etc/passwd") is None, "a pack of a stranger names no file"


def test_gold_solutions_of_a_task_that_generates(place) -> None:
    made = build.build("my_gen.yaml", place / "tokenizer")
    assert asked(made) == {"my_gen": [(0, "2+2=", " 4"), (1, "3+3=", " 6")]}


@pytest.mark.parametrize("task", ["my_mc_empty", "my_ll_long"])
def test_an_empty_choice_and_a_continuation_beyond_the_context(place, task) -> None:
    """lm-eval stops at the second; an empty choice has its delimiter."""
    made = build.build(task, place / "tokenizer", PackOptions(include_path=place))
    lines = Path("data/mc.jsonl").read_text().splitlines()
    choices = sum(len(json.loads(line)["c"]) for line in lines)
    assert made.requests.num_rows == (choices if task == "my_mc_empty" else 4)


def test_shots_seed_limit_and_chat_are_lm_evals(place) -> None:
    compare(place, "my_mc_shots,my_mc_rand", {"num_fewshot": 1, "fewshot_random_seed": 7}, shots=1, fewshot_seed=7)
    seven, eight = (build.build("my_mc_rand.yaml@4", place / "tokenizer", PackOptions(fewshot_seed=s)) for s in (7, 8))
    assert seven.hash != eight.hash and seven.manifest["fewshot_seed"] == 7 and seven.tasks[0]["shots"] == 4
    made = compare(place, "my_mc,my_ll", {"limit": 0.3}, limit=0.3)
    assert [row["documents"] for row in made.tasks] == [3, 1] and made.manifest["limit"] == 0.3, "rounded up"
    for turns, several in (("single-turn", False), ("multi-turn", True)):
        chat = {"apply_chat_template": True, "fewshot_as_multiturn": several, "system_instruction": "Be brief."}
        made = compare(place, "my_mc_shots", chat, chat_template=turns, system_instruction="Be brief.")
        _, context, choice = asked(made)["my_mc_shots"][0]
        assert context.startswith("<s><system>Be brief.") and context.endswith("</><assistant>") and choice == "mat. "
        assert context.count("<user>") == (4 if several else 1)
        assert made.context_tokens[0][:2].tolist().count(0) == 1, "one BOS"


def test_what_an_option_may_be(place, capsys) -> None:
    for options, message in (
        ({"limit": 0.0}, "--limit 0"), ({"limit": 1.5}, "--limit 1.5 must be a whole number, or a share below 1"),
        ({"limit": -0.1}, "--limit"), ({"shots": -1}, "--shots -1"), ({"fewshot_seed": -1}, "--fewshot-seed -1"),
        ({"chat_template": "x"}, "--chat-template x"), ({"include_path": place / "none"}, "--include-path .*none: no"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            build.build("my_mc", place / "tokenizer", PackOptions(**{"include_path": place} | options))
    assert (
        build.build("my_mc", place / "tokenizer", PackOptions(include_path=place, limit=2.0)).tasks[0]["documents"] == 2
    )
    arguments = ["tasks", "prepare", "my_mc.yaml", "--tokenizer", str(place / "tokenizer"), "--limit", ".3"]
    assert main([*arguments, "--out", str(place / "p")]) == 0 and "8 requests of 1 task" in capsys.readouterr().out
    with pytest.raises(
        UserError, match=r"task 'my_mc': .*FileNotFoundError.*data_files, which are read from the working"
    ):
        import os

        os.chdir(place.parent)
        build.build(str(place / "my_mc.yaml"), place / "tokenizer")


def test_a_tokenizer_without_a_chat_template_is_refused(place, tmp_path) -> None:
    write_tokenizer(tmp_path / "plain", adds_bos=False)
    with pytest.raises(UserError, match=r"--chat-template: the tokenizer .*plain has none"):
        build.build("my_mc.yaml", tmp_path / "plain", PackOptions(chat_template="multi-turn"))


def test_only_picked_documents_are_asked_with_the_prompts_that_all_have(place, tmp_path) -> None:
    whole = build.build("my_mc_rand.yaml,my_ll.yaml", place / "tokenizer")
    file = tmp_path / "picked.csv"
    file.write_text("task,document,place\nmy_mc_rand,5,1\nmy_mc_rand,2,\nmy_mc_rand,1,2\n")
    made = build.build("my_mc_rand.yaml,my_ll.yaml", place / "tokenizer", PackOptions(pick=file))
    assert asked(made)["my_mc_rand"] == [one for one in asked(whole)["my_mc_rand"] if one[0] in (1, 5)]
    assert asked(made)["my_ll"] == asked(whole)["my_ll"]
    assert made.rows_in(whole) is not None and whole.rows_in(made) is None
    file.write_text("task,document\nnone,5\n")
    with pytest.raises(UserError, match="task 'none' is not in suite"):
        build.build("my_mc.yaml", place / "tokenizer", PackOptions(pick=file))
    file.write_text("task,document\nmy_mc,500\n")
    with pytest.raises(UserError, match="task 'my_mc': no documents are left"):
        build.build("my_mc.yaml", place / "tokenizer", PackOptions(pick=file))
    file.write_text("task\nmy_mc\n")
    with pytest.raises(UserError, match="no table of the columns task and document"):
        build.build("my_mc.yaml", place / "tokenizer", PackOptions(pick=file))


def test_names_and_files_are_mixed_in_lists_and_suites(place, tmp_path) -> None:
    found = open_suite("piqa, my_mc.yaml@2 ,my_group.yaml")
    assert [(spec.task, spec.shots) for spec in found.tasks] == [("piqa", 0), ("my_mc", 2), ("my_group", None)]
    assert found.include_path == (Path(),) and found.name == "custom" and open_suite("my_mc.yaml@2").name == "my_mc@2"
    file = tmp_path / "mine.yaml"
    file.write_text(f"tasks: [piqa, {{task: {place}/my_mc.yaml, domain: mine, metric: acc_norm, chance: 0.4}}]")
    assert read_suite(file).tasks[1] == TaskSpec("my_mc", "mine", None, "acc_norm", 0.4)
    shutil.copytree(place, tmp_path / "tasks")
    file.write_text("include_path: tasks\ntasks: [my_mc, my_ll]")
    assert read_suite(file).include_path == (tmp_path / "tasks",)
    assert [row["task"] for row in build.build(file, place / "tokenizer").tasks] == ["my_mc", "my_ll"]
    (tmp_path / "no.yaml").write_text("include: x.yaml")
    with pytest.raises(UserError, match=r"no\.yaml: defines no task of lm-eval"):
        open_suite(f"piqa,{tmp_path}/no.yaml")


def test_a_file_of_ones_own_comes_before_lm_evals_task_of_the_same_name(place, tmp_path) -> None:
    (tmp_path / "own").mkdir()
    text = (place / "my_mc.yaml").read_text().replace("task: my_mc", "task: piqa")
    (tmp_path / "own/piqa.yaml").write_text(text)
    made = prepare_pack("piqa", place / "tokenizer", tmp_path / "p", include_path=tmp_path / "own")
    assert made.tasks[0]["task"] == "piqa" and made.tasks[0]["documents"] == 8


def test_two_files_that_define_one_task_are_named(place, tmp_path) -> None:
    """lm-eval takes whichever it comes upon first, also where the other was asked for by its file."""
    (tmp_path / "own").mkdir()
    for name in ("a", "z"):
        (tmp_path / f"own/{name}.yaml").write_text((place / "my_mc.yaml").read_text())
    for asked in ("my_mc", str(tmp_path / "own/z.yaml")):
        with pytest.raises(UserError, match=r"task 'my_mc' is defined in .*a\.yaml and in .*z\.yaml; rename it in one"):
            prepare_pack(asked, place / "tokenizer", tmp_path / "p", include_path=tmp_path / "own")
    made = (place / "my_mc.yaml").read_text().replace("task: my_mc", "task: other")
    (tmp_path / "own/z.yaml").write_text(made)
    assert prepare_pack("other", place / "tokenizer", tmp_path / "p", include_path=tmp_path / "own").tasks
