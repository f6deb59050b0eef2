"""The package's files, rooms and imports, read from the sources; as a program: the tree that ARCHITECTURE.md shows."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "fineline_jax"


def files() -> Iterator[tuple[str, Path]]:
    """(dotted name, path) of every module of the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        if name != "fineline_jax" and "configs" not in path.relative_to(PACKAGE).parts:
            yield name, path


def imported_by(path: Path, *, at_the_top: bool = False) -> set[str]:
    """Modules and names that a file imports, anywhere in it or in its outermost lines only."""
    package = path.parent.relative_to(PACKAGE.parent).parts
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names: set[str] = set()
    for node in tree.body if at_the_top else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(package[: len(package) + 1 - node.level]) if node.level else ""
            module = ".".join(filter(None, (above, node.module)))
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def import_graph() -> dict[str, set[str]]:
    """Every module and the modules of the package that it imports."""
    modules = dict(files())
    graph = {}
    for name, path in modules.items():
        ours = {one if one in modules else one.rpartition(".")[0] for one in imported_by(path)}
        graph[name] = (ours & modules.keys()) - {name}
    return graph


def folders() -> dict[str, list[str]]:
    """Every folder of modules, relative to the package ("." is the package itself), and their names."""
    found: dict[str, list[str]] = {}
    for _, path in files():
        if path.name != "__init__.py":
            found.setdefault(str(path.parent.relative_to(PACKAGE)), []).append(path.stem)
    return found


def unit_of(module: str) -> str:
    """What counts as one when circles are looked for: a folder of files; a file, where the folder holds folders too."""
    path = PACKAGE.parent / Path(*module.split("."))
    folder = path if path.is_dir() else path.parent
    above = folder == PACKAGE or any(one.name != "configs" for one in folder.glob("*/__init__.py"))
    return module if above or path.is_dir() else ".".join(folder.relative_to(PACKAGE.parent).parts)


def unit_graph() -> dict[str, set[str]]:
    """Imports between units."""
    graph: dict[str, set[str]] = {}
    for module, imported in import_graph().items():
        graph.setdefault(unit_of(module), set()).update({unit_of(one) for one in imported} - {unit_of(module)})
    return graph


def tree() -> str:
    """The rooms from the lowest to the highest, with their folders and files. Raises graphlib.CycleError."""
    graph = unit_graph()
    level: dict[str, int] = {}
    for unit in graphlib.TopologicalSorter(graph).static_order():
        level[unit] = 1 + max((level[one] for one in graph.get(unit, ())), default=-1)
    lines = []

    def height(folder: str) -> int:
        dotted = "fineline_jax." + folder.replace("/", ".")
        return max(value for unit, value in level.items() if unit == dotted or unit.startswith(dotted + "."))

    held = folders()
    for folder in sorted(held, key=lambda one: (one != ".", height(one.split("/")[0]) if one != "." else 0, one)):
        depth = folder.count("/")
        name = "fineline_jax/" if folder == "." else f"{'    ' * (depth + 1)}{folder.rsplit('/')[-1]}/"
        lines += _wrapped(name, sorted(held[folder]))
    return "\n".join(lines) + "\n"


def _wrapped(name: str, words: list[str]) -> list[str]:
    lines, line = [], f"{name:28}"
    for word in words:
        if len(line) + len(word) > 115:
            lines.append(line.rstrip())
            line = " " * 28
        line += word + " "
    return [*lines, line.rstrip()]


if __name__ == "__main__":
    print(tree(), end="")
