"""Loss, schedule, optimizer and what a step is made of, each against its definition in NumPy (whole steps against
torch: test_training_oracle)."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
import torch_steps
from program_sizes import largest_array

from fineline_jax.catalogue import load_recipe
from fineline_jax.errors import UserError
from fineline_jax.mesh import BATCH, make_mesh
from fineline_jax.models.config import ModelConfig
from fineline_jax.models.decoder import abstract_params
from fineline_jax.recipe import Batch, Compute, Data, Loss, MeshShape, Optimizer, Recipe, Schedule, Source
from fineline_jax.training.loss import cross_entropy, reference_cross_entropy
from fineline_jax.training.optimizer import SPIKE_WINDOW, SkipState, make_optimizer
from fineline_jax.training.schedule import learning_rate
from fineline_jax.training.step import (
    BATCH_SPEC,
    abstract_state,
    attention_of,
    initial_state,
    make_loss_sums,
    micro_batches,
    padded_rows,
    target_weights,
)

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
    return make_mesh(MeshShape(replica, fsdp, tensor), jax.devices()[: replica * fsdp * tensor])


# The loss


def loss_in_float64(hidden, head, targets, weights, z_loss):
    """(sum with z-loss, sum without), and the gradients of the first: softmax - one at the target, and so on."""
    hidden, head, weights = (np.asarray(x, np.float64) for x in (hidden, head, weights))
    logits = hidden @ head
    normaliser = scipy.special.logsumexp(logits, axis=-1)
    losses = normaliser - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    slope = scipy.special.softmax(logits, axis=-1) * (1 + 2 * z_loss * normaliser)[..., None]
    slope = weights[..., None] * (slope - np.eye(head.shape[1])[targets])
    sums = (weights * (losses + z_loss * normaliser**2)).sum(), (weights * losses).sum()
    return sums, (slope @ head.T, np.einsum("bsw,bsv->wv", hidden, slope))


def loss_of(axes, hidden, head, targets, weights, z_loss, chunk, cotangents=(1.0, 0.0)):
    """The sums, the gradients, and the sums where no gradient is asked for."""
    mesh, batch = mesh_of(*axes), jax.P(BATCH)
    with jax.set_mesh(mesh):
        specs = batch, jax.P("fsdp", "tensor"), batch, batch
        arrays = hidden, head, targets, weights
        hidden, head, *rest = (jax.device_put(x, jax.NamedSharding(mesh, s)) for x, s in zip(arrays, specs))

        @jax.jit
        def run(hidden, head):
            ours = lambda hidden, head: cross_entropy(hidden, head, *rest, z_loss, chunk)
            values, pull = jax.vjp(ours, hidden, head)
            return values, pull(tuple(map(jnp.float32, cotangents))), ours(hidden, head)

        # Else XLA leaves out, on this CPU, roundings that the program asks for and that another backend makes.
        exact = {"xla_allow_excess_precision": False}
        return run.lower(hidden, head).compile(compiler_options=exact)(hidden, head)


def example_of_loss(rows: int, length: int, dtype=np.float32):
    """Every other row has logits far beyond what exp can take, every target of the first row is the last id."""
    random = np.random.default_rng(rows * 100 + length)
    hidden = random.standard_normal((rows, length, 8))
    hidden[1::2] *= 20
    head = 2 * random.standard_normal((8, 20))
    targets = random.integers(0, 20, (rows, length), dtype=np.int32)
    targets[0] = 19
    weights = random.choice([0.0, 0.5, 1.0, 1.75], (rows, length)).astype(np.float32)
    return hidden.astype(dtype), head.astype(np.float32), targets, weights


@pytest.mark.parametrize(
    ("branch", "axes", "rows", "length", "chunk", "z_loss"),
    [
        ("cpu", (1, 1, 1), 3, 7, 20, 0.1),  # 21 tokens: one is left
        ("cpu", (1, 1, 1), 3, 7, 21, 0.0),
        ("cpu", (2, 2, 2), 4, 9, 4, 0.1),  # 9 of each device
        ("cpu", (1, 2, 4), 4, 5, 11, 0.0),  # 10 of each device, fewer than a chunk
        ("accelerators", (1, 1, 1), 3, 7, 20, 0.1),
        ("accelerators", (2, 2, 2), 4, 9, 4, 0.0),
    ],
)
def test_the_chunked_loss_and_its_gradients_are_the_closed_form(branch, axes, rows, length, chunk, z_loss, monkeypatch):
    if branch == "accelerators":  # what would be compiled there
        monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, cpu, default: default(*args))
    example = example_of_loss(rows, length)
    expected, gradients = loss_in_float64(*example, z_loss)
    values, found, undifferentiated = loss_of(axes, *example, z_loss, chunk, cotangents=(3.0, 7.0))
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    np.testing.assert_allclose(undifferentiated, expected, rtol=1e-5)
    for gradient, wanted in zip(found, gradients, strict=True):  # the second sum has none
        assert gradient.dtype == np.float32
        np.testing.assert_allclose(gradient, 3 * wanted, atol=1e-5 * np.abs(3 * wanted).max())


def test_the_plain_loss_is_the_closed_form():
    example = example_of_loss(2, 5)
    np.testing.assert_allclose(
        reference_cross_entropy(*map(jnp.asarray, example), 0.1), loss_in_float64(*example, 0.1)[0], rtol=1e-5
    )


def test_in_bfloat16_logits_sums_and_the_gradient_of_the_head_are_float32():
    """400 tokens with the same target in two chunks: rounded to bfloat16 once, a sum of slopes is wrong by 0.1%; each
    slope is rounded, but that averages out."""
    random, bfloat16 = np.random.default_rng(0), jnp.bfloat16
    hidden = random.uniform(0.5, 1.5, (2, 200, 8)).astype(bfloat16)
    head = random.standard_normal((8, 20)).astype(np.float32)
    targets, weights = np.full((2, 200), 3, np.int32), np.ones((2, 200), np.float32)
    expected, (of_hidden, of_head) = loss_in_float64(hidden, head.astype(bfloat16), targets, weights, 0.1)
    values, found, undifferentiated = loss_of((1, 1, 1), hidden, head, targets, weights, 0.1, 250)
    np.testing.assert_allclose(values, expected, rtol=1e-6)
    np.testing.assert_allclose(undifferentiated, expected, rtol=1e-6)
    assert [gradient.dtype for gradient in found] == [bfloat16, np.float32]
    np.testing.assert_allclose(found[0].astype(np.float32), of_hidden, atol=2.0**-7 * np.abs(of_hidden).max())
    assert np.sqrt(np.mean((found[1] / of_head - 1) ** 2)) < 2e-4


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


def test_a_chunk_is_no_larger_than_the_tokens():
    mesh, batch, head = mesh_of(1, 1, 1), jax.P(BATCH), jax.P("fsdp", "tensor")
    shapes = ((1, 5, 8), "float32", batch), ((8, 1024), "float32", head), ((1, 5), "int32", batch)
    arrays = [jax.ShapeDtypeStruct(s, kind, sharding=jax.NamedSharding(mesh, spec)) for s, kind, spec in shapes]
    with jax.set_mesh(mesh):
        loss = lambda hidden, head, targets: cross_entropy(
            hidden, head, targets, targets.astype(jnp.float32), 0.0, 4096
        )[0]
        assert largest_array(jax.grad(loss, argnums=(0, 1)), *arrays) <= 8 * 1024


def test_the_plain_loss_holds_the_logits_of_all_tokens():
    """So the measure of the test before this one has teeth."""
    shapes = (4, 64, 8), (8, 1024), (4, 64), (4, 64)
    kinds = jnp.float32, jnp.float32, jnp.int32, jnp.float32
    plain = lambda *arrays: reference_cross_entropy(*arrays, 1e-4)[0]
    arguments = [jax.ShapeDtypeStruct(shape, kind) for shape, kind in zip(shapes, kinds, strict=True)]
    assert largest_array(jax.grad(plain, argnums=(0, 1)), *arguments) >= 4 * 64 * 1024


# Schedules


def test_learning_rate_is_optax_warmup_cosine_and_amber_starts_at_zero():
    amber = load_recipe("amber_7b")
    oracle = optax.warmup_cosine_decay_schedule(0.0, 3e-4, 2000, amber.steps, 3e-5)
    steps = np.array([0, 1, 1000, 1999, 2000, 2001, 100_000, 274_319, 274_320])
    rates = [learning_rate(amber, int(step) * amber.tokens_per_step) for step in steps]
    np.testing.assert_allclose(rates, [oracle(step) for step in steps], rtol=1e-5, atol=1e-12)
    assert learning_rate(amber, 0) == 0.0


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "wsd", "multistep"])
@pytest.mark.parametrize("warmup_tokens", [0, 50, 128 * 5 + 3])
def test_every_schedule_is_its_definition_at_every_step(kind, warmup_tokens):
    """Warmup and decay end within a step; the tokens are no whole number of steps; a milestone falls on a step."""
    schedule = Schedule(
        3e-3, 4e-4, warmup_tokens, kind, decay_tokens=128 * 7 + 9, milestones=((0.45, 0.7), (0.5, 0.2), (0.99, 0.01))
    )
    recipe = dataclasses.replace(RECIPE, optimizer=Optimizer(schedule), tokens=40 * 128 + 77)
    rates = [learning_rate(recipe, step * 128) for step in range(40)]
    expected = [torch_steps.learning_rate(recipe, step) for step in range(40)]
    np.testing.assert_allclose(rates, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Schedule(1.0, 0.1, kind="cosine"), {0: 1.0, 50: 0.55, 100: 0.1, 101: 0.1}),
        (Schedule(1.0, 0.1, kind="linear"), {0: 1.0, 50: 0.55, 100: 0.1, 101: 0.1}),
        (Schedule(1.0, 0.1, kind="constant", warmup_tokens=10 * 128), {0: 0.0, 5: 0.5, 10: 1.0, 100: 1.0}),
        (Schedule(1.0, 0.0, kind="wsd", decay_tokens=20 * 128), {0: 1.0, 80: 1.0, 90: 0.5, 100: 0.0}),
        (Schedule(1.0, 0.1, kind="multistep"), {0: 1.0, 79: 1.0, 80: 0.316, 89: 0.316, 90: 0.1, 99: 0.1}),
        (Schedule(1.0, 0.1, warmup_tokens=100 * 128), {0: 0.0, 99: 0.99}),
    ],
)
def test_the_schedules_pass_through_their_corners(schedule, expected):
    recipe = dataclasses.replace(RECIPE, optimizer=Optimizer(schedule), tokens=100 * 128)
    for step, rate in expected.items():
        assert learning_rate(recipe, step * 128) == pytest.approx(rate, rel=1e-12)


# The optimizer


NAMES = {
    "decayed": "embed head q k v o gate up down router shared_gate shared_up shared_down shared_router in_proj_x"
    " in_proj_z conv1d x_proj dt_proj out_proj",
    "kept": "norm norm_bias attention_norm attention_norm_bias mlp_norm mlp_norm_bias mixer_norm q_norm k_norm q_bias"
    " k_bias v_bias o_bias gate_bias up_bias down_bias conv1d_bias dt_proj_bias A_log D",
}


def test_every_parameter_of_every_model_is_known_to_decay_or_not():
    dense = ModelConfig(
        8, 8, 1, 2, 8, norm="layer", attention_bias=True, mlp_bias=True, qk_norm=True, qk_norm_per_head=True
    )
    mixture = ModelConfig(8, 8, 1, 2, 8, experts=2, experts_per_token=1, shared_expert_width=4)
    mamba = ModelConfig(8, 8, 1, 0, 16, mixer="mamba", state_size=2, conv_width=2, step_rank=1)
    found = set()
    for model in (dense, mixture, mamba):
        params = abstract_params(model, mesh_of(1, 1, 1))
        found |= {str(path[-1].key) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    decayed, kept = (NAMES[kind].split() for kind in ("decayed", "kept"))
    assert found >= {"shared_router", "A_log", "q_norm", "norm_bias", "gate_bias"}
    assert found <= {*decayed, *kept}


@pytest.mark.parametrize(("decay", "of_kept"), [("all", 0.3), ("matrices", 0.0)])
def test_norms_and_biases_decay_only_with_all(decay, of_kept):
    params = {"layers": {name: jnp.full(2, 2.0) for names in NAMES.values() for name in names.split()}}
    optimizer = make_optimizer(Optimizer(Schedule(), weight_decay=0.3, decay=decay))
    zeros = jax.tree.map(jnp.zeros_like, params)
    update = jax.jit(lambda p, z: optimizer.update(z, optimizer.init(p), p, loss=1.0, gradient_norm=0.0)[0])
    updates = {name: float(found[0]) for name, found in update(params, zeros)["layers"].items()}
    expected = dict.fromkeys(NAMES["decayed"].split(), 0.6) | dict.fromkeys(NAMES["kept"].split(), 2 * of_kept)
    assert updates == pytest.approx(expected)


def test_the_optimizer_clips_and_is_adam_with_decoupled_decay():
    """Adam's moments with their bias corrected (1412.6980), eps outside the root; decay beside them (1711.05101)."""
    beta1, beta2, eps, decay, clip = 0.8, 0.9, 0.05, 0.3, 2.5
    optimizer = make_optimizer(Optimizer(Schedule(), beta1, beta2, eps, decay, clip_norm=clip))
    random = np.random.default_rng(0)
    params = {"layers": {"up": random.standard_normal((5, 3))}, "norm": random.standard_normal(3)}
    first = second = jax.tree.map(np.zeros_like, params)
    state, update = optimizer.init(jax.tree.map(jnp.float32, params)), jax.jit(optimizer.update)
    clipped = 0
    for step in range(1, 7):
        scale = random.uniform(0.1, 1.5)
        gradients = jax.tree.map(lambda p, scale=scale: scale * random.standard_normal(p.shape), params)
        norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(gradients)))
        clipped += norm > clip
        float32 = jax.tree.map(jnp.float32, (gradients, params))
        found, state = update(float32[0], state, float32[1], loss=jnp.float32(1), gradient_norm=jnp.float32(norm))
        gradients = jax.tree.map(lambda g, norm=norm: g * min(1, clip / norm), gradients)
        first = jax.tree.map(lambda m, g: beta1 * m + (1 - beta1) * g, first, gradients)
        second = jax.tree.map(lambda v, g: beta2 * v + (1 - beta2) * g**2, second, gradients)
        expected = jax.tree.map(
            lambda m, v, p, step=step: m / (1 - beta1**step) / (np.sqrt(v / (1 - beta2**step)) + eps) + decay * p,
            first, second, params,
        )  # fmt: skip
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)
        params = jax.tree.map(lambda p, d: p - 0.1 * d, params, expected)
    assert 1 < clipped < 5


