"""Tokens at which the largest model passes a smaller one's final score, and whether sizes in between predict them.

Clocks shift with size: the sizes N in between reach that score at T tokens, and log2 T = a - shift log2 N, fitted by
least squares, is asked of the largest, which is held out.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd

from fineline_jax.facts.metrics import metric_of
from fineline_jax.trajectories.curves import isotonic
from fineline_jax.trajectories.curves.smooth import end_level
from fineline_jax.trajectories.curves.split import Points, split
from fineline_jax.trajectories.runs.clock import DRAWS, RISE_Z
from fineline_jax.trajectories.sizes.families import families
from fineline_jax.trajectories.statistics.columns import Chart, Column, Statistic, format_tokens
from fineline_jax.trajectories.statistics.inference import interval

FEWEST = 3
"""Sizes of a line; the back-test has one less."""
TOLERANCE = 1.0
"""Doublings: of the back-test's error, and of the tokens at the ends of runs that share a line."""
KEPT, REFUSED, DECLINED = "kept", "refused", "declined"
Drawn = tuple[np.ndarray, np.ndarray, bool]
"""(tokens [C], values [1 + draws, C] of which the first is the curve itself, higher is better; whether it rose)."""


def size_clocks(table: pd.DataFrame, *, draws: int = DRAWS, seed: int = 0) -> pd.DataFrame:
    """Of each (family, metric, task): the largest size against each smaller one. See `SIZE_CLOCKS`."""
    known, rows, rng = list(families(table)), [], np.random.default_rng(seed)
    names = {name for _, sizes in known for of_size in sizes.values() for name in of_size}
    curves: dict[tuple[str, str], dict[str, Drawn]] = {}
    wanted = table[table["series"].isin(names) & (table["tokens"] > 0)]
    for (metric, task, series), curve in split(wanted, ("metric", "task", "series")):
        if len(curve.tokens) > 2:
            curves.setdefault((metric, task), {})[series] = _drawn(curve, metric_of(metric).better, draws, rng)
    for (family, sizes), ((metric, task), of) in itertools.product(known, curves.items()):
        runs = {size: [of[name] for name in of_size if name in of] for size, of_size in sizes.items()}
        runs = {size: of_size for size, of_size in runs.items() if of_size}
        for row in against_largest(runs) if len(runs) > 1 else ():
            rows.append({"family": family, "metric": metric, "task": task} | row)
    return SIZE_CLOCKS.frame(rows)


def against_largest(runs: Mapping[float, Sequence[Drawn]]) -> Iterator[dict]:
    """The columns of `SIZE_CLOCKS` from `small` on. runs: by parameters, ascending; several of a size are its seeds."""
    *smaller, large = runs
    for i, small in enumerate(smaller):
        row: dict = {"small": format_tokens(small), "large": format_tokens(large)}
        if not all(rose for _, _, rose in runs[small]):
            yield row | {"verdict": DECLINED, "reason": "the small one is at chance"}
            continue
        row |= _passing(runs[small], runs[large])
        if "reason" in row:
            yield row | {"verdict": DECLINED}
            continue
        ends = [float(tokens[-1]) for size in (*smaller[i:], large) for tokens, _, _ in runs[size]]
        if max(ends) > 2**TOLERANCE * min(ends):
            yield row | {"verdict": DECLINED, "reason": "runs of different lengths, each with a schedule of its own"}
            continue
        once = {size: [(tokens, values[:1], rose) for tokens, values, rose in runs[size]] for size in smaller[i:]}
        clocks = {size: _passing(once[small], once[size]) for size in smaller[i + 1 :]}
        passed = np.log2([[size, clock["tokens"]] for size, clock in clocks.items() if "reason" not in clock])
        yield row | _shifted(passed, np.log2(large), row, runs[large])


def _shifted(passed: np.ndarray, size: float, row: dict, large: Sequence[Drawn]) -> dict:
    """The columns from `passed` on. passed: log2 of (parameters, tokens) of the sizes in between, ascending."""
    if len(passed) < FEWEST:
        return {"passed": len(passed), "verdict": DECLINED, "reason": f"fewer than {FEWEST} sizes in between pass it"}
    x, y = passed.T
    slope, intercept = np.polyfit(x, y, 1)
    freedom, spread = len(x) - 2, float(((x - x.mean()) ** 2).sum())
    scatter = np.sqrt(((y - intercept - slope * x) ** 2).sum() / freedom)
    predicted = float(intercept + slope * size)
    stderr = float(scatter * np.sqrt(1 + 1 / len(x) + (size - x.mean()) ** 2 / spread))
    found = {"passed": len(passed), "shift": -slope, "predicted": 2**predicted}
    found["shift_low"], found["shift_high"] = interval(-float(slope), float(scatter / np.sqrt(spread)), freedom)
    found["predicted_low"], found["predicted_high"] = np.exp2(interval(predicted, stderr, freedom))
    there = [np.interp(predicted, np.log2(tokens), values[0]) for tokens, values, _ in large]
    found |= {
        "error": abs(predicted - np.log2(row["tokens"])),
        "score_error": abs(float(np.mean(there)) - row["score"]),
    }
    if abs(np.polyval(np.polyfit(x[:-1], y[:-1], 1), x[-1]) - y[-1]) > TOLERANCE:
        return found | {
            "verdict": REFUSED,
            "reason": f"the next smaller size was missed by over {TOLERANCE:g} doubling",
        }
    return found | {"verdict": KEPT, "reason": ""}


