"""One released model through every format, and runs from one layout into the other."""

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from easylm_examples import to_easylm, write_stream
from model_examples import SMALL, logits, random_params
from safetensors.numpy import load_file, save_file

from fineline_jax.checkpoints import convert, load
from fineline_jax.checkpoints.formats import huggingface
from fineline_jax.checkpoints.formats.lazy_tensor import StoredTensor
from fineline_jax.checkpoints.formats.weight_files import open_weights
from fineline_jax.checkpoints.open import open_series
from fineline_jax.cli import main
from fineline_jax.errors import UserError
from fineline_jax.mesh import make_mesh
from fineline_jax.models.config import ModelConfig
from fineline_jax.recipe import MeshShape, from_json
from fineline_jax.scoring import score_files


@pytest.fixture(scope="module")
def golden(shared_data: Path) -> tuple[Path, list[dict[str, Any]]]:
    """The model's folder, and texts with their log-probabilities."""
    folder = shared_data / "models" / "tinystories-260k"
    items = json.loads((folder / "golden.json").read_text())["items"]
    return folder, [item for item in items if len(item["ids"]) > 1]


def with_config(source: Path, folder: Path) -> Path:
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, folder)
    return folder


def in_format(source: Path, folder: Path, form: str) -> Path:
    """The checkpoint `source` in `form`; what can be opened as a series."""
    tensors = load_file(source / "model.safetensors")
    if form == "safetensors":
        return source
    if form == "sharded safetensors":
        with_config(source, folder)
        names = sorted(tensors)
        files = {name: f"model-{1 + (i % 2):05d}-of-00002.safetensors" for i, name in enumerate(names)}
        for file in set(files.values()):
            save_file({name: tensors[name] for name in names if files[name] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    elif form == "bin":
        torch = pytest.importorskip("torch", reason="pip install -e '.[test]'")
        with_config(source, folder)
        torch.save({name: torch.from_numpy(tensor) for name, tensor in tensors.items()}, folder / "pytorch_model.bin")
    elif form == "msgpack":
        with_config(source, folder)
        write_stream(folder / "streaming_params", to_easylm(tensors, heads=8, kv_heads=4))
    else:
        convert.import_checkpoint(source, folder, make_mesh(), step=10, tokens=1000)
    return folder


@pytest.mark.parametrize("form", ["safetensors", "sharded safetensors", "bin", "msgpack", "orbax"])
def test_a_released_model_has_its_golden_log_likelihoods_in_every_format(
    golden: tuple[Path, list[dict[str, Any]]], tmp_path: Path, form: str
) -> None:
    source, items = golden
    [checkpoint] = open_series(str(in_format(source, tmp_path / "model", form))).checkpoints
    mesh = make_mesh(MeshShape(1, 4, 2))
    config, params = load.load(checkpoint, mesh)
    longest = max(len(item["ids"]) for item in items)
    tokens = np.zeros((-(-len(items) // 4) * 4, longest), np.int32)
    for row, item in enumerate(items):
        tokens[row, : len(item["ids"])] = item["ids"]
    logp = jax.nn.log_softmax(logits(config, params, tokens, mesh), axis=-1)
    for row, item in enumerate(items):
        ids = np.asarray(item["ids"])
        found = np.asarray(logp[row])[np.arange(len(ids) - 1), ids[1:]]
        assert np.abs(found - np.asarray(item["logprobs"])).max() < 1e-3
    reference = huggingface.load_hf(source, mesh)[1]
    assert [np.asarray(x).tobytes() for x in jax.tree.leaves(params)] == [
        np.asarray(x).tobytes() for x in jax.tree.leaves(reference)
    ]
    assert len(load.weights_hash(checkpoint)) == 64 and load.tokenizer_folder(checkpoint) is not None


def test_a_released_model_is_scored_alike_in_every_format(
    golden: tuple[Path, list[dict[str, Any]]], shared_data: Path, tmp_path: Path
) -> None:
    """By the command, all formats at once: the same log-likelihoods to the last bit."""
    forms = ["safetensors", "sharded safetensors", "bin", "msgpack", "orbax"]
    folders = [str(in_format(golden[0], tmp_path / form, form)) for form in forms]
    suite = ["--suite", "piqa,arc_easy", "--limit", "10", "--benchmarks", str(shared_data / "benchmarks")]
    assert main(["score", *folders, *suite, "--out", str(tmp_path / "scores")]) == 0
    files = score_files.score_files(tmp_path / "scores")
    found = [score_files.read(path) for path in files]
    assert len(found) == len(forms) and len({one.header.key.weights_hash for one in found}) == len(forms)
    assert len(found[0].loglikelihood) > 50 and np.ptp(found[0].loglikelihood) > 10
    assert {one.loglikelihood.tobytes() for one in found} == {found[0].loglikelihood.tobytes()}
    assert {one.is_greedy.tobytes() for one in found} == {found[0].is_greedy.tobytes()}


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> Path:
    """A model of half-precision matrices and float32 norms, sharded, with a tokenizer."""
    folder = tmp_path_factory.mktemp("released") / "tiny-step40-tokens3B"
    config = dataclasses.replace(SMALL, vocab_size=512)
    tokenizer = shared_data / "models" / "tinystories-260k"
    huggingface.export_hf(config, random_params(config, make_mesh()), folder, tokenizer, shard_bytes=20_000)
    for file in folder.glob("*.safetensors"):
        save_file(
            {name: value if "norm" in name else value.astype(np.float16) for name, value in load_file(file).items()},
            file,
            metadata={"format": "pt"},
        )
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_export_after_import_after_export_is_the_same_folder(released: Path, tmp_path: Path) -> None:
    out, again = tmp_path / "out", tmp_path / "again"
    assert main(["import", str(released), str(tmp_path / "run")]) == 0
    assert main(["export", str(tmp_path / "run"), str(out)]) == 0
    assert main(["import", str(out), str(tmp_path / "run2"), "--step", "40"]) == 0
    assert main(["export", str(tmp_path / "run2" / "checkpoints" / "40"), str(again)]) == 0
    assert contents(out) == contents(again)
    before = {name: tensor.whole() for name, tensor in open_weights(released).tensors.items()}
    after = {name: tensor.whole() for name, tensor in open_weights(out).tensors.items()}
    assert {name: (tensor.dtype, tensor.tobytes()) for name, tensor in before.items()} == {
        name: (tensor.dtype, tensor.tobytes()) for name, tensor in after.items()
    }
    assert (out / "tokenizer.json").read_bytes() == (released / "tokenizer.json").read_bytes()


def test_an_imported_run_is_a_series_whose_tokens_come_from_the_name(released: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    convert.import_checkpoint(released, run, make_mesh())
    convert.import_checkpoint(released, run, make_mesh(), step=50, tokens=4_000_000_000)
    found = open_series(str(run))
    assert [(c.name, c.step, c.tokens) for c in found.checkpoints] == [
        ("step40", 40, 3_000_000_000),
        ("step50", 50, 4_000_000_000),
    ]
    assert load.tokenizer_folder(found.checkpoints[0]) == run / "tokenizer"
    with pytest.raises(UserError, match=r"holds step 50 already; .*--step"):
        convert.import_checkpoint(released, run, make_mesh(), step=50)


def test_tokens_that_nobody_knows_stay_unknown(released: Path, tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(released)
    convert.import_checkpoint(tmp_path / "model", tmp_path / "run", make_mesh())
    [checkpoint] = open_series(str(tmp_path / "run")).checkpoints
    assert (checkpoint.step, checkpoint.tokens) == (0, None)


def test_what_does_not_fit_the_run_is_refused(released: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    convert.import_checkpoint(released, run, make_mesh())
    huggingface.export_hf(SMALL, random_params(SMALL, make_mesh()), tmp_path / "other")
    with pytest.raises(UserError, match="a run of another model"):
        convert.import_checkpoint(tmp_path / "other", run, make_mesh(), step=1)
    with pytest.raises(UserError, match=r"the recipe .* is of another model"):
        convert.import_checkpoint(
            tmp_path / "other", tmp_path / "new", make_mesh(), recipe=from_json(run / "recipe.json")
        )
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is there and no run"):
        convert.import_checkpoint(released, tmp_path / "folder", make_mesh())
    assert not (tmp_path / "new").exists()
    with pytest.raises(UserError, match="exists already"):
        convert.export_checkpoint(open_series(str(run)).checkpoints[0], tmp_path / "other", make_mesh())


def test_one_file_is_imported_with_the_model_of_a_recipe(tmp_path: Path, released: Path) -> None:
    run = tmp_path / "first"
    convert.import_checkpoint(released, run, make_mesh())
    tensors = {name: np.asarray(tensor.whole()) for name, tensor in open_weights(released).tensors.items()}
    write_stream(tmp_path / "streaming_params_40", to_easylm(tensors, heads=4, kv_heads=2))
    command = ["import", str(tmp_path / "streaming_params_40"), str(tmp_path / "run"), "--step", "40"]
    assert main([*command, "--config", str(run / "recipe.json")]) == 2  # no config.json of Hugging Face
    assert main([*command, "--config", str(run)]) == 0
    both = [load.load(open_series(str(path)).checkpoints[0], make_mesh())[1] for path in (run, tmp_path / "run")]
    for one, other in zip(*map(jax.tree.leaves, both)):
        assert np.array_equal(np.asarray(one), np.asarray(other))


def test_an_exported_run_has_equal_logits_in_transformers(released: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="pip install -e '.[test]'")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    convert.import_checkpoint(released, tmp_path / "run", make_mesh(), dtype="float32")
    [checkpoint] = open_series(str(tmp_path / "run")).checkpoints
    convert.export_checkpoint(checkpoint, tmp_path / "out", make_mesh())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    tokens = np.random.default_rng(1).integers(0, 512, (8, 20), dtype=np.int32)
    with torch.no_grad():
        expected = model(torch.asarray(tokens, dtype=torch.long)).logits.numpy()
    config, params = load.load(checkpoint, make_mesh())
    assert np.abs(logits(config, params, tokens, make_mesh()) - expected).max() < 1e-4 * np.abs(expected).max()
    assert AutoTokenizer.from_pretrained(tmp_path / "out").bos_token_id == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_dtype_of_an_export_and_of_an_import_can_be_chosen(released: Path, tmp_path: Path, dtype: str) -> None:
    """Each value is rounded once, to nearest even; config.json says the dtype; transformers opens both."""
    wanted = np.dtype(jnp.dtype(dtype))
    before = {name: tensor.whole() for name, tensor in open_weights(released).tensors.items()}
    assert main(["export", str(released), str(tmp_path / "out"), "--dtype", dtype]) == 0
    assert main(["import", str(released), str(tmp_path / "run"), "--dtype", dtype]) == 0
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "again")]) == 0
    for folder in (tmp_path / "out", tmp_path / "again"):
        after = {name: tensor.whole() for name, tensor in open_weights(folder).tensors.items()}
        assert before.keys() == after.keys() and {tensor.dtype for tensor in after.values()} == {wanted}
        assert all(after[name].tobytes() == before[name].astype(wanted).tobytes() for name in before)
        assert json.loads((folder / "config.json").read_text())["torch_dtype"] == dtype


def broken_imports(released: Path, shared_data: Path, tmp_path: Path) -> dict[str, list[str]]:
    """What is said, and the arguments behind `fineline import`."""

    def copy(name: str, **changes: bytes) -> Path:
        shutil.copytree(released, tmp_path / name)
        for file, content in changes.items():
            (tmp_path / name / file.replace("__", ".")).write_bytes(content)
        return tmp_path / name

    bare = copy("bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    (bare / "tokenizer.model").write_bytes(b"<html>")
    run = str(tmp_path / "run")
    llama = str(shared_data / "tokenizers" / "llama")
    cut = copy("cut")
    file = next(cut.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    (tmp_path / "file").write_text("mine")
    return {
        "tokenizer.json: the tokenizer cannot be opened": [str(copy("empty", tokenizer__json=b"{}")), run],
        "tokenizer_config.json: no JSON object": [str(copy("list", tokenizer_config__json=b"[1]")), run],
        "tokenizer_config.json: not JSON": [str(copy("deep", tokenizer_config__json=b"[" * 99_999)), run],
        "tokenizer.model: not a SentencePiece model": [str(bare), run],
        "nowhere: no tokenizer": [str(released), run, "--tokenizer", str(tmp_path / "nowhere")],
        "has 32000 ids, the embedding 512 rows": [str(released), run, "--tokenizer", llama],
        "cut short": [str(cut), run],
        "config.json: not valid JSON": [str(copy("nested", config__json=b"[" * 99_999)), run],
        "the recipe demo is of another model": [str(released), run, "--recipe", "demo"],
        "--step -1: must be from 0 to": [str(released), run, "--step", "-1"],
        "--step 99999999999: must be from 0 to": [str(released), run, "--step", "99999999999"],
        "--tokens -1: must be from 0 to": [str(released), run, "--tokens", "-1"],
        "file: is a file": [str(released), str(tmp_path / "file")],
        "file/run: Not a directory": [str(released), str(tmp_path / "file" / "run")],
    }


def test_an_import_that_fails_is_one_line_and_leaves_nothing(
    released: Path, shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = broken_imports(released, shared_data, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for said, arguments in commands.items():
        assert main(["import", *arguments]) == 2
        [line] = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("fineline: ") and said in line, line
        assert sorted(tmp_path.rglob("*")) == before, said


def test_an_import_that_fails_leaves_a_run_as_it_was(
    released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    convert.import_checkpoint(released, run, make_mesh())
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    other = tmp_path / "other"
    shutil.copytree(released, other)
    state = json.loads((other / "tokenizer.json").read_text())
    state["model"]["merges"].pop()
    (other / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match=r"other: is not the tokenizer of the run, .*import into another"):
        convert.import_checkpoint(other, run, make_mesh(), step=50)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device", str(run))

    monkeypatch.setattr(convert.CheckpointStore, "maybe_save", full)
    for folder in (run, tmp_path / "new"):
        with pytest.raises(OSError, match="No space left"):
            convert.import_checkpoint(released, folder, make_mesh(), step=50)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "new").exists()


def test_a_value_beyond_float16_is_refused_on_export(tmp_path: Path) -> None:
    params = random_params(SMALL, make_mesh())
    params["norm"] = jax.device_put(np.full(32, 1e6, np.float32), params["norm"].sharding)
    with pytest.raises(UserError, match=r"tensor model.norm.weight has values beyond the range of float16"):
        huggingface.export_hf(SMALL, params, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


# What is read, and how much memory that takes


def test_a_device_reads_only_the_ranges_of_its_shard(released: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight devices, and every byte of the files is read once."""
    touched: list[tuple[str, int]] = []  # several threads read
    original = StoredTensor.__getitem__

    def counting(self: StoredTensor, index: Any) -> np.ndarray:
        part = original(self, index)
        touched.append((self.name, part.nbytes))
        return part

    monkeypatch.setattr(StoredTensor, "__getitem__", counting)
    mesh = make_mesh(MeshShape(1, 8, 1))
    huggingface.load_hf(released, mesh)
    for name, tensor in open_weights(released).tensors.items():
        read = sum(size for touching, size in touched if touching == name)
        assert read == tensor.nbytes, "all shards together read every byte once"


MEASURE = """
import json, resource, sys, threading, time
from pathlib import Path
import jax, jax.numpy as jnp
from fineline_jax.checkpoints.formats import huggingface as hub
from fineline_jax.mesh import make_mesh
mesh = make_mesh()
jax.block_until_ready(jax.device_put(jnp.zeros(8)))
hub.load_hf(Path(sys.argv[1]), mesh, jnp.float32)  # what is imported and compiled once
def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now
config, params = hub.load_hf(Path(sys.argv[2]), mesh, jnp.float32)
print(json.dumps([status("VmHWM") - before, sum(leaf.nbytes for leaf in jax.tree.leaves(params))]))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_loading_takes_the_parameters_and_little_more(tmp_path: Path) -> None:
    """Beside the parameters, less than 1.3 times the largest tensor of the files is in memory."""
    warm = dataclasses.replace(SMALL, vocab_size=64)
    config = ModelConfig(vocab_size=40_000, width=512, layers=12, heads=8, mlp_width=1536, context=64)
    one = make_mesh(MeshShape(), jax.devices()[:1])
    for name, model in (("warm", warm), ("large", config)):
        params = jax.tree.map(
            lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype)),
            huggingface.decoder.abstract_params(model, one),
        )
        huggingface.export_hf(model, params, tmp_path / name, dtype="float16", shard_bytes=30_000_000)
    largest = 40_000 * 512 * 2
    code = [sys.executable, "-c", MEASURE, str(tmp_path / "warm"), str(tmp_path / "large")]
    environment = os.environ | {"XLA_FLAGS": "", "MALLOC_ARENA_MAX": "1"}
    output = subprocess.run(code, env=environment, cwd=Path(__file__).parents[2], check=True, capture_output=True)
    peak, shards = json.loads(output.stdout)
    assert shards == config.parameters * 4
    assert peak < shards + 1.3 * largest, f"{(peak - shards) / largest:.2f} of the largest tensor beside the shards"


PROCESS = """
import json, sys
from pathlib import Path
import jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
import jax.numpy as jnp
from fineline_jax.checkpoints.formats import huggingface as hub
from fineline_jax.checkpoints.formats.lazy_tensor import StoredTensor
from fineline_jax.mesh import make_mesh
from fineline_jax.recipe import MeshShape
mesh = make_mesh(MeshShape(1, 2, 1))
hub.load_hf(Path(sys.argv[3]), mesh)
read, original = {}, StoredTensor.__getitem__
def counting(self, index):
    part = original(self, index)
    read[self.name] = read.get(self.name, 0) + part.nbytes
    return part
def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
StoredTensor.__getitem__ = counting
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
config, params = hub.load_hf(Path(sys.argv[4]), mesh)
peak = status("VmHWM") - before
local = sum(shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards)
print(json.dumps({"peak": peak, "local": local, "read": read}))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_each_of_two_processes_reads_and_holds_its_own_half(tmp_path: Path) -> None:
    """No process reads what only the other one needs; beside its shards, less than 1.3 of the largest tensor."""
    warm = dataclasses.replace(SMALL, vocab_size=64)
    config = ModelConfig(vocab_size=40_000, width=512, layers=4, heads=8, mlp_width=1536, context=64)
    one = make_mesh(MeshShape(), jax.devices()[:1])
    for name, model in (("warm", warm), ("large", config)):
        params = jax.tree.map(
            lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype)),
            huggingface.decoder.abstract_params(model, one),
        )
        huggingface.export_hf(model, params, tmp_path / name, dtype="float16", shard_bytes=30_000_000)
    environment = os.environ | {"XLA_FLAGS": "", "MALLOC_ARENA_MAX": "1"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    folders = [str(tmp_path / "warm"), str(tmp_path / "large")]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, address, str(index), *folders],
            env=environment, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], [error[-2000:] for _, error in outputs]
    found = [json.loads(output.splitlines()[-1]) for output, _ in outputs]
    largest = 40_000 * 512 * 2
    tensors = open_weights(tmp_path / "large").tensors
    for one_process in found:
        for name, tensor in tensors.items():
            share = 1 if len(tensor.shape) == 1 else 2  # norms are on all devices
            assert one_process["read"][name] == tensor.nbytes / share, name
        assert one_process["local"] < 0.51 * config.parameters * 4
        assert one_process["peak"] < one_process["local"] + 1.3 * largest


def test_training_goes_on_from_imported_weights(tmp_path: Path) -> None:
    """With a recipe, `fineline pretrain RUN` starts at the imported step with the imported weights."""
    from fineline_jax.data.corpora import prepare_amber
    from fineline_jax.recipe import (
        Batch,
        Checkpoints,
        Compute,
        Data,
        Logging,
        Optimizer,
        Recipe,
        Schedule,
        Source,
        to_json,
    )
    from fineline_jax.training.metrics import read_metrics

    rows = np.random.default_rng(0).integers(0, 48, (40, 9)).tolist()
    (tmp_path / "tokens.jsonl").write_text("".join(json.dumps({"token_ids": row}) + "\n" for row in rows))
    prepare_amber([tmp_path / "tokens.jsonl"], tmp_path / "data", vocab_size=48, sequence_length=8)
    recipe = Recipe(
        name="goes-on",
        model=SMALL,
        data=Data((Source(str(tmp_path / "data")),), sequence_length=8),
        batch=Batch(8),
        optimizer=Optimizer(Schedule(peak=1e-9, final=0.0)),
        tokens=4 * 64,
        checkpoints=Checkpoints(initial=False),
        compute=Compute(dtype="float32", remat="none"),
        logging=Logging(tensorboard=False),
    )
    (tmp_path / "recipe.json").write_text(to_json(recipe))
    huggingface.export_hf(SMALL, random_params(SMALL, make_mesh()), tmp_path / "hf")
    run = tmp_path / "run"
    command = ["import", str(tmp_path / "hf"), str(run), "--step", "2", "--tokens", "128"]
    assert main([*command, "--recipe", str(tmp_path / "recipe.json")]) == 0
    assert main(["pretrain", str(run), "--run", str(run)]) == 0
    assert [(c.step, c.tokens) for c in open_series(str(run)).checkpoints] == [(2, 128), (4, 256)]
    assert [line["step"] for line in read_metrics(run) if "loss" in line] == [3, 4]
    before, after = (load.load(c, make_mesh())[1] for c in open_series(str(run)).checkpoints)
    for one, other in zip(jax.tree.leaves(before), jax.tree.leaves(after)):
        assert np.abs(np.asarray(one) - np.asarray(other)).max() < 1e-6
