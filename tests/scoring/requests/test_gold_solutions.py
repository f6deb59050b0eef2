"""Tasks that generate text are scored by the bits per byte of their gold solutions, in the form their examples show."""

import importlib.metadata
import importlib.util
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scoring_examples import write_tokenizer

from fineline_jax import prepare_pack
from fineline_jax.errors import UserError
from fineline_jax.scoring.metrics import tidy
from fineline_jax.scoring.requests import gold_solutions, tasks

MATH = {"problem": "What is $1+1$?", "level": "Level 1", "type": "Algebra", "solution": "It is $\\boxed{2}$."}
ALIASES = {"value": "Paris", "aliases": ["Paris", "City of Light", "Paris"], "normalized_aliases": ["paris"]}
NONE = {"number": "", "date": {"day": "", "month": "", "year": ""}, "spans": []}
DROP = {
    "section_id": "s", "query_id": "q", "passage": "They ran 5 and 3 yards.", "question": "How many yards?",
    "answer": NONE | {"number": "8"},
    "validated_answers": {"number": ["8", ""], "date": [NONE["date"]] * 2, "spans": [[], ["5 yards", "3 yards"]]},
}  # fmt: skip
MBPP = {
    "task_id": 11, "text": "Add two numbers.", "code": "def add(a, b):\n    return a + b",
    "test_list": ["assert add(1, 2) == 3"] * 3, "test_setup_code": "", "challenge_test_list": [],
}  # fmt: skip
CODE = {
    "task_id": "HumanEval/0", "prompt": 'def one():\n    """One."""\n', "canonical_solution": "    return 1\n",
    "test": "assert one() == 1", "entry_point": "one",
}  # fmt: skip


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks")

    def write(name: str, splits: str, row: dict[str, Any]) -> None:
        for split in splits.split():
            path = folder / name / f"{split}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = [{key: f"{i} {v}" if key == "question" else v for key, v in row.items()} for i in range(3)]
            pq.write_table(pa.Table.from_pylist(rows), path)

    write("openai__gsm8k/main", "train test", {"question": "how many?", "answer": "Two and two.\n#### 4"})
    write("EleutherAI__hendrycks_math/algebra", "train test", MATH)
    write("openai__openai_humaneval", "test", CODE)
    write("google-research-datasets__mbpp/full", "train test", MBPP)
    write("mandarjoshi__trivia_qa/rc.nocontext", "train validation", {"question": "which city", "answer": ALIASES})
    write("google-research-datasets__nq_open", "train validation", {"question": "who", "answer": ["Ada", "Ada L."]})
    write("EleutherAI__drop", "train validation", DROP)
    write("SaylorTwift__bbh/dyck_languages", "test", {"input": "Complete: [ {", "target": "} ]"})
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizers") / "bpe", adds_bos=True)


EXPECTED = {  # task: (end of the prompt, solutions after it)
    "gsm8k@1": ("Question: 0 how many?\nAnswer:", [" Two and two.\n#### 4"]),
    "minerva_math_algebra": ("What is $1+1$?\n\nSolution:", [" It is $\\boxed{2}$."]),
    "hendrycks_math_algebra": ("Problem: What is $1+1$?\nAnswer:", [" It is $\\boxed{2}$."]),
    "humaneval": ('def one():\n    """One."""\n', ["    return 1\n"]),
    "mbpp": ("assert add(1, 2) == 3\n[BEGIN]\n", ["def add(a, b):\n    return a + b\n[DONE]"]),
    "triviaqa@1": ("Question: 0 which city?\nAnswer:", [" Paris", " City of Light"]),
    "nq_open@2": ("Q: 0 who?\nA:", [" Ada", " Ada L."]),
    "drop": ("They ran 5 and 3 yards. 0 How many yards?", [" 8", " 5 yards, 3 yards"]),
    "bbh_fewshot_dyck_languages": ("Q: Complete: [ {\nA:", [" } ]"]),
}


