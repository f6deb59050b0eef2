"""Commands end to end on tiny inputs, in numbers; and that each of their options reaches the room it is for."""

import dataclasses
import errno
import json
import logging
import os
import re
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from data_examples import amber, jsonl, letters, letters_tokenizer, stored
from safetensors.numpy import load_file
from scoring_examples import write_tokenizer
from series_examples import CONFIG, fresh_params, make_series, one_device

from fineline_jax import cli, demo, recipe
from fineline_jax.catalogue import load_recipe
from fineline_jax.checkpoints import convert
from fineline_jax.checkpoints.open import open_series
from fineline_jax.checkpoints.runs.digest_record import write_record
from fineline_jax.checkpoints.runs.store import CheckpointStore
from fineline_jax.checkpoints.series import Series
from fineline_jax.cli import main
from fineline_jax.commands import usage
from fineline_jax.data import corpora
from fineline_jax.errors import UserError
from fineline_jax.scoring.options import PackOptions, ScoreOptions
from fineline_jax.text_table import text_table
from fineline_jax.trajectories.readers.options import ReadOptions


class Called:
    """Stands in a room: keeps what it is called with."""

    def __init__(self, result: Any = None):
        self.result, self.calls = result, []

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.calls.append((arguments, options))
        return self.result

    @property
    def last(self) -> tuple[tuple, dict[str, Any]]:
        return self.calls[-1]


# ---- data prepare


def test_every_option_of_a_text_preparation_reaches_it(monkeypatch, capsys):
    write = Called(corpora.Prepared(Path("d"), {"train": 1234567, "validation": 8}, False))
    monkeypatch.setattr(corpora, "prepare_text", write)
    command = ["data", "prepare", "text", "a", "b.txt", "--tokenizer", "t", "--out", "d"]
    assert main(command) == 0
    defaults = {
        "inputs": (Path("a"), Path("b.txt")), "tokenizer": Path("t"), "out": Path("d"), "sequence_length": 2048,
        "bos": False, "eos": True, "validation_inputs": (), "validation_fraction": 0.0, "text_key": "text",
        "text_unit": "file", "skip_bad_lines": 0.0, "beam_options": None,
    }  # fmt: skip
    assert write.last == ((), defaults)
    assert capsys.readouterr().out == "d: prepared (train: 1,234,567 windows, validation: 8 windows)\n"
    write.result = corpora.Prepared(Path("d"), {"train": 1}, True)
    more = "--sequence-length 7 --bos --no-eos --validation-inputs v w --validation-fraction 0.25 --text-key k"
    assert main([*command, *more.split(), "--text-unit", "line", "--beam-options=--runner=X --n=2"]) == 0
    assert write.last[1] == defaults | {
        "sequence_length": 7, "bos": True, "eos": False, "validation_inputs": (Path("v"), Path("w")),
        "validation_fraction": 0.25, "text_key": "k", "text_unit": "line", "skip_bad_lines": 0.0,
        "beam_options": "--runner=X --n=2",
    }  # fmt: skip
    assert capsys.readouterr().out == "d: already prepared (train: 1 windows)\n"


def test_every_option_of_an_amber_preparation_reaches_it(monkeypatch):
    write = Called(corpora.Prepared(Path("d"), {}, False))
    monkeypatch.setattr(corpora, "prepare_amber", write)
    assert main(["data", "prepare", "amber", "a", "b", "--out", "d"]) == 0
    defaults = {
        "inputs": (Path("a"), Path("b")), "out": Path("d"), "tokenizer": None, "vocab_size": 32_000,
        "sequence_length": 2048, "validation_inputs": (), "processes": 1, "beam_options": None,
    }  # fmt: skip
    assert write.last == ((), defaults)
    more = "--tokenizer t --vocab-size 9 --sequence-length 7 --validation-inputs v --processes 3 --beam-options=x"
    assert main(["data", "prepare", "amber", "a", "b", "--out", "d", *more.split()]) == 0
    assert write.last[1] == defaults | {
        "tokenizer": Path("t"), "vocab_size": 9, "sequence_length": 7, "validation_inputs": (Path("v"),),
        "processes": 3, "beam_options": "x",
    }  # fmt: skip


