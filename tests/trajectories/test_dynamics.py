"""The statistics of curves: known answers on analytic curves, published values on released series, and refusals."""

import gzip
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from one_curve import summarise_curve
from scipy.optimize import isotonic_regression
from trajectories_simulated import WORLD, simulated_table

from fineline_jax.trajectories.curves.curve import Curve, examine
from fineline_jax.trajectories.curves.isotonic import crossing
from fineline_jax.trajectories.curves.smooth import checkpoint_noise
from fineline_jax.trajectories.statistics.domains import domain_curves
from fineline_jax.trajectories.statistics.dynamics import summarise
from fineline_jax.trajectories.table import normalise, read_table

TOKENS = np.geomspace(1e6, 1e10, 81)


def sigmoid(tokens: np.ndarray, chance: float, end: float, middle: float, slope: float) -> np.ndarray:
    return chance + (end - chance) / (1 + (middle / tokens) ** slope)


def shared(*parts: str) -> Path:
    root = os.environ.get("FINELINE_SHARED_DATA")
    if not root:
        pytest.skip("FINELINE_SHARED_DATA is not set")
    return Path(root, "trajectories", *parts)


@given(
    hnp.arrays(float, st.tuples(st.integers(1, 3), st.integers(1, 30)), elements=st.floats(-10, 10, width=16)),
    st.randoms(use_true_random=False),
)
def test_a_crossing_is_where_the_isotonic_fit_of_scipy_reaches_the_target(values: np.ndarray, random) -> None:
    count = values.shape[-1]
    weights = np.array([random.uniform(0.1, 5.0) for _ in range(count)])
    tokens = np.cumsum([random.choice([0.0, 1.0, 1e3, 1e6]) for _ in range(count)])
    target = np.array([random.choice([*row, random.uniform(-10, 10)]) for row in values])
    for row, aim, at in zip(values, target, crossing(values, weights, tokens, target[:, None])[:, 0], strict=True):
        fit = isotonic_regression(row, weights=weights).x
        if np.abs(fit - aim).min() < 1e-9:  # touched, up to rounding: at the checkpoint that touches, or never
            touching = tokens[np.abs(fit - aim) < 1e-9]
            assert np.isnan(at) or at == pytest.approx(touching[0]) or at in tokens
            continue
        above = np.flatnonzero(fit > aim)
        if not len(above):
            assert np.isnan(at)
        elif above[0] == 0:
            assert at == tokens[0]
        else:
            i = above[0]
            share = (aim - fit[i - 1]) / (fit[i] - fit[i - 1])
            log = tokens[i - 1] > 0
            x0, x1 = np.log(tokens[i - 1 : i + 1]) if log else tokens[i - 1 : i + 1]
            expected = np.exp(x0 + share * (x1 - x0)) if log else x0 + share * (x1 - x0)
            assert at == pytest.approx(expected, rel=1e-6)


def test_crossing_is_linear_in_log_tokens_and_in_tokens_from_zero() -> None:
    curve, tokens = np.array([0.0, 0.5, 1.0]), np.array([0.0, 100.0, 10_000.0])
    at = crossing(curve, np.ones(3), tokens, np.array([0.75, 0.25, 1.1]))
    assert at == pytest.approx([1000.0, 50.0, np.nan], nan_ok=True)


@pytest.mark.parametrize(("middle", "slope"), [(1e7, 1.0), (5e7, 2.0), (1e8, 1.5)])
def test_times_of_a_sigmoid_are_its_analytic_ones(middle: float, slope: float) -> None:
    values = sigmoid(TOKENS, 0.25, 0.8, middle, slope)
    row = summarise_curve(TOKENS, values, np.full(81, 0.01), chance=0.25, n=2000)
    assert row["verdict"] == "settled"
    for name, share in (("t10", 0.1), ("t50", 0.5), ("t90", 0.9)):
        expected = middle * (share / (1 - share)) ** (1 / slope)
        assert row[name] == pytest.approx(expected, rel=0.06), name
        assert row[f"{name}_low"] <= expected <= row[f"{name}_high"]
    assert row["monotonicity"] == pytest.approx(1.0)


