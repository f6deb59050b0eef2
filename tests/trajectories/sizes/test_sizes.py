"""Sizes compared: planted gaps and shifts are found, ratios are Fieller's, what fails or is at chance is declined."""

from typing import Any

import numpy as np
import pandas as pd
import pytest

from fineline_jax.trajectories.sizes.declines import SIZE_DECLINES, size_declines
from fineline_jax.trajectories.sizes.families import families
from fineline_jax.trajectories.sizes.gaps import SIZE_GAPS, size_gaps
from fineline_jax.trajectories.sizes.passing import SIZE_CLOCKS, size_clocks
from fineline_jax.trajectories.table import read_table

SIZES = (1e8, 2e8, 4e8, 8e8, 1.6e9)
TOKENS = np.geomspace(1e9, 6.4e10, 49)


def score(size: float, tokens: np.ndarray) -> np.ndarray:
    """A curve that a doubling of parameters moves by half a doubling of tokens; never flat."""
    return 0.3 + 0.05 * (np.log2(tokens / 1e9) + 0.5 * np.log2(size / 1e8))


def family(change=lambda size, values: values, seeds: tuple[str, ...] = ("",), sizes=SIZES) -> pd.DataFrame:
    parts = [
        pd.DataFrame({"series": f"m-{size / 1e6:g}m{seed}", "tokens": TOKENS,
                      "value": change(size, score(size, TOKENS)),
                      "checkpoint": [f"c{i}" for i in range(49)], "step": np.arange(49)})
        for size in sizes for seed in seeds
    ]  # fmt: skip
    fixed = {"task": "t", "metric": "acc", "stderr": 0.004, "chance": 0.25, "domain": "d", "n": 1000.0}
    return pd.concat(parts, ignore_index=True).assign(**fixed)


def test_families_differ_in_size_or_seed_alone() -> None:
    names = ["pythia-70m (0-shot)", "pythia-1b-bf16 (0-shot)", "pythia-1.4b-deduped (0-shot)", "pythia-70m (5-shot)",
             "190M-1xC", "190M-1xC-rerun", "1B-1xC", "peteish7", "x-1b-seed1", "x-2b-seed2"]  # fmt: skip
    found = dict(families(pd.DataFrame({"series": names})))
    assert found == {
        "pythia-* (0-shot)": {7e7: ["pythia-70m (0-shot)"], 1e9: ["pythia-1b-bf16 (0-shot)"]},
        "*-1xC": {1.9e8: ["190M-1xC", "190M-1xC-rerun"], 1e9: ["1B-1xC"]},
        "x-*": {1e9: ["x-1b-seed1"], 2e9: ["x-2b-seed2"]},
    }
    stated = pd.DataFrame({"series": ["wide", "narrow", "wide b"], "parameters": [2e6, 1e6, 2e6]})
    assert dict(families(stated)) == {"runs": {1e6: ["narrow"], 2e6: ["wide", "wide b"]}}


def test_a_planted_shift_predicts_the_held_out_size_and_its_score() -> None:
    """Size N has the score that N₀ has at its last tokens T after T / (N / N₀)^.5; final scores are means over the last
    half doubling, here 5 of 8 checkpoints per doubling, so a quarter of a doubling before T."""
    rows = size_clocks(family()).set_index("small")
    first: Any = rows.iloc[0]
    assert list(first[["verdict", "large", "passed"]]) == ["kept", "1.6 B", 3]
    level = score(1e8, TOKENS[-5:]).mean()
    assert first.score == pytest.approx(level)
    reached = 1e9 * 2 ** ((level - 0.3) / 0.05 - 2.0)  # log2(16) / 2 = 2 doublings before the small one
    assert first.tokens == pytest.approx(reached, rel=1e-3) and first.predicted == pytest.approx(reached, rel=1e-3)
    assert first["shift"] == pytest.approx(0.5, abs=1e-3) and first.saved == pytest.approx(2.25, abs=1e-3)
    assert first.error < 2e-3 and first.score_error < 1e-4
    assert first.tokens_low < reached < first.tokens_high and np.isnan(first.seed_noise)
    assert list(rows.loc[["200 M", "400 M", "800 M"]].passed) == [2, 1, 0]
    assert set(rows.verdict[1:]) == {"declined"} and "fewer than 3 sizes" in rows.reason["200 M"]
    assert list(size_clocks(family()).columns) == [column.name for column in SIZE_CLOCKS.columns]


