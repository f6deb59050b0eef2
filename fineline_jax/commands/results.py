"""What is made of scores: `fineline analyze`, and lm-eval's files by `fineline export-scores`."""

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from fineline_jax import interface
from fineline_jax.folder_lock import writing
from fineline_jax.text_table import counted


def analyze(
    scores: Annotated[Positional[tuple[Path, ...]], arg(metavar="SCORES …", help_behavior_hint="(at least one)")],
    out: Path,
    runs: tuple[Path, ...] = (),
    title: str = "Learning trajectories",
    tokens_per_step: float | None = None,
) -> None:
    """Tidy table, dynamics, curves: report.html and PNGs.

    Args:
        scores: Folders of `fineline score`, lm-eval result trees, or tidy CSV files.
        out: Folder of the report.
        runs: Run folders whose loss curves are drawn too.
        title: Heading of the report.
        tokens_per_step: For checkpoints of which only the step is known: lm-eval's results, folders called by steps.
    """
    print(interface.analyze(scores, out, runs=runs, title=title, tokens_per_step=tokens_per_step))


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
