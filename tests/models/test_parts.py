"""The parts of the decoder from their definitions in float64, the sizes of models counted by hand, and the mesh."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from fineline_jax.errors import UserError
from fineline_jax.mesh import AXES, BATCH, abstract, batch_shards, make_mesh
from fineline_jax.models import cpu_kernels, decoder, layers, mamba, moe, rotary
from fineline_jax.models.config import ModelConfig
from fineline_jax.models.sharding import check_fits
from fineline_jax.recipe import MeshShape

PLAIN = ModelConfig(vocab_size=40, width=16, layers=3, heads=4, mlp_width=24, kv_heads=2)
MAMBA = ModelConfig(
    vocab_size=40, width=16, layers=3, heads=0, mlp_width=24, mixer="mamba", state_size=3, conv_width=5, step_rank=2
)


def drawn(*shape: int, dtype: Any = jnp.float32, scale: float = 1.0, seed: int = 0) -> jax.Array:
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape), dtype)


def f64(x: Any) -> np.ndarray:
    return np.asarray(x, np.float64)


# The decoder's parts


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_columns_of_a_normalised_head_have_length_one_rounded_once(dtype: Any) -> None:
    head = drawn(64, 40, dtype=dtype).at[:, 3].set(0.0).at[:, 4].multiply(1e-15)
    config = dataclasses.replace(PLAIN, head="normalised")
    found = decoder.head_weight(config, {"head": head})
    assert found.dtype == dtype
    exact = f64(head) / np.maximum(np.sqrt((f64(head) ** 2).sum(axis=0)), 1e-12)
    np.testing.assert_allclose(f64(found), exact, rtol=2**-8 if dtype == jnp.bfloat16 else 1e-6)
    if dtype == jnp.bfloat16:
        assert (f64(found) != f64(jnp.asarray(exact, dtype))).mean() < 0.01
    tied = dataclasses.replace(config, tied_embeddings=True)
    np.testing.assert_array_equal(decoder.head_weight(tied, {"embed": head.T}), found)
    plain = dataclasses.replace(PLAIN, tied_embeddings=True)
    np.testing.assert_array_equal(decoder.head_weight(plain, {"embed": head.T}), head)
    np.testing.assert_array_equal(decoder.head_weight(PLAIN, {"head": head}), head)


def test_norms_of_bfloat16_are_computed_in_float32_with_their_eps() -> None:
    x = drawn(3, 512, dtype=jnp.bfloat16, scale=0.05) + jnp.bfloat16(0.03)
    scale, bias, eps = 1 + drawn(512, scale=0.3, seed=1), drawn(512, seed=2), 1e-3
    exact = f64(x) / np.sqrt((f64(x) ** 2).mean(-1, keepdims=True) + eps)
    found = layers.rms_norm(x, jnp.ones(512), eps)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(f64(found), exact, rtol=2**-8)
    np.testing.assert_allclose(f64(layers.rms_norm(x, scale, eps)), exact * f64(scale), rtol=3 * 2**-8)
    exact = (f64(x) - f64(x).mean(-1, keepdims=True)) / np.sqrt(f64(x).var(-1, keepdims=True) + eps)
    for some in ((None, None), (scale, None), (scale, bias)):
        found = layers.layer_norm(x, *some, eps)
        assert found.dtype == jnp.bfloat16
        expected = exact * (1 if some[0] is None else f64(scale)) + (0 if some[1] is None else f64(bias))
        np.testing.assert_allclose(f64(found), expected, rtol=2**-8, atol=1e-5)
    heads = drawn(2, 5, 3, 8, scale=0.1)
    over_all = f64(heads) / np.sqrt((f64(heads) ** 2).mean((-2, -1), keepdims=True) + eps)
    np.testing.assert_allclose(layers.rms_norm(heads, jnp.ones((3, 8)), eps, (-2, -1)), over_all, rtol=1e-5)


def test_rotation_turns_pairs_of_features_as_complex_numbers() -> None:
    """Feature j of n with feature j + n / 2, by position * theta^(-2j / n); the features behind the n stay."""
    positions = np.array([[0, 1, 7, 2047], [5, 3, 0, 100]])
    x, features, theta = drawn(2, 4, 3, 10), 6, 500.0
    factors = rotary.rotary_factors(jnp.asarray(positions), features, theta, jnp.float32)
    angles = positions[:, :, None, None] * theta ** (-2 * np.arange(3) / features)
    turned = (f64(x[..., :3]) + 1j * f64(x[..., 3:6])) * np.exp(1j * angles)
    expected = np.concatenate([turned.real, turned.imag, f64(x[..., 6:])], axis=-1)
    np.testing.assert_allclose(rotary.rotate(x, factors), expected, atol=5e-4)  # angles of 2047 in float32
    np.testing.assert_allclose(rotary.rotate(x, factors)[1], expected[1], atol=2e-5)
    whole = rotary.rotate(x[..., :6], factors)
    np.testing.assert_array_equal(whole, rotary.rotate(x, factors)[..., :6])
    in_half = rotary.rotary_factors(jnp.asarray(positions), features, theta, jnp.bfloat16)
    for rough, fine in zip(in_half, factors, strict=True):
        assert rough.dtype == jnp.bfloat16
        np.testing.assert_array_equal(rough, fine.astype(jnp.bfloat16))  # computed in float32, rounded once


def test_swiglu_is_rounded_once() -> None:
    gate, up = drawn(700, dtype=jnp.bfloat16, scale=3.0), drawn(700, dtype=jnp.bfloat16, seed=1)
    found = cpu_kernels.swiglu(gate, up)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(f64(found), f64(gate) * scipy.special.expit(f64(gate)) * f64(up), rtol=2**-8, atol=1e-7)


def test_each_feature_is_convolved_with_its_own_weights_over_its_last_tokens() -> None:
    x, weight, bias = drawn(2, 9, 3), drawn(4, 3, seed=1), drawn(3, seed=2)
    found = mamba.causal_convolution(x, weight, bias)
    for row, feature in np.ndindex(2, 3):
        expected = np.convolve(f64(x[row, :, feature]), f64(weight[::-1, feature]))[:9] + float(bias[feature])
        np.testing.assert_allclose(found[row, :, feature], expected, atol=1e-6)


def test_the_gradients_of_the_scan_are_those_of_the_recurrence_on_any_mesh() -> None:
    """Over the end of a saved chunk; devices that share a row add up what its b and c get from their features."""
    length = mamba.CHUNK + 3
    x, b, c = drawn(2, length, 4), drawn(2, length, 3, seed=1), drawn(2, length, 3, seed=2)
    step, a = abs(drawn(2, length, 4, scale=0.3, seed=3)), -abs(drawn(4, 3, seed=4))

    def plain(x, step, a, b, c):
        def one(state, token):
            x, step, b, c = token
            state = jnp.exp(step[..., None] * a) * state + (step * x)[..., None] * b[:, None]
            return state, jnp.einsum("bfs,bs->bf", state, c)

        tokens = tuple(jnp.moveaxis(y, 1, 0) for y in (x, step, b, c))
        return jnp.moveaxis(jax.lax.scan(one, jnp.zeros((2, 4, 3)), tokens)[1], 0, 1)

    gradients = lambda scan: jax.grad(lambda *arrays: jnp.sum(jnp.sin(3 * scan(*arrays))), argnums=range(5))
    expected = jax.jit(gradients(plain))(x, step, a, b, c)
    mesh = make_mesh(MeshShape(1, 2, 2), jax.devices()[:4])
    features, states = jax.P(BATCH, None, "tensor"), jax.P(BATCH, None, None)
    specs = features, features, jax.P("tensor", None), states, states
    with jax.set_mesh(mesh):
        placed = [jax.device_put(y, jax.NamedSharding(mesh, s)) for y, s in zip((x, step, a, b, c), specs, strict=True)]
        found = jax.jit(gradients(mamba.selective_scan))(*placed)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * float(jnp.abs(theirs).max()))


# Experts


@pytest.mark.parametrize("sizes", [[127, 0, 129], [128, 128, 1], [0, 257, 0], [1, 129, 2]])
def test_groups_that_end_before_at_and_behind_a_block_are_multiplied(sizes: list[int]) -> None:
    rows, weights, slope = drawn(sum(sizes), 6), drawn(3, 6, 4, seed=1), drawn(sum(sizes), 4, seed=2)
    found, pull = jax.vjp(lambda *x: moe.blocked_dot(*x, jnp.asarray(sizes)), rows, weights)
    group = np.repeat(np.arange(3), sizes)
    own = f64(weights)[group]
    np.testing.assert_allclose(found, np.einsum("nd,ndf->nf", f64(rows), own), atol=1e-5)
    of_rows, of_weights = pull(slope)
    np.testing.assert_allclose(of_rows, np.einsum("nf,ndf->nd", f64(slope), own), atol=1e-5)
    expected = [f64(rows)[group == g].T @ f64(slope)[group == g] for g in range(3)]
    np.testing.assert_allclose(of_weights, np.stack(expected), atol=1e-4)


def test_the_likeliest_experts_are_chosen_from_a_softmax_over_all_in_float32() -> None:
    tokens, router = drawn(50, 32, dtype=jnp.bfloat16), drawn(32, 7, dtype=jnp.bfloat16, seed=1)
    exact = f64(tokens) @ f64(router)
    probability = scipy.special.softmax(exact, axis=-1)
    for normalise in (False, True):
        weights, chosen, logits = moe.route(tokens, router, 3, normalise)
        assert weights.dtype == logits.dtype == jnp.float32
        np.testing.assert_allclose(logits, exact, atol=1e-4)
        order = np.argsort(-probability, axis=-1)[:, :3]
        np.testing.assert_array_equal(chosen, order)
        largest = np.take_along_axis(probability, order, axis=-1)
        expected = largest / largest.sum(-1, keepdims=True) if normalise else largest
        np.testing.assert_allclose(weights, expected, atol=1e-5)


def test_the_parts_of_a_mixture_are_summed_in_float32() -> None:
    """Two experts of equal weight; 128.5 on one device, which bfloat16 has not, and -128 on the other."""
    into, out = jax.P(None, None, "tensor"), jax.P(None, "tensor", None)
    gate, up, down = jnp.full((2, 1, 2), 16), jnp.ones((2, 1, 2)), jnp.array([[[16], [-16]], [[1 / 16], [0]]])
    arrays = jnp.ones((1, 1, 1)), jnp.zeros((1, 2)), gate, up, down
    mesh = make_mesh(MeshShape(1, 1, 2), jax.devices()[:2])
    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(jnp.asarray(x, jnp.bfloat16), jax.NamedSharding(mesh, spec))
            for x, spec in zip(arrays, (jax.P(BATCH, None, None), jax.P(), into, into, out), strict=True)
        ]
        mixed, _ = jax.jit(lambda *x: moe.mixture(*x, per_token=2, normalise=True))(*placed)
    assert (mixed.dtype, mixed.item()) == (jnp.bfloat16, 0.5)


def test_decay_rates_and_skips_of_mamba_are_float32_in_bfloat16_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates of 1, 2 and 3, whose logarithms bfloat16 has not; a skip of 1 + 2^-8 is one, and not rounded to 1."""
    config, mesh = dataclasses.replace(MAMBA, layers=1), make_mesh(MeshShape(fsdp=1), jax.devices()[:1])
    rates = []
    monkeypatch.setattr(mamba, "selective_scan", lambda x, step, a, b, c: rates.append(a) or jnp.zeros_like(step))

    @jax.jit
    def added(stream: jax.Array, skip: jax.Array) -> tuple[jax.Array, jax.Array]:
        block = decoder.RecurrentBlock(config, jax.random.key(0))
        mixer = block.mixer
        mixer.D[...] = jnp.full_like(mixer.D[...], skip)
        for weight in (mixer.in_proj_x, mixer.in_proj_z, mixer.out_proj):
            weight[...] = 100 * weight[...]
        return block(stream, None, None)[0] - stream, rates[-1]

    with jax.set_mesh(mesh):
        place = jax.NamedSharding(mesh, jax.P(BATCH, None, None))
        stream = jax.device_put(drawn(2, 40, 16, dtype=jnp.bfloat16), place)
        (one, found), (more, _) = (added(stream, jnp.float32(skip)) for skip in (1, 1 + 2**-8))
    np.testing.assert_allclose(found, np.broadcast_to([-1, -2, -3], (24, 3)), rtol=1e-6)
    one, more = f64(one), f64(more)
    assert 2**-9 < (one * (more - one)).sum() / (one * one).sum() < 2**-7


