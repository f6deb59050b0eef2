"""The command: quick help, every option documented, bad input in one line with exit status 2."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fineline_jax.cli import main

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
    program = "import sys; from fineline_jax.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    heavy = "assert not {'jax', 'transformers', 'lm_eval', 'tensorflow_datasets', 'pandas'} & set(sys.modules)"
    times = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", program + heavy], capture_output=True, text=True)
        times.append(time.perf_counter() - start)
        assert done.returncode == 0, done.stderr
    assert min(times) < 1.0
    assert "pretrain" in done.stdout


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
        (["score", "no/such/run", "--pack", "no/such/pack", "--out", "x"], "no/such/"),
        (["analyze", "no/such/scores", "--out", "x"], "no/such/scores"),
        (["export", "no/such/run", "x"], "no/such/run"),
    ],
)
def test_bad_input_is_one_line_that_names_it_and_exit_status_2(arguments, named, capsys, tmp_path, monkeypatch):
    configs = Path("configs").resolve()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(configs)
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("fineline: ") and named in error and "\n" not in error
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("arguments", [["pretrain", "llama_60m", "--seed", "x"], ["score"], ["nonsense"]])
def test_options_that_do_not_parse_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2


@pytest.mark.slow
def test_the_demo_makes_a_world_a_series_scores_and_a_report(tmp_path):
    arguments = [
        sys.executable,
        "-m",
        "fineline_jax.cli",
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
    assert json.loads((tmp_path / "demo" / "run" / "recipe.json").read_text())["tokens"] == 160_000
    again = subprocess.run(arguments, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
