"""Attention over prefix-tree rows: the blockwise version against the plain formula, alone and in the decoder."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import COMPILES
from program_sizes import largest_array

from fineline_jax.mesh import BATCH, make_mesh
from fineline_jax.models import attention, decoder
from fineline_jax.models.config import ModelConfig
from fineline_jax.models.tree_attention import blockwise as forms
from fineline_jax.models.tree_attention import dispatch, gpu, tpu
from fineline_jax.recipe import MeshShape
from fineline_jax.scoring.engine.prefix_tree import Plan, plan
from fineline_jax.scoring.engine.trie import subtree_ends
from fineline_jax.scoring.requests.pack import Ragged, RequestTokens

LENGTH, BLOCK = 48, 8


def inputs(batch: int, length: int, heads: int, kv_heads: int, seed: int = 0) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(seed)
    shape = {"query": heads, "key": kv_heads, "value": kv_heads}
    return tuple(jnp.asarray(rng.normal(size=(batch, length, n, 16)), jnp.float32) for n in shape.values())


@st.composite
def ends(draw: st.DrawFn) -> np.ndarray:
    """Of a random row: trees in depth-first order, and unused places behind them."""
    used = draw(st.integers(0, LENGTH))
    depth: list[int] = []
    for _ in range(used):
        depth.append(draw(st.integers(0, depth[-1] + 1)) if depth else 0)
    return np.append(subtree_ends(np.array(depth, np.int32)), np.arange(used, LENGTH) + 1).astype(np.int32)


blockwise = jax.jit(functools.partial(forms.blockwise, query_block=BLOCK, key_block=2 * BLOCK))
reference = jax.jit(forms.reference)


@settings(deadline=None, max_examples=60)
@given(ends(), ends(), st.integers(0, 100))
def test_blockwise_equals_the_reference_on_any_tree(one, other, seed):
    end = jnp.asarray(np.stack([one, other]))
    query, key, value = inputs(2, LENGTH, 4, 2, seed)
    np.testing.assert_allclose(
        blockwise(query, key, value, end), reference(query, key, value, end), atol=2e-6, rtol=1e-5
    )


@settings(deadline=None, max_examples=60)
@given(ends())
def test_listed_blocks_are_all_that_hold_a_visible_key(end):
    order, count = forms.visible_blocks(jnp.asarray(end)[None], BLOCK, 2 * BLOCK)
    seen = np.asarray(forms.visible(jnp.asarray(end)[None])[0])
    blocks = seen.reshape(LENGTH // BLOCK, BLOCK, LENGTH // (2 * BLOCK), 2 * BLOCK).any(axis=(1, 3))
    for query in range(LENGTH // BLOCK):
        listed = np.asarray(order[0, query, : count[0, query]]).tolist()
        assert listed == sorted(listed)
        assert set(np.flatnonzero(np.asarray(blocks)[query])) <= set(listed)
        # A block may also be listed for a subtree that ends within the block of queries; never for one before it.
        assert all(end[2 * BLOCK * k : 2 * BLOCK * (k + 1)].max() > query * BLOCK for k in listed)
    assert np.asarray(count).min() >= 1


@settings(parent=COMPILES, max_examples=2)
@given(st.lists(st.integers(0, 300), min_size=512, max_size=512), st.integers(0, 512))
def test_the_kernels_in_their_interpreters_equal_the_reference(levels, used):
    depth: list[int] = []
    for level in levels[:used]:
        depth.append(min(level, depth[-1] + 1) if depth else 0)
    one = np.append(subtree_ends(np.array(depth, np.int32)), np.arange(used, 512) + 1)
    end = jnp.asarray(np.stack([one, np.full(512, 512)]), jnp.int32)
    query, key, value = inputs(2, 512, 4, 2)
    expected = reference(query, key, value, end)
    context = tpu.kernel(query, key, value, end, block=128, interpret=True)
    np.testing.assert_allclose(context, expected, atol=2e-6, rtol=1e-5)
    context = gpu.kernel(query, key, value, end, interpret=True)
    np.testing.assert_allclose(context, expected, atol=2e-6, rtol=1e-5)


LOWER_FOR_GPU = """
import jax, jax.numpy as jnp
from fineline_jax.models.tree_attention import gpu

