"""Item response over checkpoints: an ability per checkpoint, informative documents, and few that say as much as all.

Two-parameter logistic model (Birnbaum 1968): a checkpoint of ability t answers document d rightly with probability
1 / (1 + exp(-(slope_d t + intercept_d))). Abilities are standard normal; slopes and intercepts have the normal priors
below, which keep documents finite that all or no checkpoints answer. The fit is marginal maximum a posteriori by EM
over a grid of abilities (Bock and Aitkin 1981); abilities are posterior means with their standard deviation.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import special

from fineline_jax.trajectories.statistics.columns import Chart, Column, Statistic

NODES = np.linspace(-4.0, 4.0, 41)
PRIOR = np.exp(-0.5 * NODES**2) / np.exp(-0.5 * NODES**2).sum()
SLOPE_MEAN, SLOPE_SD, INTERCEPT_SD = 1.0, 0.5, 3.0
"""A wider prior of slopes picks documents that look sharp by chance: of SD .25, .35, .5, 1 this one predicts the score
of another run best from 50 of 500 documents fitted on 24 checkpoints (3.4 points; 50 random documents 5.9)."""
ITERATIONS, NEWTON_STEPS, TOLERANCE = 200, 2, 1e-4
FEWEST_CHECKPOINTS = 8
FEWEST_DOCUMENTS = 20
PICKED = 50


@dataclass(frozen=True)
class Items:
    """Fitted documents."""

    slope: np.ndarray
    """[documents] how sharply it tells abilities apart; below 0 where better checkpoints answer it worse."""
    intercept: np.ndarray
    """[documents] log odds of a right answer at ability 0."""

    def right(self, ability: np.ndarray) -> np.ndarray:
        """Probability of a right answer, abilities [n] -> [documents, n]."""
        return special.expit(self.slope[:, None] * ability + self.intercept[:, None])

    def information(self, ability: np.ndarray) -> np.ndarray:
        """Fisher information about ability, [n] -> [documents, n]."""
        right = self.right(ability)
        return self.slope[:, None] ** 2 * right * (1 - right)

    def only(self, documents: np.ndarray) -> "Items":
        return Items(self.slope[documents], self.intercept[documents])


def fit(answers: np.ndarray) -> Items:
    """The documents of answers [checkpoints, documents], 1 right and 0 wrong."""
    answers = answers.astype(float)
    slope = np.full(answers.shape[1], SLOPE_MEAN)
    share = (answers.sum(axis=0) + 0.5) / (len(answers) + 1)
    intercept = special.logit(share)
    for _ in range(ITERATIONS):
        weights = _posterior(Items(slope, intercept), answers)
        right, asked = answers.T @ weights, weights.sum(axis=0)
        before = slope, intercept
        for _ in range(NEWTON_STEPS):
            slope, intercept = _newton(slope, intercept, right, asked)
        if max(np.abs(slope - before[0]).max(), np.abs(intercept - before[1]).max()) < TOLERANCE:
            break
    return Items(slope, intercept)


def _newton(slope: np.ndarray, intercept: np.ndarray, right: np.ndarray, asked: np.ndarray) -> tuple:
    """One step of every document's logistic regression on the nodes; right [documents, nodes], asked [nodes]."""
    p = Items(slope, intercept).right(NODES)
    residual, weight = right - asked * p, asked * p * (1 - p)
    of_slope = residual @ NODES - (slope - SLOPE_MEAN) / SLOPE_SD**2
    of_intercept = residual.sum(axis=1) - intercept / INTERCEPT_SD**2
    ss, si, ii = weight @ NODES**2 + 1 / SLOPE_SD**2, weight @ NODES, weight.sum(axis=1) + 1 / INTERCEPT_SD**2
    determinant = ss * ii - si**2
    steps = (ii * of_slope - si * of_intercept) / determinant, (ss * of_intercept - si * of_slope) / determinant
    return slope + np.clip(steps[0], -1, 1), intercept + np.clip(steps[1], -1, 1)


def _posterior(items: Items, answers: np.ndarray) -> np.ndarray:
    """[checkpoints, nodes]: the probability of each ability given the answers [checkpoints, documents]."""
    logit = items.slope[:, None] * NODES + items.intercept[:, None]
    log = answers @ logit - np.logaddexp(0, logit).sum(axis=0) + np.log(PRIOR)
    return special.softmax(log, axis=1)


