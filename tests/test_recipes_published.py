"""The recipes of configs/ against what their authors published, restated here from the sources and not from the code.

Amber: LLM360/amber-train (main.py, main_utils.py, run.sh) and the cards of LLM360/Amber and AmberDatasets. OpenLLaMA:
EasyLM's pretrain_llama_7b.sh, optimizers.py, llama_model.py and data.py. TinyLlama: jzhang38/TinyLlama. GPT-3:
2005.14165, table 2.1. Chinchilla: 2203.15556, table 3.
"""

import dataclasses
import math

import pytest

from fineline_jax.catalogue import config_names, load_recipe
from fineline_jax.recipe import Clock, Recipe
from fineline_jax.training.schedule import learning_rate

# layers, width, heads, key/value heads, features of the MLP, weights; 32,000 ids and the rest of LLAMA below in all
SHAPES = {
    "amber_7b": (32, 4096, 32, 32, 11008, 6_738_415_616),
    "open_llama_3b": (26, 3200, 32, 32, 8640, 3_426_473_600),
    "open_llama_7b": (32, 4096, 32, 32, 11008, 6_738_415_616),
    "open_llama_7b_v2": (32, 4096, 32, 32, 11008, 6_738_415_616),
    "open_llama_13b": (40, 5120, 40, 40, 13824, 13_015_864_320),
    "llama_1b": (22, 2048, 32, 4, 5632, 1_100_048_384),  # TinyLlama
    "llama_350m": (24, 1024, 16, 16, 2736, 367_969_280),  # GPT-3 Medium's layers, width and heads
    "llama_60m": (8, 512, 8, 8, 1376, 58_073_600),
}
# sequences per step, steps, peak, final rate, steps of warmup
RUNS = {
    "amber_7b": (56 * 4 * 10, 360 * (1_706_976 // 2_240), 3e-4, 3e-5, 2_000),
    "open_llama_3b": (1_024, 500_000, 3e-4, 3e-5, 2_000),
    "open_llama_7b": (2_048, 250_000, 3e-4, 3e-5, 2_000),
    "open_llama_7b_v2": (2_048, 250_000, 3e-4, 3e-5, 2_000),
    "open_llama_13b": (1_024, 500_000, 3e-4, 3e-5, 2_000),
    "llama_1b": (512, 20_981, 4e-4, 4e-5, 209),
    "llama_350m": (256, 14_036, 6e-4, 6e-5, 140),
    "llama_60m": (128, 4_430, 1e-3, 1e-4, 44),
}
LLAMA = {
    "vocab_size": 32_000, "context": 2_048, "rope_theta": 10_000.0, "norm_eps": 1e-6, "init_std": 0.02,
    "tied_embeddings": False, "attention_bias": False, "mlp_bias": False, "qkv_bias": False, "qk_norm": False,
    "qk_norm_per_head": False, "clip_qkv": 0.0, "norm": "rms", "norm_after": False, "parallel_residual": False,
    "rotary_fraction": 1.0, "mlp": "swiglu", "experts": 0, "experts_per_token": 0, "normalise_experts": False,
    "shared_expert_width": 0, "head": "linear", "mixer": "attention", "state_size": 0, "conv_width": 0, "step_rank": 0,
    "norm_offset": 0.0, "post_norms": False, "shared_norm": False, "embed_norm": False, "positions": "rotary",
    "rounded_alibi": False, "state_norm_eps": 0.0,
    "position_offset": 0, "rotary_interleaved": False, "window": 0, "full_layers": (), "window_rope_theta": 0.0,
    "unrotated_layers": (), "qk_norm_after_rotary": False, "output_bias": False, "attention_scale": 0.0,
    "scale_by_layer": False, "attention_softcap": 0.0, "logit_softcap": 0.0, "embed_scale": 1.0, "residual_scale": 1.0,
    "logit_scale": 1.0, "head_bias": False, "ungated_shared_expert": False, "dense_layers": 0, "dense_mlp_width": 0,
    "router": "softmax", "expert_groups": 1, "groups_per_token": 1, "expert_scale": 1.0, "kv_lora_rank": 0,
    "q_lora_rank": 0, "nope_head_dim": 0, "v_head_dim": 0, "state_heads": 0, "state_groups": 0,
    "attention_layers": (), "inner_width": 0, "negative_eigenvalues": False,
    "rope_scaling": {
        "kind": "none", "factor": 1.0, "original_context": 0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "beta_fast": 32.0, "beta_slow": 1.0, "truncate": True, "attention_factor": 1.0, "mscale_all_dim": 0.0,
    },
}  # fmt: skip
# Both Amber and OpenLLaMA; ours take OpenLLaMA's. Every parameter decays, and nothing is skipped.
ADAMW = {
    "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "decay": "all", "clip_norm": 1.0,
    "skip_nonfinite": False, "skip_spike_sigmas": 0.0,
}  # fmt: skip
DATA = {
    "amber_7b": "data/amber",
    "open_llama_7b_v2": "data/open_llama_v2",
    "demo": "data/world",
}  # fmt: skip  all others: RedPajama
FIRST_OPEN_LLAMAS = ("open_llama_3b", "open_llama_7b", "open_llama_7b_v2", "open_llama_13b")
OURS = ("llama_60m", "llama_350m", "llama_1b")


def test_the_tables_here_hold_every_recipe() -> None:
    assert {*SHAPES, "demo"} == {*RUNS, "demo"} == set(config_names("{}.py"))
    assert all(load_recipe(name).name == name for name in (*SHAPES, "demo"))


@pytest.mark.parametrize("name", SHAPES)
def test_the_model_has_the_published_shape(name: str) -> None:
    layers, width, heads, kv_heads, mlp_width, parameters = SHAPES[name]
    sizes = {"layers": layers, "width": width, "heads": heads, "kv_heads": kv_heads, "mlp_width": mlp_width}
    model = load_recipe(name).model
    assert dataclasses.asdict(model) == LLAMA | sizes | {"head_dim": width // heads}
    attention = 2 * width * width + 2 * width * (width // heads) * kv_heads
    by_hand = 2 * 32_000 * width + layers * (attention + 3 * width * mlp_width + 2 * width) + width
    assert model.parameters == by_hand == parameters


@pytest.mark.parametrize("name", RUNS)
def test_the_run_has_the_published_length_and_optimizer(name: str) -> None:
    sequences, steps, peak, final, warmup = RUNS[name]
    recipe = load_recipe(name)
    assert (recipe.batch.sequences, recipe.batch.accumulation) == (sequences, 1)
    assert recipe.data.sequence_length == 2_048 and recipe.tokens == steps * sequences * 2_048
    assert recipe.steps == steps
    schedule = {"kind": "cosine", "peak": peak, "final": pytest.approx(final), "decay_tokens": 0}
    schedule |= {"warmup_tokens": warmup * sequences * 2_048, "milestones": ((0.8, 0.316), (0.9, 0.1))}
    assert dataclasses.asdict(recipe.optimizer) == ADAMW | {"schedule": schedule}
    # As amber-train's get_cosine_lr and optax's warmup_cosine_decay_schedule: 0 at first, warmup inside the total.
    middle = warmup + (steps - warmup) // 2
    landmarks = {0: 0.0, warmup // 2: peak * (warmup // 2) / warmup, warmup: peak, steps: final}
    for step in (warmup - 1, warmup + 1, middle, steps - 1):
        share = (step - warmup) / (steps - warmup)
        cosine = final + 0.5 * (1 + math.cos(math.pi * share)) * (peak - final)
        landmarks[step] = peak * step / warmup if step < warmup else cosine
    assert landmarks[middle] == pytest.approx((peak + final) / 2, rel=1e-3)
    for step, rate in landmarks.items():
        assert learning_rate(recipe, step * recipe.tokens_per_step) == pytest.approx(rate, rel=1e-12), step


def test_tokens_are_those_of_the_papers() -> None:
    assert load_recipe("amber_7b").tokens == 762 * 2_240 * 2_048 * 360 == 1_258_448_486_400
    for name in FIRST_OPEN_LLAMAS:
        assert load_recipe(name).tokens == 250_000 * 2_048 * 2_048 == 1_048_576_000_000
    for name in OURS:  # Chinchilla: twenty tokens per parameter, rounded down to a step
        recipe = load_recipe(name)
        assert 0 <= 20 * recipe.model.parameters - recipe.tokens < recipe.tokens_per_step


@pytest.mark.parametrize("name", ["demo", *SHAPES])
def test_what_is_read_masked_logged_and_seeded(name: str) -> None:
    recipe = load_recipe(name)
    assert [dataclasses.astuple(s) for s in recipe.data.sources] == [(DATA.get(name, "data/redpajama"), 1.0)]
    assert recipe.data.order == ("chunks" if name == "amber_7b" else "shuffle")  # train_000 to train_359, in order
    ignored = 1 if name in FIRST_OPEN_LLAMAS else None  # EasyLM's data.py masks BOS, amber-train nothing
    assert dataclasses.astuple(recipe.loss) == (ignored, 0.0, 0.0, 0.0, 1024)
    assert recipe.seed == (11_111 if name == "amber_7b" else 42 if name in FIRST_OPEN_LLAMAS else 0)
    assert dataclasses.astuple(recipe.logging) == (
        10 if name == "demo" else 1,
        True,
        None,
        0,
        0,
        (("held_out", None, "validation", 64),),
        0.0,
    )


@pytest.mark.parametrize("name", ["demo", *SHAPES])
def test_devices_and_arithmetic(name: str) -> None:
    """Amber: Fabric's bf16-mixed, activation checkpointing of every layer. OpenLLaMA: --dtype fp32, --mesh_dim -1,64,1,
    nothing_saveable."""
    recipe = load_recipe(name)
    released = name in ("amber_7b", *FIRST_OPEN_LLAMAS)
    easylm = name in FIRST_OPEN_LLAMAS
    assert dataclasses.astuple(recipe.mesh) == ((-1, 64, 1) if easylm else (1, -1, 1))
    assert recipe.compute.dtype == ("float32" if easylm or name == "demo" else "bfloat16")
    assert recipe.compute.remat == ("full" if released else "none" if name == "demo" else "context")
    assert recipe.compute.scan_layers == (name != "demo") and recipe.compute.attention == "auto"


def kept_every(recipe: Recipe, step: int) -> bool:
    return recipe.kept_steps() == tuple(range(0, recipe.steps + 1, step))


def rolls_every(recipe, step: int) -> bool:
    """Looked at from 0 on: a rolling checkpoint at each multiple and at no other step."""
    clock = Clock(recipe)
    return [at for at in range(4 * step + 1) if clock.is_rolling(at)] == [step, 2 * step, 3 * step, 4 * step]


def test_amber_keeps_the_360_released_checkpoints_and_the_start() -> None:
    amber = load_recipe("amber_7b")
    assert kept_every(amber, 762) and len(amber.kept_steps()) == 361
    tokens = [step * amber.tokens_per_step for step in amber.kept_steps()]
    assert tokens[1] == 3_495_690_240 and tokens[-1] == amber.tokens  # ckpt_000 is the state after the first chunk
    assert rolls_every(amber, 100)


@pytest.mark.parametrize(
    ("name", "step"),
    [("open_llama_3b", 5_000), ("open_llama_7b", 2_500), ("open_llama_7b_v2", 2_500), ("open_llama_13b", 5_000)],
)
def test_open_llama_keeps_a_hundred_milestones_and_the_start(name: str, step: int) -> None:
    """--save_milestone_freq=2500 of 250,000 steps; the repositories of single steps are multiples of that."""
    recipe = load_recipe(name)
    assert kept_every(recipe, step) and len(recipe.kept_steps()) == 101
    assert recipe.kept_steps()[1] * recipe.tokens_per_step == 10_485_760_000
    assert rolls_every(recipe, 100)


@pytest.mark.parametrize("name", OURS)
def test_ours_keep_every_hundredth_of_the_first_tenth_then_every_tenth(name: str) -> None:
    recipe = load_recipe(name)
    one = recipe.steps // 100
    tens = range(20 * one, recipe.steps + 1, 10 * one)
    assert recipe.kept_steps() == (*range(0, 11 * one, one), *tens, *({recipe.steps} - {*tens}))
    assert rolls_every(recipe, one)


def test_the_demo_is_a_llama_of_a_million_weights_and_two_million_tokens() -> None:
    demo = load_recipe("demo")
    sizes = {"layers": 4, "width": 128, "heads": 4, "kv_heads": 4, "head_dim": 32, "mlp_width": 320}
    assert dataclasses.asdict(demo.model) == LLAMA | sizes | {"vocab_size": 1_024, "context": 128, "init_std": 0.08}
    assert demo.model.parameters == 2 * 1_024 * 128 + 4 * (4 * 128**2 + 3 * 128 * 320 + 2 * 128) + 128 == 1_016_960
    assert (demo.batch.sequences, demo.batch.accumulation, demo.data.sequence_length) == (16, 1, 128)
    assert (demo.steps, demo.tokens) == (1_000, 2_048_000)
    schedule = {"kind": "cosine", "peak": 3e-3, "final": 3e-4, "warmup_tokens": 50 * 16 * 128, "decay_tokens": 0}
    schedule |= {"milestones": ((0.8, 0.316), (0.9, 0.1))}
    assert dataclasses.asdict(demo.optimizer) == ADAMW | {"schedule": schedule}
    kept = (0, 16, 32, 64, 128, 192, 256, 320, 400, 500, 600, 700, 800, 900, 1_000)
    assert demo.kept_steps() == kept and rolls_every(demo, 100)
