"""What the prefix tree saves on each task of a pack, as a table to print."""

import dataclasses

import numpy as np

from fineline_jax.scoring.engine.prefix_tree import plan, statistics
from fineline_jax.scoring.requests.pack import Pack, Ragged, RequestTokens

HEADER = ("task", "requests", "rows", "length", "unique tokens", "fed / unique", "one by one / fed")


def plan_table(pack: Pack, context: int, row_length: int) -> list[tuple[str, ...]]:
    """Lines of text under HEADER: one per group of tasks, and per task of no group, each planned by itself.

    context: tokens the model reads; row_length: of the longest row. Unused positions of rows count as fed.
    """
    grouped = {task for group in pack.manifest["groups"] for task in group["tasks"]}
    entries = [(row["group"], row["tasks"]) for row in pack.manifest["groups"]]
    entries += [(row["task"], [row["task"]]) for row in pack.manifest["tasks"] if row["task"] not in grouped]
    names = pack.request_tasks.dictionary.to_pylist()
    lines = []
    for name, tasks in entries:
        chosen = np.flatnonzero(np.isin(pack.request_tokens.task, [names.index(task) for task in tasks]))
        cost = statistics(plan(chosen_requests(pack.request_tokens, chosen), context, row_length=row_length))
        counts = (len(chosen), cost.rows, cost.length, cost.unique_tokens)
        lines.append((name, *(f"{count:,}" for count in counts), f"{cost.overhead:.3f}", f"{cost.saving:.2f}"))
    return lines


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
