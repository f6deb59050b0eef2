"""What is asked of lm-eval's tasks: where their definitions and documents come from, shots, right choices, weights."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import lm_eval
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lm_eval.tasks._index import Entry, Kind, TaskIndex

from fineline_jax.errors import UserError
from fineline_jax.scoring import lm_eval_compat
from fineline_jax.scoring.requests import tasks
from fineline_jax.scoring.requests.suite import Suite, TaskSpec

ROWS = [{"question": f"q{i}", "choices": ["a", "b"], "label": i % 2} for i in range(4)]
YAML = """
task: {name}
dataset_path: my/data
output_type: multiple_choice
training_split: train
validation_split: validation
doc_to_text: "{{{{question}}}}"
doc_to_target: label
doc_to_choice: choices
metric_list: [{{metric: acc}}]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "tasks").mkdir()
    monkeypatch.setattr(tasks, "TASKS_FOLDER", tmp_path / "tasks")
    write(tmp_path / "tasks/one.yaml", YAML.format(name="one"))
    for split in ("train", "validation"):
        write_rows(tmp_path / f"benchmarks/my__data/{split}.parquet", ROWS)
    return tmp_path


def write(path: Path, text: str) -> None:
    path.write_text(text)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def loaded(folder: Path, *specs: TaskSpec) -> tuple[list[tasks.Task], list[tasks.Group]]:
    return tasks.load_tasks(Suite("s", specs), tasks.local_folder(folder / "benchmarks"))


def test_shots_are_the_suites_or_else_the_definitions_or_else_none(folder):
    write(folder / "tasks/three.yaml", YAML.format(name="three") + "num_fewshot: 3\n")
    write(folder / "tasks/zero.yaml", YAML.format(name="zero") + "num_fewshot: 0\n")
    wanted = [("one", None, 0), ("one", 2, 2), ("three", None, 3), ("three", 0, 0), ("three", 1, 1), ("zero", 0, 0)]
    for name, asked, shots in [*wanted, ("zero", None, 0)]:
        [task] = loaded(folder, TaskSpec(name, shots=asked))[0]
        assert tasks.shots(task) == shots == task.definition.config.num_fewshot
        for document in tasks.documents(task):
            assert document.requests[0][0].count("q") == shots + 1
    with pytest.raises(UserError, match="task 'zero' is fixed to 0 shots by its definition; set shots: 0"):
        loaded(folder, TaskSpec("zero", shots=1))


def test_as_many_shots_as_there_are_solved_examples_can_be_asked_and_no_more(folder):
    write(folder / "tasks/one.yaml", YAML.format(name="one") + "fewshot_split: train\n")
    [task] = loaded(folder, TaskSpec("one", shots=4))[0]
    assert len(list(tasks.documents(task))) == 4
    [task] = loaded(folder, TaskSpec("one", shots=5))[0]
    with pytest.raises(UserError, match="5 shots, but its data set has 4 solved examples"):
        list(tasks.documents(task))


def test_a_limit_is_a_number_of_documents(folder):
    [task] = loaded(folder, TaskSpec("one"))[0]
    assert [[len(list(tasks.documents(task, limit))) for limit in (1, 3, 4, 9, None)]] == [[1, 3, 4, 4, 4]]
    assert [document.doc["question"] for document in tasks.documents(task, 2)] == ["q0", "q1"]


def test_examples_are_drawn_by_lm_evals_seed_whatever_was_drawn_before(folder):
    import inspect

    assert inspect.signature(lm_eval.simple_evaluate).parameters["fewshot_random_seed"].default == tasks.FEWSHOT_SEED
    found = []
    for _ in range(2):
        [task] = loaded(folder, TaskSpec("one", shots=2))[0]
        found.append([document.requests for document in tasks.documents(task)])
    assert found[0] == found[1]


def test_a_task_of_this_package_comes_before_one_of_lm_eval_of_the_same_name(folder):
    write(folder / "tasks/copy.yaml", YAML.format(name="piqa"))
    found, _ = loaded(folder, TaskSpec("one"), TaskSpec("piqa"))
    assert [task.definition.config.dataset_path for task in found] == ["my/data", "my/data"]
    assert tasks.definition_file("piqa") == folder / "tasks/copy.yaml"
    assert tasks.definition_file("arc_easy") == Path(lm_eval.__file__).parent / "tasks/arc/arc_easy.yaml"
    assert tasks.definition_file("nothing") is None
    # beside names that only lm-eval knows its own definitions are read, and still come second
    with pytest.raises(UserError, match=r"task 'arc_easy': .*allenai__ai2_arc/ARC-Easy"):
        loaded(folder, TaskSpec("piqa"), TaskSpec("arc_easy"))