def test_the_line_of_clocks_is_that_of_ordinary_least_squares() -> None:
    """Clocks of the sizes in between are moved by +a, -a, +a doublings: numpy's polyfit of the three, and the interval
    of a prediction by a line (Draper, Smith 1998, 1.4) with one degree of freedom (t = 12.706)."""
    moved = {2e8: 0.01, 4e8: -0.01, 8e8: 0.01}
    row = size_clocks(family(lambda size, values: values + moved.get(size, 0.0))).iloc[0]
    x, base = np.log2([2e8, 4e8, 8e8]), np.log2(1e9) + (row.score - 0.3) / 0.05
    y = base - 0.5 * (x - np.log2(1e8)) - np.array([0.01, -0.01, 0.01]) / 0.05
    slope, intercept = np.polyfit(x, y, 1)
    at = np.log2(1.6e9)
    assert np.log2(row.predicted) == pytest.approx(intercept + slope * at, abs=2e-3)
    scatter = np.sqrt(((y - intercept - slope * x) ** 2).sum())
    half = 12.706 * scatter * np.sqrt(1 + 1 / 3 + (at - x[1]) ** 2 / 2)
    assert np.log2(row.predicted_high) - np.log2(row.predicted) == pytest.approx(half, rel=1e-2)
    assert row.error == pytest.approx(abs(np.log2(row.predicted / row.tokens)))


def test_a_size_out_of_line_is_refused_and_seeds_give_their_noise() -> None:
    refused = size_clocks(family(lambda size, values: values + 0.08 * (size == 8e8))).iloc[0]
    assert refused.verdict == "refused" and "over 1 doubling" in refused.reason  # .08 / .05 = 1.6 doublings
    assert refused.error > 0.5  # and it would have missed
    seeds = family(seeds=("-seed1", "-seed2"))
    other = seeds.series.str.endswith("seed2") & seeds.series.str.contains("1600")
    seeds.loc[other, "value"] += 0.01  # .2 doublings: a deviation of .2 / sqrt(2)
    row = size_clocks(seeds).iloc[0]
    assert row.seed_noise == pytest.approx(0.2 / np.sqrt(2), abs=2e-3) and row.error == pytest.approx(0.1, abs=2e-3)


def test_runs_of_different_lengths_have_no_line() -> None:
    """Sizes end at 8 to 64 billion tokens and gain .05 more in their last doubling, as where the learning rate falls at
    the end; of equal lengths that gain is at the same tokens in all."""
    table = family()
    size = table.series.str.extract(r"m-(\d+)m")[0].astype(float)
    own = table[table.tokens <= np.minimum(64, 8 * size / 100) * 1e9 * 1.001].copy()
    last = own.groupby("series")["tokens"].transform("max")
    own["value"] += 0.05 * np.clip(1 - np.log2(last / own["tokens"]), 0, 1)
    apart = size_clocks(own)
    assert set(apart.verdict) == {"declined"} and "different lengths" in apart.reason[0]
    assert apart.tokens.notna().all() and np.isnan(apart.passed[0])
    same = table[table.tokens > table.tokens.min()].copy()
    same["value"] += 0.05 * np.clip(1 - np.log2(6.4e10 / same["tokens"]), 0, 1)
    assert size_clocks(same).verdict[0] == "kept"


def test_sizes_at_chance_or_never_passed_are_declined() -> None:
    chance = size_clocks(family(lambda size, values: 0.25 + 0 * values)).iloc[0]
    assert (chance.verdict, chance.reason) == ("declined", "the small one is at chance")
    worse = size_clocks(family(lambda size, values: values - 0.5 * (size == 1.6e9))).iloc[0]
    assert worse.reason == "the large one does not pass it" and np.isnan(worse.tokens)
    assert worse.tokens_low > 0 and np.isinf(worse.tokens_high)
    early = size_clocks(family(lambda size, values: values + 1.0 * (size == 1.6e9))).iloc[0]
    assert early.reason == "the large one passes it before its first checkpoint"