def onset_of(values: np.ndarray, stderr: np.ndarray, chance: float, n: float) -> int | None:
    tokens = np.geomspace(1e6, 1e9, len(values))
    return examine(Curve(tokens, values, stderr, chance, "chance level", n)).onset


def test_onset_is_the_first_checkpoint_from_which_all_are_above_the_threshold() -> None:
    values = np.full(20, 0.25)
    values[8:] = 0.40
    assert onset_of(values, np.full(20, 0.02), 0.25, 500) == 8
    values[12] = 0.25  # one odd checkpoint unlearns nothing
    assert onset_of(values, np.full(20, 0.02), 0.25, 500) == 8
    values[12:15] = 0.25  # three do
    assert onset_of(values, np.full(20, 0.02), 0.25, 500) == 15


def test_one_lucky_checkpoint_is_no_onset() -> None:
    for lucky in (4, 19):
        values = np.full(20, 0.25)
        values[lucky] = 0.45
        assert onset_of(values, np.full(20, 0.02), 0.25, 500) is None


def test_a_constant_guesser_is_judged_by_the_error_of_guessing() -> None:
    # always the same choice, n = 104: 0.37 or 0.63 of the documents, whatever the measured standard error says
    assert onset_of(np.full(10, 0.58), np.full(10, 1e-3), 0.5, 104) is None


def test_guessing_is_called_guessing_in_nearly_all_of_many_simulations() -> None:
    rng = np.random.default_rng(0)
    verdicts = []
    for _ in range(300):
        values = rng.binomial(500, 0.25, 15) / 500
        error = np.sqrt(values * (1 - values) / 499)
        row = summarise_curve(np.geomspace(1e6, 1e9, 15), values, error, chance=0.25, n=500, draws=1)
        verdicts.append(row["verdict"])
        if row["verdict"] == "not distinguishable from chance":
            assert np.isnan([row["onset"], row["t10"], row["t50"], row["t90"]]).all()
    assert verdicts.count("not distinguishable from chance") >= 290


def test_a_curve_below_chance_is_named() -> None:
    row = summarise_curve(TOKENS, np.full(81, 0.18), np.full(81, 0.01), chance=0.25, n=1000)
    assert (row["verdict"], row["onset_outcome"]) == ("below chance", "below chance")


def test_a_curve_that_rises_to_the_end_gets_no_t90() -> None:
    row = summarise_curve(TOKENS, sigmoid(TOKENS, 0.25, 0.8, 8e9, 1.5), np.full(81, 0.005), chance=0.25, n=8000)
    assert (row["verdict"], row["t90_outcome"]) == ("still rising", "not saturated")
    assert np.isnan([row["t50"], row["t90"]]).all()
    # of the level so far, half is reached at 4.5 B tokens; as the level is not final, that is a lower bound
    assert 3.5e9 < row["t50_low"] < 5e9 and row["t50_high"] == np.inf


def test_what_was_learned_before_the_first_checkpoint_gets_no_time() -> None:
    row = summarise_curve(TOKENS, np.full(81, 0.9), np.full(81, 0.01), chance=0.5, n=1000)
    assert {row[f"{name}_outcome"] for name in ("onset", "t10", "t50")} == {"before the first checkpoint"}
    assert np.isnan([row["t10"], row["t50"]]).all()


def test_intervals_cover_the_truth() -> None:
    rng = np.random.default_rng(3)
    tokens = np.geomspace(1e6, 1e9, 25)
    truth = sigmoid(tokens, 0.25, 0.8, 3e7, 2.0)
    covered = 0
    for seed in range(100):
        values = rng.binomial(1000, truth) / 1000
        error = np.sqrt(values * (1 - values) / 999)
        row = summarise_curve(tokens, values, error, chance=0.25, n=1000, seed=seed)
        covered += row["t50_low"] <= 3e7 <= row["t50_high"]
    assert covered >= 88


