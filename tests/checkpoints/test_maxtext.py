"""MaxText's checkpoints: Orbax writes them here from transformers' Llama, as MaxText's converters lay it out
(utils/ckpt_scripts/llama_or_mistral_ckpt.py and, back to Hugging Face, llama_mistral_mixtral_orbax_to_hf.py)."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import family_examples
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import yaml
from safetensors.numpy import load_file

from fineline_jax.checkpoints.formats import huggingface
from fineline_jax.checkpoints.formats.trainers.maxtext import config_of
from fineline_jax.checkpoints.formats.weight_files import open_weights, preferred_names
from fineline_jax.checkpoints.load import config_of as model_of
from fineline_jax.checkpoints.open import open_series
from fineline_jax.errors import UserError
from fineline_jax.mesh import make_mesh
from fineline_jax.recipe import MeshShape

HEADS, SIZE = 4, 8
SETTINGS = {
    "emb_dim": 32, "mlp_dim": 40, "num_decoder_layers": 2, "num_query_heads": HEADS, "num_kv_heads": 2,
    "head_dim": SIZE, "vocab_size": 48, "max_target_length": 64, "normalization_layer_epsilon": 1e-5,
    "rope_max_timescale": 10_000, "rope_type": "default", "model_name": "default", "decoder_block": "llama2",
    "mlp_activations": ["silu", "linear"], "logits_via_embedding": False, "normalize_embedding_logits": True,
    "param_scan_axis": 1, "logical_axis_rules": ((("activation_batch", ("data",)),)),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path]]:
    """A Llama 2 and a Llama 3.1, whose rotary frequencies are scaled."""
    folder = tmp_path_factory.mktemp("hf")
    scaling = {
        "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    shape = family_examples.SHAPE | {"num_key_value_heads": 2, "rms_norm_eps": 1e-5}
    keys = {"llama2": shape, "llama3.1": shape | {"rope_parameters": scaling}}
    return {name: (family_examples.make_kind("Llama", one, folder / name), folder / name) for name, one in keys.items()}


def params(hf: Path, pairs: bool) -> dict[str, Any]:
    """MaxText's parameters of each layer, and those outside of them."""
    tensors = load_file(hf / "model.safetensors")

    def of_layer(layer: int) -> dict[str, Any]:
        of = lambda name: tensors[f"model.layers.{layer}.{name}.weight"]
        split = lambda name: of(f"self_attn.{name}_proj").T.reshape(32, -1, SIZE)

        def turned(heads: np.ndarray) -> np.ndarray:
            """Features j and j + 4 of a head at 2 j and 2 j + 1 (permute_to_match_maxtext_rope of max_utils.py)."""
            made = heads.copy()
            made[..., ::2], made[..., 1::2] = heads[..., : SIZE // 2], heads[..., SIZE // 2 :]
            return made if pairs else heads

        return {
            "self_attention": {
                "query": {"kernel": (turned(split("q")) / np.float32(math.sqrt(SIZE))).astype(np.float32)},
                "key": {"kernel": turned(split("k"))},
                "value": {"kernel": split("v")},
                "out": {"kernel": of("self_attn.o_proj").T.reshape(HEADS, SIZE, 32)},
            },
            "mlp": {
                "wi_0": {"kernel": of("mlp.gate_proj").T},
                "wi_1": {"kernel": of("mlp.up_proj").T},
                "wo": {"kernel": of("mlp.down_proj").T},
            },
            "pre_self_attention_layer_norm": {"scale": of("input_layernorm")},
            "post_self_attention_layer_norm": {"scale": of("post_attention_layernorm")},
        }

    return {
        "layers": [of_layer(0), of_layer(1)],
        "embedding": tensors["model.embed_tokens.weight"],
        "norm": tensors["model.norm.weight"],
        "head": tensors["lm_head.weight"].T,
    }


def write(
    hf: Path, run: Path, scanned: int | None = 1, pairs: bool = False, dtype: Any = np.float32, **how: Any
) -> Path:
    """Steps 5 and 10 of a run. scanned: the axis of the layers; None: each has a name. how: of Orbax."""
    found = params(hf, pairs)
    decoder = {"decoder_norm": {"scale": found["norm"]}, "logits_dense": {"kernel": found["head"]}}
    if scanned is None:
        decoder |= {f"layers_{number}": layer for number, layer in enumerate(found["layers"])}
    else:
        decoder["layers"] = jax.tree.map(lambda *layers: np.stack(layers, scanned), *found["layers"])
    tree = {"token_embedder": {"embedding": found["embedding"]}, "decoder": decoder}
    tree = jax.tree.map(lambda one: jax.numpy.asarray(one, dtype), tree)
    state = {"step": jax.numpy.int32(5), "params": {"params": tree}, "opt_state": {"mu": {"params": tree}}}
    handlers = {"items": ocp.PyTreeCheckpointHandler(**how)}
    with ocp.CheckpointManager(run / "checkpoints", item_names=("items",), item_handlers=handlers) as manager:
        for step in (5, 10):
            manager.save(step, args=ocp.args.Composite(items=ocp.args.PyTreeSave(state)))
    return run / "checkpoints" / "10"


def settings(run: Path, **changes: Any) -> None:
    (run / "config.yml").write_text(yaml.dump(SETTINGS | changes))


def check(folder: Path, model: tuple[Any, Path]) -> None:
    mesh = make_mesh(MeshShape(1, 1, 2), jax.devices()[:2])
    config, found = huggingface.load_hf(folder, mesh)
    expected_config, expected = huggingface.load_hf(model[1], mesh)
    assert dataclasses.replace(config, init_std=expected_config.init_std) == expected_config  # MaxText has none
    query, other = found["layers"].pop("q"), expected["layers"].pop("q")
    np.testing.assert_allclose(query, other, rtol=3e-7)  # divided and multiplied by a square root: two roundings
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    found["layers"]["q"] = query
    family_examples.assert_logits(config, found, model[0], mesh)


@pytest.mark.parametrize(
    ("name", "scanned", "how"),
    [
        ("llama2", 1, {"use_zarr3": True}), ("llama2", None, {}), ("llama3.1", 0, {"use_ocdbt": False}),
    ],
)  # fmt: skip
def test_a_run_with_its_settings_is_the_model_of_transformers(
    models: Any, tmp_path: Path, name: str, scanned: int | None, how: dict[str, Any]
) -> None:
    folder = write(models[name][1], tmp_path, scanned, name == "llama3.1", **how)
    settings(tmp_path, model_name=f"{name}-8b", param_scan_axis=scanned or 0)
    check(folder, models[name])


def test_the_steps_of_a_run_are_a_series_and_a_config_json_above_them_describes_it(models: Any, tmp_path: Path) -> None:
    folder, hf = write(models["llama3.1"][1], tmp_path, pairs=True), models["llama3.1"][1]
    (tmp_path / "checkpoints" / "config.json").write_bytes((hf / "config.json").read_bytes())
    series = open_series(str(tmp_path / "checkpoints"))
    assert [(one.name, one.step, one.tokens) for one in series.checkpoints] == [("5", 5, None), ("10", 10, None)]
    assert model_of(series.checkpoints[0]) == huggingface.config_from_hf(hf / "config.json")
    check(folder, models["llama3.1"])
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert preferred_names(names) == {name for name in names if name.startswith("items/")}
    assert not any(name.startswith("opt") for name in open_weights(folder).tensors)


def test_queries_of_sixteen_bits_keep_them_only_where_their_factor_is_a_power_of_two(
    models: Any, tmp_path: Path
) -> None:
    folder = write(models["llama2"][1], tmp_path, dtype=jax.numpy.bfloat16)
    settings(tmp_path)
    found = open_weights(folder).tensors
    query, key = (found[f"decoder.layers.1.self_attention.{name}.kernel"] for name in ("query", "key"))
    assert (query.dtype.name, key.dtype.name) == ("float32", "bfloat16")  # the square root of 8 is no power of two
    stored = params(models["llama2"][1], False)["layers"][1]["self_attention"]["query"]["kernel"]
    rounded = np.asarray(jax.numpy.asarray(stored, "bfloat16"), np.float32)
    np.testing.assert_array_equal(query.whole(), rounded * np.float32(8**0.5))
    part = (slice(3, 9), slice(1, 3), slice(2, 7))
    np.testing.assert_array_equal(query[part], query.whole()[part])


def test_settings_that_are_another_model_or_lost_are_named_in_one_line(tmp_path: Path) -> None:
    step = tmp_path / "checkpoints" / "10"
    step.mkdir(parents=True)

    def refused(message: str) -> None:
        with pytest.raises(UserError, match=message) as error:
            config_of(step)
        assert "\n" not in str(error.value)

    refused("checkpoints/10: does not say what model it is; put MaxText's config.yml or a config.json there")
    for changes, said in (
        ({"decoder_block": "gemma"}, "decoder_block: 'gemma' is not read, only 'llama2'"),
        ({"logits_via_embedding": True}, "normalize_embedding_logits: True is not read"),
        ({"rope_type": "yarn"}, "rope_type: 'yarn' is not read"),
        ({"num_experts": 8}, "num_experts: 8 is not read"),
        ({"emb_dim": None}, "has no number emb_dim"),
    ):
        settings(tmp_path, **changes)
        refused(rf"config\.yml: {said}")
    (tmp_path / "config.yml").write_text("a: [")
    refused(r"config\.yml: not valid settings")
    settings(tmp_path, logits_via_embedding=True, normalize_embedding_logits=False)
    assert config_of(step)["tie_word_embeddings"] is True
    text = yaml.dump(SETTINGS).replace("decoder_block: llama2", "decoder_block: !!python/object/apply:a.B [llama2]")
    (tmp_path / "config.yml").write_text(text.replace("model_name: default", "model_name: llama3.1-8b"))
    assert config_of(step)["rope_scaling"]["factor"] == 8.0  # the class is not made, what it holds is read


@pytest.mark.parametrize("how", [{}, {"use_ocdbt": False}])
def test_lost_and_damaged_files_are_named_in_one_line(models: Any, tmp_path: Path, how: dict[str, Any]) -> None:
    folder = write(models["llama2"][1], tmp_path, **how)
    settings(tmp_path)
    name = "decoder.layers.0.mlp.wo.kernel"

    def refused(message: str) -> None:
        with pytest.raises(UserError, match=message) as error:
            open_weights(folder).tensors[name].whole()
        assert "\n" not in str(error.value)

    held = folder / "items" / "params.params.decoder.layers.mlp.wo.kernel"
    lost = held / "0.0.0" if how else next((folder / "items" / "d").iterdir())
    content = lost.read_bytes()
    for damaged in (content[: len(content) // 3], None):
        lost.unlink() if damaged is None else lost.write_bytes(damaged)
        refused(r"items/_METADATA: tensor .* beside it cannot be (read|opened) \(")
    (held / ".zarray" if how else folder / "items" / "manifest.ocdbt").unlink()
    refused(r"items/_METADATA: tensor .* beside it cannot be opened \(")
    metadata = json.loads((folder / "items" / "_METADATA").read_text())
    for about in ({}, metadata | {"tree_metadata": {"('params', 'a')": {}}}):
        (folder / "items" / "_METADATA").write_text(json.dumps(about))
        refused(r"items/_METADATA: not the metadata of an Orbax checkpoint")
