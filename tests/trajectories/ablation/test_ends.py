"""Tokens to a value, instability, the map over two facets: against worked examples and scipy."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from fineline_jax.errors import UserError
from fineline_jax.trajectories.ablation.compare import compare_arms
from fineline_jax.trajectories.ablation.differences import DIFFERENCES
from fineline_jax.trajectories.ablation.final_map import FACET_COST, FINAL_MAP, facet_cost, final_map
from fineline_jax.trajectories.ablation.instability import instability, spikes
from fineline_jax.trajectories.ablation.tokens_to import tokens_to

TOKENS = 2.0 ** np.arange(11)


def losses(delays: dict[str, list[float]]) -> pd.DataFrame:
    """Losses that fall by 1 per doubling of tokens, later by `delay` doublings; a list of seeds per arm."""
    return pd.concat(
        pd.DataFrame({"series": f"{arm}{seed}", "arm": arm, "seed": seed, "tokens": TOKENS}).assign(
            value=20 - np.arange(11) + delay, metric="loss", task="v", stderr=np.nan
        )
        for arm, delays_of_arm in delays.items()
        for seed, delay in enumerate(delays_of_arm)
    )


def test_tokens_are_compared_in_doublings_by_the_t_test_of_their_logarithms():
    delays = {"a": [0.0, 0.2, 0.1], "b": [1.1, 0.9, 1.3]}
    found = tokens_to(losses(delays)).set_index("arm")
    oracle = stats.ttest_ind(delays["b"], delays["a"])
    assert found.log2_ratio["b"] == pytest.approx(1.0)
    assert found.p["b"] == pytest.approx(oracle.pvalue)
    bounds = oracle.confidence_interval(0.95)
    assert (found.ratio_low["b"], found.ratio_high["b"]) == (pytest.approx(bounds.low), pytest.approx(bounds.high))
    # the worst run, delayed by 1.3, ends (at most five checkpoints of the last quarter: two, 10 and 9.x) at 11.3
    assert found.target.tolist() == pytest.approx([11.3, 11.3])
    assert np.log2(found.tokens["a"]) == pytest.approx(20 + 0.1 - 11.3)
    assert (found.low < found.tokens).all() and (found.tokens < found.high).all()


def test_a_given_target_that_a_run_does_not_reach_gives_no_tokens():
    found = tokens_to(losses({"a": [0.0, 0.2], "b": [3.0, 1.0]}), targets={("loss", "v"): 12.0}).set_index("arm")
    assert found.reached.to_dict() == {"a": 2, "b": 1}
    assert np.isnan(found.tokens["b"]) and "not every run" in found.reason["b"] and found.tokens["a"] > 0


def test_a_spike_stands_out_from_the_values_before_and_is_not_compared_with():
    rng = np.random.default_rng(0)
    values = rng.normal(5.0, 0.1, 400)
    values[[200, 201, 300]] = 7.0, 7.5, 9.0
    height = spikes(values)
    assert np.flatnonzero(height > 7).tolist() == [200, 201, 300]
    before = np.delete(values[:300], [200, 201])
    assert height[300] == pytest.approx((9.0 - before.mean()) / before.std(ddof=1))
    short = spikes(values, window=50)
    assert short[100] == pytest.approx((values[100] - values[50:100].mean()) / values[50:100].std(ddof=1))
    assert np.isneginf(height[:20]).all() and (spikes(np.ones(50))[20:] == 0).all()


def test_instability_counts_per_run():
    rng = np.random.default_rng(1)
    log = pd.DataFrame({"series": "r", "arm": "a", "seed": 3, "step": range(300)})
    log["loss"], log["gradient_norm"] = rng.normal(3, 0.05, 300), rng.uniform(1, 2, 300)
    log.loc[250, "loss"], log.loc[120, "gradient_norm"] = 5.0, 50.0
    log["skipped"] = (log.step > 250).astype(float)
    validation = pd.DataFrame({"series": ["r"], "arm": ["a"], "seed": [3], "step": [100], "validation_loss": [3.0]})
    row = instability(pd.concat([log, validation])).iloc[0]
    assert (row.steps, row.spikes, row.norm_spikes, row.skipped) == (300, 1, 1, 1)
    late = log.gradient_norm[30:]
    assert row.norm_tail == pytest.approx(np.quantile(late, 0.99) / np.median(late))
    assert row.spike_share == pytest.approx(1 / 300) and np.isnan(row.diverged)
    log.loc[299, "loss"] = np.nan
    assert instability(log).diverged[0] == 299
    assert "fewer" in instability(log[:5]).reason[0]


def grid(seeds: int = 3) -> pd.DataFrame:
    """Loss 3 + .1 per doubling of batch beyond 8 + .2 at warmup 0, with noise of SD .01 between runs."""
    rng, parts = np.random.default_rng(4), []
    for batch in (8, 16):
        for warmup in (0, 100):
            for seed in range(seeds):
                value = 3 + 0.1 * (batch == 16) + 0.2 * (warmup == 0) + rng.normal(0, 0.01)
                row = {"series": f"{batch}-{warmup}-{seed}", "batch": batch, "warmup": warmup, "seed": seed}
                parts.append(row | {"tokens": 100, "metric": "loss", "task": "v", "value": value, "stderr": np.nan})
    return pd.DataFrame(parts)


def test_the_map_holds_the_mean_of_each_cell_with_the_pooled_error():
    table = grid()
    found = final_map(table, "batch", "warmup")
    means = table.groupby(["batch", "warmup"])["value"]
    assert found.value.to_numpy() == pytest.approx(means.mean().to_numpy())
    pooled = np.sqrt(means.var(ddof=1).mean() / 3)
    assert found.stderr.to_numpy() == pytest.approx(pooled)
    half = stats.t.ppf(0.975, 8) * pooled
    assert (found.high - found.value).to_numpy() == pytest.approx(half)
    assert found.behind.min() == 0 and found.behind.max() == pytest.approx(0.3, abs=0.03)
    with pytest.raises(UserError, match="facet 'rate'"):
        final_map(table, "rate", "warmup")


def test_a_longer_warmup_gains_at_each_batch_and_over_both():
    table = grid()
    found = facet_cost(table, "warmup", "batch").set_index("at")
    cells = table.groupby(["batch", "warmup"])["value"].mean()
    gains = {batch: cells[batch, 0] - cells[batch, 100] for batch in (8, 16)}
    assert found.gain["batch=8"] == pytest.approx(gains[8]) and found.gain["batch=16"] == pytest.approx(gains[16])
    assert found.gain["all"] == pytest.approx(np.mean(list(gains.values())))
    variance = table.groupby(["batch", "warmup"])["value"].var(ddof=1).mean()
    assert found.stderr["all"] == pytest.approx(np.sqrt(variance * (4 / 3) / 4))
    assert set(found.verdict) == {"better"} and (found.p_holm >= found.p).all()
    assert set(facet_cost(table[table.seed == 0], "warmup", "batch").verdict) == {"declined"}


def test_two_facets_have_a_map_and_the_costs_of_both_one_facet_neither():
    table = grid()
    table["arm"] = table["batch"].astype(str) + "-" + table["warmup"].astype(str)
    runs = table[["series", "arm", "seed", "batch", "warmup"]].drop_duplicates("series")
    both = compare_arms(table, runs, ["batch", "warmup"])
    assert FINAL_MAP in both and set(both[FACET_COST]["facet"]) == {"batch", "warmup"}
    assert {one.name for one in compare_arms(table, runs, ["batch"])} == {"arm_differences", "tokens_to"}
    assert compare_arms(table[table.arm == "8-0"], runs, []) == {}


def test_the_first_of_the_runs_is_the_reference_whatever_the_order_of_the_scores():
    table = grid()
    table["arm"] = table["batch"].astype(str) + "-" + table["warmup"].astype(str)
    runs = table[["series", "arm", "seed", "batch", "warmup"]].drop_duplicates("series")
    found = compare_arms(table[::-1], runs, ["batch", "warmup"])
    assert set(found[DIFFERENCES]["reference"]) == {runs["arm"].iloc[0]}
