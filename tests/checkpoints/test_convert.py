"""Runs and Hugging Face folders from one into the other; files of safetensors are the oracle. No shared data."""

import contextlib
import dataclasses
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from scoring_examples import write_tokenizer
from sentencepiece import SentencePieceTrainer
from tokenizers import Tokenizer

from fineline_jax.checkpoints import convert, load
from fineline_jax.checkpoints.formats import huggingface
from fineline_jax.checkpoints.open import open_series
from fineline_jax.checkpoints.runs.digest_record import read_record
from fineline_jax.checkpoints.runs.store import CheckpointStore, load_items
from fineline_jax.cli import main
from fineline_jax.errors import UserError
from fineline_jax.mesh import make_mesh
from fineline_jax.models import decoder
from fineline_jax.models.config import ModelConfig
from fineline_jax.recipe import MeshShape, from_json

CONFIG = ModelConfig(vocab_size=512, width=16, layers=3, heads=2, mlp_width=24, context=32)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def one_device() -> jax.sharding.Mesh:
    return make_mesh(MeshShape(), jax.devices()[:1])


def params(seed: int, norms: Any = np.float32, others: Any = np.float32) -> Any:
    """Random parameters; norms may have another dtype."""
    random = np.random.default_rng(seed)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        dtype = norms if "norm" in jax.tree_util.keystr(path) else others
        return jnp.asarray(random.normal(size=leaf.shape).astype(dtype))

    return jax.tree_util.tree_map_with_path(draw, decoder.abstract_params(CONFIG, one_device()))


def tensors(folder: Path) -> dict[str, np.ndarray]:
    return {name: array for file in folder.glob("*.safetensors") for name, array in load_file(file).items()}


def as_bits(found: dict[str, np.ndarray]) -> dict[str, tuple[Any, bytes]]:
    return {name: (array.dtype, array.shape, array.tobytes()) for name, array in found.items()}


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bfloat16 matrices, float32 norms, a tokenizer."""
    folder = tmp_path_factory.mktemp("released")
    write_tokenizer(folder / "tokenizer", adds_bos=True)
    huggingface.export_hf(CONFIG, params(0, others=BFLOAT16), folder / "x-step40-tokens3B", folder / "tokenizer")
    return folder / "x-step40-tokens3B"


# Shards


def nbytes(config: ModelConfig) -> dict[str, int]:
    """Bytes in float32 of a Llama's tensors, by their published names, in the order in which they are written."""
    d, m, v = config.width, config.mlp_width, config.vocab_size
    matrices = {"self_attn.q_proj": d * d, "self_attn.k_proj": d * d, "self_attn.v_proj": d * d,
                "self_attn.o_proj": d * d, "mlp.gate_proj": d * m, "mlp.up_proj": d * m, "mlp.down_proj": d * m,
                "input_layernorm": d, "post_attention_layernorm": d}  # fmt: skip
    layers = {f"model.layers.{i}.{name}.weight": size for i in range(config.layers) for name, size in matrices.items()}
    whole = {"model.embed_tokens.weight": v * d, "lm_head.weight": v * d, "model.norm.weight": d} | layers
    return {name: 4 * size for name, size in whole.items()}


TOTAL = sum(nbytes(CONFIG).values())


@pytest.mark.parametrize("limit", [1024, 4000, 32_767, 32_832, TOTAL - 1, TOTAL])
def test_no_shard_is_larger_than_asked_for_and_none_could_take_the_next_tensor(tmp_path: Path, limit: int) -> None:
    """A tensor larger than that has a file of its own; the index says where each lies, and all their bytes."""
    out = tmp_path / "hf"
    huggingface.export_hf(CONFIG, params(0), out, shard_bytes=limit)
    expected = nbytes(CONFIG)
    files = sorted(out.glob("*.safetensors"))
    held = [load_file(file) for file in files]
    sizes = [[array.nbytes for array in one.values()] for one in held]
    assert all(0 < sum(one) <= limit or len(one) == 1 for one in sizes)
    assert {name: array.nbytes for one in held for name, array in one.items()} == expected
    assert sum(map(len, held)) == len(expected)
    if limit >= TOTAL:
        assert [file.name for file in files] == ["model.safetensors"] and not (
            out / "model.safetensors.index.json"
        ).exists()
        return
    assert [file.name for file in files] == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": TOTAL}
    assert index["weight_map"] == {name: file.name for file, one in zip(files, held) for name in one}
    order = list(index["weight_map"])
    for one, following in itertools.pairwise(held):
        first = min(following, key=order.index)
        assert sum(array.nbytes for array in one.values()) + expected[first] > limit


