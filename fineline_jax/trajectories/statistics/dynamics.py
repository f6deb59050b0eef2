"""When a task is learned, whether it has settled, and whether it falls again: one row of numbers per curve.

The statistics may say no. A curve that never stays above guessing gets no onset and no times; a curve that still rises
at its last checkpoint gets no t50 and no t90, because a share of a value that is not final means nothing; a curve that
falls says so. The clock that compares runs of different length and size is the number of tokens to a fixed score.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from fineline_jax.facts.metrics import metric_of
from fineline_jax.trajectories.codes import codes_of
from fineline_jax.trajectories.curves.curve import CHANCE, Curve, Findings, Z, examine, stuck
from fineline_jax.trajectories.curves.isotonic import crossing, crossing_ranks, fit
from fineline_jax.trajectories.curves.smooth import end_level
from fineline_jax.trajectories.statistics.columns import Column, Statistic
from fineline_jax.trajectories.statistics.inference import false_discovery

CLEAR_RISE_SNR = 5.0  # where no standard error allows a test, a rise must exceed this many noise SDs to count
SETTLED_FACTOR = 2.0  # t90 counts as reached only if training then went on for this factor of tokens
FALSE_DISCOVERIES = 0.05  # of the rises, and of the falls, of all tasks of a series and metric
HALFWAY = 0.5  # from guessing to perfect: the score that tokens are counted to, where none is stated
FRACTIONS = {"t10": 0.1, "t50": 0.5, "t90": 0.9}
TIMES = (*FRACTIONS, "to_score")

REACHED = "reached"
BEFORE_FIRST = "before the first checkpoint"
BEFORE_ONSET = "before the onset"
NOT_SATURATED = "not saturated"
NOT_REACHED = "not reached"
NO_SCORE = "no score is set"
AT_CHANCE = "not distinguishable from chance"
BELOW_CHANCE = "below chance"
NO_STDERR = "no standard error"
NO_CHANCE = "no chance level"
NO_RISE = "no clear change"
TOO_FEW = "too few checkpoints"
ABOVE_CHANCE = "above chance"
STILL_RISING = "still rising"
SETTLED = "settled"
DECLINED = "declined since its peak"
DEGENERATE = "degenerate"
OUTCOMES = {
    "before_first": BEFORE_FIRST, "before_onset": BEFORE_ONSET, "not_saturated": NOT_SATURATED,
    "not_reached": NOT_REACHED, "no_score": NO_SCORE, "at_chance": AT_CHANCE, "below_chance": BELOW_CHANCE,
    "no_rise": NO_RISE, "too_few": TOO_FEW, "above_chance": ABOVE_CHANCE, "still_rising": STILL_RISING,
    "settled": SETTLED, "declined": DECLINED, "degenerate": DEGENERATE,
}  # fmt: skip
"""What the page's scripts compare with."""
_NAN = float("nan")
_Interval = tuple[float, float, float]
"""Time, lower and upper end."""
_NOWHERE: _Interval = (_NAN, _NAN, _NAN)
_KEY = ["series", "domain", "task", "metric"]
_Normals = Callable[[int], np.ndarray]
"""Standard normal numbers [draws, C], the same for every curve of C checkpoints."""


def summarise(table: pd.DataFrame, *, draws: int = 200, seed: int = 0) -> pd.DataFrame:
    """The dynamics of every curve of a tidy table: one row per (series, domain, task, metric), see `DYNAMICS`.

    Where the table has a column `resampled`, with an array [draws] of a bootstrap over documents minus the value in
    each row of a curve, the curve's intervals come from it, else from `draws` normal errors. The fixed score is the
    column `score` where the table has one, else halfway from guessing to perfect. For perplexities times, noise and SNR
    refer to the logarithm; the values are given as they are.
    """
    curves = _curves(table)
    tests = [examine(curve) for _, curve, _, _ in curves]
    constant = [stuck(curve.values, curve.n) for _, curve, _, _ in curves]
    family = codes_of(pd.DataFrame([key for key, _, _, _ in curves], columns=_KEY), ["series", "metric"])
    rises = false_discovery(np.where(constant, _NAN, [one.rise_p for one in tests]), family)
    falls = false_discovery(np.where(constant, _NAN, [one.fall_p for one in tests]), family)
    normals = functools.cache(lambda count: np.random.default_rng(seed).standard_normal((draws, count)))
    rows = []
    for i, ((key, curve, log, score), one) in enumerate(zip(curves, tests, strict=True)):
        better = metric_of(key["metric"]).better
        if np.isnan(score):
            score = HALFWAY * (1 + better * curve.chance)
        target = better * (np.log(score) if log else score)
        row = _row(curve, one, rises[i], falls[i], constant[i], target, normals)
        rows.append(key | _as_given(row, better, log))
    return _ranked(DYNAMICS.frame(rows))


