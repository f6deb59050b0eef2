"""Small packs of documents made by hand, and answers to their requests."""

import dataclasses
import json
import random
from typing import Any

import numpy as np
import pyarrow as pa

from fineline_jax.scoring.requests import pack

TEXTS = ("a", "of", "ice cream", "Fäden", "é", "東京", "我们的学校", "naïve façade", "🙂", "x" * 11)


@dataclasses.dataclass(frozen=True)
class Doc:
    choices: tuple[str, ...]
    gold: tuple[int, ...]
    tokens: tuple[int, ...]
    words: int = 0
    bytes: int = 0
    content: dict[str, Any] = dataclasses.field(default_factory=dict)


def docs(count: int, seed: int = 0, most_gold: int = 1, choices: tuple[int, ...] = (2, 3, 4, 5)) -> list[Doc]:
    """The right choice is the last of every third."""
    rng = random.Random(seed)
    made = []
    for i in range(count):
        k = rng.choice(choices)
        gold = (k - 1,) if i % 3 == 0 else tuple(sorted(rng.sample(range(k), rng.randint(1, min(k, most_gold)))))
        texts = tuple(rng.choice(TEXTS) for _ in range(k))
        tokens = tuple(rng.randint(1, 6) for _ in range(k))
        made.append(Doc(texts, gold, tokens, rng.randint(1, 90), rng.randint(100, 400), {"number": i}))
    return made


def task(name: str, kind: str = "multiple_choice", **more: Any) -> dict[str, Any]:
    row = {
        "task": name, "domain": "d", "shots": 0, "metric": "acc", "chance": 0.25, "output_type": kind,
        "multiple_gold": False, "unconditional": False, "own_metrics": False, "lm_eval_metrics": ["acc"],
        "version": "1", "config_sha256": "0",
    }  # fmt: skip
    return row | more


def packed(
    asked: list[tuple[dict[str, Any], list[Doc]]], mode: str = "lm-eval", groups: tuple[dict[str, Any], ...] = ()
) -> pack.Pack:
    """A request pack of these tasks and documents, without a tokenizer."""
    rows: dict[str, list[dict[str, Any]]] = {"contexts": [], "requests": [], "documents": []}
    entries = []
    for entry, documents in asked:
        first = len(rows["requests"])
        for number, doc in enumerate(documents):
            count = len(doc.choices) * (2 if entry["unconditional"] else 1)
            rows["documents"].append({
                "task": entry["task"], "doc": number, "first_request": len(rows["requests"]), "requests": count,
                "gold": doc.gold, "choice_chars": [len(c) for c in doc.choices],
                "choice_bytes": [len(c.encode()) for c in doc.choices], "choice_tokens": doc.tokens,
                "words": doc.words, "bytes": doc.bytes, "target": "", "content": json.dumps(doc.content),
                "doc_hash": "", "prompt_hash": "", "target_hash": "",
            })  # fmt: skip
            for choice in range(count):
                rows["requests"].append({
                    "request": len(rows["requests"]), "task": entry["task"], "doc": number, "choice": choice,
                    "context": 0, "text": doc.choices[choice % len(doc.choices)], "tokens": [1],
                })  # fmt: skip
        entries.append(entry | {"documents": len(documents), "requests": len(rows["requests"]) - first})
    rows["contexts"].append({"context": 0, "text": "", "tokens": [0]})
    tables = {name: pa.Table.from_pylist(rows[name], schema=schema) for name, schema in pack.SCHEMAS.items()}
    manifest = {
        "format": pack.FORMAT, "suite": "s", "mode": mode, "hash": "", "tasks": entries, "groups": list(groups),
        "tokenizer": {"tokenizer_hash": "0"}, "bos": "auto", "prefix_token": 0, "max_context": None, "limit": None,
        "fewshot_seed": 1234, "lm_eval": "0.4.13",
    }  # fmt: skip
    made = pack.Pack(manifest, **tables)
    manifest["hash"] = pack.content_hash(made)
    return made


def answers(made: pack.Pack, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Few different log-likelihoods, so that choices tie."""
    rng, count = np.random.default_rng(seed), made.requests.num_rows
    return -rng.integers(1, 8, count) * 0.75, rng.random(count) < 0.4
