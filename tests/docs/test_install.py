"""What the pages of installation and environment say: extras, memory, variables, exit statuses."""

import itertools
import re
import tomllib

import pytest
from docs_pages import CHECKOUT, page, table, ticked

from fineline_jax.catalogue import load_recipe
from fineline_jax.errors import UserError
from fineline_jax.scoring.job_shard import job_shard

WEIGHTS = {"training: weights, moments, gradient": 16, "scoring in float32": 4, "scoring in bfloat16": 2}
"""Column -> bytes per parameter."""
UNITS = {"MB": 1e6, "GB": 1e9, "M": 1e6, "B": 1e9}


def amount(text: str) -> float:
    number, unit = text.split()
    return float(number) * UNITS[unit]


def test_every_extra_is_listed() -> None:
    project, text = tomllib.loads(page("pyproject.toml"))["project"], page("docs/start/install.md")
    in_tables = {name for row in table("docs/start/install.md", "extra") for name in ticked(row["extra"])}
    assert {*re.findall(r"'\.\[(\w+)\]'", text), *in_tables} == set(project["optional-dependencies"])
    assert f"Python {project['requires-python'].removeprefix('>=')} or newer" in text


def test_memory_follows_from_the_number_of_parameters() -> None:
    for row in table("docs/start/install.md", "parameters"):
        [name] = ticked(row["model"])
        parameters = load_recipe(name).model.parameters
        assert amount(row["parameters"]) == pytest.approx(parameters, rel=0.05)
        for column, bytes_each in WEIGHTS.items():
            assert amount(row[column]) == pytest.approx(bytes_each * parameters, rel=0.05), (name, column)


def test_the_job_variables_are_those_that_part_auto_reads_in_this_order() -> None:
    rows = table("docs/reference/environment.md", "variable")
    [listed] = [ticked(row["variable"]) for row in rows if "--part auto" in row["read by"]]
    for variable in listed:
        assert job_shard("auto/2", {variable: "1"}).index == 1
    for variable in listed[-3:]:
        with pytest.raises(UserError, match="no job index"):
            job_shard("auto/2", {variable: "1"}, distributed=True)
    for first, later in itertools.pairwise(listed):
        assert job_shard("auto/2", {later: "1", first: "0"}).index == 0


def test_every_variable_that_is_listed_is_read() -> None:
    listed = {name for row in table("docs/reference/environment.md", "variable") for name in ticked(row["variable"])}
    of_libraries = {"HF_HOME", "JAX_COMPILATION_CACHE_DIR"}
    code = "".join(path.read_text() for path in (CHECKOUT / "fineline_jax").rglob("*.py"))
    code += "".join(path.read_text() for path in (CHECKOUT / "tests").rglob("*.py"))
    assert all(name in code for name in listed - of_libraries)


def test_the_exit_statuses_are_those_of_the_command() -> None:
    from fineline_jax.cli import main

    statuses = [row["status"] for row in table("docs/reference/environment.md", "status")]
    described = re.findall(r"\b(0|1|2|130|143)\b", main.__doc__ or "")
    assert statuses == described
