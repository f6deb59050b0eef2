"""When a curve leaves chance, how it rises, and whether it has settled: one row of numbers per curve.

The statistics may say no. A curve that never stays above chance gets no onset and no t50; a curve that still rises at
its last checkpoint gets no t90, because 90 % of a value that is not final means nothing.
"""

from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from fineline_jax.facts.metrics import metric_of
from fineline_jax.facts.score_table import COLUMNS

ONSET_Z = 2.326  # one-sided 1 %: a suite has tens of tasks, at 5 % chance-level tasks would "emerge" regularly
CLEAR_RISE_SNR = 5.0  # where no standard error allows a test, a rise must exceed this many noise SDs to count
SETTLED_FACTOR = 2.0  # t90 counts as reached only if training then went on for this factor of tokens
FRACTIONS = {"t10": 0.1, "t50": 0.5, "t90": 0.9}

REACHED = "reached"
BEFORE_FIRST = "before the first checkpoint"
NOT_SATURATED = "not saturated"
AT_CHANCE = "not distinguishable from chance"
BELOW_CHANCE = "below chance"
NO_STDERR = "no standard error"
NO_CHANCE = "no chance level"
NO_RISE = "no clear change"
TOO_FEW = "too few checkpoints"
ABOVE_CHANCE = "above chance"
STILL_RISING = "still rising"
SETTLED = "settled"
OUTCOMES = {
    "before_first": BEFORE_FIRST, "not_saturated": NOT_SATURATED, "at_chance": AT_CHANCE, "below_chance": BELOW_CHANCE,
    "no_rise": NO_RISE, "too_few": TOO_FEW, "above_chance": ABOVE_CHANCE, "still_rising": STILL_RISING,
    "settled": SETTLED,
}  # fmt: skip
"""What the page's scripts compare with."""


