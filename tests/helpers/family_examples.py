"""A tiny random model of each family in its Hugging Face layout, with the logits of transformers.

Families that need foreign code (Baichuan, the first uploads of Yi and OLMo) are built from transformers' model with the
same mathematics: with torch, its tensors are renamed, fused and (Baichuan2's head) un-normalised, as in those files.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fineline_jax.checkpoints.formats import huggingface
from fineline_jax.models import attention, decoder
from fineline_jax.models.config import ModelConfig
from fineline_jax.scoring.engine.step import capped

VOCABULARY = 48
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
Tensors = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Example:
    """How to make one model."""

    kind: str
    """transformers' class, without ForCausalLM."""
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    rename: Callable[[Tensors, dict[str, Any]], tuple[Tensors, dict[str, Any]]] | None = None
    """From transformers' tensors and config.json to those of the foreign layout."""


def _packed(tensors: Tensors, config: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    torch = pytest.importorskip("torch", reason="pip install -e '.[test]'")
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}.self_attn."
        parts = [tensors.pop(f"{prefix}{name}_proj.weight") for name in "qkv"]
        tensors[f"{prefix}W_pack.weight"] = torch.cat(parts)
        tensors[f"{prefix}rotary_emb.inv_freq"] = torch.ones(4)
    return tensors, _older(config) | {"architectures": ["BaiChuanForCausalLM"], "model_max_length": 64}


