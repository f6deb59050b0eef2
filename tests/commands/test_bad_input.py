"""Bad input through the command: one line that names file, key or flag, exit status 2, and nothing is written."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from data_examples import amber, jsonl
from scoring_examples import write_benchmarks, write_tokenizer
from series_examples import make_series

from fineline_jax import prepare_pack
from fineline_jax.catalogue import load_recipe
from fineline_jax.cli import main
from fineline_jax.data.corpora import prepare_amber
from fineline_jax.recipe import Source, to_json

RECIPE = """
from fineline_jax.models.config import ModelConfig
from fineline_jax.recipe import *

def recipe():
    model = ModelConfig(vocab_size=512, width=16, layers=1, heads=2, mlp_width=16, context=96)
    data, optimizer = Data((Source("data"),), sequence_length=8), Optimizer(Schedule())
    compute, logging = Compute(dtype="float32", remat="none"), Logging(tensorboard=False)
    mesh = MeshShape(fsdp=1)
    return Recipe("mini", model, data, Batch(4), optimizer, 128, mesh=mesh, compute=compute, logging=logging)
"""
Spoil = Callable[[Path], object]
SIZE = "--sequence-length 8"
TASKS = "--tokenizer tokenizer --benchmarks benchmarks"


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """Everything that a command may be given, as it should be."""
    folder = tmp_path_factory.mktemp("good")
    tokenizer = write_tokenizer(folder / "tokenizer", adds_bos=True)
    other = write_tokenizer(folder / "other_tokenizer", adds_bos=False)
    state = json.loads((other / "tokenizer.json").read_text())
    state["model"]["merges"].pop()
    (other / "tokenizer.json").write_text(json.dumps(state))
    benchmarks = write_benchmarks(folder / "benchmarks", documents=4)
    make_series(folder / "series", tokenizer, (1,))
    prepare_pack("piqa", tokenizer, folder / "pack", benchmarks=benchmarks)
    prepare_pack("piqa", other, folder / "other_pack", benchmarks=benchmarks)
    (folder / "mini.py").write_text(RECIPE)
    windows = [[(7 * i + j) % 400 for j in range(9)] for i in range(70)]
    for name in ("train_0.jsonl", "validation.jsonl"):
        amber(folder / name, windows)
    prepare_amber(
        [folder / "train_0.jsonl"], folder / "data", vocab_size=512, sequence_length=8, tokenizer=tokenizer,
        validation_inputs=[folder / "validation.jsonl"],
    )  # fmt: skip
    jsonl(folder / "text.jsonl", ["the cat runs under the house"] * 30)
    (folder / "table.csv").write_text("series,tokens,task,metric,value\na,1,piqa,acc,0.5\na,2,piqa,acc,0.6\n")
    (folder / "run").mkdir()
    (folder / "run/metrics.jsonl").write_text('{"step": 1, "tokens": 32, "loss": 2.0}\n')
    (folder / "a_file").touch()
    return folder


def cut(path: str, size: int = 100) -> Spoil:
    return lambda folder: [file.write_bytes(file.read_bytes()[:size]) for file in folder.glob(path)]


def gone(path: str) -> Spoil:
    return lambda folder: [file.unlink() for file in folder.glob(path)]


def holding(path: str, content: str | bytes) -> Spoil:
    def write(folder: Path) -> None:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content if isinstance(content, bytes) else content.encode())

    return write


def as_it_is(folder: Path) -> None:
    pass


def without_documents(folder: Path) -> None:
    file = folder / "benchmarks/baber__piqa/validation.parquet"
    pq.write_table(pq.read_table(file).slice(0, 0), file)


DEEP = "[" * 100_000
CASES: list[tuple[str, Spoil, str]] = [
    # pretrain
    ("pretrain mini.py --run a_file", as_it_is, "a_file.*: Not a directory"),
    (
        "pretrain run/recipe.json",
        holding("run/recipe.json", b"\xff\xfe"),
        r"run/recipe\.json: Invalid JSON.*`fineline pretrain` with the run's recipe writes it again",
    ),
    ("pretrain mini.py --run x", gone("data/*array_record*"), r"data: split \w+ cannot be read .* prepare it again"),
    ("pretrain mini.py --run x", cut("data/*array_record*"), r"data: split \w+ cannot be read .* prepare it again"),
    ("pretrain mini.py --run x", holding("data/dataset_info.json", "{"), "data: not a prepared data set"),
    (
        "pretrain mini.py --run x",
        holding("data/metadata.json", '{"sequence_length": 8, "vocab_size": "many"}'),
        "data: not a prepared data set",
    ),
    ("pretrain mini.py --run x --loss.ignore-token 512", as_it_is, "loss.ignore_token=512 is no id"),
    ("pretrain mini.py --run x --loss.ignore-token -1", as_it_is, "loss.ignore_token=-1 is no id"),
    (
        "pretrain mini.py --run x --logging.profile-steps 1 --logging.profile-start-step 4",
        as_it_is,
        "logging.profile_start_step=4 is behind the last of 4 steps",
    ),
    ("pretrain mini.py --run x --benchmarks benchmarks", as_it_is, "--benchmarks are the documents of --score SUITE"),
    ("pretrain mini.py --run x --score other_pack", as_it_is, "the tokenizer of data .* is not the one the pack"),
    ("pretrain mini.py --run x --score piqa --benchmarks nowhere", as_it_is, "--benchmarks nowhere: no such folder"),
    ("pretrain mini.py --run x --score no_suite --benchmarks benchmarks", as_it_is, "no task or group .* 'no_suite'"),
    ("pretrain mini.py --run x --data.sequence-length 4", as_it_is, "data: prepared with sequence_length=8"),
    (  # 192 G parameters of 16 bytes: weights, two moments, gradient
        "pretrain mini.py --run x --model.mlp-width 4000000000",
        as_it_is,
        r"mini cannot fit on 1 x cpu: at least 2861\.\d\d GiB of \d+\.\d\d per device; more --batch.accumulation, ",
    ),
    ("pretrain mini.py --run x --mesh.fsdp -1 --mesh.tensor -1", as_it_is, "at most one axis may be -1"),
    # data
    (
        f"data prepare text deep.jsonl --tokenizer tokenizer --out x {SIZE}",
        holding("deep.jsonl", f"\n{DEEP}\n"),
        r"deep\.jsonl:2: not JSON",
    ),
    (
        f"data prepare amber deep.jsonl --out x {SIZE}",
        holding("deep.jsonl", '{"token_ids": ' + DEEP + "\n"),
        r"deep\.jsonl:1: not JSON",
    ),
    (
        f"data prepare text half.jsonl --tokenizer tokenizer --out x {SIZE}",
        holding("half.jsonl", '{"text": "a"}\n{"text": "b \\ud800 c"}\n'),
        r"half\.jsonl:2: half of a surrogate pair",
    ),
    (
        f"data prepare text bad.jsonl.gz --tokenizer tokenizer --out x {SIZE}",
        holding("bad.jsonl.gz", b"\x1f\x8b\x08 this is not what gzip writes"),
        r"bad\.jsonl\.gz:1: cannot be read .* fetch the file again",
    ),
    (
        f"data prepare text bad.txt.gz --tokenizer tokenizer --out x {SIZE}",
        holding("bad.txt.gz", b"\x1f\x8b\x08 this is not what gzip writes"),
        r"bad\.txt\.gz: cannot be read .* fetch the file again",
    ),
    (
        f"data prepare text text.jsonl --tokenizer tokenizer --out x {SIZE}",
        holding("tokenizer/tokenizer_config.json", "[1]"),
        r"tokenizer_config\.json: no JSON object; repair",
    ),
    (f"data prepare text text.jsonl --tokenizer tokenizer --out a_file {SIZE}", as_it_is, "a_file: exists and is not"),
    (f"data prepare amber train_0.jsonl --out x {SIZE} --processes 0", as_it_is, "processes=0 must be at least 1"),
    ("data prepare world --out series", as_it_is, "series: exists and is not empty"),
    # tasks
    (f"tasks prepare s.yaml {TASKS} --out x", holding("s.yaml", b"\xff\xfe\x00"), r"s\.yaml: not a text file"),
    (f"tasks prepare series.yaml {TASKS} --out x", lambda f: (f / "series.yaml").mkdir(), r"series\.yaml: Is a dir"),
    (
        f"tasks prepare s.yaml {TASKS} --out x",
        holding("s.yaml", "tasks: [{task: piqa, metric: acc_nrom}]"),
        "task 'piqa' has no metric 'acc_nrom'; name one of acc, acc_bytes, acc_norm",
    ),
    (
        f"tasks prepare piqa {TASKS} --out x",
        holding("benchmarks/baber__piqa/validation.parquet", b"PAR1 and no more"),
        r"task 'piqa': .*baber__piqa/validation\.parquet",
    ),
    (f"tasks prepare piqa {TASKS} --out x", without_documents, "task 'piqa': lm-eval cannot use its data set"),
    (f"tasks prepare piqa {TASKS} --out a_file", as_it_is, "a_file exists and is not a request pack"),
    ("tasks plan pack --context 0", as_it_is, "--context 0 must be at least 1"),
    ("tasks plan pack --row-length -1", as_it_is, "--row-length -1 must be at least 1"),
    # score
    ("score series --pack pack --out x --limit 3 --bos never", as_it_is, "--bos, --limit went into --pack"),
    ("score series --pack pack --out x --watch-timeout -1", as_it_is, "--watch-timeout -1.0 must not be negative"),
    ("score series --pack pack --out x --mesh.fsdp 3", as_it_is, "mesh.fsdp=3, mesh.tensor=1 does not divide"),
    ("score series --pack pack --out x --tokens 1:2:x", as_it_is, "--tokens 1:2:x: 'x' is no amount of tokens"),
    ("score series --pack pack --out a_file/x", as_it_is, "a_file.*(Not a directory|no scores can be written)"),
    # analyze
    ("analyze table.csv --out x --runs nowhere", as_it_is, r"nowhere/metrics\.jsonl: not there"),
    (
        "analyze table.csv --out x --runs run",
        holding("run/metrics.jsonl", '{"step": 1}\n[1]\n'),
        r"metrics\.jsonl:2: no line of metrics \(it has no step\); remove it",
    ),
    ("analyze table.csv --out x --tokens-per-step -1", as_it_is, "--tokens-per-step -1.0 must be a positive number"),
    ("analyze table.csv --out a_file", as_it_is, "a_file: File exists"),
    ("analyze empty --out x", lambda f: shutil.copytree(f / "pack", f / "empty/pack"), "empty: holds no scores yet"),
    (
        "analyze trees --out x",
        holding("trees/results_1.json", '{"results": {"piqa": 3}, "model_name": "m-step1"}'),
        r"results_1\.json: 'results\.piqa' is no table",
    ),
    (
        "analyze trees --out x",
        holding("trees/results_1.json", '{"results": {"piqa": {"acc,none": 0.5}}, "config": 3}'),
        r"results_1\.json: 'config' is no table",
    ),
    ("analyze table.csv run --out ./run", as_it_is, "--out run: is one of the inputs; give another folder"),
    ("export-scores series --out series", as_it_is, "--out series: is the folder of the scores; give another"),
    ("export-scores empty --out x", lambda f: shutil.copytree(f / "pack", f / "empty/pack"), "no scores yet"),
    # demo
    ("demo --out a_file", as_it_is, "a_file"),
    ("demo --out x --tokens 1", as_it_is, "recipe demo: tokens=1 is less than one step"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("command", "spoil", "message"), CASES, ids=[f"{i}: {case[0]}" for i, case in enumerate(CASES)]
)
def test_bad_input_is_one_line_and_writes_nothing(command, spoil, message, good, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "place"
    shutil.copytree(good, folder)
    spoil(folder)
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    assert main(command.split()) == 2
    line = [line for line in capsys.readouterr().err.splitlines() if not re.match(r"\d/4 |prepare ", line)]
    assert len(line) == 1 and line[0].startswith("fineline: ") and re.search(message, line[0]), line
    after = [path for path in folder.rglob("*") if path not in before and path.relative_to(folder).parts[0] != "x"]
    assert not after
    assert_nothing_half_written(folder / "x")


def assert_nothing_half_written(out: Path) -> None:
    """A run that has not begun may have its recipe, data and tokenizer there; nothing else is."""
    if out.exists():
        may_be = {"recipe.json", "history.json", "tokenizer", "checkpoints", "metrics.jsonl"}
        assert {path.name for path in out.iterdir()} <= may_be
        assert not list((out / "checkpoints").iterdir())
        assert json.loads((out / "recipe.json").read_text())["name"] == "mini"


def test_a_demo_of_other_settings_says_how_to_have_both(tmp_path, capsys):
    recipe = load_recipe("demo")
    data = dataclasses.replace(recipe.data, sources=(Source(str(tmp_path / "data")),))
    recipe = dataclasses.replace(recipe, data=data, tokens=recipe.tokens // 2)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/recipe.json").write_text(to_json(recipe))
    assert main(["demo", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert re.search(r"holds another demo \(.*tokens: \d+ -> .*\); delete it, or name another folder by --out", error)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_wrong_pack_does_not_stay_in_the_folder_of_the_scores(good, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(good)
    assert main(["score", "series", "--pack", "other_pack", "--out", str(tmp_path / "out")]) == 2
    assert "is not the one the pack was prepared with" in capsys.readouterr().err
    assert main(["score", "series", "--pack", "pack", "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out/series/step1.parquet").is_file()


@pytest.mark.parametrize("command", ["pretrain mini.py --run x", "score series --pack pack --out x"])
def test_distributed_without_other_processes_is_one_line(command, good):
    """In a process of its own: jax.distributed comes before anything else of JAX."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "OMPI", "TPU"))}
    arguments = [sys.executable, "-m", "fineline_jax", *command.split(), "--distributed"]
    done = subprocess.run(arguments, cwd=good, env=variables, capture_output=True, text=True)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("fineline: --distributed: the processes did not find each other (")
    assert not (good / "x").exists()
