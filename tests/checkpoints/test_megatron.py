"""Megatron-LM's checkpoints: cut here with torch from transformers' Llama, Qwen and GPT-2, as Megatron Core lays them
out (tools/checkpoint/saver_core.py), and as its older code and its torch_dist do."""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import family_examples
import jax
import numpy as np
import pytest

from fineline_jax.checkpoints.formats import huggingface
from fineline_jax.checkpoints.formats.trainers import megatron
from fineline_jax.checkpoints.formats.weight_files import open_weights, preferred_names
from fineline_jax.checkpoints.load import config_of
from fineline_jax.checkpoints.open import open_series
from fineline_jax.errors import UserError
from fineline_jax.mesh import make_mesh
from fineline_jax.recipe import MeshShape

PADDED = 64
"""Rows of the embedding; the vocabulary has 48."""
SIZES = {"hidden_size": 32, "num_layers": 2, "ffn_hidden_size": 40, "num_attention_heads": 4, "seq_length": 16}
COMMON = SIZES | {"max_position_embeddings": 64, "padded_vocab_size": PADDED, "vocab_size": 48, "init_method_std": 0.2}
LLAMA = COMMON | {
    "swiglu": True, "normalization": "RMSNorm", "position_embedding_type": "rope", "add_bias_linear": False,
    "norm_epsilon": 1e-5, "untie_embeddings_and_output_weights": True, "group_query_attention": True,
    "num_query_groups": 2, "kv_channels": 8, "rotary_base": 10_000, "rotary_percent": 1.0, "num_experts": None,
}  # fmt: skip
QWEN2 = LLAMA | {"add_qkv_bias": True, "norm_epsilon": 1e-6}
GPT2 = COMMON | {
    "position_embedding_type": "learned_absolute", "add_bias_linear": True, "bias_gelu_fusion": True,
    "ffn_hidden_size": 128, "swiglu": False,
}  # fmt: skip
ARGS = {"llama": LLAMA, "qwen2": QWEN2, "gpt2": GPT2}
OLDER = {
    "embedding.": "language_model.embedding.", "output_layer.": "language_model.output_layer.",
    "decoder.": "language_model.encoder.", "final_layernorm": "final_norm", "input_layernorm": "input_norm",
    "pre_mlp_layernorm": "post_attention_norm", "linear_qkv": "query_key_value", "linear_proj": "dense",
    "linear_fc1": "dense_h_to_4h", "linear_fc2": "dense_4h_to_h",
}  # fmt: skip
ENGINE = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


@pytest.fixture(scope="module")
def torch() -> Any:
    return pytest.importorskip("torch", reason="pip install -e '.[test]'")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path]]:
    folder = tmp_path_factory.mktemp("hf")
    found = {name: (family_examples.make(name, folder / name), folder / name) for name in ("llama", "qwen2")}
    keys = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 48, "initializer_range": 0.2}
    return found | {"gpt2": (family_examples.make_kind("GPT2", keys, folder / "gpt2"), folder / "gpt2")}


def grouped(torch: Any, qkv: Sequence[Any], groups: int) -> Any:
    """Rows group by group: its queries, its key, its value."""
    return torch.cat([torch.cat(group) for group in zip(*(rows.chunk(groups) for rows in qkv))])


def padded(torch: Any, table: Any) -> Any:
    """Further rows that no token has; large, so that to read them would show."""
    return torch.cat([table, torch.full((PADDED - len(table), table.shape[1]), 100.0)])


