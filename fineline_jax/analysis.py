"""From score folders and tables to a report: where scoring's numbers meet trajectories' statistics."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fineline_jax.errors import UserError
from fineline_jax.trajectories.readers.options import ReadOptions

if TYPE_CHECKING:
    import pandas

    from fineline_jax.scoring.requests.pack import Pack

log = logging.getLogger(__name__)


def analyze_scores(
    scores: Sequence[Path],
    out: Path,
    *,
    runs: Sequence[Path] = (),
    title: str,
    reading: ReadOptions = ReadOptions(),
    figure_style: str = "screen",
) -> Path:
    """Write the report of score folders, result trees of other tools and tables; returns report.html.

    runs: run folders whose loss is drawn beside. reading: what the inputs do not say themselves. figure_style: see
    `report.style.figure_style`.
    A scored checkpoint whose tokens stay unknown is no point of a curve: it is left out, with a warning.
    Raises UserError naming what cannot be read, or a folder of which nothing is left.
    """
    from fineline_jax.scoring.requests import pack as packs
    from fineline_jax.trajectories.report.html_page import write_report
    from fineline_jax.trajectories.report.style import figure_style as style_of
    from fineline_jax.trajectories.table import join, labelled, read_parts

    if not scores:
        raise UserError("analyze: name at least one folder of scores or table")
    if any(path.resolve() == out.resolve() for path in scores):
        raise UserError(f"--out {out}: is one of the inputs; give another folder for the report")
    style = style_of(figure_style)
    parts, facts = [], dict[str, Any]()
    for path in scores:
        if (path / "pack" / "manifest.json").is_file():
            pack = packs.load(path / "pack")
            manifest = pack.manifest
            parts += labelled([(str(path), _own_scores(path, pack, reading.tokens_per_step))], path, reading)
            alone = sum(other.name == path.name for other in scores) == 1
            facts[f"scores {path.name if alone else path}"] = {
                "suite": manifest["suite"],
                "pack": manifest["hash"][:12],
                "BOS": manifest["bos"],
                "lm-eval": manifest["lm_eval"],
            }
        else:
            parts += read_parts(path, reading)
    losses = _losses(runs) if runs else None
    return write_report(join(parts, reading), out, title=title, facts=facts, losses=losses, figure_style=style)


def _own_scores(folder: Path, pack: "Pack", tokens_per_step: float | None) -> "pandas.DataFrame":
    """The table of a folder of scores: guessing as it does on the pack's documents, and a bootstrap over them."""
    from fineline_jax.scoring import score_files
    from fineline_jax.scoring.metrics import guessing, resampled, tidy

    table = _with_known_tokens(tidy.tidy(folder), folder, tokens_per_step)
    # A group stands for its members (MMLU for its 57 subjects); both would count twice in a domain.
    members = {task for group in pack.manifest["groups"] for task in group["tasks"]}
    shots = {task["task"]: task["shots"] for task in pack.tasks}
    table = table[~table.task.isin(members)].assign(limit=pack.manifest["limit"])
    table = table.assign(shots=table.task.map(shots), chance_from="")
    for task, guess in guessing.guesses(pack).items():
        guessed = (table.task == task) & table.metric.str.startswith("acc")
        table.loc[guessed, ["chance", "chance_from"]] = [guess.level, guess.chooser]
    files, _ = score_files.usable_files(folder)
    drawn = resampled.deviations(pack, [score_files.read(file) for file in files])
    return table.merge(drawn, on=["series", "checkpoint", "task", "metric"], how="left", validate="one_to_one")


def _with_known_tokens(table: "pandas.DataFrame", folder: Path, tokens_per_step: float | None) -> "pandas.DataFrame":
    if tokens_per_step is not None:
        of_steps = (table["step"].astype("Float64") * tokens_per_step).round().astype("Int64")
        table = table.assign(tokens=table["tokens"].fillna(of_steps))
    unknown = table["tokens"].isna()
    if unknown.any():
        remedy = "" if table["step"][unknown].isna().all() else "give --tokens-per-step, or "
        if unknown.all():
            raise UserError(
                f"{folder}: no checkpoint has a known number of training tokens, so there is no curve; {remedy}write "
                f"their metrics with `fineline export-scores {folder} --out FOLDER`"
            )
        names = ", ".join(dict.fromkeys(table["series"][unknown] + " " + table["checkpoint"][unknown]))
        hint = "; --tokens-per-step gives them" if remedy else ""
        log.warning("%s: left out, the number of training tokens is not known%s: %s", folder, hint, names)
    return table[~unknown]


def _losses(runs: Sequence[Path]) -> "pandas.DataFrame":
    """The logs of the runs, each under the name of its series; of two runs of one name, under their paths."""
    import pandas

    from fineline_jax.checkpoints.open import open_series

    logs = [_log(run) for run in runs]
    names = [open_series(str(run)).name for run in runs]
    labels = [name if names.count(name) == 1 else str(run) for run, name in zip(runs, names)]
    return pandas.concat([one.assign(series=label) for one, label in zip(logs, labels)])


def _log(run: Path) -> "pandas.DataFrame":
    import pandas

    from fineline_jax.training.metrics import read_metrics

    lines = read_metrics(run)
    if not lines:
        raise UserError(f"{run / 'metrics.jsonl'}: not there; give the folder of a run")
    frame = pandas.DataFrame(lines)
    if "loss" not in frame:
        raise UserError(f"{run / 'metrics.jsonl'}: holds no loss yet; analyze the run when it has trained")
    return frame
