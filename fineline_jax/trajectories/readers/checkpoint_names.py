"""Which checkpoint of which series a result file is about: from revision, path of the model, file and folder names."""

import logging
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fineline_jax.errors import UserError

log = logging.getLogger(__name__)
_STEP = re.compile(r"(?:^|[^a-z])(?:step|global_step|ckpt|checkpoint|iter|iteration|ep\d+-ba)[-_]?(\d+)", re.IGNORECASE)
_NUMBER = r"(\d+(?:\.\d+)?)\s*([KMBT])"
# "tokens4B", or "4B-tokens", "4Btok", "4Bt" as a word of its own: 1MtokBS is no amount of training but a batch size
_TOKENS = re.compile(rf"tokens?[-_]?{_NUMBER}|{_NUMBER}[-_]?t(?:ok(?:ens?)?)?(?![a-z])", re.IGNORECASE)
_UNIT = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
_STAGE = re.compile(r"(?:^|[^a-z])stage([2-9])(?:-ingredient(\d+))?", re.IGNORECASE)
_PYTHIA_BATCH = 1024 * 2048  # tokens per step of every Pythia v1 model (EleutherAI/pythia README)
_PYTHIA_ABLATION = re.compile(r"-(\d+(?:\.\d+)?)MtokBS", re.IGNORECASE)  # batch-size ablations name theirs
_LEAVES = {"hf", "model", "weights", "safetensors", "huggingface"}  # folders inside one that is named
_INSIDE_A_CHECKPOINT = 2  # folders below the one that is named after the step: step_3000/hf, step_3000/hf/model


class Identity(NamedTuple):
    """A checkpoint."""

    series: str
    checkpoint: str
    step: float
    """NaN if unknown."""
    tokens: float


def identify(file: Path, model: str, revision: str, *, root: Path, tokens_per_step: float | None = None) -> Identity:
    """The checkpoint of a result file below `root`.

    model: name or path of the model as the file gives it, may be empty. The first of these that names a step or an
    amount of tokens says it: revision, the last folders of the model's path, the file's name, its folders below `root`.
    A later stage of training is a series of its own; its tokens count from the start of stage 1 where the series is
    registered (configs/series), else from its own start, which is said in the log.
    tokens_per_step: NaN where no tokens are needed. Raises UserError naming the file.
    """
    series, name = next(_candidates(file, model, revision, root), (None, ""))
    if series is None and tokens_per_step is not None and math.isnan(tokens_per_step):
        series, name = (model.rstrip("/") or str(file.absolute().parent)).rsplit("/", 1)[-1], revision or "main"
    if series is None:
        raise UserError(
            f"{file}: neither revision, model nor file name says which checkpoint this is "
            "(expected step<N> or tokens<N>B in one of them); rename the file"
        )
    step = step_of(name)
    tokens = _tokens_of(name)
    per_step = tokens_per_step or _tokens_per_step(model)
    if tokens is None and ((math.isfinite(step) and (per_step or step == 0)) or math.isnan(per_step or 0.0)):
        tokens = step * (per_step or 0.0)
    if tokens is None and (tokens := _registered(series, name)) is None:
        raise UserError(
            f"{file}: {name!r} names a step but no tokens; give the tokens of a step with --tokens-per-step"
        )
    if stage := _STAGE.search(name):
        if (whole := _registered(series, name)) is None:
            log.warning("%s: where stage %s of %s starts is not known; its own tokens count", file, stage[1], series)
        tokens = tokens if whole is None else whole
        series += f" (stage {stage[1]}{', ingredient ' + stage[2] if stage[2] else ''})"
    return Identity(series, name, step, tokens)


def _registered(series: str, name: str) -> float | None:
    """Tokens of the checkpoint by the rules of the released series, None where it is of none."""
    from fineline_jax.checkpoints.registry.entries import placed

    found = placed(series, name)
    return None if found is None or found[1].tokens is None else float(found[1].tokens)


def step_of(name: str) -> float:
    """The step in a name, NaN if there is none."""
    found = _STEP.search(name)
    return float(found[1]) if found else float(name) if name.isdecimal() else math.nan


def _candidates(file: Path, model: str, revision: str, root: Path) -> Iterator[tuple[str, str]]:
    """(series, name of the checkpoint) of everything that names one, the most reliable first."""
    parts = [part for part in model.split("/") if part] or list(file.absolute().parent.parts[-2:])
    named = [part for part in parts if part.lower() not in _LEAVES and part != revision] or parts
    if _names_a_checkpoint(revision):
        yield named[-1], revision
    if (own := _last_that_names_one(parts)) is not None:
        yield own[0] or file.parent.name, own[1]
    folders = file.parent.relative_to(root).parts if file.is_relative_to(root) else ()
    for name in (file.stem, *reversed((*root.parts[-1:], *folders))):
        if _names_a_checkpoint(name):
            yield named[-1], name


def _names_a_checkpoint(name: str) -> bool:
    return bool(_STEP.search(name) or _TOKENS.search(name))


def _last_that_names_one(parts: list[str]) -> tuple[str, str] | None:
    """(series, checkpoint) of the last part of a path that names a checkpoint: /ckpts/run1/step_3000/hf, m/3000."""
    for i in reversed(range(max(0, len(parts) - 1 - _INSIDE_A_CHECKPOINT), len(parts))):
        number = i > 0 and parts[i].isdecimal() and _LEAVES.issuperset(map(str.lower, parts[i + 1 :]))
        if number or _names_a_checkpoint(parts[i]):
            # one repository or folder per checkpoint: what is left of the name is the series
            bare = "" if number else _TOKENS.sub("", _STEP.sub("", parts[i])).strip("-_. ")
            return bare or ("" if i == 0 else parts[i - 1]), parts[i]
    return None


def _tokens_of(name: str) -> float | None:
    found = _TOKENS.search(name)
    return None if found is None else float(found[1] or found[3]) * _UNIT[(found[2] or found[4]).upper()]


def _tokens_per_step(model: str) -> float | None:
    if "pythia" not in model.lower():
        return None
    ablation = _PYTHIA_ABLATION.search(model)
    return 2**20 * float(ablation.group(1)) if ablation else _PYTHIA_BATCH
