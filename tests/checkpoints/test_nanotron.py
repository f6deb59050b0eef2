"""nanotron's folders: written here from transformers' Llama as its serialize/weights.py writes them."""

import json
from pathlib import Path
from typing import Any

import family_examples
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fineline_jax.checkpoints.formats.weight_files import open_weights, weight_files
from fineline_jax.errors import UserError
from fineline_jax.mesh import make_mesh
from fineline_jax.recipe import MeshShape

OUTSIDE = {
    "model.embed_tokens.weight": ("token_position_embeddings.pp_block.token_embedding", (0, None)),
    "lm_head.weight": ("lm_head.pp_block", (0, None)),
    "model.norm.weight": ("final_layer_norm.pp_block", None),
}
"""Name of the module in nanotron; the axis that is split and the sizes of what lies one behind the other on it."""


def pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of halves as interleaved pairs."""
    return rows.reshape(heads, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def write(hf: Path, folder: Path, ranks: int, interleaved: bool = False) -> None:
    tensors, raw = load_file(hf / "model.safetensors"), json.loads((hf / "config.json").read_text())
    modules: dict[str, tuple[np.ndarray, Any]] = {of: (tensors[name], how) for name, (of, how) in OUTSIDE.items()}
    turn = pairs if interleaved else lambda rows, heads: rows
    for layer in range(2):
        of = lambda name, layer=layer: tensors[f"model.layers.{layer}.{name}.weight"]
        q, k = turn(of("self_attn.q_proj"), 4), turn(of("self_attn.k_proj"), 2)
        block = f"decoder.{layer}.pp_block."
        modules |= {
            block + "attn.qkv_proj": (np.concatenate([q, k, of("self_attn.v_proj")]), (0, (32, 16, 16))),
            block + "mlp.gate_up_proj": (np.concatenate([of("mlp.gate_proj"), of("mlp.up_proj")]), (0, (40, 40))),
            block + "attn.o_proj": (of("self_attn.o_proj"), (1, None)),
            block + "mlp.down_proj": (of("mlp.down_proj"), (1, None)),
            block + "input_layernorm": (of("input_layernorm"), None),
            block + "post_attention_layernorm": (of("post_attention_layernorm"), None),
        }
    for module, (tensor, how) in modules.items():
        place = folder / "model" / "model" / Path(*module.split("."))
        place.mkdir(parents=True)
        if how is None:
            save_file({"data": tensor}, place / "model_weight.safetensors")
            continue
        axis, chunks = how
        for rank in range(ranks):
            local, parts, described = 0, [], []
            start = 0
            for size in chunks or (tensor.shape[axis],):
                share = size // ranks
                span = (start + rank * share, start + (rank + 1) * share)
                parts.append(np.take(tensor, range(*span), axis))
                texts = [["None,None,None"] * 2, ["None,None,None"] * 2]
                texts[0][axis], texts[1][axis] = f"{local},{local + share},None", f"{span[0]},{span[1]},None"
                described.append("#".join("|".join(text) for text in texts))
                local, start = local + share, start + size
            about = {"version": "1.4", "local_global_slices_pairs": ";".join(described)}
            about["unsharded_shape"] = str(tuple(tensor.shape))
            name = f"model_weight_pp-rank-0-of-1_tp-rank-{rank}-of-{ranks}.safetensors"
            save_file({"data": np.ascontiguousarray(np.concatenate(parts, axis))}, place / name, about)
    (folder / "checkpoint_metadata.json").write_text(json.dumps({"version": "1.4", "tp": ranks, "dp": 1}))
    keys = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size"
    keys += " max_position_embeddings rms_norm_eps hidden_act initializer_range tie_word_embeddings"
    known = {key: raw[key] for key in keys.split()} | {"rope_theta": 10_000.0, "rope_scaling": None}
    about = known | {"is_llama_config": True, "rope_interleaved": interleaved, "pretraining_tp": 1}
    (folder / "model_config.json").write_text(json.dumps(about))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("nanotron") / "hf"
    return family_examples.make("llama", folder), folder


@pytest.mark.parametrize(("ranks", "interleaved"), [(1, False), (2, False), (2, True)])
def test_a_folder_alone_is_the_model_of_hugging_face(
    model: tuple[Any, Path], tmp_path: Path, ranks: int, interleaved: bool
) -> None:
    write(model[1], tmp_path / "5000", ranks, interleaved)
    (tmp_path / "5000" / "optimizer").mkdir()
    save_file({"x": np.ones(2)}, tmp_path / "5000" / "optimizer" / "optimizer_exp_avg.safetensors")
    assert len(weight_files(tmp_path / "5000")) == 2 + 5 + ranks * 10  # two JSON files, norms, what is split
    family_examples.assert_is_the_model(tmp_path / "5000", model, make_mesh(MeshShape(1, 4, 2), jax.devices()))


def test_what_is_lost_damaged_or_no_llama_is_refused_in_one_line(model: tuple[Any, Path], tmp_path: Path) -> None:
    write(model[1], tmp_path, 2)
    place = tmp_path / "model/model/decoder/1/pp_block/attn/qkv_proj"
    file = place / "model_weight_pp-rank-0-of-1_tp-rank-1-of-2.safetensors"
    whole, data = file.read_bytes(), load_file(file)

    def refused(message: str) -> None:
        with pytest.raises(UserError, match=message) as error:
            open_weights(tmp_path)
        assert "\n" not in str(error.value)

    file.unlink()
    refused(r"qkv_proj: tensor model\.decoder\.1\.pp_block\.attn\.qkv_proj\.weight is not covered once")
    step, half = "0,8,2|None,None,None", "0,8,None|None,None,None"
    for said, shape, message in (
        (f"{step}#{step}", "(64, 32)", "box"),
        (half, "(64, 32)", "do not say which box"),
        ("0,8,None#0,9,None", "(64,)", "do not say which box"),
    ):
        metadata = {"local_global_slices_pairs": said, "unsharded_shape": shape}
        save_file(data, file, metadata)
        refused(rf"tp-rank-1-of-2\.safetensors: .*{message}")
    save_file({"other": data["data"]}, file)
    refused(r"holds no tensor 'data'")
    file.write_bytes(whole[:-1])
    refused("cut short")
    file.write_bytes(whole)
    expert = place / "model_weight_pp-rank-0-of-1_tp-rank-0-of-2_exp-rank-0-of-2.safetensors"
    expert.write_bytes(whole)
    refused("is no part of a dense model")
    expert.unlink()
    for content, message in ((b"{}", "is_llama_config is not true"), (b"{", "not valid JSON")):
        (tmp_path / "model_config.json").write_bytes(content)
        refused(rf"model_config\.json: {message}")
    (tmp_path / "model_config.json").unlink()
    refused(r"model_config\.json: .*fetch it")