def test_a_text_is_prepared_into_these_windows(tmp_path, capsys):
    (tmp_path / "t").mkdir()
    letters_tokenizer(tmp_path / "t")
    jsonl(tmp_path / "a.jsonl", ["abc", "de", "fghij"])
    out = str(tmp_path / "d")
    options = ["--tokenizer", str(tmp_path / "t"), "--sequence-length", "3", "--bos"]
    assert main(["data", "prepare", "text", str(tmp_path / "a.jsonl"), "--out", out, *options]) == 0
    assert capsys.readouterr().out == f"{out}: prepared (train: 4 windows)\n"
    stream = [1, *letters("abc"), 2, 1, *letters("de"), 2, 1, *letters("fghij"), 2]
    np.testing.assert_array_equal(stored(Path(out), "train"), np.reshape(stream[:16], (4, 4)))
    assert main(["data", "prepare", "text", str(tmp_path / "a.jsonl"), "--out", out, *options]) == 0
    assert "already prepared" in capsys.readouterr().out


def test_amber_lines_are_prepared_into_a_split_each(tmp_path, capsys):
    rows = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    amber(tmp_path / "train_0.jsonl", rows[:2])
    amber(tmp_path / "train_1.jsonl", rows[2:])
    files = [str(tmp_path / f"train_{i}.jsonl") for i in range(2)]
    assert main(["data", "prepare", "amber", *files, "--out", str(tmp_path / "d"), "--sequence-length", "2"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/d: prepared (chunk_000: 2 windows, chunk_001: 1 windows)\n"
    assert [stored(tmp_path / "d", f"chunk_00{i}").tolist() for i in range(2)] == [rows[:2], rows[2:]]


@pytest.fixture
def small_world(monkeypatch) -> list[int]:
    """A world of 200 documents; the seeds it was made of."""
    from fineline_jax.world import generate

    seeds, real = [], generate.generate
    monkeypatch.setattr(generate, "generate", lambda out, seed: seeds.append(seed) or real(out, seed, 200))
    return seeds


def test_the_world_is_prepared_as_the_demo_reads_it(small_world, tmp_path, capsys):
    out = tmp_path / "d"
    assert main(["data", "prepare", "world", "--out", str(out), "--seed", "3"]) == 0
    text = tmp_path / "d.text"
    tokenizer = tokenizers.Tokenizer.from_file(str(text / "tokenizer/tokenizer.json"))
    for split, file in (("train", "train.jsonl"), ("validation", "validation.jsonl")):
        stream = []
        for line in (text / file).read_text().splitlines():
            stream += [1, *tokenizer.encode(json.loads(line)["text"], add_special_tokens=False).ids, 2]
        windows = stored(out, split)
        assert windows.shape[1] == 129 and windows.ravel().tolist() == stream[: windows.size]
        assert len(stream) - windows.size < 129
    said = capsys.readouterr().out
    assert said.startswith(f"{out}: prepared (train: ") and small_world == [3]
    made, copied = text / "benchmarks", out / "benchmarks"
    files = sorted(path.relative_to(made) for path in made.rglob("*.parquet"))
    assert len(files) == 16 and all((copied / f).read_bytes() == (made / f).read_bytes() for f in files)
    for left in (True, False):  # also after an interruption between the windows and the benchmarks
        if not left:
            shutil.rmtree(copied)
            (out / ".benchmarks.x.partial").mkdir()
        assert main(["data", "prepare", "world", "--out", str(out), "--seed", "3"]) == 0
        assert "already prepared" in capsys.readouterr().out
        assert all((copied / f).read_bytes() == (made / f).read_bytes() for f in files)
        assert not (out / ".benchmarks.x.partial").exists()
    seen = Called(corpora.Prepared(Path("d"), {}, False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "prepare_world", seen)
        assert main(["data", "prepare", "world"]) == 0
    assert seen.last == ((Path("data/world"), 0), {})


# ---- demo


SERIES, PACK = Series("run", ()), object()


@pytest.fixture
def steps(monkeypatch) -> dict[str, Called]:
    """The demo's four steps, none of them done."""
    outcome, scored = types.SimpleNamespace(stopped_by=None), Called([])
    made = {
        "fineline_jax.demo.prepare_world": Called(),
        "fineline_jax.training.loop.pretrain": Called(outcome),
        "fineline_jax.scoring.requests.build.build": Called(PACK),
        "fineline_jax.checkpoints.open.open_series": Called(SERIES),
        "fineline_jax.scoring.series.auto_mesh.scoring_mesh": Called("mesh"),
        "fineline_jax.scoring.series.score_series.SeriesScorer": Called(scored),
        "fineline_jax.analysis.analyze_scores": Called(Path("page.html")),
    }
    for name, stand_in in made.items():
        monkeypatch.setattr(name, stand_in)
    return {name.rpartition(".")[2]: stand_in for name, stand_in in made.items()}


def test_the_demo_is_its_four_commands(steps, tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path), "--tokens", "160000"]) == 0
    said = capsys.readouterr()
    assert said.out == f"the report: {Path('page.html').resolve()}\n"
    assert [line.split(":")[0] for line in said.err.splitlines()[:4]] == [
        "1/4 a world to learn", "2/4 train on it", "3/4 score every checkpoint", "4/4 read the curves",
    ]  # fmt: skip
    at, run = tmp_path / "data", tmp_path / "run"
    assert steps["prepare_world"].last == ((at,), {})
    (trained, folder), options = steps["pretrain"].last
    assert folder == run and not any(options.values())
    own = load_recipe("demo")
    world = dataclasses.replace(own.data, sources=(recipe.Source(str(at)),))
    assert trained == dataclasses.replace(own, tokens=160_000, data=world)
    assert steps["build"].last == (("demo", run / "tokenizer", PackOptions(benchmarks=at / "benchmarks")), {})
    assert steps["open_series"].last == ((str(run),), {"tokens": "", "every": 1, "downloads": None, "keep": True})
    assert steps["scoring_mesh"].last == ((own.mesh, [SERIES], "float32"), {})
    assert steps["SeriesScorer"].last == ((PACK, tmp_path / "scores", "mesh", ScoreOptions()), {})
    assert steps["SeriesScorer"].result.last == (([SERIES],), {})
    title = "What a small language model learns, and when"
    assert steps["analyze_scores"].last == (
        ([tmp_path / "scores"], tmp_path / "report"),
        {
            "runs": [run],
            "title": title,
            "reading": ReadOptions(),
            "figure_style": "screen",
            "group": None,
            "pick": 0,
            "growth": False,
            "events": {},
            "live": None,
        },
    )
    assert main(["demo", "--out", str(tmp_path)]) == 0
    assert steps["pretrain"].last[0][0].tokens == own.tokens
    for command in ("data prepare world --out", "pretrain demo --run", "score", "analyze"):
        assert f"fineline {command} {tmp_path}/" in said.err  # what is said can be typed


def test_a_demo_that_is_stopped_scores_nothing_and_is_interrupted(steps, tmp_path, capsys):
    steps["pretrain"].result = types.SimpleNamespace(stopped_by="SIGINT")
    assert main(["demo", "--out", str(tmp_path)]) == 130
    assert "interrupted; run the same command again to go on" in capsys.readouterr().err
    assert not steps["SeriesScorer"].calls and not steps["analyze_scores"].calls


def test_the_demo_goes_on_in_its_own_folder_only(steps, tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path), "--tokens", "160000"]) == 0
    (tmp_path / "run").mkdir()
    (tmp_path / "run/recipe.json").write_text(recipe.to_json(steps["pretrain"].last[0][0]))
    assert main(["demo", "--out", str(tmp_path), "--tokens", "160000"]) == 0
    assert main(["demo", "--out", str(tmp_path), "--tokens", "150000"]) == 2
    assert "tokens: 160000 -> 150000" in capsys.readouterr().err
    assert len(steps["prepare_world"].calls) == 2