h100 = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="cuda")
for head_dim, dtype in ((128, "bfloat16"), (64, "float32"), (80, "float16")):
    query = jax.ShapeDtypeStruct((1, 8192, 4, head_dim), dtype)
    key = jax.ShapeDtypeStruct((1, 8192, 2, head_dim), dtype)
    end = jax.ShapeDtypeStruct((1, 8192), jnp.int32)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=h100)):
        traced = jax.jit(gpu.kernel).trace(query, key, key, end)
        assert "xla.gpu.triton" in traced.lower(lowering_platforms=("cuda",)).as_text()
"""


def test_the_gpu_kernel_is_lowered_to_triton_without_a_gpu_and_without_a_warning():
    command = [sys.executable, "-W", "error::DeprecationWarning", "-c", LOWER_FOR_GPU]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr


COMPILE_FOR_CHIP = """
import sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from fineline_jax.models.tree_attention.tpu import kernel

name, chip = sys.argv[1:]
topology = topologies.get_topology_desc(
    platform="tpu", topology_name=name, chip_config_name=chip, chips_per_host_bounds=(2, 2, 1), num_slices=1,
    wrap=(False, False, False),
)
mesh = jax.sharding.Mesh(topologies.make_mesh(topology, (len(topology.devices),), ("rows",)).devices, ("rows",))
spec = jax.P("rows")
local = jax.shard_map(kernel, mesh=mesh, in_specs=(spec,) * 4, out_specs=spec, check_vma=False)
def spread(shape, dtype):
    return jax.ShapeDtypeStruct((mesh.size, *shape), dtype, sharding=jax.NamedSharding(mesh, spec))
shapes = (jnp.bfloat16, 32, 32, 128), (jnp.bfloat16, 16, 4, 64), (jnp.float32, 8, 8, 128)
for dtype, heads, kv_heads, head_dim in shapes:
    q, kv = spread((8192, heads, head_dim), dtype), spread((8192, kv_heads, head_dim), dtype)
    compiled = jax.jit(local).lower(q, kv, kv, spread((8192,), jnp.int32)).compile()
    assert "tpu_custom_call" in compiled.as_text()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "chip"), [("v4:2x2x1", "megacore"), ("v5e:2x2", "default"), ("v5:2x2x1", "megacore")]
)
def test_the_tpu_kernel_compiles_for_v4_v5e_and_v5p(topology: str, chip: str):
    pytest.importorskip("libtpu", reason="pip install -e '.[plan]'")
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v4-8", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_LOG_DIR": "disabled",
    }  # fmt: skip
    command = [sys.executable, "-c", COMPILE_FOR_CHIP, topology, chip]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_single_path_is_causal_attention():
    query, key, value = inputs(2, LENGTH, 4, 4)
    end = jnp.full((2, LENGTH), LENGTH, jnp.int32)
    np.testing.assert_allclose(
        blockwise(query, key, value, end), attention.reference(query, key, value), atol=2e-6, rtol=1e-5
    )


def test_invisible_blocks_are_not_touched():
    # Two trees of half a row each. NaN in the first must not reach the second, not even times zero.
    query, key, value = inputs(1, LENGTH, 2, 2)
    half = LENGTH // 2
    end = jnp.asarray([[half] * half + [LENGTH] * half], jnp.int32)
    poisoned = value.at[:, :half].set(jnp.nan)
    context = forms.blockwise(query, key, poisoned, end, query_block=BLOCK, key_block=BLOCK)
    assert np.isfinite(context[:, half:]).all()
    assert np.isnan(context[:, :half]).all()


def test_no_matrix_of_the_size_of_a_row_squared_exists():
    length = 2048
    query = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
    key = jax.ShapeDtypeStruct((1, length, 1, 16), jnp.float32)
    end = jax.ShapeDtypeStruct((1, length), jnp.int32)
    assert largest_array(forms.blockwise, query, key, key, end) < length**2 / 8
    assert largest_array(forms.reference, query, key, key, end) >= length**2


