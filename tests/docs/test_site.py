"""The site of docs/: it builds without a warning, and its generated pages hold all that the code has."""

import dataclasses
import importlib.util
import inspect
import math
import os
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import get_args, get_type_hints

import pytest
import yaml
from docs_pages import CHECKOUT, PAGES, page
from tyro.extras import SubcommandApp

import fineline_jax
from fineline_jax.cli import command_line
from fineline_jax.facts.metrics import METRICS
from fineline_jax.facts.score_table import COLUMNS
from fineline_jax.facts.tasks import TASKS
from fineline_jax.recipe import Recipe
from fineline_jax.scoring.options import PackOptions, ScoreOptions
from fineline_jax.trajectories.registry import ON_REQUEST, STATISTICS

pytest.importorskip("mkdocs")


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("site_hooks", CHECKOUT / "docs/site_hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def recipe_page(hooks: ModuleType) -> str:
    return hooks.recipe()


def rows(markdown: str, heading: str) -> list[list[str]]:
    """The cells of the table below a heading, without its first two lines."""
    section = re.split(r"^## ", markdown.partition(f"## {heading}")[2], maxsplit=1, flags=re.M)[0]
    return [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in re.findall(r"^\|.*", section, re.M)][2:]


def test_every_field_of_a_recipe_has_a_row_that_says_what_it_is(hooks: ModuleType, recipe_page: str) -> None:
    parts = list(hooks.recipe_parts(Recipe))
    assert [prefix for prefix, _ in parts][:5] == ["", "model", "model.rope_scaling", "data", "data.sources.0"]
    for prefix, kind in parts:
        found = rows(recipe_page, f"`{prefix}`: {kind.__name__}" if prefix else "Recipe {")
        assert [row[0] for row in found] == [field.name for field in dataclasses.fields(kind)], prefix
        for name, kind_of_value, default, meaning in found:
            assert len(meaning) > 5 and kind_of_value and default, f"{prefix}.{name}"


def test_every_field_of_a_recipe_is_an_option_with_a_text(hooks: ModuleType) -> None:
    shown = dict(re.findall(r"^  --([\w.-]+).*\n +(\(?\w+)", hooks.help_of("pretrain"), re.M))
    for prefix, kind in hooks.recipe_parts(Recipe):
        for name, hint in get_type_hints(kind).items():
            option = f"{prefix}.{name}".removeprefix(".").replace("_", "-")
            inner = (*get_args(hint), hint)[0]
            assert dataclasses.is_dataclass(inner) or shown[option] != "(default", option


def test_every_command_has_its_help(hooks: ModuleType) -> None:
    def commands(app: SubcommandApp, prefix: str = "") -> list[str]:
        found = []
        for name, one in app._subcommands.items():
            group = isinstance(one.target, SubcommandApp)
            found += commands(one.target, f"{prefix}{name} ") if group else [f"{prefix}{name}"]
        return found

    assert sorted(hooks.COMMANDS) == sorted(commands(command_line()))
    text = hooks.command_line()
    headings = re.findall(r"^## fineline ?(.*)", text, flags=re.M)
    assert headings == ["", *hooks.COMMANDS]
    sections = re.split(r"^## .*\n", text, flags=re.M)[1:]
    assert all("    usage: " in section and "\x1b" not in section for section in sections)
    assert max(map(len, text.splitlines())) < 200


def test_the_python_page_has_every_public_name_and_option(hooks: ModuleType) -> None:
    text = hooks.python()
    for name in fineline_jax.__all__:
        assert f"\n## {name}\n" in text
        value = getattr(fineline_jax, name)
        if inspect.isfunction(value):
            head = text.partition(f"```python\n{name}(")[2].partition("```")[0]
            assert all(f"{argument}:" in head for argument in inspect.signature(value).parameters), name
    for options, function in ((PackOptions, "prepare_pack"), (ScoreOptions, "score")):
        found = rows(text, f"Options of {function}")
        assert [row[0] for row in found] == [field.name for field in dataclasses.fields(options)]
        assert all(len(row[-1]) > 10 for row in found)


def test_the_page_of_metrics_is_that_of_the_facts(hooks: ModuleType) -> None:
    text = hooks.metrics()
    for row, one in zip(rows(text, "Metrics"), METRICS.values(), strict=True):
        better, scale = "higher" if one.better > 0 else "lower", "log" if one.log else "linear"
        assert row == [one.name, one.label, one.unit, better, one.chance, scale, one.computed_by]
    for row, one in zip(rows(text, "Tasks"), TASKS, strict=True):
        assert row[:2] == [one.name, one.domain]
        assert math.isnan(one.chance) if row[2] == "" else float(Fraction(row[2])) == pytest.approx(one.chance)
        documents = f"{one.documents:,}" if one.documents else ""
        assert row[3:] == [documents, one.metric or "", "`, `".join(one.aliases)]
    assert tuple(row[0] for row in rows(text, "Columns")) == COLUMNS


def test_the_page_of_statistics_has_every_registered_one_with_its_columns(hooks: ModuleType) -> None:
    text = hooks.statistics()
    for one in (*STATISTICS, *ON_REQUEST):
        assert one.definition and one.caveat and one.source and one.definition in text and one.caveat in text, one.name
        assert [row[0] for row in rows(text, one.name)] == [column.name for column in one.columns]
        assert {column.name for column in one.columns} >= {*one.ends, *one.keys, *([one.count] if one.count else [])}
        assert one.chart is None or one.chart.value in {column.name for column in one.columns}
    assert len({one.name for one in STATISTICS}) == len(STATISTICS)


@pytest.mark.parametrize(
    ("target", "link", "moved"),
    [
        ("index.md", "docs/world.md#a-b", "world.md#a-b"),
        ("index.md", "docs/figures/demo_overview.png", "figures/demo_overview.png"),
        ("index.md", "BENCHMARKS.md", "project/benchmarks.md"),
        ("project/contributing.md", "docs/guides/add_a_mode.md", "../guides/add_a_mode.md"),
        ("project/contributing.md", "ARCHITECTURE.md", "architecture.md"),
        ("world.md", "../README.md#two-commands", "index.md#two-commands"),
        ("world.md", "start/tour.md", "start/tour.md"),
        ("guides/add_a_mode.md", "../suites.md#scoring-modes", "../suites.md#scoring-modes"),
        ("guides/add_a_mode.md", "../../BENCHMARKS.md", "../project/benchmarks.md"),
        ("reference/recipe.md", "#model", "#model"),
        ("index.md", "https://arxiv.org/abs/2404.01204", "https://arxiv.org/abs/2404.01204"),
    ],
)
def test_links_of_the_checkout_become_links_of_the_site(hooks: ModuleType, target: str, link: str, moved: str) -> None:
    assert hooks.moved_links(f"a [b]({link}), c", target) == f"a [b]({moved}), c"


def test_every_page_of_docs_has_its_line_in_the_navigation(hooks: ModuleType) -> None:
    def pages(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        inner = entry if isinstance(entry, list) else list(entry.values())  # type: ignore
        return [name for one in inner for name in pages(one)]

    listed = pages(yaml.safe_load(page("mkdocs.yml"))["nav"])
    of_docs = {name.removeprefix("docs/") for name in PAGES if name.startswith("docs/")}
    made = {f"reference/{make}.md" for make in ("command_line", "recipe", "python", "metrics", "statistics")}
    assert len(listed) == len(set(listed))
    assert set(listed) == of_docs | made | set(hooks.ROOT_PAGES.values())


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """Into a folder of its own, whose pages have no link into nowhere."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=CHECKOUT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    for file in (tmp_path / "site").rglob("*.html"):
        if file.name == "404.html":
            continue
        for link in re.findall(r'(?:href|src)="([^"#]+)', file.read_text(encoding="utf-8")):
            assert re.match(r"https?:|data:|mailto:", link) or (file.parent / link.partition("?")[0]).exists(), link
