"""Domains as curves: the mean of their tasks' scores above chance."""

import numpy as np
import pandas as pd

from fineline_jax.facts.score_table import COLUMNS
from fineline_jax.trajectories.statistics.defects import without_defects


def normalised(value: np.ndarray, chance: np.ndarray) -> np.ndarray:
    """(value - chance) / (1 - chance): 0 is guessing, 1 is perfect. NaN where chance is NaN or 1."""
    return (value - chance) / np.where(chance == 1, np.nan, 1 - chance)


def domain_curves(table: pd.DataFrame) -> pd.DataFrame:
    """Mean chance-normalised score of each (series, domain, metric) at every checkpoint, with its standard error.

    Only checkpoints at which all tasks of the domain were scored are kept, so that a change of the mean is never a
    change of its members. Errors of different tasks are independent: stderr = sqrt(sum se^2) / tasks. Tasks without a
    chance level are left out, and scores that measure nothing (`defects.without_defects`). The result is a tidy table
    whose task is the domain, with chance 0 and a column `tasks` (how many tasks a mean is over), so that `summarise`
    reads it too.
    """
    usable = without_defects(table[table["chance"].notna()])
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
