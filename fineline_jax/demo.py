"""`fineline demo`: the whole tool on the embedded world, by the same functions as the commands it names."""

import dataclasses
import time
from pathlib import Path

import rich.console

from fineline_jax.atomic_files import check_local, copy_folder
from fineline_jax.data.corpora import Prepared
from fineline_jax.errors import UserError
from fineline_jax.folder_lock import writing
from fineline_jax.interface import analyze, open_series, pretrain, score
from fineline_jax.scoring.options import PackOptions

console = rich.console.Console(stderr=True, highlight=False, soft_wrap=True)


def prepare_world(out: Path, seed: int = 0) -> Prepared:
    """The world of `seed` as a prepared data set, with its benchmarks beside it in OUT/benchmarks."""
    from fineline_jax.catalogue import load_recipe
    from fineline_jax.data.corpora import prepare_text, refuse_occupied
    from fineline_jax.world.generate import generate

    check_local(out, "--out")  # the benchmarks are read from folders
    with writing(out, "--out"):
        refuse_occupied(out)
        text = out.with_name(out.name + ".text")
        world = generate(text, seed)
        made = prepare_text(
            [world.text],
            out,
            tokenizer=world.tokenizer,
            sequence_length=load_recipe("demo").data.sequence_length,
            bos=True,
            eos=True,
            validation_inputs=[world.validation_text],
        )
        if not (out / "benchmarks").exists():
            copy_folder(world.benchmarks, out / "benchmarks")
        return made


def run_demo(out: Path, *, tokens: int = 0) -> Path:
    """Make the world, train on it, score every checkpoint and write the report into `out`; returns report.html.

    tokens: trained tokens instead of the recipe's; 0: the recipe's. An interrupted demo is resumed.
    """
    from fineline_jax.catalogue import load_recipe
    from fineline_jax.recipe import Source, differences, from_json

    start = time.monotonic()
    data, run, scores, report = out / "data", out / "run", out / "scores", out / "report"
    recipe = load_recipe("demo")
    recipe = dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, sources=(Source(str(data)),)),
        tokens=tokens or recipe.tokens,
    )
    before = run / "recipe.json"
    if before.is_file() and (changed := differences(from_json(before), recipe)):
        raise UserError(f"{out}: holds another demo ({'; '.join(changed)}); delete it, or name another folder by --out")

    _say(1, f"a world to learn: fineline data prepare world --out {data}")
    prepare_world(data)

    _say(2, f"train on it: fineline pretrain demo --run {run} --data.sources.0.path {data}")
    if pretrain(recipe, run).stopped_by:
        raise KeyboardInterrupt

    benchmarks = data / "benchmarks"
    _say(3, f"score every checkpoint: fineline score {run} --suite demo --benchmarks {benchmarks} --out {scores}")
    from fineline_jax.scoring.requests.build import build

    pack = build("demo", run / "tokenizer", PackOptions(benchmarks))
    score(open_series(run), pack, scores, mesh=recipe.mesh)

    _say(4, f"read the curves: fineline analyze {scores} --runs {run} --out {report}")
    page = analyze(scores, report, runs=[run], title="What a small language model learns, and when")
    console.print(f"done in {time.monotonic() - start:.0f} s")
    return page


def _say(number: int, text: str) -> None:
    console.print(f"[bold]{number}/4[/bold] {text}")
