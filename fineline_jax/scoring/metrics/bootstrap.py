"""lm-eval's bootstrap standard errors, to the last digits and many times faster.

lm-eval (0.4.13, `api/metrics.py`, `bootstrap_stderr`) draws 100,000 resamples with Python's generator, a new seed for
every thousand, and evaluates the metric on each; for LAMBADA that takes minutes. The metrics it does so for are
functions of sums over documents. Here numpy's generator is put into the state of Python's, which gives the same draws,
and the sums of a thousand resamples are one matrix product, for any number of checkpoints at once.
"""

import random
from collections.abc import Callable, Iterator, Sequence

import numpy as np

ITERATIONS = 100_000
"""lm-eval's default."""
CHUNK = 1000
"""Resamples drawn with one seed."""
CACHED = 1 << 17
"""Draws held at a time: as many as stay in a core's cache."""
Statistic = Callable[[np.ndarray], np.ndarray]


def stderr(columns: np.ndarray, statistic: Statistic, iterations: int = ITERATIONS) -> np.ndarray:
    """Standard deviation over lm-eval's resamples of what `statistic` makes of sums over documents, [checkpoints].

    columns: float [documents, checkpoints, columns]; the statistic turns sums [resamples, checkpoints, columns] into
    [resamples, checkpoints].
    """
    documents, *shape = columns.shape
    flat = columns.reshape(documents, -1)
    drawn = [statistic((counts @ flat).reshape(-1, *shape)) for counts in _resamples(documents, iterations)]
    return np.std(np.concatenate(drawn), axis=0, ddof=1)


def of_perplexity(loglikelihood: np.ndarray, iterations: int = ITERATIONS) -> np.ndarray:
    """[checkpoints] for log-likelihoods [checkpoints, documents]; not finite where a perplexity overflows."""
    documents = loglikelihood.shape[1]
    with np.errstate(over="ignore", invalid="ignore"):
        return stderr(loglikelihood.T[..., None], lambda sums: np.exp(-sums[..., 0] / documents), iterations)


def of_f1(pairs: np.ndarray, iterations: int = ITERATIONS) -> np.ndarray:
    """[checkpoints] for (right, chosen) classes [checkpoints, documents, 2]; 1 is the positive one."""
    right, chosen = np.moveaxis(pairs, -1, 0) == 1

    def f1(sums: np.ndarray) -> np.ndarray:
        positive = sums[..., 1] + sums[..., 2]
        return _quotient(2 * sums[..., 0], positive)

    return stderr(_columns([right & chosen, right, chosen]), f1, iterations)


def of_mcc(pairs: np.ndarray, iterations: int = ITERATIONS) -> np.ndarray:
    """[checkpoints] for (right, chosen) classes [checkpoints, documents, 2]: Matthews' correlation, as scikit-learn
    has it for any number of classes."""
    right, chosen = np.moveaxis(pairs, -1, 0)
    classes, documents = np.unique(pairs), pairs.shape[1]
    one_hot = [values == c for values in (right, chosen) for c in classes]

    def mcc(sums: np.ndarray) -> np.ndarray:
        hits, (right, chosen) = sums[..., 0], np.split(sums[..., 1:], 2, axis=-1)
        spread = (documents**2 - (right**2).sum(axis=-1)) * (documents**2 - (chosen**2).sum(axis=-1))
        return _quotient(hits * documents - (right * chosen).sum(axis=-1), np.sqrt(spread))

    return stderr(_columns([right == chosen, *one_hot]), mcc, iterations)


def _columns(flags: Sequence[np.ndarray]) -> np.ndarray:
    """Each bool [checkpoints, documents] -> float [documents, checkpoints, flags]"""
    return np.stack([flag.T for flag in flags], axis=-1).astype(float)


def _quotient(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """0 / 0 is 0, as in scikit-learn."""
    return np.divide(above, below, out=np.zeros_like(below), where=below > 0)


def _resamples(documents: int, iterations: int) -> Iterator[np.ndarray]:
    """How often each document is in each resample, float [some resamples, documents]."""
    size = min(CHUNK, iterations)
    block = min(size, max(1, CACHED // documents))
    mersenne = np.random.MT19937()
    uniform = np.random.Generator(mersenne)
    for seed in range(iterations // size):
        *key, position = random.Random(seed).getstate()[1]
        mersenne.state = {"bit_generator": "MT19937", "state": {"key": np.array(key, np.uint32), "pos": position}}
        for start in range(0, size, block):
            count = min(block, size - start)
            # as random.choices: the floor of a uniform number times the size
            drawn = (uniform.random((count, documents)) * documents).astype(np.int64)
            drawn += np.arange(count)[:, None] * documents
            counts = np.bincount(drawn.ravel(), minlength=count * documents)
            yield counts.reshape(count, documents).astype(float)
