"""The Python interface: what the commands do, as functions. They are attributes of `fineline_jax` itself.

Nothing heavy is imported at the top, so that `import fineline_jax` and --help answer at once. Where JAX is not loaded
yet, `pretrain` and `score` prepare its CPU backend as the command does (`cpu_backend.prepare_cpu`).
"""

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fineline_jax.atomic_files import check_local, local_folder
from fineline_jax.cpu_backend import prepare_cpu
from fineline_jax.errors import UserError
from fineline_jax.folder_lock import writing
from fineline_jax.recipe import MeshShape, Recipe

if TYPE_CHECKING:
    from fineline_jax.ablation.ablate import SweepOutcome
    from fineline_jax.ablation.sweep import Sweep
    from fineline_jax.checkpoints.series import Checkpoint, Series
    from fineline_jax.scoring.requests.pack import Pack
    from fineline_jax.training.loop import Outcome

Location = str | os.PathLike[str]

OF_LM_EVAL = {
    "tasks": "give them as the suite: prepare_pack('piqa,arc_easy', …)",
    "num_fewshot": "prepare_pack has shots, and a task's own stand behind its name: prepare_pack('piqa@5', …)",
    "batch_size": "score has batch_tokens",
    "max_length": "prepare_pack has max_context",
    "device": "JAX takes all devices there are; JAX_PLATFORMS=cpu leaves it the CPU alone",
}
"""Arguments of lm-eval's `simple_evaluate` and models that ours lack: what to give instead."""


def pretrain(
    recipe: Recipe | Location,
    run: Location | None = None,
    *,
    accept_changes: bool = False,
    branch: str | None = None,
    optimizer_state: Literal["kept", "fresh"] = "kept",
    until: int | None = None,
    skip_windows: tuple[int, int] | None = None,
    score: str | None = None,
    benchmarks: Location | None = None,
    include_path: Location | None = None,
    stuck_after: float = 0.0,
) -> "Outcome":
    """Train a recipe, or resume it where the run folder holds its checkpoints.

    recipe: or the name or file of one, or the folder of a run. run: folder of the run, or an address in a bucket
    (gs://…, s3://…) that it is staged for on this machine; None: that of the recipe, or runs/NAME. accept_changes:
    resume although the recipe or the data differ from what the folder records, which gets a further segment in its
    history. branch: RUN@STEP, the checkpoint that a new run begins at, with its optimizer_state or a fresh one. until:
    tokens at which it ends for now, saved. skip_windows: (first, last + 1) of windows to leave out, numbered as the run
    reads them. score: suite or request pack, to score each kept checkpoint in memory, into RUN/scores; benchmarks: the
    documents of that suite, None: the hub; include_path: folder of task files that it names. stuck_after: end the
    process after so many seconds without a step, a save or a compilation that ends, with the stacks of its threads; 0:
    never.
    Returns the step and tokens reached, and by which signal it was stopped, if by one. Raises UserError.
    """
    _prepare_cpu()
    from fineline_jax.catalogue import load_recipe, run_folder
    from fineline_jax.checkpoints.remote.staging import fetch_recipe, staged
    from fineline_jax.multihost import check_on_process_0, writing_as_one
    from fineline_jax.plan.here import check_memory
    from fineline_jax.training.loop import pretrain as train
    from fineline_jax.training.observers import AtKeptCheckpoints, Observer, Watchdog
    from fineline_jax.training.run_folder import branch_at

    _check_suite("pretrain", score, benchmarks, include_path)
    if branch is not None and run is None:
        raise UserError("pretrain: --from begins a new run; name its folder with --run")
    if not isinstance(recipe, Recipe):
        run = run_folder(os.fspath(recipe)) if run is None else run
        recipe = load_recipe(fetch_recipe(os.fspath(recipe)))
    run = Path("runs") / recipe.name if run is None else Path(run)
    check_local(run, "--run", or_bucket=True)
    place, run = run, local_folder(run)
    begin = None if branch is None else branch_at(branch, optimizer_state)
    check_memory(recipe)
    with contextlib.ExitStack() as stack:
        stack.enter_context(writing_as_one(run, "--run"))
        check_on_process_0(lambda: stack.enter_context(staged(place, alone=True)))
        observers: list[Observer] = [Watchdog(stuck_after)] if stuck_after else []
        if score is not None:
            from fineline_jax.scoring.series.in_training import ScoreInTraining, check_pack, open_pack, with_own_tasks

            documents = None if benchmarks is None else Path(benchmarks)
            pack = open_pack(with_own_tasks(score, include_path), recipe.data.sources[0].tokenizer, documents)
            check_pack(pack, recipe)
            stack.enter_context(writing_as_one(run / "scores" / run.absolute().name, "--run"))
            observers.append(AtKeptCheckpoints(ScoreInTraining(run, recipe.model, pack, run / "scores")))
        return train(
            recipe,
            run,
            accept_changes=accept_changes,
            branch=begin,
            until=until,
            skip_windows=skip_windows,
            observers=observers,
        )


