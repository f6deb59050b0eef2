"""Every task of the shipped suites, from a folder of documents: lm-eval's own evaluator asks the same requests of the
same documents and makes the same numbers of the same answers, groups included."""

import collections
import hashlib
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import lm_eval
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from scoring_examples import write_tokenizer
from suite_documents import write_documents
from suite_leaves import leaves

from fineline_jax import prepare_pack
from fineline_jax.errors import UserError
from fineline_jax.scoring.metrics import tidy
from fineline_jax.scoring.requests import gold_solutions, pack, tasks
from fineline_jax.scoring.requests.suite import TaskSpec, open_suite, shipped_suites

SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")
SUITES = {suite.name: suite for suite in shipped_suites()}
QUICK = "core"
"""The others are slow: MMLU, CMMLU, C-Eval and BBH have 200 data sets."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizers") / "bpe", adds_bos=True)


def needed(specs: list[TaskSpec]) -> list[tuple[str, str | None, tuple[str, ...]]]:
    """(id, config, splits) of the data sets of these tasks, as their definitions name them."""
    index = tasks._lm_eval_index()
    found = collections.defaultdict(set)
    for spec in specs:
        for leaf in leaves(index[spec.task], index):
            config = load_yaml(leaf.yaml_path, resolve_func=False)
            place = config["dataset_path"], config.get("dataset_name")
            found[place] |= {config[key] for key in SPLITS if config.get(key)}
    return [(*place, tuple(sorted(splits))) for place, splits in found.items()]


def hub(folder: Path) -> Callable[..., Any]:
    """A `datasets.load_dataset` that does not share code with ours."""

    def load_dataset(path: str, name: str | None = None, **options: Any) -> datasets.DatasetDict:
        place = folder / path.replace("/", "__") / (name if name not in (None, "default") else "")
        return datasets.DatasetDict(
            {file.stem: datasets.Dataset.from_list(pq.read_table(file).to_pylist()) for file in place.glob("*.parquet")}
        )

    return load_dataset


def answer(context: str, continuation: str) -> tuple[float, bool]:
    """A log-likelihood drawn from the text of a request."""
    rng = random.Random(hashlib.sha256(f"{context}\0{continuation}".encode()).digest())
    return -rng.expovariate(1.0), rng.random() < 0.3


class Oracle(LM):
    """An lm-eval model that knows no language and writes down what it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: dict[Any, list[Any]] = collections.defaultdict(list)

    def loglikelihood(self, requests):
        for request in requests:
            self.asked[request.task_name].append((request.doc_id, *request.args))
        return [answer(*request.args) for request in requests]

    def loglikelihood_rolling(self, requests):
        raise AssertionError("no suite has such a task")

    def generate_until(self, requests):
        raise AssertionError("of these tasks lm-eval only builds the prompts here")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name != QUICK)) for name in sorted({*SUITES} - {"demo"})]
)
def test_requests_and_metrics_are_those_of_lm_eval(name, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    specs = list(SUITES[name].tasks)
    benchmarks = write_documents(tmp_path / "benchmarks", needed(specs))
    made = prepare_pack(name, tokenizer, tmp_path / "p", benchmarks=benchmarks, mode="lm-eval")

    asked = collections.defaultdict(list)
    contexts = made.contexts["text"].to_pylist()
    for row in made.requests.to_pylist():
        asked[row["task"]].append((row["doc"], contexts[row["context"]], row["text"]))
    answers = [answer(*request[1:]) for task in asked for request in asked[task]]
    ours = tidy.of_tasks(made, np.array([ll for ll, _ in answers]), np.array([greedy for _, greedy in answers]))

    generated = {row["task"] for row in made.tasks if row["output_type"] == "generate_until"}
    by_shots = collections.defaultdict(list)
    index = tasks._lm_eval_index()
    for spec in specs:
        generates = any(leaf.name in generated for leaf in leaves(index[spec.task], index))
        by_shots[spec.shots, generates].append(spec.task)
    monkeypatch.setattr(datasets, "load_dataset", hub(benchmarks))
    manager, compared = TaskManager(), collections.Counter()
    for (shots, generates), names in by_shots.items():
        if generates:
            prompts = lm_eval_prompts(manager, names, shots)
            for task, expected in prompts.items():
                assert list(dict.fromkeys((doc, context) for doc, context, _ in asked[task])) == expected, task
            compared["prompts"] += len(prompts)
            continue
        oracle = Oracle()
        result: Any = lm_eval.simple_evaluate(  # type: ignore[call-arg]
            model=oracle, tasks=names, num_fewshot=shots, task_manager=manager, bootstrap_iters=1000
        )
        assert result is not None
        for task, requests in oracle.asked.items():
            assert sorted(asked[task]) == sorted(requests), task
        for entry, values in result["results"].items():
            for metric, value, stderr in reported(values):
                found = ours[entry][metric]
                assert found.value == pytest.approx(value, rel=1e-13), (entry, metric)
                assert found.n == values["sample_len"], (entry, metric)
                if stderr != "N/A" and metric != "perplexity":  # that is bootstrapped, see test_scoring_bootstrap
                    assert found.stderr == pytest.approx(stderr, rel=1e-13), (entry, metric)
                compared["values"] += 1
    assert compared["values"] >= len(specs) - len([s for s in specs if s.metric == "bits_per_byte"])
    assert bool(compared["prompts"]) == bool(generated)


def reported(values: dict[str, Any]) -> list[tuple[str, float, Any]]:
    """(metric, value, stderr) of an entry of lm-eval's results."""
    names = [key.removesuffix(",none") for key in values if key.endswith(",none") and "_stderr" not in key]
    return [(name, values[f"{name},none"], values[f"{name}_stderr,none"]) for name in names]


def lm_eval_prompts(manager: TaskManager, names: list[str], shots: int) -> dict[str, list[tuple[int, str]]]:
    """(document, prompt) of tasks that generate, built by lm-eval; nothing checks what would be generated."""
    with gold_solutions.without_checkers():
        loaded = manager.load(names)["tasks"]
    prompts = {}
    for name, task in loaded.items():
        if task.get_config("num_fewshot") != 0:
            task.set_config("num_fewshot", shots)
        task.set_fewshot_seed(1234)
        task.build_all_requests(rank=0, world_size=1)
        prompts[name] = [(instance.doc_id, instance.args[0]) for instance in task.instances]
    return prompts


def test_a_second_pack_is_the_same_to_the_last_byte(tokenizer, tmp_path, capfd):
    """xcopa is defined by wrapped functions, whose text holds an address; drop's documents are mapped."""
    names = "xcopa_zh,drop,race,winogrande@2"
    specs = [TaskSpec(name.partition("@")[0]) for name in names.split(",")]
    benchmarks = write_documents(tmp_path / "benchmarks", needed(specs))
    first = tasks.load_tasks(open_suite(names), tasks.local_folder(benchmarks))  # keeps its addresses
    capfd.readouterr()
    for out in ("a", "b"):
        prepare_pack(names, tokenizer, tmp_path / out, benchmarks=benchmarks)
    assert first
    for file in sorted((tmp_path / "a").iterdir()):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name
    assert "Map" not in capfd.readouterr().err


def test_what_could_not_be_written_is_removed(tokenizer, tmp_path, monkeypatch):
    benchmarks = write_documents(tmp_path / "benchmarks", needed([TaskSpec("copa")]))
    (tmp_path / "out").mkdir()

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pack.pq, "write_table", full)
    with pytest.raises(OSError, match="No space left") as error:
        prepare_pack("copa", tokenizer, tmp_path / "out" / "p", benchmarks=benchmarks)
    assert error.value.filename == str(tmp_path / "out" / "p")
    assert not list((tmp_path / "out").iterdir())


