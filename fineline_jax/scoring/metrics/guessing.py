"""What guessing gets on a pack's own documents: the choosers that look at no question.

Of tasks with choices: one at random, always the shortest, always the longest, always the same answer. The best of the
last three counts where it is above the first by more than one in a hundred draws of the documents would give (an
untrained model prefers short answers, so 1 / k is not what it gets). Of tasks without: always the most frequent answer.
"""

import math
from collections import Counter
from typing import NamedTuple

import numpy as np

from fineline_jax.scoring.metrics import documents
from fineline_jax.scoring.metrics.documents import Table
from fineline_jax.scoring.requests.pack import Pack

Z = 2.326


class Guess(NamedTuple):
    """The accuracy of the best chooser."""

    level: float
    chooser: str


def guesses(pack: Pack) -> dict[str, Guess]:
    """Task or group -> what guessing gets, of those where it is known to be more than the chance level of the pack."""
    texts = pack.requests["text"].to_pylist()
    found: dict[str, Guess] = {}
    for table in documents.tables(pack):
        kind = table.task["output_type"]
        if kind == "multiple_choice" and table.blocks:
            guess = _of_choices(table, texts)
        elif kind == "loglikelihood" and len(table.first):
            answers = Counter(texts[request].strip() for request in table.first)
            guess = Guess(answers.most_common(1)[0][1] / len(table.first), "always the same answer")
        else:
            continue
        chance = table.task["chance"]
        if chance is None or guess.level > chance + 1e-9:
            found[table.task["task"]] = guess
    sizes = {task["task"]: (task["documents"], task["chance"]) for task in pack.tasks}
    for group in pack.manifest["groups"]:
        known = {name: found[name].level if name in found else sizes[name][1] for name in group["tasks"]}
        if found.keys() & known.keys() and None not in known.values():
            total = sum(sizes[name][0] for name in known)
            level = sum(level * sizes[name][0] for name, level in known.items()) / total
            found[group["group"]] = Guess(level, "mean over the tasks of the group")
    return found


def _of_choices(table: Table, texts: list[str]) -> Guess:
    """Columns [documents] per chooser, its probability of being right."""
    right: dict[str, list[np.ndarray]] = {}
    answers = Counter(
        texts[request].strip() for block in table.blocks for request in block.requests[block.right].tolist()
    )
    common = answers.most_common(1)[0][0] if answers else ""
    for block in table.blocks:
        any_of = np.ones(block.right.shape)
        same = np.array([[texts[request].strip() == common for request in row] for row in block.requests])
        picks = {
            "one choice at random": any_of,
            "always the shortest choice": block.chars == block.chars.min(axis=1, keepdims=True),
            "always the longest choice": block.chars == block.chars.max(axis=1, keepdims=True),
            "always the same answer": np.where(same.any(axis=1, keepdims=True), same, any_of),
        }
        known = block.right.any(axis=1)
        for name, pick in picks.items():
            share = (pick * block.right).sum(axis=1) / pick.sum(axis=1)
            right.setdefault(name, []).append(share[known])
    columns = {name: np.concatenate(parts) for name, parts in right.items()}
    (random, uniform), *others = columns.items()
    best = Guess(float(uniform.mean()) if len(uniform) else math.nan, random)
    for name, column in others:
        gain = column - uniform
        error = gain.std(ddof=1) / math.sqrt(len(gain)) if len(gain) > 1 else math.inf
        if gain.mean() > Z * error and column.mean() > best.level:
            best = Guess(float(column.mean()), name)
    return best
