"""Scaling laws: planted ones are found again, and the ladder's runs predict OLMo-2 7B as well as was seen before."""

import json

import numpy as np
import pandas as pd
import pytest
from scipy import optimize, stats

from fineline_jax.trajectories.statistics.laws import (
    Law,
    PowerLaw,
    Run,
    fit,
    fit_line_of_logarithms,
    fit_power_law,
    fit_sigmoid,
    resampled,
)


def predict(form: str, runs: list[Run], *size: float) -> float:
    """size: parameters, tokens and operations of the run asked for."""
    return float(fit(form, runs)(np.array([size], float))[0])


def test_a_power_law_with_a_floor_is_found_again():
    x = np.geomspace(1e19, 1e22, 20)[:, None]
    law = fit_power_law(x, 3.0e4 * x[:, 0] ** -0.25 + 0.6)
    assert law.exponent == pytest.approx([0.25], abs=2e-3)
    assert law.floor == pytest.approx(0.6, abs=2e-3)
    far = np.array([[1e24]])
    assert law(far) == pytest.approx(3.0e4 * far[:, 0] ** -0.25 + 0.6, rel=2e-3)


def test_a_law_of_parameters_and_tokens_is_found_again():
    n, d = (a.ravel() for a in np.meshgrid(np.geomspace(2e8, 3e9, 5), np.geomspace(1e9, 6e10, 4)))
    y = 400 * n**-0.34 + 410 * d**-0.28 + 1.7  # the constants of Chinchilla, but for the sizes of the terms
    law = fit_power_law(np.column_stack([n, d]), y)
    assert law(np.array([[7e9, 4e12]])) == pytest.approx(400 * 7e9**-0.34 + 410 * 4e12**-0.28 + 1.7, rel=5e-3)


def test_without_a_floor_the_fit_is_a_line_of_logarithms():
    rng = np.random.default_rng(0)
    x = np.geomspace(1.0, 1e4, 30)[:, None]
    y = 5 * x[:, 0] ** -0.2 * np.exp(rng.normal(0, 2e-4, 30))  # inside Huber's quadratic part: least squares
    law = fit_line_of_logarithms(x[:, 0], y)
    slope, offset = np.polyfit(np.log(x[:, 0]), np.log(y), 1)
    assert law.exponent == pytest.approx([-slope], rel=1e-4)
    assert law.log_scale == pytest.approx([offset], rel=1e-4)
    assert law.floor == 0.0


def test_the_line_of_logarithms_is_the_minimum_of_hubers_loss():
    rng = np.random.default_rng(4)
    x = np.sort(rng.uniform(1.0, 1e3, 25))[:, None]
    y = 2 * x[:, 0] ** -0.3 * np.exp(0.05 * rng.standard_t(2, 25))

    def huber(p):
        r = np.abs(p[0] - p[1] * np.log(x[:, 0]) - np.log(y))
        return np.where(r <= 1e-3, r**2 / 2, 1e-3 * (r - 0.5e-3)).mean()

    law = fit_line_of_logarithms(x[:, 0], y)
    assert law.objective == pytest.approx(huber([law.log_scale[0], law.exponent[0]]), rel=1e-9)
    best = min(optimize.minimize(huber, [a, b], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-14}).fun
               for a in (0.5, 0.8) for b in (0.2, 0.3, 0.4))  # fmt: skip
    assert law.objective <= best * (1 + 1e-4)
    rising = fit_line_of_logarithms(x[:, 0], x[:, 0] ** 0.2)
    assert rising.exponent[0] == 0.0  # an exponent is at least 0


def test_one_wild_point_hardly_moves_the_law():
    x = np.geomspace(1.0, 1e4, 30)[:, None]
    y = 5 * x[:, 0] ** -0.2 + 1.0
    y[7] *= 1.5
    law = fit_power_law(x, y)
    assert law(np.array([[1e6]])) == pytest.approx(5 * 1e6**-0.2 + 1.0, rel=0.01)
    residual = np.abs(np.log(law(x) / y))
    huber = np.where(residual <= 1e-3, residual**2 / 2, 1e-3 * (residual - 0.5e-3))
    assert law.objective == pytest.approx(huber.mean(), rel=1e-6)


def test_fewer_points_than_parameters_are_refused():
    x = np.geomspace(1.0, 10.0, 4)
    with pytest.raises(ValueError, match="4 points for 5 parameters"):
        fit_power_law(np.column_stack([x, x]), x**-0.1)
    fit_power_law(x[:3, None], x[:3] ** -0.1)
    with pytest.raises(ValueError, match="2 points for 3 parameters"):
        fit_power_law(x[:2, None], x[:2] ** -0.1)


