"""The reproductions of released series: our arithmetic against what is published, and names that are the authors'."""

import importlib.util
import math
import shlex
import sys
from pathlib import Path

import pytest
from docs_pages import CHECKOUT, page

from fineline_jax import cli
from fineline_jax.catalogue import load_recipe
from fineline_jax.training.schedule import learning_rate

spec = importlib.util.spec_from_file_location("released", CHECKOUT / "configs/reproduce/released.py")
released = importlib.util.module_from_spec(spec)
sys.modules["released"] = released  # where dataclasses look for it
spec.loader.exec_module(released)


@pytest.mark.parametrize("name", released.REPRODUCTIONS)
def test_our_arithmetic_is_what_is_published(name) -> None:
    """Sizes of files and tokens in names have three to six digits; all else is exact."""
    ours = released.arithmetic(name)
    for quantity, theirs in released.REPRODUCTIONS[name].published.items():
        rounded = quantity in ("parameters", "tokens") and name == "amber_fine_line"
        assert ours[quantity] == pytest.approx(theirs, rel=1e-4 if rounded else 1e-12), (name, quantity)


def test_the_table_of_the_page_is_the_programs() -> None:
    assert released.table() in page("docs/reproduce.md")


@pytest.mark.parametrize(
    ("name", "total"), [("amber", 274_320), ("open_llama_7b", 250_000), ("open_llama_13b", 500_000)]
)
def test_the_rate_is_that_of_the_published_code_at_landmarks(name, total) -> None:
    """amber-train's get_cosine_lr and optax.warmup_cosine_decay_schedule are one formula, restated here."""
    recipe = load_recipe(released.REPRODUCTIONS[name].recipe)
    for step in (0, 1, 1_000, 2_000, 2_001, total // 4, total // 2, total - 1, total):
        share = (step - 2_000) / (total - 2_000)
        theirs = 3e-4 * step / 2_000 if step < 2_000 else 3e-5 + 0.5 * (1 + math.cos(math.pi * share)) * 2.7e-4
        assert learning_rate(recipe, step * recipe.tokens_per_step) == pytest.approx(theirs, rel=1e-12), step


def test_a_published_name_is_the_checkpoint_at_its_step() -> None:
    of = lambda name: released.names(released.REPRODUCTIONS[name], load_recipe(released.REPRODUCTIONS[name].recipe))
    amber = of("amber")
    assert (amber["ckpt_000"], amber["ckpt_099"], amber["main"], len(amber)) == (762, 76_200, 274_320, 360)
    fine_line = of("amber_fine_line")
    assert (fine_line["8.39B"], fine_line["1300.23B"], len(fine_line)) == (2_000, 310_000, 22)
    for name, step in (of("openllama_fine_line") | fine_line).items():  # every name gives its tokens to two digits
        assert step * 4_194_304 / 1e9 == pytest.approx(float(name.removesuffix("B")), abs=0.006), name
    assert of("open_llama_7b")["step_250000"] == 250_000 and of("open_llama_13b")["step_5000"] == 5_000


def test_the_commands_go_from_data_to_names_and_leave_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "amber_fine_line" / "8.39B").mkdir(parents=True)
    data, train, *exports = released.commands("amber_fine_line", tmp_path, ["--mesh.fsdp", "8"])
    assert data[-1].startswith(f"test -d {tmp_path}/data/amber || ") and "{000..359}" in data[-1]
    options = train[train.index("pretrain") :]
    assert options[1].endswith("amber_fine_line.py") and options[-2:] == ["--mesh.fsdp", "8"]
    assert len(exports) == 21 and exports[0][-2:] == [
        f"{tmp_path}/runs/amber_fine_line/checkpoints/5000",
        f"{tmp_path}/amber_fine_line/20.97B",
    ]


@pytest.mark.parametrize("name", released.REPRODUCTIONS)
def test_the_commands_are_understood(name, tmp_path: Path) -> None:
    data, train, *exports = released.commands(name, tmp_path, [])
    prepare = shlex.split(data[-1].partition(" || ")[2])
    for words in (prepare, *exports[:1]):
        assert words[1:3] == ["-m", "fineline_jax"]
        call = cli.command_line().cli(prog="fineline", args=words[3:])
        assert call.func.__name__ == ("export_checkpoint" if words[3] == "export" else f"prepare_{words[5]}")
    recipe = load_recipe(train[4])
    assert f"--data.sources.0.path {tmp_path}/{recipe.data.sources[0].path}" in " ".join(train)


def test_the_command_line_says_the_commands_and_runs_none(monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setattr(released.subprocess, "run", lambda *_: pytest.fail("it was to be said only"))
    monkeypatch.setattr("sys.argv", ["released.py", "open_llama_7b", "--work", str(tmp_path), "--print"])
    assert released.main() == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 2 + 9 and lines[-1][-1] == f"{tmp_path}/open_llama_7b/step_250000"