def test_noise_is_the_scatter_and_not_the_trend() -> None:
    trend = np.log(TOKENS) * 0.05
    assert checkpoint_noise(trend, TOKENS) == pytest.approx(0.0, abs=1e-12)
    rng = np.random.default_rng(0)
    estimates = [checkpoint_noise(trend + rng.normal(0, 0.02, 81), TOKENS) for _ in range(200)]
    assert np.sqrt(np.mean(np.square(estimates))) == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_perplexity_falls_and_its_times_do_not_depend_on_its_unit(scale: float) -> None:
    ppl = scale * np.exp(10 - 9 / (1 + (1e8 / TOKENS) ** 2))
    frame = pd.DataFrame(
        {"series": "s", "tokens": TOKENS, "task": "lambada_openai", "metric": "perplexity", "value": ppl}
    )
    row = summarise(normalise(frame)).iloc[0]
    assert row["t50"] == pytest.approx(1e8, rel=0.03)
    assert row["final"] == pytest.approx(ppl[-1]) and row["monotonicity"] == pytest.approx(1.0)


def test_no_standard_error_and_no_chance_give_times_but_no_onset() -> None:
    values = sigmoid(TOKENS, 0.25, 0.8, 1e8, 1.5)
    no_error = summarise_curve(TOKENS, values, np.full(81, np.nan), chance=0.25)
    no_chance = summarise_curve(TOKENS, values, np.full(81, 0.01))
    assert (no_error["onset_outcome"], no_chance["onset_outcome"]) == ("no standard error", "no chance level")
    for row in (no_error, no_chance):
        assert np.isnan(row["onset"]) and row["t50"] == pytest.approx(1e8, rel=0.05)


