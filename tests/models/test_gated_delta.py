"""The gated delta rule against its recurrence, token by token in float64, and layers of two kinds in one decoder."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from fineline_jax.errors import UserError
from fineline_jax.mesh import make_mesh
from fineline_jax.models import decoder, gated_delta, layer_order
from fineline_jax.models.attention import causal
from fineline_jax.models.config import ModelConfig
from fineline_jax.models.layers import Weights
from fineline_jax.models.sharding import HEADS, HIDDEN, TOKENS
from fineline_jax.recipe import Batch, Compute, Data, MeshShape, Optimizer, Recipe, Schedule, Source
from fineline_jax.training.optimizer import make_optimizer
from fineline_jax.training.schedule import rates
from fineline_jax.training.step import BATCH_SPEC, make_train_step

HYBRID = ModelConfig(
    vocab_size=40, width=16, layers=7, heads=4, kv_heads=2, mlp_width=24, context=64, init_std=0.3, norm_after=True,
    mixer="gated_delta", attention_layers=(2, 5), inner_width=24, state_size=6, state_heads=4, state_groups=2,
    conv_width=4, negative_eigenvalues=True,
)  # fmt: skip


def recurrence(query: Any, key: Any, value: Any, decay: Any, strength: Any, xp: Any = np) -> Any:
    """2412.06464, equation 10, with queries and keys of length 1: S = exp(decay) S (1 - strength k k^T) + strength v
    k^T, token by token. xp: numpy for float64, jax.numpy for its derivatives."""
    heads, state = value.shape[2], key.shape[-1]
    query, key = (xp.repeat(x, heads // x.shape[2], axis=2) for x in (query, key))
    query, key = (x / xp.sqrt((x**2).sum(-1, keepdims=True) + 1e-6) for x in (query, key))
    states, reads = xp.zeros((*value.shape[::2], value.shape[3], state)), []
    for t in range(value.shape[1]):
        k, by = key[:, t], strength[:, t][..., None, None]
        kept = xp.exp(decay[:, t])[..., None, None] * states
        states = (
            kept - by * xp.einsum("bhvk,bhk,bhj->bhvj", kept, k, k) + by * xp.einsum("bhv,bhk->bhvk", value[:, t], k)
        )
        reads.append(xp.einsum("bhvk,bhk->bhv", states, query[:, t]) / state**0.5)
    return xp.stack(reads, axis=1)


def drawn(length: int) -> tuple[np.ndarray, ...]:
    """Queries, keys, values, decays and strengths up to 2; keys that repeat, so that corrections matter."""
    rng = np.random.default_rng(length)
    query, key = rng.normal(size=(2, 4, length, 2, 6))
    key[:, ::3] = key[:, :1]
    decay = -rng.exponential(np.where(rng.random((4, 1, 4)) < 0.5, 0.01, 3.0), (4, length, 4))  # by head
    return query, key, rng.normal(size=(4, length, 4, 5)), decay, rng.uniform(0, 2, (4, length, 4))


@pytest.mark.parametrize("length", [1, 63, 130])
def test_chunks_have_the_numbers_of_the_recurrence(length: int) -> None:
    arrays = drawn(length)
    expected = recurrence(*arrays)
    assert expected.std() > 0.05
    for axes in ((1, 1, 1), (2, 2, 2)):
        mesh = make_mesh(MeshShape(*axes), jax.devices()[: int(np.prod(axes))])
        with jax.set_mesh(mesh):
            placed = _placed(mesh, arrays)
            found = jax.jit(gated_delta.gated_delta_rule)(*placed)
        # float32 has 24 bits; corrections of strength 2 keep rounding errors in the state
        np.testing.assert_allclose(np.asarray(found), expected, atol=2e-5)


def _placed(mesh: jax.sharding.Mesh, arrays: tuple[np.ndarray, ...]) -> list[jax.Array]:
    specs = [HEADS] * 3 + [HIDDEN] * 2
    return [jax.device_put(np.float32(x), jax.NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True)]


def test_gradients_are_those_of_the_recurrence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gated_delta, "CHUNK", 4)
    arrays = drawn(7)  # two chunks, the second padded
    weights = np.random.default_rng(0).normal(size=arrays[2].shape).astype(np.float32)
    loss = lambda rule: lambda *arrays: (rule(*arrays) * weights).sum()
    plain = lambda *arrays: recurrence(*arrays, xp=jnp)
    expected = jax.jit(jax.grad(loss(plain), range(5)))(*map(np.float32, arrays))
    mesh = make_mesh(MeshShape(2, 2, 2), jax.devices())
    with jax.set_mesh(mesh):
        found = jax.jit(jax.grad(loss(gated_delta.gated_delta_rule), range(5)))(*_placed(mesh, arrays))
    for one, other in zip(found, expected, strict=True):
        assert np.asarray(other).std() > 1e-3
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), atol=2e-4, rtol=2e-4)


def test_an_inverse_is_that_of_the_triangle_below_the_diagonal() -> None:
    for size in (1, 2, 16, 64):
        x = np.random.default_rng(size).normal(size=(3, size, size)) / size**0.5
        expected = np.linalg.inv(np.tril(x, -1) + np.eye(size))
        found = jax.jit(gated_delta.unit_lower_inverse)(np.float32(x))
        np.testing.assert_allclose(np.asarray(found), expected, atol=1e-5 * np.abs(expected).max())


def test_a_long_row_forgets_without_overflow() -> None:
    """Decays of 20 a token: exp(-20 * 64) is 0 in float32, and its inverse infinite; only what the token itself writes
    is read: strength * value * (query . key) / sqrt(state)."""
    query, key, value, decay, strength = drawn(128)
    decay = np.full_like(decay, -20.0)
    mesh = make_mesh(MeshShape(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        found = jax.jit(gated_delta.gated_delta_rule)(*_placed(mesh, (query, key, value, decay, strength)))
    unit = lambda x: np.repeat(x / np.linalg.norm(x, axis=-1, keepdims=True), 2, axis=2)
    expected = strength[..., None] * value * (unit(query) * unit(key)).sum(-1, keepdims=True) / 6**0.5
    np.testing.assert_allclose(np.asarray(found), expected, atol=1e-5)


def _order(config: ModelConfig) -> list[str]:
    return ["layers" if layer in config.attention_layers else "recurrent_layers" for layer in range(config.layers)]


def _weights(config: ModelConfig, mesh: jax.sharding.Mesh) -> decoder.Params:
    rng = np.random.default_rng(3)
    place = lambda leaf: jax.device_put(rng.normal(0, 0.3, leaf.shape).astype(np.float32), leaf.sharding)
    return jax.tree.map(place, decoder.abstract_params(config, mesh))


@pytest.mark.slow
@pytest.mark.parametrize("attention", [(1, 3), (0, 3), (2, 4)])
def test_layers_of_two_kinds_are_computed_in_their_order(attention: tuple[int, ...]) -> None:
    """Against the blocks one after the other; and for a choice of tokens, on eight devices."""
    config = dataclasses.replace(HYBRID, layers=5, attention_layers=attention)
    tokens = np.random.default_rng(2).integers(0, 40, (4, 12), dtype=np.int32)
    positions = np.broadcast_to(np.arange(12, dtype=np.int32), tokens.shape)
    attend = causal("xla")
    run = jax.jit(decoder.hidden_states, static_argnums=(0, 4))
    mesh = make_mesh(MeshShape(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        params = _weights(config, mesh)
        found = np.asarray(run(config, params, tokens, positions, attend))
        model, used = decoder.decoder_of(config, params), {"layers": 0, "recurrent_layers": 0}
        stream = model._embedded(jnp.asarray(tokens), jnp.asarray(positions), jnp.dtype("float32"))
        rotary = model._rotary(jnp.asarray(positions), jnp.dtype("float32"))
        block_of = jax.jit(lambda stack, i, stream: layer_order.layer_of(stack, i)(stream, rotary, attend)[0])
        for layer in range(5):
            stack = "layers" if layer in attention else "recurrent_layers"
            stream = block_of(getattr(model, stack), used[stack], stream)
            used[stack] += 1
        # The states keep rounding errors of float32; another order of layers is off by 1.
        np.testing.assert_allclose(found, np.asarray(model.norm(stream)), atol=3e-4)
    mesh = make_mesh(MeshShape(2, 2, 2), jax.devices())
    with jax.set_mesh(mesh):
        params = _weights(config, mesh)
        flat = np.tile(np.array([0, 5, 7, 11], np.int32), (4, 1))
        chosen = jax.device_put(flat, jax.NamedSharding(mesh, TOKENS))
        few = jax.jit(decoder.hidden_states, static_argnums=(0, 4))(
            config, params, tokens, positions, attend, flat_index=chosen
        )
        np.testing.assert_allclose(np.asarray(few), found[:, flat[0]], atol=3e-4)


def test_a_pattern_of_layers_that_repeats_is_found() -> None:
    for order in map("".join, itertools.chain(itertools.product("ab", repeat=9), itertools.product("abc", repeat=5))):
        assert "".join("".join(pattern) * times for pattern, times in layer_order.patterns(order)) == order
    found = lambda order: [("".join(pattern), times) for pattern, times in layer_order.patterns(order)]
    assert found("a" * 32) == [("a", 32)]
    assert found("dd" + "a" * 30) == [("d", 2), ("a", 30)]
    assert found("aaab" * 8) == [("aaab", 8)]
    assert found("aaab" * 7 + "aaa") == [("aaab", 7), ("a", 3)]
    assert found("abac" + "bc") == [("a", 1), ("b", 1), ("a", 1), ("c", 1), ("b", 1), ("c", 1)]
    assert found("abab") == [("ab", 2)] and found("") == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"attention_layers": ()}, r"attention_layers=\(\) must name some, not all, of layers 0 to 6"),
        ({"attention_layers": (1, 4, 2)}, r"attention_layers=\(1, 4, 2\) must name some"),
        ({"attention_layers": (2, 7)}, r"attention_layers=\(2, 7\) must name some"),
        ({"state_heads": 5}, r"state_heads=5 must divide model.inner_width=24 and be a multiple of state_groups=2"),
        ({"state_groups": 3}, "state_heads=4 must divide"),
        ({"inner_width": 0}, "inner_width=0 must be at least 1"),
        ({"step_rank": 3}, "step_rank=3 is not computed with model.mixer='gated_delta'; leave it 0"),
        ({"mixer": "attention"}, r"attention_layers=\(2, 5\) needs model.mixer='gated_delta'"),
        ({"experts": 4, "experts_per_token": 2}, "model.experts needs .* mixer='attention'"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        dataclasses.replace(HYBRID, **changes)


def test_parameters_and_flops_are_counted() -> None:
    """7 layers: 5 of them with queries and keys of 2 * 6 features, values and gates of 24, two numbers per head, three
    convolutions over 4 tokens, decays, biases, a norm of 6; 2 with attention; all with norms and an MLP."""
    delta = 16 * (12 + 12 + 24 + 24 + 4 + 4) + 4 * (12 + 12 + 24) + 4 + 4 + 6 + 24 * 16
    attention = 16 * 4 * (4 + 2 + 2 + 4)
    expected = 5 * delta + 2 * attention + 7 * (3 * 16 * 24 + 2 * 16) + 16 + 2 * 40 * 16
    assert HYBRID.parameters == HYBRID.active_parameters == expected
    mesh = make_mesh(MeshShape(), jax.devices()[:1])
    assert sum(leaf.size for leaf in jax.tree.leaves(decoder.abstract_params(HYBRID, mesh))) == expected
    products = 6 * 2 * 16 * 100  # layers with attention, features of queries and of what they read, tokens
    assert HYBRID.train_flops_per_token(100) == 6 * (expected - 40 * 16) + products + 3 * 7 * 5 * 24 * 6


@pytest.mark.slow
def test_rates_and_steps_begin_as_the_authors_draw_them() -> None:
    """transformers' OlmoHybridPreTrainedModel._init_weights: rates from 0 to 16, steps from 0.001 to 0.1 by their
    logarithm."""
    config = dataclasses.replace(HYBRID, state_heads=512, inner_width=512)
    with jax.set_mesh(make_mesh(MeshShape(), jax.devices()[:1])):
        weights = lambda key: gated_delta.GatedDelta(Weights(config, key), jax.random.split(key)[0])
        mixer = jax.jit(weights)(jax.random.key(0))
    decays, steps = np.exp(mixer.A_log[...]), np.logaddexp(0, np.float64(mixer.dt_bias[...]))
    assert scipy.stats.kstest(decays / 16, "uniform").pvalue > 1e-3
    assert scipy.stats.kstest(np.log(steps / 0.001) / np.log(100), "uniform").pvalue > 1e-3


@pytest.mark.slow
def test_a_training_step_on_eight_devices_has_the_numbers_of_one() -> None:
    """Rows of two chunks: with XLA's triangular solver, eight devices on two cores waited for each other for ever."""
    recipe = Recipe(
        name="small",
        model=dataclasses.replace(HYBRID, layers=3, attention_layers=(1,), context=128),
        data=Data((Source("random"),), sequence_length=100),
        batch=Batch(8),
        optimizer=Optimizer(Schedule(peak=1e-2, final=1e-3)),
        tokens=800,
        compute=Compute(dtype="float32", remat="none"),
    )
    windows, norms = np.random.default_rng(0).integers(0, 40, (8, 101), dtype=np.int32), []
    for axes in ((1, 1, 1), (1, 8, 1), (2, 2, 2)):
        mesh = make_mesh(MeshShape(*axes), jax.devices()[: int(np.prod(axes))])
        with jax.set_mesh(mesh):
            params = _weights(recipe.model, mesh)
            state = {"params": params, "opt_state": jax.jit(make_optimizer(recipe.optimizer).init)(params)}
            placed = jax.device_put(windows, jax.NamedSharding(mesh, BATCH_SPEC))
            _, metrics = jax.jit(make_train_step(recipe, mesh))(state, placed, *rates(recipe, 0))
            norms.append(float(metrics["gradient_norm"]))
    np.testing.assert_allclose(norms[1:], norms[0], rtol=1e-4)