# Skipping


def decisions(loss_and_norm: list[tuple[float, float]], sigmas: float) -> list[bool]:
    """Which steps are taken: finite ones that lie no more than `sigmas` deviations above the mean of the last 128."""
    taken: list[tuple[float, float]] = []
    found = []
    for pair in np.float32(loss_and_norm):
        good = bool(np.isfinite(pair).all())
        if sigmas and len(taken) >= 128:
            last = np.array(taken[-128:], np.float64)
            good &= bool((pair <= last.mean(0) + sigmas * last.std(0)).all())
        taken += [pair] * good
        found.append(good)
    return found


@pytest.mark.parametrize("sigmas", [0.0, 2.0])
def test_the_steps_that_are_skipped_are_those_that_stand_out_of_the_last_128_taken(sigmas):
    """A wandering series, of which only the latest 128 say what stands out; with 2 deviations some steps always do."""
    random, optimizer = np.random.default_rng(0), Optimizer(Schedule(), skip_nonfinite=True, skip_spike_sigmas=sigmas)
    steps = 420
    series = [5, 2] + [0.1, 0.4] * (random.standard_normal((steps, 2)) + np.sin(np.arange(steps) / 30)[:, None])
    for at, column, value in ((50, 0, 9), (127, 1, 9), (129, 1, 9), (160, 0, np.nan), (161, 1, np.inf), (300, 0, 1)):
        series[at, column] = value
    expected = decisions(series.tolist(), sigmas)
    assert (steps - 60 < sum(expected) < steps - 8) if sigmas else sum(expected) == steps - 2
    rule = make_optimizer(optimizer)
    params = {"up": jnp.ones(2)}

    @jax.jit
    def run(series):
        def one(state, pair):
            gradient = {"up": pair[1] * jnp.ones(2)}
            updates, new = rule.update(gradient, state, params, loss=pair[0], gradient_norm=pair[1])
            same = jax.tree.reduce(jnp.logical_and, jax.tree.map(lambda a, b: jnp.all(a == b), state.inner, new.inner))
            return new, (jnp.all(updates["up"] != 0), jnp.all(updates["up"] == 0) & same, new.skipped)

        return jax.lax.scan(one, rule.init(params), series)

    state, (moved, untouched, skipped) = run(jnp.asarray(series, jnp.float32))
    assert moved.tolist() == expected
    np.testing.assert_array_equal(untouched, ~np.array(expected))
    np.testing.assert_array_equal(skipped, np.cumsum(~np.array(expected)))
    # The moments are those of the steps taken alone.
    assert int(state.inner[1].count) == sum(expected)


