"""Both engines against a float64 Llama in numpy that reads one request at a time, cut as lm-eval cuts it."""

import dataclasses

import jax
import numpy as np
import pytest
import scipy.special
from float64_llama import BOS, CONFIG, CONTEXT, VOCABULARY, logits_of
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from scoring_examples import score_once
from series_examples import one_device

from fineline_jax.mesh import make_mesh
from fineline_jax.models import decoder
from fineline_jax.recipe import MeshShape
from fineline_jax.scoring.engine import step, tree_engine
from fineline_jax.scoring.lm_eval import backend
from fineline_jax.scoring.requests.pack import RequestTokens

COLUMNS = [0, 255, 256, 511, 512, 767, 768]
"""First and last of each block of the vocabulary"""


def weights(seed: int = 0) -> dict:
    """In the shapes that decoder.py documents; norms are not 1."""
    rng = np.random.default_rng(seed)
    c = CONFIG
    normal = lambda *shape, scale=0.25: (scale * rng.normal(size=shape)).astype(np.float32)
    of_layers = lambda *shape, scale=0.25: normal(c.layers, *shape, scale=scale)
    layers = {
        "attention_norm": 1 + of_layers(c.width), "mlp_norm": 1 + of_layers(c.width),
        "q": of_layers(c.width, c.heads, c.head_dim, scale=0.6), "o": of_layers(c.heads, c.head_dim, c.width),
        "k": of_layers(c.width, c.kv_heads, c.head_dim, scale=0.6), "v": of_layers(c.width, c.kv_heads, c.head_dim),
        "gate": of_layers(c.width, c.mlp_width), "up": of_layers(c.width, c.mlp_width),
        "down": of_layers(c.mlp_width, c.width),
    }  # fmt: skip
    outer = {"embed": normal(c.vocab_size, c.width, scale=1.0), "norm": 1 + normal(c.width)}
    return outer | {"layers": layers, "head": normal(c.width, c.vocab_size, scale=0.8)}


def read(context: list[int] | None, continuation: list[int], most: int) -> list[tuple[list[int], list[int]]]:
    """(what the model reads, the targets at its end), as lm-eval's HFLM for a model that reads `most` tokens."""
    if context is None:
        found = map(make_disjoint_window, get_rolling_token_windows(continuation, BOS, most, 1))
        return [((given + predicted)[:-1], predicted) for given, predicted in found]
    if len(continuation) <= most:
        return [((context + continuation)[-(most + 1) :][:-1], continuation)]
    result = []  # where lm-eval stops: pieces, each below as much as fits
    for start in range(0, len(continuation), most):
        piece = continuation[start : start + most]
        result.append(((context + continuation[: start + len(piece)])[-(most + 1) :][:-1], piece))
    return result


def one_by_one(params: dict, requests: list, most: int = CONTEXT) -> tuple[np.ndarray, np.ndarray]:
    total, greedy = np.zeros(len(requests)), np.ones(len(requests), bool)
    for i, (context, continuation, _) in enumerate(requests):
        for tokens, targets in read(context, continuation, most):
            logits = logits_of(params, tokens)[-len(targets) :]
            logp = scipy.special.log_softmax(logits, axis=1)
            total[i] += logp[np.arange(len(targets)), targets].sum()
            greedy[i] &= (logits.argmax(axis=1) == targets).all()
    return total, greedy


def asked(params: dict) -> list[tuple[list[int] | None, list[int], str]]:
    """(context, continuation, task)"""
    rng = np.random.default_rng(1)
    some = lambda n: rng.integers(0, VOCABULARY, n).tolist()
    stem = [BOS, *some(9)]
    found: list[tuple[list[int] | None, list[int], str]] = []
    found += [(stem, [column], "choices") for column in COLUMNS]
    found += [(stem + some(n), some(3), "choices") for n in (0, 1, 4)]
    found += [(stem, [column], "again") for column in COLUMNS[:3]]  # another task: another tree
    found += [found[0], found[1], found[1]]
    longer = some(4)
    found += [(stem, longer[:2], "prefix"), (stem, longer, "prefix"), (stem + longer[:2], longer[2:], "prefix")]
    # The model reads 24 tokens, so 25 with the last target are whole.
    found += [([BOS, *some(CONTEXT + extra - 3)], some(2), "limits") for extra in (-1, 0, 1, 2, 9)]
    found += [([BOS], some(n), "limits") for n in (1, CONTEXT - 1, CONTEXT, CONTEXT + 1, 2 * CONTEXT + 1)]
    found += [([BOS, BOS, *some(3)], some(1), "begins twice")]
    found += [(None, some(n), "texts") for n in (0, 1, CONTEXT, CONTEXT + 1, 2 * CONTEXT, 50)] + [
        (None, [BOS, 7], "texts")
    ]
    for context in (stem, [BOS, *some(CONTEXT - 2)]):  # what the model itself would say, and all but the last of it
        best = list(context)
        for _ in range(3):
            best.append(int(logits_of(params, best[-CONTEXT:])[-1].argmax()))
        answer = best[len(context) :]
        found += [(context, answer, "greedy"), (context, [*answer[:-1], (answer[-1] + 1) % VOCABULARY], "greedy")]
    return found


