"""How far a large model is ahead of a small one, by domain, as training goes on: differences and ratios of scores."""

import numpy as np
import pandas as pd

from fineline_jax.trajectories.curves.split import Points, split
from fineline_jax.trajectories.sizes.families import families
from fineline_jax.trajectories.statistics.columns import Chart, Column, Statistic
from fineline_jax.trajectories.statistics.domains import domain_curves

Z = 1.96


def size_gaps(table: pd.DataFrame) -> pd.DataFrame:
    """Of each (family, metric, domain): the largest size against smaller ones at doublings. See `SIZE_GAPS`."""
    known = list(families(table))
    names = [name for _, sizes in known for of_size in sizes.values() for name in of_size]
    if not names:
        return SIZE_GAPS.frame([])
    curves: dict[tuple[str, str], dict[str, Points]] = {}
    means = domain_curves(table[table["series"].isin(names) & (table["tokens"] > 0)])
    for (metric, domain, series), curve in split(means, ("metric", "task", "series")):
        curves.setdefault((metric, domain), {})[series] = curve
    rows = []
    for _, sizes in known:
        *smaller, large = [of_size[0] for of_size in sizes.values()]
        for (metric, domain), of in curves.items():
            for small in (name for name in smaller if name in of and large in of):
                key = {"small": small, "large": large, "metric": metric, "domain": domain}
                rows += [key | row for row in compared(of[small], of[large])]
    return SIZE_GAPS.frame(rows)


def compared(small: Points, large: Points) -> list[dict]:
    """The columns of `SIZE_GAPS` from `tokens` on: at the last tokens that both have and at halves of them.

    Between two checkpoints of a curve its value is linear in log tokens, and its error the larger one.
    """
    first, last = max(small.tokens[0], large.tokens[0]), min(small.tokens[-1], large.tokens[-1])
    if first > last:
        return []
    tokens = last / 2.0 ** np.arange(int(np.log2(last / first)) + 1)[::-1]
    a, b = (np.interp(np.log(tokens), np.log(one.tokens), one.value) for one in (small, large))
    ea, eb = (_error_at(tokens, one) for one in (small, large))
    gap, half = b - a, Z * np.hypot(ea, eb)
    told = (Z * ea / np.where(a == 0, np.nan, a)) ** 2  # Fieller: below 1 where the small one is told from guessing
    known = (told < 1) & (a > 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.where(known, b / a, np.nan)
        spread = np.where(known, Z / a * np.sqrt(eb**2 + ratio**2 * ea**2 - told * eb**2), np.nan)
        ends = [(ratio + sign * spread) / (1 - told) for sign in (-1, 1)]
    columns = {"tokens": tokens, "gap": gap, "gap_low": gap - half, "gap_high": gap + half, "ratio": ratio}
    columns |= {"ratio_low": ends[0], "ratio_high": ends[1], "checkpoints": min(len(small.tokens), len(large.tokens))}
    return (
        pd.DataFrame(columns)
        .assign(reason=np.where(known, "", "the small one is not told from guessing"))
        .to_dict("records")
    )


def _error_at(tokens: np.ndarray, curve: Points) -> np.ndarray:
    after = np.searchsorted(curve.tokens, tokens).clip(0, len(curve.tokens) - 1)
    exact = curve.tokens[after] == tokens
    errors = curve.errors()
    return np.fmax(errors[after], np.where(exact, np.nan, errors[np.maximum(after - 1, 0)]))


SIZE_GAPS = Statistic(
    "size_gaps",
    "How far is a large model ahead of a small one, as training goes on?",
    size_gaps,
    (
        *Column.texts(small="the smaller run", large="the largest run of its family", metric="the metric"),
        Column("domain", "", "the domain; its score is the mean of its tasks' scores above guessing"),
        Column("tokens", "tokens", "tokens of both: the last ones, and halves of them"),
        *Column.estimate("gap", "score above chance", "large minus small", "without an error", prefix="gap_"),
        *Column.estimate(
            "ratio", "1", "large over small", "where the small one is not told from guessing", prefix="ratio_"
        ),
        Column("checkpoints", "1", "checkpoints of the curve that has fewer"),
        Column("reason", "", "why there is no ratio", "where there is one"),
    ),
    "ratio of two means: Fieller 1954, J. R. Stat. Soc. B 16:175",
    definition="Chance-normalised means of domains of the largest run of a family minus those of each smaller one, and "
    "their ratio, at equal tokens. A family differs in its size alone.",
    caveat="Errors are those of questions, as if both runs had been asked others: wide, as they share them; without "
    "them the scatter from checkpoint to checkpoint. A ratio of scores near guessing says little.",
    chart=Chart("gap", panel="domain", reference=0.0, over="tokens", ratio="ratio"),
    count="checkpoints",
)
