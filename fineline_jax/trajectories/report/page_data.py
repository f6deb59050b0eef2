"""What the page's scripts read: series, tasks, curves, statistics and the training log as plain values."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from fineline_jax.errors import UserError
from fineline_jax.facts.metrics import METRICS, metric_of
from fineline_jax.trajectories.codes import codes_of
from fineline_jax.trajectories.report.findings import Results, short
from fineline_jax.trajectories.report.style import order_by_size
from fineline_jax.trajectories.statistics.columns import Statistic, flops_per_token, shots_of, size_of
from fineline_jax.trajectories.statistics.dynamics import OUTCOMES

_LOSS_POINTS = 1500  # more points than pixels make the page heavy and the line no clearer
_MOST_SCORES = 400_000
"""Of larger tables the page shows some checkpoints of each series; the files beside it hold all."""
_MOST_ROWS = 4000
"""Of a statistic's frame in the page."""
_SUMMARY = (
    "first_tokens", "last_tokens", "n", "chance", "baseline", "final", "final_stderr", "level", "onset",
    "onset_outcome", "t50", "t50_low", "t50_high", "t50_outcome", "t90", "t90_low", "t90_high", "t90_outcome",
    "to_score", "to_score_low", "to_score_high", "to_score_outcome", "interval_from", "snr", "monotonicity", "verdict",
    "rank",
)  # fmt: skip
"""What the page shows of a curve's dynamics."""


