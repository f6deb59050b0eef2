"""`fineline series`: the released series that are known; `export` and `import`: to and from other layouts."""

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from fineline_jax import interface
from fineline_jax.atomic_files import check_local
from fineline_jax.errors import Incomplete, UserError
from fineline_jax.folder_lock import writing
from fineline_jax.recipe import MeshShape, Recipe


def list_series(
    name: Annotated[Positional[str | None], arg(metavar="[NAME]")] = None,
    tokens: str = "",
    every: int = 1,
    check: bool = False,
) -> None:
    """The released series that are known; with a name, every checkpoint with its step, tokens and location.

    Args:
        name: A registered series or a YAML file of one, also with @GLOB; or what else `fineline score` takes.
        tokens: start:stop:spacing, the checkpoints nearest to such a grid of trained tokens: 0:100B:10B.
        every: Every n-th of the checkpoints that are left.
        check: Compare a registered series, or all of a YAML file, with what its location lists: names that fit no
            pattern, their number, the tokens they state. Exit status 1 if the entry is wrong.
    """
    from fineline_jax.checkpoints.describe import checked, details, overview

    if name is None and (tokens or every != 1 or check):
        raise UserError("series: --tokens, --every and --check are about one series; name it first")
    if name is not None and check:
        text, mistakes = checked(name)
        print(text)
        if mistakes:
            raise Incomplete(f"{name}: {'; '.join(mistakes)}; mend the entry")
        return
    text, damaged = (overview(), []) if name is None else details(name, tokens, every)
    print(text)
    if damaged:
        raise Incomplete(f"{name}: damaged: {'; '.join(damaged)}; restore from a backup, or remove the folder")


def export_checkpoint(
    checkpoint: Annotated[Positional[str], arg(metavar="CHECKPOINT")],
    out: Annotated[Positional[Path], arg(metavar="DIR")],
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    layout: str | None = None,
) -> None:
    """Write a checkpoint in Hugging Face layout (safetensors, config, tokenizer).

    Args:
        checkpoint: RUN/checkpoints/STEP, a run folder for its last checkpoint, or any checkpoint that can be scored.
        out: Folder to write.
        dtype: Of the weights written; default: as they are stored.
        layout: Family of models whose layout is written; default: the first that can hold the model.
    """
    check_local(out, "DIR")
    last = interface.open_series(checkpoint).checkpoints[-1]
    interface.export(last, out, dtype=dtype, layout=layout)
    print(f"{out}: {last.series}/{last.name} in Hugging Face layout")


def import_weights(
    weights: Annotated[Positional[Path], arg(metavar="WEIGHTS")],
    run: Annotated[Positional[Path], arg(metavar="RUN")],
    config: str | None = None,
    recipe: str | None = None,
    step: int | None = None,
    tokens: int | None = None,
    tokenizer: Path | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
) -> None:
    """Store released weights as a checkpoint of a run, which can be scored, exported and trained on.

    Args:
        weights: Folder with config.json and weight files (docs/formats.md), or one such file.
        run: Folder of the run; a new one, or one of the same model that gets a further checkpoint.
        config: config.json, or the recipe whose model it is; default: the config.json beside the weights.
        recipe: Recipe with which `fineline pretrain RUN` goes on in this folder, from this checkpoint with a new
            optimizer state; default: none, the run can be scored and exported.
        step: Optimizer steps the weights have had; default: from the folder's name, else 0.
        tokens: Tokens they were trained on; default: from the folder's name, else not known.
        tokenizer: Folder of the tokenizer; default: the one beside the weights.
        dtype: Of the weights stored; default: as they are in the files, float32 with a recipe.
    """
    check_local(run, "RUN")
    import jax

    from fineline_jax.catalogue import load_recipe
    from fineline_jax.checkpoints.convert import import_checkpoint
    from fineline_jax.mesh import make_mesh
    from fineline_jax.training.optimizer import make_optimizer

    resumed = load_recipe(recipe) if recipe else None
    model = None if config is None else Path(config) if config.endswith(".json") else load_recipe(config).model

    def new_optimizer(recipe: Recipe, params: dict) -> dict:
        return {"opt_state": jax.jit(make_optimizer(recipe.optimizer).init)(params)} if resumed else {}

    with writing(run, "RUN"):
        made = import_checkpoint(
            weights,
            run,
            make_mesh(resumed.mesh if resumed else MeshShape()),
            config=model,
            recipe=resumed,
            dtype=dtype or ("float32" if resumed else None),
            step=step,
            tokens=tokens,
            tokenizer=tokenizer,
            more_state=new_optimizer,
        )
    print(f"{made}: {weights} imported")
