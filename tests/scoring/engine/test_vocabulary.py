"""Where parents meet the vocabulary: block by block, device by device, in float32 whatever the products are in."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from series_examples import one_device

from fineline_jax.mesh import make_mesh
from fineline_jax.recipe import MeshShape
from fineline_jax.scoring.engine import step

torch = pytest.importorskip("torch")
P = jax.P
BLOCK = 8
SHARE = 3 * BLOCK + 1
"""A device's part of the vocabulary: three blocks and one token more, for which the last block overlaps."""


@functools.cache
def program(devices: int):
    """`log_probabilities` with the vocabulary over so many devices."""
    mesh = one_device() if devices == 1 else make_mesh(MeshShape(replica=1, fsdp=1, tensor=devices))
    local = functools.partial(step.log_probabilities)  # a function of its own, so that nothing older is taken
    specs = (P(), P(), P(), P(), P(None, "tensor"))
    compiled = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False))
    put = lambda array, spec: jax.device_put(jnp.asarray(array), jax.NamedSharding(mesh, spec))
    return lambda *arrays: compiled(*map(put, arrays, specs))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(step, "CPU_BLOCK", BLOCK)
    monkeypatch.setattr(step, "PARENTS", (8, 3))


def found(hidden, head, pairs, targets, devices=1):
    return tuple(np.asarray(part) for part in program(devices)(hidden, len(hidden), pairs, targets, head))


DEVICES = pytest.mark.parametrize("devices", [1, 4])


@DEVICES
def test_of_equal_logits_the_first_is_the_greedy_one_across_blocks_and_devices(devices):
    """As torch.argmax has it. Whole numbers, so that equals are equal."""
    vocabulary = devices * SHARE
    borders = sorted({b + d for b in range(0, vocabulary + 1, BLOCK) for d in (-1, 0, 1)} & set(range(vocabulary)))
    borders = sorted({*borders, *(i * SHARE + d for i in range(devices) for d in (0, SHARE - 2, SHARE - 1))})
    rng = np.random.default_rng(devices)
    hidden = np.eye(19, dtype=np.float32)
    head = rng.integers(-3, 3, (19, vocabulary)).astype(np.float32)
    for parent in range(18):  # the last parent has the plain draw, in which there are equals too
        head[parent, rng.choice(borders, 2 + parent % 4, replace=False)] = 7
    head[3], head[4] = 2, -2
    best = torch.argmax(torch.from_numpy(head), dim=1).numpy()
    pairs = np.repeat(np.arange(19), len(borders) + 1)
    targets = np.concatenate([np.append(borders, best[parent]) for parent in range(19)])
    logp, greedy = found(hidden, head, pairs, targets, devices)
    np.testing.assert_array_equal(greedy, best[pairs] == targets)
    assert greedy.sum() >= 19
    expected = scipy.special.log_softmax(head.astype(np.float64), axis=1)[pairs, targets]
    np.testing.assert_allclose(logp, expected, atol=2e-6, rtol=1e-6)


@DEVICES
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_every_column_of_every_block_has_the_log_softmax_of_float64(devices, scale):
    """The scale: exp of the logits themselves would be infinite."""
    vocabulary = devices * SHARE
    rng = np.random.default_rng(7)
    hidden = rng.normal(size=(19, 8)).astype(np.float32)
    head = (scale * rng.normal(size=(8, vocabulary))).astype(np.float32)
    pairs, targets = (part.ravel() for part in np.meshgrid(np.arange(19), np.arange(vocabulary), indexing="ij"))
    logp, greedy = found(hidden, head, pairs, targets, devices)
    logits = hidden.astype(np.float64) @ head
    np.testing.assert_allclose(logp, scipy.special.log_softmax(logits, axis=1).ravel(), atol=1e-5 * scale, rtol=1e-6)
    np.testing.assert_array_equal(greedy, (np.arange(vocabulary) == logits.argmax(axis=1)[:, None]).ravel())


@DEVICES
def test_products_in_bfloat16_are_summed_in_float32(devices):
    rng = np.random.default_rng(8)
    hidden, head = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in ((19, 64), (64, devices * SHARE)))
    pairs, targets = rng.integers(0, 19, 60), rng.integers(0, devices * SHARE, 60)
    logp, _ = found(hidden, head, pairs, targets, devices)
    logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64)
    assert logp.dtype == np.float32
    np.testing.assert_allclose(logp, scipy.special.log_softmax(logits, axis=1)[pairs, targets], atol=5e-5)


def test_nothing_is_computed_in_bfloat16_but_moved():
    """A CPU may keep more digits than it is asked for, an accelerator does not."""
    mesh = one_device()
    local = functools.partial(step.log_probabilities)
    mapped = jax.shard_map(local, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    hidden, head = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((19, 64), (64, SHARE)))
    whole = jax.ShapeDtypeStruct((40,), jnp.int32)
    traced = jax.make_jaxpr(mapped)(hidden, jax.ShapeDtypeStruct((), jnp.int32), whole, whole, head)
    seen = []
    arithmetic = {"dot_general", "mul", "add", "sub", "exp", "log", "max", "reduce_sum", "reduce_max", "psum", "pmax"}

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name in arithmetic:
                seen.append(equation.primitive.name)
                assert all(out.aval.dtype != jnp.bfloat16 for out in equation.outvars), equation
            for value in filter(_is_jaxpr, jax.tree.leaves(equation.params, is_leaf=_is_jaxpr)):
                walk(getattr(value, "jaxpr", value))

    walk(traced.jaxpr)
    assert {"dot_general", "mul", "exp", "reduce_sum"} <= set(seen)


def _is_jaxpr(value) -> bool:
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")


def test_nothing_is_asked_of_a_target_of_minus_one():
    """It has log-probability 0 and counts as greedy, whatever parent it names."""
    hidden, head = np.ones((19, 2), np.float32), np.ones((2, SHARE), np.float32)
    logp, greedy = found(hidden, head, np.arange(19), np.where(np.arange(19) % 2, -1, 3))
    np.testing.assert_allclose(logp, np.where(np.arange(19) % 2, 0, -math.log(SHARE)), rtol=1e-6)
    assert greedy.tolist() == [bool(i % 2) for i in range(19)]


@pytest.mark.parametrize(
    ("parents", "sizes"), [(1, [1]), (2, [2]), (3, [3]), (4, [3]), (8, [3]), (9, [8, 3]), (99, [8, 3])]
)
def test_parents_meet_the_vocabulary_in_large_blocks_and_then_small_ones(parents, sizes):
    assert step.block_sizes(parents) == sizes
