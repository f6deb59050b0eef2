"""The sentences of a sweep against the tables they are made from."""

import numpy as np
import pandas as pd

from fineline_jax.trajectories.ablation.critical_batch import critical_batch
from fineline_jax.trajectories.ablation.differences import differences
from fineline_jax.trajectories.ablation.final_map import facet_cost, final_map
from fineline_jax.trajectories.ablation.instability import instability
from fineline_jax.trajectories.ablation.sentences import sentences

SEEDS = np.array([-0.01, 0.0, 0.01])


def ends(losses: dict[tuple[int, int], float]) -> pd.DataFrame:
    """One checkpoint of three seeds of every (batch, warmup) with these mean losses."""
    rows = [
        {"series": f"{batch}-{warmup}-{seed}", "arm": f"{batch}-{warmup}", "seed": seed, "batch": batch}
        | {"warmup": warmup, "tokens": 1e6, "metric": "loss", "task": "held", "value": loss + SEEDS[seed]}
        for (batch, warmup), loss in losses.items()
        for seed in range(3)
    ]
    return pd.DataFrame(rows).assign(stderr=np.nan)


def test_what_was_found_is_said_with_intervals_and_what_was_not_with_the_seeds_it_takes():
    """Runs of an arm differ by a standard deviation of .01; with 8 degrees of freedom t is 2.306."""
    table = ends({(8, 0): 3.0, (8, 100_000): 2.9, (16, 0): 3.2, (16, 100_000): 3.1})
    found = {"arm_differences": differences(table), "final_map": final_map(table, "batch", "warmup")}
    found["facet_cost"] = pd.concat([facet_cost(table, "batch", "warmup"), facet_cost(table, "warmup", "batch")])
    lines = sentences(found)
    half = 2.306 * 0.01 / 3**0.5
    place = f"(95 %: {2.9 - half:.3f} to {2.9 + half:.3f}) nats, at batch 8 and warmup 100,000."
    assert lines[0] == f"The loss on held, mean of each run's last checkpoints, is lowest, 2.900 {place}"
    half = 2.306 * 0.01 * (2 * 2 / 3 / 4) ** 0.5  # of the mean of two differences of means of three
    ends_of = lambda gain: f"(95 %: {gain - half:.3f} to {gain + half:.3f})"
    assert lines[1] == f"batch (loss on held, against 8): at 16 worse by 0.200 {ends_of(0.2)}."
    assert lines[2] == f"warmup (loss on held, against 0): at 100,000 better by 0.100 {ends_of(0.1)}."
    assert lines[3] == "Of 3 arms against 8-0 in loss on held: 1 better, 2 worse (with 3 seeds each)."
    assert len(lines) == 5 and "Holm" in lines[4]
    close = ends({(8, 0): 3.0, (8, 1): 3.004, (16, 0): 3.0, (16, 1): 3.0})
    line, _ = sentences({"arm_differences": differences(close)})
    needed = differences(close)["seeds_needed"].max()
    assert "3 no difference resolved (with 3 seeds each); to resolve 0.01 in loss on held it takes about" in line
    assert f"about {needed:.0f} seeds per arm." in line
    unresolved = sentences({"facet_cost": facet_cost(close, "warmup", "batch")})
    assert unresolved[0].startswith("warmup (loss on held, against 0): at 1 no difference resolved, -0.002 (95 %: -0.0")


def test_metrics_of_which_the_same_can_be_said_are_one_sentence_behind_the_losses():
    """Six runs of each arm, in which no metric differs but the Brier score, .1 apart where seeds differ by .01."""
    rows = [
        {
            "series": f"{arm}{seed}",
            "arm": arm,
            "seed": seed,
            "tokens": 1e6,
            "task": task,
            "metric": metric,
            "stderr": 0.0,
        }
        | {"value": 0.5 + SEEDS[seed % 3] + (0.1 if metric == "brier_score" and arm == "b" else 0.0)}
        for metric in ("acc", "acc_norm", "exact_match", "acc_bytes", "brier_score", "loss")
        for task in (("held",) if metric == "loss" else ("t", "u"))
        for arm in "ab"
        for seed in range(6)
    ]
    first, others, worse, holm = sentences({"arm_differences": differences(pd.DataFrame(rows))})
    assert first.startswith("Of 1 arm against a in loss on held: 1 no difference resolved (with 6 seeds each)")
    assert others.startswith(
        "Of 1 arm against a in accuracy, accuracy, length-normalised (characters), exact match and 1"
    )
    assert "more, all tasks: 1 no difference resolved (with 6 seeds each); to resolve 0.01 in accuracy it" in others
    assert worse == "Of 1 arm against a in Brier score, all tasks: 1 worse (with 6 seeds each)." and "Holm" in holm


def test_divergence_and_the_critical_batch_are_said():
    log = pd.DataFrame({"series": "r", "step": np.arange(60), "loss": 3 + 0.01 * np.sin(np.arange(60))})
    bad = log.assign(series="wild", loss=log["loss"].where(log["step"] < 40))
    calm = sentences({"instability": instability(pd.concat([log, bad]).assign(learning_rate=1e-3))})
    assert calm == ["Of 2 runs, 1 diverged and none had a spike of the loss."]
    table = ends({(8, 0): 3.0, (16, 0): 3.0, (32, 0): 3.2}).assign(branch=5e5)
    (line,) = sentences({"critical_batch": critical_batch(table)})
    row = critical_batch(table).iloc[0]
    assert line.startswith(
        f"Branches at 500 K tokens, loss on held: a batch of {row.critical:.3g} costs 0.01 against 8"
    )
    (wide,) = sentences({"critical_batch": critical_batch(table.assign(value=3.0))})
    assert wide.endswith("the largest batch is still within the tolerance (32).")