def packed(requests: list) -> RequestTokens:
    encoded = [(None if c is None else np.array(c, np.int32), np.array(t, np.int32)) for c, t, _ in requests]
    return backend.request_tokens(encoded, [task for *_, task in requests], BOS)


def on(mesh: jax.sharding.Mesh, params: dict) -> dict:
    places = decoder.abstract_params(CONFIG, mesh)
    return jax.tree.map(lambda leaf, place: jax.device_put(leaf, place.sharding), params, places)


@pytest.fixture(scope="module")
def expected() -> tuple[dict, list, np.ndarray, np.ndarray]:
    params = weights()
    requests = asked(params)
    return params, requests, *one_by_one(params, requests)


@pytest.fixture(autouse=True)
def small_shapes(monkeypatch):
    """Several rows, steps, rounds and blocks of parents, the last ones not full."""
    monkeypatch.setitem(tree_engine.SHAPES, "cpu", tree_engine.Shape(row=32, rows=1, multiple=16, per_batch=2))
    monkeypatch.setattr(step, "PARENTS", (24, 7))
    yield


EIGHT = MeshShape(replica=4, fsdp=2)


@pytest.mark.parametrize("mesh", [None, EIGHT], ids=["one device", "eight devices"])
@pytest.mark.parametrize("engine", ["tree", "rows"])
def test_log_likelihoods_are_those_of_a_float64_llama_that_reads_as_lm_eval_does(expected, engine, mesh):
    params, requests, total, greedy = expected
    mesh = one_device() if mesh is None else make_mesh(mesh)
    told: list[int] = []
    found = score_once(packed(requests), CONFIG, on(mesh, params), mesh, engine=engine, advance=told.append)
    assert found[0].dtype == np.float64 and found[1].dtype == bool
    np.testing.assert_allclose(found[0], total, atol=1e-4)
    np.testing.assert_array_equal(found[1], greedy)
    assert greedy.sum() > sum(len(continuation) == 0 for _, continuation, _ in requests) and not greedy.all()
    assert sum(told) == len(requests) and min(told) >= 0, "every request is told once"
    if engine == "tree":
        assert len(told) > 1


def test_where_all_logits_are_equal_the_first_token_is_the_greedy_one(expected):
    """As torch.argmax has it, whatever block of the vocabulary the others are in."""
    params, requests, _, _ = expected
    same = on(one_device(), params | {"head": np.zeros_like(params["head"])})
    for engine in ("tree", "rows"):
        found, greedy = score_once(packed(requests), CONFIG, same, one_device(), engine=engine)
        lengths = [len(continuation) for _, continuation, _ in requests]
        np.testing.assert_allclose(found, -np.log(VOCABULARY) * np.array(lengths), rtol=1e-6)
        assert greedy.tolist() == [set(continuation) <= {0} for _, continuation, _ in requests]


def test_two_models_of_other_contexts_in_one_process_read_each_its_own(expected):
    """The plan is kept for a series; the next model's context may be another."""
    params, requests, total, _ = expected
    params = on(one_device(), params)
    short = dataclasses.replace(CONFIG, context=CONTEXT // 2)
    for config, wanted in ((CONFIG, total), (short, one_by_one(params, requests, short.context)[0]), (CONFIG, total)):
        found, _ = score_once(packed(requests), config, params, one_device())
        np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_in_bfloat16_the_products_are_rounded_and_the_soft_max_is_not(expected):
    params, requests, total, _ = expected
    found, _ = score_once(packed(requests), CONFIG, on(one_device(), params), one_device(), "bfloat16")
    apart = np.abs(found - total)
    lengths = np.array([max(1, len(continuation)) for _, continuation, _ in requests])
    assert apart.max() > 1e-3 and (apart / lengths).max() < 0.5


def test_a_pack_of_nothing_but_empty_texts_has_log_likelihood_nought():
    params = on(one_device(), weights())
    for engine in ("tree", "rows"):
        told: list[int] = []
        pack = packed([(None, [], "texts")] * 2)
        found, greedy = score_once(pack, CONFIG, params, one_device(), engine=engine, advance=told.append)
        assert found.tolist() == [0.0, 0.0] and greedy.tolist() == [True, True]
