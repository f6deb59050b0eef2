"""Documents of lm-eval's tasks from data sets that TFDS prepared as ArrayRecord, without TensorFlow.

Only data sets whose TFDS builder keeps every column that the task reads are listed. (HellaSwag is not: TFDS joins ctx_a
and ctx_b, and lm-eval capitalises the second.) Builders: tensorflow_datasets 4.9.10, `datasets/<name>` and
`text/winogrande.py`. TFDS stores examples in an order of its own, so zero-shot numbers are those of the hub's copy, but
other few-shot examples are drawn.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import tensorflow_datasets as tfds

from fineline_jax.errors import UserError
from fineline_jax.scoring.requests.tasks import LoadDataset, Splits

Example = dict[str, Any]
_LETTERS = "ABCDE"


@dataclasses.dataclass(frozen=True)
class _Mapped:
    builder: str
    """Name and config in TFDS."""
    row: Callable[[Example], Example]
    """An example as TFDS decodes it -> the columns of the hub's copy."""
    splits: tuple[tuple[str, str], ...] = (("train", "train"), ("validation", "validation"), ("test", "test"))
    """(split of the hub, split of TFDS); those that TFDS lacks are left out."""


def from_tfds(data_dir: Path) -> LoadDataset:
    """A `datasets.load_dataset` over the TFDS folder `data_dir` (DATA_DIR/piqa/1.0.0/…).

    Raises UserError for a data set that is not mapped or not prepared there.
    """

    def load_dataset(path: str, name: str | None = None, split: str | None = None, **options: Any) -> Any:
        del options
        mapped = _MAPPED.get((path, name))
        if mapped is None:
            known = ", ".join(sorted({one.builder for one in _MAPPED.values()}))
            raise UserError(
                f"--tfds: data set {path!r} (config {name!r}) is not read from TFDS; use --benchmarks (known: {known})"
            )
        try:
            builder: Any = tfds.builder(mapped.builder, data_dir=str(data_dir), file_format="array_record")
            present = list(builder.info.splits)
        except tfds.core.DatasetNotFoundError:
            present = []
        if not present:
            raise UserError(
                f"--tfds {data_dir}: {mapped.builder} is not prepared there; run `tfds build"
                f" {mapped.builder.partition('/')[0]} --file_format=array_record --data_dir={data_dir}`"
            )
        splits = Splits(
            {
                of_hub: datasets.Dataset.from_list(list(map(mapped.row, builder.as_data_source(of_tfds))))
                for of_hub, of_tfds in mapped.splits
                if of_tfds in present
            }
        )
        splits.folder = Path(str(builder.data_dir))
        return splits if split is None else splits[split]

    return load_dataset


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _piqa(example: Example) -> Example:
    return {name: _text(example[name]) for name in ("goal", "sol1", "sol2")} | {"label": int(example["label"])}


def _arc(example: Example) -> Example:
    choices = example["choices"]
    if isinstance(choices, dict):
        pairs = list(zip(choices["text"], choices["label"], strict=True))
    else:
        pairs = [(choice["text"], choice["label"]) for choice in choices]
    return {
        "id": _text(example["id"]),
        "question": _text(example["question"]),
        "choices": {"text": [_text(text) for text, _ in pairs], "label": [_LETTERS[int(label)] for _, label in pairs]},
        "answerKey": _LETTERS[int(example["answerKey"])],
    }


def _winogrande(example: Example) -> Example:
    label = int(example["label"])
    row = {name: _text(example[name]) for name in ("sentence", "option1", "option2")}
    return row | {"answer": str(label + 1) if label >= 0 else ""}


def _openbookqa(example: Example) -> Example:
    question = example["question"]
    return {
        "question_stem": _text(question["stem"]),
        "choices": {"text": [_text(question[f"choice_{letter}"]) for letter in "ABCD"], "label": list("ABCD")},
        "answerKey": _LETTERS[int(example["answerKey"])],
    }


def _boolq(example: Example) -> Example:
    return {
        "passage": _text(example["passage"]),
        "question": _text(example["question"]),
        "label": int(example["answer"]),
    }


_MAPPED = {
    ("baber/piqa", None): _Mapped("piqa", _piqa),
    ("allenai/ai2_arc", "ARC-Easy"): _Mapped("ai2_arc/ARC-Easy", _arc),
    ("allenai/ai2_arc", "ARC-Challenge"): _Mapped("ai2_arc/ARC-Challenge", _arc),
    ("allenai/winogrande", "winogrande_xl"): _Mapped(
        "winogrande", _winogrande, (("train", "train_xl"), ("validation", "validation"), ("test", "test"))
    ),
    ("allenai/openbookqa", "main"): _Mapped("openbookqa", _openbookqa),
    ("aps/super_glue", "boolq"): _Mapped("bool_q", _boolq),
}