def _curves(table: pd.DataFrame) -> list[tuple[dict[str, str], Curve, bool, float]]:
    """(key, curve, whether it is of logarithms, stated score or NaN), in the order of first appearance."""
    codes = pd.factorize(codes_of(table, _KEY))[0]
    order = np.lexsort((table["step"].to_numpy(float), table["tokens"].to_numpy(float), codes))
    bounds = np.flatnonzero(np.diff(codes[order], prepend=-1, append=-1))
    columns = {name: table[name].to_numpy(float)[order] for name in ("tokens", "value", "stderr", "chance", "n")}
    optional = {name: table[name].to_numpy()[order] for name in ("score", "chance_from", "resampled") if name in table}
    keys = table[_KEY].iloc[order[bounds[:-1]]].astype(str).to_dict("records") if len(order) else []
    made = []
    for key, start, end in zip(keys, bounds[:-1], bounds[1:], strict=True):
        part = {name: column[start:end] for name, column in columns.items()}
        chances, sizes = part["chance"], part["n"]
        chances, sizes = chances[np.isfinite(chances)], sizes[np.isfinite(sizes)]
        meant, values, stderr = metric_of(key["metric"]), part["value"], part["stderr"]
        log = meant.log and not len(chances) and bool((values > 0).all())
        drawn = [one for one in optional.get("resampled", ())[start:end] if isinstance(one, np.ndarray)]
        deviations = np.stack(drawn, axis=1) if len(drawn) == end - start else None
        if log:
            stderr, deviations = stderr / values, None if deviations is None else deviations / values
        curve = Curve(
            part["tokens"],
            meant.better * (np.log(values) if log else values),
            stderr,
            meant.better * float(chances[-1]) if len(chances) else _NAN,
            str(optional["chance_from"][end - 1] or CHANCE) if "chance_from" in optional else CHANCE,
            float(sizes[-1]) if len(sizes) else _NAN,
            None if deviations is None else meant.better * deviations,
        )
        made.append((key, curve, log, float(optional["score"][end - 1]) if "score" in optional else _NAN))
    return made