@pytest.mark.parametrize("name", ["loss", "gradient_norm"])
def test_a_step_stands_out_above_the_limit_not_on_it_and_only_once_the_window_is_full(name):
    assert SPIKE_WINDOW == 128, "OLMo-core's"
    optimizer = make_optimizer(Optimizer(Schedule(), skip_spike_sigmas=3.0))
    params = {"up": jnp.ones(2)}
    steady = {"loss": jnp.float32(1.0), "gradient_norm": jnp.float32(1.0)}
    update = jax.jit(lambda state, value: optimizer.update(params, state, params, **steady | {name: value})[1])
    state = optimizer.init(params)
    for value in (9.0, *[0.0, 2.0] * 63, 9.0):  # the 128th is taken whatever it is
        state = update(state, value)
    assert int(state.skipped) == 0
    for value in (50.0, *[0.0, 2.0] * 64):  # the next is not
        state = update(state, value)
    assert int(state.skipped) == 1
    limit = 4.0  # mean 1, deviation 1
    for value, skipped in ((limit + 1e-3, 2), (limit, 2), (-50.0, 2)):
        state = update(state, value)
        assert int(state.skipped) == skipped


@pytest.mark.parametrize(
    ("options", "finite_only", "spikes"),
    [
        ({}, False, False),
        ({"skip_nonfinite": True}, True, False),
        ({"skip_spike_sigmas": 6.0}, True, True),
    ],
)
def test_steps_are_skipped_where_the_recipe_says_so(options, finite_only, spikes):
    optimizer = make_optimizer(Optimizer(Schedule(), **options))
    params = {"up": jnp.ones(2)}
    full = optimizer.init(params)
    assert isinstance(full, SkipState) == finite_only
    if finite_only:
        full = full._replace(seen=jnp.int32(SPIKE_WINDOW), losses=jnp.ones(128), norms=jnp.ones(128))
    for loss, skipped in ((np.nan, finite_only), (5.0, spikes), (1.0, False)):
        updates, _ = optimizer.update(params, full, params, loss=jnp.float32(loss), gradient_norm=jnp.float32(1))
        assert bool(jnp.all(updates["up"] == 0)) == skipped


