"""Recipes and suites by name or path: the folder configs/ of the checkout first, then the installed copy."""

import difflib
import importlib.resources
import importlib.util
from pathlib import Path

from fineline_jax.errors import UserError
from fineline_jax.recipe import Recipe, from_json


def config_folders() -> list[Path]:
    """Where a name is looked up, in this order."""
    installed = Path(str(importlib.resources.files("fineline_jax.configs")))
    local = Path("configs")
    return [folder for folder in dict.fromkeys((local.resolve(), installed.resolve())) if folder.is_dir()]


def find_config(name: str, pattern: str, kind: str) -> Path:
    """The file of a recipe or suite. `pattern` is relative to configs/, as in "suites/{}.yaml".

    Raises UserError that lists what there is.
    """
    for folder in config_folders():
        if (path := folder / pattern.format(name)).is_file():
            return path
    known = config_names(pattern)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UserError(f"no {kind} named {name!r}; {hint}known: {', '.join(known)}, or give the path of a file")


def config_names(pattern: str) -> list[str]:
    """All names that `find_config` knows, sorted."""
    paths = [path for folder in config_folders() for path in folder.glob(pattern.format("*"))]
    return sorted({path.stem for path in paths} - {"__init__"})


def load_recipe(name: str) -> Recipe:
    """The recipe of a name in configs/, a Python file with a function `recipe()`, a JSON file that a run wrote, or a
    run folder. Raises UserError naming the file."""
    path = Path(name).expanduser()
    if path.is_dir() and name not in config_names("{}.py"):
        path = path / "recipe.json"
        if not path.is_file():
            raise UserError(f"{path}: not there; give a recipe's name, its file, or the folder of a run")
    if path.suffix == ".json":
        return from_json(path)
    if path.suffix != ".py":
        path = find_config(name, "{}.py", "recipe")
    elif not path.is_file():
        raise UserError(f"{path}: not there; give a recipe's name or its file")
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    try:
        specification.loader.exec_module(module)
        if not callable(getattr(module, "recipe", None)):
            raise UserError(f"{path}: has no function recipe(); define one that returns a fineline_jax.recipe.Recipe")
        made = module.recipe()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path}: {type(error).__name__}: {error}; correct the file") from error
    if not isinstance(made, Recipe):
        raise UserError(f"{path}: recipe() returned {type(made).__name__}; return a fineline_jax.recipe.Recipe")
    return made