def test_a_shard_may_have_exactly_the_bytes_asked_for(tmp_path: Path) -> None:
    huggingface.export_hf(CONFIG, params(0), tmp_path / "one", shard_bytes=TOTAL - 1)
    first = load_file(tmp_path / "one" / "model-00001-of-00002.safetensors")
    exactly = sum(array.nbytes for array in first.values())
    for limit, count in ((exactly, len(first)), (exactly - 1, len(first) - 1)):
        huggingface.export_hf(CONFIG, params(0), tmp_path / str(limit), shard_bytes=limit)
        found = load_file(min((tmp_path / str(limit)).glob("model-00001-of-*.safetensors")))
        assert len(found) == count


def test_shards_have_at_most_the_five_gigabytes_of_the_hub() -> None:
    assert huggingface.SHARD_BYTES == 5_000_000_000
    assert (
        huggingface.export_hf.__defaults__ is not None and huggingface.SHARD_BYTES in huggingface.export_hf.__defaults__
    )


# Dtypes


def test_parameters_are_written_and_read_in_the_dtype_each_has(released: Path) -> None:
    written = tensors(released)
    assert {name: array.dtype for name, array in written.items()} == {
        name: np.dtype(np.float32) if "norm" in name else BFLOAT16 for name in written
    }
    config, found = huggingface.load_hf(released, one_device(), None)
    assert config == CONFIG
    for path, leaf in jax.tree_util.tree_leaves_with_path(found):
        assert leaf.dtype == (np.float32 if "norm" in jax.tree_util.keystr(path) else BFLOAT16)
    said = json.loads((released / "config.json").read_text())
    assert said["torch_dtype"] == "bfloat16" and said["architectures"] == ["LlamaForCausalLM"]
    assert huggingface.load_hf(released, one_device())[1]["embed"].dtype == "float32", "what is asked for by default"


def test_layers_of_several_dtypes_and_of_64_bits_become_float32(released: Path, tmp_path: Path) -> None:
    found = tensors(released)
    odd, wide = "model.layers.1.mlp.up_proj.weight", "lm_head.weight"
    found |= {odd: found[odd].astype(np.float16), wide: found[wide].astype(np.float64)}
    (tmp_path / "config.json").write_bytes((released / "config.json").read_bytes())
    save_file(found, tmp_path / "model.safetensors")
    loaded = huggingface.load_hf(tmp_path, one_device(), None)[1]
    assert (loaded["layers"]["up"].dtype, loaded["head"].dtype) == ("float32", "float32")
    assert (loaded["layers"]["gate"].dtype, loaded["embed"].dtype) == ("bfloat16", "bfloat16")
    assert np.array_equal(np.asarray(loaded["layers"]["up"])[1], found[odd].T.astype(np.float32))
    save_file(found | {odd: found[odd].astype(np.int32)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=rf"tensor {odd} is int32; use a checkpoint that is not quantized"):
        huggingface.load_hf(tmp_path, one_device())


def test_infinity_fits_float16_and_the_next_number_above_its_largest_does_not(tmp_path: Path) -> None:
    """65,504 is the largest; up to 65,519 rounds down to it."""
    for value, fits in ((np.inf, True), (-65504.0, True), (65519.0, True), (65520.0, False), (-1e6, False)):
        weights = params(0)
        weights["norm"] = weights["norm"].at[3].set(value)
        out = tmp_path / str(value)
        if fits:
            huggingface.export_hf(CONFIG, weights, out, dtype="float16")
            expected = np.float16(value) if np.isinf(value) else np.float16(np.sign(value) * 65504)
            assert tensors(out)["model.norm.weight"][3] == expected
            assert json.loads((out / "config.json").read_text())["torch_dtype"] == "float16"
        else:
            with pytest.raises(UserError, match=r"norm.weight has values beyond the range of float16"):
                huggingface.export_hf(CONFIG, weights, out, dtype="float16")


# Tokenizers


def test_a_tokenizer_may_have_as_many_ids_as_the_embedding_rows_and_not_one_more(
    released: Path, tmp_path: Path
) -> None:
    own = Tokenizer.from_file(str(released / "tokenizer.json"))
    count = own.get_vocab_size()
    own.add_tokens(["<one>", "<two>"])
    own.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "pieces").mkdir()
    text, place = iter(["the cat sat on the mat"] * 20), str(tmp_path / "pieces" / "tokenizer")
    options = {"vocab_size": 20, "hard_vocab_limit": False, "minloglevel": 2}
    options |= {"model_type": "bpe", "normalization_rule_name": "identity"}
    SentencePieceTrainer.train(sentence_iterator=text, model_prefix=place, **options)  # pyright: ignore
    pieces = len((tmp_path / "pieces" / "tokenizer.vocab").read_text().splitlines())
    for folder, ids in ((released, count), (tmp_path, count + 2), (tmp_path / "pieces", pieces)):
        convert._check_tokenizer(folder, ids, tmp_path / "nowhere")
        with pytest.raises(UserError, match=rf"has {ids} ids, the embedding {ids - 1} rows"):
            convert._check_tokenizer(folder, ids - 1, tmp_path / "nowhere")