# Documents that do not fit


PIQA = {"goal": "a", "sol1": "b", "sol2": "c", "label": 0}
ARC = {"id": "1", "question": "a", "choices": {"text": ["b", "c"], "label": ["A", "B"]}, "answerKey": "A"}


@pytest.mark.parametrize(
    ("task", "data", "rows", "message"),
    [
        ("piqa", "baber__piqa", [{"goal": "a", "label": 0}], r"lm-eval cannot use its data set \(.*; give documents"),
        (
            "arc_easy", "allenai__ai2_arc/ARC-Easy", [ARC, ARC | {"answerKey": "Z"}],
            r".* document 1 of data set 'allenai/ai2_arc', config 'ARC-Easy', \(ValueError: 'Z' is not in list\)",
        ),
        ("piqa@5", "baber__piqa", [PIQA] * 3, "5 shots, but its data set has 3 solved examples"),
    ],
)  # fmt: skip
def test_documents_of_another_kind_are_told_in_one_line(task, data, rows, message, tokenizer, tmp_path):
    place = tmp_path / "b" / data
    place.mkdir(parents=True)
    for split in ("train", "validation", "test"):
        pq.write_table(pa.Table.from_pylist(rows), place / f"{split}.parquet")
    with pytest.raises(UserError, match=f"task '{task.partition('@')[0]}': {message}") as error:
        prepare_pack(task, tokenizer, tmp_path / "p", benchmarks=tmp_path / "b")
    assert "\n" not in str(error.value)


def test_a_data_set_that_cannot_be_fetched_is_told_in_one_line(tokenizer, tmp_path):
    def no_network(*arguments: Any, **options: Any) -> Any:
        raise ConnectionError("Couldn't reach 'baber/piqa' on the Hub\n(offline)")

    with (
        mock.patch.object(datasets, "load_dataset", no_network),
        pytest.raises(UserError, match=r"task 'piqa': .*ConnectionError: Couldn't reach .* --benchmarks") as error,
    ):
        prepare_pack("piqa", tokenizer, tmp_path / "p")
    assert "\n" not in str(error.value)
