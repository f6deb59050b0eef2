"""What the smaller runs of a family say of the largest: forms of a scaling law, chosen and refused by a back-test."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

from fineline_jax.facts.metrics import metric_of
from fineline_jax.trajectories.statistics.columns import Chart, Column, Statistic, shots_of, size_of
from fineline_jax.trajectories.statistics.laws import FORMS, Run, predict

TOLERANCE = 0.02
"""Error of the back-test above which a forecast is refused."""
FEWEST_SIZES = 4
CLEAR = 2.0
"""Standard errors above guessing that the best run to fit must be: what is at chance has no law."""
PARAMETERS = {"flops": 3, "size_tokens": 5, "direct": 2}
"""Of the law of each form; one with more of them than sizes to fit is not tried."""
KEPT, REFUSED, DECLINED = "kept", "refused", "declined"


def forecast(runs: Sequence[Run], held: Sequence[Run], forms: Sequence[str] = FORMS) -> dict:
    """Columns `form` to `verdict` of SCALING for runs of several sizes and the held-out runs of a larger one.

    The form is the one that, fitted without the largest size of `runs`, predicts that size best, of those that have no
    more parameters than there are sizes to fit. The interval is a
    jackknife over sizes (Efron, Tibshirani 1993, ch. 11), Student's t. Errors are means over runs of a size.
    """
    sizes = sorted({run.parameters for run in runs})
    if len(sizes) < FEWEST_SIZES - 1:
        return {"verdict": DECLINED, "reason": f"fewer than {FEWEST_SIZES} sizes"}
    last = [run for run in runs if run.parameters == sizes[-1]]
    before = [run for run in runs if run.parameters < sizes[-1]]
    tests = {}
    for form in forms:
        if PARAMETERS[form] > len(sizes) - 1:
            continue
        try:
            tests[form] = _error(form, before, last)
        except ValueError:
            continue
    if not tests:
        return {"verdict": DECLINED, "reason": "no form can be fitted to so few runs"}
    form = min(tests, key=tests.__getitem__)
    predicted, measured = _predicted(form, runs, held), float(np.mean([run.end[4] for run in held]))
    row = {
        "form": form, "backtest": tests[form], "predicted": predicted, "measured": measured,
        "error": abs(predicted - measured), "best_small": max((run.end[4] for run in runs), default=np.nan),
    }  # fmt: skip
    row["error_of_best_small"] = abs(row["best_small"] - measured)
    if tests[form] > TOLERANCE:
        return row | {"verdict": REFUSED, "reason": f"the back-test was wrong by more than {TOLERANCE:g}"}
    left_out = []
    for size in sizes:
        try:
            left_out.append(_predicted(form, [run for run in runs if run.parameters != size], held))
        except ValueError:
            break
    if len(left_out) == len(sizes):
        count = len(sizes)
        stderr = float(np.sqrt((count - 1) / count * ((np.array(left_out) - np.mean(left_out)) ** 2).sum()))
        half = float(stats.t.ppf(0.975, count - 1)) * stderr
        row |= {"low": predicted - half, "high": predicted + half}
    return row | {"verdict": KEPT, "reason": ""}


def _predicted(form: str, runs: Sequence[Run], held: Sequence[Run]) -> float:
    return float(np.mean([predict(form, runs, *run.end[:3]) for run in held]))


def _error(form: str, runs: Sequence[Run], held: Sequence[Run]) -> float:
    return abs(_predicted(form, runs, held) - float(np.mean([run.end[4] for run in held])))


def scaling(table: pd.DataFrame) -> pd.DataFrame:
    """Of each (metric, task, shots): the largest size from the smaller ones. See `SCALING`.

    Sizes are those that the names of the series state, operations are 6 x parameters x tokens. Only the direct form is
    tried, which takes a twentieth of a second; `forecast` tries all, through a loss, in several seconds per task.
    """
    names = table["series"].unique()
    sizes, shots = {name: size_of(str(name)) for name in names}, {name: shots_of(str(name)) for name in names}
    table = table.assign(size=table["series"].map(sizes), shots=table["series"].map(shots))
    share = {metric: metric_of(str(metric)).chance == "task" for metric in table["metric"].unique()}
    several = table["shots"].nunique() > 1
    rows = []
    if len({size for size in sizes.values() if np.isfinite(size)}) < FEWEST_SIZES:
        return SCALING.frame(rows)
    wanted = table[table["metric"].map(share).astype(bool) & table["size"].notna() & (table["tokens"] > 0)]
    for (metric, task, shot), part in wanted.groupby(["metric", "task", "shots"], sort=False, observed=True):
        runs = [_run(curve) for _, curve in part.groupby("series", sort=False, observed=True)]
        largest = max(run.parameters for run in runs)
        small, held = [r for r in runs if r.parameters < largest], [r for r in runs if r.parameters == largest]
        row = {"metric": metric, "task": task, "shots": shot if several else "", "runs": len(small)}
        row |= {"sizes": len({run.parameters for run in small}), "held_out": largest}
        rows.append(row | _decide(part[part["size"] < largest], small, held))
    return SCALING.frame(rows)


def _decide(part: pd.DataFrame, small: list[Run], held: list[Run]) -> dict:
    if not small:
        return {"verdict": DECLINED, "reason": f"fewer than {FEWEST_SIZES} sizes"}
    ends = np.array([run.end[4] for run in small])
    chance, error = part["chance"].max(), part["stderr"].max()
    if not (ends > 0).all() or ends.max() <= np.nan_to_num(chance) + CLEAR * np.nan_to_num(error):
        return {"verdict": DECLINED, "reason": "the smaller runs are at chance"}
    return forecast(small, held, ("direct",))


def _run(curve: pd.DataFrame) -> Run:
    curve = curve.sort_values("tokens").drop_duplicates("tokens", keep="last")
    tokens, size = curve["tokens"].to_numpy(float), float(curve["size"].iloc[0])
    averaged = max(1, min(5, len(tokens) // 4))
    return Run(
        f"{size:g}", size, 6 * size, tokens, np.full(len(tokens), np.nan), curve["value"].to_numpy(float), averaged
    )


SCALING = Statistic(
    "scaling",
    "Do the smaller runs predict the largest one's scores?",
    scaling,
    (
        Column("metric", "", "the metric"),
        Column("task", "", "the task"),
        Column("shots", "", "of the series compared", "where all series have as many"),
        Column("runs", "1", "smaller runs"),
        Column("sizes", "1", "their sizes"),
        Column("held_out", "parameters", "size of the model that is predicted"),
        Column("form", "", "the form that a back-test on the next smaller size chose", "where declined"),
        Column("backtest", "score", "its error there", "where declined"),
        Column(
            "predicted", "score", "score predicted for the held-out size", "where declined", interval=("low", "high")
        ),
        Column("low", "score", "lower end of the 95 % interval, a jackknife over sizes", "unless kept"),
        Column("high", "score", "upper end of the 95 % interval", "unless kept"),
        Column("measured", "score", "what it scored, mean of the last checkpoints", "where declined"),
        Column("error", "score", "distance of prediction and score", "where declined"),
        Column("best_small", "score", "best score of the smaller runs", "where declined"),
        Column("error_of_best_small", "score", "distance of that from the held-out score", "where declined"),
        Column("verdict", "", "kept, refused, declined"),
        Column("reason", "", "why refused or declined", "where kept"),
    ),
    "OLMo ladder, arXiv 2412.04403 (two steps); arXiv 2512.08894 (direct)",
    definition="A power law of −log score in operations, fitted on all sizes but the largest, predicts that one; it is "
    "refused where it missed the next smaller size, predicted from those below, by more than 2 points.",
    caveat="A small error is worth nothing where the best small run is as near. Operations are 6 times "
    "the parameters that "
    "the name states times tokens.",
    chart=Chart("predicted", panel="metric"),
    count="runs",
)
