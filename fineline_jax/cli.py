"""The `fineline` command: one function per command, each only reads its options and calls a room.

Nothing heavy is imported at the top, so that --help answers at once.
"""

import functools
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional, arg
from tyro.extras import SubcommandApp

from fineline_jax.cpu import prepare_cpu
from fineline_jax.errors import UserError
from fineline_jax.recipe import Mesh, Recipe

app = SubcommandApp()
data = SubcommandApp()
prepare = SubcommandApp()
tasks = SubcommandApp()
app.command(data, name="data", help="Prepare text or token lines for training.")
data.command(prepare, name="prepare", help="Write a data set of token windows.")
app.command(tasks, name="tasks", help="Prepare benchmark tasks for scoring.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0, 1 if some checkpoints could not be opened (all others are scored), 2 for
    bad input, 130 when interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    prepare_cpu()
    logging.basicConfig(format="%(message)s", level=logging.ERROR)
    logging.getLogger("fineline_jax").setLevel(logging.INFO)
    try:
        if arguments[:1] == ["pretrain"]:
            return pretrain(arguments[1:])
        if arguments[:1] == ["lm-eval"]:
            return lm_eval(arguments[1:])
        app.cli(prog="fineline", description=DESCRIPTION, args=arguments, sort_subcommands=False)
    except UserError as error:
        print(f"fineline: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("fineline: interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    except OSError as error:
        if error.filename is None:
            raise
        print(f"fineline: {error.filename}: {error.strerror}; check the path and its permissions", file=sys.stderr)
        return 2
    return 0


DESCRIPTION = "Pretrain a language model, keep its checkpoints, score every one of them, and read the curves."


@app.command
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

    report = run_demo(out, tokens=tokens)
    print(f"the report: {report.resolve()}")


@app.command(name="pretrain")
def _pretrain_for_help(recipe: Positional[str]) -> None:
    """Train a recipe, or resume it; `fineline pretrain RECIPE --help` lists every field.

    Args:
        recipe: Name in configs/, a Python or JSON file, or a run folder.
    """


def pretrain(arguments: list[str]) -> int:
    """`fineline pretrain RECIPE`: the recipe named first gives the defaults of all options."""
    from fineline_jax.catalogue import config_names, load_recipe

    name = arguments[0] if arguments and not arguments[0].startswith("-") else None
    if name is None:
        if {"-h", "--help"} & set(arguments):
            known = ", ".join(config_names("{}.py"))
            print(f"usage: fineline pretrain RECIPE [options]\n\n{(_pretrain_for_help.__doc__ or '').strip()}")
            print(f"\nRECIPE is one of: {known}\n\nOptions, with the values of llama_60m:\n")
            name, arguments = "llama_60m", ["llama_60m", "--help"]
        else:
            raise UserError("pretrain: name a recipe first, as in `fineline pretrain llama_60m`")
    default = load_recipe(name)

    def options(
        run: Path | None = None,
        accept_changes: bool = False,
        distributed: bool = False,
        score: str | None = None,
        benchmarks: Path | None = None,
        recipe: Annotated[Recipe, arg(name="")] = default,
    ) -> int:
        """Train the recipe, or go on with it if the run folder holds its checkpoints.

        Args:
            run: Folder of the run; default: runs/NAME.
            accept_changes: Resume although the recipe differs from the one in the run folder.
            distributed: One of several processes (TPU pod, SLURM, MPI): call jax.distributed.initialize first.
            score: Suite or request pack: score each kept checkpoint in memory, into RUN/scores.
            benchmarks: For --score SUITE: folder of data sets in Hugging Face layout; default: the hub.
            recipe: Fields of the recipe.
        """
        return _train(recipe, run or Path("runs") / recipe.name, accept_changes, distributed, score, benchmarks)

    return tyro.cli(options, prog=f"fineline pretrain {name}", args=arguments[1:])


def _train(
    recipe: Recipe, run: Path, accept_changes: bool, distributed: bool, score: str | None, benchmarks: Path | None
) -> int:
    import jax

    if distributed:
        jax.distributed.initialize()
    from fineline_jax.progress import short
    from fineline_jax.training.loop import pretrain as train

    on_kept = None
    if score is not None:
        from fineline_jax.scoring.kept import ScoreKept, open_pack

        tokenizer = Path(recipe.data.sources[0].path).expanduser() / "tokenizer"
        on_kept = ScoreKept(run, recipe.model, open_pack(score, tokenizer, benchmarks), run / "scores")
    outcome = train(recipe, run, accept_changes=accept_changes, on_kept=on_kept)
    if jax.process_index() == 0:
        where = f"step {outcome.step} ({short(outcome.tokens)} tokens)"
        if outcome.stopped_by:
            print(f"stopped by {outcome.stopped_by} at {where}, saved; run the same command again to go on")
        else:
            print(f"{run}: complete at {where}, {len(recipe.kept_steps())} checkpoints kept")
    return 0


@prepare.command(name="text")
def prepare_text(
    inputs: Positional[tuple[Path, ...]],
    tokenizer: Path,
    out: Path,
    sequence_length: int = 2048,
    bos: bool = False,
    eos: bool = True,
    validation_inputs: tuple[Path, ...] = (),
    validation_fraction: float = 0.0,
    text_key: str = "text",
    text_unit: Literal["file", "paragraph", "line"] = "file",
    beam_options: str | None = None,
) -> None:
    """Tokenize documents and pack them into windows of sequence_length + 1 tokens.

    Args:
        inputs: Files or folders of .jsonl (one {"text": ...} per line) or .txt, also .gz.
        tokenizer: Folder with tokenizer.json or tokenizer.model, or one of these files.
        out: Folder to write.
        sequence_length: Tokens the model is fed per window.
        bos: BOS before each document (OpenLLaMA: yes, Amber: no).
        eos: EOS after each document (both: yes).
        validation_inputs: Files or folders of the validation split.
        validation_fraction: Share of the documents that go to the validation split instead.
        text_key: Key of the text in a .jsonl line.
        text_unit: What one document is in a .txt file.
        beam_options: Pack each input file by itself, in parallel on Apache Beam with these options; written with
            the = sign: --beam-options="--runner=FlinkRunner --flink_master=HOST:8081". Needs the `beam` extra.
    """
    from fineline_jax.data.corpora import prepare_text as write

    made = write(
        inputs,
        out,
        tokenizer=tokenizer,
        sequence_length=sequence_length,
        bos=bos,
        eos=eos,
        validation_inputs=validation_inputs,
        validation_fraction=validation_fraction,
        text_key=text_key,
        text_unit=text_unit,
        beam_options=beam_options,
    )
    _say_prepared(made.path, made.windows, made.already_done)


@prepare.command(name="amber")
def prepare_amber(
    inputs: Positional[tuple[Path, ...]],
    out: Path,
    tokenizer: Path | None = None,
    vocab_size: int = 32_000,
    sequence_length: int = 2048,
    validation_inputs: tuple[Path, ...] = (),
    processes: int = 1,
    beam_options: str | None = None,
) -> None:
    """Token lines as Amber's chunks have them, {"token_ids": [2049 ints]}: one split per file, order kept.

    Args:
        inputs: The chunk files, in training order.
        out: Folder to write.
        tokenizer: Folder whose files are copied beside the data, so that scoring finds them.
        vocab_size: Ids must be smaller.
        sequence_length: Tokens the model is fed per window; a line has one more.
        validation_inputs: Files of the validation split.
        processes: Files converted at a time.
        beam_options: Convert the files on Apache Beam with these options instead; written with the = sign:
            --beam-options="--runner=FlinkRunner --flink_master=HOST:8081". Needs the `beam` extra.
    """
    from fineline_jax.data.corpora import prepare_amber as write

    made = write(
        inputs,
        out,
        vocab_size=vocab_size,
        sequence_length=sequence_length,
        tokenizer=tokenizer,
        validation_inputs=validation_inputs,
        processes=processes,
        beam_options=beam_options,
    )
    _say_prepared(made.path, made.windows, made.already_done)


@prepare.command(name="world")
def prepare_world(out: Path = Path("data/world"), seed: int = 0) -> None:
    """The demo's synthetic world: corpus, tokenizer, and its benchmarks in OUT/benchmarks.

    Args:
        out: Folder to write.
        seed: Chooses names, facts, questions and text.
    """
    from fineline_jax.demo import prepare_world as write

    made = write(out, seed)
    _say_prepared(made.path, made.windows, made.already_done)


def _say_prepared(path: Path, windows: dict[str, int], already_done: bool) -> None:
    counts = ", ".join(f"{split}: {count:,} windows" for split, count in windows.items())
    print(f"{path}: {'already prepared' if already_done else 'prepared'} ({counts})")


@tasks.command(name="prepare")
def prepare_tasks(
    suite: Positional[str],
    tokenizer: Path,
    out: Path,
    benchmarks: Path | None = None,
    tfds: Path | None = None,
    bos: Literal["auto", "always", "never"] = "auto",
    max_context: int | None = None,
    limit: int | None = None,
    mode: Literal["lm-eval", "olmes", "opencompass-ppl"] | None = None,
) -> None:
    """Build and tokenize every request of a suite once; scoring then needs neither network nor lm-eval.

    Args:
        suite: Name in configs/suites, a YAML file, or lm-eval task names with commas between.
        tokenizer: Folder of the tokenizer.
        out: Folder of the request pack to write.
        benchmarks: Folder of data sets in Hugging Face layout, one parquet file per split; default: the hub.
        tfds: TFDS data folder, for data sets that TFDS has.
        bos: BOS before each context: as the tokenizer does by default, always, or never.
        max_context: Cut requests to their last so many tokens even where the model could take more.
        limit: Only the first documents of each task.
        mode: How requests are encoded and compared, instead of the suite's own mode; see docs/suites.md.
    """
    from fineline_jax.scoring.pack import prepare as write

    pack = write(
        suite,
        tokenizer,
        out,
        benchmarks=benchmarks,
        tfds=tfds,
        bos=bos,
        max_context=max_context,
        limit=limit,
        mode=mode,
    )
    print(f"{out}: {pack.requests.num_rows:,} requests of {len(pack.manifest['tasks'])} tasks")


@tasks.command(name="plan")
def plan_tasks(pack: Positional[Path], context: int = 2048, row_length: int = 8192) -> None:
    """What the prefix tree saves on each task: tokens fed, against distinct prefixes and one request at a time.

    Args:
        pack: Request pack made by `fineline tasks prepare`.
        context: Tokens the model reads.
        row_length: Longest row, in tokens.
    """
    from fineline_jax.scoring.pack import load
    from fineline_jax.scoring.plan_table import HEADER, plan_table
    from fineline_jax.text_table import text_table

    print(text_table([HEADER, *plan_table(load(pack), context, row_length)], right=range(1, len(HEADER))))


@app.command
def score(
    series: Positional[tuple[str, ...]],
    out: Path,
    suite: str | None = None,
    pack: Path | None = None,
    benchmarks: Path | None = None,
    tfds: Path | None = None,
    tokenizer: Path | None = None,
    bos: Literal["auto", "always", "never"] | None = None,
    max_context: int | None = None,
    limit: int | None = None,
    mode: Literal["lm-eval", "olmes", "opencompass-ppl"] | None = None,
    tokens: str = "",
    every: int = 1,
    downloads: Path | None = None,
    keep_downloads: Literal["yes", "no"] = "yes",
    dtype: Literal["float32", "bfloat16"] = "float32",
    batch_tokens: int | None = None,
    mesh: Mesh = Mesh(),
    part: str | None = None,
    watch: bool = False,
    watch_timeout: float | None = None,
    distributed: bool = False,
) -> None:
    """Score every checkpoint of one or more series; what is already scored is kept.

    A checkpoint that cannot be fetched or opened is passed over; the others are scored, and the exit status is 1.

    Args:
        series: Run folders, checkpoint folders, Hugging Face folders; names of `fineline series`; org/name@revision;
            addresses (hf://, s3://, gs://, http://). @GLOB at the end chooses by name: amber@ckpt_3*.
        out: Folder of the scores, one Parquet file per checkpoint.
        suite: Name in configs/suites, a YAML file, or lm-eval task names with commas between.
        pack: Request pack made by `fineline tasks prepare`, instead of a suite.
        benchmarks: Folder of data sets in Hugging Face layout; default: the hub.
        tfds: TFDS data folder, for data sets that TFDS has.
        tokenizer: Folder of the tokenizer; default: the one beside the checkpoints.
        bos: BOS before each context: as the tokenizer does by default (auto), always, or never; default: as the
            registered series says, else auto.
        max_context: Longest row in tokens, instead of the model's context (lm-eval's max_length).
        limit: Only the first documents of each task.
        mode: How requests are encoded and compared, instead of the suite's own mode; see docs/suites.md.
        tokens: start:stop:spacing, the checkpoints nearest to such a grid of trained tokens: 0:100B:10B, 1T:, ::50B.
        every: Every n-th of the checkpoints that are left.
        downloads: Where remote checkpoints are fetched to; default: ~/.cache/fineline_jax.
        keep_downloads: no removes each download once it is scored; at most two are on disk.
        dtype: Of the matrix products; the softmax is float32 always.
        batch_tokens: Tokens per step over all devices; default: by the kind of device.
        mesh: Devices per axis; default: a whole copy of the weights on each if that fits easily, else shards.
        part: I/N: only the I-th of N parts of the checkpoints, for N machines that do not talk to each other; auto or
            auto/N: from the job's variables (SLURM array, Kubernetes index, Google Batch, TPU worker).
        watch: Score a run that is still training, until all checkpoints of its recipe are scored.
        watch_timeout: End the watch after so many seconds without a new checkpoint; default: never.
        distributed: One of several processes: call jax.distributed.initialize first.
    """
    if (suite is None) == (pack is None):
        raise UserError("score: give either --suite or --pack")
    if watch and len(series) != 1:
        raise UserError("score: --watch takes one run; start one command per run")
    if watch and (tokens or every != 1):
        raise UserError("score: --watch scores every kept checkpoint; leave out --tokens and --every")
    if distributed:
        import jax

        jax.distributed.initialize()
    from fineline_jax.checkpoints.series import first_tokenizer, open_series, scoring_policy
    from fineline_jax.scoring.pack import load
    from fineline_jax.scoring.parts import part_of
    from fineline_jax.scoring.placement import scoring_mesh
    from fineline_jax.scoring.scorer import score_parts
    from fineline_jax.scoring.watching import wait_for_first, watch_run

    chosen = part_of(part, os.environ, distributed=distributed)
    if watch:
        wait_for_first(Path(series[0]), watch_timeout)
    keep = keep_downloads == "yes"
    opened = [open_series(name, tokens=tokens, every=every, downloads=downloads, keep=keep) for name in series]
    if pack is not None:
        requests = load(pack)
    else:
        from fineline_jax.scoring.build import build

        assert suite is not None
        bos = bos or scoring_policy(opened)
        folder = tokenizer or first_tokenizer(opened[0])
        if folder is None:
            raise UserError(f"{series[0]}: no tokenizer beside the checkpoint; give --tokenizer")
        requests = build(
            suite, folder, benchmarks=benchmarks, tfds=tfds, bos=bos, max_context=max_context, limit=limit, mode=mode
        )
    start = functools.partial(
        score_parts, pack=requests, out=out, mesh=scoring_mesh(mesh, opened), dtype=dtype, batch_tokens=batch_tokens
    )
    count = watch_run(Path(series[0]), start, chosen, watch_timeout) if watch else len(start(opened, part=chosen))
    print(f"{out}: {count} checkpoints scored; see `fineline analyze {out}`")


@app.command(name="series")
def list_series(name: Positional[str | None] = None, tokens: str = "", every: int = 1) -> None:
    """The released series that are known; with a name, every checkpoint with its step, tokens and location.

    Args:
        name: A registered series or a YAML file of one, also with @GLOB; or what else `fineline score` takes.
        tokens: start:stop:spacing, the checkpoints nearest to such a grid of trained tokens: 0:100B:10B.
        every: Every n-th of the checkpoints that are left.
    """
    from fineline_jax.checkpoints.series_text import details, overview

    if name is None and (tokens or every != 1):
        raise UserError("series: --tokens and --every choose among checkpoints; name a series first")
    print(overview() if name is None else details(name, tokens, every))


@app.command(name="export-scores")
def export_scores(
    scores: Positional[Path],
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
    from fineline_jax.scoring.lm_eval_export import export
    from fineline_jax.scoring.pack import load

    assert format == "lm-eval"
    written = export(scores, out, load(pack) if pack is not None else None, samples=samples)
    print(f"{out}: {len(written)} checkpoints in lm-eval's layout")


@app.command(name="lm-eval")
def _lm_eval_for_help() -> None:
    """lm-eval's own command with our engine as `--model fineline`: `fineline lm-eval --help`."""


def lm_eval(arguments: list[str]) -> int:
    """`fineline lm-eval …`: lm-eval's command line, in which --model fineline is known."""
    from unittest import mock

    from lm_eval.__main__ import cli_evaluate

    import fineline_jax.scoring.lm_eval_backend  # noqa: F401  registers the model

    with mock.patch.object(sys, "argv", ["lm-eval", *arguments]):
        cli_evaluate()
    return 0


@app.command
def analyze(
    scores: Positional[tuple[Path, ...]],
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
        tokens_per_step: For lm-eval results of a model whose batch size is not known.
    """
    from fineline_jax.analysis import analyze_scores

    print(analyze_scores(scores, out, runs=runs, title=title, tokens_per_step=tokens_per_step))


@app.command(name="export")
def export_checkpoint(
    checkpoint: Positional[str],
    out: Positional[Path],
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
    from fineline_jax.checkpoints.interchange import export_checkpoint as write
    from fineline_jax.checkpoints.series import open_series
    from fineline_jax.mesh import make_mesh

    last = open_series(checkpoint).checkpoints[-1]
    write(last, out, make_mesh(), dtype=dtype, family=layout)
    print(f"{out}: {last.series}/{last.name} in Hugging Face layout")


@app.command(name="import")
def import_weights(
    weights: Positional[Path],
    run: Positional[Path],
    config: str | None = None,
    recipe: str | None = None,
    step: int | None = None,
    tokens: int | None = None,
    tokenizer: Path | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
) -> None:
    """Store released weights as a checkpoint of a run, which can be scored, exported and trained on.

    Args:
        weights: Folder with config.json and safetensors, pytorch_model*.bin or an EasyLM stream; or one such file.
        run: Folder of the run; a new one, or one of the same model that gets a further checkpoint.
        config: config.json, or the recipe whose model it is; default: the config.json beside the weights.
        recipe: Recipe that `fineline pretrain RUN` goes on with, from this checkpoint with a new optimizer state;
            default: none, the run can be scored and exported.
        step: Optimizer steps the weights have had; default: from the folder's name, else 0.
        tokens: Tokens they were trained on; default: from the folder's name, else not known.
        tokenizer: Folder of the tokenizer; default: the one beside the weights.
        dtype: Of the weights stored; default: as they are in the files, float32 with a recipe.
    """
    import jax

    from fineline_jax.catalogue import load_recipe
    from fineline_jax.checkpoints.interchange import import_checkpoint
    from fineline_jax.mesh import make_mesh
    from fineline_jax.training.optimizer import make_optimizer

    goes_on = load_recipe(recipe) if recipe else None
    model = None if config is None else Path(config) if config.endswith(".json") else load_recipe(config).model

    def new_optimizer(recipe: Recipe, params: dict) -> dict:
        return {"opt_state": jax.jit(make_optimizer(recipe.optimizer).init)(params)} if goes_on else {}

    made = import_checkpoint(
        weights,
        run,
        make_mesh(goes_on.mesh if goes_on else Mesh()),
        config=model,
        recipe=goes_on,
        dtype=dtype or ("float32" if goes_on else None),
        step=step,
        tokens=tokens,
        tokenizer=tokenizer,
        more_state=new_optimizer,
    )
    print(f"{made}: {weights} imported")


if __name__ == "__main__":
    sys.exit(main())
