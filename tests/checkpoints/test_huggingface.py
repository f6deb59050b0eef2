"""Hugging Face folders: transformers and golden values are the oracles."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from model_examples import SMALL, logits, random_params
from profiles import COMPILES
from safetensors.numpy import load_file, save_file
from scoring_examples import write_tokenizer

from fineline_jax.checkpoints.formats import huggingface
from fineline_jax.errors import UserError
from fineline_jax.mesh import make_mesh
from fineline_jax.models import decoder
from fineline_jax.models.config import ModelConfig
from fineline_jax.models.families.llama import LLAMA
from fineline_jax.recipe import MeshShape
from fineline_jax.tokenizers.open import UnreadableTokenizer, open_tokenizer


def mesh_of(replica: int, fsdp: int, tensor: int) -> jax.sharding.Mesh:
    return make_mesh(MeshShape(replica, fsdp, tensor), jax.devices()[: replica * fsdp * tensor])


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


HF_VARIANTS = {
    "grouped queries": {"num_key_value_heads": 2},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "wide heads, other theta": {
        "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    },
}


def hf_model(folder: Path, **changes: Any) -> Any:
    torch = pytest.importorskip("torch", reason="pip install -e '.[test]'")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": 48,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
    }
    model = LlamaForCausalLM(LlamaConfig(**(shape | changes))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases start as constants, which would hide a mistake
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def hf_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    torch = pytest.importorskip("torch", reason="pip install -e '.[test]'")
    with torch.no_grad():
        return model(torch.asarray(tokens, dtype=torch.long)).logits.float().numpy()


@pytest.mark.parametrize("variant", HF_VARIANTS)
def test_an_imported_model_gives_the_logits_of_transformers(tmp_path: Path, variant: str) -> None:
    model = hf_model(tmp_path / "hf", **HF_VARIANTS[variant])
    mesh = mesh_of(1, 2, 2)
    config, params = huggingface.load_hf(tmp_path / "hf", mesh)
    tokens = np.random.default_rng(1).integers(0, 48, (2, 20), dtype=np.int32)
    difference = np.abs(logits(config, params, tokens, mesh) - hf_logits(model, tokens)).max()
    assert difference < 1e-4
    assert params["layers"]["q"].sharding == decoder.abstract_params(config, mesh)["layers"]["q"].sharding


@pytest.mark.parametrize("variant", HF_VARIANTS)
def test_an_exported_model_has_the_same_tensors_and_logits_in_transformers(tmp_path: Path, variant: str) -> None:
    model = hf_model(tmp_path / "hf", **HF_VARIANTS[variant])
    from transformers import LlamaForCausalLM

    config, params = huggingface.load_hf(tmp_path / "hf", mesh_of(1, 4, 1))
    huggingface.export_hf(config, params, tmp_path / "out")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "out"))
    assert before.keys() == after.keys()
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)
    reread = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokens = np.random.default_rng(1).integers(0, 48, (2, 20), dtype=np.int32)
    assert np.array_equal(hf_logits(reread, tokens), hf_logits(model, tokens))


@settings(parent=COMPILES, max_examples=8)
@example(shape=(2, 2, 2), tied=True, biases=False, bfloat16=True, shard_bytes=1000)
@example(shape=(1, 8, 1), tied=False, biases=True, bfloat16=False, shard_bytes=10**9)
@given(
    shape=st.sampled_from([(1, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4), (4, 1, 2)]),
    tied=st.booleans(),
    biases=st.booleans(),
    bfloat16=st.booleans(),
    shard_bytes=st.sampled_from([1000, 4000, 10**9]),
)
def test_export_then_import_returns_the_same_bits_on_any_mesh(
    tmp_path_factory: pytest.TempPathFactory,
    shape: tuple[int, int, int],
    tied: bool,
    biases: bool,
    bfloat16: bool,
    shard_bytes: int,
) -> None:
    config = ModelConfig(
        vocab_size=16,
        width=16,
        layers=2,
        heads=4,
        kv_heads=4,
        mlp_width=24,
        tied_embeddings=tied,
        attention_bias=biases,
        mlp_bias=biases,
    )
    dtype = jnp.bfloat16 if bfloat16 else jnp.float32
    params = random_params(config, mesh_of(1, 8, 1), dtype)
    out = tmp_path_factory.mktemp("export") / "hf"
    huggingface.export_hf(config, params, out, shard_bytes=shard_bytes)
    assert (len(list(out.glob("*.safetensors"))) > 1) == (shard_bytes < 10**9)
    found, again = huggingface.load_hf(out, mesh_of(*shape), dtype)
    assert found == config
    assert jax.tree.structure(again) == jax.tree.structure(params)
    assert bits(again) == bits(params)


def test_a_cast_on_import_rounds_to_nearest_even(tmp_path: Path) -> None:
    mesh = mesh_of(1, 2, 1)
    params = random_params(SMALL, mesh)
    huggingface.export_hf(SMALL, params, tmp_path / "hf")
    _, narrow = huggingface.load_hf(tmp_path / "hf", mesh, jnp.bfloat16)
    assert bits(narrow) == bits(jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))


@pytest.mark.parametrize(("stored", "wanted"), [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", None)])
def test_devices_that_transpose_and_cast_place_the_bits_that_the_host_places(
    tmp_path: Path, monkeypatch: Any, stored: str, wanted: str | None
) -> None:
    """The way of a GPU, here on CPU devices; what the host places is compared with what was exported above."""
    mesh = mesh_of(2, 2, 2)
    huggingface.export_hf(SMALL, random_params(SMALL, mesh), tmp_path / "hf", dtype=stored)
    _, host = huggingface.load_hf(tmp_path / "hf", mesh, wanted)
    monkeypatch.setattr(huggingface, "TRANSPOSING", ("cpu",))
    moved = set()
    placing = huggingface._placing
    watched = lambda *how: lambda array: moved.add((array.shape, str(array.dtype))) or placing(*how)(array)
    monkeypatch.setattr(huggingface, "_placing", watched)
    with jax.set_mesh(mesh):
        _, device = huggingface.load_hf(tmp_path / "hf", mesh, wanted)
    assert bits(device) == bits(host)
    assert jax.tree.map(lambda leaf: leaf.sharding, device) == jax.tree.map(lambda leaf: leaf.sharding, host)
    gate = (SMALL.layers, SMALL.mlp_width, SMALL.width)
    assert (gate, "bfloat16" if "bfloat16" in (stored, wanted) else stored) in moved, "[out, in], as in the file"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "phi3", "mamba"])
def test_devices_place_fused_projections_and_other_layouts_too(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip("torch", reason="pip install -e '.[test]'")
    import model_types

    model_types.make(name, tmp_path / "hf")
    mesh = mesh_of(1, 2, 2)
    _, host = huggingface.load_hf(tmp_path / "hf", mesh, jnp.bfloat16)
    monkeypatch.setattr(huggingface, "TRANSPOSING", ("cpu",))
    assert bits(huggingface.load_hf(tmp_path / "hf", mesh, jnp.bfloat16)[1]) == bits(host)


def test_a_released_model_gives_its_golden_log_probabilities(shared_data: Path) -> None:
    folder = shared_data / "models" / "tinystories-260k"
    golden = json.loads((folder / "golden.json").read_text())
    mesh = mesh_of(1, 4, 2)
    config, params = huggingface.load_hf(folder, mesh)
    items = [item for item in golden["items"] if len(item["ids"]) > 1]
    longest = max(len(item["ids"]) for item in items)
    tokens = np.zeros((-(-len(items) // 4) * 4, longest), np.int32)
    for row, item in enumerate(items):
        tokens[row, : len(item["ids"])] = item["ids"]
    scores = jax.nn.log_softmax(logits(config, params, tokens, mesh), axis=-1)
    for row, item in enumerate(items):
        ids = np.asarray(item["ids"])
        found = np.asarray(scores[row])[np.arange(len(ids) - 1), ids[1:]]
        assert np.abs(found - np.asarray(item["logprobs"])).max() < 1e-3


def test_both_generations_of_config_files_mean_the_same(tmp_path: Path) -> None:
    huggingface.export_hf(SMALL, random_params(SMALL, mesh_of(1, 1, 1)), tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    raw = json.loads(path.read_text())
    for dropped in ("rope_theta", "rope_parameters"):
        path.write_text(json.dumps({key: value for key, value in raw.items() if key != dropped}))
        assert huggingface.config_from_hf(path) == SMALL
    openllama = raw | {"max_sequence_length": 64}
    for key in (
        "num_key_value_heads",
        "head_dim",
        "rope_parameters",
        "attention_bias",
        "max_position_embeddings",
    ):
        openllama.pop(key)
    path.write_text(json.dumps(openllama))
    config = huggingface.config_from_hf(path)
    assert (config.kv_heads, config.head_dim, config.rope_theta, config.context) == (4, 8, 10_000.0, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["T5ForConditionalGeneration"]}, "T5ForConditionalGeneration is not known"),
        ({"rope_scaling": {"type": "spiral", "factor": 2.0}}, "rope_scaling: 'spiral'"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 5e5}}, "rope_parameters: 'spiral'"),
        ({"hidden_act": "tanh"}, "hidden_act='tanh'"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor=0.5",
        ),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_size": None}, "hidden_size is missing"),
    ],
)
def test_a_model_the_decoder_does_not_compute_is_refused_by_name(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(huggingface._hf_config(LLAMA, SMALL, np.dtype("float32")) | change))
    with pytest.raises(UserError, match=message) as error:
        huggingface.config_from_hf(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "hf"
    huggingface.export_hf(SMALL, random_params(SMALL, mesh_of(1, 1, 1)), folder)
    return folder


def test_wrong_weight_files_are_named(exported: Path, tmp_path: Path) -> None:
    tensors = load_file(exported / "model.safetensors")
    gate = "model.layers.1.mlp.gate_proj.weight"
    cases = {
        "tensor model.layers.1.mlp.gate_proj.weight is missing": {k: v for k, v in tensors.items() if k != gate},
        "tensor model.layers.7.extra is not part of the model": tensors | {"model.layers.7.extra": tensors[gate]},
        rf"tensor {gate} has shape \[32, 40\], config.json means \[40, 32\]": tensors
        | {gate: np.ascontiguousarray(tensors[gate].T)},
    }
    for number, (message, content) in enumerate(cases.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        shutil.copy(exported / "config.json", folder)
        save_file(content, folder / "model.safetensors")
        with pytest.raises(UserError, match=message):
            huggingface.load_hf(folder, mesh_of(1, 1, 1))


def test_a_config_that_means_a_thousand_million_layers_is_refused_at_once(exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path / "hf")
    config = json.loads((exported / "config.json").read_bytes()) | {"num_hidden_layers": 10**9}
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"holds \d+ tensors, config\.json means 1000000000 like model"):
        huggingface.load_hf(tmp_path / "hf", mesh_of(1, 1, 1))


@pytest.mark.parametrize(
    ("file", "content"),
    [("tokenizer.json", b"{}"), ("tokenizer.json", b"\xff"), ("tokenizer_config.json", b"[1]"),
     ("tokenizer_config.json", b"\xff{")],
)  # fmt: skip
def test_a_broken_tokenizer_is_named(tmp_path: Path, file: str, content: bytes) -> None:
    folder = write_tokenizer(tmp_path / "tokenizer", adds_bos=True)
    (folder / file).write_bytes(content)
    with pytest.raises(UnreadableTokenizer, match=file.replace(".", r"\.")):
        open_tokenizer(folder)


def test_rotary_frequencies_in_old_files_are_ignored(exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path / "hf")
    tensors = load_file(exported / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    huggingface.load_hf(tmp_path / "hf", mesh_of(1, 1, 1))


def test_a_cut_weight_file_is_named(exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path / "hf")
    weights = tmp_path / "hf" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model.safetensors: not a whole safetensors file"):
        huggingface.load_hf(tmp_path / "hf", mesh_of(1, 1, 1))


def test_an_export_brings_its_tokenizer_and_never_overwrites(shared_data: Path, tmp_path: Path) -> None:
    params = random_params(SMALL, mesh_of(1, 1, 1))
    tokenizer = shared_data / "models" / "tinystories-260k"
    huggingface.export_hf(SMALL, params, tmp_path / "hf", tokenizer)
    assert (tmp_path / "hf" / "tokenizer.json").read_bytes() == (tokenizer / "tokenizer.json").read_bytes()
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    with pytest.raises(UserError, match="exists already"):
        huggingface.export_hf(SMALL, params, tmp_path / "hf")
    with pytest.raises(UserError, match="no tokenizer; give a folder"):
        huggingface.export_hf(SMALL, params, tmp_path / "other", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"], "a failed export leaves nothing"
