"""What the smaller runs of a family say of the largest: forms of a scaling law, chosen and refused by a back-test."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from fineline_jax.facts.metrics import metric_of
from fineline_jax.trajectories.curves.split import Points, split
from fineline_jax.trajectories.statistics.columns import Chart, Column, Statistic, shots_of, size_of
from fineline_jax.trajectories.statistics.laws import FORMS, PARAMETERS, Law, Run, fit, resampled

TOLERANCE = 0.02
"""Error of the back-test above which a forecast is refused."""
FEWEST_SIZES = 4
CLEAR = 2.0
"""Standard errors above guessing that the best run to fit must be: what is at chance has no law."""
DRAWS = 200
KEPT, REFUSED, DECLINED = "kept", "refused", "declined"


def forecast(runs: Sequence[Run], held: Sequence[Run], forms: Sequence[str] = FORMS) -> dict:
    """Columns `form` to `verdict` of SCALING for runs of several sizes and the held-out runs of a larger one.

    The form is the one that, fitted without the largest size of `runs`, predicts that size best, of those that have no
    more parameters than there are sizes to fit. It is refused where it missed the mean of that size by more than
    TOLERANCE, or its runs by as much as the best of those fitted did. The interval is that of `laws.resampled`.
    """
    sizes = sorted({run.parameters for run in runs})
    if len(sizes) < FEWEST_SIZES - 1:
        return {"verdict": DECLINED, "reason": f"fewer than {FEWEST_SIZES} sizes"}
    last, before = _apart(runs, sizes[-1])
    tests = dict[str, tuple[float, Law]]()  # error one size before, and what was fitted below it
    for form in forms:
        if PARAMETERS[form] > len(sizes) - 1:
            continue
        try:
            law = fit(form, before)
            tests[form] = abs(float(law(_ends(last)).mean()) - _score(last)), law
        except ValueError:
            continue
    if not tests:
        return {"verdict": DECLINED, "reason": "no form can be fitted to so few runs"}
    form = min(tests, key=lambda form: tests[form][0])
    backtest, earlier = tests[form]
    law, best = fit(form, runs), float(_ends(runs)[:, 4].max())
    missed, missed_by_best = _error(earlier(_ends(last)), last), _error(_ends(before)[:, 4].max(), last)
    row = {"form": form, "backtest": backtest, "backtest_of_best": missed_by_best}
    row |= {"predicted": float(law(_ends(held)).mean()), "measured": _score(held), "best_small": best}
    row |= {"error": _error(law(_ends(held)), held), "error_of_best_small": _error(best, held)}
    if backtest > TOLERANCE:
        return row | {"verdict": REFUSED, "reason": f"the back-test was wrong by more than {TOLERANCE:g}"}
    if missed >= missed_by_best:
        return row | {"verdict": REFUSED, "reason": "in the back-test the best smaller run was as near"}
    drawn = resampled(law, runs, held, DRAWS, np.random.default_rng(0))
    row["low"], row["high"] = np.quantile([row["predicted"], *drawn], [0.025, 0.975])
    return row | {"verdict": KEPT, "reason": ""}


def _apart(runs: Sequence[Run], size: float) -> tuple[list[Run], list[Run]]:
    """(those of that size, the smaller ones)."""
    return [run for run in runs if run.parameters == size], [run for run in runs if run.parameters < size]


def _ends(runs: Sequence[Run]) -> np.ndarray:
    return np.array([run.end for run in runs], float)


def _error(guess: np.ndarray | float, runs: Sequence[Run]) -> float:
    """Mean distance from the runs' scores, run by run: some may be short."""
    return float(np.abs(guess - _ends(runs)[:, 4]).mean())


def _score(runs: Sequence[Run]) -> float:
    return float(_ends(runs)[:, 4].mean())


