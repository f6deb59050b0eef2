"""Bootstrapped standard errors are lm-eval's, draw for draw."""

import inspect
import random
import warnings

import lm_eval
import numpy as np
import pytest
from lm_eval.api.metrics import bootstrap_stderr, f1_score, matthews_corrcoef, perplexity

from fineline_jax.scoring.metrics import bootstrap


@pytest.fixture(autouse=True)
def in_one_process(monkeypatch):
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")


def pairs_of(classes: int, documents: int, checkpoints: int = 2) -> np.ndarray:
    rng = np.random.default_rng(classes)
    right = rng.integers(0, classes, (checkpoints, documents))
    chosen = np.where(rng.random(right.shape) < 0.5, right, rng.integers(0, classes, right.shape))
    return np.stack([right, chosen], axis=-1)


def theirs(metric, pairs: np.ndarray, iterations: int) -> list[float]:
    with warnings.catch_warnings():  # scikit-learn's, of resamples without one of the classes
        warnings.simplefilter("ignore")
        return [bootstrap_stderr(metric, [tuple(pair) for pair in one.tolist()], iterations) for one in pairs]


@pytest.mark.parametrize("documents", [2, 60, 700])
def test_perplexity(documents, monkeypatch):
    monkeypatch.setattr(bootstrap, "CACHED", 200_000 // 3)  # blocks that do not divide a thousand
    rng = random.Random(documents)
    values = [[-rng.expovariate(0.3) for _ in range(documents)] for _ in range(3)]
    expected = [bootstrap_stderr(perplexity, row, 2000) for row in values]
    np.testing.assert_allclose(bootstrap.of_perplexity(np.array(values), 2000), expected, rtol=1e-11)


def test_f1_and_correlation_of_two_classes():
    pairs = pairs_of(2, 30)
    np.testing.assert_allclose(bootstrap.of_f1(pairs, 200), theirs(f1_score, pairs, 200), rtol=1e-11)
    np.testing.assert_allclose(bootstrap.of_mcc(pairs, 200), theirs(matthews_corrcoef, pairs, 200), rtol=1e-11)


def test_correlation_of_many_classes_of_which_some_are_never_right():
    pairs = pairs_of(4, 25)
    pairs[:, :, 0][pairs[:, :, 0] == 3] = -100  # lm-eval's label of a document without a right choice
    np.testing.assert_allclose(bootstrap.of_mcc(pairs, 200), theirs(matthews_corrcoef, pairs, 200), rtol=1e-11)


def test_resamples_without_a_positive_or_with_one_class_only_count_as_nothing():
    pairs = np.array([[(0, 0)] * 5 + [(1, 1)]])
    np.testing.assert_allclose(bootstrap.of_f1(pairs, 100), theirs(f1_score, pairs, 100), rtol=1e-11)
    np.testing.assert_allclose(bootstrap.of_mcc(pairs, 100), theirs(matthews_corrcoef, pairs, 100), rtol=1e-11)


def test_a_perplexity_that_overflows_has_no_finite_error():
    assert not np.isfinite(bootstrap.of_perplexity(np.array([[-900.0, -800.0, -1000.0]]), 1000)).any()


def test_as_many_resamples_as_lm_eval_draws(monkeypatch):
    """100,000 in whole chunks of a thousand, each with a seed of its own; what is left over is not drawn."""
    assert inspect.signature(lm_eval.simple_evaluate).parameters["bootstrap_iters"].default == bootstrap.ITERATIONS
    values = [-0.5, -2.0, -3.5, -1.0]
    for iterations in (1, 999, 1000, 1999, 2300):
        if iterations > 1:
            expected = bootstrap_stderr(perplexity, values, iterations)
            assert bootstrap.of_perplexity(np.array([values]), iterations)[0] == pytest.approx(expected, rel=1e-11)
        drawn = sum(len(block) for block in bootstrap._resamples(4, iterations))
        assert drawn == (iterations if iterations < 1000 else iterations // 1000 * 1000)
    drawn = []
    monkeypatch.setattr(bootstrap, "_resamples", lambda documents, count: drawn.append(count) or [np.eye(4)])
    bootstrap.of_perplexity(np.array([values]))
    bootstrap.of_f1(pairs_of(2, 4))
    bootstrap.of_mcc(pairs_of(2, 4))
    assert drawn == [100_000] * 3