def _row(
    curve: Curve, tests: Findings, rise_q: float, fall_q: float, constant: bool, target: float, normals: _Normals
) -> dict[str, Any]:
    """The columns of one curve; values are turned so that higher is better."""
    baseline, baseline_from = curve.baseline
    count, noise, level = len(curve.values), tests.noise, tests.level
    snr = (level - baseline) / noise if noise > 0 else _NAN
    tested = np.isfinite(tests.rise_p)
    found = tests.onset is not None and rise_q <= FALSE_DISCOVERIES
    refusal = BELOW_CHANCE if tests.below else AT_CHANCE
    if constant:
        refusal = DEGENERATE
    elif not tested:
        found = snr > CLEAR_RISE_SNR or (noise == 0 and level > baseline)
        refusal = TOO_FEW if count < 5 else NO_RISE
        found = found and count >= 5
    fell = not constant and fall_q <= FALSE_DISCOVERIES

    # 1. The verdict, and times of the rise
    onset, onset_outcome = _NAN, refusal if tested or constant else NO_CHANCE if np.isnan(curve.chance) else NO_STDERR
    if found and tested and tests.onset is not None:
        onset, onset_outcome = float(curve.tokens[tests.onset]), BEFORE_FIRST if tests.onset == 0 else REACHED
    times = dict.fromkeys(TIMES, _NOWHERE)
    outcomes = dict.fromkeys(FRACTIONS, refusal)
    ascent = _Ascent(curve, noise, normals)
    scored = None
    if fell:
        verdict, outcomes = DECLINED, dict.fromkeys(FRACTIONS, DECLINED)
    elif found and count < 3:
        verdict, outcomes = ABOVE_CHANCE, dict.fromkeys(FRACTIONS, TOO_FEW)
    elif found:
        *shares, scored = ascent.crossings(count, target, baseline, level)
        verdict, risen = _rise(curve, tests, tested, shares, ascent.error)
        times |= {name: time for name, (time, _) in risen.items()}
        outcomes = {name: outcome for name, (_, outcome) in risen.items()}
    else:
        verdict = refusal

    # 2. The fixed score: a curve that fell is asked up to its peak
    if np.isnan(target):
        outcomes["to_score"] = NO_SCORE
    elif not (found or fell or (not tested and not constant)):
        outcomes["to_score"] = refusal
    else:
        until = tests.peak + 2 if fell else count
        scored = ascent.crossings(until, target)[-1] if scored is None else scored
        times["to_score"], outcomes["to_score"] = _to_score(scored, curve.tokens[:until])

    spearman = _NAN
    if count >= 3 and np.ptp(curve.values) > 0 and np.ptp(curve.tokens) > 0:
        spearman = float(np.corrcoef(stats.rankdata(curve.tokens), stats.rankdata(curve.values))[0, 1])
    way = target - (baseline if np.isnan(curve.chance) else curve.chance)
    row: dict[str, Any] = {
        "checkpoints": count, "first_tokens": float(curve.tokens[0]), "last_tokens": float(curve.tokens[-1]),
        "n": curve.n, "chance": curve.chance, "baseline": baseline, "baseline_from": baseline_from,
        "final": float(curve.values[-1]), "final_stderr": float(curve.stderr[-1]), "level": level,
        "rise_p": tests.rise_p, "rise_q": rise_q, "onset": onset, "onset_outcome": onset_outcome, "score": target,
        "share_of_way": (level - (target - way)) / way if way > 0 else _NAN,
    }  # fmt: skip
    for name, (time, low, high) in times.items():
        row |= {name: time, f"{name}_low": low, f"{name}_high": high, f"{name}_outcome": outcomes[name]}
    row |= {"interval_from": ascent.source if any(np.isfinite(t[1]) for t in times.values()) else ""}
    if fell:
        row |= {
            "peak": float(curve.values[tests.peak - 1 : tests.peak + 2].mean()),
            "peak_tokens": float(curve.tokens[tests.peak]),
        }
        row |= {"fall": tests.fall, "fall_stderr": tests.fall_stderr, "fall_q": fall_q}
    return row | {"noise": noise, "snr": snr, "monotonicity": spearman, "verdict": verdict}


class _Ascent:
    """Crossings of a curve's isotonic fit with 95 % intervals: a bootstrap around it, of documents or errors."""

    def __init__(self, curve: Curve, noise: float, normals: _Normals) -> None:
        self.curve = curve
        self.error = np.where(np.isfinite(curve.stderr), curve.stderr, noise)
        known = np.isfinite(self.error) & (self.error > 0)
        self.weights = 1 / self.error**2 if known.all() else np.ones(len(self.error))
        self.normals = normals if curve.deviations is None and known.any() else None
        measured = np.isfinite(curve.stderr) & (curve.stderr > 0)
        self.source = "documents" if curve.deviations is not None else "standard errors"
        if curve.deviations is None and not measured.any():
            self.source = "checkpoint noise" if known.any() else ""

    def crossings(self, until: int, target: float, baseline: float = _NAN, level: float = _NAN) -> list[_Interval]:
        """(time, low, high) of the fixed target in the first `until` checkpoints, the last entry; before it, where
        there is a level, those of FRACTIONS of the way from baseline to level, which is drawn too.

        Time NaN and ends inf if never; without errors the ends are NaN.
        """
        values, tokens, weights = self.curve.values[:until], self.curve.tokens[:until], self.weights[:until]
        shares = np.array([*FRACTIONS.values()] if np.isfinite(level) else [])
        targets = np.append(baseline + shares * (level - baseline), target)
        times = crossing(values, weights, tokens, targets)
        if self.curve.deviations is not None:
            sample = self.curve.deviations[:, :until]
        elif self.normals is not None:
            sample = self.normals(len(self.error))[:, :until] * np.nan_to_num(self.error[:until])
        else:
            return [(float(time), _NAN, _NAN) for time in times]
        drawn = (fit(values, weights) + sample).astype(np.float32)
        aims = np.tile(targets, (len(drawn), 1))
        aims[:, :-1] = baseline + shares * (end_level(drawn, tokens)[:, None] - baseline)
        ranks = [round(q * (len(drawn) - 1)) for q in (0.025, 0.975)]
        low, high = crossing_ranks(drawn, weights, tokens, aims, ranks)
        low, high = np.fmin(low, times), np.fmax(high, times)
        return [(float(times[i]), float(low[i]), float(high[i])) for i in range(len(times))]