def open_series(
    location: Location,
    *,
    tokens: str = "",
    every: int = 1,
    downloads: Location | None = None,
    keep_downloads: bool = True,
) -> "Series":
    """The checkpoints of a run, a folder, a registered series, a repository of the hub or a bucket.

    location: what `fineline score` takes as SERIES. tokens: start:stop:spacing, the checkpoints nearest to such a grid
    of trained tokens. every: every n-th of those. downloads: where remote checkpoints are fetched to when they are
    read, None: the cache; keep_downloads: whether they stay there. Raises UserError naming what was looked for.
    """
    from fineline_jax.checkpoints.open import open_series as open_by_name

    folder = None if downloads is None else Path(downloads)
    return open_by_name(os.fspath(location), tokens=tokens, every=every, downloads=folder, keep=keep_downloads)


def prepare_pack(suite: Location, tokenizer: Location, out: Location, **options: Any) -> "Pack":
    """Build and tokenize every request of a suite once, and write them to the folder `out`.

    suite: name in configs/suites, YAML file, or task names with commas between. tokenizer: a folder. options: fields
    of `scoring.options.PackOptions`, such as benchmarks, limit and mode. Raises UserError for bad input.
    """
    from fineline_jax.scoring.options import PackOptions
    from fineline_jax.scoring.requests.build import prepare

    _check_arguments(options)
    for name in {"benchmarks", "tfds", "include_path", "pick"} & {
        name for name, value in options.items() if value is not None
    }:
        options[name] = Path(options[name])
    with writing(Path(out), "--out"):
        return prepare(os.fspath(suite), Path(tokenizer), Path(out), PackOptions(**options))


def score(
    series: "Series | Location | Sequence[Series | Location]",
    pack: "Pack | Location",
    out: Location,
    *,
    mesh: MeshShape = MeshShape(),
    **options: Any,
) -> list[Path]:
    """Score every checkpoint that `out` has no scores of; returns their files, also of those scored before.

    series: of `open_series`, or what it takes. pack: of `prepare_pack`, or its folder. mesh: devices per axis, by
    default a whole copy of the weights on each if that fits easily. options: fields of `scoring.options.ScoreOptions`,
    such as dtype.
    Raises UserError, also at the end, when all others are scored, for checkpoints that cannot be opened.
    """
    _check_arguments(options)
    _prepare_cpu()
    from fineline_jax.checkpoints.series import Series
    from fineline_jax.scoring.options import ScoreOptions
    from fineline_jax.scoring.requests.pack import load
    from fineline_jax.scoring.series.auto_mesh import scoring_mesh
    from fineline_jax.scoring.series.score_series import SeriesScorer

    given = [series] if isinstance(series, Series | str | os.PathLike) else series
    chosen = [one if isinstance(one, Series) else open_series(one) for one in given]
    requests = load(Path(pack)) if isinstance(pack, str | os.PathLike) else pack
    how = ScoreOptions(**options)
    with scores_at(out) as folder:
        return SeriesScorer(requests, folder, scoring_mesh(mesh, chosen, how.dtype), how)(chosen)


@contextlib.contextmanager
def scores_at(out: Location) -> Iterator[Path]:
    """The folder of this machine for the scores of `out`; of an address in a bucket the one that they are staged in."""
    from fineline_jax.checkpoints.remote.staging import staged
    from fineline_jax.multihost import check_on_process_0

    check_local(out, "--out", or_bucket=True)
    with contextlib.ExitStack() as stack:
        check_on_process_0(lambda: stack.enter_context(staged(Path(out), alone=False)))
        yield local_folder(out)


