"""lm-eval's own command on tasks and groups made here, field by field: what a pack asks, what its metrics are, what is
exported. No code is shared but the answers."""

import hashlib
import json
import os
import random
import re
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lm_eval.api.model import LM
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager
from scoring_examples import write_tokenizer
from transformers import AutoTokenizer

from fineline_jax import prepare_pack
from fineline_jax.atomic_files import unsealed
from fineline_jax.errors import UserError
from fineline_jax.scoring import score_files
from fineline_jax.scoring.lm_eval import export
from fineline_jax.scoring.metrics import bootstrap, tidy
from fineline_jax.scoring.requests import pack, tasks

SHARED = "validation_split: validation\ntraining_split: train\nmetadata: {version: 1.5}\n"
CHOICES = SHARED + "output_type: multiple_choice\ndoc_to_target: label\ndoc_to_choice: choices\n"
DEFINITIONS = {
    "plain.yaml": CHOICES + """
task: plain
task_alias: the plain one
dataset_path: custom/choices
description: "Answer: which one?\\n\\n"
doc_to_text: "Q: {{question}}\\nA"
target_delimiter: ": "
fewshot_delimiter: "\\n--\\n"
fewshot_split: train
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
  - {metric: acc_bytes, aggregation: mean, higher_is_better: true}
""",
    "several.yaml": CHOICES + """
task: several
dataset_path: custom/several
num_fewshot: 0
doc_to_text: "{{question}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
""",
    "mutual.yaml": CHOICES + """
task: mutual
dataset_path: custom/two
doc_to_text: "{{question}} ="
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_mutual_info, aggregation: mean, higher_is_better: true}
  - {metric: brier_score, aggregation: brier_score, higher_is_better: false}
""",
    "cloze.yaml": SHARED + """
task: cloze
dataset_path: custom/cloze
output_type: loglikelihood
doc_to_text: "{{start}}"
doc_to_target: " {{end}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
""",
    "text.yaml": SHARED + """
task: text
dataset_path: custom/text
output_type: loglikelihood_rolling
num_fewshot: 0
doc_to_text: ""
doc_to_target: !function helpers.shown
process_results: !function helpers.weights
metric_list:
  - {metric: word_perplexity}
  - {metric: byte_perplexity}
  - {metric: bits_per_byte}
""",
    "own.yaml": CHOICES + """
task: own
dataset_path: custom/own
doc_to_text: !function helpers.question
process_results: !function helpers.results
metric_list:
  - {metric: spread, aggregation: mean, higher_is_better: false}
  - {metric: acc_all, aggregation: !function helpers.all_parts, higher_is_better: true}
""",
    "said.yaml": SHARED + """
task: said
dataset_path: custom/cloze
output_type: generate_until
doc_to_text: "{{start}}"
doc_to_target: "{{end}}"
metric_list: [{metric: exact_match}]
""",
    "speech.yaml": "group: speech\ntask: [said]\n",
    "inner.yaml": """
group: inner
group_alias: two of choices
task: [plain, mutual]
aggregate_metric_list:
  - {metric: acc, weight_by_size: false}
  - {metric: acc_norm, weight_by_size: true}
metadata: {version: 2}
""",
    "outer.yaml": """
group: outer
task: [inner, cloze]
aggregate_metric_list:
  - {metric: acc, weight_by_size: true}
metadata: {version: 3}
""",
    "helpers.py": """
from lm_eval.api.metrics import acc_all as all_parts

def shown(doc):
    return doc["page"].replace("_", " ")

def weights(doc, results):
    words, size = len(doc["page"].split("_")), len(doc["page"].encode())
    bits = (results[0], size)
    return {"word_perplexity": (results[0], words), "byte_perplexity": bits, "bits_per_byte": bits}

def question(doc):
    return "? " + doc["question"]

def results(doc, results):
    return {"spread": results[0][0] - results[1][0], "acc_all": (results[0][1], doc)}
""",
}  # fmt: skip
SUITE = """
name: whole
tasks:
  - {task: outer, domain: first, shots: 2, chance: 0.125}
  - {task: several, domain: second, metric: margin}
  - {task: text}
  - {task: own, domain: third, shots: 2, metric: spread, chance: 0.5}
"""
LEAVES = ["plain", "mutual", "cloze", "several", "text", "own"]
WORDS = ("cat", "dog", "Fäden", "東京", "ice cream", "two", "the", "under")


