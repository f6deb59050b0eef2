"""Wide tables as rows of scores: a column per task (W&B exports, OLMo's ladder), or a column per checkpoint."""

import logging
import re
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from fineline_jax.errors import UserError
from fineline_jax.facts.metrics import METRICS
from fineline_jax.facts.tasks import task_of
from fineline_jax.trajectories.readers.checkpoint_names import identify

log = logging.getLogger(__name__)
_ENDINGS = {name: name for name in METRICS} | {
    "len_norm": "acc_norm", "bpb": "bits_per_byte", "soft": "choice_prob", "soft_log": "log_choice_prob",
    "CrossEntropyLoss": "cross_entropy", "accuracy": "acc",
}  # fmt: skip
"""How other tools end the name of a column -> metric. OLMo's `soft` is the probability of the correct choice."""
_ENDING = re.compile(
    rf"(.+?)[_/. ]({'|'.join(sorted(map(re.escape, _ENDINGS), key=len, reverse=True))})(_stderr)?(?:,none)?"
)
_RUN = re.compile(r"(.+?) - (.+)")  # "run1 - eval/downstream/arc_easy_acc", of W&B
_SHOTS = re.compile(r"_(\d+)shot(?=_|$)")
_NO_SCORE = ("train/", "optim/", "throughput/", "system/")
_IDENTIFIES = ["series", "checkpoint", "step", "tokens", "shots"]
_OPENCOMPASS = {"version", "mode"}
_MEANS = {"naive_average", "weighted_average"}


class _Score(NamedTuple):
    """What a column holds."""

    series: str | None
    task: str
    metric: str
    shots: float
    stderr: bool


def of_task_columns(frame: pd.DataFrame, source: str, stem: str) -> pd.DataFrame:
    """A row per checkpoint and a column per score -> a row per score. Columns that are no scores are left out and named
    in attrs["left_out"]. `stem` names the series where neither the table nor its headings do.

    A column that is called like a known task and names no metric is read as its accuracy, which is said.
    Raises UserError if no column is a score.
    """
    meant = {name: _meaning(str(name)) for name in frame.columns if name not in _IDENTIFIES}
    scores = {name: score for name, score in meant.items() if score is not None}
    if not any(not score.stderr for score in scores.values()):
        raise UserError(
            f"{source}: no column is a score; TASK_METRIC such as arc_easy_acc is wanted beside step or tokens, "
            "or a row per score with the columns series, tokens, task, metric, value"
        )
    plain = [str(name) for name, score in scores.items() if str(name) == score.task]
    if plain:
        log.warning("%s: columns that name no metric are read as accuracies: %s", source, ", ".join(plain))
    ignored = [name for name in map(str, set(frame) - set(scores)) if not name.endswith(("__MIN", "__MAX"))]
    ignored = sorted(set(ignored) - set(_IDENTIFIES))
    errors = {score._replace(stderr=False): name for name, score in scores.items() if score.stderr}
    parts = []
    for name, score in scores.items():
        if score.stderr:
            continue
        part = frame[[c for c in _IDENTIFIES if c in frame]].copy()
        if score.series is not None or "series" not in part:
            part["series"] = score.series or stem
        part = part.assign(task=score.task, metric=score.metric, value=frame[name])
        if score.metric == "cross_entropy":
            part["domain"] = "language modelling"
        if score.shots >= 0:
            part["shots"] = score.shots
        if score in errors:
            part["stderr"] = frame[errors[score]]
        # runs of one export need not have been evaluated at the same steps
        parts.append(part[frame[name].notna()] if score.series is not None else part)
    out = pd.concat(parts, ignore_index=True)
    out.attrs["left_out"] = ", ".join(ignored)
    return out


def of_checkpoint_columns(frame: pd.DataFrame, source: str, tokens_per_step: float | None) -> pd.DataFrame:
    """A row per task and a column per checkpoint -> a row per score; the headings must name steps or tokens.

    OpenCompass (columns dataset, version, metric, mode) gives percentages; its means over tasks are left out.
    """
    columns = [name for name in frame.columns if name not in {"task", "metric", "shots", "domain", "chance", "n"}]
    opencompass = set(columns) >= _OPENCOMPASS
    columns = [str(name) for name in columns if name not in _OPENCOMPASS]
    facts = frame.drop(columns=[*columns, *(_OPENCOMPASS & set(frame))])
    parts = []
    for name in columns:
        try:
            where = identify(Path("table"), name, "", root=Path("nowhere"), tokens_per_step=tokens_per_step)
        except UserError as error:
            reason = str(error).partition(": ")[2] if "names a step" in str(error) else (
                f"column {name!r} names no checkpoint; headings such as NAME-step1000-tokens2B are wanted, or a row "
                f"per score with the columns series, tokens, task, metric, value (found: {', '.join(columns[:8])})"
            )  # fmt: skip
            raise UserError(f"{source}: {reason}") from error
        values = pd.to_numeric(frame[name].replace("-", None), errors="coerce")
        parts.append(facts.assign(**where._asdict(), value=values))
    if not parts:
        raise UserError(f"{source}: has no column of scores beside its tasks; add one per checkpoint")
    out = pd.concat(parts, ignore_index=True)
    if "metric" not in out:
        out["metric"] = "acc"
        log.warning("%s: names no metric; its values are read as accuracies", source)
    if opencompass:
        out = out[out["value"].notna() & ~out["metric"].isin(_MEANS)]
        out = out.assign(value=out["value"] / 100, metric=out["metric"].replace({"accuracy": "acc"}))
        log.warning("%s: percentages of OpenCompass are divided by 100", source)
    return out


def _meaning(name: str) -> _Score | None:
    """What a column holds by its heading; None: no score."""
    run = _RUN.fullmatch(name)
    series, path = (run[1], run[2]) if run else (None, name)
    if path.startswith(_NO_SCORE):
        return None
    own = re.sub(r"^eval/(?:downstream\w*/)?", "", path)
    found = _ENDING.fullmatch(own)
    if found is None and task_of(own).domain == "other":
        return None
    task, metric = (found[1], _ENDINGS[found[2]]) if found else (own, "acc")
    shots = _SHOTS.search(task)
    task = _SHOTS.sub("", task)
    return _Score(series, task, metric, float(shots[1]) if shots else -1.0, bool(found and found[3]))