def analyze(
    scores: Location | Sequence[Location],
    out: Location,
    *,
    runs: Sequence[Location] = (),
    title: str = "Learning trajectories",
    tokens_per_step: float | None = None,
    percent: bool = False,
    labels: Mapping[str, Location] | None = None,
    tasks_table: Location | None = None,
    until: float | None = None,
    to_score: float | Mapping[str, float] = {},
    ceiling: float | None = None,
    group: str | None = None,
    events: Mapping[str, float] = {},
    pick: int = 0,
    growth: bool = False,
    series: Sequence[str] = (),
    tasks: Sequence[str] = (),
    reference: str | None = None,
    live: str | None = None,
    figure_style: str = "screen",
) -> Path:
    """Write the report of scores into the folder `out`: tables, figures, report.html, whose path is returned.

    scores: folders of `score`, result trees of lm-eval and other tools, tables. runs: run folders whose loss is drawn
    too. tokens_per_step: for checkpoints of which only the step is known. percent: accuracies of tables are
    percentages. labels: name -> one of `scores`, whose one series is called so. tasks_table: CSV of task, domain,
    chance, n, which counts before what is known of a task. until: checkpoints of more tokens are left out. to_score:
    the score that tokens are counted to, a share of the way from guessing to perfect, or task or metric -> score.
    ceiling: the highest score that can be reached, instead of 1. group: FACET=FIELD,… of the runs' recipes; runs alike
    in these are the seeds of one arm. events: name -> tokens, at which a change is looked for. pick: documents of each
    task that item response picks. growth: a law of each curve's growth is fitted (slow). series, tasks: names or
    patterns (m-*) of those that are kept. reference: the series that others are compared with, instead of the first.
    live: a series that still trains, whose newest checkpoint is compared with the others, or with the reference.
    figure_style: screen, paper or slides, with a width in inches as in paper:3.25.
    Raises UserError naming what cannot be read.
    """
    from fineline_jax.analysis import analyze_scores
    from fineline_jax.trajectories.readers.options import ReadOptions

    if tokens_per_step is not None and not 0 < tokens_per_step < float("inf"):
        raise UserError(f"--tokens-per-step {tokens_per_step} must be a positive number")
    if isinstance(to_score, int | float) and not 0 < to_score < 1:
        raise UserError(f"--to-score {to_score}: a share of the way from guessing to perfect is between 0 and 1")
    if ceiling is not None and not 0 < ceiling <= 1:
        raise UserError(f"--ceiling {ceiling}: the highest score is above 0 and at most 1; write 0.95 for 95 %")
    if pick < 0:
        raise UserError(f"--pick {pick}: must be a number of documents, such as 50")
    paths = [scores] if isinstance(scores, str | os.PathLike) else scores
    folders = [Path(run) for run in runs]
    reading = ReadOptions(
        tokens_per_step,
        percent,
        {Path(path): name for name, path in (labels or {}).items()},
        None if tasks_table is None else Path(tasks_table),
        until,
        float(to_score) if isinstance(to_score, int | float) else None,
        ceiling,
        to_score if isinstance(to_score, Mapping) else {},
        series,
        tasks,
        reference,
    )
    with writing(Path(out), "--out"):
        return analyze_scores(
            list(map(Path, paths)), Path(out), runs=folders, title=title, reading=reading, figure_style=figure_style,
            group=group, pick=pick, growth=growth, events=events, live=live,
        )  # fmt: skip


def export(
    checkpoint: "Location | Checkpoint",
    out: Location,
    *,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    layout: str | None = None,
) -> Path:
    """Write a checkpoint into the folder `out` in Hugging Face layout (safetensors, config, tokenizer); returns `out`.

    checkpoint: one of a series; or what `open_series` takes, such as RUN/checkpoints/STEP: the last is written.
    dtype: of the weights written, None: as they are stored. layout: family whose layout is written, None: the first
    that can hold the model. Raises UserError.
    """
    from fineline_jax.checkpoints.convert import export_checkpoint
    from fineline_jax.checkpoints.series import Checkpoint
    from fineline_jax.mesh import make_mesh

    last = checkpoint if isinstance(checkpoint, Checkpoint) else open_series(checkpoint).checkpoints[-1]
    with writing(Path(out), "DIR"):
        export_checkpoint(last, Path(out), make_mesh(), dtype=dtype, family=layout)
    return Path(out)


def ablate(
    sweep: "Sweep | Location",
    out: Location | None = None,
    *,
    part: str | None = None,
    score: str | None = None,
    benchmarks: Location | None = None,
    include_path: Location | None = None,
    until: int | None = None,
    together: int = 1,
) -> "SweepOutcome":
    """Train the runs of a sweep that have not ended yet, one after another, and write the table of all that have.

    sweep: or the name or file of one. out: its folder, None: ablations/NAME. part: I/N, only that part of the runs, for
    machines that do not talk to each other; auto: from the job's variables. score: suite or request pack, for every
    kept checkpoint of every run; benchmarks: the documents of that suite, None: the hub; include_path: folder of
    task files that it names. until: tokens at which every run ends, in place of the sweep's own. together: runs of one
    shape that one program trains at a time. Raises UserError.
    """
    _prepare_cpu()
    from fineline_jax.ablation.ablate import run_sweep
    from fineline_jax.ablation.sweep import Sweep, load_sweep
    from fineline_jax.scoring.series.in_training import with_own_tasks

    _check_suite("ablate", score, benchmarks, include_path)
    sweep = load_sweep(sweep if isinstance(sweep, Sweep) else os.fspath(sweep), until)
    folder = Path("ablations") / sweep.name if out is None else Path(out)
    if together < 1:
        raise UserError(f"--together {together}: give 1, one run after another, or more")
    documents = None if benchmarks is None else Path(benchmarks)
    asked = None if score is None else with_own_tasks(score, include_path)
    return run_sweep(sweep, folder, part=part, score=asked, benchmarks=documents, together=together)


def _check_suite(command: str, score: str | None, benchmarks: Any, include_path: Any) -> None:
    for option, what, given in (
        ("benchmarks are", "documents", benchmarks), ("include-path is", "folder of tasks", include_path)
    ):  # fmt: skip
        if given is not None and score is None:
            raise UserError(f"{command}: --{option} the {what} of --score SUITE; give both, or neither")


def _check_arguments(options: Mapping[str, Any]) -> None:
    """Raise UserError, which names ours, for an argument of lm-eval's."""
    for name in options:
        if name in OF_LM_EVAL:
            raise UserError(f"{name} is an argument of lm-eval; {OF_LM_EVAL[name]}")


def _prepare_cpu() -> None:
    if "jax" not in sys.modules:
        prepare_cpu()