def test_bfloat16_is_as_close_to_float32_as_its_rounding():
    query, key, value = (x.astype(jnp.bfloat16) for x in inputs(1, LENGTH, 4, 2))
    end = jnp.full((1, LENGTH), LENGTH, jnp.int32)
    exact = reference(*(x.astype(jnp.float32) for x in (query, key, value)), end)
    context = blockwise(query, key, value, end)
    assert context.dtype == jnp.bfloat16
    np.testing.assert_allclose(context.astype(jnp.float32), exact, atol=0.03)


def test_any_length_has_blocks():
    query, key, value = inputs(1, 20, 2, 1)
    end = jnp.asarray(np.append(np.full(13, 13), np.arange(14, 21))[None], jnp.int32)
    np.testing.assert_allclose(
        forms.blockwise(query, key, value, end), reference(query, key, value, end), atol=2e-6, rtol=1e-5
    )


CONFIG = ModelConfig(vocab_size=64, width=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp_width=48, context=64)


def requests() -> tuple[Plan, list[np.ndarray]]:
    """Multiple choice with a shared prompt, as a plan and as one string per request."""
    rng = np.random.default_rng(3)
    stem = rng.integers(0, 64, 20).tolist()
    contexts = [stem + rng.integers(0, 64, rng.integers(4, 12)).tolist() for _ in range(12)]
    choices = [rng.integers(0, 64, rng.integers(1, 6)).tolist() for _ in range(48)]
    context_of = np.arange(48) // 4

    def ragged(rows: list[list[int]]) -> Ragged:
        return Ragged(np.concatenate(rows).astype(np.int32), np.cumsum([0, *map(len, rows)], dtype=np.int64))

    asked = RequestTokens(ragged(contexts), ragged(choices), context_of, np.zeros(48, int))
    made = plan(asked, CONFIG.context, row_length=128, multiple=16, group=4)
    return made, [np.array(contexts[row] + choices[i], np.int32) for i, row in enumerate(context_of)]


def outputs(
    mesh: jax.sharding.Mesh,
    tokens: np.ndarray,
    positions: np.ndarray,
    end: np.ndarray,
    how: dispatch.Implementation,
) -> np.ndarray:
    """Final activations under the mask of `end`."""

    def run(params, tokens, positions, end):
        attend = dispatch.over_rows(how, end)
        return jax.reshard(decoder.hidden_states(CONFIG, params, tokens, positions, attend), jax.P())

    with jax.set_mesh(mesh):
        params = jax.jit(lambda: decoder.init_params(CONFIG, jax.random.key(0)))()
        spread = [jax.device_put(x, jax.NamedSharding(mesh, jax.P(BATCH, None))) for x in (tokens, positions, end)]
        return np.asarray(jax.jit(run)(params, *spread))


@pytest.mark.parametrize(("mesh", "how"), [
    (MeshShape(1, 1, 1), "reference"), (MeshShape(1, 1, 1), "blockwise"),
    pytest.param(MeshShape(2, 2, 1), "blockwise", marks=pytest.mark.slow),
    (MeshShape(1, 4, 2), "blockwise"),
])  # fmt: skip
def test_the_decoder_sees_a_request_in_a_row_as_it_sees_it_alone(mesh: MeshShape, how: dispatch.Implementation):
    made, strings = requests()
    devices = jax.devices()[: mesh.replica * mesh.fsdp * mesh.tensor]
    in_rows = outputs(make_mesh(mesh, devices), made.tokens, made.depth, made.end, how)

    longest = max(map(len, strings))
    alone = np.zeros((len(strings), longest), np.int32)
    for i, string in enumerate(strings):
        alone[i, : len(string)] = string
    places = np.broadcast_to(np.arange(longest, dtype=np.int32), alone.shape)
    causal = np.full(alone.shape, longest, np.int32)
    one = make_mesh(MeshShape(1, 1, 1), jax.devices()[:1])
    expected = outputs(one, alone, places, causal, "reference")

    pair_row = np.repeat(np.arange(len(made.used)), np.diff(made.target_offsets))
    for i, string in enumerate(strings):
        pairs = made.token_target[made.token_offsets[i] : made.token_offsets[i + 1]]
        np.testing.assert_array_equal(made.target_token[pairs], string[-len(pairs) :])
        np.testing.assert_allclose(
            in_rows[pair_row[pairs], made.target_parent[pairs]],
            expected[i, len(string) - 1 - len(pairs) : len(string) - 1],
            atol=1e-5,
        )
