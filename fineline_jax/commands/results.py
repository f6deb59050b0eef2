"""What is made of scores: `fineline analyze`, and lm-eval's files by `fineline export-scores`."""

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from fineline_jax import interface
from fineline_jax.errors import UserError
from fineline_jax.folder_lock import writing
from fineline_jax.text_table import amount, counted


def analyze(
    scores: Annotated[Positional[tuple[Path, ...]], arg(metavar="SCORES …", help_behavior_hint="(at least one)")],
    out: Path,
    runs: tuple[Path, ...] = (),
    title: str = "Learning trajectories",
    tokens_per_step: float | None = None,
    percent: bool = False,
    label: tuple[str, ...] = (),
    tasks_table: Path | None = None,
    until: str | None = None,
    to_score: tuple[str, ...] = (),
    figure_style: str = "screen",
) -> None:
    """Tables, statistics and curves of scores: report.html, findings.json, figures.

    Args:
        scores: Folders of `fineline score`, result trees of lm-eval and other tools, or tables.
        out: Folder of the report.
        runs: Run folders whose loss curves are drawn too.
        title: Heading of the report.
        tokens_per_step: For checkpoints of which only the step is known: lm-eval's results, folders called by steps.
        percent: Accuracies of the tables are percentages.
        label: NAME=SCORES: the series of that input is called NAME.
        tasks_table: CSV of tasks (task, domain, chance, n), which counts before what is known of them.
        until: Leave out checkpoints of more tokens, such as 300B: one horizon for all series.
        to_score: The score that tokens are counted to: a share of the way from guessing to perfect (default 0.5), or
            TASK=SCORE and METRIC=SCORE.
        figure_style: Of the figures: screen, paper or slides, with a width in inches as in paper:3.25.
    """
    labels = dict[str, Path]()
    for text in label:
        name, equals, path = text.partition("=")
        if not (name and equals and Path(path) in scores):
            raise UserError(f"--label {text}: write NAME=SCORES, with one of the inputs as SCORES")
        labels[name] = Path(path)
    if len(set(labels.values())) < len(label):
        raise UserError(f"--label {' '.join(label)}: name each series and each input once")
    print(
        interface.analyze(
            scores, out, runs=runs, title=title, tokens_per_step=tokens_per_step, percent=percent, labels=labels,
            tasks_table=tasks_table, until=None if until is None else _tokens(until), to_score=_score(to_score),
            figure_style=figure_style,
        )
    )  # fmt: skip


def _tokens(text: str) -> float:
    try:
        return amount(text)
    except ValueError:
        raise UserError(f"--until {text}: is no number of tokens; write 300B, 1.5T or 300000000000") from None


def _score(texts: tuple[str, ...]) -> float | dict[str, float]:
    remedy = "write one share such as 0.5, or TASK=SCORE and METRIC=SCORE"
    scores = dict[str, float]()
    try:
        for text in texts:
            name, _, score = text.rpartition("=")
            scores[name] = float(score)
    except ValueError:
        raise UserError(f"--to-score {' '.join(texts)}: {remedy}") from None
    if len(scores) < len(texts) or ("" in scores and len(scores) > 1):
        raise UserError(f"--to-score {' '.join(texts)}: {remedy}")
    return scores[""] if len(scores) == 1 and "" in scores else scores


def export_scores(
    scores: Annotated[Positional[Path], arg(metavar="SCORES")],
    out: Path,
    pack: Path | None = None,
    format: Literal["lm-eval"] = "lm-eval",
    samples: bool = True,
) -> None:
    """Write scores as the results_*.json and samples_*.jsonl files of lm-eval, a folder per checkpoint.

    Args:
        scores: Folder of `fineline score`.
        out: Folder to write.
        pack: Request pack that was scored; default: the one in the folder of the scores.
        format: Layout of the files.
        samples: Also one line per document; with few-shot prompts these files are large.
    """
    from fineline_jax.scoring.lm_eval.export import export
    from fineline_jax.scoring.requests.pack import load

    assert format == "lm-eval"
    with writing(out, "--out"):
        written = export(scores, out, load(pack) if pack is not None else None, samples=samples)
    print(f"{out}: {counted(len(written), 'checkpoint')} in lm-eval's layout")