def documents() -> dict[str, list[dict[str, Any]]]:
    rng = random.Random(4)
    words = lambda most: " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, most)))

    def asked(count: int, sizes: tuple[int, ...], label: Any) -> list[dict[str, Any]]:
        made = [{"question": words(6), "choices": [words(3) for _ in range(rng.choice(sizes))]} for _ in range(count)]
        return [row | {"label": label(i, len(row["choices"]))} for i, row in enumerate(made)]

    return {
        "choices": asked(7, (2, 3, 5), lambda i, k: k - 1 if i % 2 else rng.randrange(k)),
        "several": asked(4, (3, 4), lambda i, k: sorted(rng.sample(range(k), 1 + i % 2))),
        "two": asked(5, (3,), lambda i, k: rng.randrange(k)),
        "cloze": [{"start": words(5), "end": words(1)} for _ in range(6)],
        "text": [{"page": words(12).replace(" ", "_")} for _ in range(5)],
        "own": [
            row | {"idx": {"paragraph": 0, "question": i // 2}}
            for i, row in enumerate(asked(6, (2,), lambda i, k: i % 2))
        ],
    }


def answer(context: str, continuation: str) -> tuple[float, bool]:
    number = int(hashlib.sha256(f"{context}|{continuation}".encode()).hexdigest()[:8], 16)
    return -(number % 10_007) / 500, number % 3 == 0


class Oracle(LM):
    """An lm-eval model that knows no language."""

    def loglikelihood(self, requests):
        return [answer(*request.args) for request in requests]

    def loglikelihood_rolling(self, requests):
        return [answer("", request.args[0])[0] for request in requests]

    def generate_until(self, requests):
        raise AssertionError

    def get_model_info(self):
        return {"model_dtype": "float32", "model_revision": "main", "model_sha": "w"}


def place_of(folder: Path) -> tuple[Path, Path]:
    """(definitions, benchmarks)"""
    (folder / "tasks").mkdir()
    for name, text in DEFINITIONS.items():
        (folder / "tasks" / name).write_text(text)
    for name, rows in documents().items():
        for split in ("train", "validation"):
            path = folder / "benchmarks" / f"custom__{name}" / f"{split}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_pylist(rows if split == "validation" else rows[::-1]), path)
    return folder / "tasks", folder / "benchmarks"


def as_json(value: Any) -> Any:
    from lm_eval.utils import handle_non_serializable

    text = json.dumps(value, default=handle_non_serializable)
    return json.loads(re.sub(r" at 0x[0-9a-f]+", "", text))  # functions in the definitions of tasks


class Place:
    """Tasks, documents, what lm-eval makes of them with two shots and what is made of them here."""

    def __init__(self, folder: Path, limit: int | None = None):
        self.folder = folder
        definitions, self.benchmarks = place_of(folder)
        self.tokenizer = write_tokenizer(folder / "tokenizer", adds_bos=True)
        (folder / "suite.yaml").write_text(SUITE)

        def load_dataset(path: str, name: str | None = None, **options: Any) -> datasets.DatasetDict:
            files = (self.benchmarks / path.replace("/", "__")).glob("*.parquet")
            return datasets.DatasetDict(
                {f.stem: datasets.Dataset.from_list(pq.read_table(f).to_pylist()) for f in files}
            )

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(datasets, "load_dataset", load_dataset)
            patch.setenv("DISABLE_MULTIPROC", "1")
            manager = TaskManager(include_path=str(definitions), include_defaults=False)
            tracker = EvaluationTracker(output_path=str(folder / "theirs"))
            self.theirs: Any = lm_eval.simple_evaluate(  # type: ignore[call-arg]
                model=Oracle(), tasks=["outer", "several", "text", "own"], num_fewshot=2, task_manager=manager,
                evaluation_tracker=tracker, log_samples=True, limit=limit,
            )  # fmt: skip
            self.samples = self.theirs.pop("samples")
            logged = {name: [dict(line) for line in lines] for name, lines in self.samples.items()}
            tracker.save_results_aggregated(self.theirs, logged)
            for name, lines in logged.items():
                tracker.save_results_samples(name, lines)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tasks, "TASKS_FOLDER", definitions)
            out = folder / "scores" / "pack"
            self.made = prepare_pack(
                folder / "suite.yaml", self.tokenizer, out, benchmarks=self.benchmarks, limit=limit
            )
            texts = [*self.made.contexts["text"].to_pylist(), ""]
            rows = zip(self.made.request_context, self.made.requests["text"].to_pylist(), strict=True)
            both = [answer(texts[row], text) for row, text in rows]
            self.ll, self.greedy = np.array([ll for ll, _ in both]), np.array([greedy for _, greedy in both])
            self.values = tidy.of_tasks(self.made, self.ll, self.greedy)
            key = score_files.Key("w", self.made.hash, "float32", "auto", "oracle")
            header = score_files.Header("org/model", "main", 4, 5000, 64, key)
            score_files.write(folder / "scores", score_files.Scores(header, self.ll, self.greedy))
            [self.exported] = export.export(folder / "scores", folder / "out")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("whole"))