def of_layer(torch: Any, name: str, state: dict[str, Any], layer: int) -> dict[str, Any]:
    """One layer under the names of Megatron Core, gate and up as a pair."""
    if name == "gpt2":
        of = lambda one: state[f"transformer.h.{layer}.{one}"]
        turned = lambda one: of(one).T if one.endswith("weight") and "ln_" not in one else of(one)
        names = {
            "self_attention.linear_proj": "attn.c_proj",
            "mlp.linear_fc1": "mlp.c_fc",
            "mlp.linear_fc2": "mlp.c_proj",
        }
        names |= {"input_layernorm": "ln_1", "pre_mlp_layernorm": "ln_2"}
        found = {f"{ours}.{kind}": turned(f"{hf}.{kind}") for ours, hf in names.items() for kind in ("weight", "bias")}
        for kind in ("weight", "bias"):
            thirds = turned(f"attn.c_attn.{kind}").chunk(3)
            found[f"self_attention.linear_qkv.{kind}"] = grouped(torch, thirds, 4)
        return found
    of = lambda one: state[f"model.layers.{layer}.{one}"]
    found = {
        "input_layernorm.weight": of("input_layernorm.weight"),
        "pre_mlp_layernorm.weight": of("post_attention_layernorm.weight"),
        "self_attention.linear_proj.weight": of("self_attn.o_proj.weight"),
        "mlp.linear_fc1.weight": (of("mlp.gate_proj.weight"), of("mlp.up_proj.weight")),
        "mlp.linear_fc2.weight": of("mlp.down_proj.weight"),
    }
    for kind in ("weight", "bias") if name == "qwen2" else ("weight",):
        found[f"self_attention.linear_qkv.{kind}"] = grouped(
            torch, [of(f"self_attn.{x}_proj.{kind}") for x in "qkv"], 2
        )
    return found


