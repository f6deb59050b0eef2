"""Metrics computed from stored log-likelihoods are lm-eval's own, to the last digit."""

import hashlib
import math
import random
from pathlib import Path

import lm_eval
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lm_eval.api.model import LM
from metric_examples import docs, packed
from metric_examples import task as task_row
from scoring_examples import sentence, write_benchmarks, write_tokenizer

from fineline_jax import prepare_pack
from fineline_jax.analysis import analyze_scores
from fineline_jax.errors import UserError
from fineline_jax.scoring import score_files
from fineline_jax.scoring.metrics import tidy
from fineline_jax.scoring.requests import pack, suite, tasks
from fineline_jax.trajectories.readers.options import ReadOptions
from fineline_jax.trajectories.report import html_page

SUITE = "piqa@3,arc_easy@2,winogrande,lambada_openai,wikitext,truthfulqa_mc1,truthfulqa_mc2"


def answer(context: str, continuation: str) -> tuple[float, bool]:
    """A log-likelihood drawn from the text of a request."""
    rng = random.Random(hashlib.sha256(f"{context}\0{continuation}".encode()).digest())
    return -rng.expovariate(1.0), rng.random() < 0.3


class Oracle(LM):
    """An lm-eval model that knows no language."""

    def loglikelihood(self, requests):
        return [answer(*request.args) for request in requests]

    def loglikelihood_rolling(self, requests):
        return [answer("", request.args[0])[0] for request in requests]

    def generate_until(self, requests):
        raise AssertionError("nothing generates")


def answers(made: pack.Pack) -> tuple[np.ndarray, np.ndarray]:
    texts = made.contexts["text"].to_pylist()
    rows = zip(made.request_context, made.requests["text"].to_pylist(), strict=True)
    pairs = [answer(texts[row] if row >= 0 else "", text) for row, text in rows]
    return np.array([ll for ll, _ in pairs]), np.array([greedy for _, greedy in pairs])


