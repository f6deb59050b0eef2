"""Training: the demo, and `fineline pretrain RECIPE`, whose options are the fields of the recipe named first."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional, arg

from fineline_jax import interface
from fineline_jax.commands.processes import Processes, joined
from fineline_jax.commands.usage import deferred, parsed
from fineline_jax.errors import UserError
from fineline_jax.folder_lock import writing
from fineline_jax.models.config import ModelConfig, following
from fineline_jax.recipe import Recipe


def demo(
    out: Path = Path("demo-out"),
    tokens: int = 0,
) -> None:
    """The whole tool on an embedded synthetic world: about four minutes on two CPU cores.

    Args:
        out: Folder for everything it makes; delete it to start again.
        tokens: Trained tokens instead of the recipe's, for a quick look; 0: the recipe's.
    """
    from fineline_jax.demo import run_demo

    with writing(out, "--out"):
        report = run_demo(out, tokens=tokens)
    print(f"the report: {report.resolve()}")


def pretrain_for_help(recipe: Annotated[Positional[str], arg(metavar="RECIPE")]) -> None:
    """Train a recipe, or resume it; `fineline pretrain RECIPE --help` lists every field.

    Args:
        recipe: Name in configs/, a Python or JSON file, or a run folder.
    """


def pretrain(arguments: list[str]) -> int:
    """`fineline pretrain RECIPE`: the recipe named first gives the defaults of all options."""
    from fineline_jax.catalogue import load_recipe, run_folder
    from fineline_jax.checkpoints.remote.staging import fetch_recipe

    name, *arguments = recipe_first("pretrain", pretrain_for_help, arguments)
    default = load_recipe(fetch_recipe(name))

    def options(
        run: Path | None = None,
        accept_changes: bool = False,
        branch: Annotated[str | None, arg(name="from", metavar="RUN@STEP")] = None,
        optimizer_state: Literal["kept", "fresh"] = "kept",
        until: int | None = None,
        skip_windows: Annotated[str | None, arg(metavar="A:B")] = None,
        distributed: bool = False,
        stopped_status: int = 0,
        score: str | None = None,
        benchmarks: Path | None = None,
        include_path: Path | None = None,
        processes: Annotated[Processes, arg(name="")] = Processes(),
        recipe: Annotated[Recipe, arg(name="")] = default,
    ) -> int:
        """Train the recipe, or go on with it if the run folder holds its checkpoints.

        Args:
            run: Folder of the run, or gs://… or s3://…; default: RECIPE where that is one, else runs/NAME.
            accept_changes: Go on from the newest checkpoint although the recipe or the data differ from what the run
                folder records; its history gets a further segment.
            branch: Begin a new run at this checkpoint of another; its tokens and windows count on.
            optimizer_state: Of the checkpoint that --from names: its own, or a fresh one.
            until: Trained tokens at which the run ends for now; its checkpoint is kept.
            skip_windows: Leave out windows A to B - 1, numbered as the run reads them; recorded in its history.
            distributed: One of several processes of a job that its launcher started (TPU pod, SLURM, MPI, a shell).
            stopped_status: Exit status after SIGTERM or Ctrl-C, the state saved; 143 lets schedulers start it again.
            score: Suite or request pack: score each kept checkpoint in memory, into RUN/scores.
            benchmarks: For --score SUITE: folder of data sets in Hugging Face layout; default: the hub.
            include_path: For --score SUITE: folder of task files of your own, which the suite names.
            recipe: Fields of the recipe.
        """
        folder = run or (None if branch else run_folder(name) or Path("runs") / recipe.name)
        with joined(distributed, processes):
            stopped = _train(
                recipe, folder, accept_changes=accept_changes, branch=branch, optimizer_state=optimizer_state,
                until=until, skip_windows=_range(skip_windows), score=score, benchmarks=benchmarks,
                include_path=include_path,
                stuck_after=processes.stuck_after,
            )  # fmt: skip
            return stopped_status if stopped else 0

    return call_with_recipe(f"fineline pretrain {name}", options, default.model, arguments)


def recipe_first(command: str, described: Callable, arguments: list[str]) -> list[str]:
    """The arguments, of which the first names a recipe; for `--help` alone an introduction, and those of an example."""
    from fineline_jax.catalogue import config_names

    if arguments and not arguments[0].startswith("-"):
        return arguments
    if not {"-h", "--help"} & set(arguments):
        raise UserError(f"{command}: name a recipe first, as in `fineline {command} llama_60m`")
    known = ", ".join(config_names("{}.py"))
    summary = (described.__doc__ or "").splitlines()[0]
    print(f"usage: fineline {command} RECIPE [options]\n\n{summary}\n")
    print(f"RECIPE is one of: {known}; or a Python or JSON file, or the folder of a run.\n")
    print("Options, with the values of llama_60m:\n")
    return ["llama_60m", "--help"]


def call_with_recipe(program: str, command: Callable[..., int], model: ModelConfig, arguments: list[str]) -> int:
    """`command` with the options in `arguments`, of which one is a recipe with that model."""
    given = [*arguments, *following_options(model, arguments)]
    return parsed(program, lambda: tyro.cli(deferred(command), prog=program, args=given))()


def following_options(model: ModelConfig, arguments: list[str]) -> list[str]:
    """Options that let kv_heads and head_dim follow heads and width (`models.config.following`)."""
    given = {argument.partition("=")[0].removeprefix("--").replace("-", "_") for argument in arguments}
    more = following(model, given).items()
    return [word for name, value in more for word in (f"--{name.replace('_', '-')}", str(value))]


def _range(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    first, _, stop = text.partition(":")
    if not (first.isdecimal() and stop.isdecimal() and int(first) < int(stop)):
        raise UserError(f"--skip-windows {text}: give A:B, two numbers of windows, the second larger")
    return int(first), int(stop)


def _train(recipe: Recipe, run: Path | None, **options: Any) -> bool:
    """Whether it was stopped by a signal."""
    outcome = interface.pretrain(recipe, run, **options)
    import jax

    from fineline_jax.checkpoints.runs.store import steps
    from fineline_jax.progress import short
    from fineline_jax.training.metrics import read_metrics
    from fineline_jax.trajectories.runs.goodput import goodput_line

    if jax.process_index() == 0:
        where = f"step {outcome.step} ({short(outcome.tokens)} tokens)"
        if outcome.stopped_by:
            again = "the command without it" if outcome.stopped_by == "--until" else "the same command again"
            print(f"stopped by {outcome.stopped_by} at {where}, saved; run {again} to go on")
        else:
            kept = len(steps(outcome.run / "checkpoints"))
            print(f"{run or outcome.run}: complete at {where}, {kept} checkpoints kept")
        if line := goodput_line(read_metrics(outcome.run)):
            print(line)
    return outcome.stopped_by not in (None, "--until")