# What a step is made of


def test_the_first_state_is_drawn_from_the_seed_in_float32_and_has_the_shapes_and_places_of_the_abstract_one():
    mesh = mesh_of(2, 2, 2)
    other = dataclasses.replace(RECIPE, seed=1)
    with jax.set_mesh(mesh):
        state, again, second = jax.jit(lambda: [initial_state(recipe) for recipe in (RECIPE, RECIPE, other)])()
    same = lambda real, target: (
        real.shape == target.shape
        and real.dtype == target.dtype
        and real.sharding.is_equivalent_to(target.sharding, real.ndim)
    )
    assert all(jax.tree.leaves(jax.tree.map(same, state, abstract_state(RECIPE, mesh))))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(state["opt_state"])), "moments and counts begin at 0"
    jax.tree.map(np.testing.assert_array_equal, state, again)
    for name in ("embed", "head"):
        drawn = np.asarray(state["params"][name])
        assert np.all(drawn != np.asarray(second["params"][name]))
        assert np.mean(drawn == drawn.astype(jnp.bfloat16)) < 0.05, "the weights were rounded"
        assert drawn.std() == pytest.approx(RECIPE.model.init_std, rel=0.1)


@pytest.mark.parametrize(
    ("ignored", "expected"),
    [(None, [[1, 1, 1], [1, 1, 1]]), (0, [[0, 1, 0], [1, 1, 1]]), (1, [[1, 0, 1], [0, 1, 0]])],
)
def test_targets_with_the_ignored_id_have_no_weight(ignored, expected):
    recipe = dataclasses.replace(RECIPE, loss=Loss(ignore_token=ignored))
    weights = target_weights(recipe, jnp.array([[0, 0, 1, 0], [1, 1, 2, 1], [-1, -1, -1, -1]]))
    assert (weights.dtype, weights.tolist()) == (np.float32, [*expected, [0, 0, 0]])


