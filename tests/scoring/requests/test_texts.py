"""A folder of texts by domain as a group of tasks in bits per byte."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scoring_examples import write_tokenizer

from fineline_jax.errors import UserError
from fineline_jax.scoring.metrics import tidy
from fineline_jax.scoring.requests import build
from fineline_jax.scoring.requests.suite import open_suite
from fineline_jax.tokenizers.open import open_tokenizer

TEXTS = {"code": ["x = 1\n", "東京 = 2"], "web": ["the cat\n\nruns", "a dog"], "books": ["ice cream and two dogs\nran"]}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    folder = tmp_path / "paloma"
    (folder / "web").mkdir(parents=True)
    (folder / "code.jsonl").write_text("".join(json.dumps({"text": one, "id": 3}) + "\n" for one in TEXTS["code"]))
    for number, text in enumerate(TEXTS["web"]):
        (folder / f"web/{number}.txt").write_text(text)
    (folder / "books.txt").write_text(TEXTS["books"][0])
    (folder / ".hidden.txt").write_text("x")
    (folder / "README.md").write_text("x")
    write_tokenizer(tmp_path / "tokenizer", adds_bos=True)
    return folder


def test_each_domain_has_its_bits_per_byte_and_the_group_their_mean(place: Path) -> None:
    made = build.build(f"{place}/", place.parent / "tokenizer")
    assert [row["task"] for row in made.tasks] == ["paloma_books", "paloma_code", "paloma_web"]
    assert {row["domain"] for row in made.tasks} == {"language modelling"}
    assert {row["metric"] for row in [*made.tasks, *made.manifest["groups"]]} == {"bits_per_byte"}
    texts = [text for domain in ("books", "code", "web") for text in TEXTS[domain]]
    assert made.requests["text"].to_pylist() == texts
    tokenizer = open_tokenizer(place.parent / "tokenizer")
    assert made.requests["tokens"].to_pylist() == [tokenizer(text)["input_ids"] for text in texts]
    scored = -np.arange(1.0, 6.0)
    values = tidy.of_tasks(made, scored, np.zeros(5, bool))
    expected, start = {}, 0
    for domain in ("books", "code", "web"):
        sizes = [len(text.encode()) for text in TEXTS[domain]]
        expected[domain] = -scored[start : start + len(sizes)].sum() / sum(sizes) / math.log(2)
        start += len(sizes)
        assert values[f"paloma_{domain}"]["bits_per_byte"].value == pytest.approx(expected[domain], rel=1e-12)
    assert values["paloma"]["bits_per_byte"].value == pytest.approx(np.mean(list(expected.values())), rel=1e-12)
    assert build.build(f"{place}/", place.parent / "tokenizer").hash == made.hash


def test_a_suite_names_such_a_folder_beside_its_tasks(place: Path) -> None:
    file = place.parent / "mine.yaml"
    file.write_text("tasks: [{task: paloma/, domain: mine}, piqa]")
    found = open_suite(file)
    assert found.texts == (place,) and [spec.task for spec in found.tasks] == ["paloma", "piqa"]
    assert found.tasks[0].domain == "mine"


def test_what_is_no_folder_of_texts_is_refused(place: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (place / "web/x.jsonl").write_text('{"text": "x"}\n')
    tokenizer = place.parent / "tokenizer"
    for name, message in (("none/", "no such folder of texts"), ("empty/", "no texts; put"),
                          ("paloma/", "holds both .jsonl and .txt")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            build.build(f"{tmp_path}/{name}", tokenizer)
    (place / "web/x.jsonl").unlink()
    (place / "web.txt").write_text("x")
    with pytest.raises(UserError, match="domain 'web' is there twice"):
        build.build(f"{place}/", tokenizer)
