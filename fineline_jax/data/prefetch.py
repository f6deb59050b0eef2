"""Batches made ready ahead of time on a thread, with the time the consumer waited for each."""

import collections
import time
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")


class Loaded(NamedTuple, Generic[T]):
    step: int
    value: T
    wait_seconds: float
    """How long the consumer stood still for it ("data wait")."""


def prefetch(load: Callable[[int], T], steps: Iterable[int], *, depth: int = 2) -> Generator[Loaded[T], None, None]:
    """`load(step)` for each of `steps` in order, at most `depth` of them loaded before they are asked for.

    An exception in `load` is raised here, at its step. Closing the iterator (or leaving a loop over it inside
    `contextlib.closing`) drops what is queued and waits for the load under way.
    """
    queue: collections.deque[tuple[int, Future[T]]] = collections.deque()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch") as pool:
        try:
            for step in steps:
                queue.append((step, pool.submit(load, step)))
                if len(queue) > depth:
                    yield _next(queue)
            while queue:
                yield _next(queue)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _next(queue: "collections.deque[tuple[int, Future[T]]]") -> Loaded[T]:
    step, future = queue.popleft()
    start = time.perf_counter()
    value = future.result()
    return Loaded(step, value, time.perf_counter() - start)
