"""Training: the demo, and `fineline pretrain RECIPE`, whose options are the fields of the recipe named first."""

from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional, arg

from fineline_jax import interface
from fineline_jax.commands.processes import join_processes
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
    from fineline_jax.catalogue import config_names, load_recipe, run_folder

    name = arguments[0] if arguments and not arguments[0].startswith("-") else None
    if name is None:
        if {"-h", "--help"} & set(arguments):
            known = ", ".join(config_names("{}.py"))
            summary = (pretrain_for_help.__doc__ or "").splitlines()[0]
            print(f"usage: fineline pretrain RECIPE [options]\n\n{summary}\n")
            print(f"RECIPE is one of: {known}; or a Python or JSON file, or the folder of a run.\n")
            print("Options, with the values of llama_60m:\n")
            name, arguments = "llama_60m", ["llama_60m", "--help"]
        else:
            raise UserError("pretrain: name a recipe first, as in `fineline pretrain llama_60m`")
    default = load_recipe(name)

    def options(
        run: Path | None = None,
        accept_changes: bool = False,
        branch: Annotated[str | None, arg(name="from", metavar="RUN@STEP")] = None,
        optimizer_state: Literal["kept", "fresh"] = "kept",
        until: int | None = None,
        skip_windows: Annotated[str | None, arg(metavar="A:B")] = None,
        distributed: bool = False,
        score: str | None = None,
        benchmarks: Path | None = None,
        recipe: Annotated[Recipe, arg(name="")] = default,
    ) -> int:
        """Train the recipe, or go on with it if the run folder holds its checkpoints.

        Args:
            run: Folder of the run; default: RECIPE where that is one, else runs/NAME.
            accept_changes: Go on from the newest checkpoint although the recipe or the data differ from what the run
                folder records; its history gets a further segment.
            branch: Begin a new run at this checkpoint of another; its tokens and windows count on.
            optimizer_state: Of the checkpoint that --from names: its own, or a fresh one.
            until: Trained tokens at which the run ends for now; its checkpoint is kept.
            skip_windows: Leave out windows A to B - 1, numbered as the run reads them; recorded in its history.
            distributed: One of several processes (TPU pod, SLURM, MPI): call jax.distributed.initialize first.
            score: Suite or request pack: score each kept checkpoint in memory, into RUN/scores.
            benchmarks: For --score SUITE: folder of data sets in Hugging Face layout; default: the hub.
            recipe: Fields of the recipe.
        """
        if distributed:
            join_processes()
        folder = run or (None if branch else run_folder(name) or Path("runs") / recipe.name)
        return _train(
            recipe, folder, accept_changes=accept_changes, branch=branch, optimizer_state=optimizer_state, until=until,
            skip_windows=_range(skip_windows), score=score, benchmarks=benchmarks,
        )  # fmt: skip

    program, given = f"fineline pretrain {name}", [*arguments[1:], *following_options(default.model, arguments)]
    command = parsed(program, lambda: tyro.cli(deferred(options), prog=program, args=given))
    return command()


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


def _train(recipe: Recipe, run: Path | None, **options: Any) -> int:
    outcome = interface.pretrain(recipe, run, **options)
    import jax

    from fineline_jax.checkpoints.runs.store import steps
    from fineline_jax.progress import short

    if jax.process_index() == 0:
        where = f"step {outcome.step} ({short(outcome.tokens)} tokens)"
        if outcome.stopped_by:
            again = "the command without it" if outcome.stopped_by == "--until" else "the same command again"
            print(f"stopped by {outcome.stopped_by} at {where}, saved; run {again} to go on")
        else:
            print(f"{outcome.run}: complete at {where}, {len(steps(outcome.run / 'checkpoints'))} checkpoints kept")
    return 0
