"""Documents from TFDS are those of the local folder; SentencePiece models give SentencePiece's ids."""

import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from scoring_examples import sentence, write_tokenizer
from suite_documents import write_documents

from fineline_jax import cli, prepare_pack
from fineline_jax.errors import UserError
from fineline_jax.scoring.engine import plan_table
from fineline_jax.scoring.requests import build, pack, tfds_source
from fineline_jax.tokenizers.open import open_tokenizer


def prepare_tfds(folder: Path, benchmarks: Path) -> None:
    """The data sets that are read from TFDS as it would store them (the features of tensorflow_datasets 4.9.10's
    builders), in the order of the parquet files."""
    import tensorflow_datasets as tfds

    features = tfds.features
    letters = features.ClassLabel(names=list("ABCDE"))

    def arc(row: dict) -> dict:
        """TFDS has letters where some of the originals have digits."""
        letter = lambda label: "ABCDE"["1234".index(label)] if label in "1234" else label
        labels = [letter(label) for label in row["choices"]["label"]]
        return row | {"choices": row["choices"] | {"label": labels}, "answerKey": letter(row["answerKey"])}

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
            arc,
        ),
        "ai2_arc/ARC-Challenge/1.0.0": (
            "allenai__ai2_arc/ARC-Challenge",
            {"id": features.Text(), "question": features.Text(), "answerKey": letters,
             "choices": features.Sequence({"text": features.Text(), "label": letters})},
            arc,
        ),
        "winogrande/1.1.0": (
            "allenai__winogrande/winogrande_xl",
            {"sentence": features.Text(), "option1": features.Text(), "option2": features.Text(),
             "label": features.ClassLabel(names=["1", "2"])},
            lambda row: {name: row[name] for name in ("sentence", "option1", "option2")} | {"label": row["answer"]},
        ),
        "openbookqa/0.1.0": (
            "allenai__openbookqa/main",
            {"question": {name: features.Text() for name in ("stem", *(f"choice_{letter}" for letter in "ABCD"))},
             "fact1": features.Text(), "humanScore": features.Scalar(np.float32),
             "clarity": features.Scalar(np.float32), "turkIdAnonymized": features.Text(),
             "answerKey": features.ClassLabel(names=list("ABCD"))},
            lambda row: {
                "question": {"stem": row["question_stem"]} | {
                    f"choice_{letter}": text for letter, text in zip("ABCD", row["choices"]["text"], strict=True)
                },
                "fact1": "", "humanScore": 1.0, "clarity": 1.0, "turkIdAnonymized": "",
                "answerKey": row["answerKey"].strip(),
            },
        ),
        "bool_q/1.0.0": (
            "aps__super_glue/boolq",
            {"question": features.Text(), "passage": features.Text(), "answer": np.bool_, "title": features.Text()},
            lambda row: {"question": row["question"], "passage": row["passage"], "answer": bool(row["label"]),
                         "title": ""},
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
        files = {path.stem: path for path in (benchmarks / source).glob("*.parquet")}
        # Of winogrande, TFDS has training sets of several sizes.
        named = {"train_xl" if place.startswith("winogrande") and s == "train" else s: f for s, f in files.items()}
        splits = {split: pq.read_table(path).to_pylist() for split, path in named.items()}
        writer.initialize_splits(list(splits))
        writer.add_examples({split: [row(example) for example in rows] for split, rows in splits.items()})
        writer.close_splits(list(splits))


def test_tfds_gives_the_requests_of_the_local_folder(tmp_path):
    splits = ("train", "validation", "test")
    data_sets = [
        ("baber/piqa", None, splits[:2]),
        ("allenai/ai2_arc", "ARC-Easy", splits),
        ("allenai/ai2_arc", "ARC-Challenge", splits),
        ("allenai/winogrande", "winogrande_xl", splits[:2]),
        ("allenai/openbookqa", "main", splits),
        ("aps/super_glue", "boolq", splits[:2]),
    ]
    benchmarks = write_documents(tmp_path / "benchmarks", data_sets)
    prepare_tfds(tmp_path / "tfds", benchmarks)
    tokenizer = write_tokenizer(tmp_path / "tokenizer", adds_bos=True)
    suite = "piqa@2,arc_easy@1,arc_challenge,winogrande@1,openbookqa@2,boolq@1"
    local = prepare_pack(suite, tokenizer, tmp_path / "a", benchmarks=benchmarks)
    tfds = prepare_pack(suite, tokenizer, tmp_path / "b", tfds=tmp_path / "tfds")
    assert {place[0] for place in tfds_source._MAPPED} == {name for name, _, _ in data_sets}
    assert tfds.requests.equals(local.requests) and tfds.contexts.equals(local.contexts)
    assert tfds.documents["gold"].equals(local.documents["gold"])
    with pytest.raises(UserError, match="is not read from TFDS"):
        prepare_pack("hellaswag", tokenizer, tmp_path / "b", tfds=tmp_path / "tfds")
    with pytest.raises(UserError, match="winogrande is not prepared there"):
        prepare_pack("winogrande", tokenizer, tmp_path / "b", tfds=tmp_path / "nowhere")


def test_examples_of_tfds_in_the_columns_of_the_hub():
    pairs = [{"text": b"x", "label": 0}, {"text": "y", "label": 4}]
    both = {"text": [b"x", "y"], "label": [0, 4]}
    for choices in (pairs, both):
        found = tfds_source._arc({"id": b"i", "question": b"q", "choices": choices, "answerKey": 4})
        expected = {"id": "i", "question": "q", "answerKey": "E", "choices": {"text": ["x", "y"], "label": ["A", "E"]}}
        assert found == expected
    row = {"sentence": b"s", "option1": b"1", "option2": b"2"}
    texts = {"sentence": "s", "option1": "1", "option2": "2"}
    for label, answer in ((0, "1"), (1, "2"), (-1, "")):  # of the test split nobody knows
        assert tfds_source._winogrande(row | {"label": label}) == texts | {"answer": answer}
    piqa = {"goal": "é".encode(), "sol1": "b", "sol2": "c", "label": np.int64(1), "id": "x"}
    assert tfds_source._piqa(piqa) == {"goal": "é", "sol1": "b", "sol2": "c", "label": 1}
    boolq = {"passage": b"p", "question": b"q", "answer": np.True_, "title": b"t"}
    assert tfds_source._boolq(boolq) == {"passage": "p", "question": "q", "label": 1}
    stem = {"stem": b"s"} | {f"choice_{letter}": letter.lower() for letter in "ABCD"}
    choices = {"text": ["a", "b", "c", "d"], "label": ["A", "B", "C", "D"]}
    found = tfds_source._openbookqa({"question": stem, "answerKey": 3})
    assert found == {"question_stem": "s", "choices": choices, "answerKey": "D"}


def test_the_commands_of_packs_hand_their_options_on(monkeypatch, capsys):
    given = []

    def prepare(suite, tokenizer, out, options):
        given.append({"suite": suite, "tokenizer": tokenizer, "out": out, **vars(options)})
        return SimpleNamespace(requests=range_of(12_345), manifest={"tasks": [1, 2]})

    range_of = lambda rows: SimpleNamespace(num_rows=rows)
    monkeypatch.setattr(build, "prepare", prepare)
    options = {
        "suite": "core", "tokenizer": Path("t"), "out": Path("o"), "benchmarks": Path("b"), "tfds": Path("d"),
        "bos": "never", "max_context": 7, "limit": 3, "mode": "olmes", "include_path": Path("i"), "shots": 5,
        "fewshot_seed": 6, "pick": Path("p"), "chat_template": "multi-turn", "system_instruction": "Be brief.",
    }  # fmt: skip
    command = ["tasks", "prepare"]
    for name, value in options.items():
        command += [str(value)] if name == "suite" else [f"--{name.replace('_', '-')}", str(value)]
    assert cli.main(command) == 0 and given == [options]
    assert capsys.readouterr().out == "o: 12,345 requests of 2 tasks\n"
    planned = []
    monkeypatch.setattr(pack, "load", lambda path: planned.append(path) or "the pack")
    monkeypatch.setattr(
        plan_table, "plan_table", lambda *args: planned.append(args) or [["line"] * len(plan_table.HEADER)]
    )
    assert cli.main(["tasks", "plan", "p"]) == 0
    assert cli.main(["tasks", "plan", "p", "--context", "1", "--row-length", "5"]) == 0
    assert planned == [Path("p"), ("the pack", 2048, 8192), Path("p"), ("the pack", 1, 5)]
    assert capsys.readouterr().out.count("line") == 2 * len(plan_table.HEADER)


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
