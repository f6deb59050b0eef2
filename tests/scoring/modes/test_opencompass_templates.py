"""OpenCompass's own prompt templates of three tasks as task files of one's own, in mode opencompass-ppl.

Templates: open-compass/opencompass, configs/datasets, piqa_ppl_1cf9f0, ARC_e_ppl_a450bd, winogrande_ppl_55a66e; without
a meta template its parts are joined by a line break (`models/base.py`). The oracle is the model of transformers in
float64, and `_get_ppl` of `models/huggingface.py`: loss of all tokens but the first / number of all tokens.
"""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from series_examples import one_device

from fineline_jax.checkpoints import load
from fineline_jax.checkpoints.open import open_series
from fineline_jax.scoring.metrics import tidy
from fineline_jax.scoring.options import PackOptions
from fineline_jax.scoring.requests import build
from fineline_jax.scoring.series import score_series as series_loop

LIMIT = 12
TASKS = {
    "piqa": ("baber/piqa", None, "validation", "label"),
    "arc_e": ("allenai/ai2_arc", "ARC-Easy", "test", "{{'ABCD'.index(answerKey)}}"),
    "winogrande": ("allenai/winogrande", "winogrande_xl", "validation", "{{answer | int - 1}}"),
}
TEMPLATES = {
    "piqa": lambda doc: [f"The following makes sense: \nQ: {doc['goal']}\nA: {doc[sol]}\n" for sol in ("sol1", "sol2")],
    "arc_e": lambda doc: [f"Question: {doc['question']}\nAnswer: \n{text}" for text in doc["choices"]["text"]],
    "winogrande": lambda doc: [
        f"Good sentence: {doc['sentence'].replace('_', doc[option])}" for option in ("option1", "option2")
    ],
}
FUNCTIONS = """
def piqa(doc):
    return ["The following makes sense: \\nQ: " + doc["goal"] + "\\nA: " + doc[sol] + "\\n" for sol in ("sol1", "sol2")]
def arc_e(doc):
    return ["Question: " + doc["question"] + "\\nAnswer: \\n" + text for text in doc["choices"]["text"]]
def winogrande(doc):
    return ["Good sentence: " + doc["sentence"].replace("_", doc[option]) for option in ("option1", "option2")]
"""


def task_file(name: str) -> str:
    data, config, split, target = TASKS[name]
    return (
        f"task: oc_{name}\ndataset_path: {data}\ndataset_name: {config or 'null'}\nvalidation_split: {split}\n"
        f'output_type: multiple_choice\ndoc_to_text: ""\ntarget_delimiter: ""\ndoc_to_target: "{target}"\n'
        f"doc_to_choice: !function templates.{name}\nmetric_list: [{{metric: acc}}]\n"
    )


@pytest.mark.slow
def test_opencompass_templates_give_its_numbers(tmp_path: Path, shared_data: Path) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    folder, benchmarks = shared_data / "models/tinystories-260k", shared_data / "benchmarks"
    (tmp_path / "templates.py").write_text(FUNCTIONS)
    for name in TASKS:
        (tmp_path / f"{name}.yaml").write_text(task_file(name))
    files = ",".join(str(tmp_path / f"{name}.yaml") for name in TASKS)
    options = PackOptions(benchmarks=benchmarks, limit=LIMIT, mode="opencompass-ppl")
    made = build.build(files, folder, options)
    [path] = series_loop.SeriesScorer(made, tmp_path / "out", one_device())([open_series(str(folder))])
    found = series_loop.score_files.read(path)
    values = tidy.of_tasks(made, found.loglikelihood, found.is_greedy)

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    assert load.tokenizer_folder(open_series(str(folder)).checkpoints[0]) == folder
    for name, (data, config, split, _) in TASKS.items():
        file = benchmarks / data.replace("/", "__") / (config or "") / f"{split}.parquet"
        right, entropy = [], []
        for doc in pq.read_table(file).slice(0, LIMIT).to_pylist():
            losses = []
            for text in TEMPLATES[name](doc):
                ids = torch.tensor([tokenizer(text)["input_ids"]])
                with torch.no_grad():
                    logits = model(ids).logits
                loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum")
                losses.append(float(loss) / ids.shape[1])
            gold = {"piqa": lambda d: d["label"], "arc_e": lambda d: d["choices"]["label"].index(d["answerKey"]),
                    "winogrande": lambda d: int(d["answer"]) - 1}[name](doc)  # fmt: skip
            right.append(np.argmin(losses) == gold)
            entropy.append(losses[gold])
        task = values[f"oc_{name}"]
        assert task["acc_ppl"].value == np.mean(right), name
        assert task["cross_entropy"].value == pytest.approx(np.mean(entropy), rel=1e-5), name
