"""One self-contained page that shows what a table of scores says: `report.html`, with its tables and PNGs beside it.

The page carries plotly.js, its own script and style (`page/`), and the data as one JSON object; it loads nothing, from
the network or from disk, and says so to the browser (Content-Security-Policy). Figures are drawn in the browser from
that JSON, so that metric, axis and grouping can be changed by the reader.
"""

import html
import json
import math
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from plotly.offline import get_plotlyjs

from fineline_jax import __version__
from fineline_jax.atomic_files import atomic_file, write_atomic
from fineline_jax.errors import UserError
from fineline_jax.facts.metrics import METRICS, metric_of
from fineline_jax.text_table import counted
from fineline_jax.trajectories.report.figures import draw_figures, order_by_size
from fineline_jax.trajectories.statistics.dynamics import OUTCOMES, domain_curves, summarise
from fineline_jax.trajectories.table import normalise, write_table

_SCRIPTS = ("base.js", "timeline.js", "panels.js", "page.js")
_LOSS_POINTS = 1500  # more points than pixels make the page heavy and the line no clearer


def write_report(
    table: pd.DataFrame,
    out: Path,
    *,
    title: str = "Learning trajectories",
    facts: Mapping[str, Any] | None = None,
    losses: pd.DataFrame | None = None,
) -> Path:
    """Write `report.html`, `tidy.csv`, `tidy.parquet`, `dynamics.csv` and `figures/*.png` into `out`.

    table: a tidy table (see `table.normalise`); facts: what the footer states about the origin, name → value or
    name → mapping; losses: the run's logged steps with columns `tokens`, `loss` and, where present, `step`,
    `learning_rate`, `validation_loss`, `series`; a line may hold only some of them.
    Returns the path of `report.html`. Raises UserError for a defect of
    the tables, naming the column.
    """
    table = normalise(table)
    summary = summarise(table)
    domains = domain_curves(table)
    data = _page_data(table, summary, domains, losses)
    write_table(table, out)
    with atomic_file(out / "dynamics.csv") as partial:
        summary.to_csv(partial, index=False)
    metric = data["metrics"][data["default_metric"]]["name"]
    pictures = draw_figures(table, summary, domains, out / "figures", metric=metric, title=title)

    series = [f"{s['name']} ({counted(len(s['tokens']), 'checkpoint')})" for s in data["series"]]
    known = dict(facts or {}) | {"series": ", ".join(series), "made by": f"fineline_jax {__version__}"}
    links = ", ".join(f'<a href="figures/{html.escape(p.name)}">{html.escape(p.name)}</a>' for p in pictures)
    page = _fill(
        _page_file("report.html"),
        title=html.escape(title),
        css=_page_file("report.css"),
        facts="\n".join(_fact(name, value) for name, value in known.items()),
        figures=f", and pictures for print: {links}" if links else "",
        plotly=get_plotlyjs(),
        # "<" is escaped so that no task name can close the script element
        data=json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
        js="\n".join(_page_file(name).replace('"use strict";\n', "") for name in _SCRIPTS),
    )
    report = out / "report.html"
    write_atomic(report, page)
    return report


def _page_data(
    table: pd.DataFrame, summary: pd.DataFrame, domains: pd.DataFrame, losses: pd.DataFrame | None
) -> dict[str, Any]:
    """What the page's scripts read. Curves refer to series, tasks, domains and metrics by position, and their values
    are aligned with the checkpoints of their series (null where a checkpoint has no score)."""
    series_names, ordered = order_by_size(list(dict.fromkeys(table["series"])))
    domain_names = list(dict.fromkeys(table["domain"]))
    tasks = table.drop_duplicates("task")
    task_index = {name: i for i, name in enumerate(tasks["task"])}
    present = set(table["metric"])
    metric_names = [m for m in METRICS if m in present] + sorted(present - METRICS.keys())
    grids = {name: _grid(table[table["series"] == name]) for name in series_names}

    def curves(frame: pd.DataFrame, rows: pd.DataFrame, *, of_domains: bool) -> list[dict[str, Any]]:
        key = ["series", "task", "metric"]
        by_key = {tuple(row[k] for k in key): row for row in rows.to_dict("records")}
        made = []
        for group, part in frame.groupby(key, sort=False, observed=True):
            name, task, metric = map(str, group)
            indices = {"series": series_names.index(name), "metric": metric_names.index(metric)}
            indices |= {"domain": domain_names.index(task)} if of_domains else {"task": task_index[task]}
            part = part.set_index("checkpoint").reindex(grids[name]["checkpoint"])
            row = {k: v for k, v in by_key[name, task, metric].items() if k not in (*key, "domain")}
            last = part[part["value"].notna()].iloc[-1]
            made.append(
                indices
                | {"chance": _short(last["chance"]), "n": _short(last["n"])}
                | {column: [_short(v, 5) for v in part[column]] for column in ("value", "stderr")}
                | ({"tasks": int(last["tasks"])} if of_domains else {})
                | {"summary": indices | {k: _short(v) if isinstance(v, float) else v for k, v in row.items()}}
            )
        return made

    metrics = [vars(metric_of(m)) for m in metric_names]
    on_chance = table[table["chance"].notna()] if table["chance"].notna().any() else table
    covered = on_chance.groupby("metric", observed=True)["task"].nunique()
    return {
        "series": [
            {"name": name, "checkpoints": list(g["checkpoint"]), "steps": [_short(v, 9) for v in g["step"]]}
            | {"tokens": [_short(v, 9) for v in g["tokens"]]}
            for name, g in grids.items()
        ],
        "ordered": ordered,
        "outcomes": OUTCOMES,
        "domains": domain_names,
        "tasks": [
            {"name": t, "domain": domain_names.index(d)} for t, d in zip(tasks["task"], tasks["domain"], strict=True)
        ],
        "metrics": metrics,
        "default_metric": max(range(len(metrics)), key=lambda i: (covered.get(metric_names[i], 0), -i)),
        "curves": curves(table, summary, of_domains=False),
        "domain_curves": curves(domains, summarise(domains), of_domains=True) if len(domains) else [],
        "losses": None if losses is None or losses.empty else _loss_curves(losses),
    }


