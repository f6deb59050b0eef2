"""What mkdocs builds besides the pages of this folder: pages of the root, and references made from the code."""

import ast
import contextlib
import dataclasses
import inspect
import io
import math
import os
import posixpath
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import fineline_jax
from fineline_jax.cli import main
from fineline_jax.facts.metrics import METRICS
from fineline_jax.facts.score_table import TABLE
from fineline_jax.facts.tasks import TASKS
from fineline_jax.recipe import Recipe
from fineline_jax.scoring.options import PackOptions, ScoreOptions
from fineline_jax.trajectories.registry import ON_REQUEST, STATISTICS

ROOT = Path(__file__).parent.parent
ROOT_PAGES = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "project/architecture.md",
    "BENCHMARKS.md": "project/benchmarks.md",
    "CHANGELOG.md": "project/changelog.md",
    "CONTRIBUTING.md": "project/contributing.md",
}
COMMANDS = (
    "demo", "data prepare text", "data prepare amber", "data prepare world", "plan", "pretrain",
    "tasks prepare", "tasks plan", "score", "show", "analyze", "ablate", "series", "export", "import",
    "export-scores", "traces", "lm-eval",
)  # fmt: skip
HELP_WIDTH = "88"  # columns
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the root and those made from the code."""
    for source, target in ROOT_PAGES.items():
        files.append(File.generated(config, target, content=(ROOT / source).read_text(encoding="utf-8")))
    for make in (command_line, recipe, python, metrics, statistics):
        files.append(File.generated(config, f"reference/{make.__name__}.md", content=make()))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Links between files of the checkout become links between pages of the site."""
    return moved_links(markdown, page.file.src_uri)


def moved_links(markdown: str, target: str) -> str:
    """The text of page `target` of the site, where its links lead to pages of the site."""
    sources = {page: source for source, page in ROOT_PAGES.items()}
    folder = posixpath.dirname(sources.get(target, f"docs/{target}"))

    def moved(match: re.Match) -> str:
        file = posixpath.normpath(posixpath.join(folder, match[1]))
        page = ROOT_PAGES.get(file, file.removeprefix("docs/"))
        return f"]({posixpath.relpath(page, posixpath.dirname(target) or '.')}{match[2] or ''})"

    return LINK.sub(moved, markdown)


def command_line() -> str:
    """`--help` of every command, as it is printed."""
    parts = ["# Command line"]
    for name in ("", *COMMANDS):
        parts += [f"## fineline {name}".rstrip(), textwrap.indent(help_of(name), "    ")]
    return "\n\n".join(parts)


def help_of(command: str) -> str:
    """What `fineline COMMAND --help` prints, without colours."""
    os.environ["COLUMNS"] = HELP_WIDTH
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        main([*command.split(), "--help"])
    return re.sub(r"\x1b\[[0-9;]*m| +$", "", out.getvalue(), flags=re.M).strip("\n")


def recipe() -> str:
    """Every field of a recipe, part by part."""
    parts = [
        "# Recipe fields",
        "A recipe is a value of `fineline_jax.Recipe`, made of the parts below ([Pretrain](../pretrain.md)). Each field"
        " of a part is also an option of `fineline pretrain RECIPE`: `--optimizer.schedule.peak 5e-4`. A number in an"
        " option's name counts the entries of a list, from 0.",
    ]
    for prefix, kind in recipe_parts(Recipe):
        title = f"`{prefix}`: {kind.__name__}" if prefix else kind.__name__
        parts += [f"## {title} {{ #{kind.__name__.lower()} }}", _prose(kind), _table_of_fields(kind)]
    return "\n\n".join(parts)


def recipe_parts(kind: type, prefix: str = "") -> Iterator[tuple[str, type]]:
    """(prefix of its options, dataclass) of a recipe and of what it is made of."""
    yield prefix, kind
    for name, hint in get_type_hints(kind).items():
        entries = get_origin(hint) is tuple
        inner = get_args(hint)[0] if entries else hint
        if dataclasses.is_dataclass(inner):
            yield from recipe_parts(inner, f"{prefix}.{name}".removeprefix(".") + (".0" if entries else ""))


def _table_of_fields(kind: type) -> str:
    [node] = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(node, ast.ClassDef)
    rows = []
    for field, following in zip(node.body, [*node.body[1:], None]):
        if isinstance(field, ast.AnnAssign):
            name = ast.unparse(field.target)
            default = f"`{ast.unparse(field.value)}`" if field.value else "required"
            rows.append((f"`{name}`", f"`{ast.unparse(field.annotation)}`", default, field_text(kind, name, following)))
    return _table("field | type | default | what it is", rows)


