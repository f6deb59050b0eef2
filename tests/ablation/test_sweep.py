"""Sweeps as values: their arms, seeds, learning-rate rules and checks; nothing is trained here."""

import dataclasses
import itertools
from pathlib import Path

import pytest
from docs_pages import python_blocks
from hypothesis import given, settings
from hypothesis import strategies as st
from sweep_examples import LENGTH, TOKENS, small_recipe

from fineline_jax.ablation import Arm, Branches, Sweep, changed, grid, ladder
from fineline_jax.ablation.sweep import load_sweep
from fineline_jax.errors import UserError
from fineline_jax.models.config import ModelConfig
from fineline_jax.recipe import Schedule, fields

BASE = small_recipe(Path("corpus"))


def test_the_demo_sweep_is_three_batches_times_three_warmups_times_two_seeds_of_equal_tokens():
    trials = load_sweep("batch_warmup_demo").trials()
    assert len(trials) == 18 and len({trial.name for trial in trials}) == 18
    assert {trial.tokens for trial in trials} == {819_200}
    found = {(t.recipe.batch.sequences, t.recipe.optimizer.schedule.warmup_tokens, t.seed) for t in trials}
    assert found == set(itertools.product((8, 16, 32), (0, 51_200, 204_800), (0, 1)))
    # The demo's peak is .003 at a batch of 16 windows.
    peaks = {t.recipe.batch.sequences: t.recipe.optimizer.schedule.peak for t in trials}
    assert peaks == {size: pytest.approx(0.003 * (size / 16) ** 0.5) for size in (8, 16, 32)}
    assert all(t.recipe.kept_steps()[-1] == t.last_step and len(t.recipe.kept_steps()) == 7 for t in trials)


@pytest.mark.parametrize(("rule", "factor"), [("fixed", 1.0), ("square_root", 2.0), ("linear", 4.0)])
def test_peak_and_final_rate_follow_the_batch_by_the_rule_and_not_where_an_arm_names_the_peak(rule, factor):
    arms = (
        Arm("base"),
        Arm("four", {"batch.sequences": 16}),
        Arm("named", {"batch.sequences": 16, "optimizer.schedule.peak": 0.5}),
    )
    base, four, named = (t.recipe.optimizer.schedule for t in Sweep("s", BASE, arms, learning_rate_rule=rule).trials())
    assert base == BASE.optimizer.schedule
    assert (four.peak, four.final) == (pytest.approx(1e-2 * factor), pytest.approx(1e-3 * factor))
    assert (named.peak, named.final) == (0.5, 1e-3)


def test_beta2_halves_the_weight_of_a_squared_gradient_in_the_same_tokens_for_every_batch():
    arms = (*grid({"batch.sequences": (2, 4, 8)}), Arm("named", {"optimizer.beta2": 0.9}))
    *ruled, named = Sweep("s", BASE, arms, beta2_half_life=512).trials()
    for trial in ruled:
        steps_of_half_life = 512 / (trial.recipe.batch.sequences * LENGTH)
        assert trial.recipe.optimizer.beta2**steps_of_half_life == pytest.approx(0.5)
    assert named.recipe.optimizer.beta2 == 0.9


@pytest.mark.parametrize(
    ("seeded", "expected"), [("both", [(5, 5), (6, 6)]), ("weights", [(5, 0), (6, 0)]), ("data", [(0, 5), (0, 6)])]
)
def test_a_seed_sets_weights_and_data_order_or_one_of_them(seeded, expected):
    trials = Sweep("s", BASE, (Arm("a"),), seeds=(5, 6), seeded=seeded).trials()
    assert [(trial.recipe.seed, trial.recipe.order_seed) for trial in trials] == expected


def test_a_horizon_before_the_end_of_the_schedule_leaves_the_schedule_as_it_is():
    (trial,) = Sweep("s", BASE, (Arm("a"),), until=100).trials()
    assert trial.recipe.optimizer.schedule == BASE.optimizer.schedule and trial.recipe.tokens == TOKENS
    assert (trial.steps, trial.tokens) == (3, 96)  # steps of 32 tokens; a fourth would be 128


