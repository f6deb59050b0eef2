"""How long the analysis of a large table takes and how much memory: reading, verdicts, means of domains.

A synthetic table of SERIES x CHECKPOINTS x TASKS x 5 metrics is written as Parquet and read as any table is, once, in
this process. CPU seconds, as other processes may run; peak resident memory with all that was loaded.

    python benchmarks/analyze_scale.py [--series 50] [--checkpoints 200] [--tasks 100] [--report DIR]
"""

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fineline_jax.trajectories.report.html_page import write_report
from fineline_jax.trajectories.statistics.defects import defects
from fineline_jax.trajectories.statistics.domains import domain_curves
from fineline_jax.trajectories.statistics.dynamics import summarise
from fineline_jax.trajectories.table import read_table


def series_table(number: int, checkpoints: int, tasks: int) -> pd.DataFrame:
    """Tasks that rise at different times, with binomial errors: accuracies, a probability, a loss and a margin."""
    rng = np.random.default_rng(number)
    tokens = np.concatenate([[0], np.geomspace(1e8, 3e12, checkpoints - 1)])
    middle = np.exp(rng.normal(np.log(1e11), 1.5, (tasks, 1)))
    rise = 1 / (1 + (middle / np.maximum(tokens, 1)) ** 1.2)
    right = 0.25 + (rng.uniform(0.25, 0.9, (tasks, 1)) - 0.25) * rise
    values = {name: rng.binomial(1000, right) / 1000 for name in ("acc", "acc_norm")} | {
        "choice_prob": right * 0.8 + 0.05 + rng.normal(0, 0.01, right.shape),
        "bits_per_byte": 3 - 2 * rise + rng.normal(0, 0.02, right.shape),
        "margin": 2 * rise - 1 + rng.normal(0, 0.05, right.shape),
    }
    key = {
        "series": f"run{number}", "checkpoint": np.tile([f"step{i}" for i in range(checkpoints)], tasks),
        "step": np.tile(np.arange(checkpoints) * 1000.0, tasks), "tokens": np.tile(tokens, tasks), "n": 1000.0,
        "domain": np.repeat([f"domain{task % 10}" for task in range(tasks)], checkpoints),
        "task": np.repeat([f"task{task}" for task in range(tasks)], checkpoints),
    }  # fmt: skip
    parts = []
    for metric, value in values.items():
        share = metric not in ("bits_per_byte", "margin")
        stderr = np.sqrt(value * (1 - value) / 1000).ravel() if metric.startswith("acc") else 0.01
        more = {"metric": metric, "value": value.ravel(), "stderr": stderr, "chance": 0.25 if share else np.nan}
        parts.append(pd.DataFrame(key | more))
    return pd.concat(parts)


def measured(name: str, step: Callable[..., Any], *arguments: Any) -> Any:
    start, wall = time.process_time(), time.perf_counter()
    made = step(*arguments)
    row = {"step": name, "cpu_s": round(time.process_time() - start, 1)}
    row |= {"wall_s": round(time.perf_counter() - wall, 1)}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    row |= {"peak_gb": round(peak, 2), "rows": len(made) if isinstance(made, pd.DataFrame) else None}
    print(json.dumps(row), flush=True)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("series", 50), ("checkpoints", 200), ("tasks", 100)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--table", type=Path, help="read this table instead")
    parser.add_argument("--report", type=Path, help="also write the whole report there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = options.table
        if path is None:
            path = Path(folder) / "scores.parquet"
            parts = (series_table(i, options.checkpoints, options.tasks) for i in range(options.series))
            pd.concat(parts, ignore_index=True).to_parquet(path)
        table = measured("read", read_table, path)
    measured("verdicts", summarise, table)
    measured("domains", domain_curves, table)
    measured("defects", defects, table)
    if options.report is not None:
        measured("report", write_report, table, options.report)


if __name__ == "__main__":
    main()
