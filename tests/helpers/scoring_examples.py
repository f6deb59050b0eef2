"""Small documents in the layout of --benchmarks, and a small tokenizer, for the tests of scoring."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from fineline_jax.checkpoints.series import Series
from fineline_jax.models.config import ModelConfig
from fineline_jax.scoring.engine.scorer import make_scorer
from fineline_jax.scoring.options import ScoreOptions
from fineline_jax.scoring.requests.pack import Pack, RequestTokens
from fineline_jax.scoring.series.compatibility import model_context
from fineline_jax.scoring.series.score_series import SeriesScorer

WORDS = ["", "the", "cat", "dog", "house", "under", "runs", "Fäden", "東京", "very", "and,", "then!", "ice", "two"]


def sentence(rng: random.Random, low: int = 1, high: int = 12) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(low, high))).strip() or "cat"


def write_benchmarks(folder: Path, documents: int = 24) -> Path:
    """Data sets of piqa, arc_easy, winogrande, lambada_openai, wikitext, truthfulqa and race, with random text."""
    rng = random.Random(7)

    def write(name: str, splits: str, row: Any) -> None:
        for split in splits.split():
            path = folder / name / f"{split}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_pylist([row(i) for i in range(documents)]), path)

    def text(low: int = 1, high: int = 12) -> str:
        return sentence(rng, low, high)

    def arc(i: int) -> dict[str, Any]:
        k = rng.choice([3, 4, 4, 5])
        labels = list("ABCDE"[:k])
        choices = {"text": [text(1, 5) for _ in labels], "label": labels}
        return {"id": str(i), "question": text(), "choices": choices, "answerKey": rng.choice(labels)}

    def truthful(i: int) -> dict[str, Any]:
        k = rng.randint(2, 5)
        labels = [1] + [rng.randint(0, 1) for _ in range(k - 2)] + [0]
        targets = {"choices": [text() for _ in range(k)], "labels": labels}
        return {"question": text(), "mc1_targets": targets, "mc2_targets": targets}

    write(
        "baber__piqa", "train validation",
        lambda i: {"goal": text(), "sol1": text(), "sol2": text() + " ", "label": rng.randint(0, 1)},
    )  # fmt: skip
    write("allenai__ai2_arc/ARC-Easy", "train validation test", arc)
    write(
        "allenai__winogrande/winogrande_xl", "train validation",
        lambda i: {
            "sentence": f"{text()} _ {text()}", "option1": text(1, 2), "option2": text(1, 2),
            "answer": rng.choice("12"),
        },
    )  # fmt: skip
    write("EleutherAI__lambada_openai", "test", lambda i: {"text": f"{text(5, 20)} {rng.choice(['cat', 'ice'])}"})
    write(
        "EleutherAI__wikitext_document_level/wikitext-2-raw-v1", "train validation test",
        lambda i: {"page": f" = {text()} = \n {text(20, 90)} @-@ {text()} \n"},
    )  # fmt: skip
    write("truthfulqa__truthful_qa/multiple_choice", "validation", truthful)
    return folder


OWN_TASK = """
task: tiny
dataset_path: json
dataset_kwargs: {data_files: {test: tiny.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def write_own_task(folder: Path) -> None:
    """The task `tiny` of lm-eval, FOLDER/tasks/tiny.yaml, of four documents; to be run in FOLDER."""
    (folder / "tasks").mkdir()
    (folder / "tasks/tiny.yaml").write_text(OWN_TASK)
    documents = [{"question": "the cat", "choices": [" runs", " house"], "gold": number % 2} for number in range(4)]
    (folder / "tiny.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))


def write_tokenizer(folder: Path, adds_bos: bool) -> Path:
    """A byte-level BPE of some hundred pieces with <s>, </s>."""
    rng = random.Random(3)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator([sentence(rng) for _ in range(500)], trainer)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    folder.mkdir(parents=True)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


def score_once(
    made: Pack | RequestTokens, config: ModelConfig, params: dict, mesh: Any, dtype: str = "float32", **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    """`make_scorer` for one set of parameters."""
    called = {"advance": options.pop("advance")} if "advance" in options else {}
    context = model_context(made, config) if isinstance(made, Pack) else None
    requests = made.request_tokens if isinstance(made, Pack) else made
    return make_scorer(requests, config, mesh, dtype, **{"context": context} | options)(params, **called)


def score_series(
    series: Series, made: Pack, out: Path, mesh: Any, options: ScoreOptions = ScoreOptions()
) -> list[Path]:
    """`SeriesScorer` of one series."""
    return SeriesScorer(made, out, mesh, options)([series])
