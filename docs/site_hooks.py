"""What mkdocs builds besides the pages of this folder: pages of the root, and references made from the code."""

import ast
import contextlib
import importlib
import inspect
import io
import posixpath
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import fineline_jax
from fineline_jax.cli import main

ROOT = Path(__file__).parent.parent
ROOT_PAGES = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "project/architecture.md",
    "BENCHMARKS.md": "project/benchmarks.md",
    "CHANGELOG.md": "project/changelog.md",
    "CONTRIBUTING.md": "project/contributing.md",
}
COMMANDS = (
    "demo", "data prepare text", "data prepare amber", "data prepare world", "pretrain llama_60m", "tasks prepare",
    "tasks plan", "score", "export-scores", "analyze", "series", "export", "import",
)  # fmt: skip
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that do not lie in docs/."""
    for source, target in ROOT_PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, target, content=_links_moved(text, target)))
    for target, make in (("command_line", command_line), ("recipe", recipe), ("python", python)):
        files.append(File.generated(config, f"reference/{target}.md", content=make()))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Links out of docs/ to pages of the root lead to where the site has them."""
    here = posixpath.dirname(page.file.src_uri)

    def moved(match: re.Match) -> str:
        target = posixpath.normpath(posixpath.join("docs", here, match[1])).removeprefix("docs/")
        name = posixpath.normpath(target.removeprefix("../"))
        if name not in ROOT_PAGES or target == page.file.src_uri:
            return match[0]
        return f"]({posixpath.relpath(ROOT_PAGES[name], here or '.')}{match[2] or ''})"

    return LINK.sub(moved, markdown)


def _links_moved(text: str, target: str) -> str:
    """Links of a page of the root, relative to `target`."""
    here = posixpath.dirname(target) or "."

    def moved(match: re.Match) -> str:
        path = ROOT_PAGES.get(match[1], match[1].removeprefix("docs/"))
        return f"]({posixpath.relpath(path, here)}{match[2] or ''})"

    return LINK.sub(moved, text)


def command_line() -> str:
    """`--help` of every command, as it is printed."""
    return "# Command line\n\n" + "\n\n".join(
        f"## fineline {name.removesuffix(' llama_60m')}\n\n{textwrap.indent(_help(name), '    ')}" for name in COMMANDS
    )


def _help(command: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        main([*command.split(), "--help"])
    return re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue()).strip("\n")


def recipe() -> str:
    """Every field of a recipe and of its model, with its default and what its docstring says."""
    parts = ["# Recipe fields", "Each is an option of `fineline pretrain RECIPE`: `--optimizer.schedule.peak 5e-4`."]
    for module in ("fineline_jax.recipe", "fineline_jax.models.config"):
        path = Path(inspect.getfile(importlib.import_module(module)))
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(d) for d in node.decorator_list):
                parts += [f"## {node.name}", ast.get_docstring(node) or "", _fields(node)]
    return "\n\n".join(parts)


def _fields(node: ast.ClassDef) -> str:
    lines = ["| field | type | default | what it is |", "|---|---|---|---|"]
    for field, following in zip(node.body, [*node.body[1:], None]):
        if isinstance(field, ast.AnnAssign):
            default = f"`{ast.unparse(field.value)}`" if field.value else "must be given"
            said = following.value.value if _is_docstring(following) else ""  # type: ignore
            cells = [f"`{ast.unparse(field.target)}`", f"`{ast.unparse(field.annotation)}`", default]
            lines.append("| " + " | ".join(_cell(cell) for cell in [*cells, " ".join(str(said).split())]) + " |")
    return "\n".join(lines)


def _is_docstring(node: ast.stmt | None) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def python() -> str:
    """The names of `fineline_jax`, with signature and docstring."""
    return "\n\n".join(["# Python", inspect.getdoc(fineline_jax) or "", *_public()])


def _public() -> Iterator[str]:
    for name in fineline_jax.__all__:
        value = getattr(fineline_jax, name)
        if callable(value):
            signature = re.sub(r"fineline_jax\.(\w+\.)*", "", str(inspect.signature(value)))
            said = textwrap.indent(inspect.getdoc(value) or "", "    ")
            yield f"## {name}\n\n```python\n{name}{signature}\n```\n\n{said}"
