"""Experts, the scan, training and scoring of models that are no Llama: equal to plain references, on any mesh."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scoring_examples import score_once, write_benchmarks, write_tokenizer

from fineline_jax import prepare_pack
from fineline_jax.errors import UserError
from fineline_jax.mesh import BATCH, make_mesh
from fineline_jax.models import decoder, mamba, moe
from fineline_jax.models.config import ModelConfig
from fineline_jax.recipe import Batch, Compute, Data, Loss, MeshShape, Optimizer, Recipe, Schedule, Source
from fineline_jax.scoring.engine import scorer
from fineline_jax.scoring.requests import pack
from fineline_jax.training.schedule import rates
from fineline_jax.training.step import BATCH_SPEC, initial_state, make_train_step

PLAIN = ModelConfig(vocab_size=512, width=32, layers=2, heads=4, mlp_width=48, context=48)
NEOX = dataclasses.replace(
    PLAIN, norm="layer", parallel_residual=True, rotary_fraction=0.5, mlp="gelu", attention_bias=True, mlp_bias=True
)
OLMOE = dataclasses.replace(PLAIN, qk_norm=True, clip_qkv=0.7, experts=8, experts_per_token=2)
OLMO2 = dataclasses.replace(PLAIN, kv_heads=2, norm_after=True, qk_norm=True, head="normalised")
QWEN_MOE = dataclasses.replace(
    PLAIN, kv_heads=2, qk_norm=True, qk_norm_per_head=True, qkv_bias=True, experts=4, experts_per_token=2,
    normalise_experts=True, shared_expert_width=24,
)  # fmt: skip
MAMBA = ModelConfig(
    vocab_size=512, width=32, layers=2, heads=0, mlp_width=64, context=48, tied_embeddings=True, mixer="mamba",
    state_size=4, conv_width=4, step_rank=2, init_std=0.1,
)  # fmt: skip
DEEPSEEK = dataclasses.replace(
    PLAIN, layers=3, head_dim=12, nope_head_dim=8, v_head_dim=10, kv_lora_rank=16, q_lora_rank=12, experts=8,
    experts_per_token=2, expert_groups=4, groups_per_token=2, router="sigmoid", normalise_experts=True, dense_layers=1,
    dense_mlp_width=40, shared_expert_width=24, ungated_shared_expert=True, rotary_interleaved=True,
)  # fmt: skip
MAMBA2 = dataclasses.replace(MAMBA, step_rank=0, state_heads=8, state_groups=2)
MODELS = {
    "deepseek": DEEPSEEK, "gpt_neox": NEOX, "olmoe": OLMOE, "olmo2": OLMO2, "qwen_moe": QWEN_MOE, "mamba": MAMBA,
    "mamba2": MAMBA2,
}  # fmt: skip


def mesh_of(replica: int, fsdp: int, tensor: int) -> jax.sharding.Mesh:
    return make_mesh(MeshShape(replica, fsdp, tensor), jax.devices()[: replica * fsdp * tensor])


# Experts


ROWS = 500


@jax.jit
def grouped(rows: jax.Array, weights: jax.Array, sizes: jax.Array, slope: jax.Array) -> list:
    """Product and gradients: in blocks, and with every row's own matrix; and XLA's product."""
    group = jnp.repeat(jnp.arange(len(weights)), sizes, total_repeat_length=ROWS)
    blocked, pull = jax.vjp(lambda *x: moe.blocked_dot(*x, sizes), rows, weights)
    plain, pull_plain = jax.vjp(lambda rows, weights: jnp.einsum("nd,ndf->nf", rows, weights[group]), rows, weights)
    return [(blocked, *pull(slope)), (plain, *pull_plain(slope)), (jax.lax.ragged_dot(rows, weights, sizes),)]


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, ROWS), min_size=4, max_size=4), seed=st.integers(0, 9))
def test_groups_of_any_sizes_are_multiplied_like_ragged_dot(cuts: list[int], seed: int) -> None:
    random = np.random.default_rng(seed)
    draw = lambda *size: jnp.asarray(random.normal(size=size), jnp.float32)
    sizes = jnp.asarray(np.diff([0, *sorted(cuts), ROWS]), jnp.int32)
    blocked, plain, ragged = grouped(draw(ROWS, 6), draw(5, 6, 3), sizes, draw(ROWS, 3))
    for ours, theirs in zip(blocked, plain, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    np.testing.assert_allclose(blocked[0], ragged[0], atol=1e-5)


def reference_mixture(x, router, gate, up, down, *, per_token: int, normalise: bool) -> jax.Array:
    """`moe.mixture` with every token through every expert."""
    tokens = x.reshape(-1, x.shape[-1])
    weights, chosen, _ = moe.route(tokens, router, per_token, normalise)
    share = jnp.zeros((tokens.shape[0], router.shape[1])).at[jnp.arange(tokens.shape[0])[:, None], chosen].set(weights)
    hidden = jax.nn.silu(jnp.einsum("td,edf->tef", tokens, gate)) * jnp.einsum("td,edf->tef", tokens, up)
    return jnp.einsum("tef,efd,te->td", hidden, down, share.astype(x.dtype)).reshape(x.shape)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_a_mixture_and_its_gradients_are_those_of_all_experts_on_all_tokens(shape: tuple[int, int, int]) -> None:
    mesh, random = mesh_of(*shape), np.random.default_rng(0)
    draw = lambda *size: jnp.asarray(random.normal(size=size), jnp.float32)
    arrays = draw(4, 40, 8), draw(8, 6), draw(6, 8, 12), draw(6, 8, 12), draw(6, 12, 8)
    into = jax.P(None, None, "tensor")
    specs = jax.P(BATCH, None, None), jax.P(), into, into, jax.P(None, "tensor", None)
    settings = {"per_token": 3, "normalise": True}

    def loss(*arrays: jax.Array) -> jax.Array:
        return jnp.sum(moe.mixture(*arrays, **settings)[0] ** 3)

    plain = lambda *arrays: jnp.sum(reference_mixture(*arrays, **settings) ** 3)
    expected = jax.value_and_grad(plain, argnums=range(5))(*arrays)
    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, jax.NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True)]
        found = jax.jit(jax.value_and_grad(loss, argnums=range(5)))(*placed)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * float(jnp.abs(theirs).max()))


# The scan


@pytest.mark.parametrize("length", [5, mamba.CHUNK, mamba.CHUNK + 7])
def test_the_scan_is_the_recurrence_written_out(length: int) -> None:
    random = np.random.default_rng(length)
    x, step = random.normal(size=(2, length, 4)), random.uniform(0.01, 0.5, (2, length, 4))
    b, c = random.normal(size=(2, length, 3)), random.normal(size=(2, length, 3))
    a = -random.uniform(0.5, 2, (4, 3))
    state, expected = np.zeros((2, 4, 3)), np.zeros_like(x)
    for t in range(length):
        state = np.exp(step[:, t, :, None] * a) * state + (step * x)[:, t, :, None] * b[:, t, None]
        expected[:, t] = (state * c[:, t, None]).sum(-1)
    mesh = mesh_of(1, 2, 2)
    place = lambda array, spec: jax.device_put(array.astype(np.float32), jax.NamedSharding(mesh, spec))
    with jax.set_mesh(mesh):
        features, states = jax.P(BATCH, None, "tensor"), jax.P(BATCH, None, None)
        found = jax.jit(mamba.selective_scan)(
            place(x, features), place(step, features), place(a, jax.P("tensor")), place(b, states), place(c, states)
        )
    np.testing.assert_allclose(found, expected, atol=1e-5)


# Training


def losses_of(model: ModelConfig, mesh: jax.sharding.Mesh) -> tuple[list[float], list[float]]:
    recipe = Recipe(
        name="small",
        model=model,
        data=Data((Source("random"),), sequence_length=24),
        batch=Batch(4),
        optimizer=Optimizer(Schedule(peak=1e-2, final=1e-3)),
        tokens=3 * 4 * 24,
        loss=Loss(z_loss=1e-3, chunk_tokens=20),
        compute=Compute(dtype="float32", remat="full"),
    )
    losses, norms = [], []
    with jax.set_mesh(mesh):
        state = jax.jit(lambda: initial_state(recipe))()
        step = jax.jit(make_train_step(recipe, mesh), donate_argnums=0)
        for index in range(3):
            windows = np.random.default_rng(index).integers(0, model.vocab_size, (4, 25), dtype=np.int32)
            windows = jax.device_put(windows, jax.NamedSharding(mesh, BATCH_SPEC))
            state, metrics = step(state, windows, *rates(recipe, index * recipe.tokens_per_step))
            losses.append(float(metrics["loss"]))
            norms.append(float(metrics["gradient_norm"]))
        finite = jax.tree.map(lambda leaf: bool(jnp.isfinite(leaf).all()), state["params"])
    assert all(jax.tree.leaves(finite))
    return losses, norms


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_training_steps_on_eight_devices_equal_those_on_one(name: str) -> None:
    losses, norms = losses_of(MODELS[name], mesh_of(1, 1, 1))
    spread, spread_norms = losses_of(MODELS[name], mesh_of(2, 2, 2))
    np.testing.assert_allclose(spread, losses, rtol=1e-5)
    np.testing.assert_allclose(spread_norms, norms, rtol=1e-4)
    assert all(norm > 0 for norm in norms)


# Scoring


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> pack.Pack:
    folder = tmp_path_factory.mktemp("pack")
    tokenizer = write_tokenizer(folder / "bpe", adds_bos=True)
    benchmarks = write_benchmarks(folder / "benchmarks", documents=4)
    return prepare_pack("piqa@1,lambada_openai", tokenizer, folder / "p", benchmarks=benchmarks)


def random_params(model: ModelConfig, mesh: jax.sharding.Mesh) -> dict:
    random = np.random.default_rng(0)
    draw = lambda leaf: jax.device_put((0.3 * random.normal(size=leaf.shape)).astype(np.float32), leaf.sharding)
    return jax.tree.map(draw, decoder.abstract_params(model, mesh))


@pytest.mark.parametrize("name", ["gpt_neox", "olmoe", "olmo2", "qwen_moe"])
def test_prefix_tree_rows_give_what_plain_rows_give(made: pack.Pack, name: str) -> None:
    model, mesh = MODELS[name], mesh_of(1, 2, 2)
    params = random_params(model, mesh)
    tree, tree_greedy = score_once(made, model, params, mesh, batch_tokens=2048)
    rows, rows_greedy = score_once(made, model, params, mesh, engine="rows", batch_tokens=2048)
    np.testing.assert_allclose(tree, rows, atol=1e-3, rtol=1e-5)
    assert np.array_equal(tree_greedy, rows_greedy)
    assert np.ptp(tree) > 1


def test_a_state_space_model_is_scored_in_plain_rows_and_says_why(made: pack.Pack) -> None:
    mesh = mesh_of(1, 2, 2)
    params = random_params(MAMBA, mesh)
    assert scorer.pick_engine(PLAIN) == ("tree", "")
    engine, reason = scorer.pick_engine(MAMBA)
    assert engine == "rows" and "state" in reason
    with pytest.raises(UserError, match="engine='tree' cannot compute this model: a recurrent layer"):
        score_once(made, MAMBA, params, mesh, engine="tree")
    found, _ = score_once(made, MAMBA, params, mesh, batch_tokens=2048)
    rows, _ = score_once(made, MAMBA, params, mesh, engine="rows", batch_tokens=512)
    np.testing.assert_allclose(found, rows, atol=1e-4)


def test_sizes_that_cannot_be_are_refused_by_name() -> None:
    cases = [
        ({"experts": 4}, "model.experts_per_token=0"),
        ({"experts": 4, "experts_per_token": 2, "mlp": "gelu"}, "model.experts needs mlp='swiglu'"),
        ({"rotary_fraction": 0.1}, "model.rotary_fraction=0.1"),
        ({"norm_after": True, "parallel_residual": True}, "model.parallel_residual and model.norm_after"),
        ({"clip_qkv": -1.0}, "model.clip_qkv=-1.0"),
        ({"shared_expert_width": 8}, "model.shared_expert_width says how model.experts works"),
        ({"experts": 4, "experts_per_token": 2, "shared_expert_width": -1}, "model.shared_expert_width=-1"),
        ({"qk_norm_per_head": True}, "model.qk_norm_per_head says how model.qk_norm works"),
        ({"mixer": "mamba"}, "model.state_size=0"),
        ({"dense_layers": 1}, "model.dense_layers says how model.experts works"),
        ({"v_head_dim": 8}, "model.v_head_dim says how model.kv_lora_rank works"),
        ({"kv_lora_rank": 8, "v_head_dim": 8}, "model.nope_head_dim=0 must be at least 1 and below model.head_dim=8"),
        ({"kv_lora_rank": 8, "v_head_dim": 8, "nope_head_dim": 4, "kv_heads": 2}, "model.kv_heads=2 is not computed"),
        ({"experts": 4, "experts_per_token": 2, "expert_groups": 3}, "model.expert_groups=3 must divide"),
        ({"experts": 4, "experts_per_token": 3, "expert_groups": 2}, "model.groups_per_token=1 of 2 experts must"),
        ({"experts": 4, "experts_per_token": 2, "dense_layers": 2}, "model.dense_layers=2 must be between 0 and 1"),
        ({"experts": 4, "experts_per_token": 2, "dense_layers": 1}, "model.dense_mlp_width=0 must be at least 1"),
    ]
    for change, message in cases:
        with pytest.raises(UserError, match=message.replace(".", r"\.")):
            dataclasses.replace(PLAIN, **change)
    for change, message in (
        ({"state_heads": 8, "state_groups": 2}, "model.step_rank=2 means nothing with model.state_heads"),
        ({"state_heads": 6, "state_groups": 2, "step_rank": 0}, "model.state_heads=6 must divide model.mlp_width=64"),
        ({"state_heads": 8, "state_groups": 3, "step_rank": 0}, "be a multiple of state_groups=3"),
        ({"state_heads": 8, "step_rank": 0}, "model.state_groups=0 must be at least 1"),
    ):
        with pytest.raises(UserError, match=message.replace(".", r"\.")):
            dataclasses.replace(MAMBA, **change)
    with pytest.raises(UserError, match=r"model\.heads=4 means nothing"):
        dataclasses.replace(MAMBA, heads=4)


def test_a_released_configuration_can_be_trained_from_its_folder(tmp_path: Path) -> None:
    """The flags survive a recipe's JSON."""
    from fineline_jax.recipe import from_json, to_json

    recipe = Recipe(
        name="small",
        model=OLMOE,
        data=Data((Source("random"),), sequence_length=24),
        batch=Batch(4),
        optimizer=Optimizer(Schedule()),
        tokens=96,
    )
    for model in MODELS.values():
        changed = dataclasses.replace(recipe, model=model)
        (tmp_path / "recipe.json").write_text(to_json(changed))
        assert from_json(tmp_path / "recipe.json") == changed
