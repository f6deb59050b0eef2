"""What the comparison of a sweep takes from its recipes."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from metric_examples import docs, packed, task
from sweep_examples import compared, played, small_recipe

from fineline_jax.ablation import Arm, Sweep, crossed, grid, ladder
from fineline_jax.analysis import with_batches
from fineline_jax.models.config import ModelConfig
from fineline_jax.recipe import Batch, Data, Optimizer, Recipe, Schedule, Source
from fineline_jax.scoring import score_files
from fineline_jax.trajectories.ablation.differences import document_variance


def test_the_batch_of_each_step_follows_the_recipes_schedule():
    """Steps of 4, then from 80 tokens on of 8 windows of 10 tokens: they end at 40, 80, 160, 240."""
    recipe = Recipe(
        name="r",
        model=ModelConfig(vocab_size=64, width=16, layers=1, heads=2, mlp_width=32, context=16),
        data=Data((Source("x"),), sequence_length=10),
        batch=Batch(4, accumulation=2, schedule=((80, 8),)),
        optimizer=Optimizer(Schedule()),
        tokens=240,
    )
    found = with_batches(pd.DataFrame({"tokens": [40, 80, 160, 240]}), recipe)
    assert found["sequences"].tolist() == [4, 4, 8, 8] and found["micro_sequences"].tolist() == [2, 2, 4, 4]
    assert set(found["tokens_per_sequence"]) == {10}


def test_scores_of_documents_are_handed_to_the_differences(tmp_path):
    """The matrix of runs and documents is made here by hand: right where the right choice is the likeliest."""
    sweep = Sweep("s", small_recipe(Path("corpus")), (Arm("a"), Arm("b", {"optimizer.schedule.peak": 1e-3})), (0, 1))
    table = played(sweep, tmp_path, {trial.name: 3.0 + trial.seed for trial in sweep.trials()})
    asked = docs(40, choices=(3,))
    whole = task("whole", "loglikelihood_rolling", metric="bits_per_byte", lm_eval_metrics=["bits_per_byte"])
    pack = packed([(task("asked"), asked), (whole, docs(5, choices=(1,)))])
    score_files.keep_pack(tmp_path / "scores", pack)
    gold = np.array([doc.gold[0] for doc in asked])
    right, rng = [], np.random.default_rng(0)
    for trial in sweep.trials():
        for step in (4, 8):
            scores = rng.normal(size=pack.requests.num_rows) - 5
            key = score_files.Key("0", pack.hash, "float32", "auto", "0")
            header = score_files.Header(trial.name, f"step{step}", step, 32 * step, 8, key)
            score_files.write(tmp_path / "scores", score_files.Scores(header, scores, scores > 0))
        right.append(scores[:120].reshape(40, 3).argmax(axis=1) == gold)  # step 8 alone lies in the last quarter
    found = compared(sweep, table, tmp_path)["arm_differences"].set_index("task")
    arms = np.array([trial.arm for trial in sweep.trials()])
    matrix = np.array(right, float)
    means = matrix.mean(axis=1)
    assert found.difference["asked"] == pytest.approx(means[arms == "b"].mean() - means[arms == "a"].mean())
    expected = math.sqrt(document_variance(matrix, arms, "b", "a")[0])
    assert found.stderr_documents["asked"] == pytest.approx(expected) and expected > 0
    assert np.isnan(found.stderr_documents["whole"]) and np.isfinite(found.difference["whole"])


def test_choices_at_every_size_are_compared_in_their_order_and_each_size_by_itself(tmp_path):
    """Five rates at two widths: the order of the losses is the same but for two neighbours, 9 of 10 pairs."""
    base = small_recipe(Path("corpus"))
    choices = grid({"optimizer.schedule.peak": (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)})
    sweep = Sweep("s", base, crossed(ladder(base, {"s": {"model.width": 8}, "m": {"model.width": 16}}), choices))
    assert [arm.name for arm in sweep.arms][4:6] == ["s_peak-0.016", "m_peak-0.001"]
    ranks = {"s": (1, 2, 3, 4, 5), "m": (1, 2, 3, 5, 4)}
    losses = {
        f"{size}_{choice.name}_seed-0": rank + (size == "s")
        for size, of_size in ranks.items()
        for choice, rank in zip(choices, of_size, strict=True)
    }
    table = played(sweep, tmp_path, losses)
    found = compared(sweep, table, tmp_path)
    (row,) = found["transfer"].to_dict("records")
    sizes = [trial.recipe.model.parameters for trial in sweep.trials()]
    assert (row["small"], row["large"], row["arms"]) == (min(sizes), max(sizes), 5)
    assert row["accuracy"] == pytest.approx(0.9)
    assert set(found["arm_differences"]["reference"]) == {"s_peak-0.001", "m_peak-0.001"}
