"""The structure that ARCHITECTURE.md states: which room may import which, and what is never loaded where."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from scoring_examples import write_benchmarks, write_tokenizer
from series_examples import make_series

PACKAGE = Path(__file__).parent.parent / "fineline_jax"

LEVELS = (
    ("errors", "facts", "text_table", "progress", "cpu", "whole"),
    ("models.config", "tokenizers"),
    ("recipe",),
    ("catalogue", "mesh"),
    ("models",),
    ("data", "checkpoints", "world"),
    ("training", "scoring", "trajectories"),
    ("analysis",),
    ("interface",),
    ("demo",),
    ("commands",),
    ("cli",),
    ("__main__",),
)
"""A room imports itself and rooms of the lines above its own, nothing else."""

HEAVY = {"jax", "flax", "transformers", "lm_eval", "tensorflow_datasets", "pandas", "torch"}


def room_of(module: str) -> str:
    """`training` of fineline_jax.training.step; models.config, plain values that all may import, is one of its own."""
    parts = module.split(".")
    return "models.config" if parts[1:3] == ["models", "config"] else parts[1]


def level_of(room: str) -> int:
    return next(level for level, rooms in enumerate(LEVELS) if room in rooms)


def files() -> Iterator[tuple[str, Path]]:
    """(dotted name, path) of every module of the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        if name != "fineline_jax":
            yield name, path


def imported_by(path: Path, *, at_the_top: bool = False) -> set[str]:
    """Modules and names that a file imports, anywhere in it or in its outermost lines only."""
    package = path.parent.relative_to(PACKAGE.parent).parts
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: set[str] = set()
    for node in tree.body if at_the_top else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(package[: len(package) + 1 - node.level]) if node.level else ""
            module = ".".join(filter(None, (above, node.module)))
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def rooms_imported_by(path: Path) -> set[str]:
    """The rooms of the package that a file imports; recipes in configs/ and the version are in none."""
    ours = {module for module in imported_by(path) if module.startswith("fineline_jax.")}
    return {room_of(module) for module in ours} - {"configs", "__version__"}


def test_every_room_has_its_level_and_no_level_names_a_room_that_is_gone():
    assert {room_of(name) for name, _ in files()} == {room for rooms in LEVELS for room in rooms}


def test_rooms_import_downwards_only():
    for name, path in files():
        own = room_of(name)
        for other in rooms_imported_by(path) - {own}:
            assert level_of(other) < level_of(own), f"{path}: {own} imports {other}"


def test_trajectories_read_tables_and_know_neither_jax_nor_what_computes():
    for name, path in files():
        if room_of(name) == "trajectories":
            assert not {module.split(".")[0] for module in imported_by(path)} & (HEAVY - {"pandas"}), path
            assert rooms_imported_by(path) <= {"trajectories", *LEVELS[0]}, path


def test_the_command_and_plain_values_import_nothing_heavy_at_their_top():
    for name, path in files():
        if room_of(name) in {"cli", "commands", "interface", "recipe", "models.config", "errors", "catalogue"}:
            top = {module.split(".")[0] for module in imported_by(path, at_the_top=True)}
            assert not top & HEAVY, f"{path}: {top & HEAVY}"


def modules_after(program: str) -> set[str]:
    """The outermost packages that a fresh process has loaded after running `program`."""
    tell = "\nimport sys\nprint(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", program + tell], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


def test_all_of_trajectories_loads_without_jax():
    modules = [name for name, _ in files() if room_of(name) == "trajectories"]
    assert len(modules) > 5
    loaded = modules_after("".join(f"import {module}\n" for module in modules))
    assert {"pandas", "fineline_jax"} <= loaded
    assert not loaded & {"jax", "jaxlib", "flax", "transformers", "torch", "lm_eval"}


@pytest.mark.parametrize("command", [[], ["pretrain"], ["score"], ["analyze"], ["data", "prepare", "text"]])
def test_help_loads_neither_jax_nor_pandas(command):
    program = f"from fineline_jax.cli import main\ntry: main({[*command, '--help']})\nexcept SystemExit: pass\n"
    assert not modules_after(program) & HEAVY


def test_scoring_exporting_and_analysis_work_where_torch_cannot_be_imported(tmp_path):
    tokenizer = write_tokenizer(tmp_path / "tokenizer", adds_bos=True)
    run = make_series(tmp_path / "run", tokenizer, (1, 2, 3))
    benchmarks = write_benchmarks(tmp_path / "benchmarks", documents=4)
    scores, page = tmp_path / "scores", tmp_path / "page"
    commands = [
        ["score", str(run), "--suite", "piqa", "--benchmarks", str(benchmarks), "--out", str(scores)],
        ["export-scores", str(scores), "--out", str(tmp_path / "results")],
        ["analyze", str(scores), "--tokens-per-step", "1000000", "--out", str(page)],
    ]
    program = """
import importlib.machinery, sys
find = importlib.machinery.PathFinder.find_spec
without_torch = lambda name, *rest: None if name.partition(".")[0] == "torch" else find(name, *rest)
importlib.machinery.PathFinder.find_spec = staticmethod(without_torch)
from fineline_jax.cli import main
"""
    calls = "".join(f"assert main({command}) in (0, None)\n" for command in commands)
    done = subprocess.run([sys.executable, "-c", program + calls], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "torch" not in done.stderr
    assert len(list((scores / "run").glob("*.parquet"))) == 3
    assert len(list((tmp_path / "results").rglob("results_*.json"))) == 3
    assert (page / "report.html").stat().st_size > 10_000
