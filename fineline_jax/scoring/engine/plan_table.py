"""What the prefix tree saves on each task of a pack, as a table to print."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from fineline_jax.scoring.engine.prefix_tree import Statistics, plan, statistics
from fineline_jax.scoring.requests.pack import Pack, Ragged, RequestTokens

HEADER = ("task", "requests", "rows", "length", "unique tokens", "fed / unique", "one by one / fed")


def plan_table(pack: Pack, context: int, row_length: int) -> list[tuple[str, ...]]:
    """Lines of text under HEADER: one per group of tasks, and per task of no group, each planned by itself.

    context: tokens the model reads; row_length: of the longest row. Unused positions of rows count as fed.
    """
    grouped = {task for group in pack.manifest["groups"] for task in group["tasks"]}
    entries = [(row["group"], row["tasks"]) for row in pack.manifest["groups"]]
    entries += [(row["task"], [row["task"]]) for row in pack.manifest["tasks"] if row["task"] not in grouped]
    return [_line(name, *found) for name, found in _planned(pack, entries, context, row_length)]


def _planned(
    pack: Pack, entries: list[tuple[str, list[str]]], context: int, row_length: int
) -> Iterator[tuple[str, tuple[int, Statistics]]]:
    names = pack.request_tasks.dictionary.to_pylist()
    for name, tasks in entries:
        chosen = np.flatnonzero(np.isin(pack.request_tokens.task, [names.index(task) for task in tasks]))
        made = plan(chosen_requests(pack.request_tokens, chosen), context, row_length=row_length)
        yield name, (len(chosen), statistics(made))


def chosen_requests(requests: RequestTokens, rows: np.ndarray) -> RequestTokens:
    """Some of the requests."""
    return dataclasses.replace(
        requests,
        continuations=taken(requests.continuations, rows),
        context_row=requests.context_row[rows],
        task=requests.task[rows],
    )


def taken(ragged: Ragged, rows: np.ndarray) -> Ragged:
    """Some rows of it."""
    lengths = ragged.lengths[rows]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    positions = np.arange(offsets[-1]) + np.repeat(ragged.offsets[rows] - offsets[:-1], lengths)
    return Ragged(ragged.values[positions], offsets)


def _line(name: str, requests: int, found: Statistics) -> tuple[str, ...]:
    return (
        name,
        f"{requests:,}",
        f"{found.rows:,}",
        f"{found.length:,}",
        f"{found.unique_tokens:,}",
        f"{found.overhead:.3f}",
        f"{found.saving:.2f}",
    )
