"""One JSON result file of lm-eval, lighteval or OLMES as rows of scores: a function per layout.

lm-eval >= 0.4: `<folder>/<model>/results_<date>.json`, metric keys "acc,none" and "acc_stderr,none", sample counts
under "n-samples". lm-eval 0.3 (the Pythia evaluations): any `*.json`, metric keys "acc" and "acc_stderr", nothing about
sample counts. lighteval and the old Open LLM Leaderboard: tasks are called "leaderboard|arc:challenge|25" or
"harness|hendrycksTest-anatomy|5": suite, task, shots. OLMES (allenai/olmes): `metrics.json`. A file is one checkpoint.
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fineline_jax.errors import UserError
from fineline_jax.facts.metrics import has_chance
from fineline_jax.trajectories.readers.checkpoint_names import Identity, identify, step_of

_NOT_METRICS = {"alias", "samples", "name", "sample_len", "sample_count", "primary_score"}
_MISSING = {"n/a", "nan", "inf", "-inf", "infinity", "-infinity"}
_OLMES_NAMES = {"bits_per_byte_corr": "bits_per_byte"}
_MMLU_PARTS = {"mmlu_stem", "mmlu_humanities", "mmlu_social_sciences", "mmlu_other"}
_GROUPS = {"mmlu", "cmmlu", "agieval", "bbh", "blimp", "ceval-valid", *_MMLU_PARTS}
"""Groups whose members begin with their names (those of MMLU's parts: with "mmlu_")."""


def lm_eval_rows(
    file: Path, content: dict[str, Any], root: Path, tokens_per_step: float | None
) -> list[dict[str, Any]]:
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
        for score in _scores_of(scores):
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


def lighteval_rows(
    file: Path, content: dict[str, Any], root: Path, tokens_per_step: float | None
) -> list[dict[str, Any]]:
    """Every score of the file but the means over tasks ("all", "_average"); raises UserError naming the file."""
    general = content["config_general"] if isinstance(content["config_general"], dict) else {}
    config = general.get("model_config")
    config = config if isinstance(config, dict) else {}
    name, revision = str(config.get("model_name") or general.get("model_name") or ""), str(config.get("revision") or "")
    identity = identify(file, name, revision, root=root, tokens_per_step=tokens_per_step)._asdict()
    limit = general.get("max_samples")
    out = []
    for title, scores in content["results"].items():
        if not isinstance(scores, dict):
            raise UserError(f"{file}: 'results.{title}' is no table; evaluate again or remove the file")
        rest = title.partition("|")[2]
        if not rest or "_average" in rest:
            continue
        task, _, shots = rest.partition("|")
        count = shots.partition("|")[0]
        for score in _scores_of(scores):
            out.append({
                **identity, "task": task, **score, "n": math.nan,
                "shots": int(count) if count.isdecimal() else math.nan,
                "limit": limit if isinstance(limit, int) else math.nan,
            })  # fmt: skip
    return out


def olmes_rows(file: Path, content: dict[str, Any], root: Path, tokens_per_step: float | None) -> list[dict[str, Any]]:
    """Every score of the file; the primary one is a copy of another and left out. Raises UserError naming the file."""
    model = content.get("model_config") or {}
    if not isinstance(model, dict):
        raise UserError(f"{file}: 'model_config' is no table; evaluate again or remove the file")
    name, revision = str(model.get("model") or ""), str(model.get("revision") or "")
    identity = identify(file, name, revision, root=root, tokens_per_step=tokens_per_step)._asdict()
    out = []
    for task in content["tasks"]:
        scores = task.get("metrics") if isinstance(task, dict) else None
        if not isinstance(scores, dict):
            raise UserError(f"{file}: an entry of 'tasks' has no table 'metrics'; evaluate again or remove the file")
        config: dict[str, Any] = task.get("task_config") or {}
        title = task.get("alias") or task.get("task_name") or config.get("task_name")
        if not isinstance(title, str):
            raise UserError(f"{file}: an entry of 'tasks' has no name; evaluate again or remove the file")
        only_primary = not set(scores) - {"primary_score"}
        found = _scores_of({"score": scores.get("primary_score")} if only_primary else scores)
        for score in found:
            out.append({
                **identity, "task": title, **score, "metric": _OLMES_NAMES.get(score["metric"], score["metric"]),
                "n": float(task.get("num_instances") or "nan"),
                "shots": config["num_shots"] if isinstance(config.get("num_shots"), int) else math.nan,
                "limit": config["limit"] if isinstance(config.get("limit"), (int, float)) else math.nan,
            })  # fmt: skip
    return out


def _scores_of(scores: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A row (metric, value, stderr, stderr_missing) per metric; its value is NaN where the file has no finite one.

    stderr_missing: the file says that there is no standard error ("N/A"), which is more than not to speak of one.
    """
    for key, value in scores.items():
        metric, _, chosen = key.partition(",")
        if metric in _NOT_METRICS or metric.endswith("_stderr") or isinstance(value, bool):
            continue
        if isinstance(value, str) and value.lower() in _MISSING:
            value = math.nan
        if not isinstance(value, (int, float)):
            continue
        stderr = scores.get(f"{metric}_stderr,{chosen}" if chosen else f"{metric}_stderr")
        number = float(stderr) if isinstance(stderr, (int, float)) and math.isfinite(stderr) else math.nan
        yield {
            # the filter names the answer extraction; "none" is the plain metric
            "metric": metric if chosen in ("", "none") else f"{metric} ({chosen})",
            "value": float(value) if math.isfinite(value) else math.nan,
            "stderr": number,
            "stderr_missing": stderr is not None and math.isnan(number),
        }