def field_text(kind: type, name: str, following: ast.stmt | None) -> str:
    """The docstring behind a field, or the paragraph of "Args:", or, of a part, what its class says first."""
    if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
        return str(following.value.value)
    listed = re.search(rf"^    {name}: (.*(?:\n {{8}}.*)*)", inspect.getdoc(kind) or "", flags=re.M)
    if listed:
        return listed[1]
    part = get_type_hints(kind)[name]
    return f"[{(inspect.getdoc(part) or '').partition('.')[0]}](#{part.__name__.lower()})"


def python() -> str:
    """The names of `fineline_jax`, with signature and docstring."""
    parts = ["# Python", "What the commands do, as functions of `fineline_jax`. Bad input raises `UserError`."]
    for name in fineline_jax.__all__:
        value = getattr(fineline_jax, name)
        parts.append(f"## {name}")
        if inspect.isclass(value):
            parts.append(f"{_prose(value)} [Its fields](recipe.md#{name.lower()}).")
        else:
            arguments = "|".join(inspect.signature(value).parameters)
            prose = re.sub(rf"(?<!\w)({arguments}):", r"`\1`:", _prose(value))
            parts += [f"```python\n{_head(value)}\n```", prose]
    for options, function in ((PackOptions, "prepare_pack"), (ScoreOptions, "score")):
        parts += [f"## Options of {function}", _prose(options), _table_of_fields(options)]
    return "\n\n".join(parts)


def _head(function: Callable) -> str:
    """Name, arguments and result, as they are written."""
    return inspect.getsource(function).partition('    """')[0].rstrip().removesuffix(":").removeprefix("def ")


def metrics() -> str:
    """What is known of metrics and tasks, and the columns of the tidy table (`fineline_jax/facts`)."""
    better = {1: "higher", -1: "lower"}
    of_metrics = [
        (f"`{one.name}`", one.label, one.unit, better[one.better], one.chance, "log" if one.log else "linear",
         one.computed_by)
        for one in METRICS.values()
    ]  # fmt: skip
    of_tasks = [
        (f"`{one.name}`", one.domain, _share(one.chance), f"{one.documents:,}" if one.documents else "",
         f"`{one.metric}`" if one.metric else "", ", ".join(f"`{alias}`" for alias in one.aliases))
        for one in TASKS
    ]  # fmt: skip
    return "\n\n".join([
        "# Metrics and tasks",
        "## Metrics",
        "How a metric is read by `fineline score` and `fineline analyze`; how each is computed:"
        " [Scoring](../scoring.md#metrics). Chance `task`: the chance level of the task; `generated`: 0 for generated"
        " answers, not known for choices; `none`: guessing has no level. Scale `log`: rise and noise are measured on"
        " the logarithm. Computed by `other tables`: only read, from results of others. A metric that is not listed is"
        " read like the one whose name it extends, else as higher is better.",
        _table("name | label | unit | better | chance | scale | computed by", of_metrics),
        "## Tasks",
        "Which domain a task counts towards, what guessing gives as accuracy, how many documents lm-eval scores, and"
        " which metric is reported first. Empty: not known, or not one number. A name that ends in `*` stands for all"
        " that begin so. A task that is not listed has domain `other` and no chance level, unless its suite has them.",
        _table("task | domain | chance | documents | first metric | other names", of_tasks),
        "## Columns of the tidy table",
        "One row per series, checkpoint, task and metric: `tidy.csv` of a report.",
        _table("column | kind | what it is", [(f"`{name}`", *column) for name, column in TABLE.items()]),
    ])  # fmt: skip


def statistics() -> str:
    """The statistics of a report: definition, caveat, source and columns of each (`trajectories/registry.py`)."""
    parts = [
        "# Statistics",
        "What `fineline analyze` computes: each is a table NAME`.csv` and `.parquet` of the report, a "
        "section of its page,"
        " a figure, and part of `findings.json`. Unit: 1 for shares and counts, empty for words.",
    ]
    for one in (*STATISTICS, *ON_REQUEST):
        parts += [f"## {one.name}", f"*{one.title}* {one.definition}", one.caveat, f"Source: {one.source}."]
        columns = [(f"`{c.name}`", c.unit, c.meaning, c.empty or "never") for c in one.columns]
        parts.append(_table("column | unit | what it is | empty", columns))
    return "\n\n".join(parts)


def _share(chance: float) -> str:
    return "" if math.isnan(chance) else str(Fraction(chance).limit_denominator(100))


def _prose(value: object) -> str:
    """The docstring, without its list of arguments."""
    return (inspect.getdoc(value) or "").partition("\n\nArgs:")[0]


def _table(heading: str, rows: Iterable[Sequence[str]]) -> str:
    columns = heading.split(" | ")
    cells = [[" ".join(cell.replace(" | ", " or ").split()) for cell in line] for line in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *cells))
