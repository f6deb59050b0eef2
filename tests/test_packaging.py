"""What is installed: every file that a run needs, every library that is imported, one version, the commands of make."""

import ast
import importlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from docs_pages import page
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

CHECKOUT = Path(__file__).resolve().parent.parent
SOURCES = ("fineline_jax", "configs")


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    """What pyproject.toml declares; an extra that names extras of ours stands for what they list."""
    declared = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    extras = declared["optional-dependencies"]

    def expanded(texts: list[str]) -> list[str]:
        ours = [one for text in texts if text.startswith("fineline_jax[") for one in Requirement(text).extras]
        own = [text for text in texts if not text.startswith("fineline_jax[")]
        return own + [text for one in sorted(ours) for text in expanded(extras[one])]

    return {**declared, "optional-dependencies": {name: expanded(texts) for name, texts in extras.items()}}


def files_below(folder: Path) -> set[str]:
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {name for name in found if not re.search(r"(^|/)(__pycache__|configs)/|\.pyc$", name)}


def test_every_file_of_the_package_is_installed(tmp_path: Path) -> None:
    for name in SOURCES:
        skipped = shutil.ignore_patterns("__pycache__", "configs" if name == "fineline_jax" else "")
        shutil.copytree(CHECKOUT / name, tmp_path / name, ignore=skipped)
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(CHECKOUT / name, tmp_path)
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", "built"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert files_below(tmp_path / "built/fineline_jax") == files_below(CHECKOUT / "fineline_jax")
    assert files_below(tmp_path / "built/fineline_jax/configs") == files_below(CHECKOUT / "configs")


def test_every_library_that_is_imported_is_required(project) -> None:
    wanted = {canonicalize_name(Requirement(text).name) for text in project["dependencies"]}
    optional = {
        canonicalize_name(Requirement(text).name) for one in project["optional-dependencies"].values() for text in one
    }
    of_module = importlib.metadata.packages_distributions()
    missing = set()
    for path in (CHECKOUT / "fineline_jax").rglob("*.py"):
        tree = ast.parse(path.read_text())
        names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        names += [str(n.module) for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and not n.level]
        for name in {name.partition(".")[0] for name in names} - {*sys.stdlib_module_names, "fineline_jax"}:
            providers = {canonicalize_name(one) for one in of_module.get(name, [name.replace("_", "-")])}
            if not providers & wanted and not (providers & optional and name in ("wandb", "apache_beam")):
                missing.add(f"{path.name}: {name}")
    assert not missing


def test_the_lock_pins_every_requirement_to_one_version_that_fits(project) -> None:
    pins: dict[str, list[Requirement]] = {}
    for line in (CHECKOUT / "requirements.lock").read_text().splitlines():
        pin = Requirement(line)
        assert re.fullmatch(r"==[\w.]+", str(pin.specifier)) and pin.url is None, line
        pins.setdefault(canonicalize_name(pin.name), []).append(pin)
    texts = [
        *project["dependencies"],
        *project["optional-dependencies"]["test"],
        *project["optional-dependencies"]["plan"],
    ]
    for requirement in map(Requirement, texts):
        found = pins[canonicalize_name(requirement.name)]
        assert all(next(iter(pin.specifier)).version in requirement.specifier for pin in found), requirement
    for name, found in pins.items():
        for version in ("3.11", "3.12", "3.13"):
            here = default_environment() | {"python_version": version, "python_full_version": f"{version}.0"}
            fitting = [pin for pin in found if pin.marker is None or pin.marker.evaluate({**here})]
            assert len(fitting) <= 1, f"{name} has two versions for Python {version}"


