"""What is made of scores: `fineline show`, `fineline analyze`, and lm-eval's files by `fineline export-scores`."""

import contextlib
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from fineline_jax import interface
from fineline_jax.errors import UserError
from fineline_jax.folder_lock import writing
from fineline_jax.text_table import amount, counted

NONE, ALL, HALF = (arg(help_behavior_hint=f"(default: {what})") for what in ("none", "all", "0.5"))
Names = tuple[str, ...]


def show(
    scores: Annotated[Positional[Path], arg(metavar="SCORES|RESULTS")],
    task: Annotated[Names, arg(help_behavior_hint="(default: the first metric of all)")] = (),
    last: int = 2,
) -> None:
    """Print the last scores of each series, with standard errors, and the change from the checkpoint before.

    Args:
        scores: Folder of `fineline score`, result tree of lm-eval and other tools, or a table.
        task: Only these tasks, with all of their metrics; mmlu_* for all that begin so.
        last: Checkpoints that are shown.
    """
    if last < 1:
        raise UserError(f"--last {last} must be at least 1")
    from fineline_jax.scoring.metrics import latest

    if (scores / "pack" / "manifest.json").is_file():
        print(latest.of_scores(scores, task, last))
        return
    from fineline_jax.trajectories.readers.options import ReadOptions
    from fineline_jax.trajectories.table import read_parts

    # no axis is drawn: tokens may be unknown
    frames = [frame for _, frame in read_parts(scores, ReadOptions(tokens_per_step=float("nan")))]
    print(latest.of_tables(frames, str(scores), task, last))


def analyze(
    scores: Annotated[Positional[tuple[Path, ...]], arg(metavar="SCORES …", help_behavior_hint="(at least one)")],
    out: Path,
    runs: Annotated[tuple[Path, ...], NONE] = (),
    title: str = "Learning trajectories",
    tokens_per_step: float | None = None,
    percent: bool = False,
    label: Annotated[Names, NONE] = (),
    tasks_table: Path | None = None,
    until: str | None = None,
    to_score: Annotated[Names, HALF] = (),
    ceiling: float | None = None,
    group: str | None = None,
    event: Annotated[Names, NONE] = (),
    pick: int = 0,
    growth: bool = False,
    series: Annotated[Names, ALL] = (),
    task: Annotated[Names, ALL] = (),
    reference: str | None = None,
    live: str | None = None,
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
        to_score: The score that tokens are counted to: a share of the way from guessing to perfect, or TASK=SCORE and
            METRIC=SCORE.
        ceiling: The highest score that can be reached, instead of 1, where no column `ceiling` says it.
        group: FACET=FIELD,… such as size=model.width,batch=batch.sequences: what distinguishes the arms of --runs, by
            fields of their recipes, parameters or flops_per_token; runs alike in these are the seeds of an arm.
        event: NAME=TOKENS: what happened in training, beside what the schedules of --runs say; the change is measured.
        pick: Documents of each task that item response picks: the fewest that say how able a checkpoint is.
        growth: Fit a law of growth to each curve: what a doubling of tokens still gives. Some tenths of a second each.
        series: Only these series; m-* for all that begin so.
        task: Only these tasks, likewise.
        reference: The series that others are compared with, instead of the first.
        live: A series that still trains: is its newest checkpoint ahead of the others, or of the reference? The answer
            is a sentence and a section of report.html, and live_state.csv.
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
            tasks_table=tasks_table, until=None if until is None else _tokens("--until", until),
            to_score=_score(to_score), ceiling=ceiling, group=group, events=_events(event), pick=pick,
            growth=growth,
            series=series, tasks=task, reference=reference, live=live, figure_style=figure_style,
        )
    )  # fmt: skip


def _tokens(option: str, text: str) -> float:
    try:
        return amount(text)
    except ValueError:
        raise UserError(f"{option} {text}: is no number of tokens; write 300B, 1.5T or 300000000000") from None


def _events(texts: tuple[str, ...]) -> dict[str, float]:
    named = [text.rpartition("=") for text in texts]
    for text, (name, _, _) in zip(texts, named, strict=True):
        if not name:
            raise UserError(f"--event {text}: write NAME=TOKENS, such as decay=300B")
    return {name: _tokens(f"--event {name}", tokens) for name, _, tokens in named}


def _score(texts: tuple[str, ...]) -> float | dict[str, float]:
    remedy = "write one share such as 0.5, or TASK=SCORE and METRIC=SCORE"
    scores = dict[str, float]()
    for text in texts:
        name, _, score = text.rpartition("=")
        with contextlib.suppress(ValueError):
            scores[name] = float(score)
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
