"""One result file of lm-eval, old or new layout, as rows of scores.

New (lm-eval >= 0.4): `<folder>/<model>/results_<date>.json`, metric keys "acc,none" and "acc_stderr,none", sample
counts under "n-samples". Old (0.3, the Pythia evaluations): any `*.json`, metric keys "acc" and "acc_stderr", nothing
about sample counts. A file is one checkpoint.
"""

import math
import re
from pathlib import Path
from typing import Any

from fineline_jax.errors import UserError
from fineline_jax.facts.metrics import has_chance
from fineline_jax.trajectories.readers.checkpoint_names import Identity, identify, step_of
from fineline_jax.trajectories.readers.json_scores import scores_of

_MMLU_PARTS = {"mmlu_stem", "mmlu_humanities", "mmlu_social_sciences", "mmlu_other"}
_GROUPS = {"mmlu", "cmmlu", "agieval", "bbh", "blimp", "ceval-valid", *_MMLU_PARTS}
"""Groups whose members begin with their names (those of MMLU's parts: with "mmlu_")."""


def rows(file: Path, content: dict[str, Any], root: Path, tokens_per_step: float | None) -> list[dict[str, Any]]:
    """Every score of the file but those of groups beside their members; raises UserError naming the file."""
    results = content["results"]
    tables = {name: content.get(name) or {} for name in ("config", "group_subtasks", "n-samples", "n-shot")}
    tables |= {f"results.{task}": scores for task, scores in results.items()}
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise UserError(f"{file}: {name!r} is no table; evaluate again or remove the file")
    identity = _identity(file, content, root, tokens_per_step)._asdict()
    groups = _groups(results, tables["group_subtasks"])
    limit = tables["config"].get("limit")
    facts = tables["config"].get("fineline") or {}
    out = []
    for task, scores in results.items():
        if task in groups:
            continue
        counts = tables["n-samples"].get(task) or {}
        shots = tables["n-shot"].get(task, tables["config"].get("num_fewshot"))
        for score in scores_of(scores):
            out.append({
                **identity, "task": task, **score, "n": float(counts.get("effective", "nan")),
                "shots": shots if isinstance(shots, int) else math.nan,
                "limit": limit if isinstance(limit, (int, float)) else math.nan,
                **_exported(facts.get(task), score["metric"]),
            })  # fmt: skip
    return out


def _exported(fact: Any, metric: str) -> dict[str, Any]:
    """What `fineline export-scores` says of a task beside lm-eval's results: domain, and what guessing gets."""
    if not isinstance(fact, dict) or not {"domain", "chance", "metric", "chance_from"} <= fact.keys():
        return {}
    chance = fact["chance"] if has_chance(metric) or metric == fact["metric"] else None
    return {
        "domain": str(fact["domain"]),
        "chance": math.nan if chance is None else float(chance),
        "chance_from": str(fact["chance_from"]),
    }


def _groups(results: dict[str, Any], subtasks: dict[str, list[str]]) -> set[str]:
    """Tasks of `results` that stand for others in it: told by the file, or by indented titles and names."""
    found = set()
    depth = {task: _depth(scores.get("alias")) for task, scores in results.items()}
    for task in results:
        pending, members = [task], set[str]()
        while pending:
            new = set(subtasks.get(pending.pop()) or ()) - members
            members |= new
            pending += new
        named = [other for other in results if other.startswith(f"{task}_") and depth[other] > depth[task]]
        if task in _GROUPS:
            prefix = "mmlu_" if task in _MMLU_PARTS else f"{task}_"
            named += [other for other in results if other.startswith(prefix) and other not in _MMLU_PARTS]
        if members & set(results) - {task} or named:
            found.add(task)
    return found


def _depth(title: Any) -> int:
    """lm-eval indents the titles of a group's members: " - stem", "  - anatomy"."""
    indent = re.match(r"( *)- ", title) if isinstance(title, str) else None
    return 0 if indent is None else 1 + len(indent[1])


def _identity(file: Path, content: dict[str, Any], root: Path, tokens_per_step: float | None) -> Identity:
    """From lm-eval's model_args."""
    config = content.get("config") or {}
    arguments = config.get("model_args") or {}
    if isinstance(arguments, str):
        arguments = dict(part.split("=", 1) for part in arguments.split(",") if "=" in part)
    if not isinstance(arguments, dict):
        raise UserError(f"{file}: 'config.model_args' is neither text nor a table; evaluate again or remove the file")
    name = str(arguments.get("pretrained") or content.get("model_name") or config.get("model") or "")
    revision = str(arguments.get("revision") or "")
    if "tokens" in arguments:  # by `fineline export-scores`: pretrained=SERIES/CHECKPOINT, revision=CHECKPOINT
        series = name.removesuffix(f"/{revision}").rsplit("/", 1)[-1]
        return Identity(series, revision, step_of(revision), float(arguments["tokens"]))
    return identify(file, name, revision, root=root, tokens_per_step=tokens_per_step)