# ---- series, export, import


def run_of(folder: Path, steps: dict[int, tuple[int | None, bool]]) -> Path:
    """The records of a run; there are no weights in it."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "recipe.json").write_text("{}")
    for step, (tokens, kept) in steps.items():
        (folder / f"checkpoints/{step}").mkdir()
        write_record(folder / f"checkpoints/{step}", {"step": step, "tokens": tokens, "kept": kept, "recipe": "r"})
    return folder


def test_the_checkpoints_of_a_series_are_a_table(tmp_path, capsys):
    run = run_of(tmp_path / "run", {0: (0, True), 1000: (2_048_000, True), 7: (14_336, True), 1001: (9, False)})
    assert main(["series", str(run)]) == 0
    place = run / "checkpoints"
    table = [
        f"name       step     tokens  {'location'}",
        f"step0         0          0  {place}/0",
        f"step7         7     14,336  {place}/7",
        f"step1000  1,000  2,048,000  {place}/1000",
    ]
    assert capsys.readouterr().out.splitlines() == table
    for options, kept in (
        (["--every", "2"], [0, 2]), (["--tokens", "10K:20K:4K"], [1]), (["--tokens", "1M:"], [2]),
    ):  # fmt: skip
        assert main(["series", str(run), *options]) == 0
        names = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]]
        assert names == [table[1 + i].split()[0] for i in kept], options
    for options in (["--every", "2"], ["--every", "0"], ["--tokens", "1:"]):
        assert main(["series", *options]) == 2
        assert "are about one series; name it first" in capsys.readouterr().err


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Kept steps 1, 2 and 10 and a rolling 11, each with weights of its own."""
    place = tmp_path_factory.mktemp("runs")
    values = recipe.Recipe(
        name="tiny", model=CONFIG, data=recipe.Data((recipe.Source("nowhere"),), sequence_length=32),
        batch=recipe.Batch(2), optimizer=recipe.Optimizer(recipe.Schedule()), tokens=6400,
    )  # fmt: skip
    folder = place / "run"
    write_tokenizer(folder / "tokenizer", adds_bos=True)
    (folder / "recipe.json").write_text(recipe.to_json(values))
    with jax.set_mesh(one_device()), CheckpointStore(
        folder / "checkpoints", (1, 2, 10), record=lambda step: {"tokens": 64 * step, "recipe": "tiny"}
    ) as store:  # fmt: skip
        for step in (1, 2, 10, 11):
            store.maybe_save(step, {"params": fresh_params(step)}, force=step == 11)
    return folder


