"""One result file of lighteval or of the old Open LLM Leaderboard as rows of scores.

Tasks are called "leaderboard|arc:challenge|25" or "harness|hendrycksTest-anatomy|5": suite, task, shots.
"""

import math
from pathlib import Path
from typing import Any

from fineline_jax.errors import UserError
from fineline_jax.trajectories.readers.checkpoint_names import identify
from fineline_jax.trajectories.readers.json_scores import scores_of


def rows(file: Path, content: dict[str, Any], root: Path, tokens_per_step: float | None) -> list[dict[str, Any]]:
    """Every score of the file but the means over tasks ("all", "_average"); raises UserError naming the file."""
    general = content["config_general"]
    config = general.get("model_config") if isinstance(general, dict) else None
    config = config if isinstance(config, dict) else {}
    name = str(config.get("model_name") or (general.get("model_name") if isinstance(general, dict) else "") or "")
    revision = str(config.get("revision") or "")
    identity = identify(file, name, revision, root=root, tokens_per_step=tokens_per_step)._asdict()
    limit = general.get("max_samples") if isinstance(general, dict) else None
    out = []
    for title, scores in content["results"].items():
        if not isinstance(scores, dict):
            raise UserError(f"{file}: 'results.{title}' is no table; evaluate again or remove the file")
        rest = title.partition("|")[2]
        if not rest or "_average" in rest:
            continue
        task, _, shots = rest.partition("|")
        count = shots.partition("|")[0]
        for score in scores_of(scores):
            out.append({
                **identity, "task": task, **score, "n": math.nan,
                "shots": int(count) if count.isdecimal() else math.nan,
                "limit": limit if isinstance(limit, int) else math.nan,
            })  # fmt: skip
    return out
