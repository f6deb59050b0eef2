"""The slips as data: one line of a table each, in one file per room beside this one.

Columns, separated by tabs: name, file, before, after, tests, why. `before` stands exactly once in `file`; in it and
in `after`, `\\n` is a line's end, `\\t` a tab and `\\\\` a backslash. `tests`: pytest's node ids below tests/,
separated by spaces; at least one of them must fail when `before` is replaced by `after`.
"""

import ast
import dataclasses
import functools
import re
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent.parent
COLUMNS = ("name", "file", "before", "after", "tests", "why")
_ESCAPES = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}


class NotApplicable(Exception):
    """The slip cannot be made: its text is gone or stands more than once, or what it leaves is no Python."""


@dataclasses.dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    before: str
    after: str
    tests: tuple[str, ...]
    why: str

    @property
    def room(self) -> str:
        """`training` of fineline_jax/training/step.py, `recipe` of fineline_jax/recipe.py, `configs` of configs/*."""
        parts = Path(self.file).parts
        return Path(parts[1]).stem if parts[0] == "fineline_jax" else parts[0]

    def applied(self, root: Path = ROOT) -> str:
        """The text of the file with the slip. Raises NotApplicable."""
        path = root / self.file
        if not path.is_file():
            raise NotApplicable(f"{self.file} is gone")
        text = path.read_text(encoding="utf-8")
        if (count := text.count(self.before)) != 1:
            raise NotApplicable(f"{self.before!r} stands {count} times in {self.file}, not once")
        changed = text.replace(self.before, self.after)
        if changed == text:
            raise NotApplicable("before and after are the same")
        if path.suffix == ".py":
            try:
                ast.parse(changed)
            except SyntaxError as error:
                raise NotApplicable(f"what it leaves is no Python: {error}") from error
        return changed


def read(pattern: str = "", folder: Path = FOLDER) -> list[Mutant]:
    """All slips whose name or file the regular expression finds. Raises ValueError for a malformed line."""
    rows = [Mutant(*row) for table in sorted(folder.glob("*.tsv")) for row in _rows(table)]
    return [m for m in rows if re.search(pattern, m.name) or re.search(pattern, m.file)]


def _rows(table: Path) -> Iterator[tuple]:
    lines = table.read_text(encoding="utf-8").splitlines()
    if lines[0].split("\t") != list(COLUMNS):
        raise ValueError(f"{table.name}:1: the columns are {', '.join(COLUMNS)}")
    for number, line in enumerate(lines[1:], start=2):
        fields = line.split("\t")
        if len(fields) != len(COLUMNS) or not all(fields[i] for i in (0, 1, 2, 4, 5)):
            raise ValueError(f"{table.name}:{number}: {len(fields)} columns, or one of them empty")
        name, file, before, after, tests, why = fields
        yield name, file, _unescaped(before), _unescaped(after), tuple(tests.split()), why


def _unescaped(text: str) -> str:
    return re.sub(r"\\[nt\\]", lambda match: _ESCAPES[match[0]], text)


def test_exists(node: str, root: Path = ROOT) -> bool:
    """Whether the function of a node id such as test_recipe.py::test_a_milestone[1-2] is defined."""
    file, _, function = node.partition("::")
    name = function.partition("[")[0]
    functions = _functions(root / "tests" / file)
    return functions is not None and (not name or name in functions)


@functools.cache
def _functions(path: Path) -> frozenset[str] | None:
    """Names of the functions that a file of tests defines; None without the file."""
    if not path.is_file():
        return None
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
