"""Trees of lm-eval result files, old and new layout, as rows of the tidy table.

New (lm-eval >= 0.4): `<folder>/<model>/results_<date>.json`, metric keys "acc,none" and "acc_stderr,none", sample
counts under "n-samples". Old (0.3, the Pythia evaluations): any `*.json`, metric keys "acc" and "acc_stderr", nothing
about sample counts. A file is one checkpoint; which one is read from the revision or the name of the model.
"""

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd

from fineline_jax.errors import UserError

_STEP = re.compile(r"(?:^|[^a-z])(?:step|global_step|ckpt|checkpoint)[-_]?(\d+)", re.IGNORECASE)
_NUMBER = r"(\d+(?:\.\d+)?)\s*([KMBT])"
# "tokens4B", or "4B-tokens", "4Btok", "4Bt" as a word of its own: 1MtokBS is no amount of training but a batch size
_TOKENS = re.compile(rf"tokens?[-_]?{_NUMBER}|{_NUMBER}[-_]?t(?:ok(?:ens?)?)?(?![a-z])", re.IGNORECASE)
_UNIT = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
_PYTHIA_BATCH = 1024 * 2048  # tokens per step of every Pythia v1 model (EleutherAI/pythia README)
_PYTHIA_ABLATION = re.compile(r"-(\d+(?:\.\d+)?)MtokBS", re.IGNORECASE)  # batch-size ablations name theirs
_NOT_METRICS = {"alias", "samples", "name", "sample_len", "sample_count"}


def read_results_tree(path: Path, *, tokens_per_step: float | None = None) -> pd.DataFrame:
    """All lm-eval result files at or below `path` as one table (series, checkpoint, step, tokens, task, metric, …).

    Group rows ("mmlu" over its subjects) are left out where their members are present. A score evaluated twice with the
    same value is kept once. Raises UserError if no file is found, a file is damaged, or tokens cannot be told.
    """
    files = [path] if path.is_file() else sorted(path.rglob("results_*.json")) or sorted(path.rglob("*.json"))
    if not files:
        raise UserError(f"{path}: no tidy.csv, tidy.parquet or lm-eval result file (results_*.json) in this folder")
    rows = [row for file in files for row in _rows(file, tokens_per_step)]
    if not rows:
        raise UserError(f"{path}: the result files hold no scores; is this the output folder of lm-eval?")
    frame = pd.DataFrame(rows)
    if frame["shots"].isna().any() or frame.groupby("task")["shots"].nunique().max() < 2:
        frame = frame.drop(columns="shots")
    else:
        frame["shots"] = frame["shots"].astype(int)
    return frame.drop_duplicates()


def _rows(file: Path, tokens_per_step: float | None) -> list[dict[str, Any]]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: not a readable JSON file ({error}); evaluate again or remove it") from error
    results = content.get("results") if isinstance(content, dict) else None
    if not isinstance(results, dict):
        raise UserError(f"{file}: has no table 'results' by task; only lm-eval result files can be read")
    tables = {name: content.get(name) or {} for name in ("config", "group_subtasks", "n-samples", "n-shot")}
    tables |= {f"results.{task}": scores for task, scores in results.items()}
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise UserError(f"{file}: {name!r} is no table; evaluate again or remove the file")
    series, checkpoint, step, tokens = _identity(file, content, tokens_per_step)
    members = tables["group_subtasks"]
    rows = []
    for task, scores in results.items():
        if any(member in results for member in members.get(task, [])):
            continue
        counts = (content.get("n-samples") or {}).get(task) or {}
        for key, value in scores.items():
            metric, _, which = key.partition(",")
            if (
                metric in _NOT_METRICS
                or metric.endswith("_stderr")
                or isinstance(value, bool)
                or not isinstance(value, (int, float))
            ):
                continue
            stderr = scores.get(f"{metric}_stderr,{which}" if which else f"{metric}_stderr")
            rows.append({
                "series": series, "checkpoint": checkpoint, "step": step, "tokens": tokens, "task": task,
                # the filter names the answer extraction; "none" is the plain metric
                "metric": metric if which in ("", "none") else f"{metric} ({which})",
                "value": float(value),
                "stderr": float(stderr) if isinstance(stderr, (int, float)) else float("nan"),
                "n": float(counts.get("effective", "nan")),
                "shots": _shots(content, task),
            })  # fmt: skip
    return rows


def _identity(file: Path, content: dict[str, Any], tokens_per_step: float | None) -> tuple[str, str, float, float]:
    """(series, checkpoint, step, tokens) of a result file, from lm-eval's model_args."""
    config = content.get("config") or {}
    arguments = config.get("model_args") or {}
    if isinstance(arguments, str):
        arguments = dict(part.split("=", 1) for part in arguments.split(",") if "=" in part)
    if not isinstance(arguments, dict):
        raise UserError(f"{file}: 'config.model_args' is neither text nor a table; evaluate again or remove the file")
    name = str(arguments.get("pretrained") or content.get("model_name") or config.get("model") or file.parent.name)
    revision = str(arguments.get("revision") or "")
    if "tokens" in arguments:  # by `fineline export-scores`: pretrained=SERIES/CHECKPOINT, revision=CHECKPOINT
        step_found = _STEP.search(revision)
        series = name.removesuffix(f"/{revision}").rsplit("/", 1)[-1]
        return series, revision, float(step_found.group(1)) if step_found else float("nan"), float(arguments["tokens"])
    place = revision if _STEP.search(revision) or _TOKENS.search(revision) else name.rstrip("/").rsplit("/", 1)[-1]
    if not (_STEP.search(place) or _TOKENS.search(place)):
        place = file.stem
    step_found, tokens_found = _STEP.search(place), _TOKENS.search(place)
    step = float(step_found.group(1)) if step_found else float("nan")
    per_step = tokens_per_step or _tokens_per_step(name)
    if tokens_found:
        number, unit = tokens_found.group(1) or tokens_found.group(3), tokens_found.group(2) or tokens_found.group(4)
        tokens = float(number) * _UNIT[unit.upper()]
    elif step_found and (per_step or step == 0):
        tokens = step * (per_step or 0.0)
    elif step_found:
        raise UserError(
            f"{file}: {place!r} names a step but no tokens; give the tokens of a step with --tokens-per-step"
        )
    else:
        raise UserError(
            f"{file}: neither revision, model nor file name says which checkpoint this is "
            "(expected step<N> or tokens<N>B in one of them); rename the file"
        )
    series = name.rstrip("/").rsplit("/", 1)[-1]
    if place == series:  # one repository or folder per checkpoint: what is left of the name is the series
        parent = name.rstrip("/").rsplit("/", 1)[0] if "/" in name else ""
        bare = _TOKENS.sub("", _STEP.sub("", series)).strip("-_. ")
        series = bare or parent.rsplit("/", 1)[-1] or file.parent.name
    return series, place, step, tokens


def _tokens_per_step(model: str) -> float | None:
    if "pythia" not in model.lower():
        return None
    ablation = _PYTHIA_ABLATION.search(model)
    return 2**20 * float(ablation.group(1)) if ablation else _PYTHIA_BATCH


def _shots(content: dict[str, Any], task: str) -> int | None:
    shots = (content.get("n-shot") or {}).get(task, (content.get("config") or {}).get("num_fewshot"))
    return shots if isinstance(shots, int) else None