def test_a_sigmoid_is_found_again_and_perfect_at_no_loss():
    loss = np.linspace(0.6, 1.6, 40)
    planted = lambda x: -0.72 / (1 + np.exp(-4.0 * (x - 1.0))) + 0.97
    found = fit_sigmoid(loss, planted(loss))
    assert found(loss) == pytest.approx(planted(loss), abs=0.01)
    assert found(np.array([0.0]))[0] == pytest.approx(1.0, abs=0.02)
    x, y = np.append(loss, 0.0), np.append(planted(loss), 1.0)
    squares = lambda p: p[0] / (1 + np.exp(-p[1] * (x - p[2]))) + p[3] - y
    oracle = optimize.least_squares(squares, [-0.5, 2, 1.2, 0.9], bounds=([-1, 0, 0, 0], [0, 50, 5, 1]), xtol=1e-12)
    assert (found.height, found.slope, found.middle, found.base) == pytest.approx(tuple(oracle.x), rel=2e-3)


@pytest.mark.parametrize("form", ["flops", "size_tokens", "direct"])
def test_every_form_extrapolates_what_it_describes_to_the_next_size(form):
    def made(parameters: float, tokens: float) -> Run:
        at = np.linspace(tokens / 40, tokens, 40)
        flops = at * 6 * parameters
        if form == "size_tokens":
            loss = 20 * parameters**-0.2 + 30 * at**-0.2 + 0.2
        else:
            loss = 2.0e3 * flops**-0.19 + 0.3
        score = np.exp(-900 * flops**-0.16) if form == "direct" else -0.7 / (1 + np.exp(-5 * (loss - 0.9))) + 0.97
        score[:3] = 0.0  # the rate is still rising: in the first tenth the score does not follow the loss
        return Run("size", parameters, 6 * parameters, at, loss, score, averaged=1)

    runs = [made(n, n * ratio) for n in (2e8, 4e8, 8e8, 1.6e9) for ratio in (20, 40, 100)]
    parameters, tokens, flops, _, score = made(4e9, 4e9 * 60).end
    assert score > max(run.end[4] for run in runs) + 0.01
    assert predict(form, runs, parameters, tokens, flops) == pytest.approx(score, abs=0.005)


def with_errors(form: str, sizes: int, lengths: int, rng, of_size: float, of_run: float) -> list[list[Run]]:
    """Runs of sizes that double, and of one four times the largest: each size and each run misses the law of the first
    step by a normal error of its logarithm, each size that of the second step by a fifth as many points."""
    found = []
    for parameters in [*(2e8 * 2.0 ** np.arange(sizes)), 2e8 * 2.0 ** (sizes + 1)]:
        size_error, second_error, runs = *rng.normal(0, [of_size, of_size / 5]), []
        for ratio in (20, 40, 100, 200)[:lengths]:
            at = np.linspace(ratio * parameters / 10, ratio * parameters, 10)
            factor = np.exp(size_error + rng.normal(0, of_run))
            if form == "direct":
                loss, score = np.ones(10), np.exp(-900 * (6 * parameters * at) ** -0.16 * factor)
            else:
                loss = (2.0e3 * (6 * parameters * at) ** -0.19 + 0.3) * factor
                score = -0.7 / (1 + np.exp(-5 * (loss - 0.9))) + 0.97 + second_error + rng.normal(0, 0.003, 10)
            runs.append(Run("size", parameters, 6 * parameters, at, loss, score, averaged=1))
        found.append(runs)
    return found


def test_a_law_is_of_what_its_form_says():
    ends = np.array([[1e9, 2e10, 1e20], [3e9, 5e10, 1e20], [3e9, 5e10, 9e20]])  # parameters, tokens, operations
    for form in ("flops", "direct"):
        scores = Law(form, PowerLaw((5.0,), (0.1,), 0.0, 0.0), None)(ends)
        assert scores == pytest.approx(np.exp(-np.exp(5.0) * ends[:, 2] ** -0.1))
        assert scores[0] == scores[1] < scores[2]
    of_both = Law("size_tokens", PowerLaw((5.0, 6.0), (0.2, 0.3), 0.0, 0.0), None)(ends)
    expected = np.exp(5.0) * ends[:, 0] ** -0.2 + np.exp(6.0) * ends[:, 1] ** -0.3
    assert of_both == pytest.approx(np.exp(-expected))


def test_the_bootstrap_of_a_line_is_students_interval_of_a_prediction():
    """Errors of 2e-4 are inside Huber's square, so that the fit is ordinary least squares with a run per size: half an
    interval is t s sqrt(1 + 1/n + (x - mean x)^2 / Sxx) of log(-log score) (Draper, Smith 1998, 1.4)."""
    sets = with_errors("direct", 6, 1, np.random.default_rng(3), 2e-4, 0.0)
    small, held = [run for runs in sets[:-1] for run in runs], sets[-1]
    drawn = np.log(-np.log(resampled(fit("direct", small), small, held, 20_000, np.random.default_rng(0))))
    x, y = (
        np.array([of(run.end) for run in small]) for of in (lambda e: np.log(e[2]), lambda e: np.log(-np.log(e[4])))
    )
    line = np.polyfit(x, y, 1)
    scatter = np.sqrt(((y - np.polyval(line, x)) ** 2).sum() / 4)
    far = np.log(held[0].end[2])
    half = stats.t.ppf(0.975, 4) * scatter * np.sqrt(1 + 1 / 6 + (far - x.mean()) ** 2 / ((x - x.mean()) ** 2).sum())
    expected = np.polyval(line, far) + half * np.array([-1, 1])
    assert np.quantile(drawn, [0.025, 0.975]) == pytest.approx(expected, abs=0.06 * half)