def outside(torch: Any, name: str, state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the first stage has before its layers, and the last behind them."""
    if name == "gpt2":
        first = {
            "embedding.word_embeddings.weight": padded(torch, state["transformer.wte.weight"]),
            "embedding.position_embeddings.weight": state["transformer.wpe.weight"],
        }
        return first, {
            f"decoder.final_layernorm.{kind}": state[f"transformer.ln_f.{kind}"] for kind in ("weight", "bias")
        }
    last = {"decoder.final_layernorm.weight": state["model.norm.weight"]}
    last["output_layer.weight"] = padded(torch, state["lm_head.weight"])
    return {"embedding.word_embeddings.weight": padded(torch, state["model.embed_tokens.weight"])}, last


def share(torch: Any, name: str, tensor: Any, rank: int, ranks: int) -> Any:
    """What one tensor rank has of it."""
    part = lambda one, axis: one.chunk(ranks, axis)[rank].clone()
    if isinstance(tensor, tuple):
        return torch.cat([part(half, 0) for half in tensor])
    if any(one in name for one in ("word_embeddings", "output_layer", "linear_qkv", "linear_fc1")):
        return part(tensor, 0)
    columns = name.endswith("weight") and ("linear_proj" in name or "linear_fc2" in name)
    return part(tensor, 1) if columns else tensor.clone()


def namespace(args: dict[str, Any], ranks: int = 1, stages: int = 1, **more: Any) -> argparse.Namespace:
    parallel = {"tensor_model_parallel_size": ranks, "pipeline_model_parallel_size": stages}
    return argparse.Namespace(**args | parallel | {"consumed_train_samples": 3200} | more)


def renamed(tensors: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    found = {}
    for name, tensor in tensors.items():
        for old, new in names.items():
            name = name.replace(old, new, 1)
        *above, inner = name.split(".", 2) if names is OLDER else [name]
        place = found
        for part in above:  # older code nests two dicts
            place = place.setdefault(part, {})
        place[inner] = tensor
    return found


def write(
    torch: Any, kind: str, model: Any, folder: Path, ranks: int = 1, stages: int = 1, virtual: int = 1, **more: Any
) -> Path:
    """A checkpoint of step 100; stages: of the pipeline, each with `virtual` parts of the model. more: arguments."""
    state, older = model.state_dict(), more.pop("older", {})
    first, last = outside(torch, kind, state)
    parts = stages * virtual
    for rank in range(ranks):
        for stage in range(stages):
            content: dict[str, Any] = {
                "iteration": 100,
                "checkpoint_version": 3.0,
                "args": namespace(ARGS[kind], ranks, stages, **more),
            }
            for number in range(virtual):
                place = number * stages + stage  # in the order of layers
                tensors = dict(first) if place == 0 else {}
                for layer in range(place * 2 // parts, (place + 1) * 2 // parts):
                    inner = layer - place * 2 // parts
                    made = of_layer(torch, kind, state, layer)
                    tensors |= {f"decoder.layers.{inner}.{name}": one for name, one in made.items()}
                if place == parts - 1:
                    tensors |= last
                    if kind == "gpt2" and parts > 1:  # the copy of the embedding that is the head
                        tensors["output_layer.weight"] = first["embedding.word_embeddings.weight"]
                own = {name: share(torch, name, one, rank, ranks) for name, one in tensors.items()}
                own["decoder.layers.0.self_attention.linear_qkv._extra_state"] = torch.ones(3, dtype=torch.uint8)
                content["model" if virtual == 1 else f"model{number}"] = renamed(own, older)
            content["optimizer"] = {
                "state": {0: {"exp_avg": torch.ones(3), "step": 100}},
                "param_groups": [{"lr": 0.1}],
            }
            content["rng_state"] = [{"np_rng_state": np.random.RandomState(0).get_state(), "cuda": torch.ones(2)}]
            name = f"mp_rank_{rank:02}_{stage:03}" if stages > 1 else f"mp_rank_{rank:02}"
            (folder / name).mkdir(parents=True)
            torch.save(content, folder / name / "model_optim_rng.pt")
    return folder


def check(folder: Path, model: tuple[Any, Path]) -> None:
    """It is the model of Hugging Face, and its logits are those of transformers."""
    family_examples.assert_is_the_model(folder, model, make_mesh(MeshShape(1, 1, 2), jax.devices()[:2]))


@pytest.mark.parametrize(
    ("kind", "ranks", "stages", "virtual", "older"),
    [
        ("llama", 1, 1, 1, {}), ("llama", 2, 2, 1, ENGINE), ("llama", 2, 1, 2, OLDER), ("qwen2", 2, 1, 1, {}),
        ("gpt2", 1, 1, 1, OLDER), ("gpt2", 4, 2, 1, ENGINE),
    ],
)  # fmt: skip
def test_all_ranks_alone_are_the_model_of_transformers(
    torch: Any, models: Any, tmp_path: Path, kind: str, ranks: int, stages: int, virtual: int, older: dict[str, str]
) -> None:
    folder = write(torch, kind, models[kind][0], tmp_path / "iter_0000100", ranks, stages, virtual, older=older)
    check(folder, models[kind])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_tensors_stacked_over_layers_of_torch_dist_are_the_model(
    torch: Any, models: Any, tmp_path: Path, kind: str
) -> None:
    import torch.distributed.checkpoint as dcp

    model, folder = models[kind][0], tmp_path / "iter_0000100"
    first, last = outside(torch, kind, model.state_dict())
    layers = [of_layer(torch, kind, model.state_dict(), layer) for layer in range(2)]
    whole = lambda one: torch.cat(one) if isinstance(one, tuple) else one
    stacked = {name: torch.stack([whole(layer[name]) for layer in layers]) for name in layers[0]}
    state = first | last | renamed({f"decoder.layers.{name}": one for name, one in stacked.items()}, ENGINE)
    optimizer = {f"optimizer.state.exp_avg.{name}": one for name, one in state.items()}
    dcp.save(state | optimizer, checkpoint_id=str(folder), no_dist=True)  # pyright: ignore[reportPrivateImportUsage]
    torch.save({"iteration": 100, "args": namespace(ARGS[kind]), "checkpoint_version": 3.0}, folder / "common.pt")
    names = {path.name for path in folder.iterdir()}
    assert preferred_names(names) == names == {".metadata", "common.pt", "__0_0.distcp"}
    check(folder, models[kind])


def test_folders_are_a_series_with_the_steps_and_tokens_of_the_run(torch: Any, models: Any, tmp_path: Path) -> None:
    model, hf = models["llama"]
    folder = write(torch, "llama", model, tmp_path / "iter_0000100", 2)
    shutil.copytree(folder, tmp_path / "iter_0000050")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("100")
    series = open_series(str(tmp_path))
    found = [(one.name, one.step, one.tokens) for one in series.checkpoints]
    # 3,200 samples of 16 tokens; the file, not the folder's name, says which step it is
    assert found == [("iter_0000050", 100, 51_200), ("iter_0000100", 100, 51_200)]
    expected = huggingface.config_from_hf(hf / "config.json")
    assert config_of(series.checkpoints[0]) == expected
    # one config.json above the checkpoints goes before what the files say
    (tmp_path / "config.json").write_text((hf / "config.json").read_text().replace("1e-05", "1e-07"))
    assert open_series(str(tmp_path)).checkpoints == series.checkpoints
    assert config_of(series.checkpoints[0]).norm_eps == 1e-7


def test_the_arguments_say_which_model_it_is(torch: Any, tmp_path: Path) -> None:
    file = tmp_path / "mp_rank_00" / "model_optim_rng.pt"
    file.parent.mkdir()

    def described(args: dict[str, Any], **more: Any) -> dict[str, Any]:
        torch.save({"args": argparse.Namespace(**args | more)}, file)
        return megatron.config_of(tmp_path)

    assert described(LLAMA)["architectures"] == ["LlamaForCausalLM"]
    assert described(LLAMA)["rope_scaling"] is None
    assert described(LLAMA, use_rope_scaling=True)["rope_scaling"]["factor"] == 8.0
    assert described(LLAMA, group_query_attention=False)["num_key_value_heads"] == 4
    assert described(LLAMA, vocab_size=None)["vocab_size"] == PADDED
    assert described(QWEN2)["architectures"] == ["Qwen2ForCausalLM"]
    assert described(LLAMA, qk_layernorm=True)["architectures"] == ["Qwen3ForCausalLM"]
    assert described(GPT2)["activation_function"] == "gelu_new"  # the fused function is the one by tanh
    assert described(GPT2, bias_gelu_fusion=False)["activation_function"] == "gelu"
    assert described(GPT2, untie_embeddings_and_output_weights=True)["tie_word_embeddings"] is False
    for args, more, said in (
        (LLAMA, {"num_experts": 8}, "num_experts = 8 is not read"),
        (LLAMA, {"rotary_interleaved": True}, "rotary_interleaved = True is not read"),
        (LLAMA, {"rotary_percent": 0.5}, "a model of swiglu, RMSNorm, rope is not read"),
        (GPT2, {"squared_relu": True}, "add_bias_linear, squared_relu is not read"),
        (LLAMA, {"hidden_size": None}, "its args have no hidden_size; put the model's config.json into"),
    ):
        with pytest.raises(UserError, match=rf"model_optim_rng\.pt: .*{said}") as error:
            described(args, **more)
        assert "\n" not in str(error.value)
    torch.save({"args": argparse.Namespace(**LLAMA), "checkpoint_version": 2.0}, file)
    with pytest.raises(UserError, match="a checkpoint_version before 3"):
        megatron.config_of(tmp_path)


def test_a_lost_damaged_or_strange_rank_is_named_in_one_line(torch: Any, models: Any, tmp_path: Path) -> None:
    write(torch, "llama", models["llama"][0], tmp_path, 2, 2)
    file = tmp_path / "mp_rank_01_001" / "model_optim_rng.pt"
    whole, content = file.read_bytes(), torch.load(file, weights_only=False)

    def refused(message: str) -> None:
        with pytest.raises(UserError, match=message) as error:
            open_weights(tmp_path)
        assert "\n" not in str(error.value)

    def with_layer(**tensors: Any) -> None:
        changed = content["model"] | {name.replace("__", "."): one for name, one in tensors.items()}
        torch.save(content | {"model": {name: one for name, one in changed.items() if one is not None}}, file)

    file.unlink()
    refused(r"mp_rank_01_001/model_optim_rng\.pt: missing; fetch it, the args mean 2 tensor and 2 pipeline ranks")
    for damaged in (
        whole[: len(whole) // 2],
        whole.replace(content["model"]["decoder.final_layernorm.weight"].numpy().tobytes(), b"\0" * 128),
        b"",
    ):
        file.write_bytes(damaged)
        refused(r"mp_rank_01_001/model_optim_rng\.pt: not a whole PyTorch checkpoint")
    with_layer(decoder__final_layernorm__weight=None)
    refused(r"tensor decoder\.final_layernorm\.weight is not in that of tensor rank 1")
    with_layer(decoder__final_layernorm__weight=torch.ones(3))
    refused(r"mp_rank_01_001/.*tensor decoder\.final_layernorm\.weight has another shape or dtype than in rank 0")
    file.write_bytes(whole)
    for rank in range(2):
        one = tmp_path / f"mp_rank_{rank:02}_001" / "model_optim_rng.pt"
        state = torch.load(one, weights_only=False)
        state["model"]["decoder.layers.0.mlp.router.weight"] = torch.ones(4, 32)
        torch.save(state, one)
    refused(r"tensor decoder\.layers\.1\.mlp\.router\.weight is of no dense model")
