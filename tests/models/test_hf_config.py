"""What a config.json says and leaves unsaid: every key, every default as transformers has it, every refusal; no JAX."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import pytest
from family_examples import Watched

from fineline_jax.errors import UserError
from fineline_jax.models import families
from fineline_jax.models.config import ModelConfig
from fineline_jax.models.families.hf_config import LARGEST, HfConfig

SIZES = {
    "vocab_size": 101,
    "hidden_size": 768,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 96,
}
KINDS = ("Llama", "Qwen2", "Qwen3", "GPTNeoX", "Olmo", "Olmo2", "Olmoe", "Mixtral", "Qwen2Moe", "Qwen3Moe", "Mamba")


def read(raw: Mapping[str, Any]) -> ModelConfig:
    return families.of_hf(HfConfig("config.json", raw))[1]


def of_kind(kind: str, **keys: Any) -> dict[str, Any]:
    return {"architectures": [f"{kind}ForCausalLM"], **SIZES, **keys}


@pytest.mark.parametrize("kind", KINDS)
def test_a_key_that_is_absent_has_the_default_of_transformers(kind: str) -> None:
    config_class = getattr(pytest.importorskip("transformers"), f"{kind}Config")
    raw = of_kind(kind, moe_intermediate_size=8, shared_expert_intermediate_size=8)
    if kind == "Mamba":
        del raw["num_attention_heads"], raw["intermediate_size"]
    stated = of_kind(kind, **config_class(**raw).to_dict())
    watched = Watched(stated)
    read(watched)
    optional = watched.asked & stated.keys() - {"architectures", "num_hidden_layers"}
    assert len(optional) >= 9
    for key in sorted(optional):
        silent = {name: value for name, value in stated.items() if name != key}
        try:
            found = read(silent)
        except UserError as error:
            unsaid = f"{key} is missing" in str(error) or key == "use_sliding_window"  # refused rather than guessed
            assert unsaid, (key, error)
            continue
        assert found == read(of_kind(kind, **config_class(**silent).to_dict())), key


OLDER = {"rope_theta": 123.0}
NEWER = {"rope_parameters": {"rope_theta": 123.0, "rope_type": "default"}}
LIKE_LLAMA = {
    "vocab_size": 101, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 10, "max_position_embeddings": 77, "rms_norm_eps": 0.011,
    "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False, "initializer_range": 0.7,
}  # fmt: skip
OURS = ModelConfig(
    vocab_size=101, width=48, layers=3, heads=6, mlp_width=72, kv_heads=2, head_dim=10, context=77, rope_theta=123.0,
    norm_eps=0.011, tied_embeddings=True, init_std=0.7,
)  # fmt: skip
FIRST_OLMO = {
    "d_model": 48, "n_heads": 6, "n_layers": 3, "mlp_hidden_size": 144, "max_sequence_length": 77, "vocab_size": 99,
    "embedding_size": 101, "rope": True, "rope_theta": 123.0, "layer_norm_with_affine": False, "include_bias": False,
    "clip_qkv": 0.3, "init_std": 0.7,
}  # fmt: skip
OLMO = dict(norm="nonparametric", norm_eps=1e-5, clip_qkv=0.3)
PLAIN_HEADS = dict(kv_heads=6, head_dim=8)
MOE = {"num_experts": 5, "num_experts_per_tok": 3, "norm_topk_prob": True}
EXPERTS = dict(experts=5, experts_per_token=3, normalise_experts=True)
NEOX = {
    "vocab_size": 101, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 3, "num_attention_heads": 6,
    "max_position_embeddings": 77, "layer_norm_eps": 0.011, "tie_word_embeddings": True, "attention_bias": False,
    "initializer_range": 0.7, "use_parallel_residual": False, "hidden_act": "gelu",
}  # fmt: skip
NEOX_OURS = dict(
    PLAIN_HEADS, norm="layer", mlp="gelu", mlp_bias=True, parallel_residual=False, rotary_fraction=0.5,
    attention_bias=False,
)  # fmt: skip
MAMBA = {
    "vocab_size": 101, "hidden_size": 48, "num_hidden_layers": 3, "layer_norm_epsilon": 0.011, "intermediate_size": 72,
    "initializer_range": 0.7, "tie_word_embeddings": False, "state_size": 5, "conv_kernel": 3, "time_step_rank": 7,
    "max_position_embeddings": 77,
}  # fmt: skip
MAMBA_OURS = ModelConfig(
    vocab_size=101, width=48, layers=3, heads=0, mlp_width=72, context=77, norm_eps=0.011, init_std=0.7,
    mixer="mamba", state_size=5, conv_width=3, step_rank=7,
)  # fmt: skip
QWEN_MOE = MOE | {"moe_intermediate_size": 16, "decoder_sparse_step": 1, "mlp_only_layers": [3]}
READINGS = [
    ("LlamaForCausalLM", LIKE_LLAMA | OLDER, {}),
    ("LLaMAForCausalLM", LIKE_LLAMA | NEWER | {"attention_bias": True}, {"attention_bias": True}),
    ("LlamaForCausalLM", LIKE_LLAMA | NEWER | OLDER | {"rope_theta": 9.0, "mlp_bias": True}, {"mlp_bias": True}),
    ("YiForCausalLM", LIKE_LLAMA | OLDER, {}),
    ("MistralForCausalLM", LIKE_LLAMA | OLDER | {"sliding_window": None}, {}),
    ("Qwen2ForCausalLM", LIKE_LLAMA | OLDER, {"qkv_bias": True}),
    ("Qwen3ForCausalLM", LIKE_LLAMA | OLDER, {"qk_norm": True, "qk_norm_per_head": True}),
    ("BaiChuanForCausalLM", LIKE_LLAMA | OLDER, {"kv_heads": 6}),
    ("BaichuanForCausalLM", LIKE_LLAMA | OLDER, {"kv_heads": 6, "head": "normalised"}),
    ("OlmoForCausalLM", LIKE_LLAMA | OLDER | {"clip_qkv": 0.3}, OLMO),
    ("OLMoForCausalLM", FIRST_OLMO, OLMO | PLAIN_HEADS),
    ("OLMoForCausalLM", FIRST_OLMO | {"weight_tying": False}, OLMO | PLAIN_HEADS | {"tied_embeddings": False}),
    ("Olmo2ForCausalLM", LIKE_LLAMA | OLDER, {"norm_after": True, "qk_norm": True}),
    ("OlmoeForCausalLM", LIKE_LLAMA | OLDER | MOE | {"clip_qkv": 0.3}, EXPERTS | {"qk_norm": True, "clip_qkv": 0.3}),
    ("MixtralForCausalLM", LIKE_LLAMA | OLDER | {"num_local_experts": 5, "num_experts_per_tok": 3}, EXPERTS),
    (
        "Qwen2MoeForCausalLM",
        LIKE_LLAMA | OLDER | QWEN_MOE | {"shared_expert_intermediate_size": 24, "qkv_bias": False},
        EXPERTS | {"mlp_width": 16, "shared_expert_width": 24},
    ),
    (
        "Qwen3MoeForCausalLM",
        LIKE_LLAMA | OLDER | QWEN_MOE,
        EXPERTS | {"mlp_width": 16, "qk_norm": True, "qk_norm_per_head": True},
    ),
    ("GPTNeoXForCausalLM", NEOX | {"rotary_pct": 0.5, "rotary_emb_base": 123.0}, NEOX_OURS),
    (
        "GPTNeoXForCausalLM",
        NEOX | {"rope_parameters": {"rope_theta": 123.0, "partial_rotary_factor": 0.5}, "rotary_pct": 1.0},
        NEOX_OURS,
    ),
    (
        "GPTNeoXForCausalLM",
        NEOX | {"rotary_emb_base": 123.0, "use_parallel_residual": None, "attention_bias": None},
        NEOX_OURS | {"rotary_fraction": 0.25, "parallel_residual": True, "attention_bias": True},
    ),
]


@pytest.mark.parametrize(("architecture", "raw", "changes"), READINGS)
def test_every_key_is_read_and_written_as_the_field_it_means(
    architecture: str, raw: dict[str, Any], changes: dict[str, Any]
) -> None:
    expected = dataclasses.replace(OURS, **changes)
    family, found = families.of_hf(HfConfig("config.json", {"architectures": [architecture], **raw}))
    assert found == expected
    assert family.holds(expected)
    written = family.to_hf(expected)
    for older_only in (True, False):  # what transformers 4 reads alone, what 5 reads alone, says it all
        ignored = {"rope_parameters"} if older_only else {"rope_theta", "rotary_pct", "rotary_emb_base"}
        ignored = ignored if "rope_parameters" in written else set()
        kept = {key: value for key, value in written.items() if key not in ignored}
        assert read({"architectures": [architecture], **kept}) == expected


def test_every_key_of_mamba_is_read_and_written() -> None:
    named = {"architectures": ["MambaForCausalLM"]}
    assert read(named | MAMBA) == MAMBA_OURS
    assert read(named | families.mamba.MAMBA.to_hf(MAMBA_OURS)) == MAMBA_OURS
    derived = {key: value for key, value in MAMBA.items() if key not in ("intermediate_size", "num_hidden_layers")}
    derived |= {"hidden_size": 40, "expand": 3, "time_step_rank": "auto", "n_layer": 2}
    found = read(named | derived)
    assert (found.mlp_width, found.step_rank, found.layers) == (120, 3, 2)  # 40 / 16, rounded up
    # The first uploads state neither: two inner features for each outer one, untied from what the class says of width.
    del derived["expand"], derived["time_step_rank"], derived["tie_word_embeddings"]
    assert (read(named | derived).mlp_width, read(named | derived).tied_embeddings) == (80, True)


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_from_our_config_json_what_we_meant(kind: str) -> None:
    config_class = getattr(pytest.importorskip("transformers"), f"{kind}Config")
    [(raw, changes)] = [(raw, changes) for name, raw, changes in READINGS if name == f"{kind}ForCausalLM"][-1:] or [
        (MAMBA, None)
    ]
    config = MAMBA_OURS if changes is None else dataclasses.replace(OURS, **changes)
    family, _ = families.of_hf(HfConfig("", {"architectures": [f"{kind}ForCausalLM"], **raw}))
    theirs = config_class(**family.to_hf(config)).to_dict()
    assert theirs["model_type"] == family.to_hf(config)["model_type"]
    assert theirs.get("hidden_act") in ("silu", "gelu")
    assert read(theirs | {"architectures": [f"{kind}ForCausalLM"]}) == config


def test_the_classes_without_a_place_in_transformers_have_their_own_defaults() -> None:
    """configuration_yi.py of 01-ai/Yi-34B, configuration_baichuan.py, and ModelConfig of allenai/OLMo."""
    yi = read(of_kind("Yi"))
    assert (yi.rope_theta, yi.context, yi.kv_heads, yi.norm_eps, yi.init_std) == (5e6, 4096, 4, 1e-5, 0.02)
    assert not yi.tied_embeddings
    baichuan = read(of_kind("Baichuan", max_position_embeddings=64))
    assert (baichuan.rope_theta, baichuan.context, baichuan.norm_eps, baichuan.init_std) == (1e4, 64, 1e-6, 0.02)
    needed = {"architectures": ["OLMoForCausalLM"], "d_model": 16, "n_heads": 2, "n_layers": 1, "vocab_size": 8}
    needed |= {"rope": True, "layer_norm_with_affine": False, "include_bias": False}
    olmo = read(needed)
    assert (olmo.mlp_width, olmo.context, olmo.rope_theta, olmo.init_std) == (32, 1024, 1e4, 0.02)  # 64 with the gate
    assert olmo.tied_embeddings and not olmo.clip_qkv and olmo.vocab_size == 8
    assert read(needed | {"mlp_ratio": 6}).mlp_width == 48


def test_null_heads_for_keys_are_as_many_as_for_queries_in_every_family() -> None:
    for kind in KINDS[:-1]:
        raw = of_kind(kind, num_key_value_heads=None, moe_intermediate_size=8, shared_expert_intermediate_size=8)
        assert read(raw).kv_heads == 96


LIKE = ("Llama", "Yi", "Qwen2", "Qwen3", "Baichuan", "BaiChuan", "Olmo", "Olmo2", "Olmoe", "Mixtral", "Qwen3Moe")
REFUSED = [
    *[(kind, {key: value}, key) for kind in LIKE for key, value in (
        ("hidden_act", "tanh"), ("quantization_config", {"bits": 4}), ("partial_rotary_factor", 0.5),
        ("rope_parameters", {"partial_rotary_factor": 0.5}), ("rope_parameters", {"rope_type": "longrope"}),
        ("rope_parameters", {"rope_theta": 0.0}), ("rope_theta", 0), ("rope_parameters", {"mrope_section": [1, 2]}),
    )],
    *[(kind, {"sliding_window": 63}, "sliding_window") for kind in LIKE if "Qwen" not in kind and kind != "Mixtral"],
    *[("OLMo", FIRST_OLMO | {key: value}, key) for key, value in (
        ("activation_type", "gelu"), ("block_type", "parallel"), ("layer_norm_type", "rms"),
        ("layer_norm_with_affine", True), ("attention_layer_norm", True), ("norm_after", True), ("include_bias", True),
        ("alibi", True), ("scale_logits", True), ("multi_query_attention", True), ("embedding_layer_norm", True),
        ("rope", False), ("n_kv_heads", 3),
    )],
    *[("GPTNeoX", {key: value}, key) for key, value in (
        ("hidden_act", "silu"), ("quantization_config", {}), ("rope_parameters", {"rope_type": "longrope"}),
    )],
    *[("Mamba", MAMBA | {key: value}, key) for key, value in (
        ("hidden_act", "gelu"), ("use_bias", True), ("use_conv_bias", False), ("quantization_config", {}),
        ("time_step_rank", "some"),
    )],
    ("Qwen2Moe", {"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size"),
    *[(kind, change, next(iter(change))) for kind in ("Qwen2Moe", "Qwen3Moe") for change in (
        {"decoder_sparse_step": 2}, {"mlp_only_layers": [2]},
    )],
]  # fmt: skip


def test_every_key_that_would_change_the_model_is_refused_by_its_name() -> None:
    known = {"max_position_embeddings": 64, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
    known["num_key_value_heads"] = 6
    for kind, change, key in REFUSED:
        with pytest.raises(UserError) as error:
            read(of_kind(kind, **(known | change)))
        inner = next(iter(change[key])) if key == "rope_parameters" else key
        inner = "rotary scaling" if inner == "rope_type" else inner
        assert str(error.value).startswith("config.json: ") and inner in str(error.value), (kind, change)
    for key in ("rope", "include_bias", "layer_norm_with_affine"):  # their class turns on what we do not compute
        with pytest.raises(UserError, match=key):
            read({"architectures": ["OLMoForCausalLM"], **FIRST_OLMO} | {key: key != "rope"})
        silent = {name: value for name, value in FIRST_OLMO.items() if name != key}
        with pytest.raises(UserError, match=key):
            read({"architectures": ["OLMoForCausalLM"], **silent})


def test_what_means_the_same_is_not_refused() -> None:
    llama = read(of_kind("Llama"))
    for harmless in (
        {"hidden_act": "swish"}, {"hidden_act": None}, {"partial_rotary_factor": 1}, {"rope_scaling": {}},
        {"rope_parameters": {"partial_rotary_factor": 1.0, "type": "default"}}, {"rope_scaling": {"type": "default"}},
        {"sliding_window": 2048}, {"layer_types": ["full_attention"] * 3}, {"quantization_config": None},
        {"sliding_window": 5, "use_sliding_window": False},
        {"sliding_window": 2048, "layer_types": ["sliding_attention"]},
    ):  # fmt: skip
        assert read(of_kind("Llama", **harmless)) == llama, harmless
    assert read(of_kind("Llama", max_sequence_length=5)).context == 5
    assert read(of_kind("Llama", model_max_length=6)).context == 6
    for refused in (
        {"sliding_window": 2047}, {"layer_types": ["full_attention", "sliding_attention"]},
        {"rope_scaling": {"factor": 2.0}}, {"rope_scaling": {"rope_type": "linear"}},
        {"sliding_window": 2047, "use_sliding_window": True},
    ):  # fmt: skip
        with pytest.raises(UserError):
            read(of_kind("Llama", **refused))


def test_a_number_is_read_from_the_first_key_that_holds_one() -> None:
    raw = HfConfig("f", {"a": None, "b": 3, "c": 4, "largest": LARGEST, "more": LARGEST + 1, "x": 2, "list": [1, 2]})
    assert (raw.find("a", "b", "c"), raw.find("c", "b"), raw.find("a", "z")) == (3, 4, None)
    assert (raw.integer("a", "b"), raw.integer("a", default=7), raw.integer("b", default=7)) == (3, 7, 3)
    assert raw.integer("largest") == raw.number("largest") == 1 << 40
    assert raw.number("zero", default=0.0) == 0.0 and isinstance(raw.number("x"), float)
    assert (raw.items("list", int), raw.items("a", int)) == ([1, 2], [])
    assert raw.flag("a", default=True) and not raw.flag("a", default=False)
    for read_it, said in (
        (lambda: raw.integer("more"), "f: more="), (lambda: raw.number("more"), "f: more="),
        (lambda: raw.integer("a", "z"), "f: a is missing"), (lambda: raw.items("list", str), "f: list="),
        (lambda: raw.flag("b", default=True), "f: b=3 is not true or false"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            read_it()


def test_a_model_is_written_in_the_first_layout_that_transformers_opens_by_itself() -> None:
    chosen = {}
    for architecture, raw, changes in READINGS:
        family, _ = families.of_hf(HfConfig("", {"architectures": [architecture], **raw}))
        config = dataclasses.replace(OURS, **changes)
        chosen[family.name] = families.of_config(config).name
        assert families.of_config(config, family.name) is family
    foreign = {"yi": "llama", "mistral": "llama", "baichuan": "llama", "olmo_first": "olmo"}
    assert chosen == {name: foreign.get(name, name) for name in chosen}
    assert families.of_config(MAMBA_OURS).name == "mamba"
    assert len({family.name for family in families.FAMILIES}) == len(families.FAMILIES)


@pytest.mark.parametrize(
    ("names", "tensors"),
    [
        (("llama", "yi", "baichuan", "baichuan2"), ["model.layers.11.self_attn.rotary_emb.inv_freq"]),
        (("gpt_neox",), [f"gpt_neox.layers.11.attention.{n}" for n in ("bias", "masked_bias", "rotary_emb.inv_freq")]),
    ],
)
def test_what_old_files_hold_of_what_is_computed_is_passed_over(names: tuple, tensors: list) -> None:
    """The causal mask and the rotary frequencies; never a weight."""
    chosen = [family for family in families.FAMILIES if family.name in names]
    assert len(chosen) == len(names)
    for family in chosen:
        passed_over = lambda tensor, family=family: any(re.fullmatch(p, tensor) for p in family.ignored)
        assert all(map(passed_over, tensors))
        assert not any(passed_over(weight.hf.format(layer=11)) for weight in family.weights)