def page_data(
    table: pd.DataFrame,
    summary: pd.DataFrame,
    domains: pd.DataFrame,
    domain_summary: pd.DataFrame,
    results: Results,
    losses: pd.DataFrame | None,
    metric: str,
) -> dict[str, Any]:
    """Curves refer to series, tasks, domains and metrics by position, and their values are aligned with the checkpoints
    of their series (null where a checkpoint has no score). metric: the one that is shown first. A
    series with an empty `seed` is the mean of an arm."""
    series_names, ordered = order_by_size(list(table["series"].unique()))
    domain_names = list(table["domain"].unique())
    tasks = table.drop_duplicates("task")
    metric_names = metrics_of(table)
    grids = {name: grid for name, grid in _grids(table)}
    every = sum(map(len, grids.values()))
    if len(table) > _MOST_SCORES:
        grids = {name: grid.iloc[_spread(len(grid), len(table) // len(grid))] for name, grid in grids.items()}
    roles, flops = _roles(table), flops_per_token(table)
    arms = dict(zip(table["series"], table["arm"])) if "arm" in table else {}
    held = {} if losses is None or losses.empty else _losses_at(table, grids, losses)
    place = {
        "series": {name: i for i, name in enumerate(series_names)},
        "task": {name: i for i, name in enumerate(tasks["task"])},
        "domain": {name: i for i, name in enumerate(domain_names)},
        "metric": {name: i for i, name in enumerate(metric_names)},
    }
    return {
        "series": [
            {"name": name, "checkpoints": list(grids[name]["checkpoint"]), "size": short(size_of(name))}
            | {"shots": shots_of(name), "role": roles.get(name, ""), "arm": arms.get(name), "flops": short(flops[name])}
            | {"loss": [short(v) for v in held[name]] if name in held else None}
            | {
                f"{key}s" if key == "step" else key: [short(v, 9) for v in grids[name][key]]
                for key in ("step", "tokens")
            }
            for name in series_names
        ],
        "ordered": ordered,
        "left_out": every - sum(map(len, grids.values())),
        "outcomes": OUTCOMES,
        "domains": domain_names,
        "tasks": [
            {"name": t, "domain": place["domain"][d]} for t, d in zip(tasks["task"], tasks["domain"], strict=True)
        ],
        "metrics": [vars(metric_of(m)) for m in metric_names],
        "default_metric": metric_names.index(metric),
        "curves": _curves(table, summary, grids, place),
        "domain_curves": _curves(domains, domain_summary, grids, place, of_domains=True) if len(domains) else [],
        "statistics": [
            _statistic(statistic, frame) for statistic, frame in results if statistic.name != results[0][0].name
        ],
        "losses": None if losses is None or losses.empty else loss_curves(losses),
    }


def _roles(table: pd.DataFrame) -> dict[str, str]:
    """Series -> mean (over the seeds of an arm) or seed (a run of such an arm), of those that are either."""
    if "seed" not in table:
        return {}
    who = table.drop_duplicates("series")[["series", "arm", "seed"]]
    means = who["seed"].isna()
    of_arm = who["arm"].isin(who["arm"][means])
    return {str(name): "mean" if mean else "seed" for name, mean in zip(who["series"][of_arm], means[of_arm])}


def _losses_at(table: pd.DataFrame, grids: dict[str, pd.DataFrame], losses: pd.DataFrame) -> dict[str, np.ndarray]:
    """By series: the first validation loss at its checkpoints, between two measurements linear in log tokens; of an arm
    the mean over its runs."""
    curves = {}
    for name, run in losses.groupby("series" if "series" in losses else lambda _: next(iter(grids))):
        sets = [column for column in run if str(column).startswith(VALIDATION) and run[column].notna().any()]
        if sets:
            measured = run[run[sets[0]].notna()].sort_values("tokens")
            curves[name] = np.log1p(measured["tokens"].to_numpy(float)), measured[sets[0]].to_numpy(float)
    runs = {name: [name] for name in grids}
    for mean in (name for name, role in _roles(table).items() if role == "mean"):
        arm = table["arm"][table["series"] == mean].iloc[0]
        runs[mean] = [name for name in table["series"][table["arm"] == arm].unique() if name != mean]
    at = {name: np.log1p(grid["tokens"].to_numpy(float)) for name, grid in grids.items()}
    return {
        name: np.mean([np.interp(at[name], *curves[run], left=np.nan, right=np.nan) for run in of], axis=0)
        for name, of in runs.items()
        if curves.keys() >= set(of)
    }


def metrics_of(table: pd.DataFrame) -> list[str]:
    """The metrics of a table, known ones in our order, then others by name."""
    present = set(table["metric"].unique())
    return [m for m in METRICS if m in present] + sorted(present - METRICS.keys())


def first_metric(table: pd.DataFrame) -> str:
    """The metric that is shown first: the one with a chance level for most tasks."""
    on_chance = table[table["chance"].notna()]
    pairs = (on_chance if len(on_chance) else table).drop_duplicates(["metric", "task"])
    covered = pairs["metric"].value_counts()
    return max(metrics_of(table), key=lambda metric: covered.get(metric, 0))


def _grids(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """(series, its checkpoints by tokens: checkpoint, step, tokens)."""
    points = table.drop_duplicates(["series", "checkpoint"])[["series", "checkpoint", "step", "tokens"]]
    by_series = points.sort_values(["tokens", "step"]).groupby("series", sort=False, observed=True)
    return [(str(name), part.drop(columns="series").reset_index(drop=True)) for name, part in by_series]


def _spread(count: int, scores_each: int) -> np.ndarray:
    """Positions of at most so many of `count` checkpoints, as many per decade as per stretch, the ends among them."""
    wanted = max(8, _MOST_SCORES // max(1, scores_each))
    if wanted >= count:
        return np.arange(count)
    halves = [f(1, count, wanted // 2) for f in (np.linspace, np.geomspace)]
    return np.unique(np.concatenate(halves).round().astype(int)) - 1


def _curves(
    table: pd.DataFrame, rows: pd.DataFrame, grids: dict, place: dict, *, of_domains: bool = False
) -> list[dict[str, Any]]:
    key = ["series", "task", "metric"]
    by_key = {tuple(row[k] for k in key): row for row in rows[[*key, *_SUMMARY]].to_dict("records")}
    at = {(name, c): i for name, grid in grids.items() for i, c in enumerate(grid["checkpoint"])}
    _, first, which = np.unique(codes_of(table, ["series", "checkpoint"]), return_index=True, return_inverse=True)
    pairs = table[["series", "checkpoint"]].iloc[first]
    position = np.array([at.get(pair, -1) for pair in pairs.itertuples(index=False, name=None)])[which]
    order: Any = table.groupby(key, sort=False, observed=True).indices
    values, stderrs = table["value"].to_numpy(float), table["stderr"].to_numpy(float)
    chance, n = table["chance"].to_numpy(float), table["n"].to_numpy(float)
    tokens = table["tokens"].to_numpy(float)
    counts = table["tasks"].to_numpy() if of_domains else None
    made = []
    for group, inside in order.items():
        name, task, metric = map(str, group)
        indices = {"series": place["series"][name], "metric": place["metric"][metric]}
        indices |= {"domain": place["domain"][task]} if of_domains else {"task": place["task"][task]}
        row = {k: v for k, v in by_key[name, task, metric].items() if k not in key}
        last = inside[np.argmax(tokens[inside])]
        curve: dict[str, Any] = indices | {"chance": short(chance[last]), "n": short(n[last])}
        shown = inside[position[inside] >= 0]
        for column, source in (("value", values), ("stderr", stderrs)):
            column_values: list[float | int | None] = [None] * len(grids[name])
            for where, value in zip(position[shown].tolist(), source[shown].tolist(), strict=True):
                column_values[where] = short(value, 5)
            curve[column] = column_values
        if counts is not None:
            curve["tasks"] = int(counts[last])
        made.append(curve | {"summary": indices | {k: short(v) if isinstance(v, float) else v for k, v in row.items()}})
    return made


def _statistic(statistic: Statistic, frame: pd.DataFrame) -> dict[str, Any]:
    shown = frame.head(_MOST_ROWS)
    columns: Sequence = [column for column in statistic.columns if column.name in frame]
    return {
        "name": statistic.name, "title": statistic.title, "definition": statistic.definition,
        "caveat": statistic.caveat, "source": statistic.source, "keys": statistic.keys, "total": len(frame),
        "columns": [vars(column) for column in columns],
        "chart": statistic.chart and vars(statistic.chart),
        "values": [_cells(shown[column.name]) for column in columns],
    }  # fmt: skip


def _cells(column: pd.Series) -> list:
    if pd.api.types.is_numeric_dtype(column):
        return [short(value) for value in column]
    return [None if value != value else str(value) for value in column]


VALIDATION = "validation_loss/"
"""Begins the column of the losses on a validation set; its name follows."""


def loss_curves(losses: pd.DataFrame) -> list[dict[str, Any]]:
    """The training log as curves of at most twice _LOSS_POINTS points, one per run, with all its validation losses."""
    for column in ("tokens", "loss"):
        if column not in losses:
            raise UserError(f"training log: column {column!r} is missing; metrics.jsonl of a run has it on every line")
    runs = losses.groupby("series", sort=False) if "series" in losses else [("", losses)]
    curves = []
    for name, run in runs:
        training = run[run["loss"].notna()].sort_values("tokens")
        if training.empty:
            continue
        step = training["step"] if "step" in training else pd.Series(range(len(training)), index=training.index)
        # as many points for each decade as for each stretch: the reader may look on a log or on a linear axis
        points = [f(1, len(training), _LOSS_POINTS) for f in (np.linspace, np.geomspace)]
        keep = np.unique(np.concatenate(points).astype(int)) - 1
        smooth = pd.Series(_smooth(training["loss"].to_numpy(float)))
        curve: dict[str, Any] = {"series": str(name), "tokens": [short(v, 9) for v in training["tokens"].iloc[keep]]}
        curve["step"] = [short(v, 9) for v in step.iloc[keep]]
        curve["loss"] = [short(v, 5) for v in smooth.iloc[keep]]
        curve["raw_loss"] = [short(v, 5) for v in training["loss"].iloc[keep]]
        for column in ("learning_rate", "gradient_norm"):
            if column in training:
                curve[column] = [short(v, 5) for v in training[column].iloc[keep]]
        if "flops" in training:
            curve["flops_per_token"] = short(training["flops"].iloc[-1] / training["tokens"].iloc[-1], 9)
        curves.append(curve)
        sets = [str(column) for column in run if str(column).startswith(VALIDATION) and run[column].notna().any()]
        curve["validation"] = [
            {
                "name": column.removeprefix(VALIDATION),
                **{name: [short(v, 9) for v in measured[name]] for name in ("tokens", "step") if name in measured},
                "loss": [short(v, 5) for v in measured[column]],
            }
            for column in sets
            for measured in [run[run[column].notna()].sort_values("tokens")]
        ]
    return curves


def _smooth(loss: np.ndarray) -> np.ndarray:
    """Mean over the 5 % of steps before and after each step, so that the first steps are not smeared on a log axis."""
    index = np.arange(len(loss))
    half = np.minimum(np.ceil(index * 0.05), len(loss) - 1 - index).astype(int)
    sums = np.concatenate([[0.0], np.cumsum(loss)])
    return (sums[index + half + 1] - sums[index - half]) / (2 * half + 1)