def scaling(table: pd.DataFrame) -> pd.DataFrame:
    """Of each (metric, task, shots): the largest size from the smaller ones. See `SCALING`.

    Sizes are those that the names of the series state, operations are 6 x parameters x tokens. Only the direct form is
    tried, which takes a twentieth of a second; `forecast` tries all, through a loss, in several seconds per task.
    """
    series = table["series"].unique()
    sizes, shots = {name: size_of(str(name)) for name in series}, {name: shots_of(str(name)) for name in series}
    table = table.assign(size=table["series"].map(sizes), shots=table["series"].map(shots))
    share = {metric: metric_of(str(metric)).chance == "task" for metric in table["metric"].unique()}
    several = table["shots"].nunique() > 1
    rows = []
    if len({size for size in sizes.values() if np.isfinite(size)}) < FEWEST_SIZES:
        return SCALING.frame(rows)
    wanted = table[table["metric"].map(share).astype(bool) & table["size"].notna() & (table["tokens"] > 0)]
    curves: dict[tuple[str, ...], dict[str, Points]] = {}
    for (metric, task, shot, name), curve in split(wanted, ("metric", "task", "shots", "series")):
        curves.setdefault((metric, task, shot), {})[name] = curve
    for (metric, task, shot), of_series in curves.items():
        runs = [_run(curve, sizes[name]) for name, curve in of_series.items()]
        row: dict = {"metric": metric, "task": task}
        largest = max(run.parameters for run in runs)
        held, small = _apart(runs, largest)
        row |= {"shots": shot if several else "", "runs": len(small), "held_out": largest}
        row |= {"sizes": len({run.parameters for run in small})}
        rows.append(row | _decide([c for name, c in of_series.items() if sizes[name] < largest], small, held))
    return SCALING.frame(rows)


def _decide(curves: list[Points], small: list[Run], held: list[Run]) -> dict:
    if not small:
        return {"verdict": DECLINED, "reason": f"fewer than {FEWEST_SIZES} sizes"}
    ends = _ends(small)[:, 4]
    chance = np.nan_to_num([curve.chance for curve in curves]).max()
    error = np.nan_to_num(np.concatenate([curve.stderr for curve in curves])).max()
    if not (ends > 0).all() or ends.max() <= chance + CLEAR * error:
        return {"verdict": DECLINED, "reason": "the smaller runs are at chance"}
    return forecast(small, held, ("direct",))


def _run(curve: Points, size: float) -> Run:
    averaged = max(1, min(5, len(curve.tokens) // 4))
    return Run(f"{size:g}", size, 6 * size, curve.tokens, np.full(len(curve.tokens), np.nan), curve.value, averaged)


SCALING = Statistic(
    "scaling",
    "Do the smaller runs predict the largest one's scores?",
    scaling,
    (
        *Column.texts(metric="the metric", task="the task"),
        Column("shots", "", "of the series compared", "where all series have as many"),
        Column("runs", "1", "smaller runs"),
        Column("sizes", "1", "their sizes"),
        Column("held_out", "parameters", "size of the model that is predicted"),
        Column("form", "", "the form that a back-test on the next smaller size chose", "where declined"),
        Column("backtest", "score", "its error there", "where declined"),
        Column("backtest_of_best", "score", "distance there of the best smaller run, mean over runs", "where declined"),
        Column("predicted", "score", "score predicted for that size", "where declined", ("low", "high")),
        *Column.ends("score", "unless kept", "a bootstrap over sizes: of the measured score"),
        Column("measured", "score", "what it scored, mean of the last checkpoints", "where declined"),
        Column("error", "score", "distance of prediction and score, mean over runs", "where declined"),
        Column("best_small", "score", "best score of the smaller runs", "where declined"),
        Column(
            "error_of_best_small", "score", "distance of that from the held-out score, mean over runs", "where declined"
        ),
        Column("verdict", "", "kept (nearer than the best smaller run, one size before), refused, declined"),
        Column("reason", "", "why refused or declined", "where kept"),
    ),
    "OLMo ladder, arXiv 2412.04403 (two steps); arXiv 2512.08894 (direct)",
    definition="A power law of −log score in operations, fitted on all sizes but the largest, predicts that one; it is "
    "refused where it missed the next smaller size, predicted from those below, by more than 2 points, or, run "
    "by run, by as much as the best of them.",
    caveat="Kept says that the form was nearer than the best smaller run one size before, not that it will be again. "
    "Operations are 6 times the parameters that the name states times tokens.",
    chart=Chart("predicted", panel="metric"),
    count="runs",
)