def _grid(part: pd.DataFrame) -> pd.DataFrame:
    return part.drop_duplicates("checkpoint").sort_values(["tokens", "step"])[["checkpoint", "step", "tokens"]]


def _loss_curves(losses: pd.DataFrame) -> list[dict[str, Any]]:
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
        keep = (
            np.unique(
                np.concatenate([f(1, len(training), _LOSS_POINTS) for f in (np.linspace, np.geomspace)]).astype(int)
            )
            - 1
        )
        smooth = pd.Series(_smooth(training["loss"].to_numpy(float)))
        curve: dict[str, Any] = {"series": str(name), "tokens": [_short(v, 9) for v in training["tokens"].iloc[keep]]}
        curve["step"] = [_short(v, 9) for v in step.iloc[keep]]
        curve["loss"] = [_short(v, 5) for v in smooth.iloc[keep]]
        curve["raw_loss"] = [_short(v, 5) for v in training["loss"].iloc[keep]]
        if "learning_rate" in training:
            curve["learning_rate"] = [_short(v, 5) for v in training["learning_rate"].iloc[keep]]
        curves.append(curve)
        if "validation_loss" in run and run["validation_loss"].notna().any():
            validation = run[run["validation_loss"].notna()]
            # a line that names only its step gets the tokens of that step
            known = np.interp(validation["step"], [0, *step], [0, *training["tokens"]]) if "step" in run else np.nan
            tokens = validation["tokens"].fillna(pd.Series(known, index=validation.index))
            curve["validation"] = {
                "tokens": [_short(v, 9) for v in tokens],
                "loss": [_short(v, 5) for v in validation["validation_loss"]],
            }
    return curves


def _smooth(loss: np.ndarray) -> np.ndarray:
    """Mean over the 5 % of steps before and after each step, so that the first steps are not smeared on a log axis."""
    index = np.arange(len(loss))
    half = np.minimum(np.ceil(index * 0.05), len(loss) - 1 - index).astype(int)
    sums = np.concatenate([[0.0], np.cumsum(loss)])
    return (sums[index + half + 1] - sums[index - half]) / (2 * half + 1)


def _short(value: Any, digits: int = 6) -> float | int | None:
    """A number with `digits` significant digits for JSON; NaN and infinities become null."""
    number = float(value)
    if not math.isfinite(number):
        return None
    rounded = float(f"{number:.{digits}g}")
    return int(rounded) if rounded == int(rounded) else rounded


def _fact(name: str, value: Any) -> str:
    if isinstance(value, Mapping):
        value = "; ".join(f"{k}: {v}" for k, v in value.items())
    elif isinstance(value, (list, tuple)):
        value = ", ".join(map(str, value))
    return f"<dt>{html.escape(str(name))}</dt><dd>{html.escape(str(value))}</dd>"


def _page_file(name: str) -> str:
    return resources.files("fineline_jax.trajectories.report").joinpath("page", name).read_text(encoding="utf-8")


def _fill(template: str, **parts: str) -> str:
    """Put each part in place of its {{name}}; parts are not searched again, whatever braces they hold."""
    pieces = []
    rest = template
    while "{{" in rest:
        before, _, rest = rest.partition("{{")
        name, _, rest = rest.partition("}}")
        pieces += [before, parts[name]]
    return "".join([*pieces, rest])