axis = st.lists(st.integers(1, 32), min_size=1, max_size=3, unique=True)


@settings(max_examples=30, deadline=None)
@given(axis, axis, axis)
def test_a_grid_has_every_combination_once_under_a_name_of_its_own(first, second, third):
    axes = {"batch.sequences": first, "optimizer.schedule.warmup_tokens": second, "logging.every_steps": third}
    arms = grid(axes)
    assert [tuple(arm.changes.values()) for arm in arms] == list(itertools.product(first, second, third))
    assert len({arm.name for arm in arms}) == len(arms)
    for arm in arms:
        recipe = changed(BASE, arm.changes)
        assert {field: fields(recipe)[field] for field in axes} == arm.changes


def test_values_without_a_name_of_their_own_are_named_and_fields_of_one_name_are_told_apart():
    arms = grid({"optimizer.schedule": {"flat": Schedule(kind="constant"), "line": Schedule(kind="linear")}})
    assert [arm.name for arm in arms] == ["schedule-flat", "schedule-line"]
    assert changed(BASE, arms[0].changes).optimizer.schedule == Schedule(kind="constant")
    (arm,) = grid({"model.width": [16], "model.mlp_width": [24]})
    assert arm.name == "width-16_mlp_width-24"
    (arm,) = grid({"data.sources.0.path": {"wiki": "x"}, "logging.validation.0.path": {"held": "y"}})
    assert arm.name == "data.sources.0.path-wiki_logging.validation.0.path-held"


def test_a_ladder_trains_each_size_for_its_multiple_of_tokens_with_the_warmup_in_proportion():
    arms = ladder(BASE, {"s": {"model.width": 16}, "m": {"model.width": 32, "model.layers": 2}}, tokens_per_parameter=2)
    for arm, (width, layers) in zip(arms, [(16, 1), (32, 2)], strict=True):
        model = ModelConfig(vocab_size=32, width=width, layers=layers, heads=2, mlp_width=16, context=LENGTH)
        recipe = changed(BASE, arm.changes)
        assert recipe.model == model
        assert recipe.tokens == 2 * model.parameters
        assert recipe.optimizer.schedule.warmup_tokens == pytest.approx(recipe.tokens / 4, abs=1)
    assert len(Sweep("s", BASE, arms).trials()) == 2  # sizes may differ in tokens
    assert changed(BASE, ladder(BASE, {"s": {"model.width": 16}})[0].changes).tokens == TOKENS


