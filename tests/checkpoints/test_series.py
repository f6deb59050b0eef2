"""Opening a series from a path, loading its checkpoints, telling their weights apart."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from fineline_jax import recipe as recipes
from fineline_jax.checkpoints import load
from fineline_jax.checkpoints import open as opening
from fineline_jax.checkpoints.formats import huggingface
from fineline_jax.checkpoints.open import open_series
from fineline_jax.checkpoints.registry.entries import Named
from fineline_jax.checkpoints.registry.step_names import parse_name
from fineline_jax.checkpoints.runs.digest_record import RECORD
from fineline_jax.checkpoints.runs.store import CheckpointStore
from fineline_jax.cli import main
from fineline_jax.errors import UserError
from fineline_jax.mesh import make_mesh
from fineline_jax.models import decoder
from fineline_jax.models.config import ModelConfig

CONFIG = ModelConfig(vocab_size=32, width=16, layers=2, heads=2, kv_heads=2, mlp_width=24, context=32)


def params(seed: int) -> Any:
    random = np.random.default_rng(seed)
    target = decoder.abstract_params(CONFIG, make_mesh())
    return jax.tree.map(lambda x: jax.device_put(random.normal(size=x.shape).astype(x.dtype), x.sharding), target)


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with kept steps 0, 2, 10 and a rolling latest 11, and exports of two of them."""
    folder = tmp_path_factory.mktemp("series")
    recipe = recipes.Recipe(
        name="tiny",
        model=CONFIG,
        data=recipes.Data((recipes.Source("nowhere"),), sequence_length=32),
        batch=recipes.Batch(2),
        optimizer=recipes.Optimizer(recipes.Schedule()),
        tokens=6400,
    )
    run = folder / "run-a"
    (run / "tokenizer").mkdir(parents=True)
    (run / "tokenizer" / "tokenizer.json").write_text("{}")
    (run / "recipe.json").write_text(recipes.to_json(recipe))
    record = lambda step: {"tokens": 64 * step, "recipe": "tiny"}
    with CheckpointStore(run / "checkpoints", (0, 2, 10), is_rolling=lambda step: step == 11, record=record) as store:
        for step in (0, 2, 10, 11):
            weights = params(step)
            store.maybe_save(step, {"params": weights, "opt_state": {"mu": weights}})
    for name, step in (("Tiny-8.39BT", 2), ("Tiny-100.66BT", 10), ("Tiny-20.97BT", 0)):
        huggingface.export_hf(CONFIG, params(step), folder / "released" / name)
    return folder


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy"


def test_a_run_is_its_kept_checkpoints_in_order(made: Path) -> None:
    found = open_series(str(made / "run-a"))
    assert found.name == "run-a"
    assert [(c.name, c.step, c.tokens) for c in found.checkpoints] == [
        ("step0", 0, 0),
        ("step2", 2, 128),
        ("step10", 10, 640),
    ]
    for checkpoint in found.checkpoints:
        config, weights = load.load(checkpoint, make_mesh())
        assert config == CONFIG
        assert bits(weights) == bits(params(checkpoint.step or 0))
        assert load.tokenizer_folder(checkpoint) == made / "run-a" / "tokenizer"


def test_one_checkpoint_of_a_run_can_be_named_even_the_rolling_latest(made: Path) -> None:
    found = open_series(str(made / "run-a" / "checkpoints" / "11"))
    assert [(c.series, c.name, c.tokens) for c in found.checkpoints] == [("run-a", "step11", 704)]


def test_a_folder_of_hugging_face_folders_is_ordered_by_tokens(made: Path) -> None:
    found = open_series(str(made / "released"))
    assert [(c.name, c.tokens) for c in found.checkpoints] == [
        ("Tiny-8.39BT", 8_390_000_000),
        ("Tiny-20.97BT", 20_970_000_000),
        ("Tiny-100.66BT", 100_660_000_000),
    ]
    config, weights = load.load(found.checkpoints[0], make_mesh(), "bfloat16")
    assert config == CONFIG and weights["embed"].dtype == "bfloat16"
    assert load.tokenizer_folder(found.checkpoints[0]) is None


def test_one_hugging_face_folder_is_a_series_of_one(made: Path) -> None:
    found = open_series(str(made / "released" / "Tiny-8.39BT"))
    assert [(c.series, c.name, c.kind) for c in found.checkpoints] == [("Tiny-8.39BT", "main", "hf")]


