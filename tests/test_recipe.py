"""Recipes: the constants as published, errors that name the field, and a JSON file that can be given back."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fineline_jax.catalogue import config_names, find_config, load_recipe
from fineline_jax.errors import UserError
from fineline_jax.models.config import ModelConfig
from fineline_jax.recipe import (
    Batch,
    Checkpoints,
    Data,
    Every,
    Logging,
    Optimizer,
    Recipe,
    Schedule,
    Source,
    differences,
    from_json,
    to_json,
)

GOLDEN = Path(__file__).parent / "golden"
RECIPES = config_names("{}.py")


def small(**changes) -> Recipe:
    values = {
        "name": "small",
        "model": ModelConfig(vocab_size=64, width=16, layers=1, heads=2, mlp_width=32, context=16),
        "data": Data((Source("x"),), sequence_length=16),
        "batch": Batch(4),
        "optimizer": Optimizer(Schedule()),
        "tokens": 6400,
    }
    return Recipe(**(values | changes))


@pytest.mark.parametrize("name", RECIPES)
def test_every_resolved_recipe_is_the_golden_text(name):
    """A change here is a change of what people reproduce. Write the files anew with: python tests/test_recipe.py"""
    assert to_json(load_recipe(name)) == (GOLDEN / f"{name}.json").read_text()


def test_the_recipes_of_the_issue_are_there():
    assert set(RECIPES) >= {
        "demo", "llama_60m", "llama_350m", "llama_1b", "amber_7b",
        "open_llama_3b", "open_llama_7b", "open_llama_13b", "open_llama_7b_v2",
    }  # fmt: skip


def test_amber_has_360_chunks_of_762_steps():
    amber = load_recipe("amber_7b")
    assert amber.model.parameters == 6_738_415_616
    assert amber.tokens_per_step == 4_587_520
    assert amber.steps == 274_320
    assert amber.kept_steps() == tuple(range(0, 274_321, 762))


def test_the_demo_keeps_at_least_twelve_checkpoints():
    assert len(load_recipe("demo").kept_steps()) >= 12


def test_open_llama_has_100_milestones_of_2500_steps():
    open_llama = load_recipe("open_llama_7b")
    assert open_llama.tokens_per_step == 4_194_304
    assert open_llama.kept_steps() == tuple(range(0, 250_001, 2_500))


@pytest.mark.parametrize("name", RECIPES)
def test_a_written_recipe_can_be_given_back(name, tmp_path):
    recipe = load_recipe(name)
    (tmp_path / "recipe.json").write_text(to_json(recipe))
    assert load_recipe(str(tmp_path)) == load_recipe(str(tmp_path / "recipe.json")) == recipe


@given(
    sequences=st.integers(1, 9),
    steps=st.integers(1, 400),
    dense=st.integers(1, 900),
    sparse=st.integers(1, 5000),
    until=st.integers(1, 5000),
    at=st.lists(st.integers(0, 20_000), max_size=4),
)
@settings(max_examples=100, deadline=None)
def test_a_milestone_is_the_first_step_with_at_least_its_tokens(sequences, steps, dense, sparse, until, at):
    tokens = sequences * 16 * steps
    recipe = small(
        batch=Batch(sequences),
        tokens=tokens,
        checkpoints=Checkpoints(initial=False, at_tokens=tuple(at), every=(Every(dense, until), Every(sparse))),
    )
    end = min(until, tokens)
    milestones = list(range(dense, end + 1, dense)) + [t for t in range(sparse, tokens + 1, sparse) if t > end]
    milestones += [t for t in at if t <= tokens]
    expected = {next(s for s in range(steps + 1) if s * sequences * 16 >= t) for t in milestones} | {steps}
    assert recipe.kept_steps() == tuple(sorted(expected))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"batch": Batch(4, accumulation=3)}, "batch.sequences=4"),
        ({"batch": Batch(0)}, "batch.sequences"),
        ({"tokens": 10}, "tokens=10"),
        ({"data": Data((), sequence_length=16)}, "data.sources"),
        ({"data": Data((Source("x"),), sequence_length=32)}, "data.sequence_length=32"),
        ({"data": Data((Source("x"), Source("y")), sequence_length=16, order="chunks")}, "data.order"),
        ({"optimizer": Optimizer(Schedule(peak=-1.0))}, "optimizer.schedule.peak"),
        ({"optimizer": Optimizer(Schedule(final=1.0))}, "optimizer.schedule.final"),
        ({"optimizer": Optimizer(Schedule(warmup_tokens=7000))}, "optimizer.schedule.warmup_tokens"),
        ({"optimizer": Optimizer(Schedule(kind="wsd"))}, "optimizer.schedule.decay_tokens"),
        ({"optimizer": Optimizer(Schedule(), beta2=1.0)}, "optimizer.beta2"),
        ({"checkpoints": Checkpoints(every=(Every(10), Every(20)))}, "checkpoints.every"),
        ({"optimizer": Optimizer(Schedule(kind="multistep", milestones=((0.5, -1.0),)))}, "schedule.milestones"),
        ({"optimizer": Optimizer(Schedule(), eps=math.inf)}, "optimizer.eps=inf"),
        ({"logging": Logging(peak_tflops=-1.0)}, "logging.peak_tflops"),
        ({"logging": Logging(wandb_project="")}, "logging.wandb_project"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_name(change, field):
    with pytest.raises(UserError) as error:
        small(**change)
    assert field in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("sed", 1, "unknown field sed"),
        ("seed", "one", "seed: Input should be a valid integer"),
        ("tokens", 1, "tokens=1 is less than one step"),
    ],
)
def test_a_bad_recipe_file_is_refused_by_file_and_field(tmp_path, key, value, message):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(json.loads(to_json(small())) | {key: value}))
    with pytest.raises(UserError, match=message) as error:
        from_json(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_a_recipe_file_cut_off_is_refused_with_the_remedy(tmp_path):
    path = tmp_path / "recipe.json"
    path.write_text(to_json(small())[:100])
    with pytest.raises(UserError, match=r"Invalid JSON.*delete it where it is a run's") as error:
        from_json(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_differences_name_the_fields():
    changed = dataclasses.replace(small(), seed=1, batch=Batch(8))
    assert differences(small(), changed) == ["batch.sequences: 4 -> 8", "seed: 0 -> 1"]


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(UserError, match=r"did you mean 'llama_60m'\? known: .*open_llama_7b"):
        find_config("lama_60m", "{}.py", "recipe")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def recipe():\n    return 3\n", r"mine\.py: recipe\(\) returned int"),
        ("def recipe():\n    return 3 / 0\n", r"mine\.py: ZeroDivisionError: division by zero; mend the file"),
        ("def recipe(:\n", r"mine\.py: SyntaxError"),
        ("recipe = 3\n", r"mine\.py: has no function recipe\(\)"),
    ],
)
def test_a_recipe_file_with_a_mistake_is_named(tmp_path, text, message):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_recipe(str(path))


if __name__ == "__main__":
    for recipe_name in RECIPES:
        (GOLDEN / f"{recipe_name}.json").write_text(to_json(load_recipe(recipe_name)))
