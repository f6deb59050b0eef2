"""The dynamics of a curve against a plain restatement of docs/analyze.md, and curves placed just on either side of each
threshold."""

import math

import numpy as np
import pandas as pd
import pytest
from one_curve import summarise_curve
from scipy import stats
from scipy.optimize import isotonic_regression

from fineline_jax.trajectories.curves.curve import Curve, Findings, examine
from fineline_jax.trajectories.curves.isotonic import crossing, fit
from fineline_jax.trajectories.curves.smooth import checkpoint_noise, end_level
from fineline_jax.trajectories.statistics.domains import domain_curves
from fineline_jax.trajectories.statistics.dynamics import summarise
from fineline_jax.trajectories.table import normalise

NAN = math.nan
ONE_PERCENT = stats.norm.isf(0.01)


# ---- the definitions, one curve and one number at a time


def median_of_three(y: list[float]) -> list[float]:
    """Tukey's running median of 3; the ends by his end-point rule."""
    if len(y) < 5:
        return list(y)
    inner = [sorted(y[i - 1 : i + 2])[1] for i in range(1, len(y) - 1)]
    first = sorted([y[0], inner[0], 3 * inner[0] - 2 * inner[1]])[1]
    last = sorted([y[-1], inner[-1], 3 * inner[-1] - 2 * inner[-2]])[1]
    return [first, *inner, last]


def onset_of(y: list[float], errors: list[float], chance: float, n: float, untrained: bool) -> int | None:
    """The first checkpoint from which all are above guessing and, where it is untrained, above the first one."""
    guessing = math.sqrt(chance * (1 - chance) / n) if n > 0 and 0 <= chance <= 1 else 0.0
    ok = []
    for m, e in zip(median_of_three(y), errors):
        over_chance = math.isnan(chance) or m - chance > ONE_PERCENT * max(e, guessing)
        over_first = not untrained or m - y[0] > ONE_PERCENT * math.hypot(e, errors[0])
        ok.append(over_chance and over_first)
    starts = [i for i in range(len(y)) if all(ok[i:])]
    return starts[0] if starts else None


def fall_of(y: list[float], errors: list[float], noise: float, chance: float, n: float) -> tuple[float, float, float]:
    """(fall, its error, p): the best mean of three checkpoints minus that of the last three."""
    if len(y) < 5:
        return NAN, NAN, NAN
    means = [sum(y[i : i + 3]) / 3 for i in range(len(y) - 2)]
    best = max(range(len(means)), key=means.__getitem__)
    of_three = [sum(errors[i : i + 3]) / 3 for i in range(len(means))]
    candidates = [math.hypot(of_three[best], of_three[-1]), noise * math.sqrt(2 / 3)]
    known = [c for c in candidates if not math.isnan(c)]
    fall = means[best] - means[-1]
    if not known:
        return fall, NAN, NAN
    p = min(1.0, len(y) * stats.norm.sf(z(fall, max(known))))
    if not math.isnan(chance) and not math.isnan(errors[0]):
        guessing = math.sqrt(chance * (1 - chance) / n) if n > 0 and 0 <= chance <= 1 else 0.0
        at_peak = sum(max(e, guessing) for e in errors[best : best + 3]) / 3
        p = 1.0 if means[best] - chance <= ONE_PERCENT * at_peak else p
    return fall, max(known), p


