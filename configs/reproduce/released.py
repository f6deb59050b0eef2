"""A released 7B series trained again: from its data to folders of the names that its authors published.

    python configs/reproduce/released.py SERIES [--work DIR] [--print] [options of fineline pretrain]
    python configs/reproduce/released.py --table

SERIES is one of those below. The commands prepare the data, train, and export each checkpoint that has a published
name to DIR/SERIES/NAME; what is there already is left, so the same command goes on. --print: only say them, for a pod,
whose training is started on every host (docs/pods.md). --table: our arithmetic against what is published.
"""

import argparse
import dataclasses
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from fineline_jax.catalogue import load_recipe
from fineline_jax.checkpoints.registry.entries import checkpoints, find
from fineline_jax.recipe import Recipe
from fineline_jax.training.schedule import learning_rate

HERE = Path(__file__).resolve().parent


@dataclasses.dataclass(frozen=True)
class Reproduction:
    series: str
    """Name of its entry in configs/series."""
    recipe: str
    data: str
    """Arguments of `fineline data prepare`; WORK is the folder."""
    published: Mapping[str, float | None]
    """Quantity of `arithmetic` -> what the authors published; None: they did not."""


AMBER = "amber WORK/raw/amber/train_{000..359}.jsonl --tokenizer WORK/raw/tokenizers/amber --processes 32"
TEXT = "text WORK/raw/{data} --tokenizer WORK/raw/tokenizers/{data} --bos --eos"
_7B = {"tokens per step": 4_194_304, "peak rate": 3e-4, "last rate": 3e-5}
REPRODUCTIONS = {
    "amber": Reproduction(
        "amber", "amber_7b", AMBER,
        {"tokens per step": 4_587_520, "steps": 274_320, "tokens": 1_258_448_486_400, "parameters": 6_738_415_616,
         "peak rate": 3e-4, "last rate": 3e-5, "named": 360},
    ),
    "amber_fine_line": Reproduction(
        "amber-reproduce", str(HERE / "amber_fine_line.py"), AMBER,
        {"tokens per step": 4_194_304, "parameters": 5_799_000_000, "tokens": 1.30023e12, "named": 22},
    ),
    "openllama_fine_line": Reproduction(
        "openllama-reproduce", str(HERE / "openllama_fine_line.py"), TEXT.format(data="open_llama_v2"),
        _7B | {"parameters": 6_738_415_616, "named": 19},
    ),
    "open_llama_7b": Reproduction(
        "open_llama_7b", "open_llama_7b", TEXT.format(data="redpajama"),
        _7B | {"steps": 250_000, "tokens": 1_048_576_000_000, "parameters": 6_738_415_616, "named": 9},
    ),
    "open_llama_13b": Reproduction(
        "open_llama_13b", "open_llama_13b", TEXT.format(data="redpajama"),
        {"steps": 500_000, "tokens": 1_048_576_000_000, "named": 9},
    ),
    "open_llama_3b": Reproduction("open_llama_3b", "open_llama_3b", TEXT.format(data="redpajama"), {}),
    "open_llama_7b_v2": Reproduction("", "open_llama_7b_v2", TEXT.format(data="open_llama_v2"), _7B),
}  # fmt: skip


def names(one: Reproduction, recipe: Recipe) -> dict[str, int]:
    """Published name -> our step, of those whose step the recipe keeps. Raises KeyError for an unknown series."""
    if not one.series:
        return {}
    entry = find(one.series)
    if entry is None:
        raise KeyError(one.series)
    kept = set(recipe.kept_steps())
    return {named.name: named.step for named in checkpoints(entry, ask=False) if named.step in kept}


def commands(name: str, work: Path, more: list[str]) -> list[list[str]]:
    """The commands, in order; each can be given again."""
    one, fineline = REPRODUCTIONS[name], [sys.executable, "-m", "fineline_jax"]
    recipe, run = load_recipe(one.recipe), work / "runs" / name
    source = str(work / recipe.data.sources[0].path)
    given = f"data prepare {one.data} --out {source}".replace("WORK", str(work))
    prepare = f"test -d {shlex.quote(source)} || {shlex.join(fineline)} {given}"
    train = [*fineline, "pretrain", one.recipe, "--run", str(run), "--data.sources.0.path", source, *more]
    exports = [
        [*fineline, "export", f"{run}/checkpoints/{step}", str(work / name / published)]
        for published, step in names(one, recipe).items()
        if not (work / name / published).exists()
    ]
    return [["bash", "-c", prepare], train, *exports]


def arithmetic(name: str) -> dict[str, float]:
    one = REPRODUCTIONS[name]
    recipe = load_recipe(one.recipe)
    return {
        "tokens per step": recipe.tokens_per_step,
        "steps": recipe.tokens // recipe.tokens_per_step,
        "tokens": recipe.tokens,
        "parameters": recipe.model.parameters,
        "peak rate": learning_rate(recipe, recipe.optimizer.schedule.warmup_tokens),
        "last rate": learning_rate(recipe, recipe.tokens),
        "named": len(names(one, recipe)),
    }


def table() -> str:
    """Markdown; a cell is ours, and behind it what is published where that is known."""
    quantities = list(arithmetic("amber"))
    lines = ["| series | " + " | ".join(quantities) + " |", "|---|" + "---|" * len(quantities)]
    for name, one in REPRODUCTIONS.items():
        cells = []
        for quantity, ours in arithmetic(name).items():
            theirs = one.published.get(quantity)
            shown = lambda value: f"{value:,.0f}" if value >= 1 or value == 0 else f"{value:.0e}"
            cells.append(shown(ours) if theirs is None else f"{shown(ours)} ({shown(theirs)})")
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("series", nargs="?", choices=tuple(REPRODUCTIONS))
    parser.add_argument("--work", type=Path, default=Path("."))
    parser.add_argument("--print", action="store_true", dest="only_said")
    parser.add_argument("--table", action="store_true")
    arguments, more = parser.parse_known_args()
    if arguments.table:
        print(table())
        return 0
    if arguments.series is None:
        parser.error("name a series")
    for command in commands(arguments.series, arguments.work.resolve(), more):
        print(shlex.join(command), flush=True)
        if not arguments.only_said:
            done = subprocess.run(command)
            if done.returncode:
                return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