def rows_of(place: Place, table: str) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in getattr(place.made, table).to_pylist():
        found.setdefault(row["task"], []).append(row)
    return found


def test_every_request_is_lm_evals_with_its_description_delimiters_and_drawn_examples(place):
    contexts = place.made.contexts.to_pylist()
    requests = place.made.requests.to_pylist()
    assert [row["request"] for row in requests] == list(range(len(requests)))
    assert [row["context"] for row in contexts] == list(range(len(contexts)))
    texts = [row["text"] for row in contexts]
    assert len(set(texts)) == len(texts) and "" in texts
    used = [row["context"] for row in requests if row["context"] >= 0]
    assert list(dict.fromkeys(used)) == list(range(len(texts)))  # in the order in which they are asked
    by_task = rows_of(place, "requests")
    assert list(by_task) == LEAVES
    encode = AutoTokenizer.from_pretrained(place.tokenizer).encode
    for name, samples in place.samples.items():
        expected = [
            (sample["doc_id"], choice, *arguments)
            for sample in samples
            for choice, arguments in enumerate(sample["arguments"])
        ]
        found = [
            (row["doc"], row["choice"], *([texts[row["context"]]] if row["context"] >= 0 else []), row["text"])
            for row in by_task[name]
        ]
        assert found == expected, name
        assert all((row["context"] == -1) == (name == "text") for row in by_task[name])
        for row in by_task[name]:
            if name == "text":
                assert row["tokens"] == encode(row["text"])
            elif texts[row["context"]]:
                whole = encode(texts[row["context"]] + row["text"])
                assert contexts[row["context"]]["tokens"] + row["tokens"] == whole and row["tokens"]
    assert by_task["plain"][0]["text"].startswith(": ") and texts[0].startswith("Answer: which one?\n\nQ: ")
    assert texts[0].count("\n--\n") == 2


def test_every_column_of_a_document_is_what_lm_eval_knows_of_it(place):
    given, first = documents(), 0
    data = {name: given[DEFINITIONS[f"{name}.yaml"].split("custom/")[1].split()[0]] for name in LEAVES}
    tokens = {name: [len(row["tokens"]) for row in rows] for name, rows in rows_of(place, "requests").items()}
    found = rows_of(place, "documents")
    assert list(found) == LEAVES
    for name, rows in found.items():
        assert [row["doc"] for row in rows] == list(range(len(data[name])))
        start = 0
        for row, sample, doc in zip(rows, place.samples[name], data[name], strict=True):
            count = len(sample["arguments"])
            assert (row["first_request"], row["requests"]) == (first, count)
            choices = doc.get("choices") or [doc.get("end") or doc["page"].replace("_", " ")]
            label = doc.get("label", 0)
            assert row["gold"] == (label if isinstance(label, list) else [label])
            assert row["choice_chars"] == [len(text) for text in choices]
            assert row["choice_bytes"] == [len(text.encode()) for text in choices]
            assert row["choice_tokens"] == tokens[name][start : start + len(choices)]
            assert json.loads(row["content"]) == doc == sample["doc"]
            assert row["target"] == str(sample["target"])
            for hash_name in ("doc_hash", "prompt_hash", "target_hash"):
                assert row[hash_name] == sample[hash_name], (name, hash_name)
            counted = (sample["word_perplexity"][1], sample["byte_perplexity"][1]) if name == "text" else (0, 0)
            assert (row["words"], row["bytes"]) == counted
            first, start = first + count, start + count


