"""Every model_type that opens: transformers' numbers on one device and on eight, by rows and by prefix trees, and the
same files back; and the table of docs/families.md, which has all model types of transformers."""

from pathlib import Path
from typing import Any

import model_types
import pytest
from docs_pages import table
from family_examples import EXAMPLES, SHAPE, Watched
from model_types import TYPES

from fineline_jax.errors import UserError
from fineline_jax.models import families
from fineline_jax.models.families.hf_config import HfConfig

FAST = ("gemma2", "deepseek_v3", "mamba2", "falcon_mamba", "falcon_rw", "olmo_hybrid")
"""Windows by layer, caps, second norms, scaled scores; latent attention, groups of experts, a layer without them;
states of heads; norms of states; rounded ALiBi; layers of two kinds."""
SLOW = {name: pytest.param(name, marks=pytest.mark.slow) for name in TYPES}


@pytest.mark.parametrize("name", [name if name in FAST else SLOW[name] for name in TYPES])
def test_a_model_has_the_numbers_of_transformers(name: str, tmp_path: Path) -> None:
    found = model_types.differences(name, tmp_path)
    trees = "mamba" not in name and "hybrid" not in name
    assert found.keys() == {"one device", "eight devices", "rows"} | ({"tree"} if trees else set())
    assert max(found.values()) < 1e-4, found


@pytest.mark.parametrize("name", [name if name in FAST and name != "olmo_hybrid" else SLOW[name] for name in TYPES])
def test_a_model_is_written_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    model_types.written_back(name, tmp_path)


def test_the_page_has_every_model_type_and_says_which_open() -> None:
    auto = pytest.importorskip("transformers.models.auto.modeling_auto")
    rows = table("docs/families.md", "`model_type`")
    kinds = {row["`model_type`"].strip("`"): row for row in rows}
    assert sorted(kinds) == sorted(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    opened = {kind for kind, row in kinds.items() if row["opens"] == "yes"}
    assert len(opened) >= 45
    compared = {*TYPES, *(name.split()[0] for name in EXAMPLES), "iquestcoder"}
    assert opened <= compared
    for kind, row in kinds.items():
        name = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]
        known = any(name in family.architectures for family in families.FAMILIES)
        assert known == (kind in opened), kind
        if known:
            assert 0 < float(row["largest difference, or why not"]) < 1e-4, kind
        else:
            with pytest.raises(UserError, match=f"config.json: architectures: {name} is not known"):
                families.of_hf(HfConfig("config.json", {"architectures": [name]}))


def words(text: str) -> set[str]:
    return set(text.split())


HARMLESS = words(
    # of training, generation and other heads
    """attention_dropout attn_pdrop embd_pdrop emb_pdrop resid_pdrop resid_dropout hidden_dropout activation_dropout
    hidden_dropout_prob attention_probs_dropout_prob classifier_dropout dropout layerdrop embed_dropout
    embedding_dropout residual_dropout classifier_dropout_prob router_aux_loss_coef router_jitter_noise
    output_router_logits use_cache
    bos_token_id eos_token_id pad_token_id eod_token_id is_encoder_decoder chunk_size_feed_forward return_dict
    output_hidden_states output_attentions id2label label2id problem_type dtype transformers_version architectures
    model_type _name_or_path pretraining_tp summary_activation summary_first_dropout summary_proj_to_labels
    summary_type summary_use_proj init_device is_decoder"""
    # how the same is computed, and what means nothing where another key is stated, as here
    """ slow_but_exact reorder_and_upcast_attn attention_softmax_in_fp32 scale_attention_softmax_in_fp32
    sliding_window_pattern _sliding_window_pattern n_ctx no_rope_layer_interval original_max_position_embeddings
    max_window_layers attention_layers"""
)
"""Keys that change no number."""
MAMBA1 = words(
    """residual_in_fp32 rescale_prenorm_residual time_step_floor time_step_init_scheme time_step_max time_step_min
    time_step_scale use_associative_scan use_mambapy"""
)
MAMBA2 = words(
    """chunk_size residual_in_fp32 rescale_prenorm_residual time_step_floor time_step_max time_step_min
    time_step_rank"""
)
OLMO_HYBRID = words("head_dim linear_a_log_max linear_a_log_min linear_dt_init_floor linear_dt_max linear_dt_min")
OF_A_TYPE = {
    "olmo_hybrid": OLMO_HYBRID,
    "olmo_hybrid turned": OLMO_HYBRID,
    "biogpt": {"layer_norm_eps"},  # its norms have torch's default
    "cohere2": {"head_dim"},  # the class derives it
    "deepseek_v2": words("head_dim qk_head_dim"),  # derived
    "deepseek_v2 lite": words("head_dim qk_head_dim n_group topk_group"),  # without groups
    "deepseek_v3": words("head_dim qk_head_dim num_nextn_predict_layers"),  # no layer of the model
    "deepseek_v3 moonlight": words("head_dim qk_head_dim topk_group num_nextn_predict_layers"),
    "dots1": {"topk_group"},  # without groups
    "exaone_moe": {"topk_group"},
    "glm4_moe": {"num_nextn_predict_layers"},  # no layer of the model
    "glm4_moe biased": {"num_nextn_predict_layers"},
    "solar_open": words("topk_group first_k_dense_replace intermediate_size"),  # all its layers have experts
    "falcon_rw": words("intermediate_size num_kv_heads rope_parameters"),
    "falcon_rw parallel": words("intermediate_size num_kv_heads rope_parameters"),
    "falcon of one key head": {"num_kv_heads", "intermediate_size"},  # multi_query has one
    "falcon": {"intermediate_size"},
    "mpt": {"learned_pos_emb"},  # alibi stands before it
    "opt": {"intermediate_size", "initializer_range"},
    "qwen2_moe": {"intermediate_size"},  # of layers without experts
    "qwen3_moe": {"intermediate_size"},
    # Of the first weights, and of how it is computed.
    "mamba": MAMBA1,
    "falcon_mamba": MAMBA1,
    "mamba2": MAMBA2,
    "mamba2 one group": MAMBA2,
}


@pytest.mark.parametrize("name", [name for name in TYPES if name != "internlm3"])
def test_every_key_of_a_class_is_read_or_harmless(name: str) -> None:
    """Else a model that sets it would open with other numbers."""
    transformers: Any = pytest.importorskip("transformers")
    example = TYPES[name]
    config_class = getattr(transformers, "Gemma3TextConfig" if example.kind == "Gemma3" else f"{example.kind}Config")
    raw = config_class(**(SHAPE if example.shaped else {}) | example.keys).to_dict()
    head = "LMHeadModel" if example.kind == "GPT2" else "ForCausalLM"
    watched = Watched(raw | {"architectures": [example.kind + head]})
    families.of_hf(HfConfig("config.json", watched))
    known = watched.asked | HARMLESS | OF_A_TYPE.get(name, set())
    unread = {key for key in raw.keys() - known if raw[key] is not None}
    assert not unread
