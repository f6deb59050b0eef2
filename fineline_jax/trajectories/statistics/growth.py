"""What one run's curve says of more tokens: a law of its growth and the gain per doubling, refused where it failed."""

import numpy as np
import pandas as pd
from scipy import stats

from fineline_jax.facts.metrics import metric_of
from fineline_jax.trajectories.curves import growth_forms
from fineline_jax.trajectories.curves.smooth import checkpoint_noise, end_level
from fineline_jax.trajectories.curves.split import CURVE, Points, split
from fineline_jax.trajectories.statistics.columns import Chart, Column, Statistic

DRAWS = 200
FEWEST = 8
"""Checkpoints behind the first tenth of the tokens."""
SKIPPED_SHARE = 0.1
HELD_OUT = 3
"""One third of the checkpoints, the last, is held out in the back-test."""
RISE_Z = 2.326
KEPT, REFUSED, DECLINED = "kept", "refused", "declined"


def growth(table: pd.DataFrame, *, draws: int = DRAWS, seed: int = 0) -> pd.DataFrame:
    """Of each (series, metric, task): the form of its growth behind the first tenth of tokens. See `GROWTH`."""
    rows = []
    rng = np.random.default_rng(seed)
    for (series, metric, task), curve in split(table[table["tokens"] > 0], CURVE):
        row = {"series": series, "metric": metric, "task": task}
        rows.append(row | of_curve(curve, metric, draws, rng))
    return GROWTH.frame(rows)


def of_curve(curve: Points, metric: str, draws: int, rng: np.random.Generator) -> dict:
    """The columns of `GROWTH` from `checkpoints` on."""
    meant = metric_of(metric)
    late = curve.tokens > SKIPPED_SHARE * curve.tokens[-1]
    tokens, values, base = curve.tokens[late], meant.better * curve.value[late], meant.better * curve.chance
    row: dict = {"checkpoints": len(tokens)}
    if len(tokens) < FEWEST:
        return row | {"verdict": DECLINED, "reason": f"fewer than {FEWEST} checkpoints in the last decade of tokens"}
    noise, error = checkpoint_noise(values, tokens), curve.errors()[-1]
    base = meant.better * curve.value[0] if np.isnan(base) else base
    if not end_level(values, tokens) - base > RISE_Z * error:
        return row | {"verdict": DECLINED, "reason": "no clear rise"}
    cut = len(tokens) - len(tokens) // HELD_OUT
    misses = {form: _miss(form, tokens, values[None], cut, noise, base)[0] for form in growth_forms.FORMS}
    form = min(misses, key=misses.__getitem__)
    last = float(_rms(end_level(values[:cut], tokens[:cut]) - values[cut:]))
    row |= {"form": form, "backtest": misses[form], "backtest_of_last": last, "noise": noise}
    if misses[form] > max(last, 2 * noise):
        return row | {"verdict": REFUSED, "reason": "the back-test missed by more than the last value and the scatter"}
    fits = {one: growth_forms.fit(one, tokens, values[None], noise, base) for one in growth_forms.FORMS}
    near = {one: fits[one].parameters[0] for one in fits}
    drawn = _resampled(fits[form](tokens)[0], values, draws, rng)
    chosen = np.argmin([_miss(one, tokens, drawn, cut, noise, base, near[one]) for one in fits], axis=0)
    again = [_gains(growth_forms.fit(one, tokens, drawn, noise, base, near[one]), tokens[-1]) for one in fits]
    gains, of_draws = _gains(fits[form], tokens[-1])[0], np.array(again)[chosen, np.arange(draws)]
    wider = stats.t.ppf(0.975, len(tokens) - growth_forms.PARAMETERS) / stats.norm.ppf(0.975)
    ends = gains + wider * (np.quantile(of_draws, [0.025, 0.975], axis=0) - gains)
    for name, gain, (low, high) in zip(("gain", "next_gain"), gains, ends.T, strict=True):
        row |= {name: gain, f"{name}_low": low, f"{name}_high": high}
    return row | {"verdict": KEPT, "reason": ""}


def _gains(fitted: growth_forms.Growth, last: float) -> np.ndarray:
    """[B, 2]: what the last doubling of tokens gave, and what the next one would."""
    return np.diff(fitted(np.array([0.5, 1.0, 2.0]) * last), axis=1)


def _miss(form: str, tokens: np.ndarray, values: np.ndarray, cut: int, noise: float, base: float, near=None):
    """[B]: by how much the form, fitted on the first `cut` checkpoints of values [B, C], misses the others."""
    fitted = growth_forms.fit(form, tokens[:cut], values[:, :cut], noise, base, near)
    return _rms(fitted(tokens[cut:]) - values[:, cut:])


def _rms(residual: np.ndarray) -> np.ndarray:
    return np.sqrt((residual**2).mean(axis=-1))


def _resampled(fitted: np.ndarray, values: np.ndarray, draws: int, rng: np.random.Generator) -> np.ndarray:
    """[draws, C]: residual bootstrap (Efron, Tibshirani 1993, 9.4), wider for the parameters that were fitted."""
    count = len(values)
    residual = (values - fitted) - (values - fitted).mean()
    residual *= np.sqrt(count / (count - growth_forms.PARAMETERS))
    return fitted + residual[rng.integers(0, count, (draws, count))]


GROWTH = Statistic(
    "growth",
    "What does a doubling of tokens still give?",
    growth,
    (
        *Column.texts(series="the run", metric="the metric", task="the task"),
        Column("checkpoints", "1", "checkpoints behind the first tenth of the tokens: what is fitted"),
        Column("form", "", "power_law or sigmoid: the better in the back-test", "where declined"),
        Column("backtest", "score", "its root-mean-square miss of the last third, not fitted", "where declined"),
        Column("backtest_of_last", "score", "that of the level before the last third", "where declined"),
        Column("noise", "score", "scatter from checkpoint to checkpoint", "where declined"),
        *Column.estimate("gain", "score", "what the last doubling of tokens gave", "unless kept", prefix="gain_"),
        *Column.estimate("next_gain", "score", "what the next one would give", "unless kept", prefix="next_gain_"),
        *Column.texts(verdict="kept, refused, declined"),
        Column("reason", "", "why refused or declined", "where kept"),
    ),
    "top - a tokens^-rate: Hestness et al. 2017, arXiv 1712.00409; sigmoid: OLMo ladder, arXiv 2412.04403; Huber 1981",
    definition="A saturating power law and a sigmoid in log tokens, fitted by Huber's loss behind the first tenth of a "
    "run's tokens; the one that predicts the last third better is taken, and refused where the level before does "
    "better and it misses by more than twice the scatter.",
    caveat="Intervals are of a residual bootstrap that chooses the form again in each draw: they hold the scatter from "
    "checkpoint to checkpoint and the choice between two forms, not another seed. A decade of tokens does not tell "
    "where a curve ends, so no limit is given. What a falling learning rate gives counts as a gain of tokens.",
    chart=Chart("gain", panel="metric", reference=0.0),
    count="checkpoints",
)
