"""The command: quick help, every option documented, bad input in one line with exit status 2."""

import dataclasses
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fineline_jax.catalogue import load_recipe
from fineline_jax.checkpoints.open import open_series
from fineline_jax.cli import main
from fineline_jax.commands import data, pretrain
from fineline_jax.data import corpora
from fineline_jax.recipe import from_json, to_json
from fineline_jax.trajectories.table import read_table
from fineline_jax.world.catalogue import TASKS

COMMANDS = (
    ["demo"],
    ["pretrain"],
    ["pretrain", "amber_7b"],
    ["data", "prepare", "text"],
    ["data", "prepare", "amber"],
    ["data", "prepare", "world"],
    ["tasks", "prepare"],
    ["tasks", "plan"],
    ["series"],
    ["import"],
    ["export-scores"],
    ["score"],
    ["analyze"],
    ["export"],
)


def test_help_answers_in_under_a_second_and_imports_nothing_heavy():
    program = "import sys, time; from fineline_jax.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    heavy = "assert not {'jax', 'transformers', 'lm_eval', 'tensorflow_datasets', 'pandas'} & set(sys.modules)\n"
    # Processor time: what others do on this machine is not the command's fault.
    clock = "sys.exit(time.process_time() >= 1.0)"
    done = subprocess.run([sys.executable, "-c", program + heavy + clock], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "pretrain" in done.stdout


@pytest.mark.parametrize(
    ("command", "function"),
    [
        (data.prepare_text, corpora.prepare_text),
        (data.prepare_amber, corpora.prepare_amber),
    ],
)
def test_the_options_of_a_preparation_are_those_of_the_function_behind_it(command, function):
    theirs = inspect.signature(function).parameters
    for name, option in inspect.signature(command).parameters.items():
        assert option.default == theirs[name].default, name


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--help"])
    assert stopped.value.code == 0
    assert len(capsys.readouterr().out) > 200


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["pretrain"], "name a recipe first"),
        (["pretrain", "no_such_recipe"], "no recipe named 'no_such_recipe'"),
        (["pretrain", "no/such/file.py"], "no/such/file.py"),
        (["pretrain", "llama_60m", "--model.layers", "0"], "model.layers=0"),
        (["pretrain", "llama_60m", "--batch.accumulation", "7"], "batch.accumulation=7"),
        (["pretrain", "llama_60m", "--mesh.fsdp", "3"], "mesh.fsdp=3"),
        (["pretrain", "llama_60m", "--data.sources.0.path", "no/such/data"], "no/such/data"),
        (["pretrain", "llama_60m", "--compute.attention", "splash"], "compute.attention='splash'"),
        (["data", "prepare", "text", "no/such.txt", "--tokenizer", "no/such", "--out", "x"], "no/such"),
        (["tasks", "prepare", "no_such_suite_or_task", "--tokenizer", "no/such", "--out", "x"], "no/such"),
        (["score", "no/such/run", "--suite", "core", "--out", "x"], "no/such/run"),
        (["score", "no/such/run", "--out", "x"], "--suite or --pack"),
        (["score", "--suite", "core", "--out", "x"], "at least one series"),
        (["data", "prepare", "text", "--tokenizer", "no/such", "--out", "x"], "no/such"),
        (["data", "prepare", "world", "--out", "a_file/world"], "a_file"),
        (["pretrain", "llama_60m", "--logging.validation.0.windows", "-1"], "logging.validation.0.windows"),
        (["pretrain", "llama_60m", "--seed", "-1"], "seed=-1"),
        (["pretrain", "llama_60m", "--optimizer.schedule.peak", "inf"], "optimizer.schedule.peak"),
        (["score", "no/such/run", "--pack", "no/such/pack", "--out", "x"], "no/such/"),
        (["analyze", "no/such/scores", "--out", "x"], "no/such/scores"),
        (["export", "no/such/run", "x"], "no/such/run"),
    ],
)
def test_bad_input_is_one_line_that_names_it_and_exit_status_2(arguments, named, capsys, tmp_path, monkeypatch):
    configs = Path("configs").resolve()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(configs)
    (tmp_path / "a_file").touch()
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("fineline: ") and named in error and "\n" not in error
    assert not (tmp_path / "x").exists()


def sized(tmp_path: Path, **sizes: int) -> str:
    recipe = load_recipe("llama_60m")
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, **sizes))
    (tmp_path / "mine.json").write_text(to_json(recipe))
    return str(tmp_path / "mine.json")


@pytest.mark.parametrize(
    ("own", "options", "expected"),
    [
        # (kv_heads, head_dim) of the recipe, of width 512 and 8 heads; options; (heads, kv_heads, head_dim)
        ((8, 64), ["--model.heads", "4"], (4, 4, 128)),
        ((8, 64), ["--model.heads=16", "--model.width=1024"], (16, 16, 64)),
        ((8, 64), ["--model.width", "256"], (8, 8, 32)),
        ((8, 64), ["--model.heads", "4", "--model.kv-heads", "2"], (4, 2, 128)),
        ((8, 64), ["--model.heads", "4", "--model.kv_heads=2", "--model.head_dim=8"], (4, 2, 8)),
        ((8, 64), ["--model.mlp-width", "8"], (8, 8, 64)),
        ((4, 64), ["--model.heads", "16"], (16, 4, 32)),
        ((8, 32), ["--model.heads", "4"], (4, 4, 32)),
        ((8, 32), ["--model.width", "1024"], (8, 8, 32)),
        ((2, 96), ["--model.heads", "4", "--model.width", "64"], (4, 2, 96)),
    ],
)
def test_sizes_follow_heads_and_width_where_the_recipes_did_and_only_there(
    own, options, expected, tmp_path, monkeypatch
):
    kv_heads, head_dim = own
    seen = []
    monkeypatch.setattr(pretrain, "_train", lambda recipe, *rest, **options: seen.append(recipe.model) or 0)
    assert main(["pretrain", sized(tmp_path, kv_heads=kv_heads, head_dim=head_dim), *options]) == 0
    [model] = seen
    assert (model.heads, model.kv_heads, model.head_dim) == expected