def abilities(items: Items, answers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(posterior mean, posterior standard deviation) [checkpoints] of answers [checkpoints, documents]."""
    weights = _posterior(items, answers.astype(float))
    mean = weights @ NODES
    return mean, np.sqrt(np.maximum(weights @ NODES**2 - mean**2, 0.0))


def pick(
    items: Items, ability: np.ndarray, *, count: int = PICKED, error: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """(documents in the order in which they help most, root mean square error of ability with the first 1, 2, …).

    One after another the document is taken that lessens the mean posterior variance over `ability` [n] most, until
    there are `count`, or the error is at most `error`.
    """
    information = items.information(ability)
    total, left = np.ones(len(ability)), np.ones(len(items.slope), bool)  # the prior of ability has information 1
    chosen, errors = [], []
    while len(chosen) < min(count, len(left)):
        variance = (1 / (total + information)).mean(axis=1)
        best = int(np.where(left, variance, np.inf).argmin())
        left[best], total = False, total + information[best]
        chosen.append(best)
        errors.append(math.sqrt(variance[best]))
        if errors[-1] <= error:
            break
    return np.array(chosen, int), np.array(errors)


def _tasks(answers: pd.DataFrame, count: int, error: float) -> Iterator[tuple]:
    """(task, keys of the checkpoints, documents asked at every one, answers [checkpoints, documents], fitted).

    fitted: (items, their `abilities`, what `pick` chose), one model of all series; None where there are too few.
    """
    key = ["series", "checkpoint", "tokens"]
    for task, part in answers.groupby("task", sort=False, observed=True):
        wide = part.pivot(index=key, columns="document", values="value").dropna(axis="columns")
        wide = wide.sort_index(level=["series", "tokens"])
        matrix, fitted = wide.to_numpy(float), None
        if matrix.shape[0] >= FEWEST_CHECKPOINTS and matrix.shape[1] >= FEWEST_DOCUMENTS:
            items = fit(matrix)
            ability = abilities(items, matrix)
            fitted = items, ability, pick(items, ability[0], count=count, error=error)
        yield str(task), [dict(zip(key, one, strict=True)) for one in wide.index], list(wide.columns), matrix, fitted


def item_response(answers: pd.DataFrame, *, count: int = PICKED, error: float = 0.0) -> pd.DataFrame:
    """The ability of each (task, series, checkpoint), from all documents and from the picked ones. See `ABILITY`.

    answers: columns series, checkpoint, tokens, task, document, value (1 right, 0 wrong), every document at every
    checkpoint. count, error: of `pick`. One model per task, of all series together.
    """
    rows = []
    for task, keys, documents, matrix, fitted in _tasks(answers, count, error):
        known = {"task": task, "documents": len(documents)}
        if fitted is None:
            why = f"fewer than {FEWEST_CHECKPOINTS} checkpoints or {FEWEST_DOCUMENTS} documents"
            rows += [known | key | {"reason": why} for key in keys]
            continue
        items, ability, (chosen, _) = fitted
        of_chosen = abilities(items.only(chosen), matrix[:, chosen])
        expected = items.right(of_chosen[0]).mean(axis=0)
        for number, key in enumerate(keys):
            row = known | key | {"score": matrix[number].mean(), "picked": len(chosen)}
            for prefix, (mean, sd) in (("", ability), ("picked_", of_chosen)):
                low, high = mean[number] - 1.96 * sd[number], mean[number] + 1.96 * sd[number]
                row |= {f"{prefix}ability": mean[number], f"{prefix}low": low, f"{prefix}high": high}
            rows.append(row | {"picked_score": expected[number], "reason": ""})
    return ABILITY.frame(rows)


def informative_documents(answers: pd.DataFrame, *, count: int = PICKED, error: float = 0.0) -> pd.DataFrame:
    """What each document says about ability, and which are picked. See `DOCUMENTS`; arguments as `item_response`."""
    rows = []
    for task, _, documents, matrix, fitted in _tasks(answers, count, error):
        if fitted is None:
            continue
        items, (ability, _), (chosen, errors) = fitted
        frame = pd.DataFrame({"task": task, "document": [str(document) for document in documents]})
        frame = frame.assign(right=matrix.mean(axis=0), slope=items.slope, difficulty=-items.intercept / items.slope)
        frame["information"] = items.information(ability).mean(axis=1)
        frame.loc[chosen, "place"] = np.arange(1, len(chosen) + 1)
        frame.loc[chosen, "error"] = errors
        rows += frame.to_dict("records")
    return DOCUMENTS.frame(rows)


ABILITY = Statistic(
    "ability",
    "How able is each checkpoint, and do few documents say the same?",
    item_response,
    (
        *Column.texts(task="the task", series="the series", checkpoint="the checkpoint"),
        Column("tokens", "tokens", "its training tokens"),
        Column("documents", "1", "documents asked at every checkpoint"),
        Column("score", "1", "share of right answers", "with few checkpoints or documents"),
        *Column.estimate(
            "ability", "logits", "posterior mean; the prior's is 0, its SD 1", "as score", "documents as known"
        ),
        Column("picked", "1", "documents picked", "as score"),
        *Column.estimate("picked_ability", "logits", "from them alone", "as score", prefix="picked_"),
        Column("picked_score", "1", "share of right answers to all documents that this ability predicts", "as score"),
        Column("reason", "", "why there is no value", "where there is one"),
    ),
    "two-parameter logistic model: Birnbaum 1968; EM: Bock and Aitkin 1981; over checkpoints: Fluid Benchmarking",
    definition="One logistic model per task over all checkpoints of all series; ability is the posterior mean under a "
    "standard normal prior.",
    caveat="The documents are fitted on these checkpoints; for another kind of model they may be ordered otherwise.",
    chart=Chart("ability", panel="task"),
    count="documents",
)

DOCUMENTS = Statistic(
    "informative_documents",
    "Which documents tell checkpoints apart?",
    informative_documents,
    (
        *Column.texts(task="the task", document="the document"),
        Column("right", "1", "share of checkpoints that answer it rightly"),
        Column("slope", "1/logit", "how sharply it tells abilities apart; below 0: better ones answer it worse"),
        Column("difficulty", "logits", "ability at which half of the answers are right"),
        Column("information", "1", "Fisher information, mean over the checkpoints' abilities"),
        Column("place", "1", "its place among the picked documents", "where it is not picked"),
        Column("error", "logits", "error of ability with the documents up to it", "where it is not picked"),
    ),
    "Birnbaum 1968; picked one after another for the least mean posterior variance",
    definition="Parameters of the logistic model of the task, and the documents that lessen the error of ability most.",
    caveat="With few checkpoints the prior shapes the slopes.",
    chart=Chart("information", panel="task"),
)
