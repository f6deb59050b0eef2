"""The kernels for TPU and GPU in their interpreters: splash, cuDNN's call, and attention over prefix-tree rows."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from fineline_jax.models import attention, rotary
from fineline_jax.models.tree_attention import blockwise, dispatch, gpu, tpu
from fineline_jax.scoring.engine.trie import subtree_ends


def exact(query: Any, key: Any, value: Any, seen: np.ndarray) -> np.ndarray:
    """Softmax attention in float64; seen [batch, queries, keys]."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    group = query.shape[2] // key.shape[2]
    out = np.zeros_like(query)
    for head in range(query.shape[2]):
        scores = np.einsum("bqd,bkd->bqk", query[:, :, head], key[:, :, head // group]) / np.sqrt(query.shape[3])
        weights = np.where(seen, np.exp(scores - scores.max(axis=-1, keepdims=True)), 0.0)
        weights /= weights.sum(axis=-1, keepdims=True)
        out[:, :, head] = np.einsum("bqk,bkd->bqd", weights, value[:, :, head // group])
    return out


def drawn(batch: int, length: int, heads: int, kv_heads: int, head_dim: int, dtype: Any = jnp.float32) -> list:
    random = np.random.default_rng(length + heads)
    return [jnp.asarray(random.normal(size=(batch, length, n, head_dim)), dtype) for n in (heads, kv_heads, kv_heads)]


def over_a_path(attend: Any) -> Any:
    """Attention over prefix-tree rows of one sequence each."""
    return lambda *qkv: attend(*qkv, jnp.full(qkv[0].shape[:2], qkv[0].shape[1], jnp.int32))


# Causal attention in training


@pytest.mark.parametrize(
    ("length", "ends"), [pytest.param(300, None, marks=pytest.mark.slow), (128, None), (300, (0, 1, 128, 200, 299))]
)
def test_splash_and_its_gradients_are_those_of_the_plain_formula(length: int, ends: tuple[int, ...] | None) -> None:
    """Of three blocks with a remainder, and of one; three query heads share a key head. ends: tokens of the second row
    that end a document; the first row is one document."""
    query, key, value = drawn(2, length, 6, 2, 16)
    upstream = jnp.cos(jnp.arange(query.size, dtype=jnp.float32)).reshape(query.shape)
    seen, documents = np.tri(length, dtype=bool)[None].repeat(2, axis=0), None
    if ends is not None:
        tokens = np.zeros((2, length), np.int32)
        tokens[1, list(ends)] = 7
        documents = attention.document_numbers(jnp.asarray(tokens), 7)
        for end in ends:
            seen[1, end + 1 :, : end + 1] = False
    results = []
    for attend in (functools.partial(attention._splash, interpret=True), attention.reference, attention.blockwise):
        context, pull = jax.vjp(lambda *qkv, attend=attend: attend(*qkv, documents), query, key, value)
        results.append((context, *pull(upstream)))
        np.testing.assert_allclose(context, exact(query, key, value, seen), atol=1e-5)
    for splash, plain, in_blocks in zip(*results, strict=True):
        np.testing.assert_allclose(splash, plain, atol=2e-5)
        np.testing.assert_allclose(in_blocks, plain, atol=2e-5)


@pytest.mark.parametrize("length", [1, 127, 129, 1024, 1536, 2048])
def test_splash_takes_any_length_in_blocks_of_at_most_1024(length: int) -> None:
    shape = lambda heads: jax.ShapeDtypeStruct((1, length, heads, 64), jnp.bfloat16)
    found = jax.eval_shape(attention._splash, shape(2), shape(1), shape(1))
    assert (found.shape, found.dtype) == ((1, length, 2, 64), jnp.bfloat16)
    if length % 128 == 0:
        sizes = attention._splash_kernel(2, length, False).kwargs["block_sizes"]
        block = {1024: 1024, 1536: 512, 2048: 1024}[length]
        assert {sizes.block_q, sizes.block_kv, sizes.block_q_dkv, sizes.block_kv_dkv} == {block}


def test_what_splash_leaves_for_its_gradient_is_saved_by_the_name_of_the_context(capsys: pytest.CaptureFixture) -> None:
    """The context and the normalisers, so that the kernel is not run again for them."""
    attend = functools.partial(attention._splash, interpret=True)
    for names, saved in ((("context",), 1), ((), 0)):
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        jax.ad_checkpoint.print_saved_residuals(jax.checkpoint(attend, policy=policy), *drawn(1, 128, 2, 1, 16))
        said = capsys.readouterr().out
        assert (said.count("f32[1,2,128] output"), said.count("f32[1,2,128,16] output")) == (saved, saved)


@pytest.mark.parametrize("head_dim", [16, 100])
def test_cudnn_is_asked_for_causal_attention(head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes head sizes that are multiples of 8; OpenLLaMA 3B has 100."""
    asked, plain = [], jax.nn.dot_product_attention

    def instead(*arrays: Any, implementation: str, **options: Any) -> jax.Array:
        asked.append(implementation)
        assert all(array.shape[-1] % 8 == 0 for array in arrays)
        return plain(*arrays, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", instead)
    query, key, value = drawn(2, 20, 6, 2, head_dim)
    np.testing.assert_allclose(
        attention._cudnn(query, key, value), exact(query, key, value, np.tri(20, dtype=bool)), atol=1e-5
    )
    assert asked == ["cudnn"]


@pytest.mark.parametrize(
    "attend",
    [attention.reference, attention.blockwise, over_a_path(blockwise.reference)],
    ids=["reference", "blockwise", "tree"],
)
def test_scores_of_bfloat16_are_float32(attend: Any) -> None:
    """257 and 256 are told apart, which bfloat16 does not."""
    query = jnp.zeros((1, 2, 1, 16), jnp.bfloat16).at[..., 0].set(64).at[..., 1].set(4)
    key = jnp.zeros_like(query).at[..., 0].set(16).at[0, 0, 0, 1].set(1)
    value = jnp.zeros_like(query).at[0, 0].set(1)
    np.testing.assert_allclose(
        np.asarray(attend(query, key, value), np.float32)[0, 1], scipy.special.expit(1), rtol=2e-2
    )


def test_where_all_values_are_equal_no_query_has_a_gradient() -> None:
    """In bfloat16 too: what is subtracted from the slopes of the weights, their mean, is made in float32."""
    _, key, value = drawn(1, 20, 2, 1, 16, jnp.bfloat16)
    query, equal = jnp.zeros((1, 20, 2, 16), jnp.bfloat16), jnp.broadcast_to(value[:, :1], value.shape)
    upstream = jnp.cos(jnp.arange(query.size, dtype=jnp.float32)).reshape(query.shape).astype(jnp.bfloat16)
    slope = jax.jit(lambda *qkv: jax.vjp(attention.blockwise, *qkv)[1](upstream)[0])(query, key, equal)
    assert np.abs(np.asarray(slope, np.float32)).max() < 1e-5


def test_products_that_stand_for_sums_and_copies_are_of_whole_float32_numbers() -> None:
    """TPU and GPU would round their operands: the rotary angles' table, and the sum over features of a gradient."""
    table = jax.make_jaxpr(lambda places: rotary.rotary_factors(places, 6, 500.0, jnp.float32))(jnp.zeros((1, 3)))
    products = [line for line in str(table).splitlines() if "precision=" in line]
    assert len(products) == 2 and all("(Precision.HIGHEST, Precision.HIGHEST)" in line for line in products)
    arrays = drawn(1, 20, 2, 1, 16)
    backward = jax.make_jaxpr(lambda *qkv: jax.vjp(attention.blockwise, *qkv)[1](qkv[0]))(*arrays)
    assert "(Precision.HIGHEST, Precision.HIGHEST)" in str(backward)


# Attention over prefix-tree rows


def paths(*lengths: int) -> list[int]:
    """`end` of one tree after the other, each a single path."""
    return [stop for length, stop in zip(lengths, np.cumsum(lengths)) for _ in range(length)]


def bushes(length: int, seed: int) -> np.ndarray:
    random, depth = np.random.default_rng(seed), [0]
    while len(depth) < length:
        depth.append(int(random.integers(0, depth[-1] + 2)) if random.random() < 0.3 else depth[-1] + 1)
    return subtree_ends(np.array(depth, np.int32))


def rows(length: int, block: int) -> np.ndarray:
    """Bushes; trees that end before, at and behind the ends of blocks; nothing but roots; one path."""
    return np.array(
        [
            bushes(length, 1),
            paths(block - 1, 1, 1, block - 1, 1, length - 2 * block - 1),
            np.arange(1, length + 1),
            [length] * length,
        ],
        np.int32,
    )


KERNELS = {
    "tpu": functools.partial(tpu.kernel, interpret=True),
    "gpu": functools.partial(gpu.kernel, interpret=True),
    "blockwise": blockwise.blockwise,
}
BLOCKS = {"tpu": {"block": 128}, "gpu": {"query_block": 128, "key_block": 64}, "blockwise": {}}
SHAPES = {"tpu": (384, 128, 24), "gpu": (176, 16, 24), "blockwise": (136, 8, 24)}
"""Length, the block that it leaves, and features per head."""


@pytest.mark.parametrize("name", KERNELS)
def test_every_query_sees_its_ancestors_and_itself(name: str) -> None:
    length, block, head_dim = SHAPES[name]
    end = rows(length, block)
    query, key, value = drawn(len(end), length, 6, 2, head_dim)
    place = np.arange(length)
    seen = (place[None, None] <= place[None, :, None]) & (place[None, :, None] < end[:, None, :])
    np.testing.assert_array_equal(blockwise.visible(jnp.asarray(end)), seen)
    found = jax.jit(KERNELS[name])(query, key, value, jnp.asarray(end))
    np.testing.assert_allclose(found, exact(query, key, value, seen), atol=1e-5)
    np.testing.assert_allclose(found[2], jnp.repeat(value[2], 3, axis=1), atol=1e-6)  # roots see themselves alone


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_rounds_to_bfloat16_only_what_it_multiplies(name: str) -> None:
    length, _, head_dim = SHAPES[name]
    end = jnp.asarray(bushes(length, 2))[None]
    arrays = drawn(1, length, 2, 1, head_dim, jnp.bfloat16)
    found = jax.jit(KERNELS[name])(*arrays, end)
    assert found.dtype == jnp.bfloat16
    difference = np.asarray(found, np.float64) - exact(*arrays, np.asarray(blockwise.visible(end)))
    assert np.sqrt((difference**2).mean()) < 0.004 and np.abs(difference).max() < 0.03


@pytest.mark.parametrize("name", ["tpu", "gpu"])
def test_products_of_float32_are_exact_and_sums_are_float32(name: str) -> None:
    end = jax.ShapeDtypeStruct((1, 128), jnp.int32)
    for dtype, precise in ((jnp.float32, True), (jnp.bfloat16, False)):
        shape = jax.ShapeDtypeStruct((1, 128, 1, 16), dtype)
        text = str(jax.make_jaxpr(KERNELS[name])(shape, shape, shape, end))
        assert text.count("preferred_element_type=float32") == 2
        assert ("Precision.HIGHEST" in text) == precise


def test_blocks_of_bfloat16_are_summed_in_float32() -> None:
    shape = jax.ShapeDtypeStruct((1, 128, 1, 16), jnp.bfloat16)
    text = str(jax.make_jaxpr(blockwise.blockwise)(shape, shape, shape, jax.ShapeDtypeStruct((1, 128), jnp.int32)))
    assert text.count("dot_general[") == text.count("preferred_element_type=float32") == 2


@pytest.mark.parametrize("name", KERNELS)
def test_keys_of_invisible_blocks_are_not_touched(name: str) -> None:
    """NaN in the first tree must not reach the second, not even times zero."""
    length, block = {"tpu": (512, 128), "gpu": (512, 128), "blockwise": (256, 64)}[name]
    half = length // 2
    query, key, value = drawn(1, length, 2, 2, 16)
    end = jnp.asarray([paths(half, half)], jnp.int32)
    poisoned = value.at[:, :half].set(jnp.nan)
    found = KERNELS[name](query, key, poisoned, end, **({"block": block} if name == "tpu" else {}))
    assert np.isfinite(found[:, half:]).all() and np.isnan(found[:, :half]).all()


def test_the_tpu_kernel_fetches_the_listed_blocks_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block is fetched where its number is another than the step's before."""
    made = {}
    call = tpu.pl.pallas_call
    watch = lambda *a, **k: made.update(k) or call(*a, **k)
    monkeypatch.setattr(tpu.pl, "pallas_call", watch)
    length, block, batch = 512, 128, 2
    end = jnp.asarray([paths(130, 126, 256), paths(512)], jnp.int32)
    query, key, value = drawn(batch, length, 4, 2, 16)
    tpu.kernel(query, key, value, end, block=block, interpret=True)
    order, count = blockwise.visible_blocks(end, block, block)
    grid = made["grid_spec"]
    blocks = length // block
    assert grid.grid == (batch, 4, blocks, blocks)
    flat = order.reshape(-1), count.reshape(-1)
    places = lambda spec, *step: [int(x) for x in spec.index_map(*map(jnp.int32, step), *flat)]
    of_query, of_key, of_value, of_end = grid.in_specs
    for row, i in np.ndindex(batch, blocks):
        listed = np.asarray(order[row, i, : count[row, i]]).tolist()
        assert places(of_query, row, 2, i, 0) == places(grid.out_specs, row, 2, i, blocks - 1) == [row, 2, i, 0]
        for spec, lead, axis in ((of_key, [row, 1], 2), (of_value, [row, 1], 2), (of_end, [row, 0], 2)):
            fetched = [places(spec, row, 2, i, step) for step in range(blocks)]
            assert all(place[:2] == lead for place in fetched)
            numbers = [place[axis] for place in fetched]
            assert numbers == listed + [listed[-1]] * (blocks - len(listed))


def test_blocks_are_halved_until_they_divide_the_length() -> None:
    cases = {(512, 512): 512, (384, 512): 128, (640, 512): 128, (128, 512): 128, (48, 64): 16, (7, 64): 1}
    assert {case: blockwise.block_size(*case) for case in cases} == cases


def test_the_kernel_for_a_platform_is_its_own() -> None:
    assert [dispatch.pick(name) for name in ("tpu", "gpu", "cpu")] == ["tpu", "gpu", "blockwise"]