def _to_score(interval: _Interval, tokens: np.ndarray) -> tuple[_Interval, str]:
    """(interval, outcome) of the fixed score. One that is not reached has a lower bound."""
    time, low, _ = interval
    if np.isnan(time):
        return (_NAN, float(min(low, tokens[-1])) if low == low else float(tokens[-1]), np.inf), NOT_REACHED
    return (_NOWHERE, BEFORE_FIRST) if time <= tokens[0] else (interval, REACHED)


def _rise(
    curve: Curve, tests: Findings, tested: bool, shares: list[_Interval], error: np.ndarray
) -> tuple[str, dict[str, tuple[_Interval, str]]]:
    """(verdict, name -> (interval, outcome)) of t10, t50, t90 of a curve that has risen."""
    first, last = float(curve.tokens[0]), float(curve.tokens[-1])
    settled = shares[-1][0] * SETTLED_FACTOR <= last
    # A curve that starts above guessing may not move at all afterwards: crossings of its noise are no times.
    since_first, unclear = tests.level - curve.values[0], Z * np.hypot(error[0], end_level(error, curve.tokens))
    moved = since_first > unclear
    moves = moved or not (tested and tests.onset == 0)
    earliest = float(curve.tokens[tests.onset - 1]) if tested and tests.onset else -np.inf
    found = {}
    for name, interval in zip(FRACTIONS, shares, strict=True):
        if interval[0] <= first:
            found[name] = (_NOWHERE, BEFORE_FIRST)
        elif not moves:
            found[name] = (_NOWHERE, NO_RISE)
        elif not settled:
            # The level is not final, so the time is a lower bound.
            found[name] = ((_NAN, interval[1], np.inf), NOT_SATURATED)
        elif interval[0] < earliest:
            found[name] = (_NOWHERE, BEFORE_ONSET)
        else:
            found[name] = (interval, REACHED)
    # One that has sunk below its first checkpoint, if not surely below its peak, has not settled either.
    if (not moves and found["t90"][1] != BEFORE_FIRST) or since_first < -unclear:
        return ABOVE_CHANCE, found
    return SETTLED if settled else STILL_RISING, found


def _as_given(row: dict[str, Any], better: int, log: bool) -> dict[str, Any]:
    """The row with its values in the metric's own direction and scale."""
    for name in ("chance", "baseline", "final", "level", "score", "peak"):
        if name in row:
            row[name] = float(np.exp(better * row[name])) if log else better * row[name]
    if log:
        row["final_stderr"] *= row["final"]
    return row


