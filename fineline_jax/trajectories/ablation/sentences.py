"""What a sweep found, in sentences: the lowest loss, what facets cost, which arms differ, what is not resolved."""

import math
from collections.abc import Iterator, Mapping

import pandas as pd

from fineline_jax.facts.metrics import metric_of
from fineline_jax.text_table import counted, listed
from fineline_jax.trajectories.ablation.critical_batch import CRITICAL_BATCH
from fineline_jax.trajectories.ablation.differences import ALL_TASKS, DIFFERENCES, RESOLUTION
from fineline_jax.trajectories.ablation.final_map import FACET_COST, FINAL_MAP
from fineline_jax.trajectories.ablation.instability import INSTABILITY
from fineline_jax.trajectories.ablation.transfer import TRANSFER
from fineline_jax.trajectories.statistics.columns import format_tokens
from fineline_jax.trajectories.statistics.comparison import BETTER, DECLINED, UNRESOLVED, WORSE

LOSS = "loss"
OVER_ALL = "A verdict holds over all comparisons of its metric (Holm), so an interval without 0 is not yet one."


def sentences(found: Mapping[str, pd.DataFrame]) -> list[str]:
    """One finding a sentence, plain text; found: frames of this package's statistics by `Statistic.name`."""
    speak = {
        FINAL_MAP: _lowest,
        FACET_COST: _facets,
        DIFFERENCES: _arms,
        CRITICAL_BATCH: _critical,
        TRANSFER: _order,
        INSTABILITY: _calm,
    }
    frames = ((say, found.get(statistic.name)) for statistic, say in speak.items())
    return [line for say, frame in frames if frame is not None and len(frame) for line in say(frame)]


def _lowest(frame: pd.DataFrame) -> Iterator[str]:
    for task, cells in frame[frame["metric"] == LOSS].groupby("task", sort=False):
        best = min(cells.to_dict("records"), key=lambda cell: cell["value"])
        place = " and ".join(f"{best[facet]} {_plain(best[f'{facet}_value'])}" for facet in ("x", "y"))
        value = f"{best['value']:.3f}{_between(best)} nats"
        yield f"The loss on {task}, mean of each run's last checkpoints, is lowest, {value}, at {place}."


def _facets(frame: pd.DataFrame) -> Iterator[str]:
    means = frame[(frame["metric"] == LOSS) & (frame["at"] == "all") & (frame["verdict"] != DECLINED)]
    for (task, facet), rows in means.groupby(["task", "facet"], sort=False):
        said = []
        for row in rows.to_dict("records"):
            low, high = sorted((row["low"], row["high"]), key=abs)
            found = f"{UNRESOLVED}, {row['gain']:+.3f}{_between(row)}"
            if row["verdict"] != UNRESOLVED:
                found = f"{row['verdict']} by {abs(row['gain']):.3f}{_between({'low': abs(low), 'high': abs(high)})}"
            said.append(f"at {_plain(row['level'])} {found}")
        yield f"{facet} (loss on {task}, against {_plain(rows['reference'].iloc[0])}): {'; '.join(said)}."


def _arms(frame: pd.DataFrame) -> Iterator[str]:
    """What can be said of several losses, or of several metrics, alike is said once; the losses first."""
    shown = frame[(frame["metric"] == LOSS) | (frame["task"] == ALL_TASKS)]
    alike: dict[tuple[bool, str, str, str], list[tuple[str, float]]] = {}
    for (metric, task), rows in (shown if len(shown) else frame).groupby(["metric", "task"], sort=False):
        reference, verdicts = rows["reference"].iloc[0], rows["verdict"].value_counts()
        counts = ", ".join(f"{verdicts[one]} {one}" for one in (BETTER, WORSE, UNRESOLVED, DECLINED) if one in verdicts)
        begin = f"Of {counted(len(rows), 'arm')} against {reference} in"
        end = f": {counts} (with {counted(int(rows['runs'].max()), 'seed')} each)"
        name, after = (f"loss on {task}", "") if metric == LOSS else (metric_of(str(metric)).label, f", {task}")
        needed = rows["seeds_needed"][rows["verdict"] == UNRESOLVED].max()
        alike.setdefault((metric != LOSS, begin, after, end), []).append((name, needed))
    for (_, begin, after, end), metrics in sorted(alike.items(), key=lambda group: group[0][0]):
        first, needed = metrics[0]
        line = f"{begin} {listed((name for name, _ in metrics), most=3)}{after}{end}"
        if math.isfinite(needed):
            line += f"; to resolve {RESOLUTION:g} in {first} it takes about {needed:,.0f} seeds per arm"
        elif not math.isnan(needed):
            line += f"; to resolve {RESOLUTION:g} in {first} it takes more documents, not more seeds"
        yield f"{line}."
    yield OVER_ALL


def _critical(frame: pd.DataFrame) -> Iterator[str]:
    for row in frame.to_dict("records"):
        begin = f"Branches at {format_tokens(row['branch'])} tokens, {row['metric']} on {row['task']}"
        if math.isfinite(row["critical"]):
            yield (
                f"{begin}: a batch of {row['critical']:.3g} costs {row['tolerance']:g} against {row['base']:g}"
                f"{_between(row, '.3g')}."
            )
        else:
            yield f"{begin}: {row['reason']} ({row['largest']:g})."


def _order(frame: pd.DataFrame) -> Iterator[str]:
    for row in frame[frame["accuracy"].notna()].to_dict("records"):
        ends = {"low": row["accuracy_low"], "high": row["accuracy_high"]}
        yield (
            f"{row['metric']} on {row['task']}: from size {_plain(row['small'])} to {_plain(row['large'])} a share of"
            f" {row['accuracy']:.3f}{_between(ends)} of the pairs of arms keeps its order."
        )


def _calm(frame: pd.DataFrame) -> Iterator[str]:
    diverged, spiked = frame[frame["diverged"].notna()], frame[frame["spikes"] > 0]
    runs = counted(len(frame), "run")
    yield f"Of {runs}, {len(diverged) or 'none'} diverged and {len(spiked) or 'none'} had a spike of the loss."


def _between(row: Mapping | pd.Series, spec: str = ".3f") -> str:
    """The 95 % interval, where there is one."""
    low, high = row["low"], row["high"]
    return f" (95 %: {low:{spec}} to {high:{spec}})" if math.isfinite(low) and math.isfinite(high) else ""


def _plain(value: object) -> str:
    if isinstance(value, str):
        return value
    number = float(value)  # pyright: ignore[reportArgumentType]
    return f"{number:,.0f}" if number == int(number) else f"{number:g}"