def test_every_device_cuts_its_own_rows_into_consecutive_micro_batches():
    mesh = mesh_of(2, 2, 2)
    windows = np.arange(24 * 3, dtype=np.int32).reshape(24, 3)  # six rows of each of four shards
    with jax.set_mesh(mesh):
        placed = jax.device_put(windows, jax.NamedSharding(mesh, BATCH_SPEC))
        cut = jax.jit(lambda rows: micro_batches(rows, 3)).lower(placed).compile()
        parts = np.asarray(cut(placed))
    for number, part in enumerate(parts):
        rows = [6 * shard + 2 * number + row for shard in range(4) for row in range(2)]
        np.testing.assert_array_equal(part, windows[rows])
    assert not any(name in cut.as_text() for name in ("all-to-all", "all-gather", "collective-permute")), "rows move"


@pytest.mark.parametrize(
    ("compute", "platform", "expected"),
    [
        (Compute(dtype="bfloat16"), "gpu", "cudnn"),
        (Compute(dtype="float32"), "gpu", "xla"),
        (Compute(dtype="float32"), "tpu", "splash"),
        (Compute(dtype="bfloat16"), "cpu", "xla"),
        (Compute(attention="xla"), "tpu", "xla"),
    ],
)
def test_the_attention_of_a_recipe_is_picked_for_dtype_and_devices(compute, platform, expected):
    mesh = types.SimpleNamespace(devices=np.array([[[types.SimpleNamespace(platform=platform)]]]))
    assert attention_of(dataclasses.replace(RECIPE, compute=compute), mesh) == expected