@pytest.mark.parametrize(
    ("name", "step", "tokens"),
    [
        ("step1000", 1000, None),
        ("step1000-tokens4B", 1000, 4 * 10**9),
        ("stage1-step928646-tokens3896B", 928_646, 3896 * 10**9),
        ("TinyLlama-1.1B-intermediate-step-50K-105b", 50_000, None),
        ("TinyLlama-1.1B-intermediate-step-955k-token-2T", 955_000, 2 * 10**12),
        ("TinyLlama-1.1B-intermediate-step-1195k-token-2.5T", 1_195_000, 2_500_000_000_000),
        ("train_00220B", None, 220 * 10**9),
        ("Amber-Reproduce-8.39B", None, 8_390_000_000),
        ("OpenLLaMA-Reproduce-1023.41B", None, 1_023_410_000_000),
        ("open_llama_7b", None, None),
        ("pythia-1.4b", None, None),
        ("ckpt_012", None, None),
    ],
)
def test_steps_and_tokens_are_read_from_released_names(name: str, step: int | None, tokens: int | None) -> None:
    assert parse_name(name) == (step, tokens)


def test_folders_whose_names_say_no_tokens_are_in_the_order_of_their_numbers(copy: Path) -> None:
    for old, new in (("Tiny-8.39BT", "ckpt_9"), ("Tiny-20.97BT", "ckpt_10"), ("Tiny-100.66BT", "ckpt_100")):
        (copy / "released" / old).rename(copy / "released" / new)
    found = open_series(str(copy / "released"))
    assert [c.name for c in found.checkpoints] == ["ckpt_9", "ckpt_10", "ckpt_100"]
    assert {c.tokens for c in found.checkpoints} == {None}


@pytest.mark.parametrize("kind", ["run-a", "released"])
def test_identity_follows_the_weights_and_nothing_else(made: Path, copy: Path, kind: str) -> None:
    original, copied = (open_series(str(folder / kind)) for folder in (made, copy))
    before = [load.weights_hash(checkpoint) for checkpoint in original.checkpoints]
    assert len(set(before)) == 3
    assert [load.weights_hash(checkpoint) for checkpoint in copied.checkpoints] == before
    changed = copied.checkpoints[1]
    root = changed.location / "params" if changed.kind == "orbax" else changed.location
    weights = max((path for path in root.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    after = [load.weights_hash(checkpoint) for checkpoint in copied.checkpoints]
    assert [a == b for a, b in zip(after, before)] == [True, False, True]


def test_the_optimizer_state_is_not_part_of_the_identity(copy: Path) -> None:
    checkpoint = open_series(str(copy / "run-a")).checkpoints[0]
    before = load.weights_hash(checkpoint)
    shutil.rmtree(checkpoint.location / "opt_state")
    assert load.weights_hash(checkpoint) == before
    load.load(checkpoint, make_mesh())


def test_a_damaged_checkpoint_is_named_when_it_is_loaded(copy: Path) -> None:
    checkpoint = open_series(str(copy / "run-a")).checkpoints[1]
    weights = next((checkpoint.location / "params").glob("ocdbt.process_0/d/*"))
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{checkpoint.location}: the checkpoint is damaged .*{weights.name}"):
        load.load(checkpoint, make_mesh())


@pytest.mark.parametrize("change", [{"files": {"params/x": "y"}}, {"files": [1]}, {"step": -5}, {"tokens": "many"}])
def test_a_checkpoint_whose_record_is_damaged_is_named(copy: Path, change: dict[str, Any]) -> None:
    place = copy / "run-a" / "checkpoints" / "2"
    record = json.loads((place / RECORD).read_text()) | change
    (place / RECORD).write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"the checkpoint is damaged \(complete.json is not as it was written\)"):
        open_series(str(place))
    _, one, _ = open_series(str(copy / "run-a")).checkpoints
    assert (one.name, one.tokens, one.damage) == ("step2", None, "complete.json is not as it was written")
    for read in (load.weights_hash, load.stat_signature, lambda lost: load.load(lost, make_mesh())):
        with pytest.raises(UserError, match=r"checkpoints/2: .*complete.json is not as it was written"):
            read(one)


def test_series_names_a_damaged_checkpoint_and_its_exit_status_says_so(copy: Path, capsys) -> None:
    run = copy / "run-a"
    assert main(["series", str(run)]) == 0
    record = run / "checkpoints" / "10" / RECORD
    record.write_text(record.read_text().replace('"tokens": ', '"tokens": 9'))
    assert main(["series", str(run)]) == 1
    out, err = capsys.readouterr()
    assert "step10" in out and f"damaged: {record.parent} ({RECORD} is not as it was written)" in err
    assert main(["export", str(run), str(copy / "out")]) == 2 and not (copy / "out").exists()
    os.truncate(record, 200)
    assert main(["series", str(run)]) == 1


def test_nothing_found_is_said_with_what_was_looked_for(copy: Path) -> None:
    empty = copy / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="no such folder and no registered series"):
        open_series(str(copy / "absent"))
    with pytest.raises(UserError, match=r"looked for recipe.json .* config.json with weights"):
        open_series(str(empty))
    shutil.rmtree(copy / "run-a" / "checkpoints")
    with pytest.raises(UserError, match="no kept checkpoint"):
        open_series(str(copy / "run-a"))