def _packed_with_norm_head(tensors: Tensors, config: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    torch = pytest.importorskip("torch", reason="pip install -e '.[test]'")
    tensors, config = _packed(tensors, config)
    # The peer's head has rows of length 1; the file holds them at any length.
    tensors["lm_head.weight"] = tensors["lm_head.weight"] * (0.5 + torch.rand(VOCABULARY, 1))
    return tensors, config | {"architectures": ["BaichuanForCausalLM"], "z_loss_weight": 0}


def _first_yi(tensors: Tensors, config: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    names = {"input_layernorm": "ln1", "post_attention_layernorm": "ln2"}
    for old, new in names.items():
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    return tensors, _older(config) | {"architectures": ["YiForCausalLM"], "model_type": "Yi"}


def _first_olmo(tensors: Tensors, config: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    torch = pytest.importorskip("torch", reason="pip install -e '.[test]'")
    found = {"model.transformer.wte.weight": tensors["model.embed_tokens.weight"]}
    if not config["tie_word_embeddings"]:
        found["model.transformer.ff_out.weight"] = tensors["lm_head.weight"]
    for layer in range(config["num_hidden_layers"]):
        old, new = f"model.layers.{layer}.", f"model.transformer.blocks.{layer}."
        found[new + "att_proj.weight"] = torch.cat([tensors[f"{old}self_attn.{name}_proj.weight"] for name in "qkv"])
        found[new + "attn_out.weight"] = tensors[old + "self_attn.o_proj.weight"]
        found[new + "ff_proj.weight"] = torch.cat([tensors[f"{old}mlp.{name}_proj.weight"] for name in ("up", "gate")])
        found[new + "ff_out.weight"] = tensors[old + "mlp.down_proj.weight"]
    return found, {
        "architectures": ["OLMoForCausalLM"],
        "model_type": "hf_olmo",
        "activation_type": "swiglu",
        "alibi": False,
        "attention_layer_norm": False,
        "block_type": "sequential",
        "clip_qkv": config["clip_qkv"],
        "d_model": config["hidden_size"],
        "embedding_size": VOCABULARY,
        "include_bias": False,
        "layer_norm_type": "default",
        "layer_norm_with_affine": False,
        "max_sequence_length": 64,
        "mlp_hidden_size": 2 * config["intermediate_size"],
        "mlp_ratio": 4,
        "multi_query_attention": False,
        "n_heads": config["num_attention_heads"],
        "n_layers": config["num_hidden_layers"],
        "rope": True,
        "vocab_size": VOCABULARY - 3,  # the tokenizer's; the tables are padded
        "weight_tying": config["tie_word_embeddings"],
    }


def _bailing(tensors: Tensors, config: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    """GLM-4.5 under the names and keys of BailingMoeV2ForCausalLM (Ling-mini-2.0's modeling_bailing_moe_v2.py)."""
    torch = pytest.importorskip("torch", reason="pip install -e '.[test]'")
    names = {
        "embed_tokens": "word_embeddings", "e_score_correction_bias": "expert_bias", "self_attn.o_proj":
        "attention.dense", "self_attn.q_norm": "attention.query_layernorm", "self_attn.k_norm":
        "attention.key_layernorm",
    }  # fmt: skip
    for layer in range(config["num_hidden_layers"]):
        parts = [tensors.pop(f"model.layers.{layer}.self_attn.{name}_proj.weight") for name in "qkv"]
        tensors[f"model.layers.{layer}.attention.query_key_value.weight"] = torch.cat(parts)
    for old, new in names.items():
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    older = {"n_routed_experts": "num_experts", "n_shared_experts": "num_shared_experts"}
    raw = {older.get(key, key): value for key, value in _older(config).items() if key != "attention_bias"}
    for key in ("use_bias", "use_qkv_bias", "norm_head", "use_sliding_window"):
        raw[key] = False
    raw |= {"score_function": "sigmoid", "moe_router_enable_expert_bias": True, "partial_rotary_factor": 0.5}
    return tensors, raw | {"architectures": ["BailingMoeV2ForCausalLM"], "model_type": "bailing_moe"}


def _older(config: dict[str, Any]) -> dict[str, Any]:
    """config.json as transformers 4 wrote it."""
    theta = config.pop("rope_parameters")["rope_theta"]
    return config | {"rope_theta": theta, "rope_scaling": None}


QWEN_MOE = {
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "use_sliding_window": False,
}
EXAMPLES = {
    "llama": Example("Llama", {"num_key_value_heads": 2, "rms_norm_eps": 1e-5}),
    "llama biased": Example("Llama", {"rms_norm_eps": 0.03, "attention_bias": True, "mlp_bias": True}),
    "mistral": Example("Mistral", {"num_key_value_heads": 2, "sliding_window": None}),
    "yi": Example("Llama", {"num_key_value_heads": 2, "rope_parameters": {"rope_theta": 5e6}}, _first_yi),
    "qwen2": Example("Qwen2", {"num_key_value_heads": 2}),
    "qwen3": Example("Qwen3", {"num_key_value_heads": 2, "head_dim": 12, "rms_norm_eps": 0.03}),
    "baichuan": Example("Llama", {}, _packed),
    "baichuan2": Example("Llama", {}, _packed_with_norm_head),
    "gpt_neox": Example(
        "GPTNeoX",
        {"layer_norm_eps": 0.03, "rope_parameters": {"partial_rotary_factor": 0.25, "rope_theta": 1e4}},
    ),
    "gpt_neox sequential": Example(
        "GPTNeoX",
        {"use_parallel_residual": False, "rope_parameters": {"partial_rotary_factor": 1.0, "rope_theta": 1e4}},
    ),
    "olmo": Example("Olmo", {"clip_qkv": 0.5}),
    "olmo tied": Example("Olmo", {"tie_word_embeddings": True}),
    "olmo_first": Example("Olmo", {"clip_qkv": 0.5}, _first_olmo),
    "olmo_first tied": Example("Olmo", {"tie_word_embeddings": True}, _first_olmo),
    "olmo2": Example(
        "Olmo2", {"num_key_value_heads": 2, "rms_norm_eps": 0.03, "rope_parameters": {"rope_theta": 50.0}}
    ),
    "olmoe": Example("Olmoe", {"num_experts": 64, "num_experts_per_tok": 8, "intermediate_size": 16, "clip_qkv": 0.5}),
    "olmoe normalised": Example("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}),
    "mixtral": Example("Mixtral", {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": Example("Qwen2Moe", QWEN_MOE | {"shared_expert_intermediate_size": 24}),
    "qwen3_moe": Example("Qwen3Moe", QWEN_MOE | {"head_dim": 12, "norm_topk_prob": True}),
    "bailing_moe_v2": Example(
        "Glm4Moe",
        {"num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 3, "moe_intermediate_size": 16, "n_group": 4}
        | {"n_routed_experts": 8, "num_experts_per_tok": 3, "topk_group": 2, "routed_scaling_factor": 2.5}
        | {"use_qk_norm": True, "rope_parameters": {"rope_theta": 50.0, "partial_rotary_factor": 0.5}},
        _bailing,
    ),
    "mamba": Example("Mamba", {"state_size": 4, "time_step_rank": 3, "conv_kernel": 3, "layer_norm_epsilon": 0.03}),
    "mamba2": Example(
        "Mamba2",
        {"state_size": 4, "conv_kernel": 3, "layer_norm_epsilon": 0.03, "num_heads": 8, "head_dim": 8, "n_groups": 2},
    ),
}


class Watched(Mapping[str, Any]):
    """A config.json that knows which keys were looked for."""

    def __init__(self, raw: dict[str, Any]):
        self.raw, self.asked = raw, set()

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return self.raw[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.raw)

    def __len__(self) -> int:
        return len(self.raw)


def make(name: str, folder: Path) -> Any:
    """Write the model `name` into `folder`; returns transformers' model with the same logits."""
    torch = pytest.importorskip("torch", reason="pip install -e '.[test]'")
    from safetensors.torch import load_file, save_file

    example = EXAMPLES[name]
    shape = SHAPE | example.changes
    if example.kind in ("Mamba", "Mamba2"):
        shape = {key: value for key, value in shape.items() if key not in ("intermediate_size", "num_attention_heads")}
    model = make_kind(example.kind, shape, folder)
    if example.rename is _packed_with_norm_head:
        with torch.no_grad():
            model.lm_head.weight.copy_(torch.nn.functional.normalize(model.lm_head.weight))
        model.save_pretrained(folder)
    if example.rename is not None:
        tensors, raw = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
        tensors, raw = example.rename(tensors, raw)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(raw))
    return model


def make_kind(kind: str, keys: dict[str, Any], folder: Path) -> Any:
    """Write a random model of transformers' class into `folder`, its biases and norms no constants; returns it."""
    torch = pytest.importorskip("torch", reason="pip install -e '.[test]'")
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, "Gemma3TextConfig" if kind == "Gemma3" else f"{kind}Config")(**keys)
    head = "LMHeadModel" if kind == "GPT2" else "ForCausalLM"
    model = getattr(transformers, kind + head)(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "dt_proj" not in parameter_name:
                parameter.add_(0.3 * torch.randn_like(parameter))  # constants would hide a mistake
            elif "gate.weight" in parameter_name or "router.layer" in parameter_name:
                parameter.normal_(std=1.0)  # decided routers: no ties that rounding could turn
        for buffer_name, buffer in model.named_buffers():
            if "correction_bias" in buffer_name:
                buffer.normal_(std=0.3)
    model.save_pretrained(folder)
    return model


def their_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    torch = pytest.importorskip("torch", reason="pip install -e '.[test]'")
    with torch.no_grad():
        return model(torch.asarray(tokens, dtype=torch.long)).logits.float().numpy()


def assert_is_the_model(folder: Path, model: tuple[Any, Path], mesh: jax.sharding.Mesh) -> None:
    """What is in `folder` is the model (transformers' own, its Hugging Face folder), and its logits are those of
    transformers."""
    config, params = huggingface.load_hf(folder, mesh)
    expected_config, expected = huggingface.load_hf(model[1], mesh)
    assert config == expected_config
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert_logits(config, params, model[0], mesh)


def assert_logits(config: ModelConfig, params: Any, theirs: Any, mesh: jax.sharding.Mesh) -> None:
    """Those of twelve tokens are those of transformers' model."""
    tokens = np.arange(12, dtype=np.int32)[None].repeat(4, 0)
    ours = our_logits(config, params, tokens, mesh)
    assert np.abs(ours - their_logits(theirs, tokens)).max() < 1e-4


def our_logits(config: ModelConfig, params: Any, tokens: np.ndarray, mesh: jax.sharding.Mesh) -> np.ndarray:
    """[batch, length, vocab] in float32."""

    @jax.jit
    def run(params: Any, tokens: jax.Array) -> jax.Array:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        states = decoder.hidden_states(config, params, tokens, positions, attention.causal("xla"))
        head = jax.reshard(decoder.head_weight(config, params), jax.P(None, None))
        return capped(jnp.einsum("bsd,dv->bsv", states, head), config.logit_softcap)

    with jax.set_mesh(mesh):
        return np.asarray(run(params, jax.device_put(tokens, jax.NamedSharding(mesh, jax.P()))))