def test_what_is_installed_here_is_what_the_lock_says(project) -> None:
    """An oracle of another version is another oracle."""
    pinned = [Requirement(line) for line in (CHECKOUT / "requirements.lock").read_text().splitlines()]
    here = {
        canonicalize_name(pin.name): str(pin.specifier) for pin in pinned if pin.marker is None or pin.marker.evaluate()
    }
    for name in ("jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "lm-eval"):
        if sys.version_info < (3, 12):
            assert importlib.metadata.version(name) in SpecifierSet(here[name]), name


def test_extras_are_those_that_are_needed(project) -> None:
    extras = project["optional-dependencies"]
    named = {name: {Requirement(text).name for text in texts} for name, texts in extras.items()}
    assert named["check"] < named["test"] and named["test"] >= named["docs"] | named["s3"] | named["gs"] | named[
        "wandb"
    ] | {
        "torch",
        "accelerate",
    }
    for name, accelerator in (("tpu", "tpu"), ("plan", "tpu"), ("cuda12", "cuda12"), ("cuda13", "cuda13")):
        [jax] = map(Requirement, extras[name])
        assert (jax.name, jax.extras, str(jax.specifier)) == ("jax", {accelerator}, "")
    needed = {"beam": {"apache-beam"}, "wandb": {"wandb"}, "s3": {"s3fs"}, "gs": {"gcsfs"}}
    assert {name: named[name] for name in needed} == needed
    assert set(extras) == {*needed, "tpu", "plan", "cuda12", "cuda13", "check", "docs", "test"}
    provided = importlib.metadata.metadata("jax").get_all("Provides-Extra") or []
    assert {"tpu", "cuda12", "cuda13"} <= set(provided)
    torch = next(text for text in extras["test"] if text.startswith("torch"))
    assert torch in (CHECKOUT / "requirements.lock").read_text().split("\n")


@pytest.mark.slow
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
def test_every_extra_resolves_under_the_lock_on_every_python(project, python: str) -> None:
    """By the registry's metadata; nothing is installed. What the lock leaves open may be of any version. Beam takes
    only older versions of pyarrow than the lock has."""
    uv = shutil.which("uv")
    if uv is None:
        pytest.skip("uv is not installed")
    for extra in project["optional-dependencies"]:
        command = [uv, "pip", "compile", "pyproject.toml", "--extra", extra, "-q"]
        command += [] if extra == "beam" else ["-c", "requirements.lock"]
        command += ["--python-version", python, "--python-platform", "x86_64-manylinux_2_31"]
        done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=300)
        if "Failed to fetch" in done.stderr or "error sending request" in done.stderr:
            pytest.skip("no registry can be reached")
        assert done.returncode == 0, f"{extra}: {done.stderr[-2000:]}"


def test_the_version_is_written_once(project) -> None:
    import fineline_jax

    assert importlib.metadata.version("fineline_jax") == fineline_jax.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", fineline_jax.__version__) and project["dynamic"] == ["version"]
    for name in ("setup.py", "pyproject.toml", "README.md"):
        assert f'"{fineline_jax.__version__}"' not in (CHECKOUT / name).read_text()


def test_the_oldest_python_is_the_same_everywhere(project) -> None:
    assert project["requires-python"] == ">=3.11" and "With Python 3.11 or newer" in page("README.md")
    tools = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["tool"]
    assert (tools["ruff"]["target-version"], tools["pyright"]["pythonVersion"]) == ("py311", "3.11")
    assert "sys.version_info < (3, 11)" in (CHECKOUT / "Makefile").read_text()


def test_the_command_is_the_function_that_python_m_runs(project) -> None:
    [(name, target)] = project["scripts"].items()
    module, _, function = target.partition(":")
    assert name == "fineline" and callable(getattr(importlib.import_module(module), function))
    [installed] = importlib.metadata.entry_points(group="console_scripts", name="fineline")
    assert installed.value == target
    run_by_python_m = (CHECKOUT / "fineline_jax/__main__.py").read_text()
    assert f"from {module} import {function}\n" in run_by_python_m and f"sys.exit({function}())" in run_by_python_m


@pytest.mark.parametrize(
    ("target", "wanted"),
    [
        ("demo", [r"pip install .*-c requirements\.lock -e \.\n", r"bin/fineline demo --out demo-out\n"]),
        ("test", [r"-c requirements\.lock -e '\.\[test\]'\n", r'bin/python -m pytest -m "not slow"']),
        ("test-all", [r"\.\[test\]", r"bin/python -m pytest(?! -m)"]),
        ("test-newest", [r"PYTHON=python9 EXTRA=check", r"-c requirements\.lock -e '\.\[check\]'"]),
        ("lock", [r"pip compile pyproject\.toml --extra test --extra plan --universal --python-version 3\.11 "]),
        ("lint", ["ruff check \\.\n", "ruff format --check \\.\n", "pyright "]),
    ],
)
def test_make_installs_by_the_lock_and_runs_what_the_readme_says(target, wanted, tmp_path: Path) -> None:
    command = ["make", "-n", "-B", target, f"VENV={tmp_path}/v", "NEWEST=python9"]  # -B: as if nothing were installed
    of_make = ("MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS", "EXTRA", "VENV", "PYTHON")  # of the one that runs this test
    plain = {name: value for name, value in os.environ.items() if name not in of_make}
    said = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, env=plain)
    assert said.returncode == 0, said.stderr
    for pattern in wanted:
        assert re.search(pattern, said.stdout), f"{pattern} in {said.stdout}"


def test_the_list_of_tests_that_take_a_second_names_tests_that_exist() -> None:
    for line in (CHECKOUT / "tests/medium.txt").read_text().split():
        name, _, test = line.partition("::")
        assert f"def {test}(" in (CHECKOUT / "tests" / name).read_text(), line
