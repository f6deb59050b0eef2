"""What a model begins with: the distribution of every parameter, and that no two of them are drawn alike."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from fineline_jax.mesh import make_mesh
from fineline_jax.models import decoder
from fineline_jax.models.config import ModelConfig
from fineline_jax.recipe import MeshShape

STD = 0.03
DENSE = ModelConfig(
    vocab_size=64, width=64, layers=3, heads=4, kv_heads=4, head_dim=16, mlp_width=64, attention_bias=True,
    mlp_bias=True, init_std=STD, qk_norm=True, norm="layer",
)  # fmt: skip
MIXTURE = ModelConfig(
    vocab_size=64, width=64, layers=2, heads=4, kv_heads=2, mlp_width=32, init_std=STD, qk_norm=True,
    qk_norm_per_head=True, qkv_bias=True, experts=16, experts_per_token=2, shared_expert_width=32,
)  # fmt: skip
MAMBA = ModelConfig(
    vocab_size=64, width=64, layers=2, heads=0, mlp_width=1024, init_std=STD, mixer="mamba", state_size=5,
    conv_width=4, step_rank=6,
)  # fmt: skip
MAMBA2 = dataclasses.replace(MAMBA, step_rank=0, state_heads=512, state_groups=2)
MODELS = {"dense": DENSE, "mixture": MIXTURE, "mamba": MAMBA, "mamba2": MAMBA2}
MATRICES = {
    "dense": "embed head q k v o gate up down",
    "mixture": "embed head q k v o gate up down router shared_gate shared_up shared_down shared_router",
    "mamba": "embed head in_proj_x in_proj_z conv1d x_proj dt_proj out_proj",
    "mamba2": "embed head in_proj_x in_proj_z in_proj_io in_proj_dt conv1d conv1d_io out_proj",
}
ZEROS = {
    "dense": "attention_norm_bias mlp_norm_bias norm_bias q_bias k_bias v_bias o_bias gate_bias up_bias down_bias",
    "mixture": "q_bias k_bias v_bias",
    "mamba": "conv1d_bias",
    "mamba2": "conv1d_bias conv1d_io_bias",
}
ONES = {
    "dense": "attention_norm mlp_norm norm q_norm k_norm",
    "mixture": "attention_norm mlp_norm norm q_norm k_norm",
    "mamba": "mixer_norm norm D",
    "mamba2": "mixer_norm norm D inner_norm",
}


@functools.cache
def drawn(config: ModelConfig, seed: int = 0, axes: tuple[int, int, int] = (1, 1, 1)) -> dict[str, np.ndarray]:
    """Every parameter by its last name."""
    mesh = make_mesh(MeshShape(*axes), jax.devices()[: int(np.prod(axes))])
    with jax.set_mesh(mesh):
        params = jax.jit(decoder.init_params, static_argnums=0)(config, jax.random.key(seed))
    return {str(path[-1].key): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


@pytest.fixture(scope="module", params=MODELS)
def initial(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    return request.param, drawn(MODELS[request.param])


def test_matrices_are_normal_with_the_stated_deviation_norms_are_one_and_biases_zero(initial) -> None:
    name, params = initial
    assert all(leaf.dtype == np.float32 for leaf in params.values())
    for matrix in MATRICES[name].split():
        values = params[matrix].ravel().astype(np.float64)
        assert scipy.stats.kstest(values, scipy.stats.norm(0, STD).cdf).pvalue > 1e-3, matrix
        if values.size > 2000:  # closer than the test of the whole distribution
            assert abs(values.std() / STD - 1) < 5 / np.sqrt(2 * values.size), matrix
    for constant, names in ((0.0, ZEROS), (1.0, ONES)):
        for parameter in names[name].split():
            assert (params[parameter] == constant).all(), parameter
    special = {"mamba": {"A_log", "dt_proj_bias"}, "mamba2": {"A_log", "dt_bias"}}.get(name, set())
    named = {*MATRICES[name].split(), *ZEROS[name].split(), *ONES[name].split()}
    assert params.keys() == named | special, "every parameter has its place in this test"


def test_no_two_matrices_and_no_two_layers_are_drawn_from_the_same_numbers(initial) -> None:
    name, params = initial
    beginnings = {}
    for matrix in MATRICES[name].split():
        stacked = params[matrix] if matrix not in ("embed", "head") else params[matrix][None]
        for layer, values in enumerate(stacked):
            parts = values if name == "mixture" and matrix in ("gate", "up", "down") else values[None]
            beginnings |= {(matrix, layer, i): np.sort(part.ravel()[:24]) for i, part in enumerate(parts)}
    for (one, a), (other, b) in itertools.combinations(beginnings.items(), 2):
        assert np.intersect1d(a, b).size < 4, (one, other)
    for one, other in itertools.combinations([m for m in MATRICES[name].split() if params[m].size > 3000], 2):
        if params[one].size == params[other].size:
            a, b = np.sort(params[one], None), np.sort(params[other], None)
            assert not np.array_equal(a, b), (one, other)


def test_mamba_begins_with_its_authors_decays_and_steps() -> None:
    """2312.00752, section 3.6 and appendix; transformers' MambaPreTrainedModel._init_weights."""
    params = drawn(MAMBA)
    np.testing.assert_allclose(np.exp(params["A_log"]), np.broadcast_to([1, 2, 3, 4, 5], (2, 1024, 5)), rtol=1e-6)
    steps = np.logaddexp(0, params["dt_proj_bias"].astype(np.float64))  # softplus
    assert steps.min() > 0.001 * (1 - 1e-4) and steps.max() < 0.1 * (1 + 1e-4)
    share = np.log(steps / 0.001) / np.log(100)
    assert scipy.stats.kstest(share.ravel(), "uniform").pvalue > 1e-3
    assert share.min() < 0.005 and share.max() > 0.995, "up to both ends: 2,048 are drawn"
    assert not np.intersect1d(*params["dt_proj_bias"]).size, "each layer has its own"


def test_mamba2_begins_with_its_authors_decays_and_steps() -> None:
    """Mamba2Mixer.init_mamba2_weights of transformers: one rate and one step for each head."""
    params = drawn(MAMBA2)
    np.testing.assert_allclose(np.exp(params["A_log"]), np.broadcast_to(np.arange(1, 513), (2, 512)), rtol=1e-5)
    steps = np.logaddexp(0, params["dt_bias"].astype(np.float64))
    share = np.log(steps / 0.001) / np.log(100)
    assert steps.shape == (2, 512) and scipy.stats.kstest(share.ravel(), "uniform").pvalue > 1e-3


def test_the_seed_alone_decides_the_weights_whatever_the_mesh() -> None:
    first, again, other = drawn(DENSE, 0), drawn(DENSE, 0, (2, 2, 2)), drawn(DENSE, 1)
    for matrix in MATRICES["dense"].split():
        np.testing.assert_array_equal(first[matrix], again[matrix])
        assert not np.intersect1d(first[matrix].ravel()[:50], other[matrix]).size > 5
    tied, mesh = dataclasses.replace(DENSE, tied_embeddings=True), make_mesh(MeshShape(), jax.devices()[:1])
    assert "head" not in decoder.abstract_params(tied, mesh)
    for dtype in (jnp.float32, jnp.bfloat16):
        assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(decoder.abstract_params(tied, mesh, dtype)))