def test_the_manifest_says_what_was_asked(place):
    manifest = unsealed((place.folder / "scores/pack/manifest.json").read_bytes())
    assert manifest == place.made.manifest
    rows, groups = {row.pop("task"): row for row in manifest.pop("tasks")}, manifest.pop("groups")
    assert manifest.pop("hash") == pack.content_hash(place.made)
    tokenizer = AutoTokenizer.from_pretrained(place.tokenizer)
    sha = manifest["tokenizer"].pop("tokenizer_hash")
    assert re.fullmatch("[0-9a-f]{64}", sha)
    assert manifest == {
        "format": pack.FORMAT, "suite": "whole", "mode": "lm-eval",
        "tokenizer": {"adds_bos": True, "size": len(tokenizer)},
        "bos": "auto", "prefix_token": tokenizer.bos_token_id, "max_context": None, "limit": None,
        "fewshot_seed": place.theirs["config"]["fewshot_seed"], "lm_eval": lm_eval.__version__,
        "counts": {"contexts": place.made.contexts.num_rows, "requests": place.made.requests.num_rows, "documents": 33},
    }  # fmt: skip
    counts = {"plain": 7, "several": 4, "cloze": 6, "mutual": 5, "text": 5, "own": 6}
    given = documents()
    several = [1 / len(row["choices"]) for row in given["several"]]
    guessed = {"plain": 0.125, "mutual": 0.125, "cloze": 0.125, "several": sum(several) / 4, "text": None, "own": 0.5}
    for name, row in rows.items():
        assert re.fullmatch("[0-9a-f]{64}", row.pop("config_sha256"))
        assert row.pop("documents") == counts[name]
        assert row.pop("requests") == sum(len(sample["arguments"]) for sample in place.samples[name])
        assert row.pop("chance") == (guessed[name] and pytest.approx(guessed[name], rel=1e-13)), name
        assert row.pop("version") == str(place.theirs["versions"][name]) == "1.5"
        assert row.pop("shots") == place.theirs["n-shot"][name] == (0 if name in ("text", "several") else 2)
        assert row.pop("lm_eval_metrics") == sorted(place.theirs["higher_is_better"][name])
    shared = {"output_type": "multiple_choice", "multiple_gold": False, "unconditional": False, "own_metrics": False}
    assert rows == {
        "plain": {"domain": "first", "metric": "acc"} | shared,
        "several": {"domain": "second", "metric": "margin"} | shared | {"multiple_gold": True},
        "cloze": {"domain": "first", "metric": "acc"} | shared | {"output_type": "loglikelihood"},
        "mutual": {"domain": "first", "metric": "acc"} | shared | {"unconditional": True},
        "text": {"domain": "other", "metric": "bits_per_byte"} | shared | {"output_type": "loglikelihood_rolling"},
        "own": {"domain": "third", "metric": "spread"} | shared | {"own_metrics": True},
    }
    assert len(set(several)) > 1
    weights = {"outer": {"acc": True}, "inner": {"acc": False, "acc_norm": True}}
    leaves = {"outer": ["plain", "mutual", "cloze"], "inner": ["plain", "mutual"]}
    assert {row["group"]: row for row in groups} == {
        name: {
            "group": name, "domain": "first", "metric": "acc", "chance": 0.125, "tasks": leaves[name],
            "weight_by_size": weights[name], "weight_others_by_size": True,
        }
        for name in leaves
    }  # fmt: skip


def test_every_number_of_tasks_and_groups_is_lm_evals(place):
    compared = 0
    for name, row in place.theirs["results"].items():
        for key, value in row.items():
            metric, _, kind = key.partition(",")
            if kind == "none" and not metric.endswith("_stderr"):
                found, stderr = place.values[name][metric], row[f"{metric}_stderr,none"]
                assert found.value == pytest.approx(value, rel=1e-12), (name, metric)
                assert found.n == row.get("sample_count", {}).get(key, row["sample_len"])
                if stderr != "N/A":
                    assert found.stderr == pytest.approx(stderr, rel=1e-10), (name, metric)
                compared += 1
    assert compared == 3 + 2 + 2 + 3 + 3 + 2 + 2 + 1