def isotonic(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted least-squares non-decreasing fit along the last axis.

    values [..., C], weights [C] > 0. Uses the min-max formula (Barlow et al. 1972, Statistical Inference under Order
    Restrictions, 1.9): fit_i = max over a <= i of min over b >= i of the weighted mean of values[a..b], which is
    vectorised over all leading axes, e.g. bootstrap draws.
    """
    length = values.shape[-1]
    zero = np.zeros((*values.shape[:-1], 1))
    sums = np.concatenate([zero, np.cumsum(values * weights, axis=-1)], axis=-1)
    mass = np.concatenate([[0.0], np.cumsum(weights)])
    fit = np.full(values.shape, -np.inf)
    for first in range(length):
        means = (sums[..., first + 1 :] - sums[..., first : first + 1]) / (mass[first + 1 :] - mass[first])
        lowest_after = np.minimum.accumulate(means[..., ::-1], axis=-1)[..., ::-1]
        np.maximum(fit[..., first:], lowest_after, out=fit[..., first:])
    return fit


def crossing(curve: np.ndarray, tokens: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Tokens at which a non-decreasing curve first reaches `target`.

    curve [..., C], tokens [C] increasing, target [...] -> [...]. Between checkpoints linear in log tokens (linear in
    tokens from a checkpoint at 0 tokens). tokens[0] where the first checkpoint is already there, NaN if never.
    """
    above = curve >= target[..., None] - 1e-12
    index = np.argmax(above, axis=-1)
    left = np.maximum(index - 1, 0)
    low = np.take_along_axis(curve, left[..., None], -1)[..., 0]
    high = np.take_along_axis(curve, index[..., None], -1)[..., 0]
    share = np.clip(np.divide(target - low, high - low, out=np.ones_like(low), where=high > low), 0.0, 1.0)
    start, end = tokens[left].astype(float), tokens[index].astype(float)
    from_zero = start <= 0
    ratio = np.where(from_zero, 1.0, end / np.where(from_zero, 1.0, start))
    at = np.where(from_zero, start + share * (end - start), start * ratio**share)
    return np.where(above.any(axis=-1), at, np.nan)


def checkpoint_noise(values: np.ndarray, tokens: np.ndarray) -> float:
    """Checkpoint-to-checkpoint standard deviation of the second half of a curve, its trend removed.

    Each inner point is compared with the line through its two neighbours in log tokens; the pseudo-residuals are scaled
    to unit variance (Gasser, Sroka, Jennen-Steinmetz 1986, Biometrika 73:625). NaN with fewer than 3 inner points.
    """
    keep = tokens > 0
    y, x = values[keep], np.log(tokens[keep])
    if len(y) < 5:
        return float("nan")
    gap = x[2:] - x[:-2]
    right = np.divide(x[1:-1] - x[:-2], gap, out=np.full(len(gap), 0.5), where=gap > 0)
    residual = y[1:-1] - (1 - right) * y[:-2] - right * y[2:]
    scaled = residual**2 / (1 + right**2 + (1 - right) ** 2)
    last = max(3, len(scaled) // 2)
    return float(np.sqrt(scaled[-last:].mean()))


def _median_of_three(values: np.ndarray) -> np.ndarray:
    """Running median of 3 with Tukey's end-point rule, so that one odd checkpoint makes or breaks no onset."""
    if len(values) < 5:
        return values
    inner = np.median(np.stack([values[:-2], values[1:-1], values[2:]]), axis=0)
    first = np.median([values[0], inner[0], 3 * inner[0] - 2 * inner[1]])
    last = np.median([values[-1], inner[-1], 3 * inner[-1] - 2 * inner[-2]])
    return np.concatenate([[first], inner, [last]])


def onset_index(values: np.ndarray, stderr: np.ndarray, chance: float, n: float, better: int = +1) -> int | None:
    """First checkpoint from which the curve stays better than chance at one-sided 1 %; None if there is none.

    The test uses the larger of the measured standard error and that of guessing, sqrt(chance (1 - chance) / n): a model
    that always picks the same choice has a misleadingly small measured one.
    """
    guessing = np.sqrt(chance * (1 - chance) / n) if n > 0 and 0 <= chance <= 1 else 0.0
    above = better * (_median_of_three(values) - chance) > ONSET_Z * np.fmax(stderr, guessing)
    if not above[-1]:
        return None
    return int(np.flatnonzero(~above)[-1] + 1) if not above.all() else 0


def end_level(values: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Mean over the last half doubling of tokens, [..., C] -> [...]: steadier than the last value alone."""
    return values[..., tokens >= tokens[-1] / np.sqrt(2)].mean(axis=-1)


def rise_times(
    values: np.ndarray, tokens: np.ndarray, error: np.ndarray, baseline: float, draws: int, seed: int
) -> dict[str, tuple[float, float, float]]:
    """t10, t50, t90 of (y - baseline) / (end level - baseline), each with a 95 % interval (NaN without errors).

    The curve is the isotonic fit; intervals are a parametric bootstrap around that fit with independent normal errors.
    (Errors of neighbouring checkpoints share their questions, so the intervals err on the wide side.)
    """
    known = np.isfinite(error) & (error > 0)
    weights = np.ones(len(values))
    if known.all():
        weights = 1 / error**2
    fit = isotonic(values, weights)
    sample = np.random.default_rng(seed).standard_normal((draws, len(values))) * np.nan_to_num(error)
    drawn_values = fit + sample
    drawn_fit = isotonic(drawn_values, weights)
    level, drawn_level = end_level(values, tokens), end_level(drawn_values, tokens)
    times = {}
    for name, fraction in FRACTIONS.items():
        time = float(crossing(fit, tokens, np.asarray(baseline + fraction * (level - baseline))))
        low = high = np.nan
        if known.any():
            drawn = crossing(drawn_fit, tokens, baseline + fraction * (drawn_level - baseline))
            drawn = np.where(np.isnan(drawn), np.inf, drawn)
            low, high = np.quantile(drawn, [0.025, 0.975], method="nearest")
            low, high = min(low, time), max(high, time)
        times[name] = (time, float(low), float(high))
    return times


def summarise_curve(
    tokens: np.ndarray,
    values: np.ndarray,
    stderr: np.ndarray,
    *,
    chance: float = float("nan"),
    n: float = float("nan"),
    better: int = +1,
    draws: int = 200,
    seed: int = 0,
) -> dict[str, Any]:
    """The dynamics of one curve as a dict with the columns of `summarise`.

    All arrays [C], tokens non-decreasing; `better` is -1 for losses and perplexities.
    """
    first, last = float(tokens[0]), float(tokens[-1])
    noise = checkpoint_noise(values, tokens)
    level = float(end_level(values, tokens))
    has_chance = bool(np.isfinite(chance))
    baseline = chance if has_chance else float(values[0])
    snr = better * (level - baseline) / noise if noise > 0 else float("nan")
    spearman = float("nan")
    if len(values) >= 3 and np.ptp(values) > 0 and np.ptp(tokens) > 0:
        ranks = stats.rankdata(tokens), stats.rankdata(values)
        spearman = better * float(np.corrcoef(*ranks)[0, 1])

    # 1. Does the curve leave its baseline at all?
    onset, onset_outcome, risen, refusal = float("nan"), NO_CHANCE, False, ""
    if has_chance and np.isfinite(stderr).any():
        filled = np.where(np.isfinite(stderr), stderr, np.nanmax(stderr))
        index = onset_index(values, filled, chance, n, better)
        if index is None:
            below = onset_index(values, filled, chance, n, -better)
            refusal = AT_CHANCE if below is None else BELOW_CHANCE
            onset_outcome = refusal
        else:
            onset, onset_outcome, risen = float(tokens[index]), BEFORE_FIRST if index == 0 else REACHED, True
    else:
        onset_outcome = NO_STDERR if has_chance else NO_CHANCE
        if len(values) < 5:
            refusal = TOO_FEW
        else:
            risen = snr > CLEAR_RISE_SNR or (noise == 0 and better * (level - baseline) > 0)
            refusal = "" if risen else NO_RISE

    # 2. If so, when did it rise, and has it settled?
    times = dict.fromkeys(FRACTIONS, (float("nan"),) * 3)
    outcomes = dict.fromkeys(FRACTIONS, refusal)
    if risen and len(values) < 3:
        outcomes = dict.fromkeys(FRACTIONS, TOO_FEW)
    elif risen:
        error = np.where(np.isfinite(stderr), stderr, noise)
        times = rise_times(better * values, tokens, error, better * baseline, draws, seed)
        for name, (time, _, _) in times.items():
            # The level, a plain mean, may lie above all of a fit that weighs very unequal errors.
            outcomes[name] = BEFORE_FIRST if time <= first else REACHED if time <= last else NOT_SATURATED
        settled = times["t90"][0] * SETTLED_FACTOR <= last
        if not settled:
            outcomes["t90"] = NOT_SATURATED
        times = {k: t if outcomes[k] == REACHED else (float("nan"),) * 3 for k, t in times.items()}
    if risen and len(values) < 3:
        verdict = ABOVE_CHANCE
    elif risen:
        verdict = STILL_RISING if outcomes["t90"] == NOT_SATURATED else SETTLED
    else:
        verdict = refusal

    row: dict[str, Any] = {
        "checkpoints": len(values), "first_tokens": first, "last_tokens": last,
        "chance": chance, "baseline": baseline, "n": n,
        "final": float(values[-1]), "final_stderr": float(stderr[-1]), "level": level,
        "onset": onset, "onset_outcome": onset_outcome,
    }  # fmt: skip
    for name, (time, low, high) in times.items():
        row |= {name: time, f"{name}_low": low, f"{name}_high": high, f"{name}_outcome": outcomes[name]}
    return row | {"noise": noise, "snr": snr, "monotonicity": spearman, "verdict": verdict}


def summarise(table: pd.DataFrame, *, draws: int = 200, seed: int = 0) -> pd.DataFrame:
    """The dynamics of every curve of a tidy table: one row per (series, domain, task, metric).

    Columns besides the key: `checkpoints`, `first_tokens`, `last_tokens`, `chance`, `baseline` (chance, or the first
    value where chance has no meaning), `n`, `final` and `final_stderr` (the last checkpoint), `level` (mean over the
    last half doubling of tokens), `onset`, `t10`, `t50`, `t90` in tokens with `_low`/`_high` (95 %) and `_outcome`
    ("reached", or why there is no number), `noise`, `snr` = |level - baseline| / noise (negative: moved the wrong way),
    `monotonicity` (Spearman, +1 = always improving), `verdict`. For perplexities times, noise and SNR refer to the
    logarithm (noise is then relative), the values are given as they are.
    """
    rows = []
    for key, curve in table.groupby(["series", "domain", "task", "metric"], sort=False, observed=True):
        series, domain, task, metric = key
        curve = curve.sort_values(["tokens", "step"])
        chances = curve["chance"].dropna()
        sizes = curve["n"].dropna()
        reading = metric_of(str(metric))
        values, stderr = curve["value"].to_numpy(float), curve["stderr"].to_numpy(float)
        log = reading.log and chances.empty and bool((values > 0).all())
        row = summarise_curve(
            curve["tokens"].to_numpy(float),
            np.log(values) if log else values,
            stderr / values if log else stderr,
            chance=float(chances.iloc[-1]) if len(chances) else float("nan"),
            n=float(sizes.iloc[-1]) if len(sizes) else float("nan"),
            better=reading.better,
            draws=draws,
            seed=seed,
        )
        if log:
            row |= {"final": float(values[-1]), "final_stderr": float(stderr[-1])}
            row |= {name: float(np.exp(row[name])) for name in ("level", "baseline")}
        rows.append({"series": series, "domain": domain, "task": task, "metric": metric} | row)
    return pd.DataFrame(rows)


def normalised(value: np.ndarray, chance: np.ndarray) -> np.ndarray:
    """(value - chance) / (1 - chance): 0 is guessing, 1 is perfect. NaN where chance is NaN."""
    return (value - chance) / (1 - chance)


def domain_curves(table: pd.DataFrame) -> pd.DataFrame:
    """Mean chance-normalised score of each (series, domain, metric) at every checkpoint, with its standard error.

    Only checkpoints at which all tasks of the domain were scored are kept, so that a change of the mean is never a
    change of its members. Errors of different tasks are independent: stderr = sqrt(sum se^2) / tasks. Tasks without a
    chance level are left out. The result is a tidy table whose task is the domain, with chance 0 and a column `tasks`
    (how many tasks a mean is over), so that `summarise` reads it too.
    """
    usable = table[table["chance"].notna()]
    scale = 1 - usable["chance"]
    usable = usable.assign(
        value=normalised(usable["value"].to_numpy(float), usable["chance"].to_numpy(float)),
        variance=(usable["stderr"] / scale) ** 2,
    )
    key = ["series", "domain", "metric"]
    grouped = usable.groupby([*key, "checkpoint", "step", "tokens"], sort=False, observed=True, dropna=False)
    curves = grouped.agg(value=("value", "mean"), tasks=("task", "nunique")).reset_index()
    total = grouped["variance"].sum(min_count=1).to_numpy()
    complete = grouped["variance"].count().to_numpy() == curves["tasks"].to_numpy()
    curves["stderr"] = np.where(complete, np.sqrt(total), np.nan) / curves["tasks"]
    members = usable.groupby(key, sort=False, observed=True)["task"].nunique().rename("members").reset_index()
    curves = curves.merge(members, on=key)
    curves = curves[curves["tasks"] == curves["members"]]
    curves = curves.assign(task=curves["domain"], chance=0.0, n=np.nan)
    return curves[[*COLUMNS, "tasks"]].sort_values([*key, "tokens"], ignore_index=True)