def test_the_losses_of_a_router_are_those_of_their_papers() -> None:
    """2101.03961, eq. 4 to 6, and 2202.08906, eq. 5, pooled over two layers of five tokens."""
    logits = f64(drawn(2, 5, 3))
    probability = scipy.special.softmax(logits, axis=-1)
    chosen = np.argsort(-logits, axis=-1)[..., :2]
    sent = np.stack([np.bincount(layer.ravel(), minlength=3) for layer in chosen])
    squares = scipy.special.logsumexp(logits, axis=-1) ** 2
    routing = moe.Routing(*(jnp.asarray(x, jnp.float32) for x in (sent, probability.sum(1), squares.sum(1))))
    expected = 3 * sum(sent[:, e].sum() / 10 * probability[..., e].mean() for e in range(3))
    np.testing.assert_allclose(moe.load_balance(routing, 5), expected, rtol=1e-6)
    np.testing.assert_allclose(moe.router_z(routing, 5), squares.mean(), rtol=1e-6)


# Sizes, by hand


def counted(config: ModelConfig) -> int:
    shapes = decoder.abstract_params(config, make_mesh(MeshShape(), jax.devices()[:1]))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


TABLE, NORM = 40 * 16, 16
ATTENTION, MLP = 16 * 16 * 2 + 16 * 8 * 2, 3 * 16 * 24  # 4 query heads of 4 features, 2 key heads
LAYER = ATTENTION + MLP + 2 * NORM
MIXED = dataclasses.replace(PLAIN, experts=5, experts_per_token=2, shared_expert_width=7, normalise_experts=True)
SSM = 16 * 48 + 5 * 24 + 24 + 24 * (2 + 6) + 2 * 24 + 24 + 24 * 3 + 24 + 24 * 16
SIZES = [
    (PLAIN, {}, 2 * TABLE + 3 * LAYER + NORM),
    (PLAIN, {"tied_embeddings": True}, TABLE + 3 * LAYER + NORM),
    (PLAIN, {"head_dim": 6}, 2 * TABLE + 3 * (LAYER + ATTENTION // 2) + NORM),
    (PLAIN, {"norm": "layer"}, 2 * TABLE + 3 * (LAYER + 2 * NORM) + 2 * NORM),
    (PLAIN, {"norm": "nonparametric"}, 2 * TABLE + 3 * (LAYER - 2 * NORM)),
    (PLAIN, {"mlp": "gelu"}, 2 * TABLE + 3 * (LAYER - 16 * 24) + NORM),
    (PLAIN, {"mlp": "gelu", "mlp_bias": True}, 2 * TABLE + 3 * (LAYER - 16 * 24 + 24 + 16) + NORM),
    (PLAIN, {"mlp_bias": True}, 2 * TABLE + 3 * (LAYER + 2 * 24 + 16) + NORM),
    (PLAIN, {"qkv_bias": True}, 2 * TABLE + 3 * (LAYER + 16 + 8 + 8) + NORM),
    (PLAIN, {"attention_bias": True}, 2 * TABLE + 3 * (LAYER + 16 + 8 + 8 + 16) + NORM),
    (PLAIN, {"qk_norm": True}, 2 * TABLE + 3 * (LAYER + 16 + 8) + NORM),
    (PLAIN, {"qk_norm": True, "qk_norm_per_head": True}, 2 * TABLE + 3 * (LAYER + 4 + 4) + NORM),
    (MIXED, {}, 2 * TABLE + 3 * (LAYER + 4 * MLP + 16 * 5 + 3 * 16 * 7 + 16) + NORM),
    (MAMBA, {}, 2 * TABLE + 3 * (SSM + NORM) + NORM),
    (MAMBA, {"tied_embeddings": True}, TABLE + 3 * (SSM + NORM) + NORM),
]


@pytest.mark.parametrize(("config", "changes", "expected"), SIZES)
def test_parameters_are_counted_as_by_hand_and_as_they_are(config: ModelConfig, changes: dict, expected: int) -> None:
    changed = dataclasses.replace(config, **changes)
    assert changed.parameters == expected == counted(changed)


def test_the_work_of_a_token_is_counted_as_by_hand() -> None:
    """6 per weight met; scores and context, 2 * 2 * features * positions each way and backward, half of them masked."""
    attention = 3 * 4 * 4 * (2 * 2 * 100 * 3) / 2
    met = TABLE + 3 * LAYER + NORM
    assert PLAIN.train_flops_per_token(100) == 6 * met + attention
    assert dataclasses.replace(PLAIN, tied_embeddings=True).train_flops_per_token(100) == 6 * met + attention
    assert PLAIN.active_parameters == PLAIN.parameters
    mixed = TABLE + 3 * (LAYER + MLP + 16 * 5 + 3 * 16 * 7 + 16) + NORM
    assert MIXED.active_parameters == mixed + TABLE
    assert MIXED.train_flops_per_token(100) == 6 * mixed + attention
    scan = 3 * 7 * 3 * 24 * 3
    assert MAMBA.train_flops_per_token(100) == 6 * (TABLE + 3 * (SSM + NORM) + NORM) + scan
    assert MAMBA.train_flops_per_token(1) == MAMBA.train_flops_per_token(100)


def test_the_defaults_of_a_model_are_those_of_llama() -> None:
    plain = ModelConfig(vocab_size=8, width=12, layers=1, heads=3, mlp_width=8)
    assert (plain.kv_heads, plain.head_dim, plain.rotary_dim) == (3, 4, 4)
    assert (plain.context, plain.rope_theta, plain.norm_eps, plain.init_std) == (2048, 1e4, 1e-6, 0.02)
    assert dataclasses.replace(plain, head_dim=10, rotary_fraction=0.4).rotary_dim == 4
    assert dataclasses.replace(plain, head_dim=11, rotary_fraction=0.25).rotary_dim == 2  # of 2.75, as transformers


def test_sizes_at_their_bounds_are_taken_and_beyond_refused() -> None:
    fine = [
        (PLAIN, {"experts": 2, "experts_per_token": 2}), (PLAIN, {"experts": 2, "experts_per_token": 1}),
        (PLAIN, {"rotary_fraction": 1.0}), (PLAIN, {"rotary_fraction": 0.5}), (PLAIN, {"kv_heads": 4}),
        (PLAIN, {"clip_qkv": 0.0}), (PLAIN, {"vocab_size": 1, "layers": 1, "mlp_width": 1, "context": 1}),
        (PLAIN, {"width": 18, "head_dim": 4}), (PLAIN, {"kv_heads": 1}),
    ]  # fmt: skip
    for config, change in fine:
        dataclasses.replace(config, **change)
    refused = [
        *((PLAIN, {name: 0}) for name in ("vocab_size", "width", "layers", "heads", "mlp_width", "context")),
        *((PLAIN, {name: -1}) for name in ("kv_heads", "head_dim", "clip_qkv")),
        (PLAIN, {"experts": 2, "experts_per_token": 3}), (PLAIN, {"experts": 2, "experts_per_token": 0}),
        (PLAIN, {"rotary_fraction": 1.5}), (PLAIN, {"rotary_fraction": 0.0}), (PLAIN, {"rotary_fraction": 0.25}),
        (PLAIN, {"kv_heads": 3}), (PLAIN, {"width": 18, "head_dim": 0}), (PLAIN, {"head_dim": 5}),
        (MIXED, {"mlp_bias": True}), (MIXED, {"mlp": "gelu"}), (MIXED, {"experts": 0}),
        (MIXED, {"shared_expert_width": -1}), (PLAIN, {"qk_norm_per_head": True}),
        (PLAIN, {"parallel_residual": True, "norm_after": True}),
        *((MAMBA, {name: 0}) for name in ("state_size", "conv_width", "step_rank")),
        *((MAMBA, {name: 1}) for name in ("heads", "kv_heads", "head_dim", "clip_qkv")),
        *((MAMBA, {name: True}) for name in (
            "norm_after", "parallel_residual", "attention_bias", "qkv_bias", "mlp_bias", "qk_norm"
        )),
        (MAMBA, {"norm": "layer"}), (MAMBA, {"experts": 2, "experts_per_token": 1}),
    ]  # fmt: skip
    for config, change in refused:
        with pytest.raises(UserError, match=r"model\.") as error:
            dataclasses.replace(config, **change)
        named = [name for name in change if name in str(error.value)]
        assert named or change in ({"width": 18, "head_dim": 0}, {"experts": 0}), (change, str(error.value))


# The mesh


def test_the_axis_left_open_takes_what_the_others_leave() -> None:
    shapes = {(1, -1, 1): (1, 8, 1), (2, -1, 2): (2, 2, 2), (-1, 2, 1): (4, 2, 1), (1, 2, -1): (1, 2, 4)}
    for asked, expected in shapes.items():
        mesh = make_mesh(MeshShape(*asked))
        assert mesh.axis_names == AXES == ("replica", "fsdp", "tensor")
        assert tuple(mesh.shape.values()) == expected
        assert batch_shards(mesh) == expected[0] * expected[1]
        assert all(kind == jax.sharding.AxisType.Explicit for kind in mesh.axis_types)
    last = make_mesh(devices=jax.devices()[5:])
    assert (tuple(last.shape.values()), list(last.devices.flat)) == ((1, 3, 1), jax.devices()[5:])
    # Cores of one machine, of which half or a quarter may be enough.
    assert list(make_mesh(MeshShape(1, 2, 2)).devices.flat) == jax.devices()[:4]
    for asked in ((1, 3, 1), (1, 16, 1), (3, -1, 1), (1, 0, 1)):
        with pytest.raises(
            UserError, match=r"mesh\.replica=\d+, mesh\.fsdp=-?\d+, mesh\.tensor=1 does not divide the 8"
        ):
            make_mesh(MeshShape(*asked))
    with pytest.raises(UserError, match=r"does not divide the 8 device"):
        make_mesh(MeshShape(1, 4, 1), jax.devices())


def test_several_processes_use_all_of_their_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first half would be those of some of the processes."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match=r"does not divide the 8 device"):
        make_mesh(MeshShape(1, 4, 1))


def test_every_size_that_is_split_must_be_a_multiple_of_its_axis() -> None:
    divided = dataclasses.replace(
        PLAIN, kv_heads=4, vocab_size=44, experts=4, experts_per_token=1, shared_expert_width=8, head_dim=4
    )
    cases = [
        ("width", 18, (1, 4, 1)), ("heads", 8, None), ("heads", 6, (1, 1, 4)), ("kv_heads", 2, (1, 1, 4)),
        ("mlp_width", 26, (1, 1, 4)), ("shared_expert_width", 6, (1, 1, 4)), ("vocab_size", 46, (1, 1, 4)),
    ]  # fmt: skip
    for axes in ((1, 4, 1), (1, 1, 4), (4, 1, 1)):
        check_fits(divided, make_mesh(MeshShape(*axes)))
    for name, size, axes in cases:
        kv_heads = {"heads": {6: 6}}.get(name, {}).get(size, 4)
        changed = dataclasses.replace(divided, **({"kv_heads": kv_heads} | {name: size}))
        if axes is None:
            check_fits(changed, make_mesh(MeshShape(1, 1, 4)))
            continue
        axis = "fsdp" if axes[1] > 1 else "tensor"
        with pytest.raises(UserError, match=rf"model\.{name}={size} is not a multiple of mesh\.{axis}=4"):
            check_fits(changed, make_mesh(MeshShape(*axes)))


def test_what_is_not_computed_yet_has_its_place_on_the_mesh() -> None:
    mesh = make_mesh(MeshShape(1, 4, 2))
    found = abstract(lambda: jnp.zeros((8, 6), jnp.bfloat16, out_sharding=jax.P("fsdp", "tensor")), mesh)
    assert (found.shape, found.dtype, found.sharding) == (
        (8, 6), jnp.bfloat16, jax.NamedSharding(mesh, jax.P("fsdp", "tensor")),
    )  # fmt: skip
    assert abstract(lambda: jnp.zeros(3), mesh).sharding.spec in (jax.P(), jax.P(None))
