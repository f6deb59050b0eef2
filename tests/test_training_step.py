"""Loss, optimizer and step: equal to plain references and to torch, whatever the mesh and the accumulation."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from program_sizes import largest_array

from fineline_jax.catalogue import load_recipe
from fineline_jax.errors import UserError
from fineline_jax.mesh import BATCH, make_mesh
from fineline_jax.models.config import ModelConfig
from fineline_jax.recipe import Batch, Compute, Data, Loss, Mesh, Optimizer, Recipe, Schedule, Source
from fineline_jax.training.loss import cross_entropy, reference_cross_entropy
from fineline_jax.training.optimizer import SPIKE_WINDOW, learning_rate, make_optimizer
from fineline_jax.training.step import BATCH_SPEC, abstract_state, initial_state, make_train_step

RECIPE = Recipe(
    name="small",
    model=ModelConfig(vocab_size=64, width=16, layers=2, heads=4, mlp_width=32, context=16),
    data=Data((Source("random"),), sequence_length=16),
    batch=Batch(8),
    optimizer=Optimizer(Schedule(peak=1e-2, final=1e-3, warmup_tokens=3 * 8 * 16)),
    tokens=20 * 8 * 16,
    loss=Loss(ignore_token=3, z_loss=1e-3, chunk_tokens=20),
    compute=Compute(dtype="float32", remat="full"),
)


def mesh_of(replica: int, fsdp: int, tensor: int) -> jax.sharding.Mesh:
    return make_mesh(Mesh(replica, fsdp, tensor), jax.devices()[: replica * fsdp * tensor])


def windows_of(step: int, recipe: Recipe = RECIPE) -> np.ndarray:
    shape = (recipe.batch.sequences, recipe.data.sequence_length + 1)
    return np.random.default_rng(step).integers(0, recipe.model.vocab_size, shape, dtype=np.int32)


def losses_of(recipe: Recipe, mesh: jax.sharding.Mesh, steps: int) -> list[float]:
    with jax.set_mesh(mesh):
        state = jax.jit(lambda: initial_state(recipe))()
        step = jax.jit(make_train_step(recipe, mesh), donate_argnums=0)
        losses = []
        for index in range(steps):
            windows = jax.device_put(windows_of(index, recipe), jax.NamedSharding(mesh, BATCH_SPEC))
            state, metrics = step(state, windows, np.int32(index))
            losses.append(float(metrics["loss"]))
    return losses


@pytest.fixture(scope="module")
def one_device_losses() -> list[float]:
    return losses_of(RECIPE, mesh_of(1, 1, 1), 20)


@pytest.mark.parametrize("axes", [(1, 8, 1), (1, 4, 2), (1, 2, 4)])
def test_twenty_steps_on_any_mesh_equal_one_device_without_a_rematerialization_warning(axes, one_device_losses, capfd):
    losses = losses_of(RECIPE, mesh_of(*axes), 20)
    np.testing.assert_allclose(losses, one_device_losses, rtol=1e-5)
    assert "rematerialization" not in capfd.readouterr().err


def test_accumulated_micro_batches_equal_the_big_batch(one_device_losses):
    recipe = dataclasses.replace(RECIPE, batch=Batch(8, accumulation=2))
    np.testing.assert_allclose(losses_of(recipe, mesh_of(1, 4, 1), 20), one_device_losses, rtol=1e-5)


@given(
    rows=st.integers(1, 3),
    length=st.integers(1, 9),
    chunk=st.integers(1, 40),
    z_loss=st.sampled_from([0.0, 0.1]),
    axes=st.sampled_from([(1, 1, 1), (1, 2, 4), (2, 2, 2)]),
)
@settings(max_examples=6, deadline=None)
def test_the_chunked_loss_and_its_gradients_equal_the_plain_ones(rows, length, chunk, z_loss, axes):
    mesh = mesh_of(*axes)
    random = np.random.default_rng(rows * 100 + length)
    rows *= axes[0] * axes[1]
    hidden = jnp.asarray(random.standard_normal((rows, length, 8)), jnp.float32)
    head = jnp.asarray(random.standard_normal((8, 12)), jnp.float32)
    targets = jnp.asarray(random.integers(0, 12, (rows, length)), jnp.int32)
    weights = jnp.asarray(random.random((rows, length)) > 0.3, jnp.float32)

    plain = lambda hidden, head: reference_cross_entropy(hidden, head, targets, weights, z_loss)

    @jax.jit
    def run_plain(hidden, head):
        values, pull = jax.vjp(plain, hidden, head)
        return values, pull((jnp.float32(3.0), jnp.float32(0.0)))

    (expected, expected_plain), expected_gradients = run_plain(hidden, head)
    with jax.set_mesh(mesh):
        put = lambda x, spec: jax.device_put(x, jax.NamedSharding(mesh, spec))
        arguments = put(hidden, jax.P(BATCH, None, None)), put(head, jax.P("fsdp", "tensor"))
        rows_of = put(targets, jax.P(BATCH, None)), put(weights, jax.P(BATCH, None))
        ours = lambda hidden, head: cross_entropy(hidden, head, *rows_of, z_loss, chunk)

        @jax.jit
        def run(hidden, head):
            values, pull = jax.vjp(ours, hidden, head)
            return values, pull((jnp.float32(3.0), jnp.float32(0.0))), ours(hidden, head)

        values, gradients, undifferentiated = run(*arguments)
    np.testing.assert_allclose(values, (expected, expected_plain), rtol=1e-5)
    np.testing.assert_allclose(undifferentiated, values, rtol=1e-6)
    for gradient, wanted in zip(gradients, expected_gradients):
        np.testing.assert_allclose(gradient, wanted, atol=2e-5 * max(1.0, float(jnp.abs(wanted).max())))


@pytest.mark.parametrize("axes", [(1, 1, 1), (1, 2, 2)])
def test_the_logits_of_all_tokens_never_exist(axes):
    mesh, shards = mesh_of(*axes), axes[1]
    rows, length, vocabulary, chunk = 4 * shards, 64, 1024 * axes[2], 32
    spread = lambda shape, dtype, *spec: jax.ShapeDtypeStruct(
        shape, dtype, sharding=jax.NamedSharding(mesh, jax.P(*spec))
    )
    hidden = spread((rows, length, 8), jnp.float32, BATCH)
    head = spread((8, vocabulary), jnp.float32, "fsdp", "tensor")
    targets, weights = (spread((rows, length), dtype, BATCH) for dtype in (jnp.int32, jnp.float32))
    of_one_device = 4 * length * 1024  # tokens x part of the vocabulary
    with jax.set_mesh(mesh):
        gradients = jax.grad(lambda *sides, t, w: cross_entropy(*sides, t, w, 1e-4, chunk)[0], argnums=(0, 1))
        ours = largest_array(lambda x, h, t, w: gradients(x, h, t=t, w=w), hidden, head, targets, weights)
    assert chunk * 1024 <= ours < of_one_device / 4


def test_the_plain_loss_holds_the_logits_of_all_tokens():
    """So the measure of the test before this one has teeth."""
    shapes = (4, 64, 8), (8, 1024), (4, 64), (4, 64)
    kinds = jnp.float32, jnp.float32, jnp.int32, jnp.float32
    plain = lambda *arrays: reference_cross_entropy(*arrays, 1e-4)[0]
    arguments = [jax.ShapeDtypeStruct(shape, kind) for shape, kind in zip(shapes, kinds, strict=True)]
    assert largest_array(jax.grad(plain, argnums=(0, 1)), *arguments) >= 4 * 64 * 1024


def test_in_bfloat16_masters_and_moments_stay_float32_and_the_losses_near(one_device_losses):
    mesh = mesh_of(1, 1, 1)
    recipe = dataclasses.replace(RECIPE, compute=Compute(dtype="bfloat16", remat="full"))
    with jax.set_mesh(mesh):
        state = jax.jit(lambda: initial_state(recipe))()
        windows = jax.device_put(windows_of(0, recipe), jax.NamedSharding(mesh, BATCH_SPEC))
        program = jax.jit(make_train_step(recipe, mesh)).lower(state, windows, np.int32(5))
        after, _ = program.compile()(state, windows, np.int32(5))
    assert "bf16[" in str(program.as_text(dialect="hlo")), "nothing is computed in bfloat16"
    kinds = {leaf.dtype for leaf in jax.tree.leaves((after["params"], after["opt_state"])) if leaf.ndim}
    assert kinds == {jnp.dtype("float32")}
    changed = np.abs(np.asarray(after["params"]["embed"]) - np.asarray(state["params"]["embed"]))
    assert 0 < changed[changed > 0].min() < 2.0**-9, "the master weights do not keep small updates"
    losses = losses_of(recipe, mesh, 8)
    np.testing.assert_allclose(losses, one_device_losses[:8], rtol=5e-3)
    assert losses != one_device_losses[:8]


def test_learning_rate_is_optax_warmup_cosine_and_amber_starts_at_zero():
    amber = load_recipe("amber_7b")
    oracle = optax.warmup_cosine_decay_schedule(0.0, 3e-4, 2000, amber.steps, 3e-5)
    steps = np.array([0, 1, 1000, 1999, 2000, 2001, 100_000, 274_319, 274_320])
    rates = jax.vmap(lambda step: learning_rate(amber, step))(steps)
    np.testing.assert_allclose(rates, [oracle(step) for step in steps], rtol=1e-5, atol=1e-12)
    assert float(learning_rate(amber, 0)) == 0.0


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Schedule(1.0, 0.1, kind="linear"), {0: 1.0, 50: 0.55, 100: 0.1}),
        (Schedule(1.0, 0.1, kind="constant", warmup_tokens=10 * 128), {0: 0.0, 5: 0.5, 10: 1.0, 100: 1.0}),
        (Schedule(1.0, 0.0, kind="wsd", decay_tokens=20 * 128), {0: 1.0, 80: 1.0, 90: 0.5, 100: 0.0}),
        (Schedule(1.0, 0.1, kind="multistep"), {0: 1.0, 79: 1.0, 80: 0.316, 90: 0.1, 99: 0.1}),
    ],
)
def test_the_other_schedules_pass_through_their_corners(schedule, expected):
    recipe = dataclasses.replace(RECIPE, optimizer=Optimizer(schedule), tokens=100 * 128)
    for step, rate in expected.items():
        assert float(learning_rate(recipe, step)) == pytest.approx(rate, abs=1e-6)


def test_the_optimizer_is_torch_adamw_with_clipping_and_decay_on_everything():
    torch = pytest.importorskip("torch", reason="pip install -e '.[test]'")
    random = np.random.default_rng(0)
    start = {"up": random.standard_normal((5, 3)), "norm": random.standard_normal(3)}
    peers = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in start.items()}
    adamw = torch.optim.AdamW(peers.values(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), start)
    optimizer = make_optimizer(Optimizer(Schedule()))
    state = optimizer.init(params)
    for _ in range(10):
        gradients = {name: random.standard_normal(value.shape) for name, value in start.items()}
        for name, peer in peers.items():
            peer.grad = torch.tensor(gradients[name])
        torch.nn.utils.clip_grad_norm_(peers.values(), 1.0)
        adamw.step()
        ours = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), gradients)
        updates, state = optimizer.update(ours, state, params, loss=jnp.float32(1), gradient_norm=optax.tree.norm(ours))
        params = jax.tree.map(lambda p, u: p - 3e-3 * u, params, updates)
    for name, peer in peers.items():
        np.testing.assert_allclose(params[name], peer.detach().numpy(), rtol=2e-5, atol=1e-6)


def test_decay_of_matrices_leaves_norms_and_biases_alone():
    kept = ("mlp_norm", "norm", "q_bias", "conv_bias", "step_bias", "a_log", "skip")
    params = {name: jnp.ones(2) for name in ("up", "router", "step", "x", *kept)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    optimizer = make_optimizer(Optimizer(Schedule(), decay="matrices"))
    updates, _ = optimizer.update(
        zeros, optimizer.init(params), params, loss=jnp.float32(0), gradient_norm=jnp.float32(0)
    )
    assert {name: float(update[0]) for name, update in updates.items()} == {
        **dict.fromkeys(("up", "router", "step", "x"), pytest.approx(0.1)),
        **dict.fromkeys(kept, 0),
    }


def test_bad_steps_are_left_out_and_counted():
    optimizer = make_optimizer(Optimizer(Schedule(), skip_nonfinite=True, skip_spike_sigmas=6.0))
    params = {"up": jnp.ones(2)}
    state = optimizer.init(params)
    update = jax.jit(
        lambda state, gradient, loss: optimizer.update(
            {"up": gradient}, state, params, loss=loss, gradient_norm=jnp.max(jnp.abs(gradient))
        )
    )
    random = np.random.default_rng(0)
    for _ in range(SPIKE_WINDOW):
        updates, state = update(state, jnp.ones(2), jnp.float32(2.0 + 0.1 * random.standard_normal()))
        assert float(updates["up"][0]) != 0
    for loss, gradient in ((math.nan, 1.0), (2.0, math.inf), (5.0, 1.0), (2.0, 50.0)):
        before = state
        updates, state = update(state, jnp.full(2, gradient), jnp.float32(loss))
        assert float(updates["up"][0]) == 0
        jax.tree.map(np.testing.assert_array_equal, before.inner, state.inner)
    assert int(state.skipped) == 4


def test_the_abstract_state_is_that_of_the_real_one():
    mesh = mesh_of(2, 2, 2)
    with jax.set_mesh(mesh):
        state = jax.jit(lambda: initial_state(RECIPE))()
    same = lambda real, target: (
        real.shape == target.shape
        and real.dtype == target.dtype
        and real.sharding.is_equivalent_to(target.sharding, real.ndim)
    )
    assert all(jax.tree.leaves(jax.tree.map(same, state, abstract_state(RECIPE, mesh))))


def test_a_batch_that_does_not_split_is_refused_by_name():
    recipe = dataclasses.replace(RECIPE, batch=Batch(6))
    with pytest.raises(UserError, match=r"batch\.sequences / batch\.accumulation = 6 is not a multiple"):
        abstract_state(recipe, mesh_of(1, 4, 1))
