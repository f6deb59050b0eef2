"""Facets from recipes, and the order of learning: against worked examples, scipy, and simulated nulls."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from fineline_jax.errors import UserError
from fineline_jax.trajectories.runs.facets import facets, parse_group
from fineline_jax.trajectories.runs.promotion import concordance, kendall_w, precedence, task_order

TOKENS = 2.0 ** np.arange(1, 21)


def learned(at: dict[str, float], rng, *, series: str = "s", stderr: float = 0.02, domains=None) -> pd.DataFrame:
    """Accuracies that rise from .25 to .75 with their half at 2^at tokens, with independent errors."""
    frames = []
    for task, middle in at.items():
        values = 0.25 + 0.5 / (1 + 2.0 ** (-2 * (np.log2(TOKENS) - middle))) + rng.normal(0, stderr, len(TOKENS))
        frame = pd.DataFrame({"series": series, "metric": "acc", "task": task, "tokens": TOKENS, "value": values})
        frames.append(frame.assign(stderr=stderr, chance=0.25, domain=(domains or {}).get(task, task[0])))
    return pd.concat(frames)


def recipe(width: int, sequences: int, seed: int = 0, **more) -> dict:
    return {"name": "r", "model": {"width": width}, "batch": {"sequences": sequences}, "seed": seed} | more


def test_facets_are_the_fields_named_and_seeds_are_replicates():
    group = parse_group("size=model.width, batch=batch.sequences")
    found = facets({"a": recipe(64, 8), "b": recipe(64, 8, seed=1), "c": recipe(128, 8)}, group)
    assert found["arm"].tolist() == ["size=64, batch=8", "size=64, batch=8", "size=128, batch=8"]
    assert found["size"].tolist() == [64, 64, 128] and found["seed"].tolist() == ["0", "1", "0"]


def test_without_a_group_arms_are_what_differs_and_is_learned():
    found = facets({"a": recipe(64, 8, logging={"wandb": 1}), "b": recipe(128, 8, seed=3, logging={"wandb": 2})})
    assert found["arm"].tolist() == ["model.width=64", "model.width=128"]
    assert facets({"a": recipe(64, 8), "b": recipe(64, 8, 1)})["arm"].tolist() == ["all", "all"]


@pytest.mark.parametrize(
    ("text", "said"),
    [("size", "no NAME=FIELD"), ("a=x,a=y", "'a' is taken"), ("arm=x", "'arm' is taken"), ("", "no NAME")],
)
def test_a_group_that_cannot_be_read_is_refused(text, said):
    with pytest.raises(UserError, match=said):
        parse_group(text)


def test_a_field_that_is_not_there_and_two_runs_of_one_arm_and_seed_are_refused():
    with pytest.raises(UserError, match=r"--group size=model\.wdth: the recipe of a has no such field"):
        facets({"a": recipe(64, 8)}, {"size": "model.wdth"})
    with pytest.raises(UserError, match="a and b: runs of one arm"):
        facets({"a": recipe(64, 8), "b": recipe(64, 16)}, {"size": "model.width"})


def test_tasks_come_in_the_order_in_which_they_were_learned():
    at = {"late": 14.0, "early": 6.0, "middle": 10.0}
    found = task_order(learned(at, np.random.default_rng(0)))
    assert found["task"].tolist() == ["early", "middle", "late"] and found["place"].tolist() == [1, 2, 3]
    assert np.log2(found["tokens"]).to_numpy() == pytest.approx([6, 10, 14], abs=0.4)
    assert (found["low"] <= found["tokens"]).all() and (found["tokens"] <= found["high"]).all()
    assert (found["first_place"] == found["place"]).all() and (found["tasks"] == 3).all()
    flat = learned({"never": 60.0, "early": 6.0}, np.random.default_rng(1))
    assert task_order(flat)["task"].tolist() == ["early"]


def test_places_of_tasks_learned_together_are_not_resolved():
    found = task_order(learned({"a": 10.0, "b": 10.02, "c": 15.0}, np.random.default_rng(2), stderr=0.04))
    assert found.set_index("task").loc[["a", "b"], "last_place"].max() == 2
    assert found.set_index("task").loc[["a", "b"], "first_place"].min() == 1


def test_the_interval_of_the_half_covers_it():
    """Independent errors around a smooth rise: at least 88 % of 60 tasks at 95 % (fewer has probability .02)."""
    at = {f"t{k}": 8.0 + 0.1 * k for k in range(60)}
    found = task_order(learned(at, np.random.default_rng(3))).set_index("task")
    truth = pd.Series({task: 2.0**middle for task, middle in at.items()})
    assert ((found["low"] <= truth[found.index]) & (truth[found.index] <= found["high"])).mean() >= 0.88


def test_one_domain_precedes_another():
    at = {"a1": 8.0, "a2": 9.0, "a3": 8.5, "b1": 12.0, "b2": 12.5, "b3": 12.2, "c1": 8.5}
    found = precedence(learned(at, np.random.default_rng(4))).set_index(["domain", "other"])
    row = found.loc[("a", "b")]
    assert row.verdict == "earlier" and row.doublings == pytest.approx(-3.73, abs=0.4)
    expected = stats.ttest_ind([8, 9, 8.5], [12, 12.5, 12.2], equal_var=False).pvalue
    assert row.p_tasks == pytest.approx(expected, abs=0.02)
    assert found.loc[("a", "c"), "verdict"] == "no order resolved" and np.isnan(found.loc[("a", "c"), "p_tasks"])
    assert found.loc[("a", "c"), "reason"] == "a domain with one task" and row.reason == ""


def test_domains_whose_tasks_come_from_one_distribution_are_ordered_at_the_nominal_rate():
    """Tasks learned at any time, whatever their domain; the curves' errors are small. At most 5 of 40 at 5 %; by those
    errors alone nearly all would be called."""
    called, by_errors = 0, 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        at = {f"{domain}{k}": time for domain in "ab" for k, time in enumerate(rng.normal(10, 1.5, 3))}
        row = precedence(learned(at, rng), seed=seed).iloc[0]
        called, by_errors = called + (row["verdict"] != "no order resolved"), by_errors + (row["p"] < 0.05)
    assert called <= 5 and by_errors > 20


def test_without_standard_errors_domains_are_ordered_at_the_nominal_rate_too():
    """Errors are then the scatter from checkpoint to checkpoint, and tasks are learned at any time, whatever their
    domain: at most 5 of 40 at 5 % (more has probability .02)."""
    called = 0
    for seed in range(40):
        rng = np.random.default_rng(100 + seed)
        at = {f"{domain}{k}": time for domain in "ab" for k, time in enumerate(rng.normal(10, 1.5, 3))}
        row = precedence(learned(at, rng, stderr=0.03).drop(columns="stderr"), seed=seed).iloc[0]
        assert (row["tasks"], row["other_tasks"]) == (3, 3)
        called += row["verdict"] != "no order resolved"
    assert called <= 5


def test_domains_learned_together_are_ordered_at_the_nominal_rate():
    """At most 5 of 40 at 5 % (more has probability .02)."""
    called = 0
    for seed in range(40):
        table = learned({"a1": 10.0, "a2": 11.0, "b1": 10.0, "b2": 11.0}, np.random.default_rng(seed), stderr=0.04)
        called += precedence(table, seed=seed)["verdict"][0] != "no order resolved"
    assert called <= 5


def test_agreement_of_orders_is_friedmans_test():
    rng = np.random.default_rng(5)
    times = rng.normal(size=(6, 4)) + np.arange(6)[:, None]
    w, chi2, p = kendall_w(times)
    oracle = stats.friedmanchisquare(*times)  # a sample per task, measured in every series
    assert (chi2, p) == (pytest.approx(oracle.statistic), pytest.approx(oracle.pvalue))
    tied = np.round(times)
    assert kendall_w(tied)[1] == pytest.approx(stats.friedmanchisquare(*tied).statistic)
    assert kendall_w(np.arange(5)[:, None] * np.ones(3))[0] == pytest.approx(1)
    assert w == pytest.approx(chi2 / (4 * 5))


def test_series_that_learn_in_one_order_agree():
    at = {"a": 6.0, "b": 9.0, "c": 12.0, "d": 15.0}
    table = pd.concat([learned(at, np.random.default_rng(k), series=f"s{k}") for k in range(3)])
    row = concordance(table).iloc[0]
    assert (row.series, row.tasks, row.w) == (3, 4, 1.0) and row.p < 0.05
    assert "two series" in concordance(learned(at, np.random.default_rng(0))).reason[0]
