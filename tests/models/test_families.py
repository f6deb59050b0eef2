"""Every family: opened with the logits of transformers on one device and on eight, and written back bit for bit."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import family_examples
import jax
import numpy as np
import pytest
from family_examples import EXAMPLES, VOCABULARY, our_logits, their_logits
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from fineline_jax.checkpoints import convert
from fineline_jax.checkpoints.formats import huggingface
from fineline_jax.checkpoints.open import open_series
from fineline_jax.errors import UserError
from fineline_jax.mesh import make_mesh
from fineline_jax.models import decoder, families
from fineline_jax.models.config import ModelConfig
from fineline_jax.models.families.hf_config import HfConfig
from fineline_jax.models.families.name_map import cut, parse_axes, read_part, write_part
from fineline_jax.recipe import MeshShape

TOKENS = np.random.default_rng(1).integers(0, VOCABULARY, (4, 20), dtype=np.int32)


def mesh_of(replica: int, fsdp: int, tensor: int) -> jax.sharding.Mesh:
    return make_mesh(MeshShape(replica, fsdp, tensor), jax.devices()[: replica * fsdp * tensor])


@pytest.fixture(scope="module", params=EXAMPLES, ids=lambda name: name.replace(" ", "_"))
def example(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Any]:
    folder = tmp_path_factory.mktemp("family") / "hf"
    return request.param, folder, family_examples.make(request.param, folder)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)], ids=["one_device", "eight_devices"])
def test_an_opened_model_gives_the_logits_of_transformers(
    example: tuple[str, Path, Any], shape: tuple[int, int, int]
) -> None:
    _, folder, model = example
    mesh = mesh_of(*shape)
    config, params = huggingface.load_hf(folder, mesh)
    theirs = their_logits(model, TOKENS)
    assert np.abs(our_logits(config, params, TOKENS, mesh) - theirs).max() < 1e-4
    assert theirs.std() > 0.05, "else anything would be near"


def test_a_model_written_back_has_the_same_tensors_bit_for_bit(example: tuple[str, Path, Any], tmp_path: Path) -> None:
    name, folder, model = example
    family = name.split()[0]
    config, params = huggingface.load_hf(folder, mesh_of(1, 4, 2))
    huggingface.export_hf(config, params, tmp_path / "out", family=family)
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    before = {name: tensor for name, tensor in before.items() if not name.endswith("inv_freq")}
    assert before.keys() == after.keys()
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)
    assert huggingface.config_from_hf(tmp_path / "out" / "config.json") == config
    if EXAMPLES[name].rename is None:
        reread = type(model).from_pretrained(tmp_path / "out").eval()
        assert np.array_equal(their_logits(reread, TOKENS), their_logits(model, TOKENS))
        return
    if name == "bailing_moe_v2":
        return  # no class here reads its layout; the bits and the config are equal to those that were opened
    torch = pytest.importorskip("torch", reason="pip install -e '.[test]'")
    import foreign_models

    foreign = foreign_models.opened(
        tmp_path / "out", json.loads((tmp_path / "out/config.json").read_text())["architectures"][0]
    )
    with torch.no_grad():
        logits = foreign(torch.asarray(TOKENS, dtype=torch.long)).numpy()
    assert np.abs(logits - their_logits(model, TOKENS)).max() < 1e-4


def test_a_model_goes_through_a_run_and_back_bit_for_bit(example: tuple[str, Path, Any], tmp_path: Path) -> None:
    """Imported in half precision into Orbax, and exported again."""
    name, folder, _ = example
    half, run, out = tmp_path / "half", tmp_path / "run", tmp_path / "out"
    half.mkdir()
    (half / "config.json").write_bytes((folder / "config.json").read_bytes())
    before = {name: tensor.astype(np.float16) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(before, half / "model.safetensors")
    convert.import_checkpoint(half, run, mesh_of(1, 4, 2), step=7)
    [checkpoint] = open_series(str(run)).checkpoints
    convert.export_checkpoint(checkpoint, out, mesh_of(2, 2, 2), family=name.split()[0])
    after = load_file(out / "model.safetensors")
    assert {name: tensor.tobytes() for name, tensor in before.items() if not name.endswith("inv_freq")} == {
        name: tensor.tobytes() for name, tensor in after.items()
    }


@pytest.mark.parametrize(("name", "becomes"), [("yi", "Llama"), ("baichuan", "Llama"), ("olmo_first tied", "Olmo")])
def test_a_foreign_model_can_be_written_for_transformers_alone(tmp_path: Path, name: str, becomes: str) -> None:
    from transformers import AutoModelForCausalLM

    model = family_examples.make(name, tmp_path / "hf")
    config, params = huggingface.load_hf(tmp_path / "hf", mesh_of(1, 1, 1))
    huggingface.export_hf(config, params, tmp_path / "out")
    reread = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(reread).__name__ == f"{becomes}ForCausalLM"
    assert np.array_equal(their_logits(reread, TOKENS), their_logits(model, TOKENS))


@pytest.mark.parametrize(
    ("model_type", "copy"),
    [("gpt_neox", "embed_out.weight"), ("llama", "lm_head.weight")],
)
def test_the_copy_of_a_tied_head_that_some_files_hold_is_passed_over(
    tmp_path: Path, model_type: str, copy: str
) -> None:
    config = ModelConfig(vocab_size=32, width=16, layers=1, heads=2, mlp_width=32, context=32, tied_embeddings=True)
    if model_type == "gpt_neox":
        config = dataclasses.replace(config, norm="layer", mlp="gelu", attention_bias=True, mlp_bias=True)
    mesh, folder = mesh_of(1, 1, 1), tmp_path / "hf"
    with jax.set_mesh(mesh):
        params = jax.jit(lambda: decoder.init_params(config, jax.random.key(0)))()
        huggingface.export_hf(config, params, folder, family=model_type)
    tensors = load_file(folder / "model.safetensors")
    embedding = next(value for name, value in tensors.items() if "embed" in name)
    save_file(tensors | {copy: embedding}, folder / "model.safetensors")
    _, opened = huggingface.load_hf(folder, mesh)
    jax.tree.map(np.testing.assert_array_equal, opened, params)
    save_file(tensors | {"another.weight": embedding}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"another\.weight"):
        huggingface.load_hf(folder, mesh)


def test_parameters_are_counted_as_they_are(example: tuple[str, Path, Any]) -> None:
    _, folder, model = example
    config = huggingface.config_from_hf(folder / "config.json")
    shapes = decoder.abstract_params(config, mesh_of(1, 1, 1))
    assert config.parameters == sum(leaf.size for leaf in jax.tree.leaves(shapes))
    biases = (
        config.experts * (config.layers - config.dense_layers) if config.router == "sigmoid" else 0
    )  # buffers there
    assert config.parameters == sum(parameter.numel() for parameter in model.parameters()) + biases


def test_a_family_that_cannot_hold_a_model_is_refused(tmp_path: Path) -> None:
    config = ModelConfig(vocab_size=8, width=8, layers=1, heads=2, mlp_width=8, kv_heads=1)
    with pytest.raises(
        UserError, match="the layout of family 'gpt_neox' cannot describe this model; of those known llama"
    ):
        families.of_config(config, "gpt_neox")
    with pytest.raises(UserError, match="none of the released layouts can describe this model"):
        families.of_config(dataclasses.replace(config, norm_after=True, parallel_residual=False, clip_qkv=3.0))
    with pytest.raises(UserError, match="family 'gtp' is not known; known: llama"):
        families.of_config(config, "gtp")


# Sizes as published


def published(**raw: Any) -> ModelConfig:
    return families.of_hf(HfConfig("config.json", raw))[1]


def test_released_models_have_exactly_their_published_number_of_parameters() -> None:
    pythia = published(
        architectures=["GPTNeoXForCausalLM"], vocab_size=50304, hidden_size=2048, num_hidden_layers=16,
        num_attention_heads=8, intermediate_size=8192, rotary_pct=0.25, rotary_emb_base=10000, hidden_act="gelu",
        use_parallel_residual=True, tie_word_embeddings=False,
    )  # fmt: skip
    assert pythia.parameters == 1_011_781_632  # EleutherAI/pythia README, 1b
    assert (pythia.head_dim, pythia.rotary_dim) == (256, 64)
    olmoe = published(
        architectures=["OlmoeForCausalLM"], vocab_size=50304, hidden_size=2048, num_hidden_layers=16,
        num_attention_heads=16, num_key_value_heads=16, intermediate_size=1024, num_experts=64, num_experts_per_tok=8,
        norm_topk_prob=False, rms_norm_eps=1e-5, tie_word_embeddings=False, clip_qkv=None,
    )  # fmt: skip
    assert olmoe.parameters == 6_919_161_856  # 2409.02060: 6.9 B, of which 1.3 B active
    assert round(olmoe.active_parameters / 1e9, 1) == 1.3
    olmo2 = published(
        architectures=["Olmo2ForCausalLM"], vocab_size=100352, hidden_size=4096, num_hidden_layers=32,
        num_attention_heads=32, intermediate_size=11008, rms_norm_eps=1e-6, rope_theta=500000,
        tie_word_embeddings=False,
    )  # fmt: skip
    assert olmo2.parameters == 7_298_617_344  # HF allenai/OLMo-2-1124-7B
    mamba = published(
        architectures=["MambaForCausalLM"], vocab_size=50280, hidden_size=768, num_hidden_layers=24,
        intermediate_size=1536, state_size=16, conv_kernel=4, time_step_rank=48,
    )  # fmt: skip
    assert mamba.parameters == 129_135_360  # HF state-spaces/mamba-130m-hf
    yi = published(
        architectures=["YiForCausalLM"], vocab_size=64000, hidden_size=7168, num_hidden_layers=60,
        num_attention_heads=56, num_key_value_heads=8, intermediate_size=20480, rms_norm_eps=1e-5,
    )  # fmt: skip
    assert yi.parameters == 34_388_917_248  # HF 01-ai/Yi-34B
    assert yi.rope_theta == 5e6
    qwen = published(
        architectures=["Qwen3MoeForCausalLM"], vocab_size=151936, hidden_size=2048, num_hidden_layers=48,
        num_attention_heads=32, num_key_value_heads=4, head_dim=128, intermediate_size=6144, num_experts=128,
        num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=True, decoder_sparse_step=1,
        mlp_only_layers=[], rope_theta=1e6, rms_norm_eps=1e-6, tie_word_embeddings=False,
    )  # fmt: skip
    assert qwen.parameters == 30_532_122_624  # HF Qwen/Qwen3-30B-A3B
    assert round(qwen.active_parameters / 1e9, 1) == 3.4  # with both tables; 2505.09388 says 3.3
    lite = ModelConfig(
        102_400, 2048, 27, 16, 1408, head_dim=192, nope_head_dim=128, v_head_dim=128, kv_lora_rank=512, experts=64,
        experts_per_token=6, shared_expert_width=2816, ungated_shared_expert=True, dense_layers=1,
        dense_mlp_width=10_944,
    )  # fmt: skip
    assert lite.parameters == 15_706_484_224  # HF deepseek-ai/DeepSeek-V2-Lite
    assert round(lite.active_parameters / 1e9, 1) == 2.7  # with both tables; 2405.04434 says 2.4


def test_flops_count_the_weights_a_token_goes_through() -> None:
    dense = ModelConfig(vocab_size=8, width=16, layers=2, heads=2, mlp_width=24)
    sparse = dataclasses.replace(dense, experts=8, experts_per_token=1)
    router = 6 * dense.layers * dense.width * 8
    assert sparse.train_flops_per_token(32) == dense.train_flops_per_token(32) + router
    assert sparse.parameters - sparse.active_parameters == 2 * 7 * 3 * 16 * 24
    gelu = dataclasses.replace(dense, mlp="gelu")
    assert dense.train_flops_per_token(32) - gelu.train_flops_per_token(32) == 6 * 2 * 16 * 24


# What is refused

EXAONE_MOE = {"mlp_layer_types": ["sparse", "dense"], "num_hidden_layers": 2, "num_key_value_heads": 2}
FIRST_OLMO = {"rope": True, "layer_norm_with_affine": False, "include_bias": False}
QWEN_MOE = family_examples.QWEN_MOE | {"shared_expert_intermediate_size": 24}
LLAMA: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], **family_examples.SHAPE}


@pytest.mark.parametrize(
    ("architecture", "change", "message"),
    [
        ("LlamaForCausalLM", {"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope_scaling: 'longrope'"),
        ("LlamaForCausalLM", {"rope_scaling": {"type": "linear"}}, "rope_scaling: factor is missing"),
        ("LlamaForCausalLM", {"rope_parameters": {"llama_4_scaling_beta": 0.1}}, "llama_4_scaling_beta=0.1 is not"),
        ("Gemma3ForCausalLM", {"rope_parameters": {"factor": 8.0}, "num_key_value_heads": 2}, "factor=8.0 is not"),
        ("PhiForCausalLM", {"qk_layernorm": True}, "qk_layernorm=True"),
        ("DeepseekV2ForCausalLM", {"norm_topk_prob": True, "num_experts_per_tok": 2}, "norm_topk_prob=True"),
        (
            "DeepseekV3ForCausalLM",
            {"rope_scaling": {"type": "linear", "factor": 2.0, "mscale_all_dim": 1.0}},
            "mscale_all",
        ),
        ("FalconForCausalLM", {"alibi": True}, "multi_query=True"),
        ("BailingMoeV2ForCausalLM", {"use_bias": True}, "use_bias=True"),
        ("ExaoneMoeForCausalLM", EXAONE_MOE, "mlp_layer_types=\\['sparse', 'dense'\\]"),
        ("OPTForCausalLM", {"ffn_dim": 8, "word_embed_proj_dim": 16}, "word_embed_proj_dim=16"),
        ("MptForCausalLM", {"d_model": 8, "n_heads": 1, "n_layers": 1, "attn_config": {"qk_ln": True}}, "qk_ln=True"),
        ("SmolLM3ForCausalLM", {"no_rope_layers": [1]}, "no_rope_layers=\\[1\\] is not"),
        ("GPTNeoForCausalLM", {"num_layers": 2, "attention_types": [[["global"], 1]]}, "attention_types="),
        ("LlamaForCausalLM", {"sliding_window": 32}, "sliding_window=32"),
        ("LlamaForCausalLM", {"hidden_size": "wide"}, "hidden_size='wide' is not a whole number"),
        ("LlamaForCausalLM", {"rms_norm_eps": True}, "rms_norm_eps=True is not a number"),
        ("LlamaForCausalLM", {"rope_parameters": [1]}, "rope_parameters=\\[1\\] is not a table"),
        ("MistralForCausalLM", {"sliding_window": 32, "layer_types": ["full_attention"] * 2}, "layer_types='full_att"),
        ("MixtralForCausalLM", {"num_experts_per_tok": 9, "num_key_value_heads": 2}, "model.experts_per_token=9"),
        ("Qwen2ForCausalLM", {"layer_types": ["full_attention", "chunked"]}, "layer_types='chunked'"),
        ("Qwen2ForCausalLM", {"layer_types": ["sliding_attention"]}, "layer_types=\\['sliding_attention'\\]"),
        ("GPTNeoXForCausalLM", {"hidden_act": "quick_gelu"}, "hidden_act='quick_gelu'"),
        ("GPTNeoXForCausalLM", {"rope_scaling": {"type": "su"}}, "rope_scaling: 'su'"),
        ("OLMoForCausalLM", FIRST_OLMO | {"alibi": True}, "alibi=True"),
        ("OLMoForCausalLM", {"layer_norm_type": "rms"}, "layer_norm_type='rms'"),
        ("OLMoForCausalLM", FIRST_OLMO | {"n_heads": 4, "n_layers": 1, "d_model": 32, "n_kv_heads": 2}, "n_kv_heads=2"),
        ("BaichuanForCausalLM", {"max_position_embeddings": None}, "ALiBi"),
        ("BaichuanForCausalLM", {"num_attention_heads": 40}, "num_attention_heads=40"),
        ("MambaForCausalLM", {"use_bias": True}, "use_bias=True"),
        ("Qwen2MoeForCausalLM", QWEN_MOE | {"decoder_sparse_step": 2}, "decoder_sparse_step=2"),
        ("Qwen2MoeForCausalLM", QWEN_MOE | {"mlp_only_layers": [0, 7]}, "mlp_only_layers=\\[0\\]"),
        ("Qwen3MoeForCausalLM", QWEN_MOE | {"mlp_only_layers": "none"}, "mlp_only_layers='none' is not a list"),
        ("Qwen3MoeForCausalLM", {"num_experts": 4}, "moe_intermediate_size is missing"),
        ("Qwen3ForCausalLM", {"head_dim": 7, "num_key_value_heads": 2}, "config.json: model.head_dim=7"),
        ("LlamaForCausalLM", {"num_attention_heads": 0}, "config.json: model.heads=0"),
        ("LlamaForCausalLM", {"sliding_window": "all"}, "sliding_window='all' is not a whole number"),
        ("LlamaForCausalLM", {"layer_types": 3}, "layer_types=3 is not a list"),
        ("LlamaForCausalLM", {"rope_parameters": {"rope_theta": "big"}}, "rope_theta='big' is not a number"),
        ("LlamaForCausalLM", {"architectures": "Llama"}, "architectures='Llama' is not a list"),
        ("LlamaForCausalLM", {"rms_norm_eps": float("nan")}, "rms_norm_eps=nan is not a number from 0 on"),
        ("LlamaForCausalLM", {"rms_norm_eps": -1e-6}, "rms_norm_eps=-1e-06 is not a number from 0 on"),
        ("LlamaForCausalLM", {"initializer_range": float("inf")}, "initializer_range=inf is not a number from 0 on"),
        ("LlamaForCausalLM", {"rope_theta": 10**4000}, "rope_theta=1000000000000\\d+ is not a number"),
        ("LlamaForCausalLM", {"hidden_size": 10**4000}, "hidden_size=1000000000000\\d+… is no size"),
        ("LlamaForCausalLM", {"intermediate_size": -(10**4000)}, "intermediate_size=-100000000000\\d+… is no size"),
        ("GPTNeoXForCausalLM", {"rope_parameters": {"partial_rotary_factor": "all"}}, "partial_rotary_factor='all'"),
        ("OlmoForCausalLM", {"clip_qkv": -3.0}, "clip_qkv=-3.0 is not a number from 0 on"),
        ("ReformerModelWithLMHead", {}, "architectures: ReformerModelWithLMHead is not known; docs/families.md"),
    ],
)
def test_what_the_decoder_does_not_compute_is_refused_by_key(
    architecture: str, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        published(**(LLAMA | {"architectures": [architecture]} | change))
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_layers_that_are_all_alike_are_no_reason_to_refuse() -> None:
    found = published(**(LLAMA | QWEN_MOE | {"architectures": ["Qwen2MoeForCausalLM"], "mlp_only_layers": [2]}))
    assert (found.experts, found.mlp_width, found.shared_expert_width, found.qkv_bias) == (4, 16, 24, True)
    with pytest.raises(UserError, match=r"config\.json: holds no mapping"):
        families.of_hf(HfConfig("config.json", [1]))  # type: ignore[arg-type]


def test_a_window_that_is_not_in_effect_is_no_reason_to_refuse() -> None:
    qwen = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 32, "use_sliding_window": False}
    qwen["num_key_value_heads"] = 2
    wide = LLAMA | {"sliding_window": 64}
    assert published(**qwen).qkv_bias and not published(**wide).qkv_bias


# The name map alone


@settings(max_examples=60, deadline=None)
@given(
    line=st.sampled_from(
        [
            "(heads dim) width -> width heads dim",
            "(heads 1/3 dim) width -> width heads dim",
            "(2/3 heads dim) width -> width heads dim",
            "width (heads dim) -> heads dim width",
            "width (heads 2:pair half) -> width heads (half 2:pair)",
        ]
    ),
    data=st.data(),
)
def test_any_part_of_a_line_is_read_as_the_part_of_the_whole(line: str, data: st.DataObject) -> None:
    axes, sizes = parse_axes(line), {"heads": 4, "dim": 6, "width": 5, "pair": 2, "half": 3}
    shape = [int(np.prod([sizes[axis.name] for axis in group])) for group in axes.ours]
    tensor = np.arange(np.prod(axes.file_shape(shape))).reshape(axes.file_shape(shape))
    whole = read_part(tensor, axes, shape, [slice(None)] * len(shape))
    assert whole.shape == tuple(shape)
    index = []
    for size in shape:
        start = data.draw(st.integers(0, size - 1))
        index.append(slice(start, data.draw(st.integers(start + 1, size))))
    assert np.array_equal(read_part(tensor, axes, shape, index), whole[tuple(index)])
    most = data.draw(st.integers(1, tensor.size + 1))
    pieced, spans = np.zeros_like(whole), tuple((part.start, part.stop) for part in index)
    for piece in cut(axes, shape, spans, most):
        pieced[tuple(slice(*span) for span in piece)] += read_part(tensor, axes, shape, [slice(*s) for s in piece])
    assert np.array_equal(pieced[tuple(index)], whole[tuple(index)]), "every element in one piece"
    again = np.zeros_like(tensor)
    write_part(again, axes, whole)
    assert set(again.ravel()) - {0} == set(whole.ravel()) - {0}
    assert np.array_equal(read_part(again, axes, shape, [slice(None)] * len(shape)), whole)


def test_a_piece_is_a_stretch_of_the_file_of_the_size_asked_for() -> None:
    """Of a part of the columns too, which lies in as many rows as the whole."""
    axes = parse_axes("mlp width -> width mlp")
    pieces = cut(axes, [64, 100], ((32, 64), (0, 100)), 64 * 40)
    assert pieces == [((32, 64), (0, 34)), ((32, 64), (34, 68)), ((32, 64), (68, 100))]
    assert cut(parse_axes("1:one width -> (1:one width)"), [5], ((0, 5),), 1) == [((0, 5),)], "regrouped: not cut"


def test_a_fused_tensor_is_read_only_where_it_is_wanted() -> None:
    asked = []

    class Watched:
        def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
            asked.append(index)
            return np.zeros((24, 5))[index]

    axes = parse_axes("(1/3 heads dim) width -> width heads dim")
    read_part(Watched(), axes, [5, 4, 2], [slice(0, 5), slice(2, 4), slice(0, 2)])
    assert asked == [(slice(12, 16), slice(0, 5))]


def test_mamba2_of_contradicting_sizes_is_refused() -> None:
    """transformers' Mamba2Config.validate_architecture."""
    raw = {"architectures": ["Mamba2ForCausalLM"], "vocab_size": 8, "hidden_size": 32, "num_hidden_layers": 1}
    raw |= {"num_heads": 8, "head_dim": 8, "n_groups": 1}
    _, config = families.of_hf(HfConfig("config.json", raw))
    assert (config.mlp_width, config.state_heads, config.state_groups, config.state_size) == (64, 8, 1, 128)
    with pytest.raises(UserError, match="expand=3 is not computed"):
        families.of_hf(HfConfig("config.json", raw | {"expand": 3}))