def lm_eval_results(names: str, source: tasks.LoadDataset, iterations: int = 100) -> dict:
    loaded, _ = tasks.load_tasks(suite.open_suite(names), source)
    assert loaded
    definitions = {task.name: task.definition for task in loaded}
    return lm_eval.evaluate(Oracle(), {"tasks": definitions}, bootstrap_iters=iterations, log_samples=False)["results"]


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_benchmarks(tmp_path_factory.mktemp("benchmarks"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizers") / "bpe", adds_bos=True)


@pytest.fixture(scope="module")
def made(benchmarks: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> pack.Pack:
    return prepare_pack(SUITE, tokenizer, tmp_path_factory.mktemp("packs") / "p", benchmarks=benchmarks)


def test_every_metric_of_lm_eval_is_reproduced_exactly(made, benchmarks, monkeypatch):
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    ours = tidy.of_tasks(made, *answers(made))
    theirs = lm_eval_results(SUITE, tasks.local_folder(benchmarks), iterations=100_000)
    compared = 0
    for task, values in theirs.items():
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if kind != "none" or metric.endswith("_stderr"):
                continue
            assert ours[task][metric].value == pytest.approx(value, rel=1e-12), (task, metric)
            stderr = values[f"{metric}_stderr,none"]
            if metric.startswith("acc"):
                assert ours[task][metric].value == value
                assert ours[task][metric].stderr == stderr
            elif metric == "perplexity":  # lm-eval bootstraps
                assert ours[task][metric].stderr == pytest.approx(stderr, rel=1e-10)
            compared += 1
    assert compared >= 12


def test_groups_are_weighted_by_size_with_pooled_standard_error(made):
    from lm_eval.api.metrics import aggregate_subtask_metrics, pooled_sample_stderr

    leaves = ["piqa", "arc_easy"]
    group = {
        "group": "g",
        "domain": "d",
        "metric": "acc",
        "chance": 0.3,
        "tasks": leaves,
        "weight_by_size": {"acc": True},
        "weight_others_by_size": True,
    }
    grouped = pack.Pack({**made.manifest, "groups": [group]}, made.contexts, made.requests, made.documents)
    values = tidy.of_tasks(grouped, *answers(made))
    parts = [values[name]["acc"] for name in leaves]
    sizes = [part.n for part in parts]
    assert values["g"]["acc"].value == aggregate_subtask_metrics([part.value for part in parts], sizes)
    assert values["g"]["acc"].stderr == pytest.approx(
        pooled_sample_stderr([part.stderr for part in parts], sizes), rel=1e-14
    )


CUSTOM = """
dataset_path: custom/{data}
validation_split: validation
output_type: multiple_choice
doc_to_text: "Q: {{{{question}}}}\\nA:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
target_delimiter: " "
metric_list:
"""
"""A task of multiple choice with these metrics; no task of lm-eval has all of them."""


@pytest.fixture
def custom(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[pack.Pack, Path]:
    """Tasks `custom_two` and `custom_three` (choices), and their documents."""
    rng = random.Random(11)
    definitions, documents = tmp_path / "tasks", tmp_path / "documents"
    definitions.mkdir()
    metrics_of = {
        "two": "acc acc_norm acc_bytes acc_mutual_info exact_match brier_score f1 mcc",
        "three": "acc acc_bytes acc_mutual_info exact_match brier_score mcc",
    }
    for k, (name, listed) in enumerate(metrics_of.items(), start=2):
        text = CUSTOM.format(data=name) + "".join(f"  - metric: {metric}\n" for metric in listed.split())
        (definitions / f"{name}.yaml").write_text(f"task: custom_{name}\n{text}metadata: {{version: 1}}\n")
        rows = [
            {
                "question": sentence(rng),
                "choices": [sentence(rng, 1, 4) + " " * (i % 2) for i in range(k)],
                "label": rng.randrange(k),
            }
            for _ in range(40)
        ]
        folder = documents / f"custom__{name}"
        folder.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows), folder / "validation.parquet")
    monkeypatch.setattr(tasks, "TASKS_FOLDER", definitions)
    made = prepare_pack("custom_two,custom_three", tokenizer, tmp_path / "p", benchmarks=documents)
    return made, documents


def test_mutual_information_and_every_other_metric_of_choices_is_lm_evals(custom, monkeypatch):
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    made, documents = custom
    # each choice is scored without its question too
    assert made.requests.num_rows == 40 * 2 * (2 + 3)
    contexts = made.contexts["text"].to_pylist()
    assert contexts.count("") == 1
    ours = tidy.of_tasks(made, *answers(made))
    theirs = lm_eval_results("custom_two,custom_three", tasks.local_folder(documents))
    compared = set()
    for task, values in theirs.items():
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if kind != "none" or metric.endswith("_stderr"):
                continue
            assert ours[task][metric].value == pytest.approx(value, rel=1e-12), (task, metric)
            stderr = values[f"{metric}_stderr,none"]
            if metric in ("f1", "mcc"):  # of 100,000 resamples and of 100
                assert ours[task][metric].stderr == pytest.approx(stderr, rel=0.3)
            elif stderr != "N/A":
                assert ours[task][metric].stderr == pytest.approx(stderr, rel=1e-12)
            compared.add(metric)
    assert compared == {"acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match", "brier_score", "f1", "mcc"}
    assert ours["custom_two"]["acc_mutual_info"].value != ours["custom_two"]["acc"].value


def test_documents_average_to_the_metrics_of_their_task(made):
    each = tidy.of_documents(made, *answers(made))
    values = tidy.of_tasks(made, *answers(made))
    means = each.groupby(["task", "metric"])["value"].agg(["mean", "size"])
    for task, found in values.items():
        for metric, value in found.items():
            if metric in ("perplexity", "word_perplexity", "byte_perplexity") or (task, metric) == (
                "wikitext", "bits_per_byte",
            ):  # fmt: skip
                continue  # ratios of sums over documents
            assert means.loc[(task, metric), "mean"] == pytest.approx(value.value, rel=1e-12), (task, metric)
            assert means.loc[(task, metric), "size"] == value.n
    assert {"truthfulqa_mc2", "wikitext", "lambada_openai"} <= set(each["task"])


def test_a_group_counts_a_metric_where_its_tasks_have_it(made):
    """agieval_en holds a task that generates: it has bits per byte and no accuracy."""
    group = {
        "group": "g", "domain": "d", "metric": "acc", "chance": None, "tasks": ["piqa", "wikitext"],
        "weight_by_size": {}, "weight_others_by_size": True,
    }  # fmt: skip
    grouped = pack.Pack({**made.manifest, "groups": [group]}, made.contexts, made.requests, made.documents)
    values = tidy.of_tasks(grouped, *answers(made))
    assert values["g"]["acc"] == values["piqa"]["acc"]
    assert values["g"]["bits_per_byte"].n == values["piqa"]["acc"].n + values["wikitext"]["bits_per_byte"].n
    assert "word_perplexity" not in values["g"]


def test_smooth_metrics_of_one_document(made):
    ll, greedy = answers(made)
    document = made.documents.slice(0, 1).to_pylist()[0]
    right, wrong = ll[document["gold"][0]], ll[1 - document["gold"][0]]
    one = pack.Pack(
        {**made.manifest, "tasks": [{**made.tasks[0], "documents": 1}]}, made.contexts, made.requests, made.documents
    )
    values = tidy.of_tasks(one, ll, greedy)["piqa"]
    assert values["margin"].value == pytest.approx(right - wrong)
    assert values["choice_prob"].value == pytest.approx(1 / (1 + math.exp(wrong - right)))
    size = document["choice_bytes"][document["gold"][0]]
    assert values["bits_per_byte"].value == pytest.approx(-right / size / math.log(2))


def test_tidy_has_one_row_per_checkpoint_task_and_metric(made, tmp_path):
    ll, greedy = answers(made)
    score_files.keep_pack(tmp_path, made)
    for step, factor in ((20, 0.5), (3, 1.0)):
        key = score_files.Key("w", made.hash, "float32", "auto", "test")
        header = score_files.Header("org/run", f"step_{step}", step, step * 100, 64, key)
        score_files.write(tmp_path, score_files.Scores(header, ll * factor, greedy))
    table = tidy.tidy(tmp_path)
    assert tuple(table.columns) == tidy.COLUMNS
    assert not table.duplicated(["series", "checkpoint", "task", "metric"]).any()
    assert table["tokens"].drop_duplicates().tolist() == [300, 2000]
    assert set(table["task"]) == set(name.partition("@")[0] for name in SUITE.split(","))
    piqa = table[(table.task == "piqa") & (table.tokens == 300)].set_index("metric")
    assert piqa.loc["acc", "chance"] == 0.5 and math.isnan(piqa.loc["bits_per_byte", "chance"])
    assert np.isfinite(table["value"]).all()
    [entry] = [task for task in made.tasks if task["task"] == "piqa"]
    assert entry["metric"] == "acc_norm"


def test_scores_of_another_pack_are_refused(made, tmp_path):
    ll, greedy = answers(made)
    score_files.keep_pack(tmp_path, made)
    header = score_files.Header("s", "c", None, None, 64, score_files.Key("w", "other", "float32", "auto", "test"))
    score_files.write(tmp_path, score_files.Scores(header, ll, greedy))
    with pytest.raises(UserError, match="another request pack"):
        tidy.tidy(tmp_path)
    with pytest.raises(UserError, match=r"not a request pack|no scores here"):
        tidy.tidy(tmp_path / "nowhere")


def test_a_checkpoint_of_unknown_tokens_is_no_point_of_a_curve_and_that_is_said(made, tmp_path, caplog, monkeypatch):
    drawn = []
    monkeypatch.setattr(html_page, "write_report", lambda table, out, **options: drawn.append(table))
    made = packed([(task_row("t"), docs(3))])
    ll, greedy = np.zeros(made.requests.num_rows), np.zeros(made.requests.num_rows, bool)
    folder = tmp_path / "scores"
    score_files.keep_pack(folder, made)
    key = score_files.Key("w", made.hash, "float32", "auto", "test")

    def scored(name: str, step: int | None, tokens: int | None) -> None:
        score_files.write(
            folder, score_files.Scores(score_files.Header("run", name, step, tokens, 64, key), ll, greedy)
        )

    def analyzed(**options) -> set[float]:
        analyze_scores([folder], tmp_path / "report", title="t", reading=ReadOptions(**options))
        return set(drawn[-1]["tokens"])

    scored("main", None, None)
    with pytest.raises(UserError, match=r"scores: no checkpoint has .*no curve; write their .*export-scores"):
        analyzed(tokens_per_step=100)
    scored("step_5", 5, None)
    with pytest.raises(UserError, match=r"no curve; give --tokens-per-step, or write"):
        analyzed()
    assert not drawn
    assert analyzed(tokens_per_step=100) == {500}
    assert "left out, the number of training tokens is not known: run main" in caplog.text
    scored("step_7", 7, 900)
    caplog.clear()
    assert analyzed() == {900}
    assert "is not known; --tokens-per-step gives them: run step_5, run main" in caplog.text
    assert analyzed(tokens_per_step=100) == {500, 900}  # what is known stays
