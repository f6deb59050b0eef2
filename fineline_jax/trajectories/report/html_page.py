"""One self-contained page that shows what a table of scores says: `report.html`, with its tables and figures beside it.

The page carries plotly.js, its own script and style (`page/`), and the data as one JSON object; it loads nothing, from
the network or from disk, and says so to the browser (Content-Security-Policy). Figures are drawn in the browser from
that JSON, so that metric, axis and grouping can be changed by the reader.
"""

import html
import json
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import pandas as pd
from plotly.offline import get_plotlyjs

from fineline_jax import __version__
from fineline_jax.atomic_files import write_atomic
from fineline_jax.text_table import counted
from fineline_jax.trajectories.ablation.sentences import LOSS
from fineline_jax.trajectories.ablation.sentences import sentences as of_sweep
from fineline_jax.trajectories.report.figures import draw_figures
from fineline_jax.trajectories.report.findings import Results, compute, write_results
from fineline_jax.trajectories.report.page_data import first_metric, page_data
from fineline_jax.trajectories.report.sentences import sentences
from fineline_jax.trajectories.report.style import FigureStyle
from fineline_jax.trajectories.runs.facets import BETWEEN_SEEDS, arm_means
from fineline_jax.trajectories.statistics.domains import domain_curves
from fineline_jax.trajectories.statistics.dynamics import summarise
from fineline_jax.trajectories.table import normalise, write_table

_SCRIPTS = ("base.js", "timeline.js", "panels.js", "statistics.js", "page.js")
_SWEEP = "What the sweep found"


def write_report(
    table: pd.DataFrame,
    out: Path,
    *,
    title: str = "Learning trajectories",
    facts: Mapping[str, Any] | None = None,
    losses: pd.DataFrame | None = None,
    compared: Results = (),
    more: Results = (),
    checked: bool = False,
    figure_style: FigureStyle = FigureStyle(),
) -> Path:
    """Write `report.html`, `findings.json`, `tidy` and each statistic as .csv and .parquet, and figures, into `out`.

    table: a tidy table (see `table.normalise`); facts: what the footer states about the origin, name → value or
    name → mapping; losses: the run's logged steps with columns `tokens`, `loss` and, where present, `step`,
    `learning_rate`, `gradient_norm`, `flops`, `validation_loss/NAME`, `series`; a line need not have a loss; compared:
    statistics of a sweep's arms, which come first, with the validation loss as the metric shown at the start; more:
    other statistics that are no function of the table alone. Where the table has columns `arm` and `seed`, the page
    shows the means of arms over their seeds too. checked: the table is one that `table.read_table` gave, with more
    columns or without.
    Returns the path of `report.html`. Raises UserError for a defect of the tables, naming the column.
    """
    table = table if checked else normalise(table)
    results = [*compute(table), *more]
    summary = results[0][1]
    metric = LOSS if len(compared) and LOSS in table["metric"].unique() else first_metric(table)
    domains = domain_curves(table)
    said = sentences(summary, results, metric)
    if found := of_sweep({statistic.name: frame for statistic, frame in compared}):
        said = {_SWEEP: found} | said
    results[1:1] = compared
    shown = *_with_arms(table, summary), *_with_arms(*_of_domains(table, domains))
    data = page_data(*shown, results, losses, metric)
    write_table(table, out)
    write_results(results, said, out, title=title)
    pictures = draw_figures(table, results, domains, out / "figures", metric=metric, title=title, style=figure_style)

    series = [f"{s['name']} ({counted(len(s['tokens']), 'checkpoint')})" for s in data["series"]]
    known = dict(facts or {}) | {"series": ", ".join(series), "made by": f"fineline_jax {__version__}"}
    page = _fill(
        _page_file("report.html"),
        title=html.escape(title),
        css=_page_file("report.css"),
        sentences="".join(map(_section, said.items())),
        facts="\n".join(_fact(name, value) for name, value in known.items()),
        tables=", ".join(_link(f"{statistic.name}.csv") for statistic, _ in results),
        figures=", ".join(_link(f"figures/{path.name}", path.stem) for path in pictures if path.suffix == ".pdf"),
        plotly=get_plotlyjs(),
        # "<" is escaped so that no task name can close the script element
        data=json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
        js="\n".join(_page_file(name).replace('"use strict";\n', "") for name in _SCRIPTS),
    )
    report = out / "report.html"
    write_atomic(report, page)
    return report


def _of_domains(table: pd.DataFrame, domains: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The curves of domains, with the arm and seed of their series, and their dynamics."""
    summary = summarise(domains) if len(domains) else domains
    who = table[["series", *(name for name in ("arm", "seed") if name in table)]].drop_duplicates("series")
    return domains.merge(who, on="series", how="left"), summary


def _with_arms(table: pd.DataFrame, summary: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Both with the means of arms over their seeds as series of their own, whose column `seed` is empty."""
    means = arm_means(table) if "arm" in table and len(table) else table.iloc[:0]
    if means.empty:
        return table, summary
    of_means = summarise(means).assign(interval_from=BETWEEN_SEEDS)
    return pd.concat([table, means], ignore_index=True), pd.concat([summary, of_means], ignore_index=True)


def _section(part: tuple[str, list[str]]) -> str:
    heading, lines = part
    wide = ' class="wide"' if heading == _SWEEP else ""
    said = "".join(f"<p>{html.escape(line)}</p>" for line in lines)
    return f"<details{wide} open><summary><h3>{html.escape(heading)}</h3></summary>{said}</details>"


def _link(path: str, text: str = "") -> str:
    return f'<a href="{html.escape(path)}">{html.escape(text or path)}</a>'


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
    return re.sub(r"{{(\w+)}}", lambda found: parts[found[1]], template)
