"""Recipes, sweeps, suites and series by name or path: the shipped ones first, then those of ./configs.

A name never runs a stranger's file in place of a shipped one: it needs the path.
"""

import importlib.resources
import importlib.util
import logging
import traceback
from pathlib import Path
from typing import TypeVar

from fineline_jax.atomic_files import address_of
from fineline_jax.errors import UserError, near
from fineline_jax.recipe import Recipe, from_json

Made = TypeVar("Made")
_LOG = logging.getLogger(__name__)


def config_folders() -> list[Path]:
    """Where a name is looked up, in this order."""
    installed = Path(str(importlib.resources.files("fineline_jax.configs")))
    local = Path("configs")
    return [folder for folder in dict.fromkeys((installed.resolve(), local.resolve())) if folder.is_dir()]


def config_files(pattern: str) -> dict[str, Path]:
    """The file of each name, the shipped ones first. `pattern` is relative to configs/, as in "suites/{}.yaml"."""
    files: dict[str, Path] = {}
    for folder in config_folders():
        for path in sorted(folder.glob(pattern.format("*"))):
            files.setdefault(path.stem, path)
    files.pop("__init__", None)
    return files


def find_config(name: str, pattern: str, kind: str) -> Path:
    """The file of a recipe or suite; a file of that name in ./configs that is not the one is mentioned.

    pattern: as of `config_files`. Raises UserError that lists what there is.
    """
    files = config_files(pattern)
    if name in files:
        mine = Path("configs") / pattern.format(name)
        if mine.is_file() and mine.resolve() != files[name]:
            _LOG.warning("%s is not read: %s is the shipped %s; give the path for your own", mine, name, kind)
        return files[name]
    known = sorted(files)
    hint = near(name, known, shown=repr) or ";"
    raise UserError(f"no {kind} named {name!r}{hint} known: {', '.join(known)}, or give the path of a file")


def config_names(pattern: str) -> list[str]:
    """All names that `find_config` knows, sorted."""
    return sorted(config_files(pattern))


def run_folder(name: str) -> Path | None:
    """The folder of a run that `load_recipe` reads the recipe of; None where the name is that of a recipe or a file."""
    path = Path(name).expanduser()
    is_run = address_of(name) is not None or (path.is_dir() and name not in config_names("{}.py"))
    return path if is_run else None


def load_recipe(name: str) -> Recipe:
    """The recipe of a name in configs/, a Python file with a function `recipe()`, a JSON file that a run wrote, or a
    run folder. Raises UserError naming the file."""
    path, folder = Path(name).expanduser(), run_folder(name)
    if folder is not None:
        path = folder / "recipe.json"
        if not path.is_file():
            raise UserError(f"{path}: not there; give a recipe's name, its file, or the folder of a run")
    if path.suffix == ".json":
        return from_json(path)
    if path.suffix != ".py":
        path = find_config(name, "{}.py", "recipe")
    elif not path.is_file():
        raise UserError(f"{path}: not there; give a recipe's name or its file")
    return made_by(path, "recipe", Recipe)


def made_by(path: Path, function: str, kind: type[Made]) -> Made:
    """What the function of that name in a Python file returns, a `kind`. Raises UserError naming the file."""
    wanted = f"{kind.__module__}.{kind.__qualname__}"
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    try:
        specification.loader.exec_module(module)
        if not callable(getattr(module, function, None)):
            raise UserError(f"{path}: has no function {function}(); define one that returns a {wanted}")
        made = getattr(module, function)()
    except UserError:
        raise
    except Exception as error:
        own = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = f"{path}:{own[-1]}" if own else str(path)
        raise UserError(f"{where}: {type(error).__name__}: {error}; correct the file") from error
    if not isinstance(made, kind):
        raise UserError(f"{path}: {function}() returned {type(made).__name__}; return a {wanted}")
    return made
