"""The structure that ARCHITECTURE.md states: which room may import which, and what is never loaded where."""

import graphlib
import subprocess
import sys
from pathlib import Path

import package_tree
import pytest
from docs_pages import page
from loaded_modules import HEAVY, modules_after
from package_tree import files, imported_by
from scoring_examples import write_benchmarks, write_tokenizer
from series_examples import make_series

LEVELS = (
    ("errors", "facts", "text_table", "progress", "cpu_backend"),
    ("atomic_files",),
    ("folder_lock",),
    ("models.config", "tokenizers", "mesh", "multihost"),
    ("recipe",),
    ("catalogue",),
    ("models",),
    ("checkpoints", "world"),
    ("data",),
    ("training", "scoring", "trajectories"),
    ("analysis",),
    ("ablation", "plan"),
    ("interface",),
    ("demo",),
    ("commands",),
    ("cli",),
    ("__main__",),
)
"""A room imports itself and rooms of the lines above its own, nothing else."""


def room_of(module: str) -> str:
    """`training` of fineline_jax.training.step; models.config, plain values that all may import, is one of its own."""
    parts = module.split(".")
    return "models.config" if parts[1:3] == ["models", "config"] else parts[1]


def level_of(room: str) -> int:
    return next(level for level, rooms in enumerate(LEVELS) if room in rooms)


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


LARGEST_ROOM = 12
OUTERMOST = 15
"""Files of a folder; of the package itself, where the interface, the command and what all rooms use lie."""


def test_no_import_goes_in_a_circle_between_files_or_rooms():
    """In a folder that holds folders, each file counts by itself: checkpoints.series is below checkpoints.remote."""
    for graph in (package_tree.import_graph(), package_tree.unit_graph()):
        assert len(list(graphlib.TopologicalSorter(graph).static_order())) > 20  # raises CycleError, which names it


def test_a_room_holds_at_most_twelve_files():
    for folder, names in package_tree.folders().items():
        assert len(names) <= (OUTERMOST if folder == "." else LARGEST_ROOM), folder


def test_the_architecture_page_shows_the_tree_as_it_is():
    shown = "".join(f"    {line}\n" if line else "\n" for line in package_tree.tree().splitlines())
    assert shown in page("ARCHITECTURE.md"), "put there what tests/helpers/package_tree.py prints, indented"


def test_trajectories_read_tables_and_know_neither_jax_nor_what_computes():
    for name, path in files():
        if room_of(name) == "trajectories":
            assert not {module.split(".")[0] for module in imported_by(path)} & (HEAVY - {"pandas"}), path
            # names of checkpoints are read by the rules of the registered series
            registry = {"checkpoints"} if path.name == "checkpoint_names.py" else set()
            assert rooms_imported_by(path) <= {"trajectories", *registry, *LEVELS[0], *LEVELS[1]}, path


def test_the_command_and_plain_values_import_nothing_heavy_at_their_top():
    for name, path in files():
        if room_of(name) in {"cli", "commands", "interface", "recipe", "models.config", "errors", "catalogue"}:
            top = {module.split(".")[0] for module in imported_by(path, at_the_top=True)}
            assert not top & HEAVY, f"{path}: {top & HEAVY}"


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