@pytest.mark.parametrize("task", EXPECTED)
def test_the_gold_solution_follows_the_prompt_as_in_solved_examples(task, benchmarks, tokenizer, tmp_path):
    made = prepare_pack(task, tokenizer, tmp_path / "p", benchmarks=benchmarks)
    [row] = made.tasks
    assert (row["output_type"], row["metric"], row["chance"]) == ("generate_until", "bits_per_byte", None)
    end, solutions = EXPECTED[task]
    first = made.documents.slice(0, 1).to_pylist()[0]
    requests = made.requests.slice(0, first["requests"]).to_pylist()
    prompt = made.contexts["text"][requests[0]["context"]].as_py()
    assert prompt.endswith(end)
    assert [request["text"] for request in requests] == solutions
    if row["shots"] and "mbpp" not in task and "minerva" not in task and "bbh" not in task:
        assert end[-2:] + solutions[0] in prompt.removesuffix(end)  # so do the solved examples go on


def test_bits_per_byte_of_the_first_and_of_the_best_solution(benchmarks, tokenizer, tmp_path):
    made = prepare_pack("triviaqa@0", tokenizer, tmp_path / "p", benchmarks=benchmarks)
    loglikelihood = np.array([-10.0, -3.0] * 3)
    greedy = np.array([False, True, False, False, False, False])
    values = tidy.of_tasks(made, loglikelihood, greedy)["triviaqa"]
    assert values["bits_per_byte"].value == pytest.approx(10 / 5 / math.log(2))
    assert values["bits_per_byte_best"].value == pytest.approx(3 / 13 / math.log(2))
    assert values["greedy_match"].value == pytest.approx(1 / 3)
    each = tidy.of_documents(made, loglikelihood, greedy)
    each = each[each.metric == "greedy_match"]
    assert each["value"].tolist() == [1, 0, 0] and each["doc"].tolist() == [0, 1, 2]


def test_a_group_with_a_chance_gives_none_to_tasks_that_generate(benchmarks, tokenizer, tmp_path, monkeypatch):
    """agieval_en holds one; of its bits guessing has no level."""
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/both.yaml").write_text("group: both\ntask: [gsm8k, triviaqa]\n")
    monkeypatch.setattr(tasks, "TASKS_FOLDER", tmp_path / "tasks")
    (tmp_path / "s.yaml").write_text("{tasks: [{task: both, shots: 0, metric: acc, chance: 0.25}, {task: nq_open}]}")
    made = prepare_pack(tmp_path / "s.yaml", tokenizer, tmp_path / "p", benchmarks=benchmarks)
    assert [(row["task"], row["chance"], row["metric"]) for row in made.tasks] == [
        ("gsm8k", None, "bits_per_byte"), ("triviaqa", None, "bits_per_byte"), ("nq_open", None, "bits_per_byte"),
    ]  # fmt: skip
    [group] = made.manifest["groups"]
    assert (group["chance"], group["metric"]) == (0.25, "bits_per_byte")


def test_code_is_scored_although_its_checker_cannot_be_loaded(benchmarks, tokenizer, tmp_path):
    """humaneval and mbpp load code_eval from the hub, minerva_math wants packages that compare formulas."""
    made = prepare_pack("humaneval,mbpp", tokenizer, tmp_path / "p", benchmarks=benchmarks)
    sizes = made.documents["choice_bytes"].to_pylist()
    assert sizes[0] == [len(CODE["canonical_solution"])] and sizes[3] == [len(MBPP["code"]) + len("\n[DONE]")]


