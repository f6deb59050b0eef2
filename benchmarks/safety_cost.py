"""What digests, checksums, fsync and locks cost of the demo: alternating runs with and without them, and the seconds
inside them.

    .venv/bin/python benchmarks/safety_cost.py [--tokens 131072] [--pairs 2]

Nothing of the product switches them off; it is done here. The share of the seconds inside them is the bar (< 2 %): it
is the same for each run, while whole runs of a machine differ by more than that.
"""

import argparse
import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow.parquet as pq

from fineline_jax import atomic_files, folder_lock
from fineline_jax.checkpoints.runs import digest_record
from fineline_jax.cpu_backend import prepare_cpu
from fineline_jax.demo import run_demo

GUARDS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "digests of files": (digest_record, "_digest", lambda path, size, version: ""),
    "digests of records": (atomic_files, "_digest", lambda record: ""),
    "fsync": (os, "fsync", lambda descriptor: None),
    "locks": (folder_lock, "_wait_for", lambda *arguments: mock.Mock()),
}
"""Module, function, and what stands in its place."""


@contextlib.contextmanager
def without() -> Iterator[None]:
    """No digests, checksums, fsync and locks inside."""
    write = pq.ParquetWriter.__init__

    def unchecked(self: Any, *arguments: Any, **options: Any) -> None:
        write(self, *arguments, **options | {"write_page_checksum": False})

    with contextlib.ExitStack() as stack:
        for module, name, instead in GUARDS.values():
            stack.enter_context(mock.patch.object(module, name, instead))
        stack.enter_context(mock.patch.object(pq.ParquetWriter, "__init__", unchecked))
        yield


@contextlib.contextmanager
def timed(spent: dict[str, float]) -> Iterator[None]:
    """Adds the seconds inside each guard, of all threads, to `spent`."""

    def wrapped(kind: str, act: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return act(*arguments, **options)
            finally:
                spent[kind] = spent.get(kind, 0.0) + time.perf_counter() - began

        return call

    with contextlib.ExitStack() as stack:
        for kind, (module, name, _) in GUARDS.items():
            stack.enter_context(mock.patch.object(module, name, wrapped(kind, getattr(module, name))))
        yield


def run(how: contextlib.AbstractContextManager[None], tokens: int) -> float:
    folder = Path(tempfile.mkdtemp())
    try:
        began = time.perf_counter()
        with how:
            run_demo(folder / "demo", tokens=tokens)
        return time.perf_counter() - began
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--tokens", type=int, default=131_072)
    options.add_argument("--pairs", type=int, default=2)
    given = options.parse_args()
    prepare_cpu()
    run(without(), given.tokens)  # compiles what can be kept
    spent: dict[str, float] = {}
    seconds_with, seconds_without = [], []
    for _ in range(given.pairs):
        seconds_with.append(run(timed(spent), given.tokens))
        seconds_without.append(run(without(), given.tokens))
    whole = sum(seconds_with)
    print(f"with:    {', '.join(f'{seconds:.1f}' for seconds in seconds_with)} s")
    print(f"without: {', '.join(f'{seconds:.1f}' for seconds in seconds_without)} s")
    for kind, seconds in spent.items():
        print(f"{kind}: {seconds / given.pairs:.2f} s per run, {seconds / whole:.2%}")
    print(f"together {sum(spent.values()) / whole:.2%} of the time inside them (bar: 2 %)")


if __name__ == "__main__":
    main()
