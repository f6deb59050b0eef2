"""The list of slips is true of the code as it is, and the runner tells noticed slips from unnoticed ones."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "mutants"))
import mutants
from mutants import Mutant, NotApplicable, test_exists

test_exists.__test__ = False  # pyright: ignore[reportFunctionMemberAccess]


def test_the_list_has_at_least_150_slips_each_named_once():
    names = [mutant.name for mutant in mutants.read()]
    assert len(names) >= 150
    assert len(names) == len(set(names))


def test_every_slip_can_be_made_and_names_tests_that_exist():
    for mutant in mutants.read():
        mutant.applied()
        missing = [test for test in mutant.tests if not test_exists(test)]
        assert not missing, f"{mutant.name}: {missing}"


def test_every_room_has_slips():
    rooms = {mutant.room for mutant in mutants.read()}
    package = mutants.ROOT / "fineline_jax"
    assert {path.stem for path in package.iterdir() if path.is_dir() and (path / "__init__.py").exists()} <= rooms


SLIP = Mutant("doubled", "fineline_jax/sums.py", "x + x", "x * x", ("test_sums.py::test_double",), "why")


@pytest.fixture
def project(tmp_path) -> Path:
    (tmp_path / "fineline_jax").mkdir()
    (tmp_path / "tests").mkdir()
    (tmp_path / "fineline_jax" / "sums.py").write_text(
        "def double(x):\n    return x + x\n\n\ndef half(x):\n    return x / 2\n"
    )
    (tmp_path / "tests" / "test_sums.py").write_text(
        "import sys\nsys.path.insert(0, '.')\nfrom fineline_jax.sums import double\n\n\n"
        "def test_double():\n    assert double(3) == 6\n\n\ndef test_two():\n    assert double(2) == 4\n"
    )
    return tmp_path


def test_a_slip_whose_text_is_gone_or_ambiguous_is_an_error_and_not_a_success(project):
    assert "x * x" in SLIP.applied(project)
    for before, after in (("x - x", "x"), ("x", "y"), ("x + x", "x + x"), ("x + x", "x +")):
        with pytest.raises(NotApplicable):
            Mutant("n", SLIP.file, before, after, SLIP.tests, "why").applied(project)
    with pytest.raises(NotApplicable, match="is gone"):
        Mutant("n", "fineline_jax/gone.py", "a", "b", SLIP.tests, "why").applied(project)


@pytest.mark.slow
def test_a_slip_is_killed_by_a_test_that_fails_and_survives_one_that_passes(project):
    rows = [
        mutants.COLUMNS,
        ("doubled", SLIP.file, "x + x", "x * x", "test_sums.py::test_double", "why"),
        ("unseen", SLIP.file, "x + x", "x * x", "test_sums.py::test_two", "why"),
        ("untested", SLIP.file, "x / 2", "x / 3", "test_sums.py::test_half", "why"),
        ("gone", SLIP.file, "x - x", "x", "test_sums.py::test_two", "why"),
        ("hangs", SLIP.file, "    return x + x", "    while x: pass", "test_sums.py::test_two", "why"),
        ("always", SLIP.file, "x / 2", "x / 3", "test_broken.py::test_broken", "why"),
    ]
    (project / "slips.tsv").write_text("".join("\t".join(row) + "\n" for row in rows))
    (project / "tests" / "test_broken.py").write_text("def test_broken():\n    assert False\n")
    subprocess.run(["git", "init", "-q"], cwd=project, check=True)
    folders = ["--root", str(project), "--tables", str(project)]
    command = [sys.executable, str(mutants.FOLDER), *folders, "--timeout", "5", "--jobs", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert {name: verdict for verdict, name in re.findall(r"^([a-z ]+): (\w+) \(", done.stdout, re.MULTILINE)} == {
        "doubled": "killed", "unseen": "survived", "untested": "broken", "gone": "not applicable", "hangs": "killed",
        "always": "killed",
    }  # fmt: skip
    assert "tests/test_broken.py fails on the code as it is" in done.stdout
    assert SLIP.before in (project / SLIP.file).read_text()
    assert subprocess.run([*command, "--only", "doubled"], capture_output=True).returncode == 0