def latest(folder: Path, pattern: str) -> Path:
    [file] = folder.rglob(pattern)
    return file


def close(ours: Any, theirs: Any, where: str = "") -> None:
    """Equal keys in the same order, numbers to 1e-12, all else equal."""
    if isinstance(theirs, dict):
        assert list(ours) == list(theirs), where
        for key in theirs:
            close(ours[key], theirs[key], f"{where}/{key}")
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs), where
        for place, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            close(one, other, f"{where}/{place}")
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, rel=1e-10), where
    else:
        assert ours == theirs, where


ELSEWHERE = {
    "date", "git_hash", "total_evaluation_time_seconds", "start_time", "end_time", "model_source", "model_name",
    "model_name_sanitized", "fewshot_as_multiturn", "config",
}  # fmt: skip
"""Fields that tell where and by what it was run; tested one by one below."""


def test_every_field_of_the_exported_results_is_that_of_lm_evals_file(place):
    ours = as_json(json.loads(place.exported.read_text()))
    theirs = as_json(json.loads(latest(place.folder / "theirs", "results_*.json").read_text()))
    assert ours.pop("max_length") == 64  # of the header; their oracle has none
    assert set(ours) == set(theirs)
    assert ours["results"].keys() == theirs["results"].keys() == {*LEAVES, "outer", "inner"}
    for key in set(theirs) - ELSEWHERE:
        close(ours[key], theirs[key], key)
    assert set(theirs["groups"]) == {"outer", "inner"} and theirs["task_hashes"].keys() == set(LEAVES)
    for key in ("alias", "sample_len", "name"):
        assert theirs["results"]["plain"][key] == {"alias": "the plain one", "sample_len": 7, "name": "plain"}[key]


def test_the_exported_file_says_how_it_was_made(place):
    ours = json.loads(place.exported.read_text())
    theirs = as_json(json.loads(latest(place.folder / "theirs", "results_*.json").read_text()))
    told = ours["config"].pop("fineline")  # what analyze needs for the verdicts of the scores themselves
    assert told.keys() >= set(LEAVES) and told["cloze"] == {
        "domain": "first", "metric": "acc", "chance": pytest.approx(1 / 3), "chance_from": "always the same answer",
    }  # fmt: skip
    assert ours["config"] == theirs["config"] | {
        "model": "fineline", "model_args": {
            "pretrained": "org/model/main", "revision": "main", "dtype": "float32", "tokens": 5000,
        },
    }  # fmt: skip
    # by name, so that they stay lm-eval's if its defaults change
    assert [ours["config"][f"{name}_seed"] for name in ("random", "numpy", "torch", "fewshot")] == [0, 1234, 1234, 1234]
    assert ours["config"]["bootstrap_iters"] == 100_000
    file = place.folder / "scores/org__model/main.parquet"
    assert ours["date"] == file.stat().st_mtime and ours["git_hash"] is None
    assert (ours["model_source"], ours["model_name"]) == ("fineline", "org/model/main")
    assert place.exported.parent.name == ours["model_name_sanitized"] == "org__model__main"
    assert float(ours["total_evaluation_time_seconds"]) < 60
    assert place.exported.parent.parent == place.folder / "out"


@pytest.mark.parametrize(("tokens", "told"), [(5000, {"tokens": 5000}), (0, {"tokens": 0}), (None, {})])
def test_tokens_are_told_where_they_are_known_the_none_before_training_too(tokens, told):
    header = score_files.Header("run", "step0", 0, tokens, 64, score_files.Key("", "", "float32", "auto", ""))
    made = pack.Pack({"limit": None, "fewshot_seed": 1234}, *[pa.table({})] * 3)
    config = export._config(made, score_files.Scores(header, np.zeros(0), np.zeros(0, bool)))
    assert config["model_args"] == {"pretrained": "run/step0", "revision": "step0", "dtype": "float32"} | told