def test_an_incomplete_checkpoint_is_not_part_of_the_series(copy: Path) -> None:
    (copy / "run-a" / "checkpoints" / "2" / RECORD).unlink()
    (copy / "run-a" / "checkpoints" / "2.saving").touch()
    assert [c.step for c in open_series(str(copy / "run-a")).checkpoints] == [0, 10]
    with pytest.raises(UserError, match="the checkpoint is damaged"):
        open_series(str(copy / "run-a" / "checkpoints" / "2"))


def test_a_series_can_be_listed_without_jax(made: Path) -> None:
    code = (
        "import sys; from fineline_jax.checkpoints.open import open_series;"
        f"assert len(open_series({str(made / 'run-a')!r}).checkpoints) == 3;"
        "assert not {'jax', 'orbax', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_the_identity_of_files_here_is_that_of_their_names_sizes_and_hashes(made: Path) -> None:
    """Scores know their checkpoint by it: it must be the same in every version of this program."""
    [checkpoint] = open_series(str(made / "released" / "Tiny-8.39BT")).checkpoints
    content = (checkpoint.location / "model.safetensors").read_bytes()
    digest = hashlib.sha256(hashlib.sha256(content).digest()).hexdigest()  # of one block
    named = json.dumps([["model.safetensors", len(content), digest]])
    assert load.weights_hash(checkpoint) == hashlib.sha256(named.encode()).hexdigest()
    of_run = open_series(str(made / "run-a")).checkpoints[0]
    names = load.weight_files(of_run)
    assert names == sorted(names) and all(name.startswith("params/") for name in names) and len(names) > 3


def test_the_version_of_a_checkpoint_changes_with_name_size_or_time_and_reads_nothing(copy: Path) -> None:
    [checkpoint] = open_series(str(copy / "released" / "Tiny-8.39BT")).checkpoints
    file = checkpoint.location / "model.safetensors"
    seen = [load.stat_signature(checkpoint)]
    content, time = file.read_bytes(), file.stat().st_mtime_ns
    for changed, at in ((content[::-1], time + 1), (content + b"x", time + 1)):
        file.write_bytes(changed)
        os.utime(file, ns=(at, at))
        seen.append(load.stat_signature(checkpoint))
    assert len(set(seen)) == 3
    file.write_bytes(content)
    os.utime(file, ns=(time, time))
    assert load.stat_signature(checkpoint) == seen[0]


def test_a_tokenizer_is_looked_for_in_the_folder_below_it_and_beside_it(copy: Path) -> None:
    """In that order; of a run only its own."""
    [checkpoint] = open_series(str(copy / "released" / "Tiny-8.39BT")).checkpoints
    folder = checkpoint.location
    for place in (folder.parent / "tokenizer", folder / "tokenizer", folder):
        place.mkdir(exist_ok=True)
        (place / "merges.txt").write_text("no vocabulary")
        before = load.tokenizer_folder(checkpoint)
        (place / "tokenizer.model").write_bytes(b"x")
        assert load.tokenizer_folder(checkpoint) == place != before
    of_run = open_series(str(copy / "run-a")).checkpoints[0]
    shutil.rmtree(copy / "run-a" / "tokenizer")
    assert load.tokenizer_folder(of_run) is None


def test_names_of_checkpoints_are_fit_for_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = opening._remote_series("s", "hf://o/n@{name}", [Named("a/b/c", 1, 2, "hf://o/n@a%2Fb%2Fc")], tmp_path, True)
    [one] = found.checkpoints
    assert (one.name, one.step, one.tokens, found.location) == ("a-b-c", 1, 2, "hf://o/n@{name}")
    assert one.remote is not None and one.location == one.remote.folder and one.remote.url == "hf://o/n@a%2Fb%2Fc"


def test_a_checkpoint_is_loaded_in_float32_unless_another_dtype_is_named(made: Path) -> None:
    [checkpoint] = open_series(str(made / "run-a" / "checkpoints" / "2")).checkpoints
    for given, expected in (((), "float32"), (("bfloat16",), "bfloat16")):
        _, weights = load.load(checkpoint, make_mesh(), *given)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(weights)} == {expected}
    assert bits(weights) == bits(jax.tree.map(lambda x: x.astype("bfloat16"), params(2)))
