"""Sweeps that begin at checkpoints of a run, and the comparison of arms."""

from pathlib import Path

import pandas as pd
import pytest
from sweep_examples import compared, one_device_and_no_page, played, small_recipe, write_corpus

from fineline_jax import interface
from fineline_jax.ablation import Sweep, batch_branches, changed, cooldowns, grid
from fineline_jax.ablation.compare import comparisons, differences_text, read_logs, write_comparisons
from fineline_jax.ablation.summary import runs_table
from fineline_jax.errors import UserError
from fineline_jax.recipe import Recipe
from fineline_jax.training import loop
from fineline_jax.training.metrics import TIMINGS, read_metrics


@pytest.fixture(scope="module", autouse=True)
def small():
    with one_device_and_no_page():
        yield


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Recipe:
    return changed(small_recipe(write_corpus(tmp_path_factory.mktemp("corpus"))), {"seed": 3})


@pytest.fixture(scope="module")
def parent(recipe, tmp_path_factory) -> Path:
    """Checkpoints at steps 0, 4 and 8, 0, 128 and 256 tokens."""
    run = tmp_path_factory.mktemp("parent") / "run"
    loop.pretrain(recipe, run)
    return run


def trained(run: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in read_metrics(run) if "loss" in line]


def test_branches_over_batch_sizes_train_the_same_tokens_and_that_of_the_runs_own_batch_goes_on_as_the_run(
    parent, tmp_path
):
    sweep = batch_branches(parent, (4,), (4, 8), tokens=64)
    same, double = sweep.trials()
    assert [(t.clock.step, t.last_step, t.tokens) for t in (same, double)] == [(4, 6, 64), (4, 5, 64)]
    outcome = interface.ablate(sweep, tmp_path)
    assert list(outcome.table["tokens"]) == [192, 192]
    assert trained(tmp_path / "runs" / same.name) == trained(parent)[4:6]
    (line,) = trained(tmp_path / "runs" / double.name)
    before = trained(parent)[4]["learning_rate"]
    assert (line["step"], line["tokens"]) == (5, 192)
    assert line["learning_rate"] == pytest.approx(before * 2**0.5, rel=1e-6)
    (row,) = outcome.comparisons["critical_batch"].to_dict("records")
    assert (row["branch"], row["base"]) == (128, 4)


def test_a_branch_behind_the_end_of_the_runs_schedule_is_refused(parent):
    with pytest.raises(
        UserError, match=r"its schedule ends at 256 tokens, a branch of 160 at 288; branch from an earl"
    ):
        batch_branches(parent, (4,), (4,), tokens=160)
    with pytest.raises(UserError, match="has no checkpoint of step 5; branch from one that is in its folder"):
        batch_branches(parent, (5,), (4,), tokens=32)


def test_cooldowns_take_every_kept_checkpoint_and_let_the_rate_fall_to_zero(parent, tmp_path):
    sweep = cooldowns(parent, tokens=128)
    assert [trial.clock.step for trial in sweep.trials()] == [4, 8]  # not 0, each arm from its own
    only = cooldowns(parent, tokens=128, steps=(4,))
    interface.ablate(only, tmp_path)
    (trial,) = only.trials()
    rates = [line["learning_rate"] for line in trained(tmp_path / "runs" / trial.name)]
    begin = trained(parent)[4]["learning_rate"]
    assert rates == pytest.approx([begin * left for left in (1, 0.75, 0.5, 0.25)], rel=1e-6)


def test_arms_are_compared_by_the_means_of_their_validation_losses_over_seeds(recipe, tmp_path):
    arms = grid({"batch.sequences": (4, 8), "optimizer.schedule.peak": (1e-2, 2e-2)})
    sweep = Sweep("s", recipe, arms, seeds=(0, 1, 2))
    means = dict(zip([arm.name for arm in arms], (3.0, 2.9, 3.2, 3.0), strict=True))
    seeds = {0: -0.01, 1: 0.0, 2: 0.01}
    losses = {t.name: means[t.arm] + seeds[t.seed] for t in sweep.trials()}
    table = played(sweep, tmp_path, losses)
    found = compared(sweep, table, tmp_path)
    assert set(found) == {"instability", "arm_differences", "tokens_to", "final_map", "facet_cost"}
    frame = found["arm_differences"].set_index("arm")
    assert frame["difference"].tolist() == pytest.approx([0.1, -0.2, 0.0])  # better by: a loss is better when lower
    cells = found["final_map"].set_index(["x_value", "y_value"])["value"]
    assert cells.to_dict() == pytest.approx({(4, 1e-2): 3.0, (4, 2e-2): 2.9, (8, 1e-2): 3.2, (8, 2e-2): 3.0})
    assert sorted(found["instability"]["series"]) == sorted(losses)
    text = differences_text(found).splitlines()
    assert text[0] == f"Against {arms[0].name}, means of the last checkpoints of each run:" and len(text) == 3 + 3
    write_comparisons(comparisons(sweep, table, read_logs(table, tmp_path), tmp_path), tmp_path / "comparison")
    for name, frame in found.items():
        assert len(pd.read_csv(tmp_path / "comparison" / f"{name}.csv")) == len(frame)
        assert list(pd.read_parquet(tmp_path / "comparison" / f"{name}.parquet")) == list(frame)


def test_a_run_that_diverged_counts_in_the_instability_alone(recipe, tmp_path):
    arms = grid({"batch.sequences": (2, 4, 8)})
    sweep = Sweep("s", recipe, arms)
    table = played(sweep, tmp_path, {t.name: 3.0 for t in sweep.trials()})
    table.loc[1, "diverged"] = "loss nan"
    found = compared(sweep, table, tmp_path)
    assert list(found["arm_differences"]["arm"]) == [arms[2].name]
    assert len(found["instability"]) == 3


def test_nothing_ended_is_an_empty_table(recipe, tmp_path):
    assert runs_table(Sweep("s", recipe, grid({"batch.sequences": (4,)})), tmp_path).empty
