"""The Python interface: light to import, and its functions do what the commands do."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pandas
import pyarrow.parquet as pq
import pytest
from docs_pages import python_blocks
from loaded_modules import HEAVY, modules_after
from safetensors.numpy import load_file
from scoring_examples import write_benchmarks, write_tokenizer
from series_examples import make_series

import fineline_jax
from fineline_jax.catalogue import load_recipe
from fineline_jax.data.corpora import prepare_text
from fineline_jax.errors import UserError
from fineline_jax.scoring.options import PackOptions, ScoreOptions
from fineline_jax.world.generate import generate


def test_the_package_is_imported_in_a_fifth_of_a_second_and_loads_nothing_heavy():
    clock = "import time; start = time.process_time(); import fineline_jax; took = time.process_time() - start"
    done = subprocess.run([sys.executable, "-c", f"{clock}; print(took)"], capture_output=True, text=True)
    assert float(done.stdout) < 0.2, done.stderr
    every = "\n".join(f"fineline_jax.{name}" for name in fineline_jax.__all__)
    assert not modules_after(f"import fineline_jax\n{every}\n") & (HEAVY | {"numpy", "pyarrow"})


def test_every_name_of_the_interface_is_there_and_explained_and_no_other_is():
    names = {"pretrain", "open_series", "prepare_pack", "score", "analyze", "ablate", "export", "Recipe", "ModelConfig"}
    assert set(fineline_jax.__all__) == names <= set(dir(fineline_jax))
    assert all(getattr(fineline_jax, name).__doc__ for name in names)
    for name in ("trian", "Path", "_prepare_cpu"):
        with pytest.raises(AttributeError, match=f"module 'fineline_jax' has no attribute '{name}'"):
            getattr(fineline_jax, name)


def test_python_runs_the_command_too():
    done = subprocess.run([sys.executable, "-m", "fineline_jax", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"fineline {fineline_jax.__version__}\n")


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_shell_completes_commands_and_options(shell):
    arguments = [sys.executable, "-m", "fineline_jax", "--tyro-print-completion", shell]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0 and "export-scores" in done.stdout and "--keep-downloads" in done.stdout


def test_a_process_without_jax_gets_a_device_per_core_as_the_command_has_and_no_other():
    call = "try: fineline_jax.score([], 'no/such/pack', 'x')\nexcept fineline_jax.errors.UserError: pass\n"
    show = "import os; print('JAX_NUM_CPU_DEVICES' in os.environ)"
    variables = {name: os.environ[name] for name in os.environ if name not in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS")}
    for first, prepared in (("import fineline_jax", "True"), ("import fineline_jax, jax", "False")):
        program = [sys.executable, "-c", f"{first}\n{call}{show}"]
        done = subprocess.run(program, capture_output=True, text=True, env=variables | {"JAX_PLATFORMS": "cpu"})
        assert done.stdout.split() == [prepared], done.stderr


@pytest.fixture
def world(tmp_path, monkeypatch) -> Path:
    """A small world as `fineline demo` prepares it, with twelve questions of each kind, below the working directory."""
    monkeypatch.chdir(tmp_path)
    made = generate(Path("text"), 0, 200)
    options = {"tokenizer": made.tokenizer, "sequence_length": 128, "bos": True}
    prepare_text([made.text], Path("demo-out/data"), **options, validation_inputs=[made.validation_text])
    for file in made.benchmarks.rglob("*.parquet"):
        copy = Path("demo-out/data/benchmarks") / file.relative_to(made.benchmarks)
        copy.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pq.read_table(file).slice(0, 12), copy)
    return tmp_path


def test_the_lines_of_the_readme_train_score_and_report(world):
    demo = load_recipe("demo")
    small = dataclasses.replace(demo.model, width=16, layers=1, heads=1, kv_heads=1, head_dim=16, mlp_width=16)
    source = dataclasses.replace(demo.data.sources[0], path="demo-out/data")
    tokens = 3 * demo.tokens_per_step
    every = dataclasses.replace(demo.checkpoints, at_tokens=(tokens // 3, 2 * tokens // 3))
    logging = dataclasses.replace(demo.logging, every_steps=1, tensorboard=False)
    data = dataclasses.replace(demo.data, sources=(source,))
    schedule = dataclasses.replace(demo.optimizer.schedule, warmup_tokens=0)
    optimizer = dataclasses.replace(demo.optimizer, schedule=schedule)
    recipe = dataclasses.replace(
        demo, model=small, data=data, tokens=tokens, checkpoints=every, logging=logging, optimizer=optimizer
    )
    outcome = fineline_jax.pretrain(recipe, "demo-out/run")
    assert (outcome.step, outcome.tokens, outcome.stopped_by) == (3, tokens, None)
    found: dict = {}
    exec(python_blocks("README.md")[-1], found)
    assert found["files"] == [Path(f"demo-out/thinned/run/step{step}.parquet") for step in (0, 3)]
    assert found["report"] == Path("demo-out/thinned-report/report.html") and found["report"].is_file()
    table = pandas.read_csv("demo-out/thinned-report/tidy.csv")
    assert set(table.checkpoint) == {"step0", "step3"}
    assert set(table.task) == {task["task"] for task in found["pack"].tasks}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("interface")
    tokenizer = write_tokenizer(folder / "tokenizer", adds_bos=True)
    make_series(folder / "run", tokenizer, (1, 2))
    write_benchmarks(folder / "benchmarks", documents=3)
    return folder


def test_functions_take_words_for_paths_and_say_what_is_no_option(place, tmp_path):
    benchmarks = str(place / "benchmarks")
    pack = fineline_jax.prepare_pack(
        "piqa", str(place / "tokenizer"), str(tmp_path / "p"), benchmarks=benchmarks, limit=2
    )
    assert pack.manifest["limit"] == 2
    series = fineline_jax.open_series(str(place / "run@step2"))
    [file] = fineline_jax.score([series], str(tmp_path / "p"), str(tmp_path / "s"), dtype="bfloat16")
    assert file == tmp_path / "s/run/step2.parquet" and file.is_file()
    with pytest.raises(TypeError, match="unexpected keyword argument 'limmit'"):
        fineline_jax.prepare_pack("piqa", place / "tokenizer", tmp_path / "q", limmit=1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'limmit'"):
        fineline_jax.score(series, tmp_path / "p", tmp_path / "s", limmit=1)
    with pytest.raises(UserError, match=r"--tokens-per-step 0 must be a positive number"):
        fineline_jax.analyze(tmp_path / "s", tmp_path / "r", tokens_per_step=0)
    page = fineline_jax.analyze([tmp_path / "s"], str(tmp_path / "r"), tokens_per_step=1000)
    assert page == tmp_path / "r/report.html" and page.is_file()


def test_a_location_is_opened_where_series_are_scored(place, tmp_path):
    pack = fineline_jax.prepare_pack("piqa", place / "tokenizer", tmp_path / "p", benchmarks=place / "benchmarks")
    for series in (f"{place}/run@step2", [place / "run" / "step2"]):
        assert [file.is_file() for file in fineline_jax.score(series, pack, tmp_path / str(type(series)))] == [True]


@pytest.mark.parametrize(
    ("function", "options", "line"),
    [
        ("score", {"dtype": "float16"}, "--dtype float16 must be float32 or bfloat16"),
        ("score", {"batch_tokens": 0.5}, "--batch-tokens 0.5 must be a whole number; leave it out"),
        ("score", {"batch_size": 8}, "batch_size is an argument of lm-eval; score has batch_tokens"),
        ("prepare_pack", {"limit": 2.5}, "--limit 2.5 must be a whole number"),
        ("prepare_pack", {"limit": True}, "--limit True must be a whole number"),
        ("prepare_pack", {"max_context": "9"}, "--max-context '9' must be a whole number"),
        ("prepare_pack", {"mode": "foo"}, "--mode: mode 'foo' must be one of"),
        ("prepare_pack", {"bos": "no"}, "--bos 'no' must be auto"),
        ("prepare_pack", {"num_fewshot": 5}, "num_fewshot is an argument of lm-eval; prepare_pack has shots, "),
    ],
)
def test_an_option_that_cannot_be_is_refused(place, tmp_path, function, options, line):
    between = place / "tokenizer"
    if function == "score":
        between = fineline_jax.prepare_pack("piqa", between, tmp_path / "p", benchmarks=place / "benchmarks")
    first = "piqa" if function == "prepare_pack" else place / "run"
    with pytest.raises(UserError, match=f"^{line}"):
        getattr(fineline_jax, function)(first, between, tmp_path / "x", **options)
    assert not (tmp_path / "x").exists()


def test_an_export_is_of_the_last_checkpoint_or_of_the_one_given(place, tmp_path):
    series = fineline_jax.open_series(place / "run")
    for which, step in ((series.checkpoints[0], 1), (place / "run", 2)):
        out = fineline_jax.export(which, tmp_path / f"step{step}", dtype="float32")
        assert out == tmp_path / f"step{step}"
        stored, made = (load_file(folder / "model.safetensors") for folder in (place / f"run/step{step}", out))
        assert stored.keys() == made.keys() and all((stored[name] == made[name]).all() for name in made)


def test_what_may_be_chosen_is_the_same_on_the_command_line_and_in_python():
    from fineline_jax.commands.score import Requests, score

    assert Requests().options == PackOptions() and score.__defaults__[2] == ScoreOptions()