def noise_of(y: list[float], tokens: list[float]) -> float:
    points = [(math.log(t), v) for t, v in zip(tokens, y) if t > 0]
    squares = []
    for (x0, y0), (x1, y1), (x2, y2) in zip(points, points[1:], points[2:]):
        right = (x1 - x0) / (x2 - x0) if x2 > x0 else 0.5
        squares.append((y1 - (1 - right) * y0 - right * y2) ** 2 / (1 + right**2 + (1 - right) ** 2))
    if len(squares) < 3:
        return NAN
    later = squares[-max(3, len(squares) // 2) :]
    return math.sqrt(sum(later) / len(later))


def time_of(fit: list[float], tokens: list[float], target: float) -> float:
    """Walk from checkpoint to checkpoint until the target is there."""
    if fit[0] >= target - 1e-12:
        return tokens[0]
    for (t0, y0), (t1, y1) in zip(zip(tokens, fit), zip(tokens[1:], fit[1:])):
        if y1 >= target - 1e-12:
            share = (target - y0) / (y1 - y0)
            return t0 + share * (t1 - t0) if t0 == 0 else math.exp(np.interp(share, [0, 1], np.log([t0, t1])))
    return NAN


def z(difference: float, error: float) -> float:
    if error == 0:
        return math.copysign(math.inf, difference) if difference else 0.0
    return difference / error


def by_definition(tokens, values, stderr, chance=NAN, n=NAN, better=1) -> dict:
    """What summarise_curve gives, without intervals. Everything is turned so that higher is better."""
    tokens, stderr = list(map(float, tokens)), list(map(float, stderr))
    values, chance = [better * float(v) for v in values], better * chance
    last_half_doubling = [i for i, t in enumerate(tokens) if t >= tokens[-1] / math.sqrt(2)]
    mean_at_end = lambda y: sum(y[i] for i in last_half_doubling) / len(last_half_doubling)
    level, noise, untrained = mean_at_end(values), noise_of(values, tokens), tokens[0] == 0 and len(tokens) > 1
    baseline = values[0] if untrained or math.isnan(chance) else chance
    row = {"level": level, "noise": noise, "baseline": baseline, "onset": NAN, "t10": NAN, "t50": NAN, "t90": NAN}
    row |= {"baseline_from": "untrained checkpoint" if untrained else "first checkpoint"}
    if not untrained and not math.isnan(chance):
        row |= {"baseline_from": "chance level"}
    row |= {"snr": (level - baseline) / noise if noise > 0 else NAN, "rise_p": NAN}
    known = [e for e in stderr if not math.isnan(e)]
    errors = [(max(known) if math.isnan(e) else e) if known else NAN for e in stderr]
    guessing = math.sqrt(chance * (1 - chance) / n) if n > 0 and 0 <= chance <= 1 else 0.0
    tested = bool(known) and (untrained or not math.isnan(chance))
    if not tested:
        row["onset_outcome"] = "no chance level" if math.isnan(chance) else "no standard error"
        risen = ((level - baseline) > 5 * noise or (noise == 0 and level > baseline)) and len(values) >= 5
        refusal = "too few checkpoints" if len(values) < 5 else "no clear change"
    else:
        ratios = []
        if not math.isnan(chance):
            ratios.append(z(level - chance, max(mean_at_end(errors), guessing)))
        if untrained:
            error = mean_at_end([math.hypot(e, errors[0]) for e in errors])
            ratios.append((level - values[0]) / error)
        row["rise_p"] = stats.norm.sf(min(ratios))
        at = onset_of(values, errors, chance, n, untrained)
        below = None
        if not math.isnan(chance):
            below = onset_of([-v for v in values], [max(e, guessing) for e in errors], -chance, NAN, False)
        refusal = "not distinguishable from chance" if below is None else "below chance"
        risen = at is not None and row["rise_p"] <= 0.05
        row["onset"] = tokens[at] if risen else NAN
        row["onset_outcome"] = ("before the first checkpoint" if at == 0 else "reached") if risen else refusal
    fall, fall_error, p = fall_of(values, errors, noise, chance, n)
    if p <= 0.05:
        row |= {"fall": fall, "fall_stderr": fall_error, "fall_q": p, "verdict": "declined since its peak"}
        return row | {f"{t}_outcome": "declined since its peak" for t in ("t10", "t50", "t90")}
    if not risen:
        return row | {"verdict": refusal, **{f"{t}_outcome": refusal for t in ("t10", "t50", "t90")}}
    if len(values) < 3:
        outcomes = {f"{t}_outcome": "too few checkpoints" for t in ("t10", "t50", "t90")}
        return row | {"verdict": "above chance"} | outcomes
    spread = [noise if math.isnan(e) else e for e in stderr]
    weights = [1 / e**2 for e in spread] if all(e > 0 for e in spread) else [1.0] * len(spread)
    fit = list(isotonic_regression(values, weights=weights).x)
    times = {t: time_of(fit, tokens, baseline + share * (level - baseline)) for t, share in SHARES.items()}
    settled = 2 * times["t90"] <= tokens[-1]
    moved = level - values[0] > ONE_PERCENT * math.hypot(spread[0], mean_at_end(spread))
    still = tested and at == 0 and not moved
    for name, time in times.items():
        if time <= tokens[0]:
            outcome = "before the first checkpoint"
        elif still:
            outcome = "no clear change"
        elif not settled:
            outcome = "not saturated"
        elif tested and at and time < tokens[at - 1]:
            outcome = "before the onset"
        else:
            outcome = "reached"
        row[name], row[f"{name}_outcome"] = time if outcome == "reached" else NAN, outcome
    if still and row["t90_outcome"] != "before the first checkpoint":
        return row | {"verdict": "above chance"}
    return row | {"verdict": "settled" if settled else "still rising"}


SHARES = {"t10": 0.1, "t50": 0.5, "t90": 0.9}


def random_curve(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict]:
    """Curves of every shape: rising, flat, falling; with gaps in the errors, checkpoints at 0 tokens and twice."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 25))
    tokens = np.sort(np.round(np.exp(rng.uniform(11, 22, count))))
    if seed % 3 == 0:
        tokens[0] = 0
    if seed % 5 == 0 and count > 6:
        tokens[3] = tokens[4] = tokens[5]
    chance = float(rng.choice([0.0, 0.25, 0.5]))
    rise = 1 / (1 + np.exp(-rng.uniform(0.3, 3) * (np.log(np.maximum(tokens, 1)) - rng.uniform(10, 21))))
    values = chance + rng.choice([-0.2, 0.0, 0.05, 0.1, 0.4]) * rise
    if seed % 8 == 2:  # learned, then lost
        values = values - 0.25 * (values - chance) * (np.arange(count) > 0.6 * count)
    stderr = rng.uniform(0.003, 0.03, count)
    values = values + stderr * rng.standard_normal(count)
    if seed % 4 == 1:
        stderr[rng.random(count) < 0.4] = NAN
    if seed % 11 == 1:
        stderr[rng.random(count) < 0.2] = 0.0
    options = {"chance": NAN if seed % 7 == 0 else chance, "n": float(rng.choice([20, 500, NAN]))}
    if seed % 6 == 5:
        values, options = -10 * values, {"better": -1}
    return tokens, values, stderr, options


def test_every_number_of_a_curve_is_that_of_its_definition() -> None:
    verdicts = []
    for seed in range(400):
        tokens, values, stderr, options = random_curve(seed)
        found = summarise_curve(tokens, values, stderr, draws=2, **options)
        for name, expected in by_definition(tokens, values, stderr, **options).items():
            if name in ("level", "baseline"):
                expected = options.get("better", 1) * expected
            if isinstance(expected, str):
                assert found[name] == expected, (seed, name)
            else:
                assert found[name] == pytest.approx(expected, rel=1e-6, abs=1e-12, nan_ok=True), (seed, name)
        assert (found["checkpoints"], found["n"]) == pytest.approx((len(tokens), options.get("n", NAN)), nan_ok=True)
        assert (found["first_tokens"], found["last_tokens"]) == (tokens[0], tokens[-1])
        assert (found["final"], found["final_stderr"]) == pytest.approx((values[-1], stderr[-1]), nan_ok=True)
        assert found["chance"] == pytest.approx(options.get("chance", NAN), nan_ok=True)
        for name in ("t10", "t50", "t90"):
            assert not found[f"{name}_low"] > found[name] and not found[f"{name}_high"] < found[name]
            assert not found[f"{name}_low"] > found[f"{name}_high"]
        if len(tokens) >= 3:
            rank = options.get("better", 1) * stats.spearmanr(tokens, values).statistic
            assert found["monotonicity"] == pytest.approx(rank)
        verdicts.append(found["verdict"])
    counts = {verdict: verdicts.count(verdict) for verdict in verdicts}
    assert len(counts) == 8 and min(counts.values()) >= 3, counts


# ---- thresholds


def examined(values: np.ndarray, stderr: np.ndarray, chance: float, n: float) -> Findings:
    return examine(Curve(np.geomspace(1e6, 1e9, len(values)), values, stderr, chance, "chance level", n))


@pytest.mark.parametrize(("z", "risen"), [(2.3, False), (2.36, True), (-2.3, False), (-2.36, False)])
@pytest.mark.parametrize("n", [NAN, 1200])
def test_a_curve_leaves_chance_at_one_percent_one_sided(z: float, risen: bool, n: float) -> None:
    """With n = 1,200 the error of guessing, 0.0125, is the larger one, and the measured one is too small to matter."""
    error = 0.0125
    values = np.full(9, 0.25 + z * error)
    row = summarise_curve(
        np.geomspace(1e6, 1e9, 9), values, np.full(9, error if math.isnan(n) else 1e-4), chance=0.25, n=n
    )
    assert pytest.approx(2.3263, abs=1e-4) == ONE_PERCENT
    assert (row["verdict"] == "settled") == risen
    assert (row["verdict"] == "below chance") == (z < -2.33)
    assert row["onset_outcome"] == ("before the first checkpoint" if risen else row["verdict"])


def test_the_error_of_guessing_counts_below_chance_too() -> None:
    """0 of 4 right has a measured standard error of 0, and is what guessing gives in a third of all cases."""
    row = summarise_curve(np.geomspace(1e6, 1e9, 9), np.zeros(9), np.zeros(9), chance=0.25, n=4)
    assert row["verdict"] == "not distinguishable from chance"


def test_what_is_not_above_chance_by_more_than_the_threshold_is_not_above() -> None:
    assert examined(np.full(6, 0.0), np.zeros(6), 0.0, 100).onset is None
    assert examined(np.full(6, 1e-9), np.zeros(6), 0.0, 100).onset == 0


def test_unknown_errors_of_some_checkpoints_are_taken_as_the_largest_known() -> None:
    stderr = np.array([0.01, NAN, 0.02, 0.01, 0.01, NAN])
    for value, verdict in ((0.25 + 2.30 * 0.02, "not distinguishable from chance"), (0.25 + 2.36 * 0.02, "settled")):
        assert summarise_curve(np.geomspace(1e6, 1e9, 6), np.full(6, value), stderr, chance=0.25)["verdict"] == verdict


def test_the_odd_checkpoint_is_judged_by_a_median_from_five_checkpoints_on() -> None:
    values = np.array([0.4, 0.4, 0.25, 0.4, 0.4])
    assert examined(values, np.full(5, 0.02), 0.25, 500).onset == 0
    assert examined(values[1:], np.full(4, 0.02), 0.25, 500).onset == 2
    # Tukey's end-point rule: median of the last value, its smoothed neighbour and the line through two smoothed ones
    assert examined(np.array([0.4, 0.4, 0.4, 0.4, 0.25]), np.full(5, 0.02), 0.25, 500).onset == 0
    assert examined(np.array([0.4, 0.4, 0.4, 0.3, 0.28]), np.full(5, 0.02), 0.25, 500).onset is None


@pytest.mark.parametrize(("share", "verdict"), [(0.4999, "settled"), (0.5001, "still rising")])
def test_settled_is_ninety_percent_in_half_of_the_tokens(share: float, verdict: str) -> None:
    """The curve jumps at `share` of the tokens; nine tenths of its gain are there."""
    tokens = np.array([1e6, 2e6, share * 1e8 * (1 - 1e-9), share * 1e8, 8e7, 1e8])
    row = summarise_curve(tokens, np.array([0.25, 0.25, 0.25, 0.7, 0.7, 0.7]), np.full(6, 0.01), chance=0.25, n=5000)
    assert row["verdict"] == verdict
    assert row["t90_outcome"] == ("reached" if verdict == "settled" else "not saturated")
    times = [row["t50"], row["t90"]]
    assert times == pytest.approx([share * 1e8 if verdict == "settled" else NAN] * 2, rel=1e-6, nan_ok=True)
    assert row["to_score"] == pytest.approx(share * 1e8, rel=1e-6)  # of 0.625, whatever the level is


def test_exactly_twice_the_tokens_of_t90_is_settled() -> None:
    tokens, values = np.array([1e6, 2e6, 5e7, 8e7, 1e8]), np.array([0.0, 0.0, 0.9, 1.0, 1.0])
    row = summarise_curve(tokens, values, np.full(5, 0.01), chance=0.0, n=5000)
    assert (row["t90"], row["verdict"]) == (pytest.approx(5e7), "settled")


@pytest.mark.parametrize(("snr", "verdict"), [(4.9, "no clear change"), (5.1, "settled")])
@pytest.mark.parametrize("better", [1, -1])
def test_without_a_test_a_change_is_clear_from_five_times_the_noise_on(snr: float, verdict: str, better: int) -> None:
    tokens = np.geomspace(1e6, 1e9, 31)
    values = 0.01 * (-1.0) ** np.arange(31)
    values[0] = end_level(values, tokens) - better * snr * checkpoint_noise(values, tokens)
    row = summarise_curve(tokens, values, np.full(31, NAN), better=better)
    assert row["snr"] == pytest.approx(snr) and row["verdict"] == verdict
    assert summarise_curve(tokens, values, np.full(31, NAN), better=-better)["verdict"] == "no clear change"


def test_without_a_test_five_checkpoints_are_needed() -> None:
    tokens, values = np.geomspace(1e6, 1e9, 5), np.array([0.1, 0.2, 0.9, 0.9, 0.9])
    assert summarise_curve(tokens[1:], values[1:], np.full(4, NAN))["verdict"] == "too few checkpoints"
    assert summarise_curve(tokens, np.arange(5) / 10, np.full(5, NAN))["verdict"] == "still rising"
    assert summarise_curve(tokens, np.full(5, 0.9), np.full(5, NAN))["verdict"] == "no clear change"


def test_two_checkpoints_have_an_onset_and_no_times_and_three_have_times() -> None:
    tokens, values, stderr = np.array([1e6, 1e8, 1e9]), np.array([0.25, 0.8, 0.8]), np.full(3, 0.01)
    two = summarise_curve(tokens[:2], values[:2], stderr[:2], chance=0.25, n=500)
    assert (two["verdict"], two["onset"], two["t50_outcome"]) == ("above chance", 1e8, "too few checkpoints")
    assert math.isnan(two["t50"]) and math.isnan(two["monotonicity"])
    three = summarise_curve(tokens, values, stderr, chance=0.25, n=500)
    assert three["verdict"] == "settled" and three["t50"] == pytest.approx(1e7)
    assert three["monotonicity"] == pytest.approx(math.sqrt(3) / 2)  # the last two are tied


def test_the_level_is_the_mean_of_the_last_half_doubling() -> None:
    tokens = np.array([1, 50, 70, 71, 99, 100]) * 1e6
    values = np.array([0.0, 0.1, 0.2, 0.4, 0.6, 0.8])
    assert end_level(values, tokens) == pytest.approx((0.4 + 0.6 + 0.8) / 3)  # 100 / sqrt(2) is 70.7
    assert end_level(np.stack([values, -values]), tokens) == pytest.approx([0.6, -0.6])
    assert summarise_curve(tokens, values, np.full(6, 0.001), chance=0.0, n=1e6)["level"] == pytest.approx(0.6)


# ---- the parts


@pytest.mark.parametrize(
    ("target", "time"), [(0.5, 100.0), (0.1, 10.0), (0.05, 10.0), (0.9, 1000.0), (0.91, NAN), (0.7, 1e2 * 10**0.5)]
)
def test_a_target_is_crossed_at_its_first_checkpoint_or_between_two(target: float, time: float) -> None:
    curve, tokens = np.array([0.1, 0.5, 0.5, 0.9, 0.9]), np.array([10.0, 100.0, 100.0, 1000.0, 10_000.0])
    both = crossing(np.stack([curve, curve]), np.ones(5), tokens, np.array([[target], [0.5]]))[:, 0]
    assert both == pytest.approx([time, 100.0], nan_ok=True)


def test_isotonic_pools_by_weight() -> None:
    values, weights = np.array([1.0, 4.0, 1.0, 5.0]), np.array([1.0, 1.0, 2.0, 1.0])
    assert fit(values, weights) == pytest.approx([1, 2, 2, 5])
    tokens = np.array([1.0, 10.0, 100.0, 1000.0])  # from 1 to the pooled 2: halfway in log tokens
    assert crossing(values, weights, tokens, np.array([1.5])) == pytest.approx(10**0.5)
    assert crossing(values, np.ones(4), tokens, np.array([2.0])) == pytest.approx(10 ** (1 / 1.5))


def test_noise_is_that_of_the_second_half_and_of_nothing_at_zero_tokens() -> None:
    tokens = np.concatenate([[0.0], np.geomspace(1e6, 1e9, 12)])
    values = np.array([7.0, *[5.0, -5.0] * 2, 0.0, 0.0, *[0.1, -0.1] * 3])
    # of ten inner points the last five; all spaced alike: each differs from the mean of its neighbours by 0.2
    assert checkpoint_noise(values, tokens) == pytest.approx(math.sqrt((4 * 0.2**2 + 0.15**2) / 1.5 / 5))
    assert math.isnan(checkpoint_noise(values[:5], tokens[:5])) and not math.isnan(
        checkpoint_noise(values[:6], tokens[:6])
    )
    rough = np.random.default_rng(0).normal(0, 1, 13)
    for count in range(6, 14):  # even and odd: half of the inner points is rounded down
        assert checkpoint_noise(rough[:count], tokens[:count]) == checkpoint_noise(rough[1:count], tokens[1:count])


def test_intervals_are_those_of_the_propagated_errors() -> None:
    """Where no pooling happens, log t50 is a smooth function of the values: its error by the delta method."""
    tokens = np.array([1e6, 1e7, 1e8, 1e9, 1e11])
    values, stderr = np.array([0.3, 0.4, 0.6, 0.7, 0.7 + 1e-9]), np.array([0.001, 0.004, 0.001, 1e-6, 0.002])
    row = summarise_curve(tokens, values, stderr, chance=0.25, n=1e9, draws=6000)
    share = (0.25 + 0.5 * (0.7 - 0.25) - 0.4) / 0.2  # of the way from 1e7 to 1e8
    # the level is the last value, but the fit of the last two is that of the certain one
    slopes = np.array([0.0, (share - 1) / 0.2, -share / 0.2, 0.0, 0.5 / 0.2])
    sigma = math.sqrt(((slopes * stderr) ** 2).sum())
    assert row["t50"] == pytest.approx(10 ** (7 + share))
    assert math.log10(row["t50"] / row["t50_low"]) == pytest.approx(1.96 * sigma, rel=0.09)
    assert math.log10(row["t50_high"] / row["t50"]) == pytest.approx(1.96 * sigma, rel=0.09)
    # of a fixed score the target has no error: 0.625 lies a quarter of the way from 1e8 to 1e9
    sigma = math.hypot(0.75 / 0.1 * 0.001, 0.25 / 0.1 * 1e-6)
    assert row["to_score"] == pytest.approx(10**8.25)
    assert math.log10(row["to_score"] / row["to_score_low"]) == pytest.approx(1.96 * sigma, rel=0.09)


def test_intervals_are_drawn_around_the_fit() -> None:
    """Where the values fall and the fit is flat, draws around the values would pool the two every time."""
    tokens, values, error = np.array([1e6, 1e7, 1e8, 1e9]), np.array([0.3, 0.6, 0.4, 0.7]), 0.03
    row = summarise_curve(tokens, values, np.full(4, error), chance=0.25, n=1e9, target=0.475, draws=4000)
    rng, drawn = np.random.default_rng(99), []
    for noise in rng.normal(0, error, (4000, 4)):
        sample = np.array([0.3, 0.5, 0.5, 0.7]) + noise
        drawn.append(time_of(list(isotonic_regression(sample).x), list(tokens), 0.475))
    low, high = np.log10(np.quantile(drawn, [0.025, 0.975]))
    assert math.log10(row["to_score_low"]) == pytest.approx(low, abs=0.02)
    assert math.log10(row["to_score_high"]) == pytest.approx(high, abs=0.02)


def test_intervals_over_documents_are_those_of_the_draws_that_are_given() -> None:
    """Errors that all checkpoints share move the curve up and down as a whole: the level and half of it with it."""
    tokens, values = np.array([1e6, 1e7, 1e8, 1e9, 1e11]), np.array([0.3, 0.4, 0.6, 0.7, 0.7])
    shift = np.random.default_rng(0).normal(0, 0.02, (4000, 1))
    row = summarise_curve(tokens, values, np.full(5, 0.02), chance=0.25, deviations=np.tile(shift, (1, 5)), target=0.5)
    assert row["interval_from"] == "documents"
    sigma = 0.02 / 0.2  # decades: 0.2 from 1e7 to 1e8
    assert math.log10(row["to_score"] / row["to_score_low"]) == pytest.approx(1.96 * sigma, rel=0.06)
    # t50 asks for 0.25 + (0.45 + shift) / 2 of a curve that is shifted too: half of the shift is left
    assert math.log10(row["t50_high"] / row["t50"]) == pytest.approx(0.5 * 1.96 * sigma, rel=0.06)


def test_what_the_fit_never_reaches_has_a_lower_bound_and_an_interval_may_be_open() -> None:
    tokens, values = np.array([1e6, 1e7, 1e8, 1e9, 1e10]), np.array([0.25, 0.25, 0.4, 0.5, 0.7])
    options = {"chance": 0.25, "n": 1e9, "draws": 1000}
    row = summarise_curve(tokens, values, np.full(5, 0.01), target=0.69, **options)
    # one in six draws ends below 0.69
    assert 1e9 < row["to_score"] < 1e10 and math.isinf(row["to_score_high"]) and row["to_score_low"] > 1e9
    row = summarise_curve(tokens, values, np.full(5, 0.01), target=0.71, **options)
    assert math.isnan(row["to_score"]) and row["to_score_outcome"] == "not reached"
    assert 1e9 < row["to_score_low"] < 1e10 and math.isinf(row["to_score_high"])
    row = summarise_curve(tokens, values, np.full(5, 0.01), target=0.9, **options)
    assert (row["to_score_low"], row["to_score_high"]) == (1e10, math.inf)
    assert row["verdict"] == "still rising" and row["t50_outcome"] == "not saturated"
    assert math.isnan(row["t50"]) and row["t50_low"] < 1e9 and math.isinf(row["t50_high"])


def test_intervals_follow_draws_and_seed() -> None:
    tokens, stderr = np.geomspace(1e6, 1e9, 10), np.full(10, 0.05)
    values = np.array([0.25, 0.25, 0.3, 0.45, 0.5, 0.52, 0.5, 0.51, 0.5, 0.5])
    frame = pd.DataFrame({"series": "s", "tokens": tokens, "task": "t", "metric": "acc", "value": values})
    table = normalise(frame.assign(stderr=stderr, chance=0.25))
    rows = [summarise(table, draws=d, seed=s).iloc[0] for d, s in ((200, 0), (200, 0), (200, 1), (50, 0))]
    assert rows[0].equals(rows[1]) and summarise(table).iloc[0].equals(rows[0])
    assert len({row["t50_low"] for row in (rows[0], *rows[2:])}) == 3
    bare = summarise(table.assign(stderr=NAN, value=values + 5 * (values > 0.26))).iloc[0]
    assert math.isfinite(bare["noise"]) and bare["t50_low"] <= bare["t50"] <= bare["t50_high"]  # from the noise


def test_a_curve_without_any_error_has_no_interval() -> None:
    row = summarise_curve(np.geomspace(1e6, 1e9, 7), np.array([0, 0, 0, 0.5, 0.5, 0.5, 0.5]), np.zeros(7), chance=0.0)
    assert row["verdict"] == "settled" and math.isfinite(row["t50"])
    assert math.isnan(row["t50_low"]) and math.isnan(row["t50_high"])


def test_the_curve_is_read_in_the_order_of_tokens_with_the_last_chance_and_n() -> None:
    frame = pd.DataFrame(
        {"tokens": [3e8, 1e8, 2e8, 2e8], "step": [1, 4, 3, 2], "value": [0.9, 0.1, 0.5, 0.4], "n": [40, 10, 30, 20]}
    )
    frame = frame.assign(series="s", task="t", metric="acc", stderr=0.01, chance=[0.3, 0.1, NAN, 0.2])
    table = pd.concat([normalise(frame), normalise(frame.assign(series="other", value=0.2))]).iloc[::-1]
    rows = summarise(table).set_index("series")
    assert list(rows.loc["s", ["checkpoints", "final", "n", "chance", "baseline"]]) == [4, 0.9, 40, 0.3, 0.3]
    assert rows.loc["s", "monotonicity"] == pytest.approx(stats.spearmanr([1, 2, 2, 3], [0.1, 0.4, 0.5, 0.9]).statistic)
    assert list(rows.index) == ["other", "s"]  # in the order in which they come


@pytest.mark.parametrize("metric", ["perplexity", "word_perplexity", "byte_perplexity", "ppl"])
def test_perplexities_are_summarised_by_their_logarithm_and_given_as_they_are(metric: str) -> None:
    tokens = np.geomspace(1e6, 1e9, 12)
    values = np.exp(3 + 6 / (1 + tokens / 1e7)) * (1 + 0.01 * (-1.0) ** np.arange(12))
    frame = pd.DataFrame({"series": "s", "tokens": tokens, "task": "t", "metric": metric, "value": values})
    row = summarise(normalise(frame.assign(stderr=0.02 * values))).iloc[0]
    logarithm = by_definition(tokens, np.log(values), np.full(12, 0.02), better=-1)
    for name in ("noise", "snr", "t10", "t50", "t90"):
        assert row[name] == pytest.approx(logarithm[name], nan_ok=True), name
    assert row["level"] == pytest.approx(math.exp(-logarithm["level"])) and row["baseline"] == pytest.approx(values[0])
    assert (row["final"], row["final_stderr"]) == pytest.approx((values[-1], 0.02 * values[-1]))
    relative = summarise_curve(tokens, np.log(values), np.full(12, 0.02), better=-1)
    assert row["t50_low"] == relative["t50_low"] < row["t50"] < row["t50_high"] == relative["t50_high"]


def test_what_has_no_logarithm_or_a_chance_level_is_summarised_as_it_is() -> None:
    frame = pd.DataFrame({"series": "s", "tokens": [1e6, 2e6, 4e6], "task": "t", "value": [4.0, 2.0, 1.0]})
    assert summarise(normalise(frame.assign(metric="ppl"))).iloc[0]["level"] == pytest.approx(1.0)
    for changes in ({"metric": "ppl", "value": [4.0, 0.0, 1.0]}, {"metric": "ppl", "chance": 0.5}, {"metric": "acc"}):
        row = summarise(normalise((frame.assign(**changes)).assign(stderr=0.1))).iloc[0]
        assert row["final_stderr"] == 0.1 and row["level"] == pytest.approx(1.0)
        assert row["baseline"] == changes.get("chance", 4.0)
    bits = summarise(normalise(frame.assign(metric="bits_per_byte"))).iloc[0]
    assert bits["baseline"] == 4.0 and bits["monotonicity"] == pytest.approx(1.0)


# ---- means of domains


def test_a_domain_is_the_mean_of_its_tasks_above_chance_wherever_all_of_them_were_scored() -> None:
    rng = np.random.default_rng(5)
    chances = {"a": 0.5, "b": 0.25, "c": 0.0, "d": 0.2, "e": NAN}
    domains = {"a": "one", "b": "one", "c": "one", "d": "two", "e": "two"}
    rows = [
        {
            "series": series, "checkpoint": f"c{i}", "tokens": 1e6 * (5 - i), "step": NAN, "domain": domains[task],
            "task": task, "metric": metric, "value": rng.uniform(), "stderr": rng.uniform(0.01, 0.1), "chance": chance,
        }
        for series in ("s", "r") for i in range(5) for task, chance in chances.items() for metric in ("acc", "acc_norm")
        if (series, i, task) not in {("s", 1, "a"), ("r", 2, "b")}
    ]  # fmt: skip
    table = normalise(pd.DataFrame(rows))
    unknown = (table.checkpoint == "c3") & (table.task == "a") & (table.series == "s")
    table.loc[unknown, "stderr"] = NAN
    found = domain_curves(table)
    expected = {}
    for (series, domain, metric, checkpoint), part in table.groupby(["series", "domain", "metric", "checkpoint"]):
        part = part[part.chance.notna()]
        if len(part) == {"one": 3, "two": 1}[domain]:
            scores = [(row.value - row.chance) / (1 - row.chance) for row in part.itertuples()]
            errors = [row.stderr / (1 - row.chance) for row in part.itertuples()]
            pooled = math.sqrt(sum(e**2 for e in errors)) / len(errors)
            expected[series, domain, metric, checkpoint] = (sum(scores) / len(scores), pooled, len(part))
    assert len(expected) == 2 * 2 * (5 + 5) - 2 * 2
    for row in found.itertuples():
        value = expected.pop((row.series, row.domain, row.metric, row.checkpoint))
        assert (row.value, row.stderr, row.tasks) == pytest.approx(value, nan_ok=True)
        assert row.task == row.domain and row.chance == 0.0 and math.isnan(row.n)
        assert row.tokens == 1e6 * (5 - int(row.checkpoint[1]))
    assert not expected
    for _, curve in found.groupby(["series", "domain", "metric"]):
        assert curve["tokens"].is_monotonic_increasing