def _ranked(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with the order of learning in each (series, metric): by tokens to the score, then tasks that have not
    reached it by how near they are, then those that have not risen. Where no score is set, by t50."""
    no_score = rows["to_score_outcome"] == NO_SCORE
    time = rows["to_score"].where(~no_score, rows["t50"])
    outcome = rows["to_score_outcome"].where(~no_score, rows["t50_outcome"])
    time = time.where(outcome != BEFORE_FIRST, rows["first_tokens"])
    risen = rows["verdict"].isin([SETTLED, STILL_RISING, ABOVE_CHANCE, DECLINED])
    group = np.where(time.notna(), 0, np.where(risen, 1, 2))
    keys = pd.DataFrame({"group": group, "time": time, "near": -rows["share_of_way"]})
    order = keys.sort_values(["group", "time", "near"], kind="stable").index
    rank = rows.loc[order].groupby(["series", "metric"], sort=False).cumcount() + 1
    return rows.assign(rank=rank.reindex(rows.index))


def _time(name: str, meaning: str, empty: str) -> tuple[Column, ...]:
    bound = f"without {name}: low is a lower bound, high infinite"
    outcome = Column(f"{name}_outcome", "", f"reached, or why there is no {name}")
    low, high = Column.ends("tokens", "without errors", bound, prefix=f"{name}_")
    return Column(name, "tokens", meaning, empty, (low.name, high.name)), low, high, outcome


_SHARE = "tokens at which the isotonic fit reaches {} % of the way from baseline to level"
DYNAMICS = Statistic(
    "dynamics",
    "What was learned when?",
    summarise,
    (
        *Column.texts(series="the series", domain="the task's domain", task="the task", metric="the metric"),
        Column("checkpoints", "1", "checkpoints of the curve"),
        Column("first_tokens", "tokens", "tokens of the first"),
        Column("last_tokens", "tokens", "tokens of the last"),
        Column("n", "1", "documents", "where not known"),
        Column("chance", "score", "what guessing gives", "where it has no meaning or is not known"),
        Column("baseline", "score", "what a gain counts from"),
        Column("baseline_from", "", "untrained checkpoint, else how guessing does, else first checkpoint"),
        Column("final", "score", "value of the last checkpoint"),
        Column("final_stderr", "score", "its standard error", "where not known"),
        Column("level", "score", "mean over the last half doubling of tokens"),
        Column("rise_p", "1", "one-sided p of level above baseline and guessing", "where nothing can be tested"),
        Column("rise_q", "1", "the same adjusted over the tasks of series and metric", "as rise_p"),
        Column("onset", "tokens", "first checkpoint from which all are above baseline and guessing", "without one"),
        Column("onset_outcome", "", "reached, or why there is no onset"),
        Column("score", "score", "the fixed score", "where none is stated and chance is not known"),
        Column("share_of_way", "1", "of the way from guessing to the score, how much the level has made", "as score"),
        *(column for name, share in FRACTIONS.items() for column in _time(
            name, _SHARE.format(round(100 * share)), "unless the curve has risen, settled, and that after its onset"
        )),
        *_time("to_score", "tokens at which the isotonic fit reaches the score", "where it is not reached"),
        Column("interval_from", "", "what the intervals hold: documents, standard errors, checkpoint noise"),
        Column("peak", "score", "best mean of three checkpoints", "unless it declined"),
        Column("peak_tokens", "tokens", "tokens of the checkpoint in their middle", "as peak"),
        Column("fall", "score", "peak minus the mean of the last three checkpoints", "as peak"),
        Column("fall_stderr", "score", "its standard error", "as peak"),
        Column("fall_q", "1", "p of the fall, for the best of all checkpoints, adjusted over tasks", "as peak"),
        Column("noise", "score", "standard deviation from checkpoint to checkpoint", "with too few checkpoints"),
        Column("snr", "1", "(level - baseline) / noise", "without noise"),
        Column("monotonicity", "1", "Spearman correlation of score and tokens, +1: always improving", "if constant"),
        Column("verdict", "", "settled, still rising, declined since its peak, or why nothing is said"),
        Column("rank", "1", "place in the order of learning of series and metric"),
    ),
    "isotonic fit: Barlow et al. 1972; noise: Gasser et al. 1986; many tasks: Benjamini, Hochberg 1995",
    definition="When a curve leaves guessing and reaches a fixed score and shares of its gain; whether it fell.",
    caveat="Intervals hold the choice of questions, not what another seed would give.",
    count="checkpoints",
)  # fmt: skip