def test_gaps_are_those_of_the_domain_and_ratios_are_fiellers() -> None:
    """Two tasks: gap / .75 above chance; the error of a mean of two tasks is sqrt(2) x .004 / .75 / 2. Fieller's ends
    are the roots of (b - r a)² = 1.96² (eb² + r² ea²), found here by numpy.roots."""
    table = pd.concat([family(), family().assign(task="u")], ignore_index=True)
    found = size_gaps(table)
    last = found[(found.small == "m-100m") & (found.tokens == found.tokens.max())].iloc[0]
    assert found.large.unique() == ["m-1600m"] and last.tokens == pytest.approx(6.4e10)
    error = np.sqrt(2) * 0.004 / 0.75 / 2
    assert last.gap == pytest.approx(0.1 / 0.75)
    assert last.gap_high - last.gap == pytest.approx(1.96 * np.hypot(error, error))
    a, b = ((score(size, TOKENS[-1]) - 0.25) / 0.75 for size in (1e8, 1.6e9))
    assert last.ratio == pytest.approx(b / a)
    roots = np.sort(np.roots([a**2 - (1.96 * error) ** 2, -2 * a * b, b**2 - (1.96 * error) ** 2]))
    assert (last.ratio_low, last.ratio_high) == pytest.approx(tuple(roots))
    assert list(found[found.small == "m-100m"].tokens) == pytest.approx([1e9 * 2**k for k in range(7)])
    assert list(found.columns) == [column.name for column in SIZE_GAPS.columns]
    chance = size_gaps(family(lambda size, values: values if size > 1e9 else 0.25 + 0.01 * (values - 0.3))).iloc[0]
    assert np.isnan(chance.ratio) and "not told from guessing" in chance.reason and chance.gap > 0
    assert size_gaps(family(sizes=SIZES[:1])).empty


def test_sizes_that_decline_are_named() -> None:
    summary = pd.DataFrame({"series": [f"m-{s}m" for s in (70, 160, 410)] * 4, "metric": "acc",
                            "task": np.repeat(["a", "b", "c", "d"], 3)})  # fmt: skip
    words = ["declined since its peak", "settled"]
    summary["verdict"] = [words[int(c)] for c in "001" + "110" + "111" + "010"]
    found = size_declines(summary, summary).set_index("task")
    assert list(found.verdict) == ["the smaller sizes", "the larger sizes", "none", "some sizes"]
    assert list(found.declined) == ["70 M, 160 M", "410 M", "", "70 M, 410 M"] and set(found.sizes) == {3}
    assert list(found.reset_index().columns[1:]) == [c.name for c in SIZE_DECLINES.columns if c.name != "task"]


def test_clocks_of_the_ladder_have_no_line_but_tokens(shared_data) -> None:
    """Its runs of 20 tokens per parameter end at 3.8 to 57 billion tokens: 3B passes 190M, and nothing predicts it."""
    folder = shared_data / "trajectories" / "olmo-ladder"
    table = read_table([folder / f"{size}-1xC.csv" for size in ("190M", "370M", "760M", "1B", "3B")])
    found = size_clocks(table[table["task"].str.startswith("hellaswag") & (table["metric"] == "acc_norm")])
    assert set(found.verdict) == {"declined"} and found.predicted.isna().all()
    smallest = found[found.small == "190 M"].iloc[0]
    assert "different lengths" in smallest.reason and smallest.tokens > 0


def test_clocks_of_pythia_predict_12b_better_where_they_are_kept(shared_data) -> None:
    table = read_table(shared_data / "trajectories" / "pythia" / "pythia_v1_tidy.csv.gz")
    found = size_clocks(table[(table["metric"] == "acc") & ~table["task"].str.startswith(("hendrycks", "crows"))])
    errors = found.groupby("verdict")["error"].median()
    assert errors["kept"] < 0.35 < 0.5 < errors["refused"]