def test_a_task_whose_target_is_no_text_is_refused(benchmarks, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(gold_solutions, "_SOLUTIONS", {})
    with pytest.raises(UserError, match="'humaneval' names test programs instead of solutions"):
        prepare_pack("humaneval", tokenizer, tmp_path / "p", benchmarks=benchmarks)


def definition(target: Any, choices: Any = None, delimiter: str = ": ", unsafe: bool = False) -> Any:
    config = SimpleNamespace(unsafe_code=unsafe, doc_to_choice=choices)
    shown = SimpleNamespace(target_delimiter=delimiter, doc_to_target="as shown")
    return SimpleNamespace(
        config=config, fewshot_cfg=shown, doc_to_choice=lambda doc: choices,
        doc_to_target=lambda doc, rule: target if rule == "as shown" and doc["few_shot"] == "1" else "as asked",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("target", "choices", "prefix", "found"),
    [
        ("yes", None, None, [(": yes", "yes")]),
        (["b", "a", "b", "", "c"], None, None, [(": b", "b"), (": a", "a"), (": c", "c")]),
        (1, ["no", "maybe"], None, [(": maybe", "maybe")]),
        # after what lm-eval has put before the answer: a space where there is none, and no delimiter
        ("yes", None, "Answer:", [(" yes", "yes")]),
        ("yes", None, "Answer: ", [("yes", "yes")]),
        (["a", "b"], None, "The", [(" a", "a"), (" b", "b")]),
    ],
)
def test_continuations_of_a_solution(target, choices, prefix, found):
    assert gold_solutions.continuations("t", definition(target, choices), {}, prefix) == tuple(found)


@pytest.mark.parametrize("target", ["", [], ["", ""], 3, ["a", 1], None])
def test_a_target_that_is_no_solution_is_refused(target):
    with pytest.raises(UserError, match="task 't' generates text and names no gold solution"):
        gold_solutions.continuations("t", definition(target), {}, None)
    with pytest.raises(UserError, match="task 't' names test programs instead of solutions"):
        gold_solutions.continuations("t", definition("text", unsafe=True), {}, None)


def test_delimiters_of_named_tasks_come_before_lm_evals():
    humaneval = gold_solutions.continuations("humaneval_plus", definition("x", unsafe=True), CODE, None)
    assert humaneval == ((CODE["canonical_solution"],) * 2,)
    [(text, solution)] = gold_solutions.continuations("mbpp", definition("x", delimiter="|", unsafe=True), MBPP, None)
    assert text == f"|{MBPP['code']}\n[DONE]" and solution == text[1:]
    drop = gold_solutions.continuations("drop", definition("x", delimiter="|"), {"answers": [("1",), ("a", "b")]}, None)
    assert drop == ((" 1", "1"), (" a, b", "a, b"))


def test_checkers_are_held_a_place_only_while_definitions_are_loaded():
    import evaluate

    load, version, there = evaluate.load, importlib.metadata.version, set(sys.modules)
    with gold_solutions.without_checkers():
        assert importlib.metadata.version("antlr4-python3-runtime").startswith("4.11")
        assert importlib.metadata.version("numpy") == version("numpy")
        checker = evaluate.load("code_eval")
        assert checker.compute(references=[], predictions=[], k=[1])[0] == {"pass@1": 0.0}
        with pytest.raises(UserError, match="generated answers are not checked here"):
            checker("2")
        for name in gold_solutions._CHECKERS:
            assert importlib.import_module(name)
    assert evaluate.load is load and importlib.metadata.version is version
    missing = [name for name in gold_solutions._CHECKERS if importlib.util.find_spec(name.partition(".")[0]) is None]
    assert not set(missing) & set(sys.modules) and there <= set(sys.modules)


def test_real_problems_keep_every_byte_of_their_solution(shared_data, tmp_path):
    made = prepare_pack(
        "gsm8k,humaneval", shared_data / "tokenizers/llama", tmp_path / "p",
        benchmarks=shared_data / "benchmarks", limit=20,
    )  # fmt: skip
    for name, split, column in (
        ("openai__gsm8k/main", 0, "answer"),
        ("openai__openai_humaneval", 20, "canonical_solution"),
    ):
        texts = pq.read_table(shared_data / "benchmarks" / name / "test.parquet")[column].to_pylist()[:20]
        stored = made.documents.slice(split, 20)["choice_bytes"].to_pylist()
        assert stored == [[len(text.encode())] for text in texts]