def covered(form: str, sizes: int, lengths: int, of_size: float, of_run: float, *, repeats: int, draws: int) -> float:
    rng, inside = np.random.default_rng(1), 0
    for _ in range(repeats):
        sets = with_errors(form, sizes, lengths, rng, of_size, of_run)
        small = [run for runs in sets[:-1] for run in runs]
        drawn = resampled(fit(form, small), small, sets[-1], draws, rng)
        low, high = np.quantile(drawn, [0.025, 0.975])
        inside += low <= np.mean([run.end[4] for run in sets[-1]]) <= high
    return inside / repeats


@pytest.mark.parametrize(("lengths", "of_size", "of_run"), [(1, 0.02, 0.0), (4, 0.02, 0.005), (4, 0.0, 0.02)])
def test_the_interval_of_the_direct_form_holds_the_larger_runs_score(lengths, of_size, of_run):
    """At a nominal 95 %, at least 89 of 100 (fewer has probability .01), with errors of sizes and of runs."""
    assert covered("direct", 5, lengths, of_size, of_run, repeats=100, draws=100) >= 0.89


@pytest.mark.slow
def test_the_interval_of_two_steps_holds_the_larger_runs_score():
    """At least 35 of 40 (fewer has probability .02 at a coverage of 95 %)."""
    assert covered("flops", 4, 4, 0.01, 0.003, repeats=40, draws=60) >= 35 / 40


def test_the_direct_form_has_no_floor():
    flops = np.geomspace(1e18, 1e20, 8)
    ends = 0.5 * (flops / 1e18) ** -0.2 + 0.002  # so little that a line of logarithms is inside Huber's square
    runs = [Run("s", 1.0, c, np.ones(1), np.ones(1), np.exp(-y)[None]) for c, y in zip(flops, ends)]
    line = np.polyfit(np.log(flops), np.log(ends), 1)
    far = np.exp(np.polyval(line, np.log(1e26)))
    assert -np.log(predict("direct", runs, 1.0, 1.0, 1e26)) == pytest.approx(far, rel=0.01)


def test_the_end_of_a_run_is_the_mean_of_its_last_five_at_its_last_tokens():
    at = np.arange(1.0, 11.0)
    run = Run("s", 7.0, 100.0, at, at / 10, at / 20)
    assert run.end == (7.0, 10.0, 1000.0, pytest.approx(0.8), pytest.approx(0.4))


TASKS = {
    name: [f"{column}_rc_5shot_len_norm"]
    for name, column in (
        ("hellaswag", "hellaswag_val"), ("arc_challenge", "arc_challenge_test"), ("arc_easy", "arc_easy_test"),
        ("piqa", "piqa_val"), ("csqa", "csqa_val"), ("siqa", "socialiqa_val"), ("obqa", "openbookqa_test"),
    )
}  # fmt: skip
SHARES = {"stem": 0.215, "humanities": 0.335, "social_sciences": 0.219, "other": 0.231}
TASKS["mmlu"] = [f"mmlu_{subject}_test_rc_5shot_len_norm" for subject in SHARES]


def test_the_ladder_up_to_3b_predicts_olmo_2_7b_within_a_point_and_a_half(shared_data):
    folder = shared_data / "trajectories" / "olmo-ladder"
    facts = {model["size"]: model for model in json.loads((folder / "model_facts.json").read_text())["models"]}

    def read(name: str, task: str, kind: str) -> np.ndarray:
        frame = pd.read_csv(folder / f"{name}.csv")
        columns = [f"eval/downstream/{c}" for c in TASKS[task]]
        if kind == "bpb":
            columns = [c.replace("downstream/", "downstream_bpb/").replace("_len_norm", "_bpb") for c in columns]
        weights = list(SHARES.values()) if task == "mmlu" else [1.0]
        return np.average(frame[columns].to_numpy(), axis=1, weights=weights)

    def run(size: str, length: str, task: str) -> Run:
        name, fact = f"{size}-{length}", facts[size]
        tokens = pd.read_csv(folder / f"{name}.csv")["_step"].to_numpy(float) * fact["batch_size_tokens"]
        loss, score = read(name, task, "bpb"), read(name, task, "acc")
        return Run(size, fact["n_params"], fact["flops_per_token"], tokens, loss, score)

    tokens = 925_000 * 4_194_304
    size = 6_887_575_552, float(tokens), float(tokens * facts["7B"]["flops_per_token"])
    errors, naive = [], []
    for task in TASKS:
        runs = [run(s, x, task) for s in ("190M", "370M", "760M", "1B", "3B") for x in ("1xC", "2xC", "5xC", "10xC")]
        true = read("peteish7_eval_full", task, "acc")[-5:].mean()
        errors.append(abs(predict("flops", runs, *size) - true))
        naive.append(abs(max(r.end[4] for r in runs) - true))
    assert 100 * np.mean(errors) <= 1.5
    assert 100 * np.mean(naive) == pytest.approx(6.3, abs=0.05)