@pytest.mark.parametrize(
    ("which", "step"), [("run", 10), ("run/checkpoints/2", 2), ("run/checkpoints/11", 11), ("run@step1", 1)]
)
def test_export_writes_the_last_kept_checkpoint_or_the_one_named(which, step, run, tmp_path, capsys):
    assert main(["export", str(run.parent / which), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/out: run/step{step} in Hugging Face layout\n"
    tensors = load_file(tmp_path / "out/model.safetensors")
    with jax.set_mesh(one_device()):
        leaves = {np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(fresh_params(step))}
    assert tensors["model.embed_tokens.weight"].tobytes() in leaves
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (run / "tokenizer/tokenizer.json").read_bytes()


def test_the_options_of_export_and_import_reach_them(run, tmp_path, monkeypatch):
    write = Called()
    monkeypatch.setattr(convert, "export_checkpoint", write)
    assert main(["export", str(run), "out"]) == 0
    (checkpoint, out, mesh), options = write.last
    assert (checkpoint.step, out, options) == (10, Path("out"), {"dtype": None, "family": None})
    assert mesh.axis_names == ("replica", "fsdp", "tensor") and mesh.size == jax.device_count()
    assert main(["export", str(run), "out", "--dtype", "float16", "--layout", "olmo"]) == 0
    assert write.last[1] == {"dtype": "float16", "family": "olmo"}

    made = Called(Path("r/checkpoints/3"))
    monkeypatch.setattr(convert, "import_checkpoint", made)
    assert main(["import", "w", "r"]) == 0
    (given, folder, _), options = made.last
    more = options.pop("more_state")
    nothing = {"config": None, "recipe": None, "dtype": None, "step": None, "tokens": None, "tokenizer": None}
    assert (given, folder, options) == (Path("w"), Path("r"), nothing)
    assert more(load_recipe("demo"), {}) == {}
    arguments = ["--config", "c.json", "--step", "4", "--tokens", "5", "--tokenizer", "t", "--dtype", "bfloat16"]
    assert main(["import", "w", "r", *arguments]) == 0
    options = made.last[1]
    assert {name: options[name] for name in nothing} == {
        "config": Path("c.json"), "recipe": None, "dtype": "bfloat16", "step": 4, "tokens": 5, "tokenizer": Path("t"),
    }  # fmt: skip


def test_an_import_with_a_recipe_is_of_float32_and_has_a_new_optimizer_state(monkeypatch, capsys, tmp_path):
    made = Called(Path("r/checkpoints/3"))
    monkeypatch.setattr(convert, "import_checkpoint", made)
    own = dataclasses.replace(load_recipe("demo"), mesh=recipe.MeshShape(replica=2, fsdp=4))
    (tmp_path / "own.json").write_text(recipe.to_json(own))
    assert main(["import", "w", "r", "--recipe", str(tmp_path / "own.json"), "--config", "llama_60m"]) == 0
    assert capsys.readouterr().out == "r/checkpoints/3: w imported\n"
    (_, _, mesh), options = made.last
    assert (options["recipe"], options["dtype"]) == (own, "float32")
    assert options["config"] == load_recipe("llama_60m").model and dict(mesh.shape) == {
        "replica": 2,
        "fsdp": 4,
        "tensor": 1,
    }
    params = {"a": jnp.ones(3)}
    state = options["more_state"](own, params)
    assert state.keys() == {"opt_state"}
    sizes = {leaf.shape for leaf in jax.tree.leaves(state["opt_state"])}
    assert (3,) in sizes and not any(np.any(leaf) for leaf in jax.tree.leaves(state["opt_state"]))
    assert main(["import", "w", "r", "--recipe", str(tmp_path / "own.json"), "--dtype", "float16"]) == 0
    assert made.last[1]["dtype"] == "float16"
    arguments = ["--recipe", str(tmp_path / "own.json"), "--config", "llama_60m", "--dtype", "bfloat16"]
    assert main(["import", "w", "r", *arguments]) == 0
    assert made.last[1]["dtype"] == "bfloat16"


def test_an_import_is_a_checkpoint_of_the_run_with_the_step_and_tokens_given(run, tmp_path, capsys):
    make_series(tmp_path / "released", run / "tokenizer", (5,))
    target = tmp_path / "imported"
    given = ["import", str(tmp_path / "released/step5"), str(target), "--tokens", "321"]
    assert main(given) == 0
    assert main([*given, "--step", "9"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"{target}/checkpoints/5: {tmp_path}/released/step5 imported"
    found = open_series(str(target)).checkpoints
    assert [(one.step, one.tokens) for one in found] == [(5, 321), (9, 321)]
    shutil.rmtree(target)


# ---- the command itself


@pytest.mark.parametrize(
    ("raised", "status", "said"),
    [
        (UserError("mend it"), 2, "fineline: mend it\n"),
        (KeyboardInterrupt(), 130, "fineline: interrupted; run the same command again to go on\n"),
        (BrokenPipeError(), 0, ""),
        (PermissionError(errno.EACCES, "Denied", "f"), 2, "fineline: f: Denied; check the path and its permissions\n"),
        (OSError(errno.ENOSPC, "Full", "f"), 2, "fineline: f: Full; make room and run the same command again\n"),
        (OSError(errno.EDQUOT, "Quota"), 2, "fineline: Quota; make room and run the same command again\n"),
    ],
)  # fmt: skip
def test_what_ends_a_command_is_one_line_and_a_status(raised, status, said, monkeypatch, capsys):
    def fail(*arguments, **options):
        raise raised

    monkeypatch.setattr("fineline_jax.checkpoints.describe.overview", fail)
    assert main(["series"]) == status
    assert capsys.readouterr().err == said


def test_an_error_has_the_status_it_asks_for_and_a_librarys_is_not_hidden(monkeypatch):
    class Partly(UserError):
        exit_status = 1

    def fail(error: Exception):
        def raising() -> str:
            raise error

        monkeypatch.setattr("fineline_jax.checkpoints.describe.overview", raising)
        return main(["series"])

    assert fail(Partly("some")) == 1
    with pytest.raises(OSError, match="of a library"):
        fail(OSError("of a library"))
    with pytest.raises(ZeroDivisionError):
        fail(ZeroDivisionError())


def test_the_command_reads_its_own_arguments_and_sets_the_stage_once(monkeypatch, capsys):
    monkeypatch.setattr("fineline_jax.checkpoints.describe.overview", lambda: "all series")
    for name, value in (
        ("TF_CPP_MIN_LOG_LEVEL", "2"),
        ("TOKENIZERS_PARALLELISM", "true"),
        ("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1"),
    ):
        monkeypatch.setenv(name, "mine")
        assert main(["series"]) == 0 and os.environ[name] == "mine"
        monkeypatch.delenv(name)
        assert main(["series"]) == 0 and os.environ[name] == value
    capsys.readouterr()
    prepared = Called()
    monkeypatch.setattr(cli, "prepare_cpu", prepared)
    monkeypatch.setattr("fineline_jax.checkpoints.describe.overview", lambda: f"{len(prepared.calls)} before it")
    assert main(["series"]) == 0 and capsys.readouterr().out == "1 before it\n"
    monkeypatch.setattr("fineline_jax.checkpoints.describe.overview", lambda: "all series")
    monkeypatch.setattr(sys, "argv", ["fineline", "series"])
    assert main() == 0 and capsys.readouterr().out == "all series\n"
    before = logging.root.level
    try:
        monkeypatch.setattr(logging.root, "handlers", [])
        logging.getLogger("fineline_jax").setLevel(logging.NOTSET)
        assert main(["series"]) == 0
        assert (logging.root.level, logging.getLogger("fineline_jax").level) == (logging.ERROR, logging.INFO)
        logging.getLogger("another").warning("not for the user")
        logging.getLogger("fineline_jax.x").info("for the user")
        assert capsys.readouterr().err == "for the user\n"
    finally:
        logging.root.setLevel(before)


def test_what_orbax_logs_and_raises_too_is_said_once():
    def record(name: str, exception: bool) -> logging.LogRecord:
        return logging.LogRecord(
            name, logging.ERROR, "f", 1, "m", None, (ValueError, ValueError(), None) if exception else None
        )

    seen = [cli._is_not_raised(record(name, with_it)) for name in ("absl", "jax") for with_it in (True, False)]
    assert seen == [False, True, True, True]


def test_what_tensorstore_prints_after_a_failed_save_is_not_shown(capsys, monkeypatch):
    """Its threads ask the closed loop of Orbax to go on; Python prints what they raise with a traceback."""

    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    main(["--version"])

    class Raises:
        def __init__(self, error: Exception):
            self.error = error

        def __del__(self) -> None:
            raise self.error

    Raises(RuntimeError("Event loop is closed"))
    assert capsys.readouterr().err == ""
    Raises(ValueError("another"))
    assert "ValueError: another" in capsys.readouterr().err


def test_the_commands_are_listed_in_the_order_in_which_a_run_needs_them(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    names = "demo data plan pretrain tasks score show analyze ablate series export import export-scores traces lm-eval"
    assert re.findall(r"^[│ ]+• ([a-z-]+) +\S", said, re.M) == names.split()


def test_what_the_parser_says_beside_its_result_is_passed_on(capsys):
    assert usage.parsed("fineline x", lambda: print("a warning", file=sys.stderr) or 5) == 5
    assert capsys.readouterr().err == "a warning\n"


def test_lm_evals_command_line_is_given_the_arguments_behind_ours(monkeypatch):
    seen: list[list[str]] = []
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: seen.append(list(sys.argv)))
    before = list(sys.argv)
    assert main(["lm-eval", "--model", "fineline", "--tasks", "x"]) == 0
    assert seen == [["lm-eval", "--model", "fineline", "--tasks", "x"]] and sys.argv == before


def test_a_table_is_as_wide_as_its_widest_cells():
    rows = [("name", "n", "what"), ("a", "1,000", "x"), ("longer", "5", "")]
    assert text_table(rows, right=[1]) == "name        n  what\na       1,000  x\nlonger      5"
    assert text_table(rows) == "name    n      what\na       1,000  x\nlonger  5"


def test_what_lm_eval_could_not_write_is_an_error(monkeypatch, capsys):
    """It logs that and ends well, here as lm-eval 0.4.9 words it."""
    log = logging.getLogger("lm_eval.loggers.evaluation_tracker")

    def evaluate() -> None:
        log.warning("Could not save results aggregated")
        log.info(repr(OSError(28, "No space left on device")))

    monkeypatch.setattr(log, "level", logging.INFO)
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", evaluate)
    assert main(["lm-eval", "--output_path", "x"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == (
        "fineline: lm-eval: Could not save results aggregated (OSError(28, 'No space left on device')); see that"
        " --output_path can be written and run again"
    )
