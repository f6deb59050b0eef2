"""Files and trees of JSON results (lm-eval, lighteval, the old leaderboard, OLMES) as one table."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fineline_jax.errors import UserError, reading
from fineline_jax.facts.tasks import chance_of
from fineline_jax.trajectories.readers.result_layouts import lighteval_rows, lm_eval_rows, olmes_rows

log = logging.getLogger(__name__)
_DATE = re.compile(r"\d{4}-\d\d-\d\dT[\d.:-]+")
_SCORE = ["series", "checkpoint", "shots", "limit", "task", "metric"]


def json_files(folder: Path) -> list[Path]:
    """The result files below a folder: those that are called so, or else all JSON files."""
    named = [*files_below(folder, "results_*.json"), *files_below(folder, "metrics.json")]
    return sorted(named) or files_below(folder, "*.json")


def files_below(folder: Path, pattern: str) -> list[Path]:
    """Hidden files and folders, such as a killed command leaves, hold no results."""
    found = folder.rglob(pattern)
    return sorted(path for path in found if not any(part[0] == "." for part in path.relative_to(folder).parts))


def read_json(path: Path, *, tokens_per_step: float | None = None) -> pd.DataFrame:
    """The result file `path`, or all of those below it, as a table (series, checkpoint, step, tokens, task, metric, …).

    Group rows ("mmlu" over its subjects) are left out where their members are present. A score evaluated twice with the
    same value is kept once; of different values that of the newest file counts, where all have dates, which is said. A
    value that is no finite number is left out, and other JSON files of a folder, which is said too.
    Raises UserError if no file is found, a file is damaged, or tokens cannot be told.
    """
    files = [path] if path.is_file() else json_files(path)
    root = path.parent if path.is_file() else path
    rows, others = [], []
    for file in files:
        content = _content(file)
        if (reader := _reader(content)) is None:
            others.append(file)
            continue
        named = _DATE.search(file.name)
        when = named[0] if named else content.get("date")
        with reading(file, "evaluate again or remove it", "damaged"):
            own = reader(file, content, root, tokens_per_step)
        rows += [row | {"file": str(file), "date": when} for row in own]
    if others and not rows:
        raise UserError(
            f"{others[0]}: has no table 'results' by task; only results of lm-eval, lighteval and OLMES can be read"
        )
    if others:
        log.warning("%s: left out, no result files: %s", path, ", ".join(str(file) for file in others))
    if not rows:
        raise UserError(f"{path}: the result files hold no scores; is this the output folder of lm-eval?")
    frame = pd.DataFrame(rows)
    if "chance_from" in frame:  # of some files; of the others it is what is known of the task
        given = frame["chance_from"].notna()
        known = [chance_of(task, metric) for task, metric in zip(frame["task"], frame["metric"], strict=True)]
        frame["chance"] = frame["chance"].where(given, pd.Series(known, index=frame.index))
    for name, what in (("shots", "the number of shots is not given"), ("limit", "only a part of the documents")):
        marked = frame["file"][frame[name].isna() == (name == "shots")].unique()
        if len(marked):
            log.warning("%s: %s, in %d of %d files, first %s", path, what, len(marked), len(files), marked[0])
    empty = frame["value"].isna()
    for file, part in frame[empty].groupby("file", sort=False):
        names = ", ".join(dict.fromkeys(part["task"] + " " + part["metric"]))
        log.warning("%s: left out, no finite number: %s", file, names)
    return _newest(frame[~empty]).drop(columns=["file", "date"])


def _content(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: not a readable JSON file ({error}); evaluate again or remove it") from error


def _reader(content: Any) -> Any:
    """The function that reads this layout; None: it is none of them."""
    if not isinstance(content, dict):
        return None
    if isinstance(content.get("results"), dict):
        return lighteval_rows if "config_general" in content else lm_eval_rows
    return olmes_rows if isinstance(content.get("tasks"), list) else None


def _newest(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per score."""
    frame = frame.drop_duplicates([*_SCORE, "value", "stderr", "n"])
    again = frame.duplicated(_SCORE, keep=False)
    if not again.any():
        return frame
    twice = frame[again]
    first = twice[twice.groupby(_SCORE, dropna=False, sort=False).ngroup() == 0]
    if twice["date"].isna().any() or twice["date"].map(type).nunique() > 1:
        row = first.iloc[0]
        raise UserError(
            f"{' and '.join(first['file'])}: ({row['series']}, {row['checkpoint']}, {row['task']}, {row['metric']}) "
            "occurs twice with different values, and not all files have a date; remove one"
        )
    newest = twice.sort_values("date", kind="stable").drop_duplicates(_SCORE, keep="last")
    older = sorted(set(twice["file"]) - set(newest["file"]))
    log.warning("scores evaluated again: %s count, not %s", ", ".join(sorted(set(newest["file"]))), ", ".join(older))
    keep = np.array(~again) | frame.index.isin(newest.index)
    return frame[keep]
