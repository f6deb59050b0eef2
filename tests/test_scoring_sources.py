"""Documents from TFDS are those of the local folder; SentencePiece models give SentencePiece's ids."""

import random
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from scoring_examples import sentence, write_benchmarks, write_tokenizer

from fineline_jax.errors import UserError
from fineline_jax.scoring import pack
from fineline_jax.scoring.tokenizer import open_tokenizer


def prepare_tfds(folder: Path, benchmarks: Path) -> None:
    """piqa and ai2_arc/ARC-Easy as TFDS would store them, in the order of the parquet files."""
    import tensorflow_datasets as tfds

    features = tfds.features
    letters = features.ClassLabel(names=list("ABCDE"))
    kinds = {
        "piqa/1.0.0": (
            "baber__piqa",
            {"id": features.Text(), "goal": features.Text(), "sol1": features.Text(), "sol2": features.Text(),
             "label": features.ClassLabel(num_classes=2)},
            lambda row: row | {"id": "x"},
        ),
        "ai2_arc/ARC-Easy/1.0.0": (
            "allenai__ai2_arc/ARC-Easy",
            {"id": features.Text(), "question": features.Text(), "answerKey": letters,
             "choices": features.Sequence({"text": features.Text(), "label": letters})},
            lambda row: row,
        ),
    }  # fmt: skip
    for place, (source, columns, row) in kinds.items():
        name, *config, version = place.split("/")
        identity = tfds.core.utils.Version(version)
        info = tfds.core.DatasetInfo(
            builder=tfds.core.dataset_info.DatasetIdentity(
                name=name, version=identity, data_dir=str(folder / place), module_name="",
                config_name=config[0] if config else None,
            ),
            features=features.FeaturesDict(columns), disable_shuffling=True,
        )  # fmt: skip
        (folder / place).mkdir(parents=True)
        writer = tfds.core.SequentialWriter(info, 100, file_format="array_record")
        splits = {path.stem: pq.read_table(path).to_pylist() for path in (benchmarks / source).glob("*.parquet")}
        writer.initialize_splits(list(splits))
        writer.add_examples({split: [row(example) for example in rows] for split, rows in splits.items()})
        writer.close_splits(list(splits))


def test_tfds_gives_the_requests_of_the_local_folder(tmp_path):
    benchmarks = write_benchmarks(tmp_path / "benchmarks", documents=6)
    prepare_tfds(tmp_path / "tfds", benchmarks)
    tokenizer = write_tokenizer(tmp_path / "tokenizer", adds_bos=True)
    local = pack.prepare("piqa@2,arc_easy@1", tokenizer, tmp_path / "a", benchmarks=benchmarks)
    tfds = pack.prepare("piqa@2,arc_easy@1", tokenizer, tmp_path / "b", tfds=tmp_path / "tfds")
    assert tfds.requests.equals(local.requests) and tfds.contexts.equals(local.contexts)
    with pytest.raises(UserError, match="is not read from TFDS"):
        pack.prepare("hellaswag", tokenizer, tmp_path / "b", tfds=tmp_path / "tfds")
    with pytest.raises(UserError, match="winogrande is not prepared there"):
        pack.prepare("winogrande", tokenizer, tmp_path / "b", tfds=tmp_path / "tfds")


def test_a_bare_sentencepiece_model_gives_its_own_ids(shared_data):
    import sentencepiece

    folder = shared_data / "tokenizers/llama"
    model = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
    tokenizer = open_tokenizer(folder)
    rng = random.Random(1)
    seams = ["", " ", "  ", "\n", "\n\n   ", " \t "]
    texts = [rng.choice(seams) + sentence(rng) + rng.choice(seams) + sentence(rng) for _ in range(300)]
    texts += (shared_data / "text/tinyshakespeare.txt").read_text().split("\n\n")[:500]
    for text in texts:
        assert tokenizer.encode(text, add_special_tokens=False) == model.encode(text), text
    assert np.array_equal(tokenizer.encode("Hello world"), [1, 15043, 3186])
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