@pytest.mark.parametrize("boxes", [False, True])
@pytest.mark.parametrize("columns", ["40", "200"])
@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ("", r"Expected one of {demo, data, .*, lm-eval}; see `fineline --help`"),
        ("frob", r"Unrecognized options: frob; Available subcommands: demo, .*, lm-eval; see `fineline --help`"),
        ("data prepare", r"Expected one of {text, amber, world}; see `fineline --help`"),
        ("score", r"Missing from fineline score: --out PATH Folder of the scores, .*; see `fineline score --help`"),
        ("score x --out", r"Missing value for argument '--out'. Expected 1 values; see `fineline score --help`"),
        (
            "score x --out y --suit core",
            r"Unrecognized options: --suit, core; perhaps --suite; see `fineline score --help`",
        ),
        ("analyze x --out y --suit core", r"Unrecognized options: --suit, core; see `fineline --help`"),
        (
            "score x --out y --dtype half",
            r"invalid choice 'half' for argument '--dtype'. Expected one of .*; see `fineline score --help`",
        ),
        (
            "data prepare text x --tokenizer y --out z --text-kye t",
            r"Unrecognized options: --text-kye, t; perhaps --text-key; see `fineline data prepare text --help`",
        ),
        (
            "pretrain demo --sede 3",
            r"Unrecognized options: --sede, 3; perhaps --seed; see `fineline pretrain demo --help`",
        ),
        (
            "pretrain demo --seed x",
            r"Error parsing --seed: invalid literal .* 'x'; see `fineline pretrain demo --help`",
        ),
        (
            "score runs/mine --tasks piqa --out y",
            r"--tasks is an option of lm-eval; `fineline score` has --suite, which also takes task names with .*",
        ),
        ("score x --batch-size=3", r"--batch-size is an option of lm-eval; `fineline score` has --batch-tokens"),
        (
            "pretrain demo --batch_size=3",
            r"--batch_size is .*; `fineline pretrain` has --batch.sequences",
        ),
        ("score x --seed 3", r"--seed is an option of lm-eval; --fewshot-seed is that of .*; leave it out"),
        ("score x --log_samples", r"--log_samples is an option of lm-eval; .* `fineline export-scores` then writes .*"),
        ("score x --apply_chat_template", r"--apply_chat_template is .*; `fineline score` has --chat-template .*"),
        (
            "score x --trust_remote_code",
            r"--trust_remote_code is .*; no code .* is run here; leave it out",
        ),
        ("tasks prepare x --max_length 9", r"--max_length is .*; `fineline tasks prepare` has --max-context"),
        ("lm_eval --model x", r"no command is called lm_eval; did you mean lm-eval\?"),
        ("scoer x --out y", r"no command is called scoer; did you mean score\?; see `fineline --help`"),
        ("data prepar text", r"no command is called prepar; did you mean prepare\?; see `fineline --help`"),
        ("score x --out y --suite core --max-context 0.1", "--max-context 0.1 must be a whole number; see `.*`"),
        ("score x --out y --suite core --limit half", "--limit half must be a number; see `fineline --help`"),
        ("--version x", r"Unrecognized options: --version, x; .*; see `fineline --help`"),
    ],
)
def test_what_cannot_be_parsed_is_said_in_one_line(typed, line, columns, boxes, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr("tyro._fmtlib._FORCE_UTF8_BOXES", boxes)
    assert main(typed.split()) == 2
    said = capsys.readouterr()
    assert not said.out and re.fullmatch(f"fineline: {line}\n", said.err), said.err


@pytest.mark.slow
def test_the_demo_makes_a_world_a_series_scores_and_a_report(tmp_path):
    arguments = [
        sys.executable,
        "-m",
        "fineline_jax",
        "demo",
        "--out",
        str(tmp_path / "demo"),
        "--tokens",
        "160000",
    ]
    done = subprocess.run(arguments, capture_output=True, text=True, env=None)
    assert done.returncode == 0, done.stderr
    report = tmp_path / "demo" / "report" / "report.html"
    assert str(report) in done.stdout and report.stat().st_size > 1e6
    recipe = from_json(tmp_path / "demo" / "run" / "recipe.json")
    kept = {checkpoint.name for checkpoint in open_series(str(tmp_path / "demo" / "run")).checkpoints}
    assert recipe.tokens == 160_000 and kept == {f"step{step}" for step in recipe.kept_steps()}
    table = read_table(tmp_path / "demo" / "report")
    assert {name: set(part.checkpoint) for name, part in table.groupby("task")} == {name: kept for name in TASKS}
    pictures = {path.stem for path in (tmp_path / "demo" / "report" / "figures").glob("*.png")}
    assert pictures >= {"overview", *(task.domain for task in TASKS.values())}
    again = subprocess.run(arguments, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