def test_a_task_in_two_entries_of_a_suite_is_refused(folder):
    write(folder / "tasks/group.yaml", "group: both\ntask: [one]\n")
    tasks_found, groups = loaded(folder, TaskSpec("both", "d", chance=0.25))
    assert [task.name for task in tasks_found] == ["one"] and tasks_found[0].spec.task == "both"
    assert [(g.name, g.domain, g.chance, g.leaves, g.metrics) for g in groups] == [("both", "d", 0.25, ("one",), ())]
    with pytest.raises(UserError, match="suite 's': task 'one' is in 'both' and 'one'"):
        loaded(folder, TaskSpec("both"), TaskSpec("one"))


def test_the_hash_of_a_definition_sees_its_text_and_its_functions_but_not_its_place(folder):
    def digest(text: str, place: str = "tasks/one.yaml", helpers: str = "") -> str:
        write(folder / "tasks/helpers.py", helpers)
        (folder / "tasks/one.yaml").unlink(missing_ok=True)
        path = folder / place
        path.parent.mkdir(exist_ok=True)
        write(path, text)
        try:
            [task] = loaded(folder, TaskSpec("one"))[0]
            return tasks.config_hash(task)
        finally:
            path.unlink()

    plain = YAML.format(name="one")
    assert digest(plain) == digest(plain) == digest(plain, "tasks/two.yaml")
    wrapped = plain + "process_docs: !function helpers.same\n"
    function = "def same(docs):\n    return docs\n"
    texts = [plain, plain.replace("{{question}}", "{{question}}?"), plain + "metadata: {version: 2}\n"]
    assert len({digest(text) for text in texts}) == 3
    kinds = {digest(wrapped, helpers=text) for text in (function, function, function.replace("docs\n", "docs  # x\n"))}
    assert len(kinds) == 2 and digest(plain) not in kinds
    shown = "fewshot_config: {{samples: !function helpers.{}}}\n"
    examples = "def few(): return [{'question': 'q', 'choices': ['a', 'b'], 'label': 0}]\nmany = lambda: few() * 2\n"
    assert len({digest(plain + shown.format(name), helpers=examples) for name in ("few", "many")}) == 2


# Documents of a folder


def test_a_folder_is_found_by_identity_configuration_and_split(tmp_path):
    for place in ("a__b", "a__b/c", "a__b/d", "e"):
        write_rows(tmp_path / place / "test.parquet", [{"place": place}])
    read = tasks.local_folder(tmp_path)
    assert read("a/b", "c")["test"]["place"] == ["a__b/c"]
    assert read("a/b", "c", split="test")["place"] == ["a__b/c"]
    assert read("a/b")["test"]["place"] == read("a/b", "default")["test"]["place"] == ["a__b"]
    write_rows(tmp_path / "a__b/default/test.parquet", [{"place": "default"}])
    assert read("a/b", "default")["test"]["place"] == ["default"]
    for name, config, message in (
        ("x", None, r"x: no <split>.parquet here, but data set 'x' is needed"),
        ("a/b", "z", r"a__b/z: no <split>.parquet here, but data set 'a/b', config 'z', is needed"),
    ):
        with pytest.raises(UserError, match=message):
            read(name, config)
    with pytest.raises(UserError, match=r"a__b/c/train.parquet: this split is needed and missing; .* the hub"):
        read("a/b", "c")["train"]


def test_data_files_that_a_task_names_itself_are_read_by_the_original(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: asked.append((args, options)) or "theirs")
    read = tasks.local_folder(tmp_path)
    assert read("json", "n", split="s", data_files="f", other=1) == "theirs"
    assert asked == [(("json", "n"), {"split": "s", "data_files": "f", "other": 1})]


def test_a_folder_of_another_place_is_not_taken_for_the_first(tmp_path, monkeypatch):
    for name in ("one", "two"):
        write_rows(tmp_path / name / "b/a/test.parquet", [{"place": name}])
        monkeypatch.chdir(tmp_path / name)
        assert tasks.local_folder(Path("b"))("a")["test"]["place"] == [name]


def test_bars_are_hidden_inside_and_shown_as_before_outside():
    for shown in (True, False):
        (datasets.enable_progress_bars if shown else datasets.disable_progress_bars)()
        try:
            with tasks.without_bars():
                assert datasets.are_progress_bars_disabled()
            assert datasets.are_progress_bars_disabled() != shown
        finally:
            datasets.enable_progress_bars()


# The index of lm-eval's tasks