@given(st.integers(1, 6), st.booleans(), st.booleans(), st.integers(0, 5))
def test_short_and_bare_curves_never_fail(count: int, with_error: bool, with_chance: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tokens = np.arange(count) * 1e6
    error = np.full(count, 0.02 if with_error else np.nan)
    row = summarise_curve(tokens, rng.uniform(0.2, 0.9, count), error, chance=0.25 if with_chance else np.nan, draws=20)
    assert row["verdict"]


def test_the_simulated_world_is_recovered() -> None:
    summary = summarise(normalise(simulated_table(checkpoints=24)))
    summary = summary[summary["metric"] == "acc"].set_index("task")
    truth = {task: middle for _, task, _, end, middle, _, _ in WORLD[:5]}
    for task, middle in truth.items():
        assert summary.loc[task, "t50"] == pytest.approx(middle, rel=0.5)
    assert summary.loc["two_hop_location", "verdict"] == "not distinguishable from chance"


def test_domain_means_propagate_errors_and_keep_their_members() -> None:
    rows = [
        ("a", 1, 0.75, 0.04, 0.5), ("b", 1, 0.50, 0.03, 0.25), ("a", 2, 1.0, 0.02, 0.5),
    ]  # fmt: skip
    frame = pd.DataFrame(rows, columns=["task", "tokens", "value", "stderr", "chance"])
    curves = domain_curves(normalise(frame.assign(series="s", metric="acc", domain="d", checkpoint=frame["tokens"])))
    assert len(curves) == 1  # at 2 tokens task b is missing: no mean
    row = curves.iloc[0]
    assert row["value"] == pytest.approx((0.5 + 1 / 3) / 2)
    assert row["stderr"] == pytest.approx(np.hypot(0.04 / 0.5, 0.03 / 0.75) / 2)
    assert (row["tasks"], row["chance"]) == (2, 0.0)


# Final zero-shot values of EleutherAI/pythia evals/pythia-v1 at step 143000.
PYTHIA_FINAL = {
    "pythia-160m": {"lambada_openai": 0.3284, "piqa": 0.6273, "arc_easy": 0.4352, "sciq": 0.741, "wsc": 0.3654},
    "pythia-1.4b": {"lambada_openai": 0.6161, "piqa": 0.7089, "arc_easy": 0.6065, "sciq": 0.865, "logiqa": 0.2104},
    "pythia-12b": {"lambada_openai": 0.7046, "piqa": 0.7601, "arc_easy": 0.7024, "sciq": 0.902, "winogrande": 0.6393},
}


def test_pythia() -> None:
    path = shared("pythia", "pythia_v1_tidy.csv.gz")
    with gzip.open(path, "rt") as file:
        raw = pd.read_csv(file)
    raw = raw[(raw["shots"] == 0) & raw["model"].isin(list(PYTHIA_FINAL)) & (raw["metric"] == "acc")]
    raw = raw[~raw["task"].str.contains("hendrycks|crows")]
    summary = summarise(normalise(raw)).set_index(["series", "task"])
    for series, finals in PYTHIA_FINAL.items():
        for task, final in finals.items():
            assert summary.loc[(series, task), "final"] == pytest.approx(final, abs=5e-4)
        # the tasks that measure nothing here are the negative controls
        assert summary.loc[(series, "logiqa"), "verdict"] in ("not distinguishable from chance", "below chance")
        # the answers of wsc are two: always the same one is right in 0.365 or 0.635 of its documents
        wsc = "declined since its peak" if series == "pythia-1.4b" else "degenerate"
        assert summary.loc[(series, "wsc"), "verdict"] == wsc
        assert summary.loc[(series, "sciq"), "verdict"] == "settled"
    big = summary.loc["pythia-12b"]
    assert big.loc["sciq", "t50"] < big.loc["piqa", "t50"]
    assert big.loc["winogrande", "verdict"] == "still rising" and np.isnan(big.loc["winogrande", "t50"])
    assert list(big.sort_values("rank").index[:3]) == ["sciq", "lambada_openai", "arc_easy"]
    assert 1e9 <= big.loc["lambada_openai", "onset"] <= 7e9  # 0.026 at 2.1 B tokens, 0.31 at 6.3 B for 6.9b


def test_olmo_2_7b_saturates_in_the_published_order() -> None:
    run = pd.read_csv(shared("olmo-ladder", "peteish7_eval_full.csv"))
    columns = {"piqa_val": 0.5, "hellaswag_val": 0.25, "arc_challenge_test": 0.25, "openbookqa_test": 0.25}
    parts = [
        pd.DataFrame({
            "series": "OLMo-2 7B", "step": run["_step"], "tokens": run["_step"] * 4_194_304,
            "task": name, "metric": "acc_norm",
            "value": run[f"eval/downstream/{name}_rc_5shot_len_norm"], "chance": chance,
        })
        for name, chance in columns.items()
    ]  # fmt: skip
    t90 = summarise(normalise(pd.concat(parts))).set_index("task")["t90"]
    assert list(t90.sort_values().index) == list(columns)
    # PIQA is 0.796 and HellaSwag 0.729 at 252 B tokens, HellaSwag 0.770 at 1007 B; nine tenths are 0.781 and 0.746
    assert t90["piqa_val"] < 252e9 < t90["hellaswag_val"] < 1007e9
    assert t90["arc_challenge_test"] == pytest.approx(1.4e12, rel=0.15)
    assert t90["openbookqa_test"] == pytest.approx(1.8e12, rel=0.15)


def test_read_table_gives_the_same_pythia_dynamics_as_the_original_files() -> None:
    tree = summarise(read_table(shared("pythia", "raw", "pythia-1.4b", "zero-shot")), draws=2)
    with gzip.open(shared("pythia", "pythia_v1_tidy.csv.gz"), "rt") as file:
        raw = pd.read_csv(file)
    raw = raw[(raw["shots"] == 0) & (raw["model"] == "pythia-1.4b")]
    flat = summarise(normalise(raw), draws=2)
    key = ["task", "metric"]
    joined = tree.merge(flat, on=key, suffixes=("", "_flat"))
    assert len(joined) == len(tree) == len(flat)
    pd.testing.assert_series_equal(joined["t50"], joined["t50_flat"], check_names=False)
    pd.testing.assert_series_equal(joined["verdict"], joined["verdict_flat"], check_names=False)