def test_the_export_resamples_as_often_as_it_says(place, tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "TASKS_FOLDER", place.folder / "tasks")
    process, counts = export.evaluation_results, []
    counted = lambda found, groups, iterations: counts.append(iterations) or process(found, groups, iterations)
    monkeypatch.setattr(export, "evaluation_results", counted)
    monkeypatch.setattr(export, "add_env_info", lambda environment: None)  # a second
    [path] = export.export(place.folder / "scores", tmp_path, samples=False)
    assert counts == [json.loads(path.read_text())["config"]["bootstrap_iters"]] == [100_000]
    with export._fast_bootstrap(place.made, [place.folder / "scores/org__model/main.parquet"]):
        pairs = [(1, 1), (0, 1), (1, 0), (0, 0), (1, 1)]
        for metric in (lm_eval.api.metrics.f1_score, lm_eval.api.metrics.matthews_corrcoef):
            kind = {"f1_score": bootstrap.of_f1, "matthews_corrcoef": bootstrap.of_mcc}[metric.__name__]
            assert lm_eval.api.metrics.bootstrap_stderr(metric, pairs, 300) == kind(np.array([pairs]), 300)[0]
        values = [-1.0, -2.5, -0.5]
        unseen = lm_eval.api.metrics.bootstrap_stderr(lm_eval.api.metrics.perplexity, values, 300)
        assert unseen == bootstrap.of_perplexity(np.array([values]), 300)[0]
        median = lm_eval.api.metrics.bootstrap_stderr(lm_eval.api.metrics.median, values, 50)
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    assert median == lm_eval.api.metrics.bootstrap_stderr(lm_eval.api.metrics.median, values, 50)


def test_every_line_of_the_exported_samples_is_that_of_lm_evals_file(place):
    for name in LEAVES:
        ours = latest(place.folder / "out", f"samples_{name}_*.jsonl").read_text().splitlines()
        theirs = latest(place.folder / "theirs", f"samples_{name}_*.jsonl").read_text().splitlines()
        assert len(ours) == len(theirs) == len(place.samples[name])
        for one, other in zip(ours, theirs, strict=True):
            close(json.loads(one), json.loads(other), name)


def test_without_samples_only_results_and_no_hashes_are_lost(place, monkeypatch):
    monkeypatch.setattr(export, "add_env_info", lambda environment: None)  # a second
    monkeypatch.setattr(tasks, "TASKS_FOLDER", place.folder / "tasks")
    [short] = export.export(place.folder / "scores", place.folder / "short", samples=False)
    assert [path.name for path in short.parent.iterdir()] == [short.name]
    ours, whole = (json.loads(path.read_text()) for path in (short, place.exported))
    assert (
        ours["task_hashes"] == whole["task_hashes"] and ours["results"] == whole["results"] and "samples" not in whole
    )


def test_a_limit_takes_the_first_documents_as_lm_evals(tmp_path):
    place = Place(tmp_path, limit=3)
    assert [row["documents"] for row in place.made.tasks] == [3] * 6 and place.made.manifest["limit"] == 3
    test_every_request_is_lm_evals_with_its_description_delimiters_and_drawn_examples(place)
    test_every_number_of_tasks_and_groups_is_lm_evals(place)
    ours, theirs = (json.loads(p.read_text()) for p in (place.exported, latest(tmp_path / "theirs", "results_*.json")))
    assert ours["config"]["limit"] == 3
    close(as_json(ours["results"]), as_json(theirs["results"]))
    # the pack does not know how many documents were left out
    assert {tuple(counts.values()) for counts in ours["n-samples"].values()} == {(3, 3)}


@pytest.fixture(scope="module")
def as_olmes(place) -> pack.Pack:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "TASKS_FOLDER", place.folder / "tasks")
        out, suite = place.folder / "olmes", place.folder / "suite.yaml"
        return prepare_pack(suite, place.tokenizer, out, benchmarks=place.benchmarks, mode="olmes")


