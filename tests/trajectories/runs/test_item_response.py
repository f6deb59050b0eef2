"""Item response: against a direct maximisation by scipy, and against known truth of simulated checkpoints."""

import numpy as np
import pandas as pd
import pytest
from scipy import optimize, special, stats

from fineline_jax.trajectories.runs.item_response import (
    INTERCEPT_SD,
    NODES,
    PRIOR,
    SLOPE_MEAN,
    SLOPE_SD,
    Items,
    abilities,
    fit,
    informative_documents,
    item_response,
    pick,
)


def simulated(rng, ability: np.ndarray, documents: int) -> tuple[Items, np.ndarray]:
    items = Items(rng.lognormal(0, 0.5, documents), rng.normal(0, 1.5, documents))
    return items, (rng.random((len(ability), documents)) < items.right(ability).T).astype(float)


def test_the_fit_is_the_maximum_of_the_marginal_posterior():
    """Oracle: L-BFGS on the same marginal posterior, written out, without EM."""
    rng = np.random.default_rng(0)
    _, answers = simulated(rng, rng.normal(size=12), 5)

    def loss(parameters: np.ndarray) -> float:
        slope, intercept = np.split(parameters, 2)
        p = special.expit(np.outer(slope, NODES) + intercept[:, None])
        likelihood = np.prod(np.where(answers[:, :, None] == 1, p, 1 - p), axis=1) @ PRIOR
        prior = stats.norm.logpdf(slope, SLOPE_MEAN, SLOPE_SD) + stats.norm.logpdf(intercept, 0, INTERCEPT_SD)
        return -np.log(likelihood).sum() - prior.sum()

    found = fit(answers)
    best = optimize.minimize(loss, np.r_[np.ones(5), np.zeros(5)], options={"gtol": 1e-7})
    assert loss(np.r_[found.slope, found.intercept]) == pytest.approx(best.fun, abs=1e-5)
    assert np.r_[found.slope, found.intercept] == pytest.approx(best.x, abs=0.02)


def test_parameters_and_abilities_of_many_answers_are_found_again():
    rng = np.random.default_rng(1)
    ability = rng.normal(size=300)
    items, answers = simulated(rng, ability, 100)
    found = fit(answers)
    assert np.corrcoef(found.slope, items.slope)[0, 1] > 0.85
    assert np.corrcoef(found.intercept, items.intercept)[0, 1] > 0.98
    mean, sd = abilities(found, answers)
    assert np.mean(np.abs(mean - (ability - ability.mean()) / ability.std()) <= 1.96 * sd) >= 0.92


def test_the_interval_of_ability_covers_it_with_as_many_checkpoints_as_a_series_has():
    """Up to the scale of these checkpoints, which the prior sets: at least 90 % of 5 x 24 at 95 %."""
    covered = []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        ability = np.linspace(-1.7, 1.7, 24)
        _, answers = simulated(rng, ability, 300)
        mean, sd = abilities(fit(answers), answers)
        slope, shift = np.polyfit(mean, ability, 1)
        covered += (np.abs(slope * mean + shift - ability) <= 1.96 * slope * sd).tolist()
    assert np.mean(covered) >= 0.9


def test_the_picked_documents_are_those_with_most_information_and_reach_the_error_that_is_said():
    rng = np.random.default_rng(2)
    ability = np.linspace(-1.5, 1.5, 30)
    items, _ = simulated(rng, ability, 400)
    chosen, errors = pick(items, ability, count=50)
    assert len(set(chosen.tolist())) == 50 and (np.diff(errors) < 0).all()
    total = 1 + items.information(ability)[chosen].sum(axis=0)
    assert errors[-1] == pytest.approx(np.sqrt((1 / total).mean()))
    best_alone = (1 / (1 + items.information(ability))).mean(axis=1).argmin()
    assert chosen[0] == best_alone
    random = [
        np.sqrt((1 / (1 + items.information(ability)[rng.permutation(400)[:50]].sum(0))).mean()) for _ in range(20)
    ]
    assert errors[-1] < 0.75 * min(random)
    enough, until = pick(items, ability, count=400, error=0.3)
    assert until[-1] <= 0.3 < until[-2] and len(enough) == len(until)


def long(answers: np.ndarray, series: str = "s") -> pd.DataFrame:
    frame = pd.DataFrame(answers, index=range(len(answers))).rename_axis("number").reset_index()
    frame = frame.melt("number", var_name="document")
    return frame.assign(
        series=series, checkpoint="step_" + frame["number"].astype(str), tokens=frame["number"] * 1e6, task="t"
    )


def test_fifty_documents_predict_the_score_of_all():
    """On checkpoints of another run, whose answers took no part in the fit: four points on average, and at most three
    quarters of the error of fifty random documents."""
    ability, ours, theirs = np.linspace(-1.7, 1.7, 24), [], []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        items, answers = simulated(rng, ability, 500)
        fitted = fit(answers)
        chosen, _ = pick(fitted, abilities(fitted, answers)[0])
        other = (rng.random((24, 500)) < items.right(ability).T).astype(float)
        predicted = fitted.right(abilities(fitted.only(chosen), other[:, chosen])[0]).mean(axis=0)
        score, random = other.mean(axis=1), other[:, rng.permutation(500)[:50]].mean(axis=1)
        ours.append(np.sqrt(np.mean((predicted - score) ** 2)))
        theirs.append(np.sqrt(np.mean((random - score) ** 2)))
    assert np.mean(ours) < 0.04 and np.mean(ours) < 0.75 * np.mean(theirs)


def test_frames_hold_every_checkpoint_and_every_document():
    rng = np.random.default_rng(4)
    _, answers = simulated(rng, np.linspace(-1.5, 1.5, 10), 60)
    found = item_response(long(answers), count=10)
    assert len(found) == 10 and (found["picked"] == 10).all() and found["tokens"].is_monotonic_increasing
    assert found["score"].to_numpy() == pytest.approx(answers.mean(axis=1))
    assert ((found.low < found.ability) & (found.ability < found.high)).all()
    assert (found.picked_high - found.picked_low > found.high - found.low).all()
    documents = informative_documents(long(answers), count=10)
    assert len(documents) == 60 and documents["place"].notna().sum() == 10
    assert sorted(documents["place"].dropna()) == list(range(1, 11))
    assert documents["right"].to_numpy() == pytest.approx(answers.mean(axis=0))
    few = item_response(long(answers[:3]))
    assert "fewer than 8" in few.reason[0] and len(informative_documents(long(answers[:3]))) == 0
