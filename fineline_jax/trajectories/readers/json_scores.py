"""The scores of one task in a JSON file: {"acc,none": .5, "acc_stderr,none": .01} or {"acc": .5, "acc_stderr": .01}."""

import math
from collections.abc import Iterator
from typing import Any

_NOT_METRICS = {"alias", "samples", "name", "sample_len", "sample_count", "primary_score"}
_MISSING = {"n/a", "nan", "inf", "-inf", "infinity", "-infinity"}


def scores_of(scores: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A row (metric, value, stderr, stderr_missing) per metric; its value is NaN where the file has no finite one.

    stderr_missing: the file says that there is no standard error ("N/A"), which is more than not to speak of one.
    """
    for key, value in scores.items():
        metric, _, chosen = key.partition(",")
        if metric in _NOT_METRICS or metric.endswith("_stderr") or isinstance(value, bool):
            continue
        if isinstance(value, str) and value.lower() in _MISSING:
            value = math.nan
        if not isinstance(value, (int, float)):
            continue
        stderr = scores.get(f"{metric}_stderr,{chosen}" if chosen else f"{metric}_stderr")
        number = float(stderr) if isinstance(stderr, (int, float)) and math.isfinite(stderr) else math.nan
        yield {
            # the filter names the answer extraction; "none" is the plain metric
            "metric": metric if chosen in ("", "none") else f"{metric} ({chosen})",
            "value": float(value) if math.isfinite(value) else math.nan,
            "stderr": number,
            "stderr_missing": stderr is not None and math.isnan(number),
        }