def test_remat_unrolling_dtype_and_chunk_reach_the_program():
    """What layers save is there by name; a loop over layers is there or unrolled; so many logits exist at a time."""
    mesh = mesh_of(1, 1, 1)

    def program(**compute) -> str:
        recipe = dataclasses.replace(RECIPE, compute=Compute(**compute))
        params = abstract_state(recipe, mesh)["params"]
        windows = jax.ShapeDtypeStruct((8, 17), jnp.int32, sharding=jax.NamedSharding(mesh, BATCH_SPEC))
        with jax.set_mesh(mesh):
            weights = jnp.ones((8, 16), out_sharding=BATCH_SPEC)
            return str(jax.make_jaxpr(make_loss_sums(recipe, mesh))(params, windows, weights))

    plain = program(dtype="float32", remat="none")
    assert "nothing_saveable" not in plain and "bf16" not in plain and "unroll=1" in plain
    assert "f32[20,64]" in plain
    again = program(dtype="bfloat16", remat="full", scan_layers=False)
    assert "nothing_saveable" in again and "bf16" in again and "unroll=2" in again


@pytest.mark.parametrize(
    ("batch", "axes", "rows", "compute"),
    [
        (Batch(3), (1, 4, 1), 3, Compute()),
        (Batch(8, accumulation=2), (1, 8, 1), 4, Compute()),
        (Batch(16, 2, ((1, 6),)), (2, 2, 2), 3, Compute()),
        (Batch(12, accumulation=2), (2, 2, 2), 6, Compute(micro_gradient_norm=True)),
    ],
)
def test_a_batch_that_can_neither_be_split_nor_filled_up_is_refused_by_name(batch, axes, rows, compute):
    recipe = dataclasses.replace(RECIPE, batch=Batch(16, accumulation=2), compute=compute)
    with pytest.raises(
        UserError, match=rf"batch\.sequences / batch\.accumulation = {rows} is not a multiple.* = [48], and"
    ):
        abstract_state(dataclasses.replace(recipe, batch=batch), mesh_of(*axes))
    abstract_state(recipe, mesh_of(*axes))


@pytest.mark.parametrize(
    ("batch", "axes", "rows"),
    [(Batch(8), (2, 2, 2), 8), (Batch(6), (1, 4, 1), 8), (Batch(12, accumulation=2), (2, 2, 2), 16)],
)
def test_a_batch_is_filled_up_to_as_many_rows_on_every_device_in_every_micro_batch(batch, axes, rows):
    recipe = dataclasses.replace(RECIPE, batch=batch)
    abstract_state(recipe, mesh_of(*axes))
    assert padded_rows(batch.sequences, recipe, mesh_of(*axes)) == rows


def test_a_model_or_a_kernel_that_the_devices_cannot_run_is_refused():
    with pytest.raises(UserError, match=r"compute\.attention='splash' needs a tpu"):
        abstract_state(dataclasses.replace(RECIPE, compute=Compute(attention="splash")), mesh_of(1, 1, 1))
    odd = dataclasses.replace(RECIPE, model=dataclasses.replace(RECIPE.model, vocab_size=63))
    with pytest.raises(UserError, match=r"model\.vocab_size=63 is not a multiple of mesh\.tensor=2"):
        abstract_state(odd, mesh_of(1, 1, 2))