def test_the_index_is_kept_and_read_again_for_the_same_version_and_place(tmp_path, monkeypatch):
    root = Path(lm_eval.__file__).parent / "tasks"
    built = []

    def build(folders: list[Path]) -> dict[str, Entry]:
        built.append(folders)
        return {
            "t": Entry("t", Kind.TASK, root / "a/t.yaml", tags={"y", "x"}),
            "g": Entry("g", Kind.TAG, None, tags={"t"}),
        }

    monkeypatch.setattr(TaskIndex, "build", build)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first, second = tasks._lm_eval_index(), tasks._lm_eval_index()
    assert built == [[root]]
    for index in (first, second):
        assert {n: (e.name, e.kind, e.yaml_path, e.tags) for n, e in index.items()} == {
            "t": ("t", Kind.TASK, root / "a/t.yaml", {"x", "y"}), "g": ("g", Kind.TAG, None, {"t"}),
        }  # fmt: skip
    [file] = (tmp_path / "fineline_jax").iterdir()
    monkeypatch.setattr(lm_eval, "__version__", "0.0.0")
    tasks._lm_eval_index()
    assert len(built) == 2 and len(list((tmp_path / "fineline_jax").iterdir())) == 2
    monkeypatch.undo()
    monkeypatch.setattr(TaskIndex, "build", build)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file.write_text("[[")  # cut off
    opened = tmp_path / "opened"
    opened.hardlink_to(file)
    tasks._lm_eval_index()
    assert len(built) == 3 and json.loads(file.read_text())
    assert opened.read_text() == "[[", "who reads the file meanwhile sees all of the old one or all of the new"
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")  # a home that cannot be written
    assert set(tasks._lm_eval_index()) == {"t", "g"}


def test_the_hash_of_a_definition_is_the_same_in_every_process_and_place():
    def of(function: str, source: str = "here") -> str:
        config = {"doc_to_text": f"functools.partial(<function {function}>, 1)", "metadata": {"config_source": source}}
        return tasks.config_hash(tasks.Task("t", TaskSpec("t"), SimpleNamespace(dump_config=lambda: config)))

    assert of("f at 0x7f01ab") == of("f at 0x5502cd", "there") != of("g at 0x7f01ab")


# Documents


def test_a_solved_example_is_rendered_once_by_each_rule():
    document, asked = {"label": 1}, []

    def render(doc: Any, own: Any = None) -> str:
        asked.append((doc["label"], own))
        return f"{doc['label']} {own}"

    made = SimpleNamespace(
        sampler=SimpleNamespace(df=[document]), doc_to_text=render, doc_to_target=render, doc_to_choice=render
    )
    tasks._remember_shots(made)
    for _ in range(2):
        assert [made.doc_to_text(document, own) for own in (None, "shown")] == ["1 None", "1 shown"]
        assert made.doc_to_text({"label": 2}) == "2 None"
    assert asked == [(1, None), (1, "shown"), (2, None), (2, None)]


def definition(**values: Any) -> Any:
    return SimpleNamespace(**({"multiple_input": 0} | {name: (lambda doc, v=v: v) for name, v in values.items()}))


@pytest.mark.parametrize(
    ("label", "gold"),
    [
        (0, (0,)), (2, (2,)), (3, (-100,)), (-100, (-100,)), ("b", (1,)), ("z", (-100,)), ("", (-100,)),
        ([0, 2], (0, 2)), ([1, 3], (1, -100)), ([], ()), (True, (1,)),
    ],
)  # fmt: skip
def test_right_choices_are_lm_evals(label, gold):
    choices = ("a", "b", "c")
    assert tasks._gold(definition(doc_to_target=label), {}, choices) == gold
    two = definition(doc_to_target="the text that follows", doc_to_text=1)  # winogrande: the label is the text
    two.multiple_input = 2
    assert tasks._gold(two, {}, choices) == (1,)


@pytest.mark.parametrize(
    ("items", "weights"),
    [
        ({"word_perplexity": (0.0, 3), "byte_perplexity": (0.0, 14), "bits_per_byte": (0.0, 99)}, (3, 14)),
        ({"bits_per_byte": (0.0, 7)}, (0, 7)),
        ({"word_perplexity": (0.0, 3)}, (3, 0)),
        ({}, (0, 0)),
    ],
)
def test_weights_of_whole_texts_are_the_tasks_own(items, weights):
    one = SimpleNamespace(process_results=lambda doc, results: items if results == (0.0,) else None)
    assert lm_eval_compat.words_and_bytes(one, {}) == weights


def test_a_task_with_images_and_one_of_another_output_type_are_refused(folder, monkeypatch):
    [task] = loaded(folder, TaskSpec("one"))[0]
    monkeypatch.setattr(
        task.definition, "construct_requests", lambda **_: [SimpleNamespace(args=("context", "choice", {"visual": []}))]
    )
    with pytest.raises(UserError, match="task 'one' asks about images or sound"):
        list(tasks.documents(task))
    monkeypatch.setattr(tasks, "SCOREABLE", ("loglikelihood",))
    with pytest.raises(UserError, match="'one' is of output_type multiple_choice, which is not scored"):
        loaded(folder, TaskSpec("one"))


def test_loading_is_quiet_and_leaves_the_logger_as_it_was(folder):
    logger = logging.getLogger("lm_eval")
    level = logger.level
    try:
        logger.setLevel(logging.INFO)
        with lm_eval_compat.without_warnings():
            assert logger.level == logging.ERROR
        assert logger.level == logging.INFO
    finally:
        logger.setLevel(level)
