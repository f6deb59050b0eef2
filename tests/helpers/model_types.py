"""A tiny random model of each `model_type` that opens, as transformers makes it, and how far our numbers are off.

python tests/helpers/model_types.py [NAME …]    prints the rows of the table in docs/families.md, measured anew
"""

import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import family_examples
import jax
import numpy as np
from family_examples import SHAPE, VOCABULARY
from request_examples import ragged
from safetensors.numpy import load_file, save_file

from fineline_jax.checkpoints.formats import huggingface
from fineline_jax.mesh import make_mesh
from fineline_jax.recipe import MeshShape
from fineline_jax.scoring.engine.row_engine import make_row_scorer
from fineline_jax.scoring.engine.scorer import pick_engine
from fineline_jax.scoring.engine.tree_engine import make_tree_scorer
from fineline_jax.scoring.requests.pack import RequestTokens

GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
NEXT = {"num_hidden_layers": 4} | GROUPED
GPT = {
    "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": VOCABULARY, "initializer_range": 0.2,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 50.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 3.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 50.0, "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 4.0,
}  # fmt: skip
MOE = {"num_experts_per_tok": 2, "initializer_range": 0.2}
LATENT = {
    "num_hidden_layers": 3, "first_k_dense_replace": 1, "n_routed_experts": 8, "moe_intermediate_size": 16,
    "n_shared_experts": 2, "kv_lora_rank": 20, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 8,
    "routed_scaling_factor": 1.7, "rope_parameters": YARN | {"mscale": 0.5, "mscale_all_dim": 0.8},
    "num_experts_per_tok": 3, "initializer_range": 0.2,
}  # fmt: skip
FOUR_EXPERTS = {"num_experts": 4, **MOE}
OF_V3 = GROUPED | {
    "num_hidden_layers": 3, "first_k_dense_replace": 1, "n_routed_experts": 8, "moe_intermediate_size": 16,
    "n_shared_experts": 2, "routed_scaling_factor": 1.7, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3,
    "initializer_range": 0.2,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Example:
    """transformers' class without ForCausalLM, the keys of its config, and whether `SHAPE`'s stand beside them."""

    kind: str
    keys: dict[str, Any]
    shaped: bool = True


TYPES = {
    "apertus": Example("Apertus", GROUPED | {"rope_parameters": LLAMA3}),
    "arcee": Example("Arcee", GROUPED),
    "biogpt": Example("BioGpt", {}),
    "bloom": Example(
        "Bloom",
        {"hidden_size": 48, "n_layer": 2, "n_head": 6, "vocab_size": VOCABULARY, "initializer_range": 0.2},
        shaped=False,
    ),
    "codegen": Example("CodeGen", GPT | {"rotary_dim": 4}, shaped=False),
    "cohere": Example("Cohere", {"num_key_value_heads": 2}),
    "cohere2": Example("Cohere2", {"num_key_value_heads": 2, "num_hidden_layers": 4, "sliding_window": 5}),
    "cwm": Example("Cwm", NEXT | {"sliding_window": 5, "rope_parameters": LLAMA3}),
    "deepseek_v2": Example(
        "DeepseekV2",
        LATENT | {"q_lora_rank": 12, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    ),
    "deepseek_v2 lite": Example("DeepseekV2", LATENT | {"q_lora_rank": None, "n_group": 1, "topk_group": 1}),
    "deepseek_v3": Example(
        "DeepseekV3", LATENT | {"q_lora_rank": 12, "n_group": 4, "topk_group": 2, "num_key_value_heads": 4}
    ),
    "deepseek_v3 moonlight": Example(
        "DeepseekV3",
        LATENT
        | {
            "q_lora_rank": None,
            "n_group": 1,
            "topk_group": 1,
            "num_key_value_heads": 4,
            "rope_parameters": {"rope_theta": 50.0},
        },
    ),
    "dots1": Example(
        "Dots1",
        OF_V3
        | {
            "first_k_dense_replace": 2,
            "n_group": 1,
            "topk_group": 1,
            "sliding_window": 5,
            "max_window_layers": 1,
            "norm_topk_prob": True,
        },
    ),
    "dots1 grouped": Example("Dots1", OF_V3 | {"sliding_window": None}),
    "ernie4_5": Example("Ernie4_5", GROUPED | {"use_bias": True}),
    "exaone4": Example("Exaone4", {"num_key_value_heads": 2, "num_hidden_layers": 4, "sliding_window": 5}),
    "exaone_moe": Example(
        "ExaoneMoe",
        {key: value for key, value in OF_V3.items() if not key.startswith(("n_", "topk"))}
        | {"num_experts": 8, "num_shared_experts": 2, "num_hidden_layers": 5, "sliding_window": 5},
    ),
    "falcon": Example("Falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon_rw": Example(
        "Falcon",
        {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True, "num_attention_heads": 16}
        | {"hidden_size": 64},
    ),
    "falcon_rw parallel": Example("Falcon", {"alibi": True, "multi_query": False}),
    "falcon of one key head": Example("Falcon", {"ffn_hidden_size": 40}),
    "flex_olmo": Example("FlexOlmo", GROUPED | FOUR_EXPERTS | {"pad_token_id": 0}),
    "gemma": Example("Gemma", GROUPED),
    "gemma2": Example(
        "Gemma2",
        GROUPED
        | {
            "sliding_window": 5,
            "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 2.0,
        },
    ),
    "gemma3_text": Example(
        "Gemma3",
        NEXT
        | {
            "sliding_window": 5,
            "layer_types": ["sliding_attention"] * 2 + ["full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
            },
        },
    ),
    "glm": Example("Glm", GROUPED),
    "glm4": Example("Glm4", GROUPED),
    "glm4_moe": Example("Glm4Moe", OF_V3 | {"use_qk_norm": True}),
    "glm4_moe biased": Example("Glm4Moe", OF_V3 | {"attention_bias": True, "first_k_dense_replace": 0}),
    "gpt-sw3": Example("GPT2", GPT, shaped=False),
    "gpt2": Example("GPT2", GPT | {"scale_attn_by_inverse_layer_idx": True}, shaped=False),
    "gpt_bigcode": Example("GPTBigCode", GPT, shaped=False),
    "gpt_neo": Example(
        "GPTNeo",
        {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 5,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 64,
            "initializer_range": 0.2,
        },
        shaped=False,
    ),
    "gptj": Example("GPTJ", GPT | {"rotary_dim": 4}, shaped=False),
    "granite": Example(
        "Granite",
        GROUPED
        | {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.2, "logits_scaling": 1.3},
    ),
    "granitemoe": Example(
        "GraniteMoe", GROUPED | MOE | {"num_local_experts": 4, "attention_multiplier": 0.3, "logits_scaling": 0.7}
    ),
    "helium": Example("Helium", GROUPED),
    "hunyuan_v1_dense": Example("HunYuanDenseV1", GROUPED),
    "hyperclovax": Example("HyperCLOVAX", GROUPED | {"attention_multiplier": 0.3, "residual_multiplier": 0.5}),
    "internlm3": Example("Llama", GROUPED | {"rope_parameters": YARN}),
    "jais2": Example("Jais2", GROUPED),
    "minimax_m2": Example("MiniMaxM2", GROUPED | MOE | {"num_local_experts": 4, "partial_rotary_factor": 0.5}),
    "ministral": Example("Ministral", GROUPED | {"sliding_window": 5}),
    "mistral": Example("Mistral", GROUPED | {"sliding_window": 5}),
    "mpt": Example(
        "Mpt",
        {
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 64,
            "vocab_size": VOCABULARY,
            "attn_config": {"clip_qkv": 0.8},
            "initializer_range": 0.2,
        },
        shaped=False,
    ),
    "nemotron": Example("Nemotron", GROUPED),
    "olmo3": Example(
        "Olmo3",
        NEXT
        | {
            "sliding_window": 5,
            "rope_parameters": {
                "full_attention": YARN,
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            },
        },
    ),
    "olmo_hybrid": Example(
        "OlmoHybrid",
        {
            "num_hidden_layers": 4,
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 6,
            "linear_value_head_dim": 10,
            "rope_parameters": {"rope_type": "default", "rope_theta": None},
        },
    ),
    "olmo_hybrid turned": Example(
        "OlmoHybrid",
        {
            "num_hidden_layers": 4,
            "num_key_value_heads": 2,
            "linear_allow_neg_eigval": False,
            "rope_parameters": YARN,
        },
    ),
    "opt": Example("OPT", {"ffn_dim": 40, "word_embed_proj_dim": 32, "init_std": 0.2}),
    "phi": Example("Phi", {"num_key_value_heads": 2}),
    "phi3": Example("Phi3", {"num_key_value_heads": 2, "sliding_window": 5}),
    "seed_oss": Example("SeedOss", GROUPED),
    "smollm3": Example("SmolLM3", NEXT),
    "solar_open": Example("SolarOpen", OF_V3 | {"n_group": 1, "topk_group": 1}),
    "stablelm": Example("StableLm", {"num_key_value_heads": 2, "use_qkv_bias": True, "use_parallel_residual": True}),
    "starcoder2": Example("Starcoder2", {"num_key_value_heads": 2, "sliding_window": 5}),
    "vaultgemma": Example("VaultGemma", GROUPED | {"sliding_window": 5}),
}
TYPES |= {
    name: Example(one.kind, one.changes, not one.kind.startswith("Mamba"))
    for name, one in family_examples.EXAMPLES.items()
    if one.rename is None and name not in TYPES and " " not in name
}
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
TYPES["mamba"] = Example("Mamba", SMALL, False)
TYPES["falcon_mamba"] = Example("FalconMamba", SMALL | {"mixer_rms_eps": 0.02}, False)
TYPES["mamba2"] = Example("Mamba2", SMALL | {"num_heads": 8, "head_dim": 8, "n_groups": 2}, False)
TYPES["mamba2 one group"] = Example("Mamba2", SMALL | {"num_heads": 4, "head_dim": 16, "n_groups": 1}, False)
"""By the model_type of docs/families.md."""
TOKENS = np.random.default_rng(1).integers(3, VOCABULARY, (8, 20), dtype=np.int32)


def mesh_of(replica: int = 1, fsdp: int = 1, tensor: int = 1) -> jax.sharding.Mesh:
    return make_mesh(MeshShape(replica, fsdp, tensor), jax.devices()[: replica * fsdp * tensor])


def make(name: str, folder: Path) -> Any:
    """Write the model into `folder`; returns transformers'."""
    example = TYPES[name]
    model = family_examples.make_kind(
        example.kind, (SHAPE | {"pad_token_id": 0} if example.shaped else {}) | example.keys, folder
    )
    if example.kind == "OlmoHybrid":
        _as_released(model, folder / "model.safetensors")
    return model


def _as_released(model: Any, file: Path) -> None:
    """The convolutions as in Ai2's files: of queries, keys and values. transformers 5.23 writes three equal parts."""
    tensors = load_file(file)
    for number, layer in enumerate(model.model.layers):
        if hasattr(layer, "linear_attn"):
            mixer = layer.linear_attn
            parts = mixer.conv1d.weight.detach().split([mixer.key_dim, mixer.key_dim, mixer.value_dim])
            for part, which in zip(parts, "qkv", strict=True):
                tensors[f"model.layers.{number}.linear_attn.{which}_conv1d.weight"] = part.numpy().copy()
    save_file(tensors, file, {"format": "pt"})


def differences(name: str, folder: Path) -> dict[str, float]:
    """The largest difference of logits on one device and on eight, and of the log-likelihoods of requests with common
    beginnings by each engine, from transformers'."""
    model = make(name, folder / "hf")
    theirs = family_examples.their_logits(model, TOKENS)
    assert theirs.std() > 0.02, "else anything would be near"
    heads = huggingface.config_from_hf(folder / "hf" / "config.json").kv_heads
    found, meshes = {}, {"one device": mesh_of(), "eight devices": mesh_of(2, 2, 2) if heads != 1 else mesh_of(2, 4)}
    for words, mesh in meshes.items():
        config, params = huggingface.load_hf(folder / "hf", mesh)
        found[words] = float(np.abs(family_examples.our_logits(config, params, TOKENS, mesh) - theirs).max())
    requests = _requests()
    expected = [_loglikelihood(theirs[row], TOKENS[row], start, stop) for row, start, stop in _spans()]
    config, params = huggingface.load_hf(folder / "hf", meshes["one device"])
    makers = {"rows": make_row_scorer, "tree": make_tree_scorer}
    for engine, maker in makers.items():
        if engine == "rows" or pick_engine(config)[0] == "tree":
            values, _ = maker(requests, config, config.context, meshes["one device"], "float32")(params)
            found[engine] = float(np.abs(values - expected).max())
    return found


def _spans() -> list[tuple[int, int, int]]:
    """(row of TOKENS, first scored token, end): several requests continue the beginnings of each row."""
    return [(row, start, stop) for row in range(4) for start, stop in ((12, 15), (12, 20), (4, 20), (17, 18))]


def _requests() -> RequestTokens:
    spans = _spans()
    contexts = [TOKENS[row, :start].tolist() for row, start, _ in spans] + [[1]]
    continuations = [TOKENS[row, start:stop].tolist() for row, start, stop in spans]
    return RequestTokens(ragged(contexts), ragged(continuations), np.arange(len(spans)), np.zeros(len(spans), int))


def _loglikelihood(logits: np.ndarray, tokens: np.ndarray, start: int, stop: int) -> float:
    logits = logits.astype(np.float64)
    logp = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return float(logp[np.arange(start - 1, stop - 1), tokens[start:stop]].sum())


def written_back(name: str, folder: Path) -> None:
    """Assert that an export has the bits that were read, and that transformers computes the same from it."""
    model = make(name, folder / "hf")
    config, params = huggingface.load_hf(folder / "hf", mesh_of(1, 4))
    family = huggingface._read_config(folder / "hf" / "config.json")[0]
    huggingface.export_hf(config, params, folder / "out", family=family.name)
    before, after = (load_file(folder / of / "model.safetensors") for of in ("hf", "out"))
    for other, ours in family.other_names.items():
        before = {key.replace(other, ours): value for key, value in before.items()}
    assert before.keys() == after.keys()
    assert all(before[key].tobytes() == after[key].tobytes() for key in before)
    assert huggingface.config_from_hf(folder / "out" / "config.json") == config
    raw = json.loads((folder / "out" / "config.json").read_text())
    raw |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # some classes want those of a tokenizer
    (folder / "out" / "config.json").write_text(json.dumps(raw))
    again = type(model).from_pretrained(folder / "out").eval()
    np.testing.assert_array_equal(
        family_examples.their_logits(again, TOKENS), family_examples.their_logits(model, TOKENS)
    )
    shapes = [tensor.numel() for tensor in model.parameters()]
    buffers = config.layers * 2 if config.mlp == "xielu" else 0  # transformers' buffers in the files
    buffers += (config.layers - config.dense_layers) * config.experts if config.router == "sigmoid" else 0
    assert config.parameters == sum(shapes) + buffers


if __name__ == "__main__":
    for chosen in sys.argv[1:] or TYPES:
        with tempfile.TemporaryDirectory() as scratch:
            try:
                worst = differences(chosen, Path(scratch))
                written_back(chosen, Path(scratch) / "again")
                print(f"{chosen:20s} {max(worst.values()):.1e}  {worst}", flush=True)
            except Exception as error:
                print(f"{chosen:20s} {type(error).__name__}: {str(error)[:300]}", flush=True)
                if len(sys.argv) == 2:
                    raise