def test_in_mode_olmes_the_delimiter_counts_and_groups_are_plain_means(place, as_olmes):
    assert as_olmes.contexts["text"].equals(place.made.contexts["text"])  # the prompts are lm-eval's
    texts = as_olmes.requests["text"].to_pylist()
    assert texts == place.made.requests["text"].to_pylist()
    encode = AutoTokenizer.from_pretrained(place.tokenizer).encode
    assert as_olmes.manifest["mode"] == "olmes" and as_olmes.manifest["max_context"] == 2048
    for row, plain in zip(as_olmes.documents.to_pylist(), place.made.documents.to_pylist(), strict=True):
        scored = texts[row["first_request"] : row["first_request"] + len(plain["choice_chars"])]
        assert row["choice_chars"] == [len(text) for text in scored]
        assert row["choice_bytes"] == [len(text.encode()) for text in scored]
        if row["task"] != "text":
            assert row["choice_tokens"] == [len(encode(text, add_special_tokens=False)) for text in scored]
    metric = {row["task"]: row["metric"] for row in as_olmes.tasks}
    assert metric == {
        "plain": "acc_per_char", "mutual": "acc_per_char", "cloze": "acc", "several": "margin",
        "text": "bits_per_byte", "own": "spread",
    }  # fmt: skip
    assert [(g["weight_by_size"], g["weight_others_by_size"]) for g in as_olmes.manifest["groups"]] == [({}, False)] * 2


def test_groups_of_tasks_whose_chance_differs_or_is_not_known(place, tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "TASKS_FOLDER", place.folder / "tasks")
    (tmp_path / "s.yaml").write_text("{name: s, tasks: [{task: outer, metric: acc_norm}]}")
    made = prepare_pack(tmp_path / "s.yaml", place.tokenizer, tmp_path / "p", benchmarks=place.benchmarks)
    chance = {row["task"]: row["chance"] for row in made.tasks}
    given = documents()
    plain = sum(1 / len(row["choices"]) for row in given["choices"]) / 7
    assert chance == {"plain": pytest.approx(plain), "mutual": pytest.approx(1 / 3), "cloze": None}
    groups = {row["group"]: row for row in made.manifest["groups"]}
    assert groups["inner"]["chance"] == pytest.approx((7 * plain + 5 / 3) / 12)  # as its accuracy, by documents
    assert groups["outer"]["chance"] is None  # what guessing a word gives is not known
    assert groups["outer"]["metric"] == groups["inner"]["metric"] == "acc_norm"
    assert {row["shots"] for row in made.tasks} == {0}


def test_scores_of_two_checkpoints_are_exported_each_with_its_own_perplexity_error(place, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "add_env_info", lambda environment: None)  # a second
    monkeypatch.setattr(tasks, "TASKS_FOLDER", place.folder / "tasks")
    score_files.keep_pack(tmp_path / "scores", place.made)
    for name, factor in (("a", 1.0), ("b", 0.5)):
        key = score_files.Key(f"w{name}", place.made.hash, "bfloat16", "auto", "oracle")
        header = score_files.Header("run", name, None, None, 32, key)
        score_files.write(tmp_path / "scores", score_files.Scores(header, place.ll * factor, place.greedy))
    for path, name, factor in zip(export.export(tmp_path / "scores", tmp_path / "out"), "ab", (1.0, 0.5), strict=True):
        ours = json.loads(path.read_text())
        expected = tidy.of_tasks(place.made, place.ll * factor, place.greedy)["cloze"]["perplexity"]
        assert ours["results"]["cloze"]["perplexity_stderr,none"] == pytest.approx(expected.stderr, rel=1e-12)
        assert ours["results"]["cloze"]["perplexity,none"] == pytest.approx(expected.value, rel=1e-13)
        config = ours["config"]
        assert config["model_args"] == {"pretrained": f"run/{name}", "revision": name, "dtype": "bfloat16"}
        assert (config["model_sha"], config["model_dtype"], ours["max_length"]) == (f"w{name}", "bfloat16", 32)


def prepared(place: Place, folder: Path, entries: str) -> pack.Pack:
    """A pack of other entries and scores of it."""
    (folder / "s.yaml").write_text(f"{{name: s, tasks: [{entries}]}}")
    made = prepare_pack(folder / "s.yaml", place.tokenizer, folder / "scores/pack", benchmarks=place.benchmarks)
    key = score_files.Key("w", made.hash, "float32", "auto", "oracle")
    count = made.requests.num_rows
    header = score_files.Header("run", "a", None, None, 32, key)
    score_files.write(folder / "scores", score_files.Scores(header, -1.0 - np.arange(count), np.zeros(count, bool)))
    return made