def _passing(small: Sequence[Drawn], large: Sequence[Drawn]) -> dict:
    """The columns `score` to `seed_noise`, and `reason` where the large one does not pass."""
    scores = np.mean([end_level(values, tokens) for tokens, values, _ in small], axis=0)[:, None]
    scores[1:] += scores[0] - scores[1:].mean() if len(scores) > 1 else 0.0  # the fit of a falling curve ends above it
    times = np.array([isotonic.crossing(v, np.ones(len(t)), t, scores)[:, 0] for t, v, _ in large])
    row: dict = {"score": float(scores[0, 0]), "tokens_small": min(float(tokens[-1]) for tokens, _, _ in small)}
    drawn = np.sort(np.where(np.isnan(times[:, 1:]), np.inf, times[:, 1:]).mean(axis=0))
    if len(drawn):
        row["tokens_low"], row["tokens_high"] = drawn[int(0.025 * len(drawn))], drawn[int(0.975 * len(drawn))]
    if np.isnan(times[:, 0]).any():
        return row | {"reason": "the large one does not pass it"}
    if any(at <= tokens[0] for at, (tokens, _, _) in zip(times[:, 0], large, strict=True)):
        return row | {"reason": "the large one passes it before its first checkpoint"}
    at = np.log2(times[:, 0])
    row |= {"tokens": 2 ** at.mean(), "saved": float(np.log2(row["tokens_small"]) - at.mean())}
    return row | ({"seed_noise": float(at.std(ddof=1))} if len(at) > 1 else {})


def _drawn(curve: Points, better: int, draws: int, rng: np.random.Generator) -> Drawn:
    """Draws are normal errors around the isotonic fit, as of `runs.clock`."""
    values, error = better * curve.value, np.nan_to_num(curve.errors())
    noise = rng.standard_normal((draws, len(values))) * error
    base = better * curve.chance if np.isfinite(curve.chance) else values[0]
    rose = bool(end_level(values, curve.tokens) - base > RISE_Z * error[-1])
    return curve.tokens, np.vstack([values, isotonic.fit(values, np.ones(len(values))) + noise]), rose


SIZE_CLOCKS = Statistic(
    "size_clocks",
    "When does the largest model pass a smaller one's final score, and do smaller sizes predict it?",
    size_clocks,
    (
        *Column.texts(family="series that differ in size alone", metric="the metric", task="the task"),
        *Column.texts(small="parameters of the smaller size", large="of the largest, which is held out"),
        Column("score", "score", "final score of the smaller size (minus it: less is better)", "at chance"),
        Column("tokens_small", "tokens", "tokens at its end", "as score"),
        *Column.estimate("tokens", "tokens", "of the large one at that score", "if it does not pass", prefix="tokens_"),
        Column("saved", "doublings", "log2(tokens_small / tokens)", "as tokens"),
        Column("seed_noise", "doublings", "standard deviation over seeds of the large one", "with one seed"),
        Column("passed", "1", "sizes in between that pass it too: what is fitted", "as tokens, or lengths differ"),
        *Column.estimate(
            "shift", "doublings", "tokens saved per doubling of parameters", f"with fewer than {FEWEST}",
            "Student's t of the line", prefix="shift_",
        ),
        *Column.estimate("predicted", "tokens", "of the large one, by the line", "as shift", prefix="predicted_"),
        Column("error", "doublings", "distance of predicted and tokens", "as predicted"),
        Column("score_error", "score", "distance of the large one's score at predicted from score", "as predicted"),
        *Column.texts(verdict="kept, refused, declined"),
        Column("reason", "", "why refused or declined", "where kept"),
    ),
    "curves collapse under a shift of log tokens: Kaplan et al. 2020, arXiv 2001.08361, 4; errors as of task_order",
    definition="Tokens at which the largest run of a family first has the final score of a smaller one; beside it the "
    "tokens that a line in log parameters, through the sizes in between, predicts. It is refused where such a line "
    "missed the next smaller size by more than a doubling, and declined where runs end at tokens more than a factor of "
    "two apart: each score then holds what the end of its own schedule gave.",
    caveat="Runs whose learning rate falls at the end have a final score that a longer run passes late. Intervals hold "
    "errors of questions; seed_noise says what another seed would change.",
    chart=Chart("tokens", panel="metric"),
    count="passed",
)  # fmt: skip
