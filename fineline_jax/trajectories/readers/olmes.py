"""One `metrics.json` of OLMES (allenai/olmes) as rows of scores."""

import math
from pathlib import Path
from typing import Any

from fineline_jax.errors import UserError
from fineline_jax.trajectories.readers.checkpoint_names import identify
from fineline_jax.trajectories.readers.json_scores import scores_of

_NAMES = {"bits_per_byte_corr": "bits_per_byte"}


def rows(file: Path, content: dict[str, Any], root: Path, tokens_per_step: float | None) -> list[dict[str, Any]]:
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
        found = scores_of({"score": scores.get("primary_score")} if only_primary else scores)
        for score in found:
            out.append({
                **identity, "task": title, **score, "metric": _NAMES.get(score["metric"], score["metric"]),
                "n": float(task.get("num_instances") or "nan"),
                "shots": config["num_shots"] if isinstance(config.get("num_shots"), int) else math.nan,
                "limit": config["limit"] if isinstance(config.get("limit"), (int, float)) else math.nan,
            })  # fmt: skip
    return out