def test_tasks_that_generate_are_left_out_of_an_export_and_named(place, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(tasks, "TASKS_FOLDER", place.folder / "tasks")
    monkeypatch.setattr(export, "add_env_info", lambda environment: None)
    prepared(place, tmp_path, "speech, {task: plain, shots: 1}")
    [path] = export.export(tmp_path / "scores", tmp_path / "out")
    found = json.loads(path.read_text())
    assert found["results"].keys() == {"plain"} and not found["group_subtasks"] and found["n-shot"] == {"plain": 1}
    assert len(list(path.parent.iterdir())) == 2
    assert "not exported, since lm-eval generates text for them: said" in caplog.text
    (tmp_path / "alone").mkdir()
    prepared(place, tmp_path / "alone", "said")
    with pytest.raises(UserError, match="suite 's' has no task that lm-eval scores by log-likelihood"):
        export.export(tmp_path / "alone/scores", tmp_path / "out")


def test_an_lm_eval_with_other_groups_is_not_used(place, tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "TASKS_FOLDER", place.folder / "tasks")
    monkeypatch.setattr(export, "add_env_info", lambda environment: None)
    made = prepared(place, tmp_path, "inner, cloze")
    definition = place.folder / "tasks/inner.yaml"
    try:
        for members, message in (
            ("[plain]", f"groups the tasks of suite 's' differently; install lm-eval {lm_eval.__version__}"),
            ("[plain, mutual, own]", "the pack holds no documents of task 'own'"),
        ):
            definition.write_text(DEFINITIONS["inner.yaml"].replace("[plain, mutual]", members))
            with pytest.raises(UserError, match=message):
                export.export(tmp_path / "scores", tmp_path / "out", made)
    finally:
        definition.write_text(DEFINITIONS["inner.yaml"])


@pytest.mark.parametrize("left_out", ["results", "plain", "cloze", "empty", "short"])
def test_files_that_lm_eval_could_not_write_are_missed(left_out, place, tmp_path, monkeypatch):
    """It only logs what goes wrong; of a full disk a file is left that is empty or ends early."""
    monkeypatch.setattr(tasks, "TASKS_FOLDER", place.folder / "tasks")
    monkeypatch.setattr(export, "add_env_info", lambda environment: None)
    prepared(place, tmp_path, "plain, cloze")
    results, samples = EvaluationTracker.save_results_aggregated, EvaluationTracker.save_results_samples

    def save_samples(tracker, name, lines):
        if name != left_out:
            samples(tracker, name, lines)
        if left_out in ("empty", "short"):
            [file] = Path(tracker.output_path).rglob(f"samples_{name}*")
            os.truncate(file, {"empty": 0, "short": file.stat().st_size - 9}[left_out])

    def save_results(tracker, *args):
        results(tracker, *args)
        if left_out == "results":
            next(Path(tracker.output_path).rglob("results_*")).unlink()

    monkeypatch.setattr(EvaluationTracker, "save_results_samples", save_samples)
    monkeypatch.setattr(EvaluationTracker, "save_results_aggregated", save_results)
    for samples_too in (True, False) if left_out == "results" else (True,):
        with pytest.raises(UserError, match="lm-eval's writer has lost a part of it"):
            export.export(tmp_path / "scores", tmp_path / "out", samples=samples_too)
    assert not list((tmp_path / "out").glob("run*"))


def test_scores_that_are_not_of_the_pack_or_not_lm_evals_are_refused(place, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "add_env_info", lambda environment: None)  # a second
    monkeypatch.setattr(tasks, "TASKS_FOLDER", place.folder / "tasks")
    with pytest.raises(UserError, match="no scores here"):
        export.export(tmp_path, tmp_path / "out")
    score_files.keep_pack(tmp_path / "s", place.made)
    with pytest.raises(UserError, match="holds no scores yet"):
        export.export(tmp_path / "s", tmp_path / "out")
    header = score_files.Header("run", "a", None, None, 32, score_files.Key("w", "other", "float32", "auto", "oracle"))
    score_files.write(tmp_path / "s", score_files.Scores(header, place.ll, place.greedy))
    with pytest.raises(UserError, match="made with another request pack"):
        export.export(tmp_path / "s", tmp_path / "out")
    other = pack.Pack(place.made.manifest | {"mode": "olmes"}, *(getattr(place.made, name) for name in pack.SCHEMAS))
    with pytest.raises(UserError, match="scored in mode olmes, whose numbers are not lm-eval's"):
        export.export(tmp_path / "s", tmp_path / "out", other)
    assert not (tmp_path / "out").exists()
