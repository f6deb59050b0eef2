"""What makes a checkpoint folder complete: hashlib over whole files is the oracle. No JAX."""

import hashlib
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from fineline_jax.atomic_files import sealed
from fineline_jax.checkpoints.runs.digest_record import RECORD, damage, digests, files_below, read_record, write_record

FACTS = {"step": 7, "tokens": 700, "kept": True, "recipe": "r"}


def hashed(content: bytes, block: int = 1 << 24) -> str:
    """The SHA-256 of the SHA-256s of blocks of 16 MiB."""
    parts = [hashlib.sha256(content[at : at + block]).digest() for at in range(0, len(content), block)]
    return hashlib.sha256(b"".join(parts)).hexdigest()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in {"params/d/1": b"abc", "params/m": b"", "params_ema/1": b"xyz", "_METADATA": b"{}"}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    write_record(tmp_path, FACTS)
    return tmp_path


def test_the_record_holds_the_facts_and_size_and_hash_of_every_file_in_any_depth(folder: Path) -> None:
    files = {name: [len(content), hashed(content)] for name, content in
             (("params/d/1", b"abc"), ("params/m", b""), ("params_ema/1", b"xyz"), ("_METADATA", b"{}"))}  # fmt: skip
    assert read_record(folder) == FACTS | {"files": files}
    stored = json.loads((folder / "complete.json").read_bytes())
    assert stored.pop("record_sha256") == hashlib.sha256(json.dumps(stored, sort_keys=True).encode()).hexdigest()
    assert stored == FACTS | {"files": files}
    assert damage(folder) is None


@pytest.mark.parametrize("more", [-1, 0, 1])
def test_a_large_file_is_hashed_in_blocks_of_16_mib(tmp_path: Path, more: int) -> None:
    content = b"\1" * (1 << 24) + b"\2" * ((1 << 24) + more)
    (tmp_path / "f").write_bytes(content)
    assert digests(tmp_path, ["f"]) == [("f", len(content), hashed(content))]


def test_files_are_told_in_the_order_asked_for_and_listed_in_that_of_their_names(folder: Path) -> None:
    assert files_below(folder) == ["_METADATA", "params/d/1", "params/m", "params_ema/1"]
    assert [name for name, *_ in digests(folder, ["params/m", "_METADATA"])] == ["params/m", "_METADATA"]


def test_a_file_changed_behind_its_size_and_its_time_of_change_is_read_again(folder: Path) -> None:
    before = (folder / "params/d/1").stat()
    (folder / "params/d/1").write_bytes(b"abd")
    os.utime(folder / "params/d/1", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert damage(folder) == "the content of params/d/1 has changed"


def test_equal_times_and_sizes_of_two_files_are_not_one_file(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_text(name)
        os.utime(tmp_path / name, ns=(1, 1))
    assert [digest for _, _, digest in digests(tmp_path, ["a", "b"])] == [hashed(b"a"), hashed(b"b")]


@pytest.mark.parametrize("changed", ["st_ino", "st_size", "st_mtime_ns", "st_ctime_ns"])
def test_a_file_is_read_again_where_one_of_its_inode_size_and_times_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    (tmp_path / "f").write_text("one")
    state = {"st_ino": 5, "st_size": 3, "st_mtime_ns": 6, "st_ctime_ns": 7}
    monkeypatch.setattr(Path, "stat", lambda self: SimpleNamespace(**state))
    [(_, _, first)] = digests(tmp_path, ["f"])
    (tmp_path / "f").write_text("two")
    assert digests(tmp_path, ["f"]) == [("f", 3, first)], "nothing of it is another: it is not read"
    state[changed] += 1
    assert digests(tmp_path, ["f"]) == [("f", state["st_size"], hashed(b"two"))]


def test_what_is_wrong_with_a_file_is_told(folder: Path) -> None:
    (folder / "params/d/1").write_bytes(b"abcd")
    assert damage(folder) == "params/d/1 has 4 bytes instead of 3"
    (folder / "params/d/1").unlink()
    assert damage(folder) == "params/d/1 is missing"
    (folder / "params/d/1").write_bytes(b"abC")
    assert damage(folder) == "the content of params/d/1 has changed"


def test_one_item_is_looked_at_alone_and_not_one_whose_name_only_begins_alike(folder: Path) -> None:
    (folder / "params_ema/1").write_bytes(b"no")
    (folder / "_METADATA").unlink()
    assert damage(folder, "params") is None
    assert damage(folder, "params_ema") == "params_ema/1 has 2 bytes instead of 3"
    assert damage(folder) is not None


@pytest.mark.parametrize(
    ("change", "readable"),
    [
        ({"step": 0}, True), ({"step": -1}, False), ({"step": "7"}, False), ({"tokens": None}, True),
        ({"tokens": 1.5}, False), ({"kept": 1}, False), ({"kept": False}, True), ({"files": {}}, True),
        ({"files": {"a": [0, "h"]}}, True), ({"files": {"a": [-1, "h"]}}, False), ({"files": {"a": [1]}}, False),
        ({"files": {"a": ["many", "h"]}}, False), ({"files": None}, False),
    ],
)  # fmt: skip
def test_a_record_is_read_only_if_all_of_it_makes_sense(folder: Path, change: dict, readable: bool) -> None:
    whole = FACTS | {"files": {}} | change
    (folder / "complete.json").write_text(json.dumps(sealed(whole)))
    assert read_record(folder) == (whole if readable else None)
    for key in whole.keys() - {"recipe"}:
        (folder / "complete.json").write_text(json.dumps(sealed({k: v for k, v in whole.items() if k != key})))
        assert read_record(folder) is None


def test_a_record_that_was_changed_is_none_and_is_told(folder: Path) -> None:
    text = (folder / "complete.json").read_text()
    (folder / "complete.json").write_text(text.replace('"tokens": 700', '"tokens": 900'))
    assert read_record(folder) is None and damage(folder) == "complete.json is not as it was written"
    (folder / "complete.json").write_text(json.dumps(json.loads(text), sort_keys=True))  # another layout, the same
    assert damage(folder) is None
    (folder / "complete.json").unlink()
    assert damage(folder) == "complete.json is missing"


def test_what_a_kill_left_of_a_record_is_no_file_of_the_checkpoint(folder: Path) -> None:
    (folder / ".complete.json.0123.partial").write_text("{")
    write_record(folder, FACTS | {"step": 8})
    assert damage(folder) is None and read_record(folder)["step"] == 8  # type: ignore[index]
    assert sorted(os.listdir(folder)) == ["_METADATA", "complete.json", "params", "params_ema"]


def test_all_files_and_the_name_of_the_folder_are_on_the_disk_before_the_record_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Path] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: told.append(Path(os.readlink(f"/proc/self/fd/{descriptor}"))))
    (folder / RECORD).unlink()
    before = {folder.parent, folder, *folder.rglob("*")}
    write_record(folder, FACTS)
    *first, partial, last = told
    assert set(first) == before and partial.name.endswith(".partial") and last == folder