def test_a_rounding_to_whole_steps_is_no_difference_of_tokens_and_a_whole_step_is():
    arms = grid({"batch.sequences": (3, 4, 5)})
    tokens = {t.arm: t.tokens for t in Sweep("s", BASE, arms).trials()}
    assert tokens == {"sequences-3": 240, "sequences-4": 256, "sequences-5": 240}
    arms = (Arm("a"), Arm("b", {"tokens": TOKENS - 32}))
    with pytest.raises(UserError, match=r"b_seed-0 trains 224 tokens and a_seed-0 256; give all arms the same tokens"):
        Sweep("s", BASE, arms)
    assert len(Sweep("s", BASE, arms, equal_tokens=False).trials()) == 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"arms": ()}, "sweep s: has no arms"),
        ({"seeds": ()}, "sweep s: has no seeds"),
        ({"seeds": (1, 1)}, "sweep s: seed 1 is there twice"),
        ({"arms": (Arm("a"), Arm("a"))}, "sweep s: arm a is there twice"),
        ({"arms": (Arm("a/b"),)}, "the name 'a/b' is no name of a folder"),
        ({"name": ".."}, "the name '..' is no name of a folder"),
        ({"arms": (Arm("a", {"seed": 3}),)}, "arm a sets seed, which the sweep does"),
        ({"arms": (Arm("a", {"batch.sequence": 3}),)}, "no field batch.sequence; did you mean batch.sequences"),
        ({"arms": (Arm("a", {"batch.sequences": "many"}),)}, "batch.sequences: Input should be a valid integer"),
        ({"arms": (Arm("a", {"batch.sequences": 0}),)}, "batch.sequences must be at least 1"),
        ({"arms": (Arm("a", {"data.sources.1.path": "x"}),)}, "has no field data.sources.1.path"),
        ({"until": 31}, "a_seed-0 has no whole step of 32 tokens"),
        ({"branches": Branches("x", (1,), 32), "until": 64}, "branches have steps and tokens of their own"),
        ({"branches": Branches("x", (), 32)}, "branches have steps and tokens of their own"),
        ({"branches": Branches("nowhere", (7,), 32)}, "nowhere: has no checkpoint of step 7"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_in_one_line_that_names_what(values, message):
    with pytest.raises(UserError) as refused:
        Sweep(**({"name": "s", "base": BASE, "arms": (Arm("a"),)} | values))
    assert message in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"learning_rate_rule": "sqrt"}, "learning_rate_rule='sqrt': give one of fixed, square_root, linear"),
        ({"seeded": "weight"}, "seeded='weight': give one of both, weights, data"),
        ({"keep": "none"}, "keep='none': give one of all, weights, last"),
        ({"branches": Branches("run", (1,), 64, "new")}, "optimizer_state='new': give one of kept, fresh"),
    ],
)
def test_a_word_that_a_field_cannot_be_is_answered_with_those_it_can(fields, message):
    with pytest.raises(UserError) as refused:
        Sweep("s", BASE, grid({"batch.sequences": (2,)}), **fields)
    assert str(refused.value) == f"sweep s: {message}"


def test_a_file_without_a_sweep_is_named(tmp_path):
    file = tmp_path / "mine.py"
    for text, message in (
        ("", ": has no function sweep(); define one that returns a fineline_jax.ablation.sweep.Sweep"),
        ("def sweep(): return 3", ": sweep() returned int; return a fineline_jax.ablation.sweep.Sweep"),
        ("def sweep(): return 1 / 0", ":1: ZeroDivisionError: division by zero; correct the file"),
    ):
        file.write_text(text)
        with pytest.raises(UserError) as refused:
            load_sweep(str(file))
        assert str(refused.value) == f"{file}{message}"
    with pytest.raises(UserError, match="no sweep named 'batch_warmup'; did you mean 'batch_warmup_demo'"):
        load_sweep("batch_warmup")


def test_the_sweep_of_ones_own_on_the_page_is_a_whole_one_in_under_fifteen_lines(tmp_path):
    (text,) = [block for block in python_blocks("docs/ablate.md") if "def sweep" in block]
    assert len(text.strip().splitlines()) < 15
    (tmp_path / "mine.py").write_text(text)
    trials = load_sweep(str(tmp_path / "mine.py")).trials()
    assert len(trials) == 8 and {trial.tokens for trial in trials} == {819_200}


def test_a_horizon_given_beside_the_sweep_is_that_of_every_run():
    sweep = Sweep("s", BASE, grid({"batch.sequences": (2, 4)}))
    half = BASE.tokens // 2
    assert load_sweep(sweep) is sweep
    assert {trial.until for trial in load_sweep(sweep, half).trials()} == {half}
    assert {trial.until for trial in load_sweep("batch_warmup_demo", 409_600).trials()} == {409_600}
    with pytest.raises(UserError, match=r"until .* tokens, but the longest run has .*; give fewer"):
        load_sweep(sweep, BASE.tokens + 1)
    with pytest.raises(UserError, match="--until 0: give the tokens"):
        load_sweep(sweep, 0)


def test_a_sweep_is_a_value():
    sweep = Sweep("s", BASE, grid({"batch.sequences": (2, 4)}))
    assert sweep == Sweep("s", BASE, grid({"batch.sequences": (2, 4)}))
    with pytest.raises(dataclasses.FrozenInstanceError):
        sweep.name = "t"  # pyright: ignore[reportAttributeAccessIssue]