# A run and back


@pytest.fixture(scope="module")
def run(released: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kept steps 9 and 40, a rolling latest 50; all of other weights."""
    run = tmp_path_factory.mktemp("runs") / "run"
    convert.import_checkpoint(released, run, one_device())
    record = lambda step: {"tokens": 7 * step, "recipe": "run"}
    with CheckpointStore(run / "checkpoints", (9,), is_rolling=lambda step: step == 50, record=record) as store:
        for step in (9, 50):
            store.maybe_save(step, {"params": params(step)})
    return run


def test_what_was_imported_and_exported_has_every_bit_of_the_files(released: Path, run: Path, tmp_path: Path) -> None:
    for source, out in ((run / "checkpoints" / "40", tmp_path / "out"), (released, tmp_path / "copy")):
        assert main(["export", str(source), str(out)]) == 0
        assert as_bits(tensors(out)) == as_bits(tensors(released))
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            assert (out / name).read_bytes() == (released / name).read_bytes(), name
    assert read_record(run / "checkpoints" / "40")["tokens"] == 3_000_000_000  # type: ignore[index]


@pytest.mark.parametrize(
    ("named", "step"),
    [("", 40), ("@step9", 9), ("/checkpoints/9", 9), ("/checkpoints/50", 50)],
)
def test_of_a_run_the_last_kept_checkpoint_is_exported_or_the_one_that_is_named(
    run: Path, released: Path, tmp_path: Path, named: str, step: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", f"{run}{named}", str(tmp_path / "out")]) == 0
    assert f"run/step{step} in Hugging Face layout" in capsys.readouterr().out
    if step == 40:
        assert as_bits(tensors(tmp_path / "out")) == as_bits(tensors(released))
    else:
        embed = tensors(tmp_path / "out")["model.embed_tokens.weight"]
        assert np.array_equal(embed, np.asarray(params(step)["embed"]))


@pytest.mark.parametrize(
    ("options", "step", "tokens"),
    [
        ({}, 40, 3 * 10**9), ({"step": 0, "tokens": 0}, 0, 0),
        ({"step": 2**31 - 1, "tokens": 2**63 - 1}, 2**31 - 1, 2**63 - 1),
        ({"step": 2**31}, None, None), ({"tokens": 2**63}, None, None), ({"step": -1}, None, None),
        ({"tokens": -1}, None, None),
    ],
)  # fmt: skip
def test_step_and_tokens_are_those_of_the_options_else_of_the_name(
    released: Path, tmp_path: Path, options: dict[str, int], step: int | None, tokens: int | None
) -> None:
    def imported() -> Path:
        return convert.import_checkpoint(released, tmp_path / "run", one_device(), **options)  # type: ignore[arg-type]

    if step is None:
        with pytest.raises(UserError, match="must be from 0 to"):
            imported()
        assert not (tmp_path / "run").exists()
        return
    assert imported() == tmp_path / "run" / "checkpoints" / str(step)
    [found] = open_series(str(tmp_path / "run")).checkpoints
    assert (found.step, found.tokens) == (step, tokens)
    recipe = from_json(tmp_path / "run" / "recipe.json")
    assert (recipe.name, recipe.model, recipe.tokens) == ("run", CONFIG, max(tokens or 0, CONFIG.context))


def test_an_import_never_takes_the_weights_of_what_lies_there(released: Path, run: Path, tmp_path: Path) -> None:
    """A rolling latest, or a kept checkpoint."""
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    for step, said in (
        (50, "is the latest of a run that trains; give another --step"),
        (9, "holds step 9"),
    ):
        with pytest.raises(UserError, match=said):
            convert.import_checkpoint(released, run, one_device(), step=step)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


@pytest.mark.parametrize("stops_in", ["write_atomic", "write_record"])
def test_an_import_that_was_killed_is_made_again(
    stops_in: str, released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill runs no clean-up: the folder stays with half a recipe, or with the first record."""
    run = tmp_path / "run"

    def stops(path: Path, *_: Any, **__: Any) -> None:
        if stops_in == "write_atomic":
            (path.parent / f".{path.name}.0123.partial").write_text("{")
        raise KeyboardInterrupt

    with monkeypatch.context() as killed:
        killed.setattr(convert, stops_in, stops)
        killed.setattr(convert, "_or_as_it_was", lambda _: contextlib.nullcontext())
        with pytest.raises(KeyboardInterrupt):
            convert.import_checkpoint(released, run, one_device())
    assert any(run.rglob("*"))
    convert.import_checkpoint(released, run, one_device())
    assert main(["export", str(run / "checkpoints" / "40"), str(tmp_path / "out")]) == 0
    assert as_bits(tensors(tmp_path / "out")) == as_bits(tensors(released))
    assert not [path for path in run.rglob("*") if path.suffix in (".partial", ".deleting", ".saving")]


def test_a_damaged_checkpoint_is_not_exported(released: Path, tmp_path: Path) -> None:
    convert.import_checkpoint(released, tmp_path / "run", one_device())
    file = max((tmp_path / "run" / "checkpoints" / "40" / "params").rglob("*"), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    [checkpoint] = open_series(str(tmp_path / "run")).checkpoints
    with pytest.raises(UserError, match="the checkpoint is damaged"):
        convert.export_checkpoint(checkpoint, tmp_path / "out", one_device())
    assert not (tmp_path / "out").exists()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_does_not_fit_a_run_is_refused_and_the_run_stays_as_it_was(
    released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    convert.import_checkpoint(released, run, one_device())
    other = tmp_path / "other"
    huggingface.export_hf(CONFIG, params(1), other, released)
    state = json.loads((released / "tokenizer.json").read_text())
    (other / "tokenizer.json").write_text(json.dumps(state))  # in other bytes the same
    convert._check_tokenizer(other, CONFIG.vocab_size, run / "tokenizer")
    state["model"]["merges"].pop()
    (other / "tokenizer.json").write_text(json.dumps(state))
    small = dataclasses.replace(CONFIG, vocab_size=64)
    few = {"embed": params(1)["embed"][:64], "head": params(1)["head"][:, :64]}
    huggingface.export_hf(small, params(1) | few, tmp_path / "small")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    before = contents(tmp_path)
    recipe = from_json(run / "recipe.json")
    wrong: list[tuple[Path, Path, dict[str, Any], str]] = [
        (other, run, {}, "is not the tokenizer of the run"),
        (tmp_path / "small", run, {}, "is a run of another model"),
        (
            tmp_path / "small",
            tmp_path / "new",
            {"recipe": recipe},
            "is of another model than the weights; correct model.",
        ),
        (tmp_path / "small", tmp_path / "new", {"tokenizer": released}, "ids, the embedding 64 rows"),
        (released, tmp_path / "folder", {}, "is there and no run"),
        (released, tmp_path / "file", {}, "is a file"),
        (released, tmp_path / "new", {"tokenizer": tmp_path / "folder"}, "folder: no tokenizer"),
    ]
    for weights, into, options, said in wrong:
        with pytest.raises(UserError, match=said):
            convert.import_checkpoint(weights, into, one_device(), step=77, **options)
        assert contents(tmp_path) == before and not (tmp_path / "new").exists(), said

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(CheckpointStore, "maybe_save", full)
    for into in (run, tmp_path / "new", tmp_path / "empty"):
        with pytest.raises(OSError, match="No space"):
            convert.import_checkpoint(released, into, one_device(), step=77)
    assert contents(tmp_path) == before and not (tmp_path / "new").exists() and not any((tmp_path / "empty").iterdir())


def test_half_a_tokenizer_does_not_stay_in_the_way_of_the_next_import(released: Path, tmp_path: Path) -> None:
    """The disk becomes read-only within the copy of a file: what was begun cannot be removed either."""

    def half(source: Path, target: Path) -> None:
        Path(target).write_bytes(Path(source).read_bytes()[:20])
        raise OSError(30, "Read-only file system")

    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="Read-only"):
        patch.setattr(shutil, "copyfile", half)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        convert.import_checkpoint(released, run, one_device())
    assert list(run.iterdir())
    convert.import_checkpoint(released, run, one_device())
    assert contents(run / "tokenizer")["tokenizer.json"] == (released / "tokenizer.json").read_bytes()


def test_a_run_keeps_its_tokenizer_with_its_settings_whatever_is_imported_into_it(
    released: Path, tmp_path: Path
) -> None:
    shutil.copytree(released, tmp_path / "other")
    (tmp_path / "other" / "tokenizer_config.json").write_text("{}")
    run = tmp_path / "run"
    convert.import_checkpoint(released, run, one_device())
    before = contents(run / "tokenizer")
    convert.import_checkpoint(tmp_path / "other", run, one_device(), step=77)
    assert contents(run / "tokenizer") == before and (run / "checkpoints" / "77").is_dir()


def test_one_file_of_weights_is_imported_with_a_model_a_dtype_and_further_state(released: Path, tmp_path: Path) -> None:
    """Without a tokenizer; step 0 and unknown tokens, since its name says none. How fresh weights are drawn is the
    recipe's own, and makes no other model."""
    model = dataclasses.replace(CONFIG, init_std=0.5)
    recipe = dataclasses.replace(convert._without_data("mine", model, None), name="goes on", tokens=640)
    given: list[Any] = []

    def more(of: Any, weights: Any) -> dict[str, Any]:
        given.append((of, weights["norm"].dtype))
        return {"opt_state": {"mu": weights["norm"] * 2}}

    place = convert.import_checkpoint(
        released / "model.safetensors", tmp_path / "run", one_device(),
        config=CONFIG, recipe=recipe, dtype="float32", more_state=more, tokenizer=None,
    )  # fmt: skip
    assert place == tmp_path / "run" / "checkpoints" / "0" and given == [(recipe, np.float32)]
    record = read_record(place) or {}
    assert [record[key] for key in ("step", "tokens", "kept", "recipe")] == [0, None, True, "goes on"]
    assert from_json(tmp_path / "run" / "recipe.json") == recipe
    [checkpoint] = open_series(str(tmp_path / "run")).checkpoints
    weights = load.load(checkpoint, one_device())[1]
    assert np.array_equal(np.asarray(weights["head"]).T, tensors(released)["lm_head.weight"].astype(np.float32))
    target = {"opt_state": {"mu": jax.ShapeDtypeStruct((16,), jnp.float32, sharding=weights["norm"].sharding)}}
    assert np.array_equal(load_items(place, target)["opt_state"]["mu"], np.asarray(weights["norm"]) * 2)
    another = dataclasses.replace(recipe, name="another", tokens=1280)
    options: dict[str, Any] = {"step": 1, "tokens": 64, "recipe": another, "more_state": more}
    place = convert.import_checkpoint(released, tmp_path / "run", one_device(), **options)
    assert given[1][0] == recipe and (read_record(place) or {})["recipe"] == "goes on", "that of the run stays"
    assert {path.name for path in (tmp_path / "run" / "tokenizer").iterdir()} == {
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_the_layout_of_an_export_can_be_named_and_must_hold_the_model(run: Path, tmp_path: Path) -> None:
    checkpoint = open_series(str(run / "checkpoints" / "9")).checkpoints[0]
    convert.export_checkpoint(checkpoint, tmp_path / "m", one_device(), family="yi", dtype="bfloat16")
    said = json.loads((tmp_path / "m" / "config.json").read_text())
    assert (said["architectures"], said["torch_dtype"]) == (["YiForCausalLM"], "bfloat16")
    assert {array.dtype for array in tensors(tmp_path / "m").values()} == {BFLOAT16}
    with pytest.raises(UserError):
        convert.export_checkpoint(checkpoint, tmp_path / "x", one_device(), family="no such family")
    with pytest.raises(UserError, match="exists already"):
        convert.export_checkpoint(checkpoint, tmp_path / "m", one_device())
    # a Hugging Face folder again, in another dtype
    [folder] = open_series(str(tmp_path / "m")).checkpoints
    convert.export_checkpoint(folder, tmp_path / "again", one_device(), dtype="float32")
    assert {array.dtype for array in tensors(tmp_path / "again").values()} == {np.dtype(np.float32)}
