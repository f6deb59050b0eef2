"""GPT-NeoX's layer files: cut here from transformers' model, as convert_neox_to_hf.py joins them."""

from pathlib import Path
from typing import Any

import family_examples
import jax
import numpy as np
import pytest

from fineline_jax.checkpoints.formats import huggingface
from fineline_jax.checkpoints.formats.weight_files import open_weights, preferred_names, weight_files
from fineline_jax.errors import UserError
from fineline_jax.mesh import make_mesh
from fineline_jax.recipe import MeshShape

ROWS = ("attention.query_key_value.weight", "attention.query_key_value.bias", "mlp.dense_h_to_4h.weight",
        "mlp.dense_h_to_4h.bias")  # fmt: skip
COLUMNS = ("attention.dense.weight", "mlp.dense_4h_to_h.weight")
ADDED = ("attention.dense.bias", "mlp.dense_4h_to_h.bias")
NORMS = [f"{name}.{part}" for name in ("input_layernorm", "post_attention_layernorm") for part in ("weight", "bias")]


def cut(model: Any, folder: Path, ranks: int) -> None:
    """Write the layers of transformers' GPT-NeoX, a file for each layer and rank."""
    torch = pytest.importorskip("torch", reason="pip install -e '.[test]'")
    state, layers = model.state_dict(), model.config.num_hidden_layers
    folder.mkdir(exist_ok=True)
    for rank in range(ranks):
        part = lambda tensor, axis, rank=rank: tensor.chunk(ranks, axis)[rank].clone()
        content: dict[int, dict[str, Any]] = {
            0: {"word_embeddings.weight": part(state["gpt_neox.embed_in.weight"], 0)},
            layers + 3: {f"norm.{one}": state[f"gpt_neox.final_layer_norm.{one}"] for one in ("weight", "bias")},
            layers + 4: {"final_linear.weight": part(model.get_output_embeddings().weight.detach(), 0)},
        }
        for layer in range(layers):
            of = lambda name, layer=layer: state[f"gpt_neox.layers.{layer}.{name}"]
            content[layer + 2] = {name: part(of(name), 0) for name in ROWS}
            content[layer + 2] |= {name: part(of(name), 1) for name in COLUMNS}
            content[layer + 2] |= {name: of(name) / ranks for name in ADDED}
            content[layer + 2] |= {name: of(name) for name in NORMS}
            content[layer + 2]["attention.rotary_emb.inv_freq"] = torch.ones(4)
        for number, tensors in content.items():
            torch.save(tensors, folder / f"layer_{number:02}-model_{rank:02}-model_states.pt")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("neox") / "hf"
    return family_examples.make("gpt_neox", folder), folder


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_layers_of_all_ranks_are_the_tensors_of_hugging_face(
    model: tuple[Any, Path], tmp_path: Path, ranks: int
) -> None:
    cut(model[0], tmp_path, ranks)
    (tmp_path / "mp_rank_00_model_states.pt").write_bytes(b"the optimizer's")
    (tmp_path / "config.json").write_bytes((model[1] / "config.json").read_bytes())
    assert len(weight_files(tmp_path)) == 5 * ranks  # embedding, two layers, norm, head
    names = [path.name for path in tmp_path.iterdir()]
    assert preferred_names(names) == {name for name in names if name.startswith("layer_")}
    mesh = make_mesh(MeshShape(1, 2, 4), jax.devices())
    config, params = huggingface.load_hf(tmp_path, mesh)
    _, expected = huggingface.load_hf(model[1], mesh)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    tokens = np.arange(12, dtype=np.int32)[None].repeat(2, 0)
    ours = family_examples.our_logits(config, params, tokens, mesh)
    assert np.abs(ours - family_examples.their_logits(model[0], tokens)).max() < 1e-4


def test_norms_are_averaged_and_a_part_is_read_alone(model: tuple[Any, Path], tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="pip install -e '.[test]'")
    cut(model[0], tmp_path, 2)
    file = tmp_path / "layer_02-model_01-model_states.pt"
    other = torch.load(file)
    torch.save(other | {"input_layernorm.bias": other["input_layernorm.bias"] + 1}, file)
    found = open_weights(tmp_path).tensors
    expected = model[0].state_dict()["gpt_neox.layers.0.input_layernorm.bias"].numpy() + 0.5
    np.testing.assert_allclose(found["gpt_neox.layers.0.input_layernorm.bias"].whole(), expected, atol=1e-6)
    qkv = model[0].state_dict()["gpt_neox.layers.1.attention.query_key_value.weight"].numpy()
    part = (slice(40, 60), slice(3, 9))  # in both ranks
    assert np.array_equal(found["gpt_neox.layers.1.attention.query_key_value.weight"][part], qkv[part])


def test_a_lost_or_strange_file_is_named_in_one_line(model: tuple[Any, Path], tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="pip install -e '.[test]'")
    file = tmp_path / "layer_03-model_01-model_states.pt"

    def refused(message: str) -> None:
        with pytest.raises(UserError, match=message) as error:
            open_weights(tmp_path)
        assert "\n" not in str(error.value)

    cut(model[0], tmp_path, 2)
    content = torch.load(file)
    file.unlink()
    refused(r"layer_03-model_01-model_states\.pt: missing; other layers have 2 ranks")
    torch.save({name: tensor for name, tensor in content.items() if "dense.bias" not in name}, file)
    refused(r"tensor attention\.dense\.bias of layer 3 is not in all ranks")
    torch.save(content | {"attention.dense.bias": torch.ones(3)}, file)
    refused(r"layer_03-model_01-model_states\.pt: tensor attention\.dense\.bias has another shape")
    for rank in range(2):
        torch.save(content | {"mlp.w1.weight": torch.ones(3, 3)}, file.with_name(file.name.replace("_01", f"_0{rank}")))
    refused(r"tensor mlp\.w1\.weight is of no GPT-NeoX model")
