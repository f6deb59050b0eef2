"""A single flipped bit in what we store: it is refused, or it changes nothing that is read. Never other numbers."""

import dataclasses
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_examples import amber
from hypothesis import given
from hypothesis import strategies as st
from metric_examples import docs, packed, task

from fineline_jax.atomic_files import sealed, unsealed
from fineline_jax.checkpoints.runs.digest_record import damage, read_record, write_record
from fineline_jax.data.corpora import prepare_amber
from fineline_jax.data.storage import open_data_set
from fineline_jax.errors import UserError
from fineline_jax.scoring import score_files
from fineline_jax.scoring.requests import pack

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), JSON, max_size=4), st.data())
def test_a_record_is_what_was_sealed_and_any_other_text_is_refused(record: dict[str, Any], data: st.DataObject) -> None:
    record.pop("record_sha256", None)
    whole = json.dumps(sealed(record), indent=data.draw(st.sampled_from([None, 1]))).encode()
    assert unsealed(whole) == record and sealed(sealed(record)) == sealed(record)
    place = data.draw(st.integers(0, 8 * len(whole) - 1))
    changed = bytearray(whole)
    changed[place // 8] ^= 1 << place % 8
    try:
        found = unsealed(bytes(changed))
    except ValueError:
        return
    assert found == record  # a bit of the layout, or of how a character is written


def flips(file: Path, count: int, read: Callable[[], Any], right: Any) -> Counter[str]:
    """Flip `count` bits of `file`, one at a time. right: what `read()` gives of the whole file."""
    whole, rng, seen = file.read_bytes(), random.Random(1), Counter[str]()
    for _ in range(count):
        changed = bytearray(whole)
        changed[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        file.write_bytes(changed)
        try:
            seen["right" if read() == right else "silently other"] += 1
        except UserError as error:
            assert "\n" not in str(error)
            seen["refused"] += 1
    file.write_bytes(whole)
    assert read() == right
    return seen


def test_scores(tmp_path: Path) -> None:
    header = score_files.Header("run", "step1", 1, 100, 96, score_files.Key("w", "p", "float32", "auto", "tree-5"))
    rng = np.random.default_rng(0)
    scores = score_files.Scores(header, rng.normal(size=500) - 5, rng.random(500) < 0.5)
    file = score_files.write(tmp_path, scores)

    def read() -> Any:
        found = score_files.read(file)
        return found.header, found.loglikelihood.tobytes(), found.is_greedy.tobytes()

    seen = flips(file, 400, read, read())
    assert seen["silently other"] == 0 and seen["refused"] > 300, seen


@pytest.mark.parametrize("name", ["manifest.json", "contexts.parquet", "requests.parquet", "documents.parquet"])
def test_packs(name: str, tmp_path: Path) -> None:
    made = packed([(task("a"), docs(20)), (task("b"), docs(20))])
    pack.save(dataclasses.replace(made), tmp_path / "p")

    def read() -> Any:
        found = pack.load(tmp_path / "p")
        return found.manifest, *(getattr(found, table).to_pylist() for table in pack.SCHEMAS)

    seen = flips(tmp_path / "p" / name, 100, read, read())
    assert seen["silently other"] == 0 and seen["refused"] > 50, seen


def test_data_sets(tmp_path: Path) -> None:
    windows = [[(7 * i + j) % 400 for j in range(9)] for i in range(60)]
    prepare_amber([amber(tmp_path / "a.jsonl", windows)], tmp_path / "d", vocab_size=512, sequence_length=8)

    def read() -> Any:
        found = open_data_set(tmp_path / "d")
        return found.metadata, found.splits, found.read("chunk_000", range(60)).tolist()

    for file in sorted((tmp_path / "d").iterdir()):
        seen = flips(file, 60, read, read())
        assert seen["silently other"] == 0, (file.name, seen)


def test_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "params").mkdir()
    (tmp_path / "params" / "0").write_bytes(random.Random(0).randbytes(4096))
    write_record(tmp_path, {"step": 1, "tokens": 100, "kept": True, "recipe": "r"})

    def read() -> Any:
        if (wrong := damage(tmp_path)) is not None:
            raise UserError(wrong)
        return read_record(tmp_path)

    for file in (tmp_path / "params" / "0", tmp_path / "complete.json"):
        seen = flips(file, 200, read, read())
        assert seen["silently other"] == 0 and seen["refused"] > 100, (file.name, seen)
